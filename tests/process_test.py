import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff import process

T = 1000
SCHEDULES = {"linear": process.linear_betas, "cosine": process.cosine_betas, "sqrt_linear": process.sqrt_linear_betas}
EDM, DDPM = process.edm(), process.ddpm(process.linear_betas(T))
TIMES = np.arange(T + 1)


def reference_betas(name: str, steps: int) -> np.ndarray:
    """The papers' definitions in float64."""
    t = np.arange(1, steps + 1, dtype=np.float64)
    ramp = (t - 1) / (steps - 1)
    if name == "linear":  # Ho et al.: 1e-4 .. 0.02 at 1,000 steps; with fewer steps the total noise must stay
        return (1000 / steps) * (1e-4 + (0.02 - 1e-4) * ramp)
    if name == "sqrt_linear":
        return (1000 / steps) * (np.sqrt(0.00085) + (np.sqrt(0.012) - np.sqrt(0.00085)) * ramp) ** 2
    alpha_bar = lambda t: np.cos((t / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999)


@pytest.mark.parametrize("steps", [100, T])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_definitions(name, steps):
    np.testing.assert_allclose(SCHEDULES[name](steps), reference_betas(name, steps), rtol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_against_float64(name):
    betas = SCHEDULES[name](T)
    chain = process.ddpm(betas)
    alpha_bar = np.append(1.0, np.cumprod(1 - np.asarray(betas, np.float64)))
    np.testing.assert_allclose(chain.alpha(TIMES), np.sqrt(alpha_bar), rtol=5e-6)
    # From the sum of logarithms, since 1 - alpha_bar cancels in float64 too where beta is small.
    sigma = np.sqrt(-np.expm1(np.append(0.0, np.cumsum(np.log1p(-np.asarray(betas, np.float64))))))
    np.testing.assert_allclose(chain.sigma(TIMES), sigma, rtol=5e-6)


def test_linear_schedule_ends_in_noise():
    # Ho et al. (2020), section 4: the linear schedule leaves KL(q(x_T | x_0) || N(0, I)) of about 1e-5 bits per dim.
    assert float(DDPM.alpha(T)) < 0.01
    assert float(process.ddpm(process.linear_betas(100)).alpha(100)) < 0.01


@given(st.lists(st.floats(1e-6, 0.999), min_size=7, max_size=7))
def test_chain_preserves_variance(betas):
    chain = process.ddpm(np.array(betas))
    alpha, sigma = np.asarray(chain.alpha(np.arange(8))), np.asarray(chain.sigma(np.arange(8)))
    np.testing.assert_allclose(alpha.astype(np.float64) ** 2 + sigma.astype(np.float64) ** 2, 1.0, rtol=1e-6)
    assert alpha[0] == 1.0
    assert sigma[0] == 0.0
    assert (np.diff(alpha) <= 0).all()
    assert (np.diff(sigma) >= 0).all()


@pytest.mark.parametrize("t", [T + 1, 10 * T, -1, -T])
def test_time_outside_the_chain_is_nan(t):
    for level in (DDPM.alpha, DDPM.sigma):
        assert np.isnan(level(t))
        assert np.isnan(jax.jit(level)(jnp.asarray(t)))


@pytest.mark.parametrize("betas", [[0.1, 0.0], [1.0, 0.1], [0.1, 1.1], [0.1, -0.1], [0.1, np.nan], [[0.1, 0.2]], 0.1])
def test_ddpm_rejects_what_is_no_schedule(betas):
    with pytest.raises(ValueError, match="ddpm: betas must "):
        process.ddpm(np.array(betas))


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (2.0, 1.0), (1.0, 1.0)])
def test_edm_rejects_bad_ends(low, high):
    with pytest.raises(ValueError, match="edm: sigma_m"):
        process.edm(low, high)


def test_edm_levels():
    t = np.float32([0.0, 0.002, 1.0, 80.0])
    np.testing.assert_array_equal(EDM.alpha(t), np.ones(4))
    np.testing.assert_array_equal(EDM.sigma(t), t)


@pytest.mark.parametrize("n", [2, 18, 40])
def test_edm_grid(n):
    i = np.arange(n)
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # Karras et al. 2022, eq. 5
    grid = np.asarray(EDM.grid(n))
    np.testing.assert_allclose(grid, np.append(expected, 0.0), rtol=2e-5)
    assert (np.diff(grid) < 0).all()


