"""Metrics of traffic scenes: rates of infractions, and realism.

Realism is the distance of the marginals of speed, heading and gaps to real marginals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Bool, Float, Int

from gendiff import check
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.oracles import boxes
from gendiff.oracles import traffic as oracle
from gendiff.oracles.drivable import distance_at

LANE = 1.5
"""Largest lateral offset of a vehicle that counts as ahead, in metres."""
PROBE = 1.0
"""Step of the finite differences that give the direction of the road's edge, in metres."""

RATES = ("collision_rate", "offroad_rate", "infraction_rate")
"""Names of the rates of infractions."""
Marginals = dict[str, Float[np.ndarray, " n"]]


def marginals(
    vehicles: Float[np.ndarray, "s k 7"],
    present: Bool[np.ndarray, "s k"],
    distance: Float[np.ndarray, "s c c"],
    half: float,
) -> Marginals:
    """Return the marginals "speed", "heading" and "gap" over all present vehicles of all scenes.

    "speed" is in m/s.  "heading" is the angle in degrees, 0 to 90, to the nearest edge of the drivable area.  "gap" is
    the distance in metres to the next vehicle ahead, negative for an overlap, of vehicles with a vehicle ahead.

    Args:
      vehicles: see `gendiff.data.traffic.Scenes`; present vehicles are finite.
      distance: signed distances to the edge of the drivable area, for x and y in [-half, half].
      half: half the width of the map, in metres.

    Raises:
      ValueError: shapes differ, a present vehicle is not finite, or `half` is not positive.
    """
    vehicles, present, distance = np.asarray(vehicles), np.asarray(present, bool), np.asarray(distance)
    check.shape("marginals: vehicles", vehicles, (None, None, 7))
    check.shape("marginals: present", present, vehicles.shape[:2])
    check.shape("marginals: distance", distance, (len(vehicles), None, None))
    check.number("marginals: vehicles", vehicles[present])
    check.number("marginals: half", half, above=0)
    shapes = boxes.mended(jnp.asarray(vehicles[..., :6]))
    angle = np.asarray(_angles(shapes, jnp.asarray(distance, jnp.float32), half))
    gap = np.asarray(_gaps(shapes, jnp.asarray(present)))
    return {
        "speed": vehicles[..., 6][present].astype(np.float64),
        "heading": angle[present & np.isfinite(angle)].astype(np.float64),
        "gap": gap[np.isfinite(gap)].astype(np.float64),
    }


@jax.jit
def _angles(shapes: Float[Array, "s k 6"], distance: Float[Array, "s c c"], half: float) -> Float[Array, "s k"]:
    def of_scene(shapes: Array, distance: Array) -> Array:
        steps = jnp.array([[PROBE, 0.0], [0.0, PROBE]])
        slopes = [
            distance_at(distance, shapes[:, :2] + step[None], half)
            - distance_at(distance, shapes[:, :2] - step[None], half)
            for step in steps
        ]
        normal = jnp.stack(slopes, -1)
        size = jnp.linalg.norm(normal, axis=-1)
        aligned = jnp.abs(jnp.sum(normal * shapes[:, 4:6], -1)) / jnp.where(size > 0, size, jnp.nan)
        return jnp.degrees(jnp.arcsin(jnp.clip(aligned, 0, 1)))

    return jax.vmap(of_scene)(shapes, distance)


@jax.jit
def _gaps(shapes: Float[Array, "s k 6"], present: Bool[Array, "s k"]) -> Float[Array, "s k"]:
    way = shapes[:, None, :, :2] - shapes[:, :, None, :2]
    cos, sin = shapes[:, :, None, 4], shapes[:, :, None, 5]
    ahead = way[..., 0] * cos + way[..., 1] * sin
    aside = way[..., 1] * cos - way[..., 0] * sin
    length = shapes[..., 2]
    follows = (ahead > 0) & (jnp.abs(aside) < LANE) & present[:, :, None] & present[:, None, :]
    return jnp.min(jnp.where(follows, ahead - (length[:, :, None] + length[:, None, :]) / 2, jnp.inf), -1)


def differences(generated: Marginals, real: Marginals) -> dict[str, float]:
    """Return Wasserstein's distances of the marginals to the real ones, in their units; infinite for an empty one.

    Raises:
      ValueError: a marginal is missing, or a value is not finite.
    """
    if missing := sorted(real.keys() - generated.keys()):
        raise ValueError(f"differences: marginals must hold {', '.join(real)}, got none of {', '.join(missing)}")
    both = {name: (generated[name], real[name]) for name in real}
    for name, pair in both.items():
        check.number(f"differences: {name}", np.concatenate(pair))
    distance = lambda pair: float(scipy.stats.wasserstein_distance(*pair)) if all(map(len, pair)) else np.inf
    return {name: distance(pair) for name, pair in both.items()}


def distances(
    vehicles: Float[np.ndarray, "s k 7"],
    present: Bool[np.ndarray, "s k"],
    distance: Float[np.ndarray, "s c c"],
    half: float,
    real: Marginals,
) -> dict[str, Estimate]:
    """Return "speed_distance", "heading_distance" and "gap_distance" to real marginals, without scenes that are not
    finite."""
    finite = np.isfinite(vehicles).all((1, 2))
    generated = marginals(vehicles[finite], present[finite], distance[finite], half)
    values = differences(generated, real).items()
    return {f"{name}_distance": rates.exact(value, len(generated[name])) for name, value in values}


def infraction_rates(holds: Bool[np.ndarray, "s m"], maps: Int[np.ndarray, " s"]) -> dict[str, Estimate]:
    """Return the shares of scenes with an overlap, with a vehicle off the road, and with either.

    Args:
      holds: the constraints of the scenes (`gendiff.oracles.traffic.constraints`).
      maps: numbers of the scenes' maps; intervals are the bootstrap over maps.
    """
    return {name: rates.clustered(~good, maps) for name, good in zip(RATES, kept(holds), strict=True)}


def kept(holds: Bool[np.ndarray, "s m"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return whether scenes have no overlap, no vehicle off the road, and neither."""
    pairs, on_road = oracle.parts(holds)
    return pairs.all(1), on_road.all(1), np.asarray(holds).all(1)
