import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import denoiser
from gendiff.nets import mlp

STD = 0.7


def noise(sigma):
    return jnp.log(jnp.float32(sigma)) / 4


ANGLES = np.concatenate([np.linspace(-8191, 8191, 20_001), np.linspace(-4, 4, 20_001), np.arange(-40, 41) * np.pi / 4])


def test_sine_and_cosine_are_exact():
    angles = ANGLES.astype(np.float32)
    sine, cosine = jax.jit(mlp.sine_cosine)(angles)
    np.testing.assert_allclose(sine, np.sin(angles.astype(np.float64)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(cosine, np.cos(angles.astype(np.float64)), rtol=0, atol=1e-7)


def test_sine_and_cosine_have_their_derivatives():
    angles = ANGLES[::97].astype(np.float32)
    first = lambda function: jax.jit(jax.vmap(jax.grad(function)))
    second = lambda function: jax.jit(jax.vmap(jax.grad(jax.grad(function))))
    sine, cosine = (lambda x: mlp.sine_cosine(x)[0]), (lambda x: mlp.sine_cosine(x)[1])
    exact = np.sin(angles.astype(np.float64)), np.cos(angles.astype(np.float64))
    np.testing.assert_allclose(first(sine)(angles), exact[1], rtol=0, atol=1e-7)
    np.testing.assert_allclose(first(cosine)(angles), -exact[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(second(sine)(angles), -exact[0], rtol=0, atol=1e-7)


def test_sinusoidal_embedding():
    values = np.asarray(mlp.sinusoidal(jnp.float32(0.3), 8, low=1.0, high=27.0))
    angles = 0.3 * np.array([1.0, 3.0, 9.0, 27.0])
    np.testing.assert_allclose(values, np.concatenate([np.sin(angles), np.cos(angles)]), rtol=1e-4, atol=1e-5)


def test_blurred_features_are_means_over_the_noise():
    # E sin(w (u + s n)) = sin(w u) exp(-|w|^2 s^2 / 2) with s = sigma / sqrt(sigma^2 + STD^2), the noise in c_in x:
    # by Gauss-Hermite quadrature over w n ~ N(0, |w|^2).
    module = mlp.BlurredFourier(6, low=0.5, high=8.0, data_std=STD)
    u = jnp.array([0.4, -1.1])
    params = module.init(jax.random.key(0), u, noise(1.0))
    frequencies = np.asarray(params["params"]["frequencies"], np.float64)
    length = np.linalg.norm(frequencies, axis=0)
    assert (length >= 0.5 - 1e-5).all()
    assert (length <= 8.0 + 1e-5).all()
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights, features = weights / weights.sum(), jax.jit(module.apply)
    for sigma in (0.002, 0.1, 0.7, 5.0):
        s = sigma / np.sqrt(sigma**2 + STD**2)
        phase = np.asarray(u) @ frequencies + s * length * nodes[:, None]
        expected = np.concatenate([weights @ np.sin(phase), weights @ np.cos(phase)])
        np.testing.assert_allclose(features(params, u, noise(sigma)), expected, rtol=1e-4, atol=1e-5)


def test_blurred_features_obey_the_heat_equation():
    # As functions of the noisy point they are smoothed by noise as the marginals are: a feature at the noise s^2 is the
    # same feature at r^2 < s^2, blurred by noise of variance s^2 - r^2.
    module = mlp.BlurredFourier(6, data_std=STD)
    u = jnp.array([0.2, 0.5])
    params = module.init(jax.random.key(1), u, noise(0.3))
    level = lambda sigma: sigma**2 / (sigma**2 + STD**2)
    length = np.linalg.norm(np.asarray(params["params"]["frequencies"]), axis=0)
    features = jax.jit(module.apply)
    fine, coarse = (np.asarray(features(params, u, noise(sigma))) for sigma in (0.3, 0.9))
    blur = np.exp(-0.5 * length**2 * (level(0.9) - level(0.3)))
    np.testing.assert_allclose(coarse, np.tile(blur, 2) * fine, rtol=1e-3, atol=1e-6)


def test_frequencies_are_not_trained():
    module = mlp.BlurredFourier(6)
    u = jnp.array([0.4, -1.1])
    params = module.init(jax.random.key(0), u, noise(0.1))
    gradient = jax.grad(lambda params: jnp.sum(module.apply(params, u, noise(0.1)) ** 3))(params)
    np.testing.assert_array_equal(gradient["params"]["frequencies"], np.zeros((2, 6)))


@pytest.mark.parametrize("fourier", [0, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_residual_mlp_shapes(fourier, size):
    module = mlp.ResidualMLP(size, width=8, depth=2, fourier=fourier)
    given, params = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros(size), jnp.zeros(()))
    assert given.shape == (size,)
    assert given.dtype == jnp.float32
    assert ("fourier" in params["params"]) == bool(fourier)


def test_residual_mlp_under_vmap():
    module = mlp.ResidualMLP(2, width=8, depth=1, fourier=4, data_std=STD)
    params = module.init(jax.random.key(0), jnp.zeros(2), jnp.zeros(()))
    points, levels = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32), np.float32([-1.5, -0.3, 0.2, 1])
    together = jax.jit(jax.vmap(module.apply, (None, 0, 0)))(params, points, levels)
    one = jax.jit(module.apply)
    alone = np.stack([one(params, x, c) for x, c in zip(points, levels, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    assert np.ptp(alone, axis=0).max() > 0, "it says something"


def test_residual_mlp_is_a_denoiser_at_all_levels():
    module = mlp.ResidualMLP(2, width=8, depth=1, fourier=4, data_std=STD)
    params = module.init(jax.random.key(0), jnp.zeros(2), jnp.zeros(()))
    model = jax.jit(denoiser.from_edm(module.apply, STD))
    for sigma in (0.002, 1.0, 80.0):
        x = jnp.array([0.5, -0.2]) * jnp.sqrt(sigma**2 + STD**2)
        given = model(params, x, jnp.float32(sigma))
        assert given.shape == (2,)
        # Of the size of the data, whatever the noise.
        assert float(jnp.abs(given).max()) < 3 * STD


def test_classifier_sharpens_as_the_noise_falls():
    module = mlp.MLPClassifier(width=8, depth=1, fourier=4, sharpness=0.2, data_std=STD)
    u, trunk = jnp.array([0.3, -0.4]), mlp.ResidualMLP(1, 8, 1, 4, module.high, STD)
    params = module.init(jax.random.key(0), u, noise(1.0))
    sharp, smooth = jax.jit(module.apply), jax.jit(trunk.apply)
    for sigma in (0.002, 0.1, 10.0):
        logit = sharp(params, u, noise(sigma))
        assert logit.shape == ()
        expected = smooth({"params": params["params"]["trunk"]}, u, noise(sigma))[0]
        np.testing.assert_allclose(logit, expected * np.sqrt(1 + (0.2 * STD / sigma) ** 2), rtol=1e-4)
