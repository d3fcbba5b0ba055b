"""Checks of arguments, which raise `where: name must be .., got ..` or return their value for use in place.

Traced values have no number yet and pass; their shapes are checked.
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
    """Return `value`, a number or an array of numbers within the bounds; NaN is outside of all bounds.

    Args:
      name: such as "elbo: levels".
      at_least, at_most: inclusive bounds.
      above, below: exclusive bounds.
      whole: allow only integers (also NumPy's and JAX's), no Booleans.
      infinite: allow infinities within the bounds.

    Raises:
      ValueError: `value` is out of bounds or no number.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    signs = (">=", np.greater_equal), (">", np.greater), ("<=", np.less_equal), ("<", np.less)
    pairs = zip(signs, (at_least, above, at_most, below), strict=True)
    limits = [(sign, compare, bound) for (sign, compare), bound in pairs if bound is not None]
    words = [f"{sign} {bound:g}" for sign, _, bound in limits if math.isfinite(bound)]
    if not words:
        words = ["a whole number" if whole else "a number" if infinite else "a finite number"]
    elif whole:
        words.append("whole")
    wanted = " and ".join(words)
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
    for _, compare, bound in limits:
        inside &= compare(array, bound)
    if not inside.all():
        got = value if array.ndim == 0 else f"{array[~inside].flat[0]} among {array.size} values"
        raise ValueError(f"{name} must be {wanted}, got {got}")
    return value


def choice(name: str, value: T, choices: Sequence[T]) -> T:
    """Return `value`; raise ValueError if it is not among `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def shape(name: str, value: T, wanted: Sequence[int | None]) -> T:
    """Return `value`, an array or `jax.ShapeDtypeStruct`; raise ValueError if its shape is not `wanted` (None: any
    length), because broadcasting would turn a wrong shape into a plausible number."""
    plain: Any = value
    got = np.shape(plain)
    if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
        text = ", ".join("n" if size is None else str(size) for size in wanted) + ("," if len(wanted) == 1 else "")
        raise ValueError(f"{name} must have shape ({text}), got {got}")
    return value


def broadcasts(name: str, value: T, wanted: Sequence[int]) -> T:
    """Return `value`; raise ValueError unless it broadcasts to `wanted` without widening it, as (n, 1) to (n, d)."""
    plain: Any = value
    got = np.shape(plain)
    if len(got) > len(wanted) or any(g not in (1, w) for g, w in zip(got[::-1], tuple(wanted)[::-1], strict=False)):
        raise ValueError(f"{name} must broadcast to shape {tuple(wanted)}, got {got}")
    return value


def rows(name: str, tree: Any) -> int:
    """Return the length of axis 0, which all arrays of a pytree share.

    Raises:
      ValueError: the tree has no array, an array has no axis, or the lengths differ.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if not shapes:
        raise ValueError(f"{name} must have at least one array, got none")
    if any(shape == () for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"{name} must be arrays with one number of rows, got shapes {', '.join(map(str, shapes))}")
    return shapes[0][0]
