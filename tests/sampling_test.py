import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff import guidance, process, sampling

EDM, DDPM = process.edm(), process.ddpm(process.linear_betas())
COSINE = process.ddpm(process.cosine_betas(200))
FLOW, SHIFTED = process.flow(), process.flow(3.0)
SILENT = process.ddpm(process.zero_terminal(process.sqrt_linear_betas()))
"""A chain that ends at alpha = 0."""
TRIGONOMETRIC = process.continuous(lambda t: jnp.cos(jnp.pi / 2 * t), lambda t: jnp.sin(jnp.pi / 2 * t))
FALSE_ALARM = 1e-4
"""Of a statistical test."""


def plain(x, t):
    return jnp.tanh(x) + 0.3


def ancestral_beta(p, denoiser):
    return sampling.ancestral(p, denoiser, "beta")


def ddim_ancestral(p, denoiser):
    return sampling.ddim(p, denoiser, 1.0)


def ddim_half(p, denoiser):
    return sampling.ddim(p, denoiser, 0.5)


def churned(p, denoiser):
    return sampling.heun(p, denoiser, churn=0.3)


@pytest.mark.parametrize(
    ("p", "kernel", "steps"),
    [
        (EDM, sampling.heun, 30),
        (EDM, churned, 60),
        (EDM, sampling.ancestral, 200),
        (DDPM, sampling.heun, 30),
        (DDPM, ddim_half, 100),
        (DDPM, ancestral_beta, 1000),
        (COSINE, sampling.ancestral, 200),
        (FLOW, sampling.heun, 30),
        (SHIFTED, sampling.heun, 30),
        (FLOW, sampling.ddim, 400),
        (FLOW, sampling.ancestral, 400),
        (TRIGONOMETRIC, sampling.heun, 30),
        (SILENT, sampling.heun, 30),
        (SILENT, ddim_half, 200),
        (SILENT, ancestral_beta, 1000),
    ],
)
def test_samplers_recover_the_mixture(p, kernel, steps, mixture):
    @jax.jit
    def draw(keys):
        step = kernel(p, mixture.denoiser(p))
        return jax.vmap(lambda key: sampling.sample(p, step, p.grid(steps), key, (2,)))(keys)

    samples = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    # Kolmogorov-Smirnov on both coordinates (Bonferroni).
    for axis in range(2):
        test = stats.kstest(samples[:, axis], lambda v, axis=axis: mixture.cdf(axis, v))
        assert test.pvalue > FALSE_ALARM / 2


@pytest.mark.parametrize(
    ("p", "kernel", "steps"), [(FLOW, sampling.heun, 60), (FLOW, ddim_half, 400), (SILENT, sampling.heun, 60)]
)
def test_guided_samplers_condition_from_a_start_without_signal(p, kernel, steps, mixture):
    # The Bayes classifier is flat at alpha = 0, so the first step alone is not guided.
    @jax.jit
    def draw(keys):
        guide = guidance.guide(p, mixture.log_good(p))
        step = kernel(p, guide(mixture.denoiser(p)))
        return jax.vmap(lambda key: sampling.sample(p, step, p.grid(steps), key, (2,)))(keys)

    samples, good = np.asarray(draw(jax.random.split(jax.random.key(0), 3000))), mixture.part(True)
    for axis in range(2):
        test = stats.kstest(samples[:, axis], lambda v, axis=axis: good.cdf(axis, v))
        assert test.pvalue > FALSE_ALARM / 2


