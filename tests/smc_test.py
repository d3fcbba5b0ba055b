import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff import guidance, process, smc

EDM = process.edm()
FALSE_ALARM = 1e-4
"""Of a statistical test."""
WEIGHTS = st.lists(st.floats(-20, 5, width=32), min_size=12, max_size=12).map(np.float32)


def test_log_normal():
    x, mean = np.float32([0.3, -2.0, 5.0]), np.float32([0.0, 1.0, 4.5])
    np.testing.assert_allclose(smc.log_normal(x, mean, 0.7), stats.norm(mean, 0.7).logpdf(x).sum(), rtol=1e-5)


@given(log_weights=WEIGHTS, seed=st.integers(0, 2**31 - 1))
def test_systematic_takes_each_particle_about_n_w_times(log_weights, seed):
    n = len(log_weights)
    index = np.asarray(smc.systematic(jax.random.key(seed), jnp.asarray(log_weights)))
    weights = np.exp(np.float64(log_weights) - np.logaddexp.reduce(np.float64(log_weights)))
    assert index.shape == (n,)
    assert (np.abs(np.bincount(index, minlength=n) - n * weights) < 1 + 1e-4).all()


def test_systematic_is_unbiased():
    n, repeats = 12, 5000
    log_weights = np.float32(np.random.default_rng(0).normal(0, 1.5, n))
    draw = jax.jit(jax.vmap(lambda key: smc.systematic(key, jnp.asarray(log_weights))))
    index = np.asarray(draw(jax.random.split(jax.random.key(1), repeats)))
    counts = np.stack([np.bincount(row, minlength=n) for row in index])
    expected = n * np.exp(log_weights) / np.exp(log_weights).sum()
    # A count is one of two neighbours, so its variance is that of a Bernoulli.  Normal tests (Bonferroni).
    error = np.sqrt((expected % 1) * (1 - expected % 1) / repeats)
    assert (np.abs(counts.mean(0) - expected) < stats.norm.isf(FALSE_ALARM / 2 / n) * error + 1e-5).all()


def test_systematic_never_takes_a_particle_without_weight():
    # The promise of the oracle's last word.  Many particles: rounding in their cumulative weights must not open gaps.
    good = np.random.default_rng(1).random(300_000) < 0.5
    log_weights = np.where(good, np.random.default_rng(2).normal(size=good.size), -np.inf).astype(np.float32)
    index = np.asarray(smc.systematic(jax.random.key(2), jnp.asarray(log_weights)))
    assert (~good[index]).sum() == 0


def test_systematic_with_an_offset_of_zero(monkeypatch):
    # One in 8 million offsets is exactly 0, which must not fall to a first particle of weight 0.
    monkeypatch.setattr(jax.random, "uniform", lambda *args, **kwargs: jnp.zeros(()))
    index = np.asarray(smc.systematic(jax.random.key(0), jnp.array([-jnp.inf, 0.0, 0.0, -jnp.inf])))
    assert set(index) <= {1, 2}


@given(log_weights=WEIGHTS, shift=st.floats(-50, 50, width=32))
def test_effective_size(log_weights, shift):
    weights = np.exp(np.float64(log_weights) - np.float64(log_weights).max())
    expected = weights.sum() ** 2 / (weights**2).sum()
    size = float(smc.effective_size(jnp.asarray(log_weights)))
    assert 1 - 1e-4 <= size <= len(weights) * (1 + 1e-4)
    np.testing.assert_allclose(size, expected, rtol=1e-4)
    np.testing.assert_allclose(smc.effective_size(jnp.asarray(log_weights + shift)), size, rtol=2e-4)


def test_effective_size_at_its_ends():
    np.testing.assert_allclose(smc.effective_size(jnp.zeros(7)), 7, rtol=1e-5)
    np.testing.assert_allclose(smc.effective_size(jnp.array([-jnp.inf, 3.0, -jnp.inf])), 1, rtol=1e-5)


def half_space(mixture, edge):
    """log P(x_0[0] > edge | x_t), exact, because a component of x_0 is Gaussian given x_t."""

    def log_psi(x, t):
        means, stds = mixture.means[:, 0].astype(np.float32), mixture.stds.astype(np.float32)
        log_share = jax.nn.log_softmax(mixture.log_joint(EDM, x, t))
        total = stds**2 + t**2
        mean, std = means + stds**2 / total * (x[0] - means), stds * t / jnp.sqrt(total)
        return jax.nn.logsumexp(log_share + jax.scipy.stats.norm.logcdf((mean - edge) / std))

    return log_psi


def grid_of(steps: int) -> np.ndarray:
    return np.asarray(process.edm(sigma_min=0.05, sigma_max=20.0).grid(steps))


