import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff.metrics import rates

Z = stats.norm.ppf(0.975)
COUNTS = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS)
def test_rate_is_wilsons_interval(counts):
    events, n = counts
    estimate = rates.rate(events, n)
    p = events / n
    assert estimate.value == p
    assert estimate.n == n
    assert 0 <= estimate.low <= p <= estimate.high <= 1
    # The ends are where the score test is on its edge: |p - q| = z sqrt(q (1 - q) / n).
    for q, at_the_end in ((estimate.low, events == 0), (estimate.high, events == n)):
        if not at_the_end:
            np.testing.assert_allclose(abs(p - q), Z * np.sqrt(q * (1 - q) / n), rtol=1e-6, atol=1e-12)
    assert (estimate.low == 0) == (events == 0) or estimate.low < 1e-9
    # And the textbook's formula.
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    np.testing.assert_allclose([estimate.low, estimate.high], [centre - half, centre + half], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("p", [0.01, 0.07, 0.5])
def test_rate_covers(p):
    # Exactly, by summing over all counts: Wilson's coverage swings about 95 % as p meets the lattice of counts.
    n = 400
    intervals = [rates.rate(k, n) for k in range(n + 1)]
    covered = np.array([each.low <= p <= each.high for each in intervals])
    assert 0.93 < covered @ stats.binom.pmf(np.arange(n + 1), n, p) < 0.975


@pytest.mark.parametrize(("events", "n"), [(-1, 5), (6, 5), (0, 0), (1, -1), (1.5, 3), (np.nan, 3)])
def test_rate_rejects_impossible_counts(events, n):
    with pytest.raises(ValueError, match=r"rate: (events must be >= 0 and <= \d and whole|n must be >= 1 and whole)"):
        rates.rate(events, n)


@pytest.mark.parametrize("n", [2, 5, 200])
def test_mean_covers(n):
    # Student's interval is exact for normal values: 3000 trials, each covering with probability 0.95.  A binomial test
    # with false-alarm rate 1e-4.
    values = np.random.default_rng(n).normal(3.0, 2.0, (3000, n))
    intervals = [rates.mean(row) for row in values]
    covered = sum(each.low <= 3.0 <= each.high for each in intervals)
    assert stats.binomtest(covered, 3000, 0.95).pvalue > 1e-4
    assert intervals[0].n == n
    np.testing.assert_allclose([each.value for each in intervals], values.mean(1), rtol=1e-12)


def test_change_covers_and_does_not_depend_on_the_order():
    # As for the mean: 3000 trials of 20 noisy pairs, whose first is 3 % longer.
    one, other = np.exp(np.random.default_rng(0).normal(0, 0.2, (2, 3000, 20)))
    found = [rates.change(1.03 * a, b) for a, b in zip(one, other, strict=True)]
    covered = sum(each.low <= 0.03 <= each.high for each in found)
    assert stats.binomtest(covered, 3000, 0.95).pvalue > 1e-4
    there, back = rates.change(one[0], other[0]), rates.change(other[0], one[0])
    np.testing.assert_allclose((1 + there.value) * (1 + back.value), 1, rtol=1e-12)
    np.testing.assert_allclose((1 + there.low) * (1 + back.high), 1, rtol=1e-12)
    assert there.n == 20


def test_mean_of_one_value_has_no_interval():
    assert rates.mean([2.5]) == rates.Estimate(2.5, float("-inf"), float("inf"), 1)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf, 0.0]])
def test_mean_rejects_what_has_no_mean(values):
    message = r"mean: values must (be a finite number, got \w+ among 2 values|have shape \(n,\) with n >= 1)"
    with pytest.raises(ValueError, match=message):
        rates.mean(values)


def test_narrow_types_keep_their_digits():
    # In float16 the sum of 3,000 ones would be 2048.
    for ones in (np.ones(3000, np.float16), jnp.ones(3000, jnp.bfloat16), np.ones(3000, bool)):
        assert rates.mean(ones).value == 1
        assert rates.clustered(ones, np.arange(3000)).value == 1


