import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff import denoiser, guidance, potential, process, sampling

EDM, DDPM = process.edm(), process.ddpm(process.linear_betas())
PROCESSES = pytest.mark.parametrize(
    ("p", "times"), [(EDM, np.float32([0.05, 0.6, 8.0])), (DDPM, np.array([1, 60, 400, 900]))], ids=["edm", "ddpm"]
)
POINTS = np.float32([[0.2, 0.1], [-1.0, 0.9], [1.4, -0.3], [0.0, 0.0]])
FALSE_ALARM = 1e-4
"""Of a comparison of samples with a distribution."""


def plain(x, t):
    return jnp.tanh(x) + 0.3


def bump(x, t):
    return jnp.sin(x[0]) * jnp.cos(2 * x[1])


def bump_gradient(x):
    x, y = np.float64(x[..., 0]), np.float64(x[..., 1])
    return np.stack([np.cos(x) * np.cos(2 * y), -2 * np.sin(x) * np.sin(2 * y)], -1)


def on_points(times, *functions):
    """Values of the functions on POINTS, at all times, in one compiled program."""
    at = lambda t: [jax.vmap(lambda x, function=function: function(x, t))(POINTS) for function in functions]
    return zip(*(np.asarray(values, np.float64) for values in jax.jit(jax.vmap(at))(times)), strict=True)


def levels(p, times):
    return zip(np.float64(p.alpha(times)), np.float64(p.sigma(times)), strict=True)


@PROCESSES
def test_guide_adds_to_the_score(p, times):
    # Tweedie's formula: score of the guided denoiser = score + scale grad log r.
    guided = guidance.guide(p, bump, 1.7)(plain)
    for (alpha, sigma), (before, after) in zip(levels(p, times), on_points(times, plain, guided), strict=True):
        score = lambda x0, alpha=alpha, sigma=sigma: (alpha * x0 - POINTS) / sigma**2
        atol = 2e-6 * alpha / sigma**2 + 1e-5
        np.testing.assert_allclose(score(after) - score(before), 1.7 * bump_gradient(POINTS), rtol=1e-4, atol=atol)


@PROCESSES
def test_guide_in_the_languages_of_eps_and_x0(p, times):
    # eps~ = eps - sigma g (Gen-neG, eq. 8), x_0~ = x_0 + sigma^2 / alpha g.
    guided, gradient = guidance.guide(p, bump)(plain), bump_gradient(POINTS)
    models = plain, guided, denoiser.to_epsilon(p, plain), denoiser.to_epsilon(p, guided)
    for (alpha, sigma), (x0, x0_guided, eps, eps_guided) in zip(
        levels(p, times), on_points(times, *models), strict=True
    ):
        np.testing.assert_allclose(eps_guided - eps, -sigma * gradient, rtol=1e-4, atol=5e-6 * alpha / sigma + 1e-5)
        np.testing.assert_allclose(x0_guided - x0, sigma**2 / alpha * gradient, rtol=1e-4, atol=1e-6)


@PROCESSES
def test_guiding_with_the_bayes_classifier_is_conditioning(mixture, p, times):
    # The theorem of Gen-neG: score + grad log p(y = 1 | x_t) is the score of p_t(x | y = 1), scale 1.
    guided = guidance.guide(p, mixture.log_good(p))(mixture.denoiser(p))
    conditional = mixture.part(True).denoiser(p)
    for (alpha, sigma), (steered, expected) in zip(
        levels(p, times), on_points(times, guided, conditional), strict=True
    ):
        np.testing.assert_allclose(steered, expected, rtol=1e-4, atol=2e-6 * max(1.0, sigma**2 / alpha))


