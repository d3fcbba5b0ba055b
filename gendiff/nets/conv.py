"""Convolutions, and every derivative of them, that are fast on each backend.

A convolution with kernel w, stride s and padding p is one of three partial derivatives of one trilinear form,

    T(x, w, y) = sum_{n,q,k,i,o} x[n, s q + k - p, i] w[k, i, o] y[n, q, o]:

`correlate(x, w)` = dT/dy is the convolution of deep learning, `spread(y, w)` = dT/dx the transposed convolution, and
`gather(x, y)` = dT/dw the gradient of the kernel.  Each is bilinear and its transposes are the other two, so
derivatives of all orders, forwards and backwards, stay among them.

They are primitives, so that how they are computed is chosen when a program is lowered for its platform, here and
nowhere else.  An accelerator gets XLA's convolutions.  XLA on a CPU has one fast convolution, the one with stride 1 (or
a stride forwards), no dilation and channels last; it computes the others in scalar loops, among them every gradient of
a convolution in the body of a `scan`.  There all three become that one convolution, or matrix products.

A leading axis m is of members: kernels and examples of different members do not meet.  `vmap` adds to it where both
operands are mapped; an ensemble on a CPU takes one member after the other, where grouped convolutions are ten times
slower.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Sizes = tuple[int, ...]
"""One integer for each spatial axis."""
Sides = tuple[tuple[int, int], ...]
"""Padding before and after each spatial axis."""
Images = Float[Array, "m n *space i"]
Kernels = Float[Array, "m *window i o"]
Maps = Float[Array, "m n *positions o"]


def correlate(x: Images, w: Kernels, stride: Sizes, padding: Sides) -> Maps:
    """y[q, o] = sum_{k,i} x[s q + k - p, i] w[k, i, o], zero outside of x."""
    return correlate_p.bind(x, w, stride=stride, padding=padding)


def spread(y: Maps, w: Kernels, stride: Sizes, padding: Sides, space: Sizes) -> Images:
    """x[j, i] = sum of w[k, i, o] y[q, o] over s q + k - p = j: the transpose of `correlate` in x, of extents `space`."""
    return spread_p.bind(y, w, stride=stride, padding=padding, space=space)


def gather(x: Images, y: Maps, stride: Sizes, padding: Sides, window: Sizes) -> Kernels:
    """w[k, i, o] = sum_{n,q} x[s q + k - p, i] y[q, o]: the transpose of `correlate` in w, of extents `window`."""
    return gather_p.bind(x, y, stride=stride, padding=padding, window=window)


correlate_p, spread_p, gather_p = Primitive("correlate"), Primitive("spread"), Primitive("gather_kernel")


# Shapes.


def _positions(space: Sizes, window: Sizes, stride: Sizes, padding: Sides) -> Sizes:
    extents = zip(space, window, stride, padding, strict=True)
    return tuple((length + sum(p) - k) // s + 1 for length, k, s, p in extents)


@correlate_p.def_abstract_eval
def _(x: Any, w: Any, *, stride: Sizes, padding: Sides) -> Any:
    if x.shape[-1] != w.shape[-2] or x.shape[0] != w.shape[0] or x.ndim != w.ndim:
        raise ValueError(f"convolution: kernels {w.shape} do not fit {x.shape} (members, examples, *space, channels)")
    positions = _positions(x.shape[2:-1], w.shape[1:-2], stride, padding)
    if min(positions, default=1) < 1:
        raise ValueError(f"convolution: a window {w.shape[1:-2]} with padding {padding} exceeds {x.shape[2:-1]}")
    return x.update(shape=(*x.shape[:2], *positions, w.shape[-1]))


@spread_p.def_abstract_eval
def _(y: Any, w: Any, *, stride: Sizes, padding: Sides, space: Sizes) -> Any:
    positions = _positions(space, w.shape[1:-2], stride, padding)
    if y.shape[-1] != w.shape[-1] or y.shape[0] != w.shape[0] or y.shape[2:-1] != positions:
        raise ValueError(f"transposed convolution: kernels {w.shape} to {space} do not fit {y.shape}")
    return y.update(shape=(*y.shape[:2], *space, w.shape[-2]))


@gather_p.def_abstract_eval
def _(x: Any, y: Any, *, stride: Sizes, padding: Sides, window: Sizes) -> Any:
    return x.update(shape=(x.shape[0], *window, x.shape[-1], y.shape[-1]))


# Derivatives: bilinear, each the transpose of the others.


def _space(x: Any) -> Sizes:
    return x.aval.shape[2:-1]


def _window(w: Any) -> Sizes:
    return w.aval.shape[1:-2]


ad.defbilinear(
    correlate_p,
    lambda y, x, w, **how: spread(y, w, **how, space=_space(x)),
    lambda y, x, w, **how: gather(x, y, **how, window=_window(w)),
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


# `vmap`: examples of one kernel join n, everything else joins m.


def _mapped(primitive: Primitive, shared: bool, operands: Any, axes: Any, **how: Any) -> tuple[Array, int]:
    a, b = operands
    size = next(array.shape[axis] for array, axis in zip(operands, axes, strict=True) if axis is not None)
    if shared and axes[1] is None:  # m, size n, ...
        a = jnp.moveaxis(a, axes[0], 1)
        out = primitive.bind(a.reshape(a.shape[0], -1, *a.shape[3:]), b, **how)
        return out.reshape(out.shape[0], size, -1, *out.shape[2:]), 1
    out = primitive.bind(*(_joined(array, axis, size) for array, axis in zip(operands, axes, strict=True)), **how)
    return out.reshape(size, -1, *out.shape[1:]), 0


def _joined(array: Array, axis: int | None, size: int) -> Array:
    """The mapped axis and m as one; the array repeated where it is not mapped."""
    moved = jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
    return moved.reshape(-1, *moved.shape[2:])


for primitive, shared in ((correlate_p, True), (spread_p, True), (gather_p, False)):
    batching.primitive_batchers[primitive] = partial(_mapped, primitive, shared)


# On accelerators.


def _labels(rank: int) -> tuple[str, str, str]:
    space = "DHW"[3 - rank :]
    return f"N{space}C", f"{space}IO", f"N{space}C"


def _lax(x: Array, w: Array, stride: Sizes, padding: Sides) -> Array:
    return lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=_labels(len(stride)))


def _lax_correlate(x: Array, w: Array, *, stride: Sizes, padding: Sides) -> Array:
    return jax.vmap(partial(_lax, stride=stride, padding=padding))(x, w)


def _lax_spread(y: Array, w: Array, *, stride: Sizes, padding: Sides, space: Sizes) -> Array:
    def of_member(y: Array, w: Array) -> Array:
        x = jax.ShapeDtypeStruct((y.shape[0], *space, w.shape[-2]), y.dtype)
        return jax.linear_transpose(lambda x: _lax(x, w, stride, padding), x)(y)[0]

    return jax.vmap(of_member)(y, w)


def _lax_gather(x: Array, y: Array, *, stride: Sizes, padding: Sides, window: Sizes) -> Array:
    def of_member(x: Array, y: Array) -> Array:
        w = jax.ShapeDtypeStruct((*window, x.shape[-1], y.shape[-1]), y.dtype)
        return jax.linear_transpose(lambda w: _lax(x, w, stride, padding), w)(y)[0]

    return jax.vmap(of_member)(x, y)


# On a CPU, one member: the fast convolution or matrix products.


def _canonical(x: Array, w: Array, sides: Sides, stride: Sizes | None = None) -> Array:
    """The convolution that XLA has a fast one of; where the window exceeds the image, its patches times the kernel."""
    window, stride = w.shape[:-2], stride or (1,) * (w.ndim - 2)
    if all(size == 1 for size in window):
        return _strided(_padded(x, sides), stride) @ w.reshape(w.shape[-2:])
    if max(stride) == 1 and _tiles_pay(x, w, sides):
        return _winograd(x, w, sides)
    if all(length >= k for length, k in zip(x.shape[1:-1], window, strict=True)):
        return lax.conv_general_dilated(x, w, stride, sides, dimension_numbers=_labels(len(window)))
    x = _padded(x, sides)
    extents = [length - k + 1 for length, k in zip(x.shape[1:-1], window, strict=True)]
    offsets = itertools.product(*map(range, window))
    patches = [_strided(_part(x, offset, extents), stride) for offset in offsets]
    return jnp.concatenate(patches, -1) @ w.reshape(-1, w.shape[-1])


def _padded(x: Array, sides: Sequence[tuple[int, int]]) -> Array:
    """Zeros before and after each spatial axis; a negative number takes away."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in sides), (0, 0, 0)])


