"""Heat maps of a reward in a plane: its mean by bin, its maximum, and whether that is the goal."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from gendiff import check


class Heat(NamedTuple):
    """Means by bin; bin (i, j) covers [i, i + 1) x [j, j + 1) in units of `size`, from `origin` on."""

    mean: Float[np.ndarray, "rows columns"]
    """0 in bins with too few values."""
    counts: Int[np.ndarray, "rows columns"]
    origin: tuple[float, float]
    size: float


def heat(
    points: Float[np.ndarray, "n 2"],
    values: Float[np.ndarray, " n"],
    extent: tuple[int, int],
    bins: int = 10,
    least: int = 5,
    tails: float = 0.005,
) -> Heat:
    """Average values by bin, after winsorising and scaling them to [0, 1] (relative reward's released code).

    Args:
      points: (x, y) in cells; the middle of the maze's cell (0, 0) is the origin.
      extent: numbers of cells along x and y, 1 or more.
      bins: bins along a cell's side, 1 or more.
      least: least number of values of a bin, 1 or more.
      tails: share that is cut at either end, in [0, 0.5).

    Raises:
      ValueError: shapes differ, a point or a value is not finite, or a number is out of range.
    """
    points, values = np.asarray(points, np.float64), np.asarray(values, np.float64)
    check.shape("heat: values", values, (None,))
    check.shape("heat: points", points, (len(values), 2))
    check.number("heat: number of points", len(points), at_least=1)
    check.number("heat: points", points)
    check.number("heat: values", values)
    check.shape("heat: extent", extent, (2,))
    check.number("heat: extent", extent, at_least=1, whole=True)
    check.number("heat: bins", bins, at_least=1, whole=True)
    check.number("heat: least", least, at_least=1, whole=True)
    check.number("heat: tails", tails, at_least=0, below=0.5)
    low, high = np.quantile(values, [tails, 1 - tails])
    scaled = (np.clip(values, low, high) - low) / max(high - low, np.finfo(np.float64).tiny)
    edges: list[Any] = [np.linspace(0, cells, cells * bins + 1) for cells in extent]
    x, y = (points + 0.5).T
    count = np.histogram2d(x, y, edges)[0]
    total = np.histogram2d(x, y, edges, weights=scaled)[0]
    mean = np.where(count >= least, total / np.maximum(count, 1), 0.0)
    return Heat(mean, np.where(count >= least, count, 0).astype(int), (-0.5, -0.5), 1 / bins)


def smoothed(field: Heat, width: float = 2.0) -> Float[np.ndarray, "rows columns"]:
    """Smooth the means by a Gaussian of `width` bins, over bins with values only; empty bins are -inf.

    Raises:
      ValueError: `width` is negative.
    """
    check.number("heat: width", width, at_least=0)
    filled = (field.counts > 0).astype(np.float64)
    blur = lambda a: ndimage.gaussian_filter(a, width, mode="constant")
    mass = blur(filled)
    return np.where(filled > 0, blur(field.mean * filled) / np.maximum(mass, np.finfo(np.float64).tiny), -np.inf)


def highest(field: Heat, width: float = 2.0) -> tuple[float, float]:
    """Return the middle of the bin with the largest smoothed mean, in the units of the points.

    Raises:
      ValueError: no bin has enough values, or `width` is negative.
    """
    smooth = smoothed(field, width)
    if not np.isfinite(smooth).any():
        raise ValueError("heat: a bin must have enough values, got none; take fewer bins, or more points")
    i, j = np.unravel_index(int(np.argmax(smooth)), smooth.shape)
    return tuple(o + (k + 0.5) * field.size for o, k in zip(field.origin, (i, j), strict=True))  # type: ignore[return-value]


def recovered(field: Heat, goal: tuple[float, float], within: float = 1.0) -> bool:
    """Return True if the maximum lies within `within` cells of the goal; 1 in arXiv 2306.01804, section 5.1.

    Raises:
      ValueError: see `highest`; or the goal is not a finite point (x, y).
    """
    check.shape("heat: goal", goal, (2,))
    check.number("heat: goal", goal)
    check.number("heat: within", within, at_least=0)
    return bool(np.hypot(*np.subtract(highest(field), goal)) <= within)