@pytest.mark.parametrize(
    ("after", "before", "message"),
    [
        ([1.0, 0.0], [1.0, 1.0], "after must be > 0, got 0.0 among 2 values"),
        ([1.0, 1.0], [np.nan, 1.0], "before must be > 0, got nan"),
        ([1.0, 1.0], [1.0], r"before must have shape \(2,\), got \(1,\)"),
    ],
)
def test_change_rejects_what_has_no_ratio(after, before, message):
    with pytest.raises(ValueError, match=message):
        rates.change(after, before)


def test_exact_scaled_and_shifted():
    assert rates.exact(3, 7) == rates.Estimate(3.0, 3.0, 3.0, 7)
    estimate = rates.Estimate(2.0, 1.0, 4.0, 9)
    assert rates.scaled(estimate, 0.5) == rates.Estimate(1.0, 0.5, 2.0, 9)
    assert rates.shifted(estimate, -3.0) == rates.Estimate(-1.0, -2.0, 1.0, 9)
    for factor in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="factor must be > 0"):
            rates.scaled(estimate, factor)
    for merged in (rates.over_seeds, rates.over_trials):
        with pytest.raises(ValueError, match="estimates must be >= 1, got 0"):
            merged([])


def test_trials_per_success():
    found = rates.per_success(rates.rate(60, 100))
    assert found is not None
    assert found.value == pytest.approx(2.5)
    assert found.low < 2.5 < found.high
    assert found.n == 100
    assert rates.per_success(rates.rate(10, 10)) is None


def test_over_seeds_is_the_interval_of_the_runs():
    runs = [rates.rate(events, 1000) for events in (10, 30, 20)]
    merged = rates.over_seeds(runs)
    assert merged.n == 3000
    spread = rates.mean([0.01, 0.03, 0.02])
    assert (merged.value, merged.low, merged.high) == (spread.value, spread.low, spread.high)
    # With two degrees of freedom: mean +- 4.303 sd / sqrt(3).
    np.testing.assert_allclose(merged.high - merged.value, 4.302653 * 0.01 / np.sqrt(3), rtol=1e-6)
    assert rates.over_seeds(runs[:1]) == runs[0]


def test_few_trials_keep_their_own_intervals():
    few = [rates.rate(0, 200), rates.rate(1, 200)]
    each = rates.over_trials(few)
    assert (each.value, each.n) == (0.0025, 400)
    assert each.low == pytest.approx((few[0].low + few[1].low) / 2)
    assert each.high == pytest.approx((few[0].high + few[1].high) / 2)
    alike = rates.over_trials([rates.rate(0, 200)] * 5)  # no spread is no certainty
    assert alike.high == pytest.approx(rates.rate(0, 200).high)


def test_many_trials_have_students_interval_within_the_range():
    many = [rates.rate(events, 200) for events in (0, 0, 0, 1, 5)]
    each, spread = rates.over_trials(many), rates.over_seeds(many)
    assert spread.low < 0 == each.low
    assert each.high == spread.high


def test_clustered_covers_where_plain_intervals_do_not():
    """Groups of 8 equal values: 1,000 data sets, so that a coverage of 0.93 or more is seen as less than 0.9 with a
    probability below 1e-3."""
    rng = np.random.default_rng(0)
    covered, plain = [], []
    for seed in range(1000):
        values = np.repeat(rng.random(60) < 0.3, 8)
        estimate = rates.clustered(values, np.repeat(np.arange(60), 8), resamples=400, seed=seed)
        covered.append(estimate.low <= 0.3 <= estimate.high)
        wilson = rates.rate(int(values.sum()), len(values))
        plain.append(wilson.low <= 0.3 <= wilson.high)
        assert estimate.value == values.mean()
    assert np.mean(covered) > 0.9
    assert np.mean(plain) < 0.7


