"""Scenes of traffic as a model learns them: their sources, the network's coordinates, verdicts and augmentation."""

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from gendiff import check, distributed
from gendiff.data import commonroad, traffic
from gendiff.data.traffic import HALF, VEHICLES, Cut, Recipe, Scenes, Split
from gendiff.nets.scene_transformer import Place, Units
from gendiff.oracles import traffic as oracle
from gendiff.static import by_value
from gendiff.types import PRNGKey

UNITS = Units((0.0, 0.0, 4.8, 1.9, 0.0, 0.0, 5.0), (25.0, 25.0, 1.2, 0.25, 1.0, 1.0, 5.0), HALF)
"""The network's coordinates, in which scenes have a standard deviation near 1."""
SPLITS: tuple[Split, ...] = get_args(Split)
LEAST = 8
"""Scenes of a split, at least."""
APART = 2**31
"""A child of a key that `split` does not give."""

Example: TypeAlias = tuple[Place, Float[Array, "12 7"]]
"""A scene: its condition, and its vehicles in the network's coordinates."""

# Sources.


def embedded() -> dict[str, Scenes]:
    """Read the splits of the scenes that come with the package."""
    return split(traffic.embedded())


def simulated(
    folder: Path, wanted: int, seed: int = 0, most: int | None = None, own: bool = False
) -> dict[str, Scenes]:
    """Simulate the scenes that the folder lacks, with a bar, and read the splits of the first `wanted` ones.

    Of several processes the first one simulates, and all must see the folder.  A folder of more scenes serves.

    Args:
      most: scenes of a map at most.
      own: take the other parameters from the folder's recipe, if it has one.

    Raises:
      ValueError: the folder holds other scenes; see `traffic.write`.
      sumo.SumoError: SUMO is not installed, or fails.
    """
    recipe = Recipe(seed)
    if own:
        recipe = (traffic.recipe_of(folder) or recipe)._replace(seed=seed)
    with tqdm(total=wanted, desc="scenes", unit=" scenes", disable=not distributed.is_first()) as bar:

        def report(have: int) -> None:
            distributed.stop_if_noticed("every map that was finished")
            bar.update(min(have, wanted) - bar.n)

        distributed.first(lambda: traffic.write(folder, wanted, recipe, report=report, most=most))
    return split(distributed.everywhere(lambda: traffic.read(folder, scenes=wanted, most=most)))


def of_tfds(folder: Path | None, config: str) -> dict[str, Scenes]:
    """Read the splits of a configuration of TFDS's data set; None is ~/tensorflow_datasets.

    Raises:
      ImportError: array_record is not installed.
      ValueError: the data set is missing or damaged.
    """
    from gendiff.data import traffic_tfds  # an extra

    place = Path("~/tensorflow_datasets").expanduser() if folder is None else folder
    return distributed.everywhere(lambda: {name: traffic_tfds.scenes(place, config, name) for name in SPLITS})


def split(scenes: Scenes) -> dict[str, Scenes]:
    """Divide scenes into the splits of their maps."""
    return {name: traffic.of_split(scenes, name) for name in SPLITS}


def recorded(folder: Path | None, cells: int) -> Scenes | None:
    """Cut scenes of 4 vehicles or more from recordings (`commonroad`); None if there is no folder.

    Args:
      folder: default: `commonroad` in $GENDIFF_DATA, if it is there.
      cells: cells of a map along a side.

    Raises:
      ValueError: the folder holds no scenes, or they cannot be read.
      ImportError: shapely is not installed.
    """
    if folder is None and os.environ.get("GENDIFF_DATA"):
        default = Path(os.environ["GENDIFF_DATA"]) / "commonroad"
        folder = default if default.is_dir() else None
    return None if folder is None else commonroad.scenes(folder, Cut(least=4, cells=cells))


def nearest(scenes: Scenes, most: int) -> Scenes:
    """Keep the `most` vehicles that are nearest to the centre of their scene, which come first."""
    present = scenes.present & (np.arange(VEHICLES) < most)[None]
    kept = np.where(present[..., None], scenes.vehicles, 0).astype(np.float32)
    return scenes._replace(present=present, vehicles=kept)


