"""Estimates with 95 % intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from gendiff import check

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number, its interval and its number of samples; an exact number has low = value = high."""

    value: float
    low: float
    high: float
    n: int


def rate(events: int, n: int) -> Estimate:
    """Return the share of `events` in `n` trials, in [0, 1], with Wilson's score interval (Wilson 1927).

    Raises:
      ValueError: `n` is below 1, or `events` is outside of 0..n.
    """
    events, n = (int(count) if float(count).is_integer() else count for count in (events, n))  # sums of float masks
    check.number("rate: n", n, at_least=1, whole=True)
    check.number("rate: events", events, at_least=0, at_most=n, whole=True)
    interval = scipy.stats.binomtest(int(events), int(n)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(events / n, float(interval.low), float(interval.high), int(n))


def mean(values: ArrayLike) -> Estimate:
    """Return the mean of independent values with Student's interval; a single value has no bounds.

    Raises:
      ValueError: `values` is empty, or a value is not finite.
    """
    values = _finite("mean", np.ravel(values))
    n = len(values)
    value = float(values.mean())
    if n == 1:
        return _unbounded(value, 1)
    half = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * values.std(ddof=1) / n**0.5)
    return Estimate(value, value - half, value + half, n)


def change(after: ArrayLike, before: ArrayLike) -> Estimate:
    """Return the relative change of paired positive values: the geometric mean of their ratios, less 1.

    The interval is Student's, of the logarithm.  The arithmetic mean of ratios is biased upwards by noise.

    Raises:
      ValueError: the shapes differ, or a value is not positive.
    """
    after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
    check.shape("change: before", before, after.shape)
    for name, values in (("after", after), ("before", before)):
        check.number(f"change: {name}", values, above=0)
    logarithm = mean(np.log(after) - np.log(before))
    value, low, high = (float(np.expm1(number)) for number in logarithm[:3])
    return Estimate(value, low, high, logarithm.n)


def clustered(values: ArrayLike, groups: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of grouped values (samples of one scene), with the percentile bootstrap over the groups.

    If values are 0 or 1 and all groups have the same mean, the bootstrap has no spread.  The interval is then Wilson's:
    with one trial per group if all values are equal, else with one trial per value.  A single group has no bounds,
    because it has no spread between groups.

    Args:
      values, groups: finite numbers (n,) and their groups (n,), n >= 1.
      resamples: of the bootstrap, >= 1.
      seed: of the bootstrap, >= 0.

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


def paired(first: ArrayLike, second: ArrayLike, groups: ArrayLike) -> Estimate:
    """Return the share of trials with `first` minus the share with `second`, in [-1, 1], as `clustered` does.

    If they agree in all trials, the interval is Wilson's bound for 0 differing groups, to both sides.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    check.shape("paired: second", second, first.shape)
    difference = first - second
    if not difference.any():
        same = clustered(difference, groups)
        return same._replace(low=-same.high)
    if difference.mean() >= 0:
        return clustered(difference, groups)
    more = clustered(-difference, groups)
    return Estimate(-more.value, -more.high, -more.low, more.n)


def exact(value: float, n: int = 1) -> Estimate:
    """Return a count or a measured time, without an interval."""
    return Estimate(float(value), float(value), float(value), n)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Multiply an estimate by factor > 0."""
    check.number("scaled: factor", factor, above=0)
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor, estimate.n)


def shifted(estimate: Estimate, offset: float) -> Estimate:
    """Add a constant to an estimate."""
    return Estimate(estimate.value + offset, estimate.low + offset, estimate.high + offset, estimate.n)


def per_success(failures: Estimate) -> Estimate | None:
    """Return the trials per success, of a rate of failures; None if every trial failed."""
    if failures.value == 1:
        return None
    low, value, high = (1 / max(1 - bound, 1e-12) for bound in (failures.low, failures.value, failures.high))
    return Estimate(value, low, high, failures.n)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over independent runs with Student's interval of the runs' values; n is the sum.

    The spread between runs includes the error within a run.  A single run keeps its own interval.

    Raises:
      ValueError: `estimates` is empty, or a value of several is not finite.
    """
    check.number("over_seeds: estimates", len(estimates), at_least=1)
    if len(estimates) == 1:
        return estimates[0]
    spread = mean([estimate.value for estimate in estimates])
    return spread._replace(n=sum(estimate.n for estimate in estimates))


def over_trials(estimates: Sequence[Estimate], least: int = 5) -> Estimate:
    """Return the mean of a share over trials: from `least` trials on `over_seeds`, with the interval cut to [0, 1].

    With fewer trials, or trials that agree by chance, the spread is unknown.  The interval is then the mean of the
    trials' intervals, which is wide enough even if their errors are identical.

    Raises:
      ValueError: see `over_seeds`.
    """
    spread = over_seeds(estimates)
    if len(estimates) >= least and spread.high > spread.low:
        return spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high))
    low, high = (float(np.mean([getattr(estimate, end) for estimate in estimates])) for end in ("low", "high"))
    return Estimate(spread.value, low, high, spread.n)


def _unbounded(value: float, n: int) -> Estimate:
    return Estimate(value, float("-inf"), float("inf"), n)


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    """Check values, and return them in float64, because narrow types lose digits in a sum."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: values must have shape (n,) with n >= 1, got {array.shape}")
    return check.number(f"{name}: values", array)