@pytest.mark.parametrize("n", [1, 3, 250, T - 1])
def test_ddpm_grid(n):
    grid = np.asarray(DDPM.grid(n))
    assert grid.shape == (n + 1,)
    assert grid[0] == T
    assert grid[-1] == 0
    assert np.issubdtype(grid.dtype, np.integer)
    assert (np.diff(grid) < 0).all()
    # Evenly spaced up to rounding.
    assert np.abs(grid - np.linspace(T, 0, n + 1)).max() <= 0.5 + 1e-3


def test_ddpm_full_grid_is_every_time():
    np.testing.assert_array_equal(DDPM.grid(T), TIMES[::-1])


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_flow_goes_in_a_straight_line(shift):
    p = process.flow(shift)
    grid = np.float64(p.grid(8))
    assert (grid[0], grid[-1]) == (1, 0)
    assert (np.diff(grid) < 0).all()
    np.testing.assert_allclose(p.alpha(grid) + p.sigma(grid), 1.0, atol=1e-6)
    u = np.linspace(1, 0, 9)
    np.testing.assert_allclose(grid[:-1], 1 / (1 + (1 / u[:-1] - 1) / shift), rtol=1e-6)


@pytest.mark.parametrize(("shift", "mean", "std"), [(1.0, 0.0, 1.0), (3.0, -0.5, 0.7)])
def test_training_times_of_a_flow_are_logit_normal(shift, mean, std):
    draws = np.asarray(jax.vmap(process.flow(shift, mean, std).sample_time)(jax.random.split(jax.random.key(0), 4000)))
    # A shift by s adds ln s to the logit.
    logits = np.log(draws / (1 - draws)) - np.log(shift)
    assert stats.kstest(logits, stats.norm(mean, std).cdf).pvalue > 1e-4


@pytest.mark.parametrize("betas", [process.linear_betas(), process.sqrt_linear_betas(), process.linear_betas(100)])
def test_the_last_step_of_a_zero_terminal_chain_has_no_signal(betas):
    # Algorithm 1 of Lin et al.: sqrt(alpha_bar) is an affine function of what it was, from its first value to 0.
    p, before = process.ddpm(process.zero_terminal(betas)), np.sqrt(np.cumprod(1 - betas))
    steps = len(betas)
    after = np.float64(p.alpha(np.arange(1, steps + 1)))
    assert (after[-1], float(p.sigma(steps))) == (0, 1)
    expected = before[0] * (before - before[-1]) / (before[0] - before[-1])
    np.testing.assert_allclose(after, expected, atol=1e-6)
    np.testing.assert_allclose(after**2 + np.float64(p.sigma(np.arange(1, steps + 1))) ** 2, 1.0, atol=1e-6)


def test_a_process_of_any_levels():
    p = process.continuous(lambda t: jnp.exp(-t), lambda t: t, 0.01, 3.0)
    np.testing.assert_allclose(p.grid(2), [3.0, 1.505, 0.01], rtol=1e-6)
    times = np.asarray(jax.vmap(p.sample_time)(jax.random.split(jax.random.key(0), 4000)))
    assert stats.kstest(times, stats.uniform(0.01, 2.99).cdf).pvalue > 1e-4
    with pytest.raises(ValueError, match=r"continuous: sigma\(1\) must be > 0, got 0"):
        process.continuous(jnp.cos, lambda t: 0 * t)
    with pytest.raises(ValueError, match="continuous: high must be > 1, got 1"):
        process.continuous(jnp.cos, jnp.sin, 1.0, 1.0)


def test_edm_training_times_are_log_normal():
    keys = jax.random.split(jax.random.key(0), 4000)
    log_t = np.log(np.asarray(jax.jit(jax.vmap(process.edm(mean=-0.5, std=0.7).sample_time))(keys), np.float64))
    # Kolmogorov-Smirnov; false-alarm rate 1e-4.
    assert stats.kstest(log_t, stats.norm(-0.5, 0.7).cdf).pvalue > 1e-4


def test_classifier_times_are_a_mixture():
    draw = process.classifier_time(mean=-2.0, std=0.8, share=0.7, low=0.01, high=10.0)
    log_t = np.log(np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), 4000)), np.float64))
    wide = stats.uniform(np.log(0.01), np.log(10.0) - np.log(0.01))
    # Kolmogorov-Smirnov; false-alarm rate 1e-4.
    assert stats.kstest(log_t, lambda v: 0.7 * stats.norm.cdf(v, -2.0, 0.8) + 0.3 * wide.cdf(v)).pvalue > 1e-4


