"""Discriminability of two sets by a scalar per sample: the accuracy of a logistic regression."""

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
    """Return the balanced accuracy of telling the expert's rewards from the base's.

    The classifier is a logistic regression on winsorised, standardised values.  Weights balance the two sets, and the
    slope has an L2 penalty with C = 1.

    Args:
      held_out: True: fit on even values and score on odd ones.  False: fit and score on all, like the published code.
      tails: share of the fitted values to clip at either end, in [0, 0.5).

    Returns:
      The accuracy with Wilson's interval, which assumes independent values.

    Raises:
      ValueError: a set has fewer than 4 values or a value that is not finite, or `tails` is out of range.
    """
    check.number("discriminability: tails", tails, at_least=0, below=0.5)
    groups = [np.asarray(rewards, np.float64) for rewards in (base, expert)]
    for name, values in zip(("base", "expert"), groups, strict=True):
        check.shape(f"discriminability: {name}", values, (None,))
        check.number(f"discriminability: values of {name}", len(values), at_least=4)
        check.number(f"discriminability: {name}", values)
    fitted = [values[::2] if held_out else values for values in groups]
    scored = [values[1::2] if held_out else values for values in groups]
    low, high = np.quantile(np.concatenate(fitted), [tails, 1 - tails])
    cut = [np.clip(values, low, high) for values in fitted]
    middle, width = float(np.mean(np.concatenate(cut))), float(np.std(np.concatenate(cut)))
    # Relative to the mean, because a reward's unit is arbitrary: values that differ only by rounding count as equal.
    width = width if width > 1e-12 * abs(middle) else 1.0
    unit = lambda values: (np.clip(values, low, high) - middle) / width
    inputs, labels = np.concatenate([unit(values) for values in cut])[:, None], np.repeat([0, 1], [*map(len, cut)])
    model = LogisticRegression(class_weight="balanced").fit(inputs, labels)
    right = [np.mean(model.predict(unit(values)[:, None]) == label) for label, values in enumerate(scored)]
    n = sum(map(len, scored))
    return rate(round(np.mean(right) * n), n)
