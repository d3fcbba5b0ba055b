"""The drivable area around a scene: its signed distance in metres on a grid, and the boxes that leave it.

A map (h, w) covers x and y in [-half, half]: cell (row, column) has its centre at x = (column + 1/2) cell - half and
y = (row + 1/2) cell - half.  Distances are negative on the drivable area.
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
"""Metres that a box may stand off the drivable area."""


def signed_distance(drivable: Bool[np.ndarray, "h w"], cell: float) -> Float[np.ndarray, "h w"]:
    """Return the distance in metres to the edge of the drivable area, negative on it.

    It is the exact distance to the nearest cell centre of the other kind, less half a cell.  For a diagonal neighbour
    this errs by up to 0.21 cells.

    Args:
      drivable: True on the drivable area, or numbers 0 and 1.
      cell: a cell's side, in metres.

    Raises:
      ValueError: no cell is drivable, the map is not (h, w) of true or false, or `cell` is not positive.
    """
    check.number("signed_distance: cell", cell, above=0)
    check.shape("signed_distance: drivable", drivable, (None, None))
    if not np.isin(drivable, (0, 1)).all():  # refuses NaN too, which NumPy would count as true
        raise ValueError("signed_distance: drivable must be true or false, got other numbers; compare with a threshold")
    drivable = np.asarray(drivable, bool)
    if not drivable.any():
        raise ValueError(f"signed_distance: a cell of the map must be drivable, got none among {drivable.shape}")
    if drivable.all():
        return np.full(drivable.shape, -np.inf)
    outside, inside = (ndimage.distance_transform_edt(mask, sampling=cell) for mask in (~drivable, drivable))
    return np.where(drivable, cell / 2 - inside, outside - cell / 2)


def distance_at(distance: Float[Array, "h w"], points: Float[Array, "*n 2"], half: float) -> Float[Array, "*n"]:
    """Return the signed distance at points (x, y), bilinear between cell centres; infinite outside of the map.

    Raises:
      ValueError: `half` is not positive, or a shape is wrong.
    """
    check.number("distance_at: half", half, above=0)
    distance, points = wide(distance), wide(points)
    check.shape("distance_at: distance", distance, (None, None))
    check.shape("distance_at: points", points, (*points.shape[:-1], 2))
    rows, columns = distance.shape
    place = lambda axis, cells: (points[..., axis] / half + 1) * (cells / 2) - 0.5
    within = jnp.all(jnp.abs(points) <= half, -1)
    values = map_coordinates(distance, [place(1, rows), place(0, columns)], order=1, mode="nearest")
    return jnp.where(within, values, jnp.inf)


def off_road(
    distance: Float[Array, "h w"],
    vehicles: Float[Array, "k 6"],
    half: float,
    present: Bool[Array, " k"] | None = None,
    tolerance: float = TOLERANCE,
) -> Bool[Array, " k"]:
    """Return True for vehicles with a corner or edge middle farther than `tolerance` from the drivable area.

    Vehicles outside of the map are off the road.

    Raises:
      ValueError: see `distance_at` and `outline`; or `tolerance` is not finite, or the shape of `present` is not (k,).
    """
    check.number("off_road: tolerance", tolerance)
    check.shape("off_road: vehicles", vehicles, (None, 6))
    if present is not None:
        check.shape("off_road: present", present, (len(vehicles),))
    farthest = jnp.max(distance_at(distance, outline(vehicles), half), -1)
    off = ~(farthest <= tolerance)  # NaN is off the road
    return off if present is None else off & present