def test_ddpm_training_times_are_uniform_on_1_to_T():
    chain = process.ddpm(np.full(10, 0.1))
    times = np.asarray(jax.jit(jax.vmap(chain.sample_time))(jax.random.split(jax.random.key(1), 5000)))
    # Time 0 has no noise to predict; both ends of 1..T must occur.  Chi-square; false-alarm rate 1e-4.
    assert set(times) == set(range(1, 11))
    assert stats.chisquare(np.bincount(times, minlength=11)[1:]).pvalue > 1e-4


def drawn(times, count=4000):
    return np.asarray(jax.jit(jax.vmap(times))(jax.random.split(jax.random.key(2), count)))


def test_times_of_a_power_are_dense_near_the_data():
    """P(t <= k) = (k / last)^(1 / power): chi-square in eight cells; false-alarm rate 1e-4."""
    times = process.power_times(64, 2.0)
    assert times == process.power_times(64, 2.0) != process.power_times(64, 1.0)
    found = drawn(times)
    assert (found.min(), found.max()) == (1, 64)
    edges = np.array([0, 1, 4, 9, 16, 25, 36, 49, 64])  # equally likely
    assert stats.chisquare(np.histogram(found, edges + 0.5)[0]).pvalue > 1e-4


def test_mixed_times_are_of_two_distributions():
    times = process.mixed_times(process.one_time(np.int32(900)), process.power_times(64), 0.25)
    found = drawn(times)
    assert set(found[found > 64]) == {900}
    assert abs((found == 900).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    assert set(drawn(process.one_time(np.int32(7)), 5)) == {7}
    with pytest.raises(ValueError, match="mixed_times: share must be >= 0 and <= 1, got 2"):
        process.mixed_times(process.one_time(np.int32(1)), process.power_times(64), 2.0)


@pytest.mark.parametrize(("p", "t"), [(EDM, 3.0), (DDPM, 400)])
def test_perturb(p, t):
    x0 = np.linspace(-1, 1, 4000, dtype=np.float32)
    x, eps = process.perturb(p, jax.random.key(2), x0, jnp.asarray(t))
    np.testing.assert_allclose(x, p.alpha(t) * x0 + p.sigma(t) * np.asarray(eps), rtol=1e-5, atol=1e-6)
    # Kolmogorov-Smirnov; false-alarm rate 1e-4.
    assert stats.kstest(np.asarray(eps), "norm").pvalue > 1e-4


def chain_step(betas: np.ndarray, t: int, s: int) -> tuple[float, float]:
    """(a, v) of q(x_t | x_s), one beta at a time."""
    a, v = 1.0, 0.0
    for beta in np.asarray(betas, np.float64)[s:t]:
        a, v = np.sqrt(1 - beta) * a, (1 - beta) * v + beta
    return a, v


def condition(a: float, v: float, alpha_s: float, var_s: float, x0: float, x: float) -> tuple[float, float]:
    """Mean and variance of x_s given x_t = x: Gaussian conditioning on the joint of (x_s, x_t) given x_0."""
    mean = np.array([alpha_s * x0, a * alpha_s * x0])
    covariance = np.array([[var_s, a * var_s], [a * var_s, a * a * var_s + v]])
    gain = covariance[0, 1] / covariance[1, 1]
    return mean[0] + gain * (x - mean[1]), covariance[0, 0] - gain * covariance[1, 0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (2, 1), (500, 499), (T, T - 1), (T, 0), (900, 350), (40, 0), (75, 25)])
def test_ddpm_transition_and_posterior_are_gaussian_conditioning(name, t, s):
    betas = SCHEDULES[name](T)
    chain = process.ddpm(betas)
    a, v = chain_step(betas, t, s)
    given_a, given_v = process.transition(chain, t, s)
    # q(x_t | x_s) is a difference of two variances: float32 leaves an absolute error of a few 1e-7.
    np.testing.assert_allclose(given_a, a, rtol=5e-6)
    np.testing.assert_allclose(given_v, v, rtol=1e-6, atol=3e-7)
    alpha_s, var_s = chain_step(betas, s, 0)
    mean, variance = process.posterior(chain, np.float32(0.7), np.float32(-1.3), t, s)
    expected_mean, expected_variance = condition(a, v, alpha_s, var_s, -1.3, 0.7)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-4, atol=3e-7)


