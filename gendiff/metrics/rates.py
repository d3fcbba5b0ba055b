"""Estimates with 95 % intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from gendiff import check

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number with its interval and the number of samples behind it; an exact number has low = value = high."""

    value: float
    low: float
    high: float
    n: int


def rate(events: int, n: int) -> Estimate:
    """Share of `events` in `n` trials, in [0, 1], with Wilson's score interval (Wilson 1927).

    Raises:
      ValueError: `n` is below 1, or `events` is outside of 0..n.
    """
    events, n = (int(count) if float(count).is_integer() else count for count in (events, n))  # sums of float masks
    check.number("rate: n", n, at_least=1, whole=True)
    check.number("rate: events", events, at_least=0, at_most=n, whole=True)
    interval = stats.binomtest(int(events), int(n)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(events / n, float(interval.low), float(interval.high), int(n))


def mean(values: ArrayLike) -> Estimate:
    """Mean of independent values, with the normal interval; with few of them (< 30) Student's.

    One value says nothing of the spread: its interval has no bounds.

    Raises:
      ValueError: there is no value, or one is not finite.
    """
    values = _finite("mean", np.ravel(values))
    n = len(values)
    value = float(values.mean())
    if n == 1:
        return _unbounded(value, 1)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * values.std(ddof=1) / n**0.5)
    return Estimate(value, value - half, value + half, n)


def change(after: ArrayLike, before: ArrayLike) -> Estimate:
    """Relative change of paired positive values: the geometric mean of their ratios less 1, with Student's interval of
    its logarithm.  The mean of the ratios themselves is above 0 where both are equally noisy.

    Raises:
      ValueError: the shapes differ, or a value is not positive.
    """
    after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
    check.shape("change: before", before, after.shape)
    for name, values in (("after", after), ("before", before)):
        check.number(f"change: {name}", values, above=0)
    logarithm = mean(np.log(after) - np.log(before))
    value, low, high = (float(np.expm1(each)) for each in logarithm[:3])
    return Estimate(value, low, high, logarithm.n)


def clustered(values: ArrayLike, groups: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of values that come in groups (samples of one scene), with the percentile bootstrap over the groups.

    Where all groups have the same mean the bootstrap knows nothing.  Then it is Wilson's interval: of one value a group
    where all values are the same, of all values where they are 0 and 1.  One group says nothing of the spread between
    groups: its interval has no bounds.

    Args:
      values: finite numbers (n,), n >= 1.
      groups: the group of each value (n,).
      resamples: 1 or more.
      seed: of the bootstrap, 0 or more.

    Raises:
      ValueError: shapes differ, a value is not finite, a group is NaN, or a number is out of range.
    """
    values, groups = _finite("clustered", values), np.asarray(groups)
    check.shape("clustered: groups", groups, values.shape)
    if groups.dtype.kind == "f":
        check.number("clustered: groups", groups)
    check.number("clustered: resamples", resamples, at_least=1, whole=True)
    check.number("clustered: seed", seed, at_least=0, whole=True)
    _, where = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(where, values), np.bincount(where)
    value = float(values.mean())
    if len(counts) == 1:
        return _unbounded(value, len(values))
    if np.isin(values, (0, 1)).all() and np.ptp(sums / counts) == 0:
        trials = len(counts) if value in (0.0, 1.0) else len(values)
        return rate(round(value * trials), trials)._replace(n=len(values))
    rows = np.random.default_rng(seed).integers(0, len(counts), (resamples, len(counts)))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Estimate(value, float(low), float(high), len(values))


def paired(one: ArrayLike, two: ArrayLike, groups: ArrayLike) -> Estimate:
    """Share of the trials of which `one` holds minus that of `two`, in [-1, 1]; the trials come in groups, as above.

    Where they agree in every trial, no group is known to differ: the interval is Wilson's bound of that, to both sides.
    One group's interval has no bounds.

    Raises:
      ValueError: as `clustered`.
    """
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    check.shape("paired: two", two, one.shape)
    difference = one - two
    if not difference.any():
        same = clustered(difference, groups)
        return same._replace(low=-same.high)
    if difference.mean() >= 0:
        return clustered(difference, groups)
    more = clustered(-difference, groups)
    return Estimate(-more.value, -more.high, -more.low, more.n)


def exact(value: float, n: int = 1) -> Estimate:
    """A count or a measured time: no interval."""
    return Estimate(float(value), float(value), float(value), n)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of factor > 0 times the quantity."""
    check.number("scaled: factor", factor, above=0)
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor, estimate.n)


def shifted(estimate: Estimate, offset: float) -> Estimate:
    """The estimate of the quantity plus a constant."""
    return Estimate(estimate.value + offset, estimate.low + offset, estimate.high + offset, estimate.n)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over independent runs with Student's interval of the runs' own values; n is the sum of theirs.

    The interval is that of the spread between runs, which holds the error within each run.  One run keeps its own.

    Raises:
      ValueError: there is no estimate, or a value of several is not finite.
    """
    check.number("over_seeds: estimates", len(estimates), at_least=1)
    if len(estimates) == 1:
        return estimates[0]
    spread = mean([estimate.value for estimate in estimates])
    return spread._replace(n=sum(estimate.n for estimate in estimates))


def over_trials(estimates: Sequence[Estimate], least: int = 5) -> Estimate:
    """Mean of a share, in [0, 1], over trials: `over_seeds` from `least` trials on, within the range.

    Fewer trials say next to nothing of their spread, and trials that agree by chance nothing at all: then the interval
    is the mean of the trials' own, which is wide enough also if their errors are one and the same.

    Raises:
      ValueError: as `over_seeds`.
    """
    spread = over_seeds(estimates)
    if len(estimates) >= least and spread.high > spread.low:
        return spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high))
    low, high = (float(np.mean([getattr(estimate, end) for estimate in estimates])) for end in ("low", "high"))
    return Estimate(spread.value, low, high, spread.n)


def _unbounded(value: float, n: int) -> Estimate:
    return Estimate(value, float("-inf"), float("inf"), n)


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    """The values in float64; narrow types would lose digits in their sum."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: values must have shape (n,) with n >= 1, got {array.shape}")
    return check.number(f"{name}: values", array)