@PROCESSES
def test_classifier_gradient_is_a_difference_of_denoisers(mixture, p, times):
    # E[x_0 | x_t] = C D_pos + (1 - C) D_neg, so sigma^2 / alpha grad log C = (1 - C) / C (D - D_neg).
    plain = mixture.denoiser(p)
    guided = guidance.guide(p, mixture.log_good(p))(plain)
    functions = mixture.log_good(p), plain, mixture.part(False).denoiser(p), guided
    for (_, sigma), (log_c, d, d_neg, steered) in zip(levels(p, times), on_points(times, *functions), strict=True):
        c = np.exp(log_c)[:, None]
        # Where C is tiny the right side is a huge factor times a difference that float32 has lost.
        clear = c[:, 0] > 1e-3
        assert clear.any()
        shift, expected = (steered - d)[clear], ((1 - c) / c * (d - d_neg))[clear]
        np.testing.assert_allclose(shift, expected, rtol=2e-3, atol=2e-5 * max(1.0, sigma**2))


@pytest.mark.parametrize("count", [1, 3])
def test_stacking_copies_is_scale(count):
    logit = lambda params, x, t: params["w"] @ x + params["b"]
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.float32(0.3)}
    log_c = potential.log_probability(logit)
    copies = guidance.guide(DDPM, potential.stack(log_c, potential.stacked(*[params] * count)))(plain)
    single = guidance.guide(DDPM, lambda x, t: log_c(params, x, t), count)(plain)
    chained = guidance.chain(*[guidance.guide(DDPM, lambda x, t: log_c(params, x, t))] * count)(plain)
    ((stacked, scaled, repeated),) = on_points(np.array([300]), copies, single, chained)
    np.testing.assert_allclose(stacked, scaled, rtol=1e-5)
    np.testing.assert_allclose(stacked, repeated, rtol=1e-5)


@given(constant=st.floats(-50, 50), scale=st.floats(-10, 10))
def test_nothing_to_steer_by_changes_nothing(constant, scale):
    x = POINTS[0]
    for steer in (
        guidance.guide(DDPM, lambda x, t: jnp.float32(constant) + 0 * x[0], scale),
        guidance.guide(DDPM, potential.total(), scale),
        guidance.guide(DDPM, bump, 0.0),
        guidance.chain(),
    ):
        np.testing.assert_array_equal(steer(plain)(x, 500), plain(x, 500))


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(("t", "s"), [(1000, 999), (500, 499), (2, 1), (1, 0), (500, 250), (40, 0)])
def test_mean_form(variance, t, s):
    # mu + scale Sigma grad log r, with Sigma the variance of the sampler's step (Dhariwal and Nichol, Algorithm 1).
    steer = guidance.guide_mean(DDPM, bump, next_time=lambda _: s, scale=1.7, variance=variance)
    x = POINTS[2]
    mean, small = process.posterior(DDPM, x, plain(x, t), t, s)
    shifted, _ = process.posterior(DDPM, x, steer(plain)(x, t), t, s)
    large = process.transition(DDPM, t, s)[1]
    step = np.float64(small if variance == "posterior" else large)
    np.testing.assert_allclose(
        np.float64(shifted) - np.float64(mean), 1.7 * step * bump_gradient(x), rtol=1e-4, atol=5e-7
    )


def test_last_step_of_the_mean_form():
    # The last step decides infractions, but its posterior variance is 0, so it is not guided.  beta_1 is not 0.
    x = POINTS[2]
    for variance, moved in (("posterior", False), ("beta", True)):
        steer = guidance.guide_mean(DDPM, bump, next_time=lambda t: t - 1, variance=variance)
        assert np.array_equal(steer(plain)(x, 1), plain(x, 1)) != moved


def test_mean_and_score_forms_differ_by_the_variance():
    # The score form moves the mean by beta_t / sqrt(1 - beta_t) g, the mean form by Sigma_t g.  With Sigma = beta the
    # ratio of the two is sqrt(1 - beta_t) = alpha_t / alpha_{t-1}.
    x, t = POINTS[2], 600
    score = guidance.guide(DDPM, bump)(plain)(x, t) - plain(x, t)
    mean = guidance.guide_mean(DDPM, bump, lambda t: t - 1, variance="beta")(plain)(x, t) - plain(x, t)
    np.testing.assert_allclose(np.asarray(mean / score), DDPM.alpha(t) / DDPM.alpha(t - 1) * np.ones(2), rtol=1e-3)


