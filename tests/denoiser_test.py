import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff import denoiser, process, sampling

EDM, DDPM = process.edm(), process.ddpm(process.linear_betas())
POINT = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2).map(np.float32)
PAIRS = {
    "epsilon": (denoiser.from_epsilon, denoiser.to_epsilon),
    "v": (denoiser.from_v, denoiser.to_v),
    "score": (denoiser.from_score, denoiser.to_score),
}


def predict(x, t):
    """An arbitrary function, because the conversions are algebra and need no trained network."""
    return jnp.sin(3 * x) + 0.1 * t / (1.0 + t)


@pytest.mark.parametrize("name", PAIRS)
@given(x=POINT, log_t=st.floats(-3.0, 2.0), step=st.integers(1, 1000))
def test_conversions_are_inverse(name, x, log_t, step):
    back, forth = PAIRS[name]
    for p, t in ((EDM, np.float32(np.exp(log_t))), (DDPM, step)):
        alpha, sigma = float(p.alpha(t)), float(p.sigma(t))
        # Float32: x and sigma eps nearly cancel, so the error is a few ulps of the larger, over alpha; in the other
        # direction it is divided by sigma, or sigma^2 for the score, once more.
        size = (1 + np.abs(x).max() + sigma) / alpha
        tolerance = 1e-6 * size
        np.testing.assert_allclose(back(p, forth(p, predict))(x, t), predict(x, t), rtol=1e-5, atol=tolerance)
        smallest = sigma**2 if name == "score" else min(sigma, 1.0)
        tolerance *= max(1.0, alpha / smallest)
        np.testing.assert_allclose(forth(p, back(p, predict))(x, t), predict(x, t), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_pass_through(name):
    back = PAIRS[name][0](DDPM, lambda scale, x, t: scale * predict(x, t))
    closed = PAIRS[name][0](DDPM, lambda x, t: 2.5 * predict(x, t))
    x = np.float32([0.3, -1.0])
    np.testing.assert_allclose(back(2.5, x, 300), closed(x, 300), rtol=1e-6)


@pytest.mark.parametrize(("p", "t"), [(EDM, 0.05), (EDM, 0.7), (EDM, 20.0), (DDPM, 3), (DDPM, 300), (DDPM, 900)])
def test_conversions_are_their_definitions(p, t):
    # A denoiser that knows x_0: the conversions must give back the noise, and the velocity and score made of it.
    x0, eps = np.float32([0.4, -1.1]), np.float32([1.3, 0.2])
    alpha, sigma = float(p.alpha(t)), float(p.sigma(t))
    x = np.float32(alpha * x0 + sigma * eps)
    oracle = lambda x, t: jnp.asarray(x0)
    error = 1e-6 / min(sigma, 1.0)
    np.testing.assert_allclose(denoiser.to_epsilon(p, oracle)(x, t), eps, rtol=1e-5, atol=error)
    np.testing.assert_allclose(denoiser.to_v(p, oracle)(x, t), alpha * eps - sigma * x0, rtol=1e-5, atol=error)
    np.testing.assert_allclose(denoiser.to_score(p, oracle)(x, t), -eps / sigma, rtol=1e-5, atol=error / sigma)


FLOW = process.flow()
CURVED = process.continuous(lambda t: jnp.cos(jnp.pi / 2 * t), lambda t: jnp.sin(jnp.pi / 2 * t))


@pytest.mark.parametrize(("p", "t"), [(FLOW, 1.0), (FLOW, 0.3), (FLOW, 0.0), (CURVED, 0.4)])
def test_a_velocity_is_the_change_of_the_path(p, t):
    x0, eps = np.float32([0.4, -1.1]), np.float32([1.3, 0.2])
    path = lambda t: p.alpha(t) * x0 + p.sigma(t) * eps
    x, velocity = jax.jvp(path, (jnp.float32(t),), (jnp.float32(1.0),))
    np.testing.assert_allclose(denoiser.from_velocity(p, lambda x, t: velocity)(x, t), x0, rtol=1e-5, atol=1e-6)
    # SiT's network: its time runs from noise to data, its velocity is that of the other direction.
    seen = []
    sit = lambda x, t: (seen.append(t), -velocity)[1]
    found = denoiser.from_velocity(p, denoiser.from_data_time(sit))(x, jnp.float32(t))
    np.testing.assert_allclose(found, x0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen, [1 - t], rtol=1e-6)


@pytest.mark.parametrize(("p", "t"), [(EDM, 0.1), (EDM, 1.0), (EDM, 10.0), (DDPM, 20), (DDPM, 400), (DDPM, 950)])
def test_mixture_denoiser_is_tweedie_of_its_score(mixture, p, t):
    # E[x_0 | x_t] and grad log p_t are two sums over components; Tweedie's formula joins them, and the second is the
    # gradient of the density.
    points = np.float32([[0.2, 0.1], [-1.0, 0.9], [2.0, -2.0]])
    exact, score, log_density = mixture.denoiser(p), mixture.score(p), mixture.log_density(p)

    @jax.jit
    @jax.vmap
    def compare(x):
        return denoiser.to_score(p, exact)(x, t), score(x, t), jax.grad(log_density)(x, t)

    tweedie, written, gradient = compare(points)
    atol = 3e-6 / float(p.sigma(t)) ** 2
    np.testing.assert_allclose(tweedie, written, rtol=1e-4, atol=atol)
    np.testing.assert_allclose(gradient, written, rtol=1e-4, atol=atol)


def test_edm_ddpm_and_score_parameterisations_agree(mixture):
    # One noise level, three languages: the DDPM's x_t / alpha is EDM's x at sigma / alpha, and a network that predicts
    # eps, v, the score or EDM's F is the same denoiser.
    exact = mixture.denoiser(DDPM)
    networks = {name: back(DDPM, forth(DDPM, exact)) for name, (back, forth) in PAIRS.items()}

    def as_edm(x, sigma):  # EDM's F from the DDPM's denoiser at the time with that noise level
        return denoiser.from_edm(lambda u, c_noise: inverse(u, sigma))(x, sigma)

    def inverse(u, sigma, std=0.5):
        x = u * jnp.sqrt(sigma**2 + std**2)
        skip, out = std**2 / (sigma**2 + std**2), sigma * std / jnp.sqrt(sigma**2 + std**2)
        return (mixture.denoiser(EDM)(x, sigma) - skip * x) / out

    x = np.float32([0.3, -0.6])
    for t in (50, 300, 700):
        expected = exact(x, t)
        for network in networks.values():
            np.testing.assert_allclose(network(x, t), expected, rtol=1e-4, atol=1e-4)
        alpha, sigma = DDPM.alpha(t), DDPM.sigma(t)
        np.testing.assert_allclose(as_edm(x / alpha, sigma / alpha), expected, rtol=1e-4, atol=1e-4)


def test_edm_and_ddpm_follow_one_path(mixture):
    # Heun's steps are taken in x / alpha at noise level sigma / alpha, where both processes are the same ODE.
    times = np.array([900, 700, 500, 300, 100, 0])
    levels = np.asarray(DDPM.sigma(times) / DDPM.alpha(times))
    start = np.float32([1.5, -0.4])
    key = jax.random.key(0)

    @jax.jit
    def both(start):
        discrete = sampling.heun(DDPM, mixture.denoiser(DDPM))
        continuous = sampling.heun(EDM, mixture.denoiser(EDM))
        return (
            sampling.refine(discrete, jnp.asarray(times), key, start),
            sampling.refine(continuous, jnp.asarray(levels), key, start / DDPM.alpha(900)),
        )

    np.testing.assert_allclose(*both(start), rtol=1e-4, atol=1e-5)


def test_a_network_is_told_the_noise():
    told = denoiser.told_noise(DDPM, lambda params, x, c_noise: params * c_noise)
    expected = 0.25 * np.log(float(DDPM.sigma(300)) / float(DDPM.alpha(300)))
    np.testing.assert_allclose(told(2.0, np.zeros(3), 300), 2 * expected, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_edm_network_of_zero_is_exact_for_a_gaussian(sigma):
    # c_skip alone is the regression of N(0, data_std^2) data on x: F has nothing left to predict.
    x = np.float32([1.0, -2.0, 0.3])
    model = denoiser.from_edm(lambda u, c_noise: jnp.zeros_like(u), data_std=0.7)
    np.testing.assert_allclose(model(x, sigma), 0.7**2 / (sigma**2 + 0.7**2) * x, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_edm_preconditioning_gives_unit_variances(sigma):
    # What Karras et al. (2022, appendix B.6) ask of it: inputs and targets of F of variance 1.
    std, seen = 0.7, {}

    def network(u, c_noise):
        seen.update(u=u, c_noise=c_noise)
        return jnp.ones_like(u)

    x = np.float32([1.0])
    skip_and_out = float(denoiser.from_edm(network, std)(x, np.float32(sigma))[0])
    skip = float(denoiser.from_edm(lambda u, c_noise: 0 * u, std)(x, np.float32(sigma))[0])
    out = skip_and_out - skip
    np.testing.assert_allclose(float(seen["u"][0]) ** 2 * (sigma**2 + std**2), 1.0, rtol=1e-5)
    np.testing.assert_allclose(seen["c_noise"], np.log(sigma) / 4, rtol=1e-5)
    # The target is (x_0 - c_skip (x_0 + sigma eps)) / c_out.
    np.testing.assert_allclose(((1 - skip) ** 2 * std**2 + skip**2 * sigma**2) / out**2, 1.0, rtol=2e-4)


WRONG = {
    "(1,) for (2,)": (jnp.zeros(2), lambda *args: jnp.zeros(1)),
    "(3, 1) for (3,)": (jnp.zeros(3), lambda *args: jnp.zeros((3, 1))),
    "() for (2,)": (jnp.zeros(2), lambda *args: jnp.zeros(())),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", [*PAIRS, "edm"])
def test_another_shape_is_no_prediction_and_no_x0(name, case):
    x, model = WRONG[case]
    conversions = [denoiser.from_edm(model)]
    if name != "edm":
        back, forth = PAIRS[name]
        conversions = [back(EDM, model), forth(EDM, model)]
    for convert in conversions:
        with pytest.raises(ValueError, match=rf"must have shape \({len(x)},\), got \("):
            jax.jit(convert)(x, 1.0)


@pytest.mark.parametrize("type_of_x", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("type_of_model", [jnp.bfloat16, jnp.float32])
def test_x0_has_the_type_of_x(type_of_x, type_of_model):
    x = jnp.asarray([0.5, -1.5], type_of_x)
    x0 = denoiser.denoise("test", lambda x, t: x.astype(type_of_model), x, 1.0)
    assert x0.dtype == type_of_x
    np.testing.assert_array_equal(x0, x)


def test_integers_become_no_integers():
    assert denoiser.denoise("test", lambda x, t: 0.5 * x, jnp.arange(3), 1.0).dtype == jnp.float32


def test_the_data_have_a_spread():
    with pytest.raises(ValueError, match="from_edm: data_std must be > 0, got 0"):
        denoiser.from_edm(predict, 0)
