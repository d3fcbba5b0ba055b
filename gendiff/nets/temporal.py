"""Diffuser's temporal U-Net, a network for denoisers of trajectories.

From Janner et al. 2022, "Planning with diffusion for flexible behavior synthesis".  It is a function of a trajectory
(horizon, transition_dim) and a time.  Structure, initial values and the order of channels are those of the public
checkpoints, which `gendiff.convert` reads.
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
    """Return the function with `slope` as its derivative, so that differentiation stores only x."""
    differentiable = jax.custom_jvp(function)
    differentiable.defjvps(lambda change, value, x: slope(x) * change)
    return differentiable


def _gate(x: Array) -> tuple[Array, Array, Array]:
    """Return tanh(softplus(x)) and its first two derivatives, with one exponential and without cancellation."""
    u = jnp.exp(jnp.minimum(x, 20))
    rest, rise = 2 / (u * (u + 2) + 2), u * (u + 1)
    return u * (u + 2) * rest / 2, rest**2 * rise, rest**2 * (rise + u**2 - 2 * rest * rise**2)


_of_gate = lambda formula: lambda x: formula(x, *_gate(x))
mish = with_slope(
    _of_gate(lambda x, gate, slope, curvature: x * gate),
    with_slope(
        _of_gate(lambda x, gate, slope, curvature: gate + x * slope),
        _of_gate(lambda x, gate, slope, curvature: 2 * slope + x * curvature),
    ),
)
"""x tanh(softplus(x)) (Misra 2019)."""


def embedding(t: Time, features: int) -> Embedding:
    """Return sin, then cos, of t exp(-ln(10000) k / (n - 1)) for k < n = features / 2, with t in steps 0 .. T - 1."""
    n = features // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(n) / (n - 1)).astype(np.float32)
    angles = jnp.asarray(t, jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class TimeMLP(nn.Module):
    """An MLP t -> (width,): the embedding of t, Linear(4 width), the activation, Linear(width)."""

    width: int = 32
    activation: Callable[[Array], Array] = mish

    @nn.compact
    def __call__(self, t: Time) -> Embedding:
        """Return the embedding at time t, a scalar in the network's own steps from 0."""
        e = Linear(4 * self.width, name="layers_1")(embedding(t, self.width))
        return Linear(self.width, name="layers_3")(self.activation(e))


class GroupNorm(nn.Module):
    """Group normalisation of a sequence, in float32, over its length and the channels of a group; 8 groups."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Normalise a sequence.

        Raises:
          ValueError: the number of channels is not a multiple of 8.
        """
        channels = x.shape[-1]
        if channels % GROUPS:
            raise ValueError(f"TemporalUnet: channels must be a multiple of {GROUPS}, got {channels}")
        scale = self.param("scale", ones, (channels,)).astype(jnp.float32)
        bias = self.param("bias", zeros, (channels,)).astype(jnp.float32)
        values = x.astype(jnp.float32)
        grouped = values.reshape(-1, GROUPS, channels // GROUPS)
        by_channel = lambda statistic: jnp.repeat(statistic, channels // GROUPS)
        # Combine all factors per channel, so that a value takes one multiplication and one addition.
        factor = by_channel(jax.lax.rsqrt(jnp.var(grouped, (0, 2)) + 1e-5)) * scale
        offset = bias - by_channel(jnp.mean(grouped, (0, 2))) * factor
        factor, offset = apart(factor), apart(offset)
        return (values * factor[None] + offset[None]).astype(x.dtype)


class ConvBlock(nn.Module):
    """A convolution block, mish(norm(Conv(x))), with a window of 5."""

    features: int

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Apply the block."""
        return mish(GroupNorm(name="norm")(Conv(self.features, (5,), name="conv")(x)))


class ResidualBlock(nn.Module):
    """A residual block, x + block(block(x) + Linear(mish(e))); if the channels change, x passes a Linear."""

    features: int

    @nn.compact
    def __call__(self, x: Features, e: Embedding) -> Features:
        """Apply the block."""
        shift = Linear(self.features, name="time")(mish(e))
        h = ConvBlock(self.features, name="blocks_0")(x) + shift[None]
        h = ConvBlock(self.features, name="blocks_1")(h)
        return h + (x if x.shape[-1] == self.features else Linear(self.features, name="residual_conv")(x))


class TemporalUnet(nn.Module):
    """Diffuser's U-Net without attention, (x, t) -> (horizon, transition_dim), for a single trajectory.

    The horizon must be a multiple of 2^(levels - 1).
    """

    width: int = 32
    multipliers: tuple[int, ...] = (1, 4, 8)
    """Channels of the levels in units of `width`; the length halves from level to level."""

    @nn.compact
    def __call__(self, x: Trajectory, t: Time) -> Trajectory:
        """Predict at time t, a scalar in the network's own steps (0 .. T - 1 for public checkpoints).

        Raises:
          ValueError: the horizon is not a multiple of 2^(levels - 1), or a number of channels is not a multiple of 8.
        """
        factor = 2 ** (len(self.multipliers) - 1)
        if x.ndim != 2 or x.shape[0] % factor or not x.size:
            raise ValueError(
                f"TemporalUnet: x must be (horizon, transition_dim), horizon a multiple of {factor}, got {x.shape}"
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
        for i, features in enumerate(reversed(widths[:-1])):  # the network does not use the first level's map
            h = two(jnp.concatenate([h, maps.pop()], -1), f"ups_{i}_", features)
            h = ConvTranspose(features, name=f"ups_{i}_3")(h)
        h = ConvBlock(self.width, name="final_conv_0")(h)
        return Linear(x.shape[-1], name="final_conv_1")(h)
