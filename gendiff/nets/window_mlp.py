"""The reward of a trajectory as a mean over windows of it, each through one small MLP (Nuti, Franzmeyer and Henriques
2023, "Extracting reward functions from diffusion models", NeurIPS)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gendiff.nets.conv import Linear, uniform
from gendiff.nets.temporal import Embedding, TimeMLP, Trajectory, mish, with_slope
from gendiff.types import Scalar, Time

cdf, pdf = lambda x: (1 + jax.lax.erf(x / 2**0.5)) / 2, jax.scipy.stats.norm.pdf
gelu = with_slope(
    lambda x: x * cdf(x), with_slope(lambda x: cdf(x) + x * pdf(x), lambda x: (2 - jnp.square(x)) * pdf(x))
)
"""x times the normal distribution function (Hendrycks and Gimpel 2016)."""
ACTIVATIONS = {"leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01), "mish": mish, "gelu": gelu}


class JoinedLinear(nn.Module):
    """Linear over [row, e] for every row; e, which all rows share, is multiplied once."""

    features: int

    @nn.compact
    def __call__(self, rows: Float[Array, "n i"], e: Embedding) -> Float[Array, "n features"]:
        """The products."""
        inputs = rows.shape[-1]
        initial = uniform(inputs + e.size)
        kernel = self.param("kernel", initial, (inputs + e.size, self.features))
        bias = self.param("bias", initial, (self.features,))
        return rows @ kernel[:inputs] + (e @ kernel[inputs:] + bias)[None]


class WindowMLP(nn.Module):
    """(x, t) -> rho, the mean over the windows w of x of g(w, t).

    g: the frames of w and the embedding of t, Linear layers of `widths` and of width 1 with the activation behind each,
    the last one too, then a scalar affine layer.  Under leaky_relu, grad rho is piecewise constant: a loss of grad rho
    does not train the biases or anything behind t.
    """

    window: int = 4
    """Frames of a window."""
    widths: tuple[int, ...] = (32,)
    strided: bool = True
    """Window j of n is the frames j, j + n, j + 2 n, ... as in the paper's code; otherwise frames that follow one
    another, as in its text."""
    activation: Literal["leaky_relu", "mish", "gelu"] = "leaky_relu"
    reduce: Literal["mean", "sum"] = "mean"
    embedding: int = 32
    """Features of the embedding of t."""

    def __call__(self, x: Trajectory, t: Time) -> Scalar:
        """The reward at time t, a scalar in steps from 0; raises ValueError where the windows do not divide x."""
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"WindowMLP: reduce: expected mean or sum, given {self.reduce!r}")
        values = self.of_windows(self.split(x), t)
        return jnp.mean(values) if self.reduce == "mean" else jnp.sum(values)

    def split(self, x: Trajectory) -> Float[Array, "n window d"]:
        """The windows of a trajectory; raises ValueError where they do not divide it."""
        if x.ndim != 2 or x.shape[0] % self.window or not x.size:
            raise ValueError(
                f"WindowMLP: x: expected (horizon, d), horizon a multiple of {self.window}, given {x.shape}"
            )
        if self.strided:
            return x.reshape(self.window, -1, x.shape[-1]).swapaxes(0, 1)
        return x.reshape(-1, self.window, x.shape[-1])

    @nn.compact
    def of_windows(self, windows: Float[Array, "n window d"], t: Time) -> Float[Array, " n"]:
        """g of single windows: `net.apply(params, windows, t, method="of_windows")`."""
        if windows.ndim != 3 or windows.shape[1] != self.window:
            raise ValueError(f"WindowMLP: windows: expected (n, {self.window}, d), given {windows.shape}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"WindowMLP: activation: expected one of {[*ACTIVATIONS]}, given {self.activation!r}")
        act = ACTIVATIONS[self.activation]
        e = TimeMLP(self.embedding, act, name="time_mlp")(t).astype(windows.dtype)
        first, *others = (*self.widths, 1)
        h = act(JoinedLinear(first, name="layers_0")(windows.reshape(len(windows), -1), e))
        for i, width in enumerate(others):
            h = act(Linear(width, name=f"layers_{i + 1}")(h))
        return Linear(1, name="output")(h)[:, 0]
