import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff.metrics import discriminability

FALSE_ALARM = 1e-4


@pytest.mark.parametrize("held_out", [True, False])
def test_two_normals_reach_the_bayes_accuracy(held_out):
    rng, n, shift = np.random.default_rng(0), 20_000, 1.5
    each = discriminability.accuracy(rng.normal(0, 1, n), rng.normal(shift, 1, n), held_out)
    bayes = stats.norm.cdf(shift / 2)
    assert abs(each.value - bayes) < stats.norm.isf(FALSE_ALARM / 2) * (bayes * (1 - bayes) / each.n) ** 0.5 + 1e-3
    assert each.n == (n if held_out else 2 * n)


def test_sets_of_other_sizes_are_balanced():
    rng = np.random.default_rng(1)
    few, many = rng.normal(2, 1, 500), rng.normal(0, 1, 20_000)
    each = discriminability.accuracy(many, few)
    assert abs(each.value - stats.norm.cdf(1)) < 0.06  # without balance: the threshold moves and few are found


@given(st.floats(0.1, 100), st.floats(-1e4, 1e4), st.booleans())
def test_units_do_not_matter_but_for_the_sign(scale, offset, held_out):
    rng = np.random.default_rng(2)
    base, expert = rng.normal(0, 1, 200), rng.normal(1, 1, 200)
    given = discriminability.accuracy(base, expert, held_out)
    assert (
        abs(discriminability.accuracy(scale * base + offset, scale * expert + offset, held_out).value - given.value)
        < 0.011
    )
    assert abs(discriminability.accuracy(-base, -expert, held_out).value - given.value) < 0.011


def test_the_same_numbers_tell_nothing():
    same = np.random.default_rng(3).normal(size=4000)
    held_out = discriminability.accuracy(same, np.random.default_rng(4).normal(size=4000))
    assert abs(held_out.value - 0.5) < stats.norm.isf(FALSE_ALARM / 2) * (0.25 / held_out.n) ** 0.5


@pytest.mark.parametrize("value", [0.0, 1.0, 1e8, -1e-9])
def test_values_that_tie_tell_nothing(value):
    each = discriminability.accuracy(np.full(50, value), np.full(70, value))
    assert 0.4 <= each.value <= 0.6


@pytest.mark.parametrize("scale", [1e-20, 1e-13, 1e100])
def test_small_and_large_units_do_not_matter(scale):
    rng = np.random.default_rng(2)
    base, expert = rng.normal(0, 1, 200), rng.normal(1, 1, 200)
    expected = discriminability.accuracy(base, expert)
    assert discriminability.accuracy(scale * base, scale * expert) == expected


def test_narrow_types_are_read():
    rng = np.random.default_rng(2)
    base, expert = (rng.normal(shift, 1, 200).astype(jnp.bfloat16) for shift in (0, 1))
    wide = discriminability.accuracy(base.astype(np.float64), expert.astype(np.float64))
    assert discriminability.accuracy(base, expert) == discriminability.accuracy(jnp.asarray(base), expert) == wide


@pytest.mark.parametrize(
    ("base", "expert", "tails", "message"),
    [
        (np.zeros(3), np.zeros(9), 0.01, "values of base must be >= 4, got 3"),
        (np.zeros(9), np.zeros(0), 0.01, "values of expert must be >= 4, got 0"),
        (np.zeros(9), np.full(9, np.nan), 0.01, "expert must be a finite number, got nan among 9 values"),
        (np.zeros((9, 2)), np.zeros(9), 0.01, r"base must have shape \(n,\), got \(9, 2\)"),
        (np.zeros(9), np.zeros(9), 0.5, "tails must be >= 0 and < 0.5, got 0.5"),
        (np.zeros(9), np.zeros(9), np.nan, "tails must be >= 0 and < 0.5, got nan"),
    ],
)
def test_bad_input_is_named(base, expert, tails, message):
    with pytest.raises(ValueError, match=message):
        discriminability.accuracy(base, expert, tails=tails)
