"""Residual MLPs for vectors, as denoisers and classifiers; Fourier features are blurred with the noise level."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gendiff.types import Sample, Scalar


@jax.custom_jvp
def sine_cosine(angle: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return sin and cos of angles in (-8192, 8192), with errors up to 1e-7.

    The function exists because XLA's sin and cos take a quarter of a guided sampler's time on a CPU.  Both share a
    reduction to [-pi/4, pi/4], in three parts, exact in float32.  The polynomials are those of Cephes (Moshier 1992,
    sinf and cosf).
    """
    quarter = jnp.round(angle * (2 / jnp.pi))
    rest = ((angle - quarter * 1.5703125) - quarter * 4.837512969970703e-4) - quarter * 7.549789948768648e-8
    z = rest**2
    sine = rest + rest * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1 - z / 2 + z**2 * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = quarter.astype(jnp.int32) & 3
    odd = quadrant % 2 == 1
    sine, cosine = jnp.where(odd, cosine, sine), jnp.where(odd, sine, cosine)
    return jnp.where(quadrant >= 2, -sine, sine), jnp.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)


@sine_cosine.defjvp
def _sine_cosine_change(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    sine, cosine = sine_cosine(*primals)
    return (sine, cosine), (cosine * tangents[0], -sine * tangents[0])


def sinusoidal(t: Scalar, features: int, low: float = 1.0, high: float = 200.0) -> Float[Array, " features"]:
    """Return sin and cos of t at `features / 2` log-spaced angular frequencies in [low, high]."""
    return jnp.concatenate(sine_cosine(jnp.geomspace(low, high, features // 2) * t))


class BlurredFourier(nn.Module):
    """Random Fourier features of a noisy point: sin(w u) exp(-|w|^2 s^2 / 2), and the same with cos.

    u = c_in x is a variance-preserving mixture of signal and noise of level s = sigma / sqrt(sigma^2 + sd^2).  The
    factor is the expectation of the noise's Fourier phase.  So the features obey the heat equation, like the marginals
    of a diffusion: edges are sharp at low noise, and high frequencies give no spurious gradient at high noise.
    """

    count: int
    low: float = 0.5
    high: float = 8.0
    data_std: float = 0.5

    @nn.compact
    def __call__(self, u: Sample, c_noise: Scalar) -> Float[Array, " features"]:
        """Return 2 count features of the point u at c_noise = ln(sigma) / 4."""

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
        sine, cosine = sine_cosine(u @ frequencies)
        return jnp.concatenate([blur * sine, blur * cosine])


class ResidualMLP(nn.Module):
    """A residual MLP (u, c_noise) -> (features,) of blocks h + W2 silu(W1 silu(h) + Wt silu(e)); e embeds c_noise.

    It is EDM's F for vectors: u = c_in x, c_noise = ln(sigma) / 4.
    """

    features: int
    width: int = 128
    depth: int = 3
    fourier: int = 32
    """Number of Fourier frequencies beside the plain input; 0 for none."""
    high: float = 8.0
    """Highest Fourier frequency, in radians per unit of u."""
    data_std: float = 0.5

    @nn.compact
    def __call__(self, u: Sample, c_noise: Scalar) -> Float[Array, " features"]:
        """Return F(u, c_noise), of shape (features,)."""
        # The embedding is narrow, because in training every example has its own and pays for it.
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
    """A classifier (u, c_noise) -> logit = f(u, c_noise) sqrt(1 + (sharpness sd / sigma)^2), with f a `ResidualMLP`.

    Near an edge, the Bayes log-odds are a function of distance / sigma.  The factor lets f stay smooth while the logit
    changes within sigma of the edge.
    """

    width: int = 64
    depth: int = 2
    fourier: int = 64
    high: float = 24.0
    sharpness: float = 0.4
    data_std: float = 0.5

    @nn.compact
    def __call__(self, u: Sample, c_noise: Scalar) -> Scalar:
        """Return the logit of a point u at c_noise = ln(sigma) / 4."""
        net = ResidualMLP(1, self.width, self.depth, self.fourier, self.high, self.data_std, name="trunk")
        sigma = jnp.exp(4 * c_noise)
        return net(u, c_noise)[0] * jnp.sqrt(1 + (self.sharpness * self.data_std / sigma) ** 2)