def program(mixture, twist, grid, repeats: int):
    """(seed, threshold, parameters of the twist) -> independent populations of 64 particles."""
    model, shape = mixture.denoiser(EDM), mixture.means[0].shape

    @jax.jit
    def run(keys, threshold, *parameters):
        log_psi = twist(*parameters)
        guided = guidance.guide(EDM, log_psi)(model)
        run = lambda key: smc.twisted(EDM, model, guided, log_psi, grid, key, shape, 64, threshold)
        return jax.lax.map(run, keys)

    return lambda seed, threshold, *parameters: run(
        jax.random.split(jax.random.key(seed), repeats), threshold, *map(jnp.float32, parameters)
    )


GRID, EDGE = grid_of(10), 1.0


@pytest.fixture(scope="module")
def strict(gaussian):
    """Twists psi = P(x_0 > edge | x_t)^power."""
    return program(gaussian, lambda power, edge: lambda x, t: power * half_space(gaussian, edge)(x, t), GRID, 250)


@pytest.fixture(scope="module")
def gentle(gaussian):
    """A twist that is never far from 1: the weights of all particles are moderate."""
    return program(gaussian, lambda: lambda x, t: jax.nn.log_sigmoid(2 * gaussian.denoiser(EDM)(x, t)[0]), GRID, 250)


def chain_alpha(gaussian) -> float:
    """P(x_0 > EDGE) under the model's ten ancestral steps: a linear Gaussian chain, in closed form."""
    (m,), (std,) = gaussian.means[0], gaussian.stds
    mean, variance = 0.0, np.float64(GRID[0]) ** 2
    for t, s in itertools.pairwise(GRID.astype(float)):
        gain = std**2 / (std**2 + t**2)  # x_0^ = m + gain (x - m); mean of the step (s/t)^2 x + (1 - (s/t)^2) x_0^
        a = (s / t) ** 2 + (1 - (s / t) ** 2) * gain
        mean = a * mean + (1 - (s / t) ** 2) * (1 - gain) * m
        variance = a**2 * variance + (t**2 - s**2) * s**2 / t**2
    return float(stats.norm.sf(EDGE, mean, np.sqrt(variance)))


def estimates(population) -> np.ndarray:
    """Estimates of alpha by the populations: means of weight times verdict."""
    weights = np.exp(np.asarray(population.log_weights, np.float64))
    return (weights * (np.asarray(population.particles[..., 0]) > EDGE)).mean(1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.1])
@pytest.mark.parametrize("twist", [(1.0, EDGE), (0.6, EDGE - 0.4), (0.0, EDGE)], ids=["exact", "wrong", "none"])
def test_estimate_of_alpha_is_unbiased(twist, threshold, gaussian, strict):
    # For any twist, guidance and threshold, and for ten coarse steps: the weights correct everything.
    population = strict(3, threshold, *twist)
    # Student's test.
    assert stats.ttest_1samp(estimates(population), chain_alpha(gaussian)).pvalue > FALSE_ALARM
    assert stats.sem(estimates(population)) < 0.1 * chain_alpha(gaussian)
    if twist[0] == 0:
        np.testing.assert_allclose(population.log_weights, 0.0, atol=1e-4)
    resampled = np.asarray(population.resampled)
    if threshold == 0.0:
        assert (resampled == 0).all()
    if threshold > 1.0:
        assert (resampled == len(GRID) - 2).all(), "every step but the last"


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_weights_make_samples_of_the_model(threshold, gaussian, gentle):
    # Their mean is 1.  (A strict twist has weights of 1 / psi for bad particles that it hardly ever makes: no test.)
    population = gentle(4, threshold)
    weights = np.exp(np.asarray(population.log_weights, np.float64))
    # Student's tests.
    assert stats.ttest_1samp(weights.mean(1), 1.0).pvalue > FALSE_ALARM
    assert stats.sem(weights.mean(1)) < 0.05
    assert stats.ttest_1samp(estimates(population), chain_alpha(gaussian)).pvalue > FALSE_ALARM


def test_exact_twist_is_worth_its_cost(gaussian, strict):
    # Half the variance is twice the particles.  Without a twist the variance is binomial.
    alpha = chain_alpha(gaussian)
    assert estimates(strict(5, 0.5, 1.0, EDGE)).var() < 0.5 * alpha * (1 - alpha) / 64


