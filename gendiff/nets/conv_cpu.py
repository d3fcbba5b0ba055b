"""The convolutions of `gendiff.nets.conv` on a CPU, for a single member.

Shapes are x (n, *space, i), w (*window, i, o) and y (n, *positions, o).
XLA on a CPU has a single fast convolution: forward, without dilation, with channels last.  It computes other ones in
scalar loops, such as gradients of convolutions inside `scan`.  This module reduces all of them to the fast one, or to
matrix products.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

Sizes = tuple[int, ...]
"""An integer per spatial axis."""
Sides = tuple[tuple[int, int], ...]
"""Padding before and after an axis, per spatial axis."""


def labels(rank: int) -> tuple[str, str, str]:
    """Return XLA's names of the axes of x, w and y."""
    space = "DHW"[3 - rank :]
    return f"N{space}C", f"{space}IO", f"N{space}C"


def correlate(x: Array, w: Array, *, stride: Sizes, padding: Sides) -> Array:
    """Compute `gendiff.nets.conv.correlate`."""
    return _canonical(x, w, padding, stride)


def spread(y: Array, w: Array, *, stride: Sizes, padding: Sides, space: Sizes) -> Array:
    """Compute `gendiff.nets.conv.spread` by interleaving the phases x[s m + f] of x.

    With f + p = s c + r and k = s a + r, x[s m + f] = sum_a y[m + c - a] w[s a + r].  This is a convolution of stride 1
    of y with a phase of the flipped kernel.
    """
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


def gather(x: Array, y: Array, *, stride: Sizes, padding: Sides, window: Sizes) -> Array:
    """Compute `gendiff.nets.conv.gather` by phases r of x, which have stride 1.

    With k = s a + r, w[s a + r] = sum_q x[s (q + a) + r - p] y[q].
    """
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


def _canonical(x: Array, w: Array, sides: Sides, stride: Sizes | None = None) -> Array:
    """Use XLA's fast convolution, or a faster form for special shapes; im2col if the window exceeds the image."""
    window, stride = w.shape[:-2], stride or (1,) * (w.ndim - 2)
    if all(size == 1 for size in window):
        return _strided(_padded(x, sides), stride) @ w.reshape(w.shape[-2:])
    if max(stride) == 1 and _tiles_pay(x, w, sides):
        return _by_tiles(x, w, sides)
    if max(stride) == 1 and math.prod(window) * w.shape[-1] <= 27:
        return _of_few_features(x, w, sides)
    if all(length >= k for length, k in zip(x.shape[1:-1], window, strict=True)):
        if max(stride) == 1 and (together := _together(x, w, sides)) > 1:
            return _folded(x, w, sides, together)
        return lax.conv_general_dilated(x, w, stride, sides, dimension_numbers=labels(len(window)))
    x = _padded(x, sides)
    extents = [length - k + 1 for length, k in zip(x.shape[1:-1], window, strict=True)]
    offsets = itertools.product(*map(range, window))
    patches = [_strided(_part(x, offset, extents), stride) for offset in offsets]
    return jnp.concatenate(patches, -1) @ w.reshape(-1, w.shape[-1])


def _of_few_features(x: Array, w: Array, sides: Sides) -> Array:
    """Multiply all pixels by all kernels, with pixels last, and add the shifted products.

    It is 2 to 5 times faster for up to three features, because features last would leave vector registers mostly empty.
    """
    window, features = w.shape[:-2], w.shape[-1]
    kernels = w.swapaxes(-1, -2).reshape(-1, w.shape[-2])
    products = lax.dot_general(kernels, x, (((1,), (x.ndim - 1,)), ((), ())))
    products = products.reshape(-1, features, *x.shape[:-1])
    total: Array | float = 0.0
    for product, offset in zip(products, itertools.product(*map(range, window)), strict=True):
        shift = [(low - a, high - k + 1 + a, 0) for a, k, (low, high) in zip(offset, window, sides, strict=True)]
        total = total + lax.pad(product, jnp.zeros((), x.dtype), [(0, 0, 0)] * 2 + shift)
    return jnp.moveaxis(jnp.asarray(total), 0, -1)


def _together(x: Array, w: Array, sides: Sides) -> int:
    """Return the number of neighbours in a row to fold into features, up to 32; 1 if folding does not pay or fit."""
    width, window, features = x.shape[-2], w.shape[-3], w.shape[-1]
    if w.ndim != 4 or max(w.shape[-2:]) > 16 or window > 5:
        return 1
    row = width + sum(sides[-1]) - window + 1
    fits = lambda f: f * features <= 32 and row % f == 0 and window + f - 1 <= width
    return next((f for f in (4, 2) if fits(f)), 1)


