"""Residual MLPs for vectors: a denoiser's network and a classifier, with Fourier features that blur as the noise grows."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gendiff.types import Sample, Scalar


def sinusoidal(t: Scalar, features: int, low: float = 1.0, high: float = 200.0) -> Float[Array, " features"]:
    """sin and cos of t at `features / 2` log-spaced angular frequencies in [low, high]."""
    angles = jnp.geomspace(low, high, features // 2) * t
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class BlurredFourier(nn.Module):
    """Random Fourier features of a noisy point, sin(w u) exp(-|w|^2 s^2 / 2) and the same with cos.

    u = c_in x is a variance-preserving mixture of signal and noise of level s = sigma / sqrt(sigma^2 + sd^2).  The factor
    is the mean of the noise's own Fourier phase, so every feature obeys the heat equation that the marginals of a
    diffusion obey: sharp edges at low noise, and no spurious gradient from high frequencies at high noise.
    """

    count: int
    low: float = 0.5
    high: float = 8.0
    data_std: float = 0.5

    @nn.compact
    def __call__(self, u: Sample, c_noise: Scalar) -> Float[Array, " features"]:
        def initial(key: jax.Array) -> Array:
            direction_key, size_key = jax.random.split(key)
            direction = jax.random.normal(direction_key, (u.shape[-1], self.count))
            direction = direction / jnp.linalg.norm(direction, axis=0, keepdims=True)
            span = jnp.log(self.high / self.low)
            return direction * self.low * jnp.exp(span * jax.random.uniform(size_key, (1, self.count)))

        frequencies = jax.lax.stop_gradient(self.param("frequencies", initial))
        sigma = jnp.exp(4 * c_noise)
        level = sigma**2 / (sigma**2 + self.data_std**2)
        blur = jnp.exp(-0.5 * level * jnp.sum(frequencies**2, 0))
        phase = u @ frequencies
        return jnp.concatenate([blur * jnp.sin(phase), blur * jnp.cos(phase)])


class ResidualMLP(nn.Module):
    """(u, c_noise) -> (features,): residual blocks h + W2 silu(W1 silu(h) + Wt silu(e)) with e an embedding of c_noise.

    This is EDM's F for data that are vectors: u = c_in x, c_noise = ln(sigma) / 4.
    """

    features: int
    width: int = 128
    depth: int = 3
    fourier: int = 32
    """Number of Fourier frequencies beside the plain input; 0 for none."""
    high: float = 8.0
    """The highest of them, in radians a standard deviation of the data."""
    data_std: float = 0.5

    @nn.compact
    def __call__(self, u: Sample, c_noise: Scalar) -> Float[Array, " features"]:
        # In training the noise level differs between examples, so a wide embedding would cost as much as the blocks.
        embedding = nn.silu(nn.Dense(self.width // 2, name="time")(sinusoidal(c_noise, 32)))
        inputs = u
        if self.fourier:
            waves = BlurredFourier(self.fourier, high=self.high, data_std=self.data_std, name="fourier")(u, c_noise)
            inputs = jnp.concatenate([u, waves])
        h = nn.Dense(self.width, name="input")(inputs)
        for i in range(self.depth):
            inner = nn.Dense(self.width, name=f"block{i}_in")(nn.silu(h))
            inner += nn.Dense(self.width, use_bias=False, name=f"block{i}_time")(embedding)
            h += nn.Dense(self.width, name=f"block{i}_out")(nn.silu(inner))
        small = nn.initializers.variance_scaling(1e-2, "fan_in", "truncated_normal")
        return nn.Dense(self.features, kernel_init=small, name="output")(h)


class MLPClassifier(nn.Module):
    """(u, c_noise) -> scalar logit, f(u, c_noise) sqrt(1 + (sharpness sd / sigma)^2) with f a `ResidualMLP`.

    Near an edge the Bayes log-odds are a function of distance over sigma: with that factor f may stay smooth while the
    logit turns within sigma of the edge.
    """

    width: int = 128
    depth: int = 2
    fourier: int = 64
    high: float = 24.0
    sharpness: float = 0.2
    data_std: float = 0.5

    @nn.compact
    def __call__(self, u: Sample, c_noise: Scalar) -> Scalar:
        net = ResidualMLP(1, self.width, self.depth, self.fourier, self.high, self.data_std, name="trunk")
        sigma = jnp.exp(4 * c_noise)
        return net(u, c_noise)[0] * jnp.sqrt(1 + (self.sharpness * self.data_std / sigma) ** 2)