@pytest.mark.parametrize("p", [FLOW, SILENT], ids=["flow", "chain"])
@pytest.mark.parametrize("kernel", [sampling.heun, sampling.ddim, ddim_half, sampling.ancestral, ancestral_beta])
def test_a_step_from_noise_alone_keeps_no_signal_of_it(p, kernel):
    # From alpha = 0 a deterministic step is alpha_s x_0 + sigma_s / sigma_t x; with the mean of two x_0 in Heun's.
    t, s = p.grid(4)[:2]
    x = np.float32([0.3, -0.7])
    step = np.asarray(jax.jit(kernel(p, plain))(jax.random.key(0), x, t, s))
    assert np.isfinite(step).all()
    if kernel in (sampling.ddim, sampling.heun):
        alpha, sigma = float(p.alpha(s)), float(p.sigma(s) / p.sigma(t))
        euler = alpha * plain(x, t) + sigma * x
        second = alpha * (plain(x, t) + plain(euler, s)) / 2 + sigma * x
        np.testing.assert_allclose(step, euler if kernel is sampling.ddim else second, rtol=1e-5, atol=1e-6)


def test_heun_of_edm_is_what_it_was_bit_for_bit():
    def kernel(key, x, t, s):  # Karras et al. (2022), Algorithm 1, as this library first had it
        slope = lambda y, t: (y - plain(y, t)) / t
        first, last = slope(x, t), s == 0
        second = lambda: 0.5 * (first + slope(x + (s - t) * first, jnp.where(last, t, s)))
        return x + (s - t) * jax.lax.cond(last, lambda: first, second)

    run = lambda kernel: jax.vmap(lambda key: sampling.sample(EDM, kernel, EDM.grid(18), key, (3,)))
    keys = jax.random.split(jax.random.key(0), 64)
    np.testing.assert_array_equal(jax.jit(run(sampling.heun(EDM, plain)))(keys), jax.jit(run(kernel))(keys))


def ode_solution(gaussian, x, high, low):
    """The probability-flow ODE of a Gaussian in closed form: in y = x / alpha at noise level n = sigma / alpha,
    (y - m) / sqrt(std^2 + n^2) is constant."""
    (mean,), (std,) = gaussian.means[0], gaussian.stds
    return mean + (x - mean) * np.sqrt((std**2 + low**2) / (std**2 + high**2))


ORDERS = pytest.mark.parametrize(("kernel", "order"), [(sampling.ddim, 1), (sampling.heun, 2)], ids=["ddim", "heun"])


def observed_order(errors: list[float]) -> float:
    """Slope of -log2 error over halvings of the step."""
    return -np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0]


def errors_at_the_end(kernel, x, grids, exact) -> list[float]:
    """Distances from the exact solution at the ends of the grids, in one program."""
    step, errors = jax.jit(kernel), []
    for grid in grids:
        y = jnp.asarray(x)
        for t, s in itertools.pairwise(grid):
            y = step(jax.random.key(0), y, t, s)
        errors.append(abs(float((y - exact)[0])))
    return errors


@ORDERS
def test_order_of_convergence_edm(kernel, order, gaussian):
    x, high, low = np.float32([2.9]), 3.0, 0.05
    grids = [np.float32(np.linspace(high**0.5, low**0.5, n + 1) ** 2) for n in (8, 16, 32, 64)]
    exact = ode_solution(gaussian, x, high, low)
    errors = errors_at_the_end(kernel(EDM, gaussian.denoiser(EDM)), x, grids, exact)
    assert abs(observed_order(errors) - order) < 0.15
    assert errors[-1] > 1e-6, "above the rounding errors, or the slope would mean nothing"


@ORDERS
def test_order_of_convergence_flow(kernel, order, gaussian):
    # From alpha = 0, where x / alpha has no value: the solution is the quantile of x / sigma.
    x, end = np.float32([0.9]), 0.05
    grids = [np.float32(np.linspace(1.0, end, n + 1)) for n in (16, 32, 64, 128)]
    (mean,), (std,) = gaussian.means[0], gaussian.stds
    exact = (1 - end) * mean + x * np.sqrt((1 - end) ** 2 * std**2 + end**2)
    errors = errors_at_the_end(kernel(FLOW, gaussian.denoiser(FLOW)), x, grids, exact)
    assert abs(observed_order(errors) - order) < 0.15
    assert errors[-1] > 1e-6, "above the rounding errors, or the slope would mean nothing"