def test_mean_form_rejects_other_variances():
    with pytest.raises(ValueError, match="'posterior' or 'beta'"):
        guidance.guide_mean(DDPM, bump, lambda t: t - 1, variance="learned")


@given(low=st.floats(-2, 0, width=32), width=st.floats(0, 2, width=32))
def test_clip(low, width):
    high = np.float32(low + width)
    clipped = np.asarray(guidance.clip(low, high)(lambda x, t: x)(np.float32([-3, low, high, 0.1, 3]), 1))
    assert (clipped >= np.float32(low)).all()
    assert (clipped <= high).all()
    np.testing.assert_array_equal(clipped, np.clip(np.float32([-3, low, high, 0.1, 3]), np.float32(low), high))


def test_chain_applies_from_first_to_last():
    double = lambda denoiser: lambda x, t: 2 * denoiser(x, t)
    add = lambda denoiser: lambda x, t: denoiser(x, t) + 1
    x = np.float32([1.0, 5.0])
    identity = lambda x, t: x
    np.testing.assert_array_equal(guidance.chain(double, add)(identity)(x, 0), 2 * x + 1)
    np.testing.assert_array_equal(guidance.chain(add, double)(identity)(x, 0), 2 * (x + 1))
    nested = guidance.chain(guidance.chain(double, add), double)(identity)(x, 0)
    np.testing.assert_array_equal(nested, guidance.chain(double, guidance.chain(add, double))(identity)(x, 0))


def test_inpaint_keeps_the_known_and_only_the_known():
    known, mask = np.float32([9.0, 9.0]), np.array([True, False])
    x = np.float32([0.3, 0.4])
    result = guidance.inpaint(known, mask)(plain)(x, 0.5)
    np.testing.assert_array_equal(result, [9.0, plain(x, 0.5)[1]])


@pytest.mark.parametrize("p", [EDM, DDPM])
def test_inpainted_samples_hold_the_known_part(p, mixture):
    known, mask = np.float32([0.25, 0.0]), np.array([True, False])
    model = guidance.inpaint(known, mask)(mixture.denoiser(p))
    draw = lambda key: sampling.sample(p, sampling.ddim(p, model, 1.0), p.grid(10), key, (2,))
    samples = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 8)))
    np.testing.assert_array_equal(samples[:, 0], known[0])
    assert len(np.unique(samples[:, 1])) == 8


def follows(samples, target) -> bool:
    """Kolmogorov-Smirnov on both coordinates; says no to samples of `target` at the rate FALSE_ALARM (Bonferroni)."""
    tests = [stats.kstest(samples[:, axis], lambda v, axis=axis: target.cdf(axis, v)) for axis in range(2)]
    return min(test.pvalue for test in tests) > FALSE_ALARM / 2


@pytest.mark.parametrize(
    ("p", "kernel", "steps"),
    [(EDM, sampling.heun, 30), (DDPM, sampling.heun, 30), (DDPM, sampling.ancestral, 200)],
    ids=["edm-heun", "ddpm-heun", "ddpm-ancestral"],
)
def test_guided_samples_follow_the_conditional(p, kernel, steps, mixture):
    @jax.jit
    def draw(keys, scale):
        guided = guidance.guide(p, mixture.log_good(p), scale)(mixture.denoiser(p))
        return jax.vmap(lambda key: sampling.sample(p, kernel(p, guided), p.grid(steps), key, (2,)))(keys)

    samples = {scale: np.asarray(draw(jax.random.split(jax.random.key(1), 3000), scale)) for scale in (0.0, 1.0, 2.0)}
    assert follows(samples[1.0], mixture.part(True))
    # The test can fail: without guidance they follow the whole mixture, and only scale 1 is right.
    assert follows(samples[0.0], mixture)
    assert not follows(samples[1.0], mixture)
    assert not follows(samples[2.0], mixture.part(True))


