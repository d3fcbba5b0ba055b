"""Infractions in a scene of traffic: overlapping vehicles, and vehicles off the drivable area."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff import check
from gendiff.oracles import boxes, drivable
from gendiff.types import wide


class Infractions(NamedTuple):
    """Infractions of a scene, or of many scenes along leading axes."""

    pairs: Bool[Array, "*s k k"]
    """True for pairs of vehicles that overlap."""
    collides: Bool[Array, "*s k"]
    """True for vehicles that overlap another vehicle."""
    off_road: Bool[Array, "*s k"]
    """True for vehicles off the drivable area."""
    degenerate: Bool[Array, "*s k"]
    """True for vehicles without positive extents or a heading; the other oracles see them mended."""


def infractions(
    vehicles: Float[Array, "k f"],
    present: Bool[Array, " k"],
    distance: Float[Array, "h w"],
    half: float,
    tolerance: float = drivable.TOLERANCE,
) -> Infractions:
    """Find all infractions of a scene.

    Args:
      vehicles: x, y, length, width in metres, cos and sin of the yaw; further columns are ignored.
      present: True for rows with a vehicle.
      distance: signed distance to the edge of the drivable area, for x and y in [-half, half].
      half: half the width of the map, in metres.
      tolerance: metres that a vehicle may stand off the drivable area.

    Raises:
      ValueError: see `boxes.collisions` and `drivable.off_road`.
    """
    vehicles = wide(vehicles)
    shapes = boxes.mended(vehicles[:, :6])
    pairs = boxes.collisions(shapes, present)
    off = drivable.off_road(distance, shapes, half, present, tolerance)
    return Infractions(pairs, jnp.any(pairs, -1), off, boxes.degenerate(vehicles[:, :6]) & present)


def constraints(found: Infractions) -> Bool[Array, "*s m"]:
    """Return m = k (k - 1) / 2 + k constraints, True if they hold.

    First come the pairs i < j, in the order of `numpy.triu_indices`: True if they do not overlap.  Then come the
    vehicles: True if they are on the drivable area.
    """
    rows, columns = np.triu_indices(found.collides.shape[-1], 1)
    return jnp.concatenate([~found.pairs[..., rows, columns], ~found.off_road], -1)


def by_agent(holds: Bool[np.ndarray, "*s m"]) -> Bool[np.ndarray, "*s k"]:
    """Return True for vehicles that break no constraint; an overlap counts against both vehicles.

    Raises:
      ValueError: m is not k (k + 1) / 2 for any k.
    """
    holds = np.asarray(holds)
    k = round((np.sqrt(1 + 8 * holds.shape[-1]) - 1) / 2)
    check.shape("by_agent: holds", holds, (*holds.shape[:-1], k * (k + 1) // 2))
    pairs, good = holds[..., :-k], holds[..., -k:].copy()
    for pair, (i, j) in enumerate(zip(*np.triu_indices(k, 1), strict=True)):
        good[..., i] &= pairs[..., pair]
        good[..., j] &= pairs[..., pair]
    return good