@ORDERS
def test_order_of_convergence_ddpm(kernel, order, gaussian):
    first, last = 500, 100
    (alpha, alpha_last), (sigma, sigma_last) = (
        np.float64(f(np.array([first, last]))) for f in (DDPM.alpha, DDPM.sigma)
    )
    y = np.float32([2.9])
    grids = [np.linspace(first, last, n + 1).astype(int) for n in (5, 10, 20, 40)]
    exact = alpha_last * ode_solution(gaussian, y, sigma / alpha, sigma_last / alpha_last)
    errors = errors_at_the_end(kernel(DDPM, gaussian.denoiser(DDPM)), np.float32(alpha * y), grids, exact)
    assert abs(observed_order(errors) - order) < 0.15
    assert errors[-1] > 1e-6, "above the rounding errors, or the slope would mean nothing"


@given(t=st.floats(0.01, 80), ratio=st.floats(0, 0.99), x=st.floats(-3, 3, width=32))
def test_deterministic_ddim_is_eulers_step(t, ratio, x):
    t, s, x = np.float32(t), np.float32(t * ratio), np.float32([x])
    step = sampling.ddim(EDM, plain)(jax.random.key(0), x, t, s)
    np.testing.assert_allclose(step, x + (s - t) * (x - plain(x, t)) / t, rtol=1e-4, atol=1e-5)


def test_deterministic_kernels_ignore_the_key():
    x = np.float32([0.3, -0.2])
    for kernel in (sampling.ddim(DDPM, plain), sampling.heun(DDPM, plain)):
        first, second = (kernel(jax.random.key(seed), x, 500, 400) for seed in (0, 1))
        np.testing.assert_array_equal(first, second)


PAIRS = [(EDM, 10.0, 3.0), (EDM, 0.1, 0.02), (DDPM, 1000, 999), (DDPM, 2, 1), (DDPM, 700, 300), (DDPM, 40, 0)]


@pytest.mark.parametrize(("p", "t", "s"), PAIRS)
def test_ddim_with_eta_one_is_the_ancestral_kernel(p, t, s):
    # Same key, same noise: the two are one formula, not only one distribution.
    x = np.float32([0.3, -1.2])
    ddim, ancestral = (kernel(p, plain)(jax.random.key(3), x, t, s) for kernel in (ddim_ancestral, sampling.ancestral))
    np.testing.assert_allclose(ddim, ancestral, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("p", [EDM, DDPM])
def test_ancestral_steps_have_the_stated_moments(p, variance):
    x, n = np.float32([0.3, -1.2]), 2000
    draw = jax.jit(jax.vmap(sampling.ancestral(p, plain, variance), (0, None, None, None)))
    for i, (t, s) in enumerate((t, s) for owner, t, s in PAIRS if owner is p):
        alpha_t, sigma_t, alpha_s, sigma_s = (float(f(np.array(u))) for u in (t, s) for f in (p.alpha, p.sigma))
        a = alpha_t / alpha_s
        large = sigma_t**2 - a**2 * sigma_s**2  # beta_t for one step of a chain
        small = large * sigma_s**2 / sigma_t**2
        mean = a * sigma_s**2 / sigma_t**2 * x + alpha_s * large / sigma_t**2 * np.float64(plain(x, t))
        draws = np.asarray(draw(jax.random.split(jax.random.key(i), n), x, t, s))
        if s == 0:  # the step to data adds no noise
            np.testing.assert_allclose(draws, np.broadcast_to(mean, draws.shape), rtol=1e-4, atol=1e-5)
            continue
        # Normal test of the mean and chi-square test of the variance, with false-alarm rates of 1e-4; two coordinates.
        std = np.sqrt(large if variance == "beta" else small)
        z = (draws - mean) / std
        assert np.abs(z.mean(0)).max() < stats.norm.isf(FALSE_ALARM / 4) / np.sqrt(n) + 1e-4 * np.abs(mean).max() / std
        low, high = stats.chi2.ppf([FALSE_ALARM / 4, 1 - FALSE_ALARM / 4], n)
        assert ((low < (z**2).sum(0)) & ((z**2).sum(0) < high)).all()


def test_ancestral_rejects_other_variances():
    with pytest.raises(ValueError, match="'posterior' or 'beta'"):
        sampling.ancestral(DDPM, plain, "learned")


@pytest.mark.parametrize("p", [EDM, DDPM])
def test_heun_evaluates_once_in_the_last_step(p):
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda x: calls.append(1), x)
        return plain(x, t)

    # As a batch: a `cond` that became a `select` under vmap would evaluate both branches.
    step = jax.jit(lambda x, t, s: jax.vmap(lambda x: sampling.heun(p, counted)(jax.random.key(0), x, t, s))(x))
    x = np.float32([[0.3], [0.4], [0.5]])
    evaluations = []
    for t, s in ((7, 3), (3, 0)):
        calls.clear()
        jax.block_until_ready(step(x, t, s))
        jax.effects_barrier()
        evaluations.append(len(calls) / len(x))
    assert evaluations == [2, 1]
    # The step to s = 0 lands on the prediction.
    np.testing.assert_allclose(step(x, 3, 0), plain(x, 3), rtol=2e-5)


