"""Diffuser's temporal U-Net, a network for denoisers of trajectories (Janner et al. 2022, "Planning with diffusion for
flexible behavior synthesis").

A function of one trajectory (horizon, transition_dim) and one time; the structure, the initial values and the order of
the channels are those of the public checkpoints, which `gendiff.convert` reads.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import ones, zeros
from jaxtyping import Array, Float

from gendiff.nets.conv import Conv, ConvTranspose, Linear
from gendiff.nets.fusion import apart
from gendiff.types import Time

Trajectory = Float[Array, "horizon transition_dim"]
Features = Float[Array, "length channels"]
Embedding = Float[Array, " e"]
GROUPS = 8
Elementwise = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def with_slope(function: Elementwise, slope: Elementwise) -> Elementwise:
    """The function with a given derivative, which is all that its differentiation keeps."""
    differentiable = jax.custom_jvp(function)
    differentiable.defjvps(lambda change, value, x: slope(x) * change)
    return differentiable


def _gate(x: Array) -> tuple[Array, Array, Array]:
    """tanh(softplus(x)) and its first two derivatives, with one exponential, and no differences of equal numbers."""
    u = jnp.exp(jnp.minimum(x, 20))
    rest, rise = 2 / (u * (u + 2) + 2), u * (u + 1)
    return u * (u + 2) * rest / 2, rest**2 * rise, rest**2 * (rise + u**2 - 2 * rest * rise**2)


def _mish(x: Array) -> Array:
    return x * _gate(x)[0]


def _mish_slope(x: Array) -> Array:
    value, slope, _ = _gate(x)
    return value + x * slope


def _mish_curvature(x: Array) -> Array:
    _, slope, curvature = _gate(x)
    return 2 * slope + x * curvature


mish = with_slope(_mish, with_slope(_mish_slope, _mish_curvature))
"""x tanh(softplus(x)) (Misra 2019)."""


def embedding(t: Time, features: int) -> Embedding:
    """sin, then cos, of t exp(-ln(10000) k / (n - 1)) for k < n = features / 2, with t in steps 0 .. T - 1."""
    n = features // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(n) / (n - 1)).astype(np.float32)
    angles = jnp.asarray(t, jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class TimeMLP(nn.Module):
    """t -> (width,): the embedding of t through Linear(4 width), the activation and Linear(width)."""

    width: int = 32
    activation: Callable[[Array], Array] = mish

    @nn.compact
    def __call__(self, t: Time) -> Embedding:
        """The embedding at time t, a scalar in the network's own steps from 0."""
        e = Linear(4 * self.width, name="layers_1")(embedding(t, self.width))
        return Linear(self.width, name="layers_3")(self.activation(e))


class GroupNorm(nn.Module):
    """Group normalisation of one sequence, over its length and the channels of each of 8 groups, in float32."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """The normalised sequence; raises ValueError where the channels do not divide into groups."""
        channels = x.shape[-1]
        if channels % GROUPS:
            raise ValueError(f"TemporalUnet: channels: expected a multiple of {GROUPS}, given {channels}")
        scale = self.param("scale", ones, (channels,)).astype(jnp.float32)
        bias = self.param("bias", zeros, (channels,)).astype(jnp.float32)
        values = x.astype(jnp.float32)
        grouped = values.reshape(-1, GROUPS, channels // GROUPS)
        each = lambda statistic: jnp.repeat(statistic, channels // GROUPS)
        # One multiplication and one addition for each value.
        factor = each(jax.lax.rsqrt(jnp.var(grouped, (0, 2)) + 1e-5)) * scale
        offset = bias - each(jnp.mean(grouped, (0, 2))) * factor
        factor, offset = apart(factor), apart(offset)
        return (values * factor[None] + offset[None]).astype(x.dtype)


class ConvBlock(nn.Module):
    """mish(norm(Conv(x))), with a window of 5."""

    features: int

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """The block's output."""
        return mish(GroupNorm(name="norm")(Conv(self.features, (5,), name="conv")(x)))


class ResidualBlock(nn.Module):
    """x + block(block(x) + Linear(mish(e))), with x through a Linear where the channels change."""

    features: int

    @nn.compact
    def __call__(self, x: Features, e: Embedding) -> Features:
        """The block's output."""
        shift = Linear(self.features, name="time")(mish(e))
        h = ConvBlock(self.features, name="blocks_0")(x) + shift[None]
        h = ConvBlock(self.features, name="blocks_1")(h)
        return h + (x if x.shape[-1] == self.features else Linear(self.features, name="residual_conv")(x))


class TemporalUnet(nn.Module):
    """(x, t) -> (horizon, transition_dim): Diffuser's U-Net without attention, for one trajectory.

    Any horizon will do that is a multiple of 2 to the number of levels less one.
    """

    width: int = 32
    multipliers: tuple[int, ...] = (1, 4, 8)
    """Channels of each level in units of `width`; the length is halved from level to level."""

    @nn.compact
    def __call__(self, x: Trajectory, t: Time) -> Trajectory:
        """The prediction at time t, a scalar in the network's own steps (0 .. T - 1 for public checkpoints).

        Raises:
          ValueError: the length cannot be halved often enough, or the channels do not divide into 8 groups.
        """
        factor = 2 ** (len(self.multipliers) - 1)
        if x.ndim != 2 or x.shape[0] % factor or not x.size:
            raise ValueError(
                f"TemporalUnet: x: expected (horizon, transition_dim), horizon a multiple of {factor}, given {x.shape}"
            )
        e = TimeMLP(self.width, name="time_mlp")(t).astype(x.dtype)
        two = lambda h, name, features: ResidualBlock(features, name=f"{name}1")(
            ResidualBlock(features, name=f"{name}0")(h, e), e
        )
        h, maps, widths = x, [], [multiplier * self.width for multiplier in self.multipliers]
        for i, features in enumerate(widths):
            h = two(h, f"downs_{i}_", features)
            maps.append(h)
            if i < len(widths) - 1:
                h = Conv(features, (3,), stride=2, name=f"downs_{i}_3")(h)
        h = ResidualBlock(widths[-1], name="mid_block1")(h, e)
        h = ResidualBlock(widths[-1], name="mid_block2")(h, e)
        for i, features in enumerate(reversed(widths[:-1])):  # the map of the first level is never read
            h = two(jnp.concatenate([h, maps.pop()], -1), f"ups_{i}_", features)
            h = ConvTranspose(features, name=f"ups_{i}_3")(h)
        h = ConvBlock(self.width, name="final_conv_0")(h)
        return Linear(x.shape[-1], name="final_conv_1")(h)