def _folded(x: Array, w: Array, sides: Sides, together: int) -> Array:
    """Convolve with `together` neighbours in a row as features of one position, by a wider kernel.

    With 16 features or fewer, XLA's convolution runs at half speed.  For two neighbours and a window of 3, folding
    takes 4/3 of the multiplications and is 1.5 times faster.
    """
    shifted = [[(0, 0)] * (w.ndim - 3) + [(a, together - 1 - a), (0, 0), (0, 0)] for a in range(together)]
    wide = jnp.concatenate([jnp.pad(w, widths) for widths in shifted], -1)
    stride = (1,) * (w.ndim - 3) + (together,)
    y = lax.conv_general_dilated(x, wide, stride, sides, dimension_numbers=labels(w.ndim - 2))
    return y.reshape(*y.shape[:-2], y.shape[-2] * together, w.shape[-1])


def _padded(x: Array, sides: Sequence[tuple[int, int]]) -> Array:
    """Pad spatial axes with zeros; a negative number crops."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in sides), (0, 0, 0)])


def _part(x: Array, start: Any, extents: Any) -> Array:
    return x[:, *(slice(first, first + size) for first, size in zip(start, extents, strict=True))]


def _strided(x: Array, stride: Sizes) -> Array:
    return x[:, *(slice(None, None, s) for s in stride)]


def _phases(stride: Sizes) -> list[Sizes]:
    return list(itertools.product(*map(range, stride)))


def _interleaved(phases: list[Array], stride: Sizes, space: Sizes) -> Array:
    """Return x with x[s m + f] = phases[f][m], cropped to the extents `space`; phases are ordered as in `_phases`."""
    for d in reversed(range(len(stride))):
        rows = [jnp.stack(phases[i : i + stride[d]], 2 + d) for i in range(0, len(phases), stride[d])]
        phases = [row.reshape(*row.shape[: 1 + d], -1, *row.shape[3 + d :]) for row in rows]
    return phases[0][:, *(slice(length) for length in space)]


def _transposed(y: Array, w: Array, sides: Sides) -> Array:
    """Convolve y with the kernel flipped in space and with its channels exchanged.

    The exchange costs a pass over the kernel.  With fewer positions than channels, multiplying by the kernel in its
    layout and adding the shifted products is cheaper.
    """
    axes, window = tuple(range(w.ndim - 2)), w.shape[:-2]
    if _tiles_pay(y, w, sides):
        return _by_tiles(y, jnp.flip(w, axes), sides, exchanged=True)
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


def _of_stride_one(x: Array, y: Array, before: Sizes, window: Sizes) -> Array:
    """Return w[k] = sum_q x[q + k - before] y[q], as a fast convolution of x and y with examples as channels.

    The operand with more channels is the kernel, because the image is read once per position of the window.  If x is
    the kernel, the result is flipped.
    """
    axes = tuple(range(len(window)))
    if all(k == 1 for k in window) and not any(before):
        x = _part(x, before, y.shape[1:-1])
        return jnp.tensordot(x, y, (tuple(range(y.ndim - 1)),) * 2)[(None,) * len(window)]
    image, kernel = (x, y) if x.shape[-1] <= y.shape[-1] else (y, x)
    low = before if image is x else tuple(k - 1 - b for k, b in zip(window, before, strict=True))
    sides = tuple((low[d], kernel.shape[1 + d] + window[d] - 1 - image.shape[1 + d] - low[d]) for d in axes)
    w = _canonical(_examples_last(image), jnp.moveaxis(kernel, 0, -2), sides)  # image channels, *window, features
    if image is x:
        return jnp.moveaxis(w, 0, -2)
    return jnp.moveaxis(jnp.flip(w, tuple(d + 1 for d in axes)), 0, -1)


def _examples_last(x: Array) -> Array:
    """Exchange the first and the last axis of x.

    XLA would fuse the computation of x into a plain transpose.  Its reads would have strides of full examples, which
    share cache lines.  A product with the identity reads x in its layout and leaves only full rows to move.
    """
    n = x.shape[0]
    if n > 256:  # the product takes n multiplications per number
        return x.swapaxes(0, -1)
    rows = lax.dot_general(x.reshape(n, -1), jnp.eye(n, dtype=x.dtype), (((0,), (0,)), ((), ())), lax.Precision.HIGHEST)
    return jnp.moveaxis(rows.reshape(*x.shape[1:], n), -2, 0)


# Winograd convolutions F(m, k) compute m neighbouring outputs of a window of k from m + k - 1 instead of m k products
# per axis (Winograd 1980; Lavin and Gray 2016, "Fast algorithms for convolutional neural networks").  They evaluate
# tiles of the image and the kernel as polynomials at m + k - 1 points, one of them infinity, and multiply the values.
#
# F(2 x 2, 3 x 3) takes 16 products instead of 36; its rounding errors are at most twice those of the plain
# convolution.  F(4, 5) takes 8 products instead of 20; its rounding errors are two to four times as large.

Grid = Any
"""Nested lists of arrays, one level per axis."""


class Tiles(NamedTuple):
    """The three matrices of F(m, k), for image, kernel and output."""

    image: np.ndarray
    """(m + k - 1, m + k - 1)."""
    kernel: np.ndarray
    """(m + k - 1, k)."""
    output: np.ndarray
    """(m, m + k - 1)."""


def _toom_cook(m: int, k: int, points: Sequence[Fraction | int]) -> Tiles:
    """Construct F(m, k) from m + k - 2 points and infinity (Toom 1963; Cook 1966)."""
    unit = np.array([Fraction(1)])
    polynomial = lambda roots: reduce(np.polymul, [[Fraction(1), -root] for root in roots], unit)[::-1]
    powers = lambda point, count: [Fraction(point) ** i for i in range(count)]
    rest = [[other for other in points if other != point] for point in points]
    image = [[*polynomial(others), 0] for others in rest] + [list(polynomial(points))]
    scale = [math.prod(Fraction(point) - other for other in others) for point, others in zip(points, rest, strict=True)]
    kernel = [[p / size for p in powers(point, k)] for point, size in zip(points, scale, strict=True)]
    at_infinity = lambda count: [0] * (count - 1) + [1]
    output = np.array([*(powers(point, m) for point in points), at_infinity(m)]).T
    return Tiles(*(np.array(matrix, float) for matrix in (image, [*kernel, at_infinity(k)], output)))


TILES = {3: _toom_cook(2, 3, (0, 1, -1)), 5: _toom_cook(4, 5, (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2)))}
"""Matrices by the window's extent."""


