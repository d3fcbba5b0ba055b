"""Bounds, choices and shapes; traced values pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff import check


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-5, 5), st.floats(-5, 5))
def test_a_number_passes_exactly_within_its_bounds(value, low, high):
    inside = np.isfinite(value) and low <= value < high
    if inside:
        assert check.number("f: x", value, at_least=low, below=high) == value
    else:
        with pytest.raises(ValueError, match=r"^f: x must be >= "):
            check.number("f: x", value, at_least=low, below=high)


@pytest.mark.parametrize("value", [1.0, "3", None, True, np.float32(2), [1.5], float("nan")])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="f: n must be >= 0 and whole, got "):
        check.number("f: n", value, at_least=0, whole=True)


@pytest.mark.parametrize("value", [3, np.int64(3), jnp.int32(3), np.array([1, 2])])
def test_whole_numbers_of_all_kinds_pass(value):
    assert check.number("f: n", value, at_least=1, whole=True) is value


@pytest.mark.parametrize("value", [jnp.bfloat16(1.5), np.float16(1.5), 1, jnp.array([1.0, 2.0])])
def test_numbers_of_all_types_pass(value):
    assert check.number("f: x", value, above=0) is value


def test_a_bad_value_in_an_array_is_named():
    with pytest.raises(ValueError, match=r"f: x must be > 0, got -2.0 among 3 values"):
        check.number("f: x", np.array([1.0, -2.0, 3.0]), above=0)


def test_infinities_pass_where_they_are_allowed():
    assert check.number("f: x", np.inf, above=0, infinite=True) == np.inf
    with pytest.raises(ValueError, match="f: x must be a finite number, got inf"):
        check.number("f: x", np.inf)


def test_traced_values_pass_and_traced_shapes_are_checked():
    assert jax.jit(lambda x: check.number("f: x", x, above=0))(-1.0) == -1.0
    with pytest.raises(ValueError, match=r"f: x must have shape \(2,\), got \(1,\)"):
        jax.jit(lambda x: check.shape("f: x", x, (2,)))(jnp.zeros(1))


def test_a_choice_is_one_of_them():
    assert check.choice("f: mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match="f: mode must be 'a' or 'b', got 'c'"):
        check.choice("f: mode", "c", ("a", "b"))


def test_any_length_is_allowed_where_none_stands():
    x = np.zeros((7, 2))
    assert check.shape("f: x", x, (None, 2)) is x
    with pytest.raises(ValueError, match=r"f: x must have shape \(n, 3\), got \(7, 2\)"):
        check.shape("f: x", x, (None, 3))


@pytest.mark.parametrize("tree", [{}, {"a": np.zeros(())}, {"a": np.zeros(10), "b": np.zeros((3, 2))}])
def test_rows_are_those_of_all_arrays(tree):
    with pytest.raises(ValueError, match=r"^f: batch must "):
        check.rows("f: batch", tree)
    assert check.rows("f: batch", {"a": np.zeros(4), "b": jnp.zeros((4, 2))}) == 4


def test_what_broadcasts_without_widening_passes():
    for shape in ((), (1,), (2,), (3, 1), (1, 2), (3, 2)):
        check.broadcasts("f: mask", np.zeros(shape), (3, 2))
    for shape in ((3,), (2, 2), (1, 3, 2), (3, 2, 1)):
        with pytest.raises(ValueError, match=r"^f: mask must broadcast to shape \(3, 2\), got \("):
            check.broadcasts("f: mask", np.zeros(shape), (3, 2))
