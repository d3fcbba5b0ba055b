"""Infractions in a scene of traffic: overlapping vehicles, and vehicles off the drivable area."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff import check, distributed
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
      distance: signed distance to the edge of the drivable area, for x and y in [-half, half].
      half: half the width of the map, in metres.
      tolerance: metres that a vehicle may stand off the drivable area.
    """
    vehicles = wide(vehicles)
    shapes = boxes.mended(vehicles[:, :6])
    pairs = boxes.collisions(shapes, present)
    off = drivable.off_road(distance, shapes, half, present, tolerance)
    return Infractions(pairs, jnp.any(pairs, -1), off, boxes.degenerate(vehicles[:, :6]) & present)


@partial(jax.jit, static_argnames=("half", "metres", "chunk", "mesh"))
def of_scenes(
    vehicles: Float[Array, "n k f"],
    present: Bool[Array, "n k"],
    distance: Float[Array, "n h w"],
    half: float,
    metres: Callable[[Array], Array] | None = None,
    chunk: int = 256,
    mesh: jax.sharding.Mesh | None = None,
) -> Infractions:
    """Find the infractions of many scenes, `chunk` at a time and device.

    Args:
      metres: turns vehicles in other coordinates, such as a network's, to metres.
    """

    def of_scene(scene: tuple[Array, Array, Array]) -> Infractions:
        vehicles, present, distance = scene
        own = vehicles if metres is None else metres(vehicles)
        return infractions(own, present, distance.astype(jnp.float32), half)

    return distributed.chunked(of_scene, (jnp.asarray(vehicles), present, distance), chunk, mesh)


def constraints(of_scene: Infractions) -> Bool[Array, "*s m"]:
    """Return m = k (k - 1) / 2 + k constraints, True if they hold.

    First come the pairs i < j, in the order of `numpy.triu_indices`: True if they do not overlap.  Then come the
    vehicles: True if they are on the drivable area.
    """
    rows, columns = np.triu_indices(of_scene.collides.shape[-1], 1)
    return jnp.concatenate([~of_scene.pairs[..., rows, columns], ~of_scene.off_road], -1)


def by_agent(holds: Bool[np.ndarray, "*s m"]) -> Bool[np.ndarray, "*s k"]:
    """Return True for vehicles that break no constraint; an overlap counts against both vehicles.

    Raises:
      ValueError: m is not k (k + 1) / 2 for any k.
    """
    pairs, on_road = parts(holds)
    good = on_road.copy()
    for pair, (i, j) in enumerate(zip(*np.triu_indices(good.shape[-1], 1), strict=True)):
        good[..., i] &= pairs[..., pair]
        good[..., j] &= pairs[..., pair]
    return good


def parts(holds: Bool[np.ndarray, "*s m"]) -> tuple[Bool[np.ndarray, "*s p"], Bool[np.ndarray, "*s k"]]:
    """Return the constraints of pairs, and the constraints of vehicles.

    Raises:
      ValueError: m is not k (k + 1) / 2 for any k.
    """
    holds = np.asarray(holds)
    k = round((np.sqrt(1 + 8 * holds.shape[-1]) - 1) / 2)
    check.shape("by_agent: holds", holds, (*holds.shape[:-1], k * (k + 1) // 2))
    return holds[..., :-k], holds[..., -k:]