def test_judged_samples_of_a_mixture(mixture):
    # Against rejection sampling from the same chain, which is the program with a twist of power 0.
    edge, repeats = 0.8, 80
    run = program(mixture, lambda power: lambda x, t: power * half_space(mixture, edge)(x, t), grid_of(15), repeats)
    reference = np.asarray(run(6, 0.5, 0.0).particles).reshape(-1, 2)
    accepted = reference[reference[:, 0] > edge]
    population, means, alphas = jax.tree.map(np.asarray, run(7, 0.5, 1.0)), [], []
    for i in range(repeats):
        single = smc.Population(*(jnp.asarray(leaf[i]) for leaf in population))
        judged = smc.judge(single, single.particles[:, 0] > edge, jax.random.key(i))
        samples = np.asarray(judged.samples)
        assert samples.shape == (64, 2)
        assert (samples[:, 0] > edge).all()
        assert 1 <= float(judged.effective) <= 64 * (1 + 1e-5)
        means.append(samples.mean(0))
        alphas.append(np.exp(float(judged.log_alpha)))
    # Welch's tests.  Samples are weighted within a population, which biases their mean by O(1 / particles) of the
    # spread of the weights: far below its error here.
    assert (stats.ttest_ind(np.array(means), accepted, equal_var=False).pvalue > FALSE_ALARM / 2).all()
    inside = np.asarray(reference[:, 0] > edge, float)
    assert stats.ttest_ind(alphas, inside, equal_var=False).pvalue > FALSE_ALARM


def test_judge_weighs_and_counts():
    population = smc.Population(jnp.arange(4.0)[:, None], jnp.log(jnp.array([1.0, 2.0, 4.0, 1.0])), jnp.zeros(()))
    judged = smc.judge(population, jnp.array([True, False, True, False]), jax.random.key(0))
    np.testing.assert_allclose(np.exp(judged.log_alpha), 5 / 4, rtol=1e-5)
    np.testing.assert_allclose(judged.effective, 25 / 17, rtol=1e-5)
    assert set(np.asarray(judged.samples)[:, 0]) <= {0.0, 2.0}
    assert judged.samples.shape == (4, 1)


def test_judge_needs_a_good_particle():
    population = smc.Population(jnp.zeros((3, 1)), jnp.zeros(3), jnp.zeros(()))
    with pytest.raises(ValueError, match="judge: good must be True for a particle, got 0 of 3"):
        smc.judge(population, jnp.zeros(3, bool), jax.random.key(0))


@pytest.mark.parametrize("verdict", [jnp.ones((4, 1), bool), jnp.ones(1, bool), jnp.full(4, jnp.nan)])
def test_verdicts_are_one_boolean_a_particle(verdict):
    population = smc.Population(jnp.zeros((4, 2)), jnp.zeros(4), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"good must be one Boolean a particle, \(4,\), got"):
        smc.judge(population, verdict, jax.random.key(0))