def test_churn_adds_the_stated_noise():
    # A denoiser that keeps x makes Heun's step the identity: what is left is the noise of Algorithm 2, of variance
    # S_noise^2 ((t + gamma t)^2 - t^2).
    t, gamma, factor, n = 2.0, 0.4, 1.01, 4000
    kernel = sampling.heun(EDM, lambda x, t: x, churn=gamma, churn_noise=factor)
    draws = jax.jit(jax.vmap(lambda key: kernel(key, jnp.zeros(1), jnp.float32(t), jnp.float32(0.5))))
    z = np.asarray(draws(jax.random.split(jax.random.key(5), n)))[:, 0]
    z = z / (factor * t * np.sqrt((1 + gamma) ** 2 - 1))
    # Kolmogorov-Smirnov.
    assert stats.kstest(z, "norm").pvalue > FALSE_ALARM


def test_churn_stays_in_its_window():
    x = np.float32([0.3])
    window = sampling.heun(EDM, plain, churn=0.3, churn_low=0.1, churn_high=10.0)
    always, never = sampling.heun(EDM, plain, churn=0.3), sampling.heun(EDM, plain)
    for t, expected in ((0.05, never), (0.1, always), (1.0, always), (10.0, always), (20.0, never)):
        move = lambda kernel, t=t: np.asarray(kernel(jax.random.key(6), x, jnp.float32(t), jnp.float32(t / 2)))
        np.testing.assert_allclose(move(window), move(expected), rtol=1e-6)
        assert not np.allclose(move(always), move(never), rtol=1e-3)


@pytest.mark.parametrize("churn", [-0.1, 0.5])
def test_churn_has_a_range(churn):
    with pytest.raises(ValueError, match=r"heun: churn must be >= 0 and <= 0\.414"):
        sampling.heun(EDM, plain, churn)


def test_churn_needs_continuous_time():
    with pytest.raises(ValueError, match="discrete chain"):
        sampling.heun(DDPM, plain, 0.1)


@pytest.mark.parametrize("p", [EDM, DDPM])
def test_samples_start_from_the_prior(p):
    stay = lambda key, x, t, s: x
    draw = lambda key: sampling.sample(p, stay, p.grid(3), key, (1,))
    start = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(7), 3000)))[:, 0]
    # Kolmogorov-Smirnov.
    assert stats.kstest(start / float(p.sigma(p.grid(3)[0])), "norm").pvalue > FALSE_ALARM


