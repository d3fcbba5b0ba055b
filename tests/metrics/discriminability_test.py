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


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected 4 or more finite values of each, given \[3, 9\]"):
        discriminability.accuracy(np.zeros(3), np.zeros(9))