def test_clustered_knows_what_it_does_not_know():
    none = rates.clustered(np.zeros(40), np.arange(40) % 10)
    assert none[:3] == rates.rate(0, 10)[:3]
    assert none.n == 40


@pytest.mark.parametrize("values", [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.3], [1.0, 1.0]])
def test_one_group_has_no_interval(values):
    groups = np.zeros(len(values))
    unbounded = (-np.inf, np.inf, len(values))
    assert rates.clustered(values, groups) == (np.mean(values), *unbounded)
    assert rates.paired(values, np.zeros(len(values)), groups) == (np.mean(values), *unbounded)
    assert rates.paired(np.zeros(len(values)), values, groups) == (-np.mean(values), *unbounded)


@pytest.mark.parametrize(
    ("values", "groups", "given", "message"),
    [
        (np.zeros(4), np.zeros(3), {}, r"groups must have shape \(4,\), got \(3,\)"),
        (np.zeros(0), np.zeros(0), {}, r"values must have shape \(n,\) with n >= 1, got \(0,\)"),
        (np.zeros((2, 2)), np.zeros((2, 2)), {}, r"values must have shape \(n,\)"),
        ([0.0, np.nan], [0, 1], {}, "values must be a finite number, got nan"),
        ([0.0, 1.0], [0, np.nan], {}, "groups must be a finite number, got nan"),
        ([0.0, 1.0], [0, 1], {"resamples": 0}, "resamples must be >= 1"),
        ([0.0, 1.0], [0, 1], {"seed": -1}, "seed must be >= 0"),
    ],
)
def test_clustered_rejects_what_has_no_interval(values, groups, given, message):
    with pytest.raises(ValueError, match=message):
        rates.clustered(values, groups, **given)


def test_paired_rejects_trials_that_do_not_match():
    with pytest.raises(ValueError, match=r"second must have shape \(3,\), got \(1,\)"):
        rates.paired([1, 0, 1], [1], [0, 1, 2])
    with pytest.raises(ValueError, match="values must be a finite number, got nan"):
        rates.paired([1, np.nan, 1], [1, 0, 0], [0, 1, 2])


def test_paired_shares_that_agree_may_still_differ():
    groups, held = np.arange(40) % 10, np.arange(40) % 3 == 0
    same = rates.paired(held, held, groups)
    bound = rates.rate(0, 10).high
    assert same == (0.0, -bound, bound, 40)
    # All of one and none of the other: no group is known to be otherwise.
    assert rates.paired(np.ones(40), np.zeros(40), groups)[:3] == rates.rate(10, 10)[:3]
    assert rates.paired(np.zeros(40), np.ones(40), groups)[:3] == tuple(-np.array(rates.rate(10, 10))[[0, 2, 1]])


@given(seed=st.integers(0, 1000), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_paired_shares_are_antisymmetric(seed, shares):
    rng = np.random.default_rng(seed)
    one, two = (rng.random(30) < share for share in shares)
    groups = rng.integers(0, 6, 30)
    there, back = rates.paired(one, two, groups), rates.paired(two, one, groups)
    assert there.low <= there.value <= there.high
    np.testing.assert_allclose([there.value, there.low, there.high], [-back.value, -back.high, -back.low], atol=1e-12)


@pytest.mark.parametrize(
    ("values", "groups"), [([1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]), ([0, 1, 1, 0], [0, 0, 1, 1]), ([1, 1], [0, 1])]
)
def test_groups_that_agree_have_an_interval(values, groups):
    there = rates.clustered(values, groups)
    wilson = rates.rate(sum(values), len(values))
    assert (there.low, there.high) == (wilson.low, wilson.high)
    assert there.low < there.high


@pytest.mark.parametrize("events", [1.0, np.float64(1), np.True_])
def test_counts_of_masks_in_floating_point_are_counts(events):
    assert rates.rate(events, 2.0) == rates.rate(1, 2)