def test_noise_of_the_steps_is_independent():
    # A kernel that records its noise: the start and steps 0 .. 3 must not share any.
    record = lambda key, x, t, s: jnp.concatenate([x[:1], x[2:], jax.random.normal(key, (1,))])
    keys = jax.random.split(jax.random.key(8), 2000)
    draw = lambda key: sampling.sample(EDM, record, EDM.grid(4), key, (5,))
    rows = np.asarray(jax.jit(jax.vmap(draw))(keys))  # the start's first number, then one a step
    correlation = np.corrcoef(rows.T) - np.eye(5)
    # 10 correlations of independent normals, of standard deviation 1 / sqrt(n) (Bonferroni).
    assert np.abs(correlation).max() < stats.norm.isf(FALSE_ALARM / 20) / np.sqrt(2000)


def test_a_sample_does_not_depend_on_its_batch(mixture):
    draw = jax.jit(
        jax.vmap(
            lambda key: sampling.sample(DDPM, ddim_ancestral(DDPM, mixture.denoiser(DDPM)), DDPM.grid(20), key, (2,))
        )
    )
    keys = jax.random.split(jax.random.key(9), 7)
    together = np.asarray(draw(keys))
    apart = np.concatenate([draw(keys[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-6)


def test_refine_walks_the_grid():
    moves = lambda key, x, t, s: 2 * x + t - 10 * s
    x = sampling.refine(moves, jnp.float32([3.0, 2.0, 0.0]), jax.random.key(0), jnp.float32([1.0]))
    np.testing.assert_array_equal(x, [2 * (2 * 1 + 3 - 20) + 2])


def test_given_coordinates_stay_and_the_others_are_conditioned_on_them():
    """A Gaussian with correlation, whose model is given its second coordinate clean: the first one is conditional."""
    rho, n = 0.8, 4000
    known = jnp.float32([0.0, 1.3])
    mask = jnp.array([False, True])

    def model(x, t):  # E[x_0 | first coordinate noisy, second one clean]
        mean, variance = rho * x[1], 1 - rho**2
        gain = DDPM.alpha(t) * variance / (DDPM.alpha(t) ** 2 * variance + DDPM.sigma(t) ** 2)
        return jnp.stack([mean + gain * (x[0] - DDPM.alpha(t) * mean), x[1]])

    kernel = sampling.pinned(sampling.ancestral(DDPM, model), known, mask)
    draw = lambda key: sampling.sample(DDPM, kernel, DDPM.grid(250), key, (2,))
    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), n)))
    np.testing.assert_array_equal(drawn[:, 1], np.float32(1.3))
    assert stats.kstest((drawn[:, 0] - rho * 1.3) / (1 - rho**2) ** 0.5, "norm").pvalue > 1e-4


def test_states_end_in_the_sample():
    kernel = sampling.ancestral(DDPM, lambda x, t: 0.5 * x)
    grid = DDPM.grid(7)
    states = sampling.states(DDPM, kernel, grid, jax.random.key(0), (3,))
    assert states.shape == (8, 3)
    np.testing.assert_array_equal(states[-1], sampling.sample(DDPM, kernel, grid, jax.random.key(0), (3,)))


KERNELS = {
    "ddim": sampling.ddim,
    "ancestral": sampling.ancestral,
    "heun": sampling.heun,
    "recurrent": lambda p, model: sampling.recurrent(p, sampling.ddim(p, model), 2),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("shape", "wrong"), [((2,), (1,)), ((3,), (3, 1)), ((2, 3), (3,))])
def test_a_model_of_another_shape_is_an_error(kernel, shape, wrong):
    step = KERNELS[kernel](EDM, lambda x, t: jnp.zeros(wrong))
    with pytest.raises(ValueError, match=r"x_0 of the denoiser must have shape \(.*\), got \("):
        sampling.sample(EDM, step, EDM.grid(4), jax.random.key(0), shape)