# Weights that are not finite, other types, other shapes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 255])
def test_a_particle_whose_weight_is_not_finite_has_none(bad, count):
    log_weights = jnp.zeros(256).at[100 : 100 + count].set(bad) if count == 1 else jnp.full(256, bad).at[7].set(-3.0)
    having = np.flatnonzero(np.isfinite(log_weights))
    index = np.asarray(smc.systematic(jax.random.key(0), log_weights))
    assert set(index) == set(having), "each of the others about once"
    np.testing.assert_allclose(smc.effective_size(log_weights), len(having), rtol=1e-5)
    population = smc.Population(jnp.arange(256.0)[:, None], log_weights, jnp.zeros(()))
    judged = smc.judge(population, jnp.ones(256, bool), jax.random.key(1))
    assert set(np.asarray(judged.samples)[:, 0]) == set(having)
    assert int(judged.lost) == count
    np.testing.assert_allclose(judged.effective, len(having), rtol=1e-5)
    np.testing.assert_allclose(np.exp(judged.log_alpha), np.exp(log_weights[having]).sum() / 256, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_weight_at_all_is_an_error(bad):
    with pytest.raises(ValueError, match="systematic: particles with a finite log-weight, of 4, must be >= 1, got 0"):
        smc.systematic(jax.random.key(0), jnp.full(4, bad))
    assert float(smc.effective_size(jnp.full(4, bad))) == 0.0
    population = smc.Population(jnp.zeros((4, 1)), jnp.array([bad, bad, 0.0, bad]), jnp.zeros(()))
    with pytest.raises(ValueError, match="judge: good: particles with a finite log-weight, of 4, must be >= 1, got 0"):
        smc.judge(population, jnp.array([True, True, False, True]), jax.random.key(0))
    # Within a program all particles stay, so that the error can be raised on the host.
    index = jax.jit(lambda key: smc.systematic(key, jnp.full(4, bad)))(jax.random.key(0))
    np.testing.assert_array_equal(index, np.arange(4))


def steps_of(model, twist, grid=GRID, shape=(1,), key=0, threshold=0.5, guide=True):
    guided = guidance.guide(EDM, twist)(model) if guide else model
    run = jax.jit(lambda key: smc.twisted(EDM, model, guided, twist, grid, key, shape, 64, threshold))
    return run(jax.random.key(key))


@pytest.mark.parametrize(
    ("none", "threshold"),
    [
        (lambda x, t: jnp.where(x[0] > 0, 0.0, -jnp.inf), 0.0),
        (lambda x, t: jnp.where(x[0] > 0, 0.0, jnp.nan), 0.5),
        (lambda x, t: jnp.log(jax.nn.sigmoid(-((4 * x[0]) ** 2))), 0.0),
        (lambda x, t: jnp.where((t < 1) & (x[0] < 0), jnp.inf, 0.0), 0.5),
    ],
    ids=["zero", "nan", "underflow", "infinite"],
)
def test_a_twist_of_zero_ends_a_particle(none, threshold, gaussian):
    # log 0 less log 0 is no number, and must not take the weight of all others.
    population = steps_of(gaussian.denoiser(EDM), none, threshold=threshold, guide=False)
    weights = np.exp(np.asarray(population.log_weights))
    assert np.isfinite(weights).all()
    assert int(population.lost) > 0
    if threshold == 0.0:
        assert int(population.lost) == (weights == 0).sum(), "each once"
    if weights.any():
        judged = smc.judge(population, jnp.ones(64, bool), jax.random.key(0))
        assert np.isfinite(judged.effective)
        assert np.isin(judged.samples, population.particles[weights > 0]).all()


def test_particles_that_are_all_lost_are_told_on_the_host(gaussian):
    population = steps_of(gaussian.denoiser(EDM), lambda x, t: -jnp.inf + 0 * x[0], guide=False)
    assert (np.asarray(population.log_weights) == -np.inf).all()
    assert int(population.lost) == 64
    with pytest.raises(ValueError, match="particles with a finite log-weight, of 64, must be >= 1, got 0"):
        smc.judge(population, jnp.ones(64, bool), jax.random.key(0))


@pytest.mark.parametrize("high", [1.0, 0.06])
def test_a_model_that_diverges_for_some_particles_loses_those(high, gaussian):
    # In several steps, or in the last one alone, which has no weight of its own.
    exact = gaussian.denoiser(EDM)
    broken = lambda x, t: jnp.where((t < high) & (x > 1), jnp.nan, exact(x, t))
    population = steps_of(broken, lambda x, t: jnp.zeros(()))
    assert 0 < int(population.lost) < 64 * len(GRID)
    assert np.isfinite(population.particles[np.isfinite(population.log_weights)]).all()


def test_no_particle_is_lost_where_all_is_well(gaussian, gentle):
    assert (np.asarray(gentle(4, 0.5).lost) == 0).all()


def test_twists_of_other_types(gaussian):
    exact = gaussian.denoiser(EDM)
    twist = lambda dtype: lambda x, t: jax.nn.log_sigmoid(2 * exact(x, t)[0].astype(dtype))
    model = lambda dtype: lambda x, t: exact(x, t).astype(dtype)
    narrow = steps_of(model(jnp.bfloat16), twist(jnp.bfloat16))
    assert (narrow.particles.dtype, narrow.log_weights.dtype) == (jnp.float32, jnp.float32)
    assert np.isfinite(narrow.log_weights).all()
    with jax.enable_x64(True):
        wide = steps_of(model(jnp.float32), twist(jnp.float32))
        assert (wide.particles.dtype, wide.log_weights.dtype) == (jnp.float64, jnp.float64)
        assert np.isfinite(wide.log_weights).all()


@pytest.mark.parametrize(
    ("model", "twist", "changes", "message"),
    [
        (lambda x, t: x[:, None], None, {}, r"x_0 of the denoiser must have shape \(1,\), got \(1, 1\)"),
        (None, lambda x, t: x, {}, r"twisted: the scalar value must have shape \(\), got \(1,\)"),
        (None, None, {"threshold": -0.5}, "twisted: threshold must be >= 0, got -0.5"),
        (None, None, {"grid": GRID[::-1]}, "twisted: grid: change from a time to the next must be < 0"),
        (None, None, {"grid": GRID[:-1]}, "twisted: last time of the grid must be <= 0, got 0"),
    ],
)
def test_what_cannot_be_run_is_named(model, twist, changes, message, gaussian):
    with pytest.raises(ValueError, match=message):
        steps_of(model or gaussian.denoiser(EDM), twist or (lambda x, t: jnp.sum(x)), guide=False, **changes)


@pytest.mark.parametrize("level", [0.0, 60000.0, -4e5, -3e38])
def test_the_effective_size_does_not_depend_on_the_level(level):
    weights = np.zeros(256, np.float32) + np.float32(level)
    np.testing.assert_allclose(smc.effective_size(weights), 256, rtol=1e-5)