def _tiles_pay(x: Any, w: Any, sides: Sides) -> bool:
    """Return True if the tiles fit, and are enough to pay for the transformation of the kernel."""
    window = w.shape[:-2]
    if window not in ((3, 3), (5,)) or x.dtype != jnp.float32:  # lower precisions have too large rounding errors
        return False
    space = [length + sum(side) - k + 1 for length, side, k in zip(x.shape[1:-1], sides, window, strict=True)]
    fits = all(length > 0 and length % len(TILES[window[0]].output) == 0 for length in space)
    return fits and min(w.shape[-2:]) >= 32 and x.shape[0] * math.prod(space) >= 64


def _by_tiles(x: Array, w: Array, sides: Sides, exchanged: bool = False) -> Array:
    """Convolve by tiles; with `exchanged` the kernels are (*window, features, i)."""
    x, window = _padded(x, sides), w.shape[:-2]
    tiles, rank = TILES[window[0]], len(window)
    size = len(tiles.output)
    space = tuple(length - k + 1 for length, k in zip(x.shape[1:-1], window, strict=True))
    part = lambda offset: x[:, *(slice(a, a + length, size) for a, length in zip(offset, space, strict=True))]
    images = _transformed(tiles.image, _grid(part, (len(tiles.image),) * rank), rank)
    kernels = _transformed(tiles.kernel, _grid(lambda offset: w[offset], window), rank)
    times = lambda a, b: lax.dot_general(a, b, (((a.ndim - 1,), (int(exchanged),)), ((), ())))
    products = jax.tree.map(times, images, kernels)
    return _interleaved(jax.tree.leaves(_transformed(tiles.output, products, rank)), (size,) * rank, space)


def _grid(of: Callable[[Sizes], Array], extents: Sizes, first: Sizes = ()) -> Grid:
    """Return nested lists of of((i, j, ..)) for all i, j, .. below the extents."""
    if not extents:
        return of(first)
    return [_grid(of, extents[1:], (*first, i)) for i in range(extents[0])]


def _transformed(matrix: np.ndarray, grid: Grid, rank: int) -> Grid:
    """Multiply a grid by a small matrix along all of its axes."""
    if rank == 0:
        return grid
    inner = [_transformed(matrix, part, rank - 1) for part in grid]
    times = lambda c, a: a if c == 1 else -a if c == -1 else c * a
    by = lambda row: jax.tree.map(
        lambda *arrays: reduce(operator.add, [times(c, a) for c, a in zip(row, arrays, strict=True) if c]), *inner
    )
    return [by(row) for row in matrix.tolist()]