def test_guidance_in_an_interval_is_guidance_there_and_nothing_elsewhere():
    within = lambda t: t <= 300
    broken = lambda x, t: jnp.where(t <= 300, 1.0, jnp.nan) * bump(x, t)
    limited = guidance.guide(DDPM, broken, 1.7, within)(plain)
    everywhere = guidance.guide(DDPM, bump, 1.7)(plain)
    x, times = POINTS[0], jnp.array([1, 300, 301, 900])
    for t in times:
        expected = everywhere if t <= 300 else plain
        np.testing.assert_allclose(jax.jit(limited)(x, t), expected(x, t), rtol=1e-6)
        inside = potential.limited(broken, within)(x, t)
        np.testing.assert_allclose(inside, bump(x, t) if t <= 300 else 0.0, rtol=1e-6)
    # Elsewhere it is not evaluated, if the time is the same for all samples.
    done = [step.primitive.name for step in jax.make_jaxpr(jax.vmap(limited, (0, None)))(POINTS, 900).eqns]
    assert "cond" in done
    assert "cos" not in done
    at_once = jax.vmap(limited, (None, 0))(x, times)
    np.testing.assert_allclose(at_once, jnp.stack([limited(x, t) for t in times]), rtol=1e-6)


def test_x0_and_log_r_of_other_shapes_are_errors():
    x, narrow, column = jnp.zeros(2), (lambda x, t: jnp.zeros(1)), (lambda x, t: x[:, None])
    steer, first = guidance.guide(EDM, bump), lambda x0: x0[:1]
    for guided in (
        steer(narrow),
        steer(column),
        guidance.guide(EDM, lambda x, t: x[:1])(plain),
        guidance.steer(bump, lambda t: jnp.ones((2, 1)))(plain),
        guidance.universal(jnp.sum, lambda t: 1.0)(narrow),
        guidance.universal(first, lambda t: 1.0)(plain),
        guidance.backward(jnp.sum, 2, 0.1)(narrow),
        guidance.backward(first, 2, 0.1)(plain),
        guidance.clip(-1.0, 1.0)(column),
        guidance.inpaint(jnp.zeros(2), jnp.ones(2, bool))(narrow),
    ):
        with pytest.raises(ValueError, match=r": .* must have shape \(.*\), got \("):
            guided(x, 1.0)
    for guided in (
        guidance.inpaint(jnp.zeros(3), jnp.ones(2, bool))(plain),
        guidance.inpaint(jnp.zeros(2), jnp.ones((2, 1), bool))(plain),
        guidance.clip(jnp.zeros((2, 1)), 1.0)(plain),
        guidance.clip(-1.0, jnp.ones(3))(plain),
    ):
        with pytest.raises(ValueError, match=r": .* must broadcast to shape \(2,\), got \("):
            guided(x, 1.0)