def evenly(n: int, of: int) -> Int[np.ndarray, " n"]:
    """Return n rows of `of`, all equally often; the rest lies evenly from the first to the last row."""
    rest = n % of
    return np.concatenate([np.arange(n - rest) % of, np.arange(rest) * of // max(rest, 1)])


def fingerprint(splits: Mapping[str, Scenes]) -> dict[str, np.ndarray]:
    """Return a checksum of the vehicles and maps of each split."""
    checksum = lambda part: zlib.crc32(part.distance.tobytes(), zlib.crc32(part.vehicles.tobytes()))
    return {name: np.asarray(checksum(part)) for name, part in splits.items()}


# As networks see them.


def place(scenes: Scenes) -> Place:
    """Return the condition of each scene: its map, and which vehicles it has."""
    told: Any = scenes.distance, scenes.present
    return Place(*told)


def normalised(scenes: Scenes) -> Float[np.ndarray, "s 12 7"]:
    """Return the vehicles in the network's coordinates."""
    return np.asarray(UNITS.normalised(jnp.asarray(scenes.vehicles), jnp.asarray(scenes.present)))


def metres(samples: Float[np.ndarray, "n 12 7"]) -> Float[np.ndarray, "n 12 7"]:
    """Return samples in metres."""
    return np.asarray(UNITS.metres(jnp.asarray(samples)))


class Sets(NamedTuple):
    """Scenes by split ("train", "validation", "test", perhaps "recorded"), and what networks are told of them."""

    scenes: Mapping[str, Scenes]
    places: Mapping[str, Place]
    x: Mapping[str, Float[np.ndarray, "s 12 7"]]
    conditions: Place
    """The training maps, on the device."""


def sets(splits: Mapping[str, Scenes], vehicles: int) -> Sets:
    """Prepare scenes for a network, with at most so many vehicles.

    Raises:
      ValueError: a split has fewer than LEAST scenes.
    """
    for name in SPLITS:
        if (count := len(splits[name].world)) < LEAST:
            raise ValueError(f"scenes: {name} must have {LEAST} scenes or more, got {count}: take more scenes")
    kept = {name: nearest(part, vehicles) for name, part in splits.items()}
    places = {name: place(part) for name, part in kept.items()}
    conditions = jax.tree.map(jnp.asarray, places["train"])
    return Sets(kept, places, {name: normalised(part) for name, part in kept.items()}, conditions)


def infractions(samples: Float[Array, "n 12 7"], places: Place) -> oracle.Infractions:
    """Find what is wrong with samples, in the network's coordinates; what is not finite is off the road."""
    return oracle.of_scenes(samples, places.present, places.distance, HALF, UNITS.metres)


def constraints(samples: Float[Array, "n 12 7"], places: Place) -> Bool[np.ndarray, "n 78"]:
    """The oracle of samples: which constraints they keep."""
    return np.asarray(oracle.constraints(infractions(samples, places)))


# Augmentation.


@by_value
def changed(fewer: float, quarters: bool = False) -> Callable[[PRNGKey, Example], Example]:
    """Thin out a scene with a probability of `fewer`, and turn it by random quarter turns if `quarters` is True."""
    check.number("changed: fewer", fewer, at_least=0, at_most=1)

    def change(key: PRNGKey, scene: Example) -> Example:
        place, x = scene
        if quarters:
            turns = jax.random.randint(jax.random.fold_in(key, APART), (), 0, 4)
            x, distance = turned(turns, x, place.distance)
            place = place._replace(distance=distance)
        present = thinned(key, place.present, fewer)
        return place._replace(present=present), jnp.where(present[:, None], x, 0.0)

    return change


def turned(
    quarters: Int[Array, ""], x: Float[Array, "12 7"], distance: Float[Array, "c c"]
) -> tuple[Float[Array, "12 7"], Float[Array, "c c"]]:
    """Turn a scene, in the network's coordinates, and its map by 0 to 3 quarter turns from the x to the y axis."""

    def turn(x: Array, distance: Array) -> tuple[Array, Array]:
        # (x, y) -> (-y, x): UNITS scale both alike, without a shift, and so the cosine and the sine of the heading.
        columns = x[:, 1] * -1, x[:, 0], x[:, 2], x[:, 3], x[:, 5] * -1, x[:, 4], x[:, 6]
        return jnp.stack(columns, -1), jnp.flip(distance, 0).T

    scenes = [(x, distance)]
    for _ in range(3):
        scenes.append(turn(*scenes[-1]))
    return jax.lax.switch(quarters, [lambda scene=scene: scene for scene in scenes])


def thinned(key: PRNGKey, present: Bool[Array, " k"], share: float) -> Bool[Array, " k"]:
    """Keep, with a probability of `share`, only some of the vehicles, one to all of them, chosen at random."""
    choice_key, count_key, order_key = jax.random.split(key, 3)
    all_of_them = jnp.sum(present)
    count = jax.random.randint(count_key, (), 1, all_of_them + 1)
    count = jnp.where(jax.random.uniform(choice_key) < share, count, all_of_them)
    order = jnp.where(present, jax.random.uniform(order_key, present.shape), 2.0)
    return present & (jnp.argsort(jnp.argsort(order)) < count)
