"""The checkerboard: a point is good on the filled cells of a square board."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gendiff import check
from gendiff.oracles.oracle import Oracle
from gendiff.static import by_value
from gendiff.types import wide


def position(x: Float[Array, "*n 2"], cells: int, half_width: float) -> Float[Array, "*n 2"]:
    """Return the coordinates in cells, 0..cells, of points in data units, in float32 or wider.

    Raises:
      ValueError: `cells` is below 1, `half_width` is not positive, or the points are not (*n, 2).
    """
    _board(cells, half_width)
    x = wide(x)
    check.shape("checkerboard: points", x, (*x.shape[:-1], 2))
    return (x / half_width + 1) * (cells / 2)


@partial(jax.jit, static_argnums=(1, 2))
def on_board(x: Float[Array, "*n 2"], cells: int = 4, half_width: float = 1.0) -> Bool[Array, "*n"]:
    """Return True on the filled cells of the cells x cells board on [-half_width, half_width)^2.

    Cells are half-open; a cell is filled if column + row is even.  Points outside of the board and NaN are False.
    """
    u = position(x, cells, half_width)
    inside = jnp.all((u >= 0) & (u < cells), -1)
    return inside & (jnp.sum(jnp.floor(u), -1) % 2 == 0)


BAND = 0.1
"""Width of a cell's outer band as a share of its side; half of it is at either edge."""


@partial(jax.jit, static_argnums=(1, 2))
def in_outer_band(x: Float[Array, "*n 2"], cells: int = 4, half_width: float = 1.0) -> Bool[Array, "*n"]:
    """Return True in a cell's outer band, a frame of 1 - (1 - BAND)^2 of its area."""
    u = position(x, cells, half_width) % 1
    return jnp.any((u < BAND / 2) | (u > 1 - BAND / 2), -1)


@by_value
def checkerboard(cells: int = 4, half_width: float = 1.0) -> Oracle:
    """Return the oracle of a board, for a batch of points (n, 2); arguments and errors are those of `position`."""
    _board(cells, half_width)
    return lambda samples: on_board(jnp.asarray(samples), cells, half_width)


def _board(cells: int, half_width: float) -> None:
    check.number("checkerboard: cells", cells, at_least=1, whole=True)
    check.number("checkerboard: half_width", half_width, above=0)
