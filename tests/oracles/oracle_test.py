import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.oracles.oracle import OracleError, label

SAMPLES = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    "given",
    [
        np.array([True, False, True]),
        jnp.array([True, False, True]),
        [True, False, True],
        np.array([1, 0, 1]),
        np.array([1.0, 0.0, 1.0]),
        np.array([1, 0, 1], np.uint8),
    ],
)
def test_booleans_and_their_numbers_are_taken(given):
    labels = label(lambda samples: given, SAMPLES)
    assert labels.dtype == np.bool_
    np.testing.assert_array_equal(labels, [True, False, True])


def test_oracle_sees_the_samples():
    samples = np.float32([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_array_equal(label(lambda x: x[:, 0] > 0, samples), [True, False])


@pytest.mark.parametrize(
    "given", [np.ones(2, bool), np.ones(4, bool), np.ones((3, 1), bool), True, np.ones((3, 2), bool), []]
)
def test_one_boolean_a_sample(given):
    with pytest.raises(OracleError, match=r"shape \(3,\), got shape"):
        label(lambda samples: given, SAMPLES)


@pytest.mark.parametrize("given", [["yes", "no", "yes"], [None, True, False], np.array([b"1", b"0", b"1"])])
def test_what_is_no_number(given):
    with pytest.raises(OracleError, match="must be Booleans, got dtype"):
        label(lambda samples: given, SAMPLES)


def test_nan_is_not_true():
    with pytest.raises(OracleError, match="got NaN for 2 of 3 samples"):
        label(lambda samples: np.array([np.nan, 1.0, np.nan]), SAMPLES)


@pytest.mark.parametrize(
    ("given", "culprit"), [([0, 1, 2], "2"), ([-1, 1, 1], "-1"), ([0.5, 0, 1], "0.5"), ([np.inf, 0, 1], "inf")]
)
def test_other_numbers_are_named(given, culprit):
    with pytest.raises(OracleError, match=rf"numbers other than 0 and 1, such as {culprit}(\.0)?$"):
        label(lambda samples: np.array(given), SAMPLES)


def test_error_is_a_value_error():
    assert issubclass(OracleError, ValueError)
