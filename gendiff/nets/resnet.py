"""ResNet-18 (He et al. 2016, "Deep residual learning for image recognition") with a logit, for clean images.

Structure and initial values are torchvision's; `gendiff.convert` reads its ImageNet weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from gendiff.nets.conv import Conv, Linear
from gendiff.types import BATCH, Params, Scalar

Image = Float[Array, "h w c"]

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BatchNorm(nn.Module):
    """Batch normalisation of channels: by the batch's moments in training, else by their running averages.

    As in PyTorch, the batch is normalised by its biased variance, and the running average takes the unbiased variance.
    In training, map the examples by `vmap(..., axis_name=BATCH)`.
    """

    momentum: float = 0.1
    """Weight of the newest batch in the running averages."""
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Image, train: bool = False) -> Image:
        """Normalise an image; in training, update the collection `batch_stats`, which must be mutable.

        In training, the collection `moments` gets the batch's mean and biased variance.

        Raises:
          ValueError: the training batch has a single value per channel.
        """
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "var", jnp.ones, shape)
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        if not train or self.is_initializing():
            return _affine(x, mean.value, variance.value + self.eps, scale, bias)
        now = lax.pmean(jnp.mean(x, (0, 1)), BATCH)
        spread = lax.pmean(jnp.mean((x - now[None, None]) ** 2, (0, 1)), BATCH)
        count = lax.psum(x.shape[0] * x.shape[1], BATCH)
        if count < 2:
            raise ValueError("BatchNorm: x must have 2 or more values of a channel in a training batch, got 1")
        newest = lambda _, new: new
        self.sow("moments", "mean", now, reduce_fn=newest)
        self.sow("moments", "var", spread, reduce_fn=newest)
        keep = 1 - self.momentum
        mean.value = keep * mean.value + self.momentum * lax.stop_gradient(now)
        variance.value = keep * variance.value + self.momentum * lax.stop_gradient(spread) * (count / (count - 1))
        return _affine(x, now, spread + self.eps, scale, bias)


def _affine(x: Image, mean: Array, variance: Array, scale: Array, bias: Array) -> Image:
    factor = scale * lax.rsqrt(variance)
    return x * factor[None, None] + (bias - mean * factor)[None, None]


def max_pool(x: Image) -> Image:
    """Pool by a 3 x 3 maximum with stride 2, written as a maximum of slices because their derivatives are fast."""
    h, w, _ = x.shape
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    y = x[:h:2, :w:2]
    for i, j in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        y = jnp.maximum(y, x[i : h + i : 2, j : w + j : 2])
    return y


class Block(nn.Module):
    """A residual block, relu(skip(x) + norm(conv(relu(norm(conv(x))))))."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Image, train: bool) -> Image:
        """Apply the block."""
        conv = lambda name, window, stride: Conv(self.features, window, stride, bias=False, initial=kaiming, name=name)
        h = nn.relu(BatchNorm(name="bn1")(conv("conv1", (3, 3), self.stride)(x), train))
        h = BatchNorm(name="bn2")(conv("conv2", (3, 3), 1)(h), train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = BatchNorm(name="downsample_1")(conv("downsample_0", (1, 1), self.stride)(x), train)
        return nn.relu(h + x)


class ResNet(nn.Module):
    """ResNet-18 of an image, x -> logit; it has 11,177,025 parameters with one output and three channels.

    Variables are `params` and `batch_stats`.  For guidance, `apply(variables, x)` is a pure function of an image.  For
    training, which needs a batch, see `in_batch`.
    """

    outputs: int | None = None
    """Number of logits; None for one, as a scalar."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)

    @nn.compact
    def __call__(self, x: Image, train: bool = False) -> Scalar | Float[Array, " outputs"]:
        """Return the logit of an image of any extents, or the logits (outputs,)."""
        h = Conv(self.widths[0], (7, 7), 2, bias=False, initial=kaiming, name="conv1")(x)
        h = max_pool(nn.relu(BatchNorm(name="bn1")(h, train)))
        for level, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for i in range(count):
                stride = 2 if level and not i else 1
                h = Block(width, stride, name=f"layer{level + 1}_{i}")(h, train)
        logits = Linear(self.outputs or 1, name="fc")(jnp.mean(h, (0, 1)))
        return logits[0] if self.outputs is None else logits


def in_batch(net: ResNet, variables: Params, x: Image) -> tuple[Scalar | Float[Array, " outputs"], Params]:
    """Return the logit of an image of a training batch, and the variables with the batch's own moments.

    Call it below `vmap(..., axis_name=BATCH)`.  With the full training set as the batch, the moments are exact instead
    of running averages ("precise BN", Wu and Johnson 2021, "Rethinking Batch in BatchNorm", section 3).
    """
    logit, updated = net.apply(variables, x, train=True, mutable=["batch_stats", "moments"])
    return logit, {**variables, "batch_stats": updated["moments"]}


def train_logits(net: ResNet, variables: Any, images: Float[Array, "n h w c"]) -> tuple[Float[Array, " n"], Any]:
    """Return logits (n,) of a batch, normalised by its own moments, and the updated running averages, as in PyTorch."""
    of_image = lambda x: net.apply(variables, x, train=True, mutable=["batch_stats"])
    logits, updated = jax.vmap(of_image, axis_name=BATCH, out_axes=(0, None))(images)
    return logits, updated["batch_stats"]
