"""Precision and recall of samples in a feature space (Kynkäänniemi et al. 2019, "Improved precision and recall metric
for assessing generative models", section 2).

A set of features stands for its manifold: the union of balls around its points, each as wide as the distance to the
point's k-th nearest neighbour in the set.  Precision is the share of generated points on the manifold of the real ones,
recall the share of real points on the manifold of the generated ones.

Both depend on the sizes of the sets, as smaller sets have wider balls: compare numbers of equal sizes only, and of at
least a few thousand points where modes are rare (the paper takes 50,000 and k = 3).  With fewer, a reference row helps:
the same metric between two disjoint halves of the real data is the best that a model could reach.
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
"""Rows whose distances are held at a time."""
SLACK = 1e-14
"""Relative error of a squared distance, and more."""
LARGEST = 1e150
"""Of a feature: squares of larger ones overflow."""


class Diversity(NamedTuple):
    """Both are in [0, 1]."""

    precision: Estimate
    """Share of generated samples that lie where real ones do."""
    recall: Estimate
    """Share of real samples that lie where generated ones do."""


def precision_recall(real: Features, generated: Features, k: int = 3) -> Diversity:
    """Improved precision and recall with Wilson's intervals.

    The intervals are those of the points that are tested, with the other set's manifold as given; `by_splits` has the
    manifold's variance too.

    Args:
      real: features (n, d) of real samples.
      generated: features (m, d).
      k: neighbour that sets a ball's radius; 3 in the paper, up to 5 for less variance.

    Raises:
      ValueError: shapes do not fit, a feature is not finite or above LARGEST, or a set has less than k + 1 points.
    """
    real, generated = _checked("real", real, k), _checked("generated", generated, k)
    check.shape("diversity: generated", generated, (None, real.shape[1]))
    precise = inside(generated, real, radii(real, k))
    recalled = inside(real, generated, radii(generated, k))
    return Diversity(rates.rate(int(precise.sum()), len(precise)), rates.rate(int(recalled.sum()), len(recalled)))


def by_splits(real: Features, generated: Features, k: int = 3, splits: int = 5, seed: int = 0) -> Diversity:
    """The mean over random disjoint splits of both sets, with Student's interval over the splits.

    The interval holds the variance of the manifolds too.  Each split is smaller, so the value is another one than that
    of the whole sets (see above): compare it with equal splits of equal sizes.

    Args:
      real: features (n, d).
      generated: features (m, d).
      k: as in `precision_recall`.
      splits: 2 or more.
      seed: of the splits, 0 or more.

    Raises:
      ValueError: as `precision_recall`, of a split.
    """
    check.number("diversity: splits", splits, at_least=2, whole=True)
    check.number("diversity: seed", seed, at_least=0, whole=True)
    rng = np.random.default_rng(seed)
    parts = lambda a: (a[rows] for rows in np.array_split(rng.permutation(len(a)), splits))
    pairs = zip(parts(np.asarray(real)), parts(np.asarray(generated)), strict=True)
    each = [precision_recall(*pair, k) for pair in pairs]
    return Diversity(*(rates.over_seeds(estimates) for estimates in zip(*each, strict=True)))


def radii(points: Features, k: int) -> Squares:
    """Squared distance from each point to its k-th nearest other one; 0 where k others have the same place."""
    # Each point is its own nearest.
    kth = [np.partition(squared_distances(rows, points), k, 1)[:, k] for rows in _chunks(points)]
    return np.concatenate(kth)


def inside(points: Features, centres: Features, squared_radii: Squares) -> Bool[np.ndarray, " n"]:
    """Which points (n, d) lie in a ball around any of the centres (m, d); its border belongs to it."""
    hits = []
    for rows in _chunks(points):
        # The slack is the error of a squared distance: the border belongs to a ball however it was rounded.
        hits.append(np.any(squared_distances(rows, centres) <= squared_radii * (1 + SLACK), 1))
    return np.concatenate(hits)


def squared_distances(rows: Float[np.ndarray, "r d"], points: Features) -> Float[np.ndarray, "r n"]:
    """|x - y|^2 by differences in float64, each to a few digits of rounding.

    |x|^2 + |y|^2 - 2 x y, a matrix product, loses all digits of a distance that is small beside |x|: one outlier, or
    an offset that all features share, is enough.
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
