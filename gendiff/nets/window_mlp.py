"""The reward of a trajectory: the mean of a small MLP over its windows.

From Nuti, Franzmeyer and Henriques 2023, "Extracting reward functions from diffusion models", NeurIPS.
"""

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
"""x times the normal CDF (Hendrycks and Gimpel 2016)."""
ACTIVATIONS = {"leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01), "mish": mish, "gelu": gelu}


class JoinedLinear(nn.Module):
    """A linear layer of [row, e] for all rows; it multiplies the common vector e only once."""

    features: int

    @nn.compact
    def __call__(self, rows: Float[Array, "n i"], e: Embedding) -> Float[Array, "n features"]:
        """Apply the layer."""
        inputs = rows.shape[-1]
        initial = uniform(inputs + e.size)
        kernel = self.param("kernel", initial, (inputs + e.size, self.features))
        bias = self.param("bias", initial, (self.features,))
        return rows @ kernel[:inputs] + (e @ kernel[inputs:] + bias)[None]


class WindowMLP(nn.Module):
    """A reward (x, t) -> rho, the mean of g(w, t) over the windows w of x.

    g maps the frames of w and the embedding of t through linear layers of `widths` and of width 1.  The activation
    follows all of them, and a scalar affine layer ends g.  With leaky_relu, grad rho is piecewise constant.  A loss of
    grad rho then trains neither the biases nor the embedding of t.
    """

    window: int = 4
    """Frames of a window."""
    widths: tuple[int, ...] = (32,)
    strided: bool = True
    """True: window j of n has the frames j, j + n, j + 2 n, .., as in the paper's code.  False: windows have
    consecutive frames, as in its text."""
    activation: Literal["leaky_relu", "mish", "gelu"] = "leaky_relu"
    reduce: Literal["mean", "sum"] = "mean"
    embedding: int = 32
    """Features of the embedding of t."""

    def __call__(self, x: Trajectory, t: Time) -> Scalar:
        """Return the reward at time t, a scalar in steps from 0.

        Raises:
          ValueError: the horizon is not a multiple of the window, or an option is unknown.
        """
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"WindowMLP: reduce must be 'mean' or 'sum', got {self.reduce!r}")
        values = self.of_windows(self.split(x), t)
        return jnp.mean(values) if self.reduce == "mean" else jnp.sum(values)

    def split(self, x: Trajectory) -> Float[Array, "n window d"]:
        """Split a trajectory into its windows.

        Raises:
          ValueError: the horizon is not a multiple of the window.
        """
        if x.ndim != 2 or x.shape[0] % self.window or not x.size:
            raise ValueError(f"WindowMLP: x must be (horizon, d), horizon a multiple of {self.window}, got {x.shape}")
        if self.strided:
            return x.reshape(self.window, -1, x.shape[-1]).swapaxes(0, 1)
        return x.reshape(-1, self.window, x.shape[-1])

    @nn.compact
    def of_windows(self, windows: Float[Array, "n window d"], t: Time) -> Float[Array, " n"]:
        """Return g of windows: `net.apply(params, windows, t, method="of_windows")`."""
        if windows.ndim != 3 or windows.shape[1] != self.window:
            raise ValueError(f"WindowMLP: windows must be (n, {self.window}, d), got {windows.shape}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"WindowMLP: activation must be one of {[*ACTIVATIONS]}, got {self.activation!r}")
        act = ACTIVATIONS[self.activation]
        e = TimeMLP(self.embedding, act, name="time_mlp")(t).astype(windows.dtype)
        first, *rest = (*self.widths, 1)
        h = act(JoinedLinear(first, name="layers_0")(windows.reshape(len(windows), -1), e))
        for i, width in enumerate(rest):
            h = act(Linear(width, name=f"layers_{i + 1}")(h))
        return Linear(1, name="output")(h)[:, 0]
