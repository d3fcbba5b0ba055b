"""Checks of arguments: one error for one kind of bad input, `where: name must be .., got ..`.

Values that JAX traces have no number yet and pass; shapes are known in traced code too and are always checked.  Every
check returns what it was given, so that it can stand where the value is used.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def number(
    name: str,
    value: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    infinite: bool = False,
) -> T:
    """Return `value`, a number, or an array of numbers, within the bounds; NaN is outside of all bounds.

    Args:
      name: such as "elbo: levels".
      at_least, at_most: bounds that are allowed themselves.
      above, below: bounds that are not.
      whole: only integers (also NumPy's and JAX's) are allowed; a Boolean is none.
      infinite: infinities within the bounds are allowed.

    Raises:
      ValueError: it is outside, or is no number.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    wanted = _bounds(at_least, above, at_most, below, whole, infinite)
    plain: Any = value
    try:
        array = np.asarray(operator.index(plain) if whole and np.ndim(plain) == 0 else plain)
        kind = array.dtype.kind
    except (TypeError, ValueError):
        kind = "O"
    if kind not in ("iu" if whole else "iufV") or isinstance(value, bool):  # V: JAX's narrow floats
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    array = array.astype(np.float64) if kind == "V" else array
    inside = np.ones(array.shape, bool) if infinite else np.isfinite(array)
    inside &= ~np.isnan(array)
    limits = ((at_least, np.greater_equal), (above, np.greater), (at_most, np.less_equal), (below, np.less))
    for bound, compare in limits:
        if bound is not None:
            inside &= compare(array, bound)
    if not inside.all():
        got = value if array.ndim == 0 else f"{array[~inside].flat[0]} among {array.size} values"
        raise ValueError(f"{name} must be {wanted}, got {got}")
    return value


def _bounds(
    at_least: float | None, above: float | None, at_most: float | None, below: float | None, whole: bool, infinite: bool
) -> str:
    words = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
        if bound is not None and math.isfinite(bound)
    ]
    kind = "a whole number" if whole else "a number" if infinite else "a finite number"
    return " and ".join(words) + ("" if not whole else " and whole") if words else kind


def choice(name: str, value: T, choices: Sequence[T]) -> T:
    """Return `value`, one of `choices`.

    Raises:
      ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def shape(name: str, value: T, wanted: Sequence[int | None]) -> T:
    """Return `value`, an array (or a `jax.ShapeDtypeStruct`) of a shape; None stands for any length.

    NumPy's broadcasting would turn a wrong shape into a plausible number.

    Raises:
      ValueError: it has another shape; both are named.
    """
    plain: Any = value
    got = np.shape(plain)
    if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
        text = ", ".join("n" if size is None else str(size) for size in wanted) + ("," if len(wanted) == 1 else "")
        raise ValueError(f"{name} must have shape ({text}), got {got}")
    return value


def broadcasts(name: str, value: T, wanted: Sequence[int]) -> T:
    """Return `value`, an array that broadcasts to a shape without widening it, such as a mask (n, 1) for (n, d).

    Raises:
      ValueError: it does not; both shapes are named.
    """
    plain: Any = value
    got = np.shape(plain)
    if len(got) > len(wanted) or any(g not in (1, w) for g, w in zip(got[::-1], tuple(wanted)[::-1], strict=False)):
        raise ValueError(f"{name} must broadcast to shape {tuple(wanted)}, got {got}")
    return value


def rows(name: str, tree: Any) -> int:
    """Return the number of rows of a pytree: the length of axis 0, which all its arrays share.

    Raises:
      ValueError: there is no array, one has no axis, or the lengths differ.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if not shapes:
        raise ValueError(f"{name} must have at least one array, got none")
    if any(shape == () for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"{name} must be arrays with one number of rows, got shapes {', '.join(map(str, shapes))}")
    return shapes[0][0]
