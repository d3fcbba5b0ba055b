import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gendiff import process
from gendiff.metrics.calibration import calibrate

EDM, DDPM = process.edm(), process.ddpm(process.linear_betas())
FALSE_ALARM = 1e-4


def pools(mixture, n=12_000):
    samples, good = mixture.draw(0, n)
    # Half of the negatives are dropped: the weights must put the prior right.
    return samples[good], samples[~good][: n // 5]


@pytest.mark.parametrize(
    ("p", "times"), [(EDM, [0.01, 0.3, 2.0, 80.0]), (DDPM, [1, 200, 600, 1000])], ids=["edm", "ddpm"]
)
def test_bayes_classifier_is_calibrated_at_all_levels(p, times, mixture):
    positives, negatives = pools(mixture)
    log_c = mixture.log_good(p)
    probability = lambda _, x, t: jnp.exp(log_c(x, t))
    report = calibrate(p, probability, None, positives, negatives, mixture.alpha, jax.random.key(0), jnp.array(times))
    np.testing.assert_array_equal(report.times, jnp.array(times))
    # C is in [0, 1], so the standard error of the weighted mean is at most half of sqrt(alpha^2 / n_1 + ...).  Normal
    # test at four levels.
    alpha, sizes = mixture.alpha, (len(positives), len(negatives))
    error = 0.5 * np.sqrt(alpha**2 / sizes[0] + (1 - alpha) ** 2 / sizes[1])
    assert (np.abs(report.mean - alpha) < stats.norm.isf(FALSE_ALARM / 8) * error).all()
    # Where noise hides everything C is the prior and nothing else.
    np.testing.assert_allclose(report.mean[-1], alpha, atol=0.005)
    # The expected calibration error of a calibrated classifier is noise: ten bins with errors of `error` in all.
    assert (np.asarray(report.error) < 6 * error).all()
    np.testing.assert_allclose(np.asarray(report.share).sum(1), 1.0, rtol=1e-5)
    # Reliability: within each bin the observed share is the predicted one, where there are enough samples to tell.
    full = np.asarray(report.share) > 0.02
    distance = np.abs(np.asarray(report.observed) - np.asarray(report.predicted))
    bin_error = 0.5 / np.sqrt(np.asarray(report.share)[full] * min(sizes))
    assert (distance[full] < stats.norm.isf(FALSE_ALARM / 80) * bin_error).all()


def test_wrong_prior_and_confidence_are_seen(mixture):
    positives, negatives = pools(mixture)
    log_c = mixture.log_good(EDM)
    odds = lambda x, t: log_c(x, t) - jnp.log1p(-jnp.exp(jnp.minimum(log_c(x, t), -1e-6)))
    shifted = lambda _, x, t: jax.nn.sigmoid(odds(x, t) + 1.0)
    confident = lambda _, x, t: jax.nn.sigmoid(3 * odds(x, t))
    times = jnp.array([0.5])
    run = lambda probability: calibrate(
        EDM, probability, None, positives, negatives, mixture.alpha, jax.random.key(1), times
    )
    assert float(run(shifted).mean[0]) > mixture.alpha + 0.05
    assert float(run(shifted).error[0]) > 0.05
    assert float(run(confident).error[0]) > 0.05


def report_of_constant(mixture, value):
    positives, negatives = pools(mixture, 500)
    constant = lambda _, x, t: jnp.float32(value)
    return calibrate(EDM, constant, None, positives, negatives, 0.6, jax.random.key(0), jnp.array([1.0]), bins=4)


def test_calibration_of_a_constant(mixture):
    # All of C in one bin: predicted is the constant, observed is alpha, and the error is their distance.
    report = report_of_constant(mixture, 0.25)
    np.testing.assert_allclose(report.mean, [0.25], rtol=1e-5)
    np.testing.assert_allclose(report.error, [0.35], rtol=1e-5)
    np.testing.assert_allclose(report.share, [[0, 1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(report.observed, [[np.nan, 0.6, np.nan, np.nan]], rtol=1e-5)
    np.testing.assert_allclose(report.predicted, [[np.nan, 0.25, np.nan, np.nan]], rtol=1e-5)


def test_certain_classifier_has_a_last_bin(mixture):
    # C = 1 belongs to the last bin, not to one beyond it.
    report = report_of_constant(mixture, 1.0)
    np.testing.assert_allclose(report.share, [[0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(report.error, [0.4], rtol=1e-5)


def test_one_bin_holds_all(mixture):
    positives, negatives = pools(mixture, 500)
    half = lambda _, x, t: jax.nn.sigmoid(x[0])
    report = calibrate(EDM, half, None, positives, negatives, 0.6, jax.random.key(0), jnp.array([1.0]), bins=1)
    np.testing.assert_allclose(report.share, [[1.0]], rtol=1e-6)
    np.testing.assert_allclose(report.predicted[:, 0], report.mean, rtol=1e-6)
    np.testing.assert_allclose(report.error, np.abs(report.mean - 0.6), rtol=1e-5)


def test_a_classifier_in_bfloat16_is_read(mixture):
    positives, negatives = pools(mixture, 500)
    narrow = lambda _, x, t: jax.nn.sigmoid(x[0].astype(jnp.bfloat16))
    report = calibrate(EDM, narrow, None, positives, negatives, 0.6, jax.random.key(0), jnp.array([1.0]))
    np.testing.assert_allclose(np.asarray(report.share).sum(), 1.0, rtol=1e-5)


def test_in_float64_mode_the_classifier_sees_the_type_of_the_samples(mixture):
    positives, negatives = pools(mixture, 500)
    seen = []

    def half(_, x, t):
        seen.append(x.dtype)
        return jax.nn.sigmoid(x[0])

    with jax.enable_x64(True):
        calibrate(EDM, half, None, positives, negatives, 0.6, jax.random.key(0), jnp.array([1.0]))
    assert set(seen) == {jnp.dtype(jnp.float32)}


POINTS = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": POINTS[:0]}, "positives must be >= 1, got 0"),
        ({"negatives": POINTS[:0]}, "negatives must be >= 1, got 0"),
        ({"negatives": POINTS[:, :1]}, r"negatives must have shape \(n, 2\), got \(4, 1\)"),
        ({"alpha": 0.0}, "alpha must be > 0 and < 1, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be > 0 and < 1, got nan"),
        ({"bins": 0}, "bins must be >= 1 and whole, got 0"),
        ({"times": jnp.zeros(0)}, "times must be >= 1, got 0"),
        ({"times": jnp.array([jnp.nan])}, "times must be a finite number, got nan"),
        ({"probability": lambda _, x, t: x[0] * jnp.nan}, "probability must be >= 0 and <= 1, got nan among 8 values"),
        ({"probability": lambda _, x, t: jnp.float32(-2.0)}, "probability must be >= 0 and <= 1, got -2.0"),
        ({"probability": lambda _, x, t: jnp.float32(3.0)}, "probability must be >= 0 and <= 1, got 3.0"),
        ({"probability": lambda _, x, t: jnp.ones(1) / 2}, r"must have shape \(8,\), got \(8, 1\)"),
    ],
)
def test_bad_input_is_named(change, message):
    right = {
        "process": EDM, "probability": lambda _, x, t: jnp.float32(0.5), "params": None, "positives": POINTS,
        "negatives": POINTS, "alpha": 0.5, "key": jax.random.key(0), "times": jnp.array([1.0]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        calibrate(**right | change)
