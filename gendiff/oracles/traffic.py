"""What is wrong with a scene of traffic: overlapping vehicles, and vehicles off the drivable area."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff import check
from gendiff.oracles import boxes, drivable
from gendiff.types import wide


class Infractions(NamedTuple):
    """Of one scene, or of many with leading axes."""

    pairs: Bool[Array, "*s k k"]
    """Which pairs of vehicles overlap."""
    collides: Bool[Array, "*s k"]
    """Vehicles that overlap another."""
    off_road: Bool[Array, "*s k"]
    degenerate: Bool[Array, "*s k"]
    """Vehicles without positive extents or a heading, which were mended first."""


def infractions(
    vehicles: Float[Array, "k f"],
    present: Bool[Array, " k"],
    distance: Float[Array, "h w"],
    half: float,
    tolerance: float = drivable.TOLERANCE,
) -> Infractions:
    """All oracles on one scene.

    Args:
      vehicles: x, y, length, width in metres, cos and sin of the yaw, and more that does not matter.
      present: vehicles that count.
      distance: signed distance to the edge of the drivable area, over `half` metres in each direction.

    Raises:
      ValueError: as `boxes.collisions` and `drivable.off_road`.
    """
    vehicles = wide(vehicles)
    shapes = boxes.mended(vehicles[:, :6])
    pairs = boxes.collisions(shapes, present)
    off = drivable.off_road(distance, shapes, half, present, tolerance)
    return Infractions(pairs, jnp.any(pairs, -1), off, boxes.degenerate(vehicles[:, :6]) & present)


def constraints(found: Infractions) -> Bool[Array, "*s m"]:
    """Each constraint once, True where it holds: that a pair i < j does not overlap, in the order of
    `numpy.triu_indices`, then that a vehicle is on the drivable area; m = k (k - 1) / 2 + k."""
    rows, columns = np.triu_indices(found.collides.shape[-1], 1)
    return jnp.concatenate([~found.pairs[..., rows, columns], ~found.off_road], -1)


def by_agent(holds: Bool[np.ndarray, "*s m"]) -> Bool[np.ndarray, "*s k"]:
    """Which vehicles break no constraint; both of an overlapping pair do.

    Raises:
      ValueError: the number of constraints is not that of any number of vehicles.
    """
    holds = np.asarray(holds)
    k = round((np.sqrt(1 + 8 * holds.shape[-1]) - 1) / 2)
    check.shape("by_agent: holds", holds, (*holds.shape[:-1], k * (k + 1) // 2))
    pairs, good = holds[..., :-k], holds[..., -k:].copy()
    for each, (i, j) in enumerate(zip(*np.triu_indices(k, 1), strict=True)):
        good[..., i] &= pairs[..., each]
        good[..., j] &= pairs[..., each]
    return good