@given(st.floats(0.01, 80.0), st.floats(0.0, 0.99), st.floats(-3, 3), st.floats(-3, 3))
def test_edm_posterior_is_gaussian_conditioning(t, ratio, x, x0):
    s = t * ratio
    # The noise of EDM is a Brownian motion in sigma^2: independent increments, a = 1.
    a, v = process.transition(EDM, jnp.float32(t), jnp.float32(s))
    np.testing.assert_allclose(a, 1.0)
    np.testing.assert_allclose(v, t**2 - s**2, rtol=1e-4)
    mean, variance = process.posterior(EDM, jnp.float32(x), jnp.float32(x0), jnp.float32(t), jnp.float32(s))
    expected_mean, expected_variance = condition(1.0, t**2 - s**2, 1.0, s**2, x0, x)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-4, atol=1e-12)


@given(st.lists(st.integers(0, T), min_size=3, max_size=3, unique=True))
def test_transitions_compose(times):
    r, s, t = sorted(times)
    (a1, v1), (a2, v2), (a, v) = (process.transition(DDPM, *pair) for pair in ((s, r), (t, s), (t, r)))
    np.testing.assert_allclose(a, a2 * a1, rtol=1e-5)
    np.testing.assert_allclose(v, v2 + a2**2 * v1, rtol=1e-5, atol=1e-6)


def test_step_to_data_is_the_prediction():
    for p, t in ((EDM, 0.5), (DDPM, 700)):
        mean, variance = process.posterior(p, np.float32(2.0), np.float32(0.3), t, 0)
        np.testing.assert_allclose(mean, 0.3, rtol=1e-5)
        assert float(variance) == 0.0


def test_grids_and_schedules_of_few_steps():
    chain = process.ddpm(process.linear_betas(50))
    for n in (0, 51):
        with pytest.raises(ValueError, match=f"grid: n must be >= 1 and <= 50 and whole, got {n}"):
            chain.grid(n)
    assert len(np.unique(chain.grid(50))) == 51
    # Rescaled ends: the last level of signal is that of 1,000 steps, about.
    last = lambda betas: float(np.prod(np.sqrt(1 - betas)))
    full = last(process.sqrt_linear_betas(1000))
    assert abs(last(process.sqrt_linear_betas(100)) - full) < 0.02


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.3, 5.0))
def test_grids_of_any_power_fall_from_noise_to_data(steps, n, power):
    chain = process.ddpm(process.linear_betas(max(steps, 21)), power=power)
    n = min(n, chain.steps)
    grid = np.asarray(chain.grid(n))
    assert grid[0] == chain.steps
    assert grid[-1] == 0
    assert len(grid) == n + 1
    assert (np.diff(grid) < 0).all()
    # Where the curve has room it is followed.
    ideal = chain.steps * (np.arange(n, -1, -1) / n) ** power
    room = np.abs(np.diff(ideal)).min() > 1
    assert not room or np.abs(grid - ideal).max() <= 0.5 + 1e-6


def test_a_power_must_be_positive():
    with pytest.raises(ValueError, match="power must be > 0, got 0"):
        process.ddpm(process.linear_betas(50), power=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: process.ddpm([]), "ddpm: number of betas must be >= 1 and whole, got 0"),
        (lambda: process.edm(rho=0), "edm: rho must be > 0, got 0"),
        (lambda: process.edm(rho=-7.0), "edm: rho must be > 0, got -7.0"),
        (lambda: process.edm(std=-1.2), "edm: std must be >= 0, got -1.2"),
        (lambda: process.edm(mean=np.nan), "edm: mean must be a finite number, got nan"),
        (lambda: EDM.grid(0), "edm: grid: n must be >= 1 and whole, got 0"),
        (lambda: EDM.grid(2.5), "edm: grid: n must be >= 1 and whole, got 2.5"),
        (lambda: jax.jit(lambda: EDM.grid(-3))(), "edm: grid: n must be >= 1 and whole, got -3"),
        (lambda: process.linear_betas(0), "linear_betas: steps must be >= 1 and whole, got 0"),
        (lambda: process.sqrt_linear_betas(-1), "sqrt_linear_betas: steps must be >= 1 and whole, got -1"),
        (lambda: process.cosine_betas(10, largest=1.0), "cosine_betas: largest must be > 0 and < 1, got 1.0"),
        (lambda: process.cosine_betas(10, offset=-1), "cosine_betas: offset must be >= 0, got -1"),
        (lambda: process.classifier_time(share=1.0), "classifier_time: share must be > 0 and < 1, got 1.0"),
        (lambda: process.classifier_time(low=2.0, high=1.0), "classifier_time: high must be > 2, got 1.0"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_posterior_has_one_shape():
    with pytest.raises(ValueError, match=r"posterior: x0 must have shape \(2,\), got \(1,\)"):
        process.posterior(EDM, jnp.zeros(2), jnp.zeros(1), 1.0, 0.5)