def test_masks_and_bounds_of_a_column_serve_all_columns():
    x, mask = jnp.full((3, 2), 4.0), jnp.array([[True], [False], [False]])
    held = guidance.chain(guidance.clip(-1.0, jnp.ones((1, 2))), guidance.inpaint(jnp.zeros((1, 1)), mask))(
        lambda x, t: x
    )(x, 1.0)
    np.testing.assert_array_equal(held, [[0, 0], [1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.guide(EDM, bump, np.inf), "guide: scale must be a finite number, got inf"),
        (lambda: guidance.guide_mean(DDPM, bump, lambda t: t - 1, np.nan), "guide_mean: scale must be a finite number"),
        (lambda: guidance.backward(jnp.sum, -1, 0.1), "backward: steps must be >= 0 and whole, got -1"),
        (lambda: guidance.backward(jnp.sum, 1, -0.1), "backward: rate must be >= 0, got -0.1"),
        (lambda: guidance.backward(jnp.sum, 1, 0.1, 1.0, -1.0), "backward: high - low must be >= 0, got -2.0"),
        (
            lambda: guidance.successor(np.arange(5)),
            "successor: grid: change from a time to the next must be < 0, got 1",
        ),
        (lambda: guidance.clip(1.0, -1.0), "clip: high - low must be >= 0, got -2.0"),
        (lambda: guidance.clip(np.zeros(2), np.float32([1.0, np.nan])), "clip: high - low must be >= 0, got nan among"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_narrower_model_and_reward_are_guided():
    # In every form the carry of Adam, the cotangent of the model and the two sides of the interval have one type.
    x, narrow = jnp.float32([0.3, -0.2]), lambda x, t: plain(x.astype(jnp.bfloat16), jnp.bfloat16(t))
    reward = lambda x0: jnp.sum(jnp.cos(x0.astype(jnp.bfloat16)))
    for guide in (
        guidance.guide(EDM, lambda x, t: reward(x), 0.3, lambda t: t < 2.0),
        guidance.universal(reward, lambda t: 0.1),
        guidance.backward(reward, 3, 0.1),
        guidance.chain(guidance.clip(-1.0, 1.0), guidance.inpaint(x, jnp.array([True, False]))),
    ):
        found = jax.jit(guide(narrow))(x, 1.0)
        assert found.dtype == jnp.float32
        expected = guide(plain)(x, 1.0)
        np.testing.assert_allclose(found, expected, atol=0.03)


# Two models


@PROCESSES
def test_classifier_free_guidance_adds_the_difference_of_two_scores(mixture, p, times):
    # grad log p(y | x_t) is the difference of the scores of the good part and of all, so scale 2 adds it once more.
    part, whole = mixture.part(True).denoiser(p), mixture.denoiser(p)
    guided = guidance.classifier_free(whole, 2.0)(part)
    classified = guidance.guide(p, mixture.log_good(p))(part)
    for (alpha, sigma), (found, expected) in zip(levels(p, times), on_points(times, guided, classified), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-6 * max(1.0, sigma**2 / alpha))


@given(x=st.floats(-3, 3, width=32), scale=st.floats(-5, 20))
def test_guidance_away_from_itself_is_none(x, scale):
    x = np.float32([x, 0.3])
    for guide in (guidance.classifier_free(plain, scale), guidance.classifier_free(lambda x, t: 0 * x, 1.0)):
        np.testing.assert_allclose(guide(plain)(x, 3), plain(x, 3), rtol=1e-6)


def test_classifier_free_guidance_in_an_interval():
    x = POINTS[0]
    guided = guidance.classifier_free(lambda x, t: 0 * x, 3.0, lambda t: t < 5)(plain)
    np.testing.assert_allclose(guided(x, 4), 3 * plain(x, 4), rtol=1e-6)
    np.testing.assert_array_equal(guided(x, 6), plain(x, 6))
    with pytest.raises(ValueError, match="classifier_free: other: x_0 of the denoiser must"):
        guidance.classifier_free(lambda x, t: x[:1], 2.0)(plain)(x, 4)
    with pytest.raises(ValueError, match="classifier_free: scale must be"):
        guidance.classifier_free(plain, np.nan)


# The oracle


@pytest.mark.parametrize(("n", "wide"), [(64, 1.0), (256, 3.0)])
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_draws_are_symmetric_and_white(n, wide, shape):
    draws = guidance.normal_draws(n, shape, wide)
    points, weights = np.float64(draws.points), np.float64(draws.weights)
    assert points.shape == (n, *shape)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.tensordot(weights, points, 1), 0, atol=1e-6)
    np.testing.assert_allclose(np.tensordot(weights, points**2, 1), 1, rtol=1e-5)


@pytest.mark.parametrize("limit", [-0.4, 0.6, 2.2])
def test_the_accepted_mean_of_a_gaussian_is_a_truncated_normal(gaussian, limit):
    # x_0 given x_t is exactly normal, so the mean above a limit has a closed form, m + s phi(z) / (1 - Phi(z)).
    t, x = np.float32(0.3), np.float32([[0.1], [0.8], [-0.5]])
    draws = guidance.normal_draws(4096, (1,), 3.0)
    guided = guidance.accepted(EDM, lambda x: x[:, 0] > limit, draws, lambda t: t < 1)(gaussian.denoiser(EDM))
    variance = 0.6**2
    mean = (0.4 * t**2 + variance * np.float64(x[:, 0])) / (variance + t**2)
    std = np.sqrt(variance * t**2 / (variance + t**2))
    z = (limit - mean) / std
    expected = mean + std * stats.norm.pdf(z) / stats.norm.sf(z)
    found = np.asarray(jax.jit(jax.vmap(lambda x: guided(x, t)))(x))[:, 0]
    # A quasi-random mean of n points is wrong by about 1 / n of the spread, over the share of the draws that count: of
    # the wide half, because the draws beyond a limit that is rarely passed are theirs.
    tolerance = 5 * std / 4096 / (0.5 * stats.norm.sf(z / 3))
    np.testing.assert_array_less(np.abs(found - expected), tolerance)


def test_where_the_oracle_accepts_all_or_nothing(gaussian):
    model, x = gaussian.denoiser(EDM), np.float32([0.7])
    draws = guidance.normal_draws(64, (1,))
    other = lambda denoiser: lambda x, t: denoiser(x, t) + 5.0
    within = lambda t: t < 1
    everything = guidance.accepted(EDM, lambda x: x[:, 0] < jnp.inf, draws, within, other)(model)
    nothing = guidance.accepted(EDM, lambda x: x[:, 0] > jnp.inf, draws, within, other)(model)
    t = np.float32(0.3)
    np.testing.assert_allclose(everything(x, t), model(x, t), rtol=1e-5)
    np.testing.assert_allclose(nothing(x, t), model(x, t) + 5, rtol=1e-6)
    np.testing.assert_allclose(everything(x, np.float32(2.0)), model(x, np.float32(2.0)) + 5, rtol=1e-6)


def test_an_oracle_of_the_host_is_asked(gaussian):
    on_host = lambda x: np.asarray(x)[:, 0] > 0.5
    traced = lambda x: jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape[:1], bool), x, vmap_method="sequential")
    draws, t = guidance.normal_draws(64, (1,)), np.float32(0.3)
    model = gaussian.denoiser(EDM)
    xs = np.float32([[0.4], [0.7]])
    guided = [guidance.accepted(EDM, f, draws, lambda t: t < 1)(model) for f in (traced, lambda x: x[:, 0] > 0.5)]
    host, device = (jax.vmap(lambda x, denoiser=denoiser: denoiser(x, t))(xs) for denoiser in guided)
    np.testing.assert_allclose(host, device, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.normal_draws(6, (2,)), "normal_draws: n / 4 must be"),
        (lambda: guidance.normal_draws(0, (2,)), "normal_draws: n must be >= 4"),
        (lambda: guidance.normal_draws(8, (2,), 0.5), "normal_draws: wide must be >= 1, got 0.5"),
        (lambda: accepted_of(variance="full"), "accepted: variance must be"),
        (lambda: accepted_of()(plain)(POINTS[0], 1), "accepted: a draw must"),
    ],
)
def test_draws_and_their_choices_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def accepted_of(**choices):
    draws = guidance.normal_draws(8, (3,))
    return guidance.accepted(EDM, lambda x: x[:, 0] > 0, draws, lambda t: t < 5, **choices)
