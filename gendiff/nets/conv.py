"""Convolutions with derivatives of all orders, fast on CPUs and on accelerators.

A convolution with kernel w, stride s and padding p is a partial derivative of a trilinear form,

    T(x, w, y) = sum_{n,q,k,i,o} x[n, s q + k - p, i] w[k, i, o] y[n, q, o]:

`correlate(x, w)` = dT/dy is the convolution of deep learning, `spread(y, w)` = dT/dx the transposed convolution, and
`gather(x, y)` = dT/dw the gradient of the kernel.  All three are bilinear, and the transposes of any are the other two.
So derivatives of all orders, forward and reverse, consist of these three.

They are JAX primitives, because lowering then chooses the algorithm by platform: accelerators get XLA's convolutions,
CPUs get those of `gendiff.nets.conv_cpu`.

The leading axis m counts members; member j's kernels see only member j's examples.  `vmap` extends this axis if it maps
both operands.  On CPUs the members run in a loop, because grouped convolutions are ten times slower.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from gendiff.nets import conv_cpu
from gendiff.nets.conv_cpu import Sides, Sizes

Images = Float[Array, "m n *space i"]
Kernels = Float[Array, "m *window i o"]
Maps = Float[Array, "m n *positions o"]


def correlate(x: Images, w: Kernels, stride: Sizes, padding: Sides) -> Maps:
    """Return y[q, o] = sum_{k,i} x[s q + k - p, i] w[k, i, o], with zeros outside of x."""
    return correlate_p.bind(x, w, stride=stride, padding=padding)


def spread(y: Maps, w: Kernels, stride: Sizes, padding: Sides, space: Sizes) -> Images:
    """Return x[j, i] = sum of w[k, i, o] y[q, o] over s q + k - p = j, with extents `space`.

    It is the transpose of `correlate` in x.
    """
    return spread_p.bind(y, w, stride=stride, padding=padding, space=space)


def gather(x: Images, y: Maps, stride: Sizes, padding: Sides, window: Sizes) -> Kernels:
    """Return w[k, i, o] = sum_{n,q} x[s q + k - p, i] y[q, o], with extents `window`.

    It is the transpose of `correlate` in w.
    """
    return gather_p.bind(x, y, stride=stride, padding=padding, window=window)


correlate_p, spread_p, gather_p = Primitive("correlate"), Primitive("spread"), Primitive("gather_kernel")


# Shapes.


def _positions(space: Sizes, window: Sizes, stride: Sizes, padding: Sides) -> Sizes:
    extents = zip(space, window, stride, padding, strict=True)
    return tuple((length + sum(p) - k) // s + 1 for length, k, s, p in extents)


@correlate_p.def_abstract_eval
def _(x: Any, w: Any, *, stride: Sizes, padding: Sides) -> Any:
    if x.shape[-1] != w.shape[-2] or x.shape[0] != w.shape[0] or x.ndim != w.ndim:
        raise ValueError(
            "convolution: kernels (members, *window, channels, features) must fit x (members, examples, *space, "
            f"channels), got {w.shape} and {x.shape}"
        )
    positions = _positions(x.shape[2:-1], w.shape[1:-2], stride, padding)
    if min(positions, default=1) < 1:
        raise ValueError(
            f"convolution: window must fit into {x.shape[2:-1]} with padding {padding}, got {w.shape[1:-2]}"
        )
    return x.update(shape=(*x.shape[:2], *positions, w.shape[-1]))


@spread_p.def_abstract_eval
def _(y: Any, w: Any, *, stride: Sizes, padding: Sides, space: Sizes) -> Any:
    positions = _positions(space, w.shape[1:-2], stride, padding)
    if y.shape[-1] != w.shape[-1] or y.shape[0] != w.shape[0] or y.shape[2:-1] != positions:
        raise ValueError(f"transposed convolution: kernels to {space} must fit {y.shape}, got {w.shape}")
    return y.update(shape=(*y.shape[:2], *space, w.shape[-2]))


@gather_p.def_abstract_eval
def _(x: Any, y: Any, *, stride: Sizes, padding: Sides, window: Sizes) -> Any:
    return x.update(shape=(x.shape[0], *window, x.shape[-1], y.shape[-1]))


# Derivatives: the primitives are bilinear and transposes of one another.


def _space(x: Any) -> Sizes:
    return x.aval.shape[2:-1]


def _window(w: Any) -> Sizes:
    return w.aval.shape[1:-2]


ad.defbilinear(
    correlate_p,
    lambda y, x, w, **geometry: spread(y, w, **geometry, space=_space(x)),
    lambda y, x, w, **geometry: gather(x, y, **geometry, window=_window(w)),
)
ad.defbilinear(
    spread_p,
    lambda x, y, w, stride, padding, space: correlate(x, w, stride, padding),
    lambda x, y, w, stride, padding, space: gather(x, y, stride, padding, _window(w)),
)
ad.defbilinear(
    gather_p,
    lambda w, x, y, stride, padding, window: spread(y, w, stride, padding, _space(x)),
    lambda w, x, y, stride, padding, window: correlate(x, w, stride, padding),
)


# `vmap`: examples of a common kernel extend n, all other mapped axes extend m.


def _mapped(primitive: Primitive, shared: bool, operands: Any, axes: Any, **geometry: Any) -> tuple[Array, int]:
    a, b = operands
    size = next(array.shape[axis] for array, axis in zip(operands, axes, strict=True) if axis is not None)
    if shared and axes[1] is None:  # m, size n, ...
        a = jnp.moveaxis(a, axes[0], 1)
        out = primitive.bind(a.reshape(a.shape[0], -1, *a.shape[3:]), b, **geometry)
        return out.reshape(out.shape[0], size, -1, *out.shape[2:]), 1
    out = primitive.bind(*(_joined(array, axis, size) for array, axis in zip(operands, axes, strict=True)), **geometry)
    return out.reshape(size, -1, *out.shape[1:]), 0


def _joined(array: Array, axis: int | None, size: int) -> Array:
    """Merge the mapped axis into m; repeat an array that is not mapped."""
    moved = jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
    return moved.reshape(-1, *moved.shape[2:])


for primitive, shared in ((correlate_p, True), (spread_p, True), (gather_p, False)):
    batching.primitive_batchers[primitive] = partial(_mapped, primitive, shared)


# On accelerators.


def _lax_correlate(x: Array, w: Array, *, stride: Sizes, padding: Sides) -> Array:
    return lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=conv_cpu.labels(len(stride)))


def _lax_spread(y: Array, w: Array, *, space: Sizes, **geometry: Any) -> Array:
    x = jax.ShapeDtypeStruct((y.shape[0], *space, w.shape[-2]), y.dtype)
    return jax.linear_transpose(lambda x: _lax_correlate(x, w, **geometry), x)(y)[0]


def _lax_gather(x: Array, y: Array, *, window: Sizes, **geometry: Any) -> Array:
    w = jax.ShapeDtypeStruct((*window, x.shape[-1], y.shape[-1]), y.dtype)
    return jax.linear_transpose(lambda w: _lax_correlate(x, w, **geometry), w)(y)[0]


def _by_vmap(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b, **geometry: jax.vmap(partial(function, **geometry))(a, b)


def _by_member(function: Callable[..., Array]) -> Callable[..., Array]:
    def of_members(a: Array, b: Array, **geometry: Any) -> Array:
        if a.shape[0] == 1:
            return function(a[0], b[0], **geometry)[None]
        return lax.map(lambda pair: function(*pair, **geometry), (a, b))

    return of_members


for primitive, everywhere, cpu in (
    (correlate_p, _lax_correlate, conv_cpu.correlate),
    (spread_p, _lax_spread, conv_cpu.spread),
    (gather_p, _lax_gather, conv_cpu.gather),
):
    mlir.register_lowering(primitive, mlir.lower_fun(_by_vmap(everywhere), multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(_by_member(cpu), multiple_results=False), platform="cpu")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("stride", "padding", "space", "window")))


# Layers, for a single example.


Initializer = Callable[..., Array]
"""A function (key, shape, dtype) -> array."""


def uniform(fan_in: int) -> Initializer:
    """Return PyTorch's initialiser of kernels and biases, uniform in +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """A convolution of an example, (*space, i) -> (*positions, features), in any number of dimensions.

    The default padding is PyTorch's `window // 2` on both sides.  For odd windows stride 1 then keeps the extents, and
    stride 2 halves them, rounding up.  Kernels are (*window, i, features).
    """

    features: int
    window: Sizes = (3, 3)
    stride: int = 1
    padding: int | None = None
    bias: bool = True
    initial: Initializer | None = None
    """Initialiser of kernel and bias; default: PyTorch's.  Use `zeros` for the last layer of a residual branch."""

    @nn.compact
    def __call__(self, x: Float[Array, "*space i"]) -> Float[Array, "*positions features"]:
        """Convolve x.

        Raises:
          ValueError: x does not have as many extents as the window.
        """
        if x.ndim != len(self.window) + 1:
            raise ValueError(f"Conv: x must have {len(self.window)} extents and channels, got shape {x.shape}")
        initial = self.initial or uniform(math.prod(self.window) * x.shape[-1])
        kernel = self.param("kernel", initial, (*self.window, x.shape[-1], self.features))
        stride = (self.stride,) * len(self.window)
        padding = tuple((k // 2 if self.padding is None else self.padding,) * 2 for k in self.window)
        y = correlate(x[None, None], kernel[None], stride, padding)[0, 0]
        return y + _bias(self, initial, y) if self.bias else y


class ConvTranspose(nn.Module):
    """A transposed convolution of an example, (*positions, o) -> (*space, features), PyTorch's `ConvTranspose`.

    space = (positions - 1) stride - 2 padding + window; a window of 4 with stride 2 and padding 1 doubles the extents.
    Kernels are (*window, features, o), like those of the convolution that it transposes.
    """

    features: int
    window: Sizes = (4,)
    stride: int = 2
    padding: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, y: Float[Array, "*positions o"]) -> Float[Array, "*space features"]:
        """Apply the transposed convolution to y."""
        initial = uniform(math.prod(self.window) * self.features)
        kernel = self.param("kernel", initial, (*self.window, self.features, y.shape[-1]))
        lengths = zip(y.shape[:-1], self.window, strict=True)
        space = tuple((length - 1) * self.stride - 2 * self.padding + k for length, k in lengths)
        geometry = (self.stride,) * len(space), ((self.padding,) * 2,) * len(space)
        x = spread(y[None, None], kernel[None], *geometry, space)[0, 0]
        return x + _bias(self, initial, x) if self.bias else x


class Linear(nn.Module):
    """x @ kernel + bias over the last axis, with PyTorch's initial values; a convolution of window 1."""

    features: int
    initial: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*space i"]) -> Float[Array, "*space features"]:
        """Multiply x by the kernel, and add the bias."""
        initial = self.initial or uniform(x.shape[-1])
        y = x @ self.param("kernel", initial, (x.shape[-1], self.features))
        return y + _bias(self, initial, y)


def _bias(module: nn.Module, initial: Initializer, y: Array) -> Array:
    bias = module.param("bias", initial, (y.shape[-1],))
    return bias.reshape((1,) * (y.ndim - 1) + bias.shape)
