"""ADM's U-Net, a network for denoisers of images, and its encoder, a classifier of noisy images.

From Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 3 and appendix H.  Both are
functions of an image (h, w, c) and a time.  Structure, initial values and the order of channels are those of the public
checkpoints, which `gendiff.convert` reads.  Image and parameters set the type of the arithmetic, except for norms,
softmax and embedding, which use float32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal, ones, zeros
from jaxtyping import Array, Float, Int

from gendiff.nets.conv import Conv, Linear
from gendiff.nets.fusion import apart
from gendiff.types import Scalar, Time

Image = Float[Array, "h w c"]
Embedding = Float[Array, " e"]


def embedding(t: Time, features: int) -> Embedding:
    """Return cos, then sin, of t exp(-ln(10000) i / n) for i < n = features / 2, with t in steps 0 .. T - 1."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(features // 2, dtype=jnp.float32) / (features // 2))
    angles = jnp.asarray(t, jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class GroupNorm(nn.Module):
    """Group normalisation of an image, in float32, with optional modulation (FiLM): y (1 + scale) + shift.

    The number of groups is the largest divisor of the channels up to 32 that leaves `least` channels in a group.
    Public checkpoints of width 128 or more have at least 4 channels in a group.
    """

    least: int = 4
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Image, film: tuple[Array, Array] | None = None) -> Image:
        """Normalise an image, and modulate it by `film` = scale and shift (c,)."""
        channels = x.shape[-1]
        count = groups(channels, self.least)
        scale = self.param("scale", ones, (channels,)).astype(jnp.float32)
        bias = self.param("bias", zeros, (channels,)).astype(jnp.float32)
        values = x.astype(jnp.float32)
        # Sum over pixels, then map channels to groups by a matrix of zeros and ones.  An index would be twice as slow,
        # because XLA on a CPU would look up the group again for every pixel.
        member = (jnp.arange(channels)[:, None] // (channels // count) == jnp.arange(count)[None]).astype(jnp.float32)
        times = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
        pixels = x.size // count
        mean = times(jnp.sum(values, (0, 1)), member) / pixels
        square = times(jnp.sum(values**2, (0, 1)), member) / pixels
        size = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + self.eps)
        # Combine all factors per channel, so that a pixel takes one multiplication and one addition.
        factor = times(size, member.T) * scale
        offset = bias - times(mean, member.T) * factor
        if film is not None:
            factor, offset = factor * (1 + film[0]), offset * (1 + film[0]) + film[1]
        factor, offset = apart(factor), apart(offset)
        return (values * factor[None, None] + offset[None, None]).astype(x.dtype)