def _part(x: Array, start: Any, extents: Any) -> Array:
    return x[:, *(slice(first, first + size) for first, size in zip(start, extents, strict=True))]


def _strided(x: Array, stride: Sizes) -> Array:
    return x[:, *(slice(None, None, s) for s in stride)]


def _phases(stride: Sizes) -> list[Sizes]:
    return list(itertools.product(*map(range, stride)))


def _cpu_correlate(x: Array, w: Array, *, stride: Sizes, padding: Sides) -> Array:
    return _canonical(x, w, padding, stride)


def _cpu_spread(y: Array, w: Array, *, stride: Sizes, padding: Sides, space: Sizes) -> Array:
    """The phases x[s m + f] of x are convolutions of stride 1 of y with the phases of the flipped kernel: with
    f + p = s c + r and k = s a + r, x[s m + f] = sum_a y[m + c - a] w[s a + r].  They are interleaved."""
    axes, window = range(len(stride)), w.shape[:-2]
    counts = [-(-length // s) for length, s in zip(space, stride, strict=True)]

    def phase(first: Sizes) -> Array:
        start, rest = zip(*(divmod(first[d] + padding[d][0], stride[d]) for d in axes), strict=True)
        if any(r >= k for r, k in zip(rest, window, strict=True)):
            return jnp.zeros((y.shape[0], *counts, w.shape[-2]), y.dtype)
        part = w[*(slice(r, None, s) for r, s in zip(rest, stride, strict=True))]
        sides = tuple((part.shape[d] - 1 - start[d], counts[d] + start[d] - y.shape[1 + d]) for d in axes)
        return _transposed(y, part, sides)

    return _interleaved([phase(first) for first in _phases(stride)], stride, space)


def _interleaved(phases: list[Array], stride: Sizes, space: Sizes) -> Array:
    """x with x[s m + f] = phases[f][m], the phases in the order of `_phases`, cut to the extents `space`."""
    for d in reversed(range(len(stride))):
        rows = [jnp.stack(phases[i : i + stride[d]], 2 + d) for i in range(0, len(phases), stride[d])]
        phases = [row.reshape(*row.shape[: 1 + d], -1, *row.shape[3 + d :]) for row in rows]
    return phases[0][:, *(slice(length) for length in space)]


def _transposed(y: Array, w: Array, sides: Sides) -> Array:
    """The convolution of y with the kernel flipped in space and with its channels exchanged.

    To exchange them costs a pass over the kernel.  Where there are fewer positions than channels, it is less to make
    all products with the kernel as it lies, and to add them up where they belong.
    """
    axes, window = tuple(range(w.ndim - 2)), w.shape[:-2]
    if _tiles_pay(y, w, sides):
        return _winograd(y, jnp.flip(w, axes), sides, exchanged=True)
    if math.prod(y.shape[:-1]) > w.shape[-1] or all(size == 1 for size in window):
        return _canonical(y, jnp.flip(w, axes).swapaxes(-1, -2), sides)
    products = lax.dot_general(y, w, (((y.ndim - 1,), (w.ndim - 1,)), ((), ())))  # n *positions *window i
    shift = lambda offset: [
        (low - k + 1 + a, high - a) for a, k, (low, high) in zip(offset, window, sides, strict=True)
    ]
    total: Array | float = 0.0
    for offset in itertools.product(*map(range, window)):
        total = total + _padded(products[(slice(None),) * (y.ndim - 1) + offset], shift(offset))
    return jnp.asarray(total)


def _cpu_gather(x: Array, y: Array, *, stride: Sizes, padding: Sides, window: Sizes) -> Array:
    """With k = s a + r, w[s a + r] = sum_q x[s (q + a) + r - p] y[q]: of stride 1 for each phase r of x."""
    axes, positions = range(len(window)), y.shape[1:-1]
    if max(stride) == 1:
        return _of_stride_one(x, y, tuple(low for low, _ in padding), window)
    x = _padded(x, padding)
    w = jnp.zeros((*window, x.shape[-1], y.shape[-1]), y.dtype)
    for first in _phases(stride):
        phase = tuple(slice(r, None, s) for r, s in zip(first, stride, strict=True))
        taps = tuple(-(-(window[d] - first[d]) // stride[d]) for d in axes)
        if min(taps) > 0:
            part = _part(x[:, *phase], (0,) * len(window), [positions[d] + taps[d] - 1 for d in axes])
            w = w.at[*phase].set(_of_stride_one(part, y, (0,) * len(window), taps))
    return w


def _of_stride_one(x: Array, y: Array, before: Sizes, window: Sizes) -> Array:
    """w[k] = sum_q x[q + k - before] y[q], as the fast convolution of one with the other, examples for channels.

    The kernel is the one with more channels, since the other is read once for each position of the window: y, or x and
    the result is flipped.
    """
    axes = tuple(range(len(window)))
    if all(k == 1 for k in window) and not any(before):
        x = _part(x, before, y.shape[1:-1])
        return jnp.tensordot(x, y, (tuple(range(y.ndim - 1)),) * 2)[(None,) * len(window)]
    after = tuple(y.shape[1 + d] + window[d] - 1 - x.shape[1 + d] - before[d] for d in axes)
    sides = tuple(zip(before, after, strict=True))
    image, kernel = (x, y) if x.shape[-1] <= y.shape[-1] else (y, x)
    low = before if image is x else tuple(k - 1 - b for k, b in zip(window, before, strict=True))
    sides = tuple((low[d], kernel.shape[1 + d] + window[d] - 1 - image.shape[1 + d] - low[d]) for d in axes)
    w = _canonical(image.swapaxes(0, -1), jnp.moveaxis(kernel, 0, -2), sides)  # image channels, *window, the others
    if image is x:
        return jnp.moveaxis(w, 0, -2)
    return jnp.moveaxis(jnp.flip(w, tuple(d + 1 for d in axes)), 0, -1)


# Winograd's convolution on a CPU, F(2 x 2, 3 x 3) of Lavin and Gray (2016), "Fast algorithms for convolutional neural
# networks", eq. 8: 16 products instead of 36 for each 2 x 2 pixels.  Rounding errors are about twice as large.

INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
Grid = list[list[Array]]


def _tiles_pay(x: Any, w: Any, sides: Sides) -> bool:
    """Whether tiles of 2 x 2 fit, and are enough to be worth the transformation of the kernel."""
    if w.shape[:-2] != (3, 3):
        return False
    h, v = (length + low + high - 2 for length, (low, high) in zip(x.shape[1:-1], sides, strict=True))
    return h % 2 == 0 and v % 2 == 0 and min(w.shape[-2:]) >= 32 and x.shape[0] * h * v >= 64


def _winograd(x: Array, w: Array, sides: Sides, exchanged: bool = False) -> Array:
    """The convolution; with `exchanged` channels the kernels are (3, 3, features, i)."""
    x = _padded(x, sides)
    space = (x.shape[1] - 2, x.shape[2] - 2)
    images, kernels = _both_ways(INPUT, _tiles(x)), _both_ways(KERNEL, [list(row) for row in w])
    times = lambda a, b: lax.dot_general(a, b, (((3,), (int(exchanged),)), ((), ())))
    products = [list(map(times, *rows)) for rows in zip(images, kernels, strict=True)]
    return _interleaved([y for row in _both_ways(OUTPUT, products) for y in row], (2, 2), space)


def _tiles(x: Array) -> Grid:
    """Pixel (i, j) of all tiles of 4 x 4, which overlap by two."""
    h, w = x.shape[1] - 3, x.shape[2] - 3
    return [[x[:, i : i + h : 2, j : j + w : 2] for j in range(4)] for i in range(4)]


def _both_ways(matrix: np.ndarray, grid: Grid) -> Grid:
    """matrix @ grid @ matrix.T, for a matrix of few numbers and a grid of arrays."""
    by = lambda row, arrays: sum((a if c == 1 else -a if c == -1 else c * a for c, a in zip(row, arrays) if c), 0.0)
    rows = [[by(row, column) for column in zip(*grid, strict=True)] for row in matrix.tolist()]
    return [[by(row, each) for row in matrix.tolist()] for each in rows]


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    def of_members(a: Array, b: Array, **how: Any) -> Array:
        if a.shape[0] == 1:
            return function(a[0], b[0], **how)[None]
        return lax.map(lambda pair: function(*pair, **how), (a, b))

    return of_members


for primitive, everywhere, cpu in (
    (correlate_p, _lax_correlate, _cpu_correlate),
    (spread_p, _lax_spread, _cpu_spread),
    (gather_p, _lax_gather, _cpu_gather),
):
    mlir.register_lowering(primitive, mlir.lower_fun(everywhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(_one_by_one(cpu), multiple_results=False), platform="cpu")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("stride", "padding", "space", "window")))


# Layers, for one example.


Initializer = Callable[..., Array]
"""(key, shape, dtype) -> array."""


def uniform(fan_in: int) -> Initializer:
    """PyTorch's initial values of kernels and biases alike, uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """A convolution of one example, (*space, i) -> (*positions, features), in one or two dimensions or more.

    The padding is PyTorch's `window // 2` on both sides unless given: the extents stay at stride 1 and are halved,
    rounding up, at stride 2 (for odd windows).  Kernels are (*window, i, features).
    """

    features: int
    window: Sizes = (3, 3)
    stride: int = 1
    padding: int | None = None
    bias: bool = True
    initial: Initializer | None = None
    """Of kernel and bias; PyTorch's unless given, and `zeros` for the last convolution of a residual branch."""

    @nn.compact
    def __call__(self, x: Float[Array, "*space i"]) -> Float[Array, "*positions features"]:
        """The convolution of x; raises ValueError where it has not one extent for each of the window."""
        if x.ndim != len(self.window) + 1:
            raise ValueError(f"Conv: x: expected {len(self.window)} extents and channels, given shape {x.shape}")
        initial = self.initial or uniform(math.prod(self.window) * x.shape[-1])
        kernel = self.param("kernel", initial, (*self.window, x.shape[-1], self.features))
        stride = (self.stride,) * len(self.window)
        padding = tuple((k // 2 if self.padding is None else self.padding,) * 2 for k in self.window)
        y = correlate(x[None, None], kernel[None], stride, padding)[0, 0]
        return y + _bias(self, initial, y) if self.bias else y


class ConvTranspose(nn.Module):
    """A transposed convolution of one example, (*positions, o) -> (*space, features), PyTorch's `ConvTranspose`.

    space = (positions - 1) stride - 2 padding + window: twice the extent for a window of 4, stride 2 and padding 1.
    Kernels are (*window, features, o), those of the convolution that it transposes.
    """

    features: int
    window: Sizes = (4,)
    stride: int = 2
    padding: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, y: Float[Array, "*positions o"]) -> Float[Array, "*space features"]:
        """The transposed convolution of y."""
        initial = uniform(math.prod(self.window) * self.features)
        kernel = self.param("kernel", initial, (*self.window, self.features, y.shape[-1]))
        lengths = zip(y.shape[:-1], self.window, strict=True)
        space = tuple((length - 1) * self.stride - 2 * self.padding + k for length, k in lengths)
        how = (self.stride,) * len(space), ((self.padding,) * 2,) * len(space)
        x = spread(y[None, None], kernel[None], *how, space)[0, 0]
        return x + _bias(self, initial, x) if self.bias else x


class Linear(nn.Module):
    """x @ kernel + bias over the last axis, with PyTorch's initial values; a convolution of window 1."""

    features: int
    initial: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*space i"]) -> Float[Array, "*space features"]:
        """The product."""
        initial = self.initial or uniform(x.shape[-1])
        y = x @ self.param("kernel", initial, (x.shape[-1], self.features))
        return y + _bias(self, initial, y)


def _bias(module: nn.Module, initial: Initializer, y: Array) -> Array:
    bias = module.param("bias", initial, (y.shape[-1],))
    return bias.reshape((1,) * (y.ndim - 1) + bias.shape)