@pytest.mark.parametrize("wrong", [(1,), (2, 2)])
def test_a_kernel_of_another_shape_is_an_error(wrong):
    draw = lambda: sampling.sample(EDM, lambda key, x, t, s: jnp.ones(wrong), EDM.grid(4), jax.random.key(0), (2,))
    with pytest.raises(ValueError, match=r"sample: x_s of the kernel must have shape \(2,\), got \("):
        draw()
    kernel = sampling.pinned(sampling.ddim(EDM, plain), jnp.zeros((*wrong, 3)), jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"pinned: known must broadcast to shape \(2,\), got \("):
        kernel(jax.random.key(0), jnp.zeros(2), 2.0, 1.0)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([0.0, 1.0, 2.0], "change from a time to the next must be < 0, got 1.0 among 2 values"),
        ([2.0, 2.0, 0.0], "change from a time to the next must be < 0, got 0.0 among 2 values"),
        ([2.0, 1.0, -1.0], "grid must be >= 0, got -1.0 among 3 values"),
        ([2.0, np.nan, 0.0], "grid must be >= 0, got nan among 3 values"),
        ([0.0], "number of times must be >= 2 and whole, got 1"),
        ([], "number of times must be >= 2 and whole, got 0"),
        ([[2.0, 0.0]], r"grid must have shape \(n,\), got \(1, 2\)"),
    ],
)
def test_a_grid_falls(grid, message):
    stay, key, grid = (lambda key, x, t, s: x), jax.random.key(0), np.float32(grid)
    for walk in (
        lambda: sampling.sample(EDM, stay, grid, jax.random.clone(key), (2,)),
        lambda: sampling.states(EDM, stay, grid, jax.random.clone(key), (2,)),
        lambda: jax.jit(lambda key: sampling.refine(stay, grid, key, jnp.zeros(2)))(jax.random.clone(key)),
    ):
        with pytest.raises(ValueError, match=message):
            walk()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampling.ddim(DDPM, plain, -1), "ddim: eta must be >= 0 and <= 1, got -1"),
        (lambda: sampling.ddim(DDPM, plain, 5.0), "ddim: eta must be >= 0 and <= 1, got 5.0"),
        (lambda: sampling.heun(EDM, plain, churn_low=2.0, churn_high=1.0), "heun: churn_high must be >= 2, got 1.0"),
        (lambda: sampling.heun(EDM, plain, churn_noise=-1), "heun: churn_noise must be >= 0, got -1"),
        (lambda: sampling.recurrent(EDM, None, -1), "recurrent: times must be >= 1 and whole, got -1"),
        (lambda: sampling.recurrent(EDM, None, jnp.int32(0)), "recurrent: times must be >= 1 and whole, got 0"),
        (lambda: sampling.ancestral_moments(DDPM, plain, jnp.zeros(2), 2, 1, "learned"), "ancestral: variance must be"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("kernel", "p"), [("ddim", DDPM), ("ancestral", EDM), ("heun", EDM), ("heun", DDPM), ("recurrent", DDPM)]
)
def test_samples_keep_their_type(kernel, p):
    # Networks and states of other types than the process computes in.
    narrow = lambda x, t: plain(x.astype(jnp.bfloat16), t)
    grid = p.grid(5)
    run = lambda model, x: sampling.refine(KERNELS[kernel](p, model), grid, jax.random.key(0), x)
    start = np.asarray(p.sigma(grid[0]) * jax.random.normal(jax.random.key(1), (2,)))
    expected = jax.jit(lambda x: run(plain, x))(start)
    found = jax.jit(lambda x: (run(narrow, x), run(plain, x.astype(jnp.bfloat16))))(start)
    assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16]
    np.testing.assert_allclose(found[0], expected, atol=0.05)
    np.testing.assert_allclose(found[1].astype(jnp.float32), expected, atol=0.1)
    with jax.enable_x64(True):
        single = lambda x, t: plain(x.astype(jnp.float32), t)
        wide = jax.jit(lambda x: (run(single, x.astype(jnp.float64)), run(single, x)))(start)
    assert [x.dtype for x in wide] == [jnp.float64, jnp.float32]