def groups(channels: int, least: int) -> int:
    """Return the largest divisor of `channels` up to 32 that leaves `least` channels in a group; 1 if none does."""
    most = max(1, min(32, channels // least))
    return next(count for count in range(most, 0, -1) if channels % count == 0)


def halved(x: Image) -> Image:
    """Halve the extents by means over 2 x 2 pixels."""
    h, w, c = x.shape
    return jnp.mean(x.reshape(h // 2, 2, w // 2, 2, c), (1, 3))


def doubled(x: Image) -> Image:
    """Double the extents by repeating pixels 2 x 2 times."""
    h, w, c = x.shape
    return jnp.broadcast_to(x[:, None, :, None], (h, 2, w, 2, c)).reshape(2 * h, 2 * w, c)


class Residual(nn.Module):
    """A residual block, x + Conv(silu(norm(h))) with h = Conv(silu(norm(x))).

    The embedding modulates the second norm (FiLM), or is added to h.
    """

    features: int
    resample: str = ""
    """ "down" or "up": halve or double the extents of x, and of h before its first convolution."""
    film: bool = True
    dropout: float = 0.0
    least: int = 4

    @nn.compact
    def __call__(self, x: Image, e: Embedding, train: bool = False) -> Image:
        """Apply the block; `train` turns dropout on."""
        resample = {"": lambda x: x, "down": halved, "up": doubled}[self.resample]
        h = nn.silu(GroupNorm(self.least, name="norm_in")(x))
        h = Conv(self.features, name="conv_in")(resample(h))
        e = Linear(self.features * (2 if self.film else 1), name="embedding")(nn.silu(e))
        if self.film:
            scale, shift = jnp.split(e, 2)
            h = GroupNorm(self.least, name="norm_out")(h, (scale, shift))
        else:
            h = GroupNorm(self.least, name="norm_out")(h + e[None, None])
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = Conv(self.features, initial=zeros, name="conv_out")(h)
        x = resample(x)
        return h + (x if x.shape[-1] == self.features else Linear(self.features, name="skip")(x))


class Attention(nn.Module):
    """Self-attention between pixels, x + attention(norm(x)); channels are ordered by head, then by q, k, v."""

    heads: int
    least: int = 4

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Apply the block."""
        h, w, c = x.shape
        qkv = Linear(3 * c, name="qkv")(GroupNorm(self.least, name="norm")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(h * w, self.heads, 3, -1), 2, 0)
        y = attend(q, k, v).reshape(h, w, c)
        return x + Linear(c, initial=zeros, name="output")(y)


def attend(
    q: Float[Array, "t heads d"], k: Float[Array, "s heads d"], v: Float[Array, "s heads d"]
) -> Float[Array, "t heads d"]:
    """Return softmax(q k^T / sqrt(d)) v; q and k share the factor, so that low precisions do not overflow."""
    scale = q.shape[-1] ** -0.25
    logits = jnp.einsum("thd,shd->hts", q * scale, k * scale)
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(v.dtype)
    return jnp.einsum("hts,shd->thd", weights, v)


class AttentionPool(nn.Module):
    """Attention pooling of an image: the query is the mean pixel; keys and values are the mean and all pixels.

    Positions are learned.  Channels are ordered by q, k, v, then by head, unlike in `Attention`.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, " features"]:
        """Pool an image."""
        channels = x.shape[-1]
        pixels = x.reshape(-1, channels)
        tokens = jnp.concatenate([jnp.mean(pixels, 0, keepdims=True), pixels])
        initial = normal(channels**-0.5)
        tokens = tokens + self.param("positions", initial, tokens.shape).astype(x.dtype)
        qkv = Linear(3 * channels, name="qkv")(tokens).reshape(len(tokens), 3, self.heads, -1)
        y = attend(qkv[:1, 0], qkv[:, 1], qkv[:, 2])
        return Linear(self.features, name="output")(y.reshape(channels))


class Trunk(nn.Module):
    """Common part of the U-Net and the half U-Net: sizes, the embedding, and the encoder."""

    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels of the levels in units of `width`; the extents halve from level to level."""
    blocks: int = 2
    """Residual blocks per level."""
    attention: tuple[int, ...] = (8,)
    """Heights of feature maps with attention, besides the innermost map."""
    head_channels: int | None = 64
    """Channels of an attention head; None: use `heads` heads."""
    heads: int = 4
    """Number of attention heads, if `head_channels` is None."""
    resample_blocks: bool = False
    """True: residual blocks change the extents.  False: plain convolutions do."""
    film: bool = True
    dropout: float = 0.0
    classes: int | None = None
    """Number of classes of a class-conditional network."""
    least: int = 4
    """Least number of channels in a group of the norms; 1 for public checkpoints of a width below 128."""

    def embed(self, x: Image, t: Time, label: Int[Array, ""] | None) -> Embedding:
        """Embed the time and the class, if the network has classes.

        Raises:
          ValueError: a label is missing, or is passed to a network without classes.
        """
        if (label is None) != (self.classes is None):
            wanted = "None without classes" if self.classes is None else f"one of {self.classes} classes"
            raise ValueError(f"{type(self).__name__}: label must be {wanted}, got {label}")
        e = embedding(t, self.width).astype(x.dtype)
        e = Linear(4 * self.width, name="time_2")(nn.silu(Linear(4 * self.width, name="time_0")(e)))
        if self.classes is not None:
            table = self.param("label", normal(1.0), (self.classes, 4 * self.width))
            e = e + jnp.take(table, jnp.asarray(label), axis=0).astype(x.dtype)  # a label out of range gives NaN
        return e

    def residual(self, channels: int, name: str, resample: str = "") -> Residual:
        """Return a residual block."""
        return Residual(channels, resample, self.film, self.dropout, self.least, name=name)

    def attend(self, channels: int, name: str) -> Attention:
        """Return an attention block."""
        return Attention(self.heads_of(channels), self.least, name=name)

    def heads_of(self, channels: int) -> int:
        """Return the number of attention heads, at least 1.

        Raises:
          ValueError: the number of channels is not a multiple of it.
        """
        heads = self.heads if self.head_channels is None else max(1, channels // self.head_channels)
        if channels % heads:
            raise ValueError(f"{type(self).__name__}: channels must be a multiple of the {heads} heads, got {channels}")
        return heads

    def descend(self, x: Image, e: Embedding, train: bool) -> list[Image]:
        """Return the encoder's feature maps; the last one has passed the innermost blocks.

        Raises:
          ValueError: the extents are not multiples of 2^(levels - 1).
        """
        factor = 2 ** (len(self.multipliers) - 1)
        if x.ndim != 3 or x.shape[0] % factor or x.shape[1] % factor:
            raise ValueError(
                f"{type(self).__name__}: x must be (h, w, c), h and w multiples of {factor}, got {x.shape}"
            )
        maps = [Conv(self.multipliers[0] * self.width, name="input_0_0")(x)]
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(self.blocks):
                name = f"input_{len(maps)}"
                h = self.residual(multiplier * self.width, f"{name}_0")(maps[-1], e, train)
                maps.append(self.attend(h.shape[-1], f"{name}_1")(h) if h.shape[0] in self.attention else h)
            if level < len(self.multipliers) - 1:
                maps.append(self.resample(maps[-1], e, train, f"input_{len(maps)}_0", "down"))
        h = self.residual(maps[-1].shape[-1], "middle_0")(maps[-1], e, train)
        h = self.attend(h.shape[-1], "middle_1")(h)
        return [*maps, self.residual(h.shape[-1], "middle_2")(h, e, train)]

    def resample(self, h: Image, e: Embedding, train: bool, name: str, way: str) -> Image:
        """Halve ("down") or double ("up") the extents."""
        if self.resample_blocks:
            return self.residual(h.shape[-1], name, way)(h, e, train)
        conv = Conv(h.shape[-1], stride=2 if way == "down" else 1, name=name)
        return conv(h if way == "down" else doubled(h))


class UNet(Trunk):
    """ADM's U-Net of an image, (x, t) -> (h, w, channels).

    A network with a learned variance has 2 c output channels; `eps` reads the first c.
    """

    channels: int = 1

    @nn.compact
    def __call__(self, x: Image, t: Time, label: Int[Array, ""] | None = None, train: bool = False) -> Image:
        """Predict at time t, a scalar in the network's own steps (0 .. T - 1 for public checkpoints).

        Args:
          label: class, an integer, if and only if the network has classes.
          train: turn dropout on, with the key `rngs={"dropout": key}`.

        Raises:
          ValueError: the extents are not multiples of 2^(levels - 1), or the label does not fit the network.
        """
        e = self.embed(x, t, label)
        *maps, h = self.descend(x, e, train)
        index = 0
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for block in range(self.blocks + 1):
                name = f"output_{index}"
                h = jnp.concatenate([h, maps.pop()], -1)
                h = self.residual(multiplier * self.width, f"{name}_0")(h, e, train)
                attentive = h.shape[0] in self.attention
                h = self.attend(h.shape[-1], f"{name}_1")(h) if attentive else h
                if level and block == self.blocks:
                    h = self.resample(h, e, train, f"{name}_{1 + attentive}", "up")
                index += 1
        h = nn.silu(GroupNorm(self.least, name="out_0")(h))
        return Conv(self.channels, initial=zeros, name="out_2")(h)


class HalfUNet(Trunk):
    """A classifier of a noisy image, (x, t) -> logit: the encoder of ADM's U-Net with attention pooling."""

    outputs: int | None = None
    """Number of logits; None for one, as a scalar."""
    resample_blocks: bool = True

    @nn.compact
    def __call__(
        self, x: Image, t: Time, label: Int[Array, ""] | None = None, train: bool = False
    ) -> Scalar | Float[Array, " outputs"]:
        """Return the logit, or the logits (outputs,); arguments and errors are those of `UNet`."""
        h = self.descend(x, self.embed(x, t, label), train)[-1]
        h = nn.silu(GroupNorm(self.least, name="out_0")(h))
        logits = AttentionPool(self.outputs or 1, self.heads_of(h.shape[-1]), name="out_2")(h)
        return logits[0] if self.outputs is None else logits


def eps(prediction: Float[Array, "h w two_c"], x: Image) -> Image:
    """Return the first c channels of a prediction with c or 2 c channels (eps and the learned variance)."""
    return prediction[..., : x.shape[-1]]
