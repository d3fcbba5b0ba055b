"""Precision and recall of samples in a feature space (Kynkäänniemi et al. 2019, "Improved precision and recall metric
for assessing generative models", section 2).

The manifold of a set of features is a union of balls around its points.  A ball's radius is the distance to the point's
k-th nearest neighbour in the set.  Precision is the share of generated points on the manifold of the real points;
recall is the share of real points on the manifold of the generated points.

Both depend on the sizes of the sets, because smaller sets have wider balls: compare only equal sizes.  Rare modes need
at least a few thousand points (the paper takes 50,000 and k = 3).  With fewer points, add a reference row: the metric
between two disjoint halves of the real data is the best that a model can reach.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial.distance import cdist

from gendiff import check
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate

Features: TypeAlias = Float[np.ndarray, "n d"]
Squares: TypeAlias = Float[np.ndarray, " n"]

CHUNK = 1024
"""Rows of distances in memory at a time."""
SLACK = 1e-14
"""Upper bound of the relative error of a squared distance."""
LARGEST = 1e150
"""Largest absolute feature, because squares of larger ones overflow."""


class Diversity(NamedTuple):
    """Precision and recall, in [0, 1]."""

    precision: Estimate
    """Share of generated samples on the manifold of the real ones."""
    recall: Estimate
    """Share of real samples on the manifold of the generated ones."""


def precision_recall(real: Features, generated: Features, k: int = 3) -> Diversity:
    """Return improved precision and recall with Wilson's intervals.

    The intervals cover the variance of the tested points, but treat the manifold as fixed; `by_splits` covers both.

    Args:
      real, generated: features (n, d) and (m, d) of samples.
      k: rank of the neighbour that sets a ball's radius; 3 in the paper, up to 5 for less variance.

    Raises:
      ValueError: widths differ, a feature is not finite or above LARGEST, or a set has less than k + 1 points.
    """
    real, generated = _checked("real", real, k), _checked("generated", generated, k)
    check.shape("diversity: generated", generated, (None, real.shape[1]))
    precise = inside(generated, real, radii(real, k))
    recalled = inside(real, generated, radii(generated, k))
    return Diversity(rates.rate(int(precise.sum()), len(precise)), rates.rate(int(recalled.sum()), len(recalled)))


def by_splits(real: Features, generated: Features, k: int = 3, splits: int = 5, seed: int = 0) -> Diversity:
    """Average over random disjoint splits of both sets, with Student's interval over the splits.

    The interval also covers the variance of the manifolds.  The value differs from that of the full sets, because a
    split is smaller: compare it only with equal splits of equal sizes.

    Args:
      real, generated, k: see `precision_recall`, also for the errors of a split.
      splits: number of splits, >= 2.
      seed: >= 0.
    """
    check.number("diversity: splits", splits, at_least=2, whole=True)
    check.number("diversity: seed", seed, at_least=0, whole=True)
    rng = np.random.default_rng(seed)
    parts = lambda a: (a[rows] for rows in np.array_split(rng.permutation(len(a)), splits))
    pairs = zip(parts(np.asarray(real)), parts(np.asarray(generated)), strict=True)
    of_splits = [precision_recall(*pair, k) for pair in pairs]
    return Diversity(*(rates.over_seeds(estimates) for estimates in zip(*of_splits, strict=True)))


def radii(points: Features, k: int) -> Squares:
    """Return squared distances from points to their k-th nearest neighbours; 0 if k neighbours coincide."""
    # Index k and not k - 1, because a point is its own nearest neighbour.
    kth = [np.partition(squared_distances(rows, points), k, 1)[:, k] for rows in _chunks(points)]
    return np.concatenate(kth)


def inside(points: Features, centres: Features, squared_radii: Squares) -> Bool[np.ndarray, " n"]:
    """Return True for points (n, d) in a closed ball around any of the centres (m, d)."""
    edges = squared_radii * (1 + SLACK)  # the slack keeps the border inside in spite of rounding
    return np.concatenate([np.any(squared_distances(rows, centres) <= edges, 1) for rows in _chunks(points)])


def squared_distances(rows: Float[np.ndarray, "r d"], points: Features) -> Float[np.ndarray, "r n"]:
    """Return |x - y|^2 from differences in float64.

    The faster |x|^2 + |y|^2 - 2 x y loses all digits of distances that are small beside |x|, such as after a common
    offset of all features.
    """
    return cdist(rows, points, "sqeuclidean")


def _chunks(points: Features) -> list[np.ndarray]:
    return [points[first : first + CHUNK] for first in range(0, len(points), CHUNK)]


def _checked(name: str, features: Features, k: int) -> np.ndarray:
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"diversity: {name} must be features (n, d) with d >= 1, got shape {array.shape}")
    check.number(f"diversity: {name}", array, at_least=-LARGEST, at_most=LARGEST)
    check.number("diversity: k", k, at_least=1, whole=True)
    if len(array) <= k:
        raise ValueError(f"diversity: {name} must have more than k = {k} points, got {len(array)}; take a smaller k")
    return array
