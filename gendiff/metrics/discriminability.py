"""How well one number a sample tells two sets apart: the accuracy of a logistic regression on it."""

import numpy as np
from jaxtyping import Float

from gendiff import check
from gendiff.metrics.rates import Estimate, rate

try:
    from sklearn.linear_model import LogisticRegression
except ModuleNotFoundError:
    raise ModuleNotFoundError("discriminability needs scikit-learn: pip install 'gendiff[maze]'") from None


def accuracy(
    base: Float[np.ndarray, " n"], expert: Float[np.ndarray, " m"], held_out: bool = True, tails: float = 0.01
) -> Estimate:
    """Balanced accuracy in telling the expert's rewards from the base's.

    A logistic regression with weights that balance the two sets (and an L2 penalty of C = 1 on the slope), of values
    that are winsorised and standardised.

    Args:
      held_out: fit on the even and score on the odd values; otherwise both on all, as the published code does.
      tails: share that is cut at either end, of the values that are fitted, in [0, 0.5).

    Returns:
      With Wilson's interval, as if all values were independent.

    Raises:
      ValueError: a set has fewer than 4 values, or one that is not finite, or `tails` is out of range.
    """
    check.number("discriminability: tails", tails, at_least=0, below=0.5)
    groups = [np.asarray(each, np.float64) for each in (base, expert)]
    for name, values in zip(("base", "expert"), groups, strict=True):
        check.shape(f"discriminability: {name}", values, (None,))
        check.number(f"discriminability: values of {name}", len(values), at_least=4)
        check.number(f"discriminability: {name}", values)
    fitted = [each[::2] if held_out else each for each in groups]
    scored = [each[1::2] if held_out else each for each in groups]
    low, high = np.quantile(np.concatenate(fitted), [tails, 1 - tails])
    cut = [np.clip(each, low, high) for each in fitted]
    middle, width = float(np.mean(np.concatenate(cut))), float(np.std(np.concatenate(cut)))
    # Values that differ by rounding alone are equal; the units of a reward do not matter.
    width = width if width > 1e-12 * abs(middle) else 1.0
    unit = lambda each: (np.clip(each, low, high) - middle) / width
    values, labels = np.concatenate([unit(each) for each in cut])[:, None], np.repeat([0, 1], [*map(len, cut)])
    model = LogisticRegression(class_weight="balanced").fit(values, labels)
    right = [np.mean(model.predict(unit(each)[:, None]) == label) for label, each in enumerate(scored)]
    n = sum(map(len, scored))
    return rate(round(np.mean(right) * n), n)
