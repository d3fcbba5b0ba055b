"""The drivable area around a scene: a signed distance in metres on a grid, and which boxes leave it.

A map (h, w) covers the square of `half` metres in each direction: cell (row, column) has its centre at
x = (column + 1/2) cell - half and y = (row + 1/2) cell - half.  Distances are negative on the drivable area.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float
from scipy import ndimage

from gendiff import check
from gendiff.geometry import outline
from gendiff.types import wide

TOLERANCE = 0.3
"""Metres that a box may reach beyond the drivable area."""


def signed_distance(drivable: Bool[np.ndarray, "h w"], cell: float) -> Float[np.ndarray, "h w"]:
    """Metres to the edge of the drivable area, negative on it.

    The distance to the nearest centre of a cell of the other kind, exact, less the half of a cell that lies between the
    last centre and the edge; where the nearest is askew, up to 0.21 cells more lie between.

    Args:
      drivable: True on the drivable area; numbers are taken if each is exactly 0 or 1.
      cell: metres of a cell's side.

    Raises:
      ValueError: no cell is drivable, the map is not (h, w) of true or false, or `cell` is not positive.
    """
    check.number("signed_distance: cell", cell, above=0)
    check.shape("signed_distance: drivable", drivable, (None, None))
    if not np.isin(drivable, (0, 1)).all():  # also NaN, which NumPy counts as true
        raise ValueError("signed_distance: drivable must be true or false, got other numbers; compare with a threshold")
    drivable = np.asarray(drivable, bool)
    if not drivable.any():
        raise ValueError(f"signed_distance: a cell of the map must be drivable, got none among {drivable.shape}")
    if drivable.all():
        return np.full(drivable.shape, -np.inf)
    outside, inside = (ndimage.distance_transform_edt(mask, sampling=cell) for mask in (~drivable, drivable))
    return np.where(drivable, cell / 2 - inside, outside - cell / 2)


def distance_at(distance: Float[Array, "h w"], points: Float[Array, "*n 2"], half: float) -> Float[Array, "*n"]:
    """The signed distance at points (x, y), bilinear between the centres of cells; infinite beyond the map.

    Raises:
      ValueError: `half` is not positive, or the shapes are others.
    """
    check.number("distance_at: half", half, above=0)
    distance, points = wide(distance), wide(points)
    check.shape("distance_at: distance", distance, (None, None))
    check.shape("distance_at: points", points, (*points.shape[:-1], 2))
    rows, columns = distance.shape
    place = lambda axis, cells: (points[..., axis] / half + 1) * (cells / 2) - 0.5
    within = jnp.all(jnp.abs(points) <= half, -1)
    found = map_coordinates(distance, [place(1, rows), place(0, columns)], order=1, mode="nearest")
    return jnp.where(within, found, jnp.inf)


def off_road(
    distance: Float[Array, "h w"],
    vehicles: Float[Array, "k 6"],
    half: float,
    present: Bool[Array, " k"] | None = None,
    tolerance: float = TOLERANCE,
) -> Bool[Array, " k"]:
    """Whether a corner, or the middle of an edge, of a vehicle is farther than `tolerance` from the drivable area.

    Beyond the map nothing is known to be drivable.

    Raises:
      ValueError: as `distance_at` and `outline`, `tolerance` is not finite, or `present` has another shape than (k,).
    """
    check.number("off_road: tolerance", tolerance)
    check.shape("off_road: vehicles", vehicles, (None, 6))
    if present is not None:
        check.shape("off_road: present", present, (len(vehicles),))
    farthest = jnp.max(distance_at(distance, outline(vehicles), half), -1)
    off = ~(farthest <= tolerance)  # NaN is off the road
    return off if present is None else off & present
