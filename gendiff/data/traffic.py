"""Scenes of traffic: up to twelve vehicles in a window of 100 m, and the drivable area around them.

Coordinates are in the frame of the window: metres from its centre, turned by the heading of a vehicle.  Maps, not
scenes, are split into training, validation and test sets, because scenes of one map are alike.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage
from tqdm import tqdm

from gendiff import check, command, distributed
from gendiff.data import DataError, files, regular, sumo
from gendiff.oracles import traffic as oracle
from gendiff.oracles.drivable import signed_distance
from gendiff.training import capacity, padded

T = TypeVar("T")
VEHICLES = 12
HALF = 50.0
"""Half the width of a window, in metres."""
CELLS = 128
"""Cells of a scene's map along each side."""
FINE = 0.25
"""Metres per cell of the grid for computing distances."""
REACH = 20.0
"""Distances are clipped to +-REACH metres."""
Split: TypeAlias = Literal["train", "validation", "test"]
SCENES = "the scenes of a map"
EMBEDDED = Path(__file__).with_name("traffic_smoke.npz")
"""The small data set in the package."""
SMOKE = 240
"""Scenes of the small data set, before leaving out scenes that its coarse map makes invalid."""
SMOKE_MOST = 12
"""Scenes per map of the small data set at most, so that they come from about 20 maps."""
SMOKE_CELLS = CELLS // 2
QUANTUM = REACH / 127
"""Metres per quantisation step of the small data set's distances, which have 8 bits."""


class Scenes(NamedTuple):
    """Scenes in the frames of their windows."""

    vehicles: Float[np.ndarray, "s 12 7"]
    """x, y, length, width in metres, cos and sin of the yaw, speed in m/s; zeros in rows without a vehicle."""
    present: Bool[np.ndarray, "s 12"]
    """True for rows with a vehicle."""
    distance: Float[np.ndarray, "s cells cells"]
    """Metres to the edge of the drivable area, negative inside; see `gendiff.oracles.drivable`."""
    window: Float[np.ndarray, "s 3"]
    """Centre x, y in metres and angle of the window's x axis in radians, in the map's frame."""
    world: Int[np.ndarray, " s"]
    """Number of the map."""


class Cut(NamedTuple):
    """Parameters of the windows."""

    half: float = HALF
    """Half the width of a window, in metres."""
    cells: int = CELLS
    """Cells of the map along a side."""
    least: int = VEHICLES
    """Least number of vehicles in a window; a scene keeps the 12 nearest to the centre."""
    most: int = 40
    """Largest number of vehicles in a window."""
    near: float = 25.0
    """Largest distance of a window's centre from the place's focus, or from a vehicle, along x and y, in metres."""
    tolerance: float = 0.3
    """Metres that a vehicle may stand off the drivable area."""


def _checked(how: Cut, seed: int = 0) -> None:
    """Check the parameters of windows, and the seed of their places.

    Raises:
      ValueError: a number is out of range.
    """
    check.number("traffic: half", how.half, above=0)
    check.number("traffic: cells", how.cells, at_least=1, whole=True)
    check.number("traffic: least", how.least, at_least=1, whole=True)
    check.number("traffic: most", how.most, at_least=how.least, whole=True)
    check.number("traffic: near", how.near, at_least=0)
    check.number("traffic: tolerance", how.tolerance)
    check.number("traffic: seed", seed, at_least=0, whole=True)


def cut(place: sumo.World, number: int, seed: int, how: Cut = Cut()) -> Scenes:  # noqa: B008 (immutable)
    """Cut the windows of a place, and leave out invalid scenes (`valid`), because simulators make a few.

    Raises:
      ValueError: the place has no drivable area.
    """
    scenes = windows(place, number, seed, how)
    return take(scenes, valid(scenes, how))


def windows(place: sumo.World, number: int, seed: int, how: Cut = Cut()) -> Scenes:  # noqa: B008 (immutable)
    """Cut windows from all moments of a place: one per moment at a focus, else windows without common vehicles.

    Args:
      place: the drivable area and the moments.
      number: number of the map, >= 0.
      seed: seed of the windows' places, >= 0.
      how: parameters of the windows.

    Raises:
      ValueError: the place has no drivable area, or a number is out of range.
    """
    _checked(how, seed)
    check.number("traffic: number of the map", number, at_least=0, whole=True)
    if place.drivable.is_empty:
        raise ValueError(f"traffic: map {number} must have a drivable area, got an empty one")
    rng = np.random.default_rng((seed, number))
    found = [scene for moment in place.moments for scene in _windows(place, moment.vehicles, rng, how)]
    if not found:
        return empty(how)
    vehicles, present, window = (np.stack(part) for part in zip(*found, strict=True))
    distance = distances(place.drivable, window, how.half, how.cells)
    world = np.full(len(window), number)
    return Scenes(vehicles.astype(np.float32), present, distance, window.astype(np.float32), world)


def empty(how: Cut = Cut()) -> Scenes:  # noqa: B008 (immutable)
    """Return arrays of zero scenes.

    Raises:
      ValueError: a number is out of range.
    """
    _checked(how)
    shapes = {
        "vehicles": (VEHICLES, 7),
        "present": (VEHICLES,),
        "distance": (how.cells,) * 2,
        "window": (3,),
        "world": (),
    }
    kinds = {"present": bool, "distance": np.float16, "world": int}
    return Scenes(**{name: np.zeros((0, *shape), kinds.get(name, np.float32)) for name, shape in shapes.items()})


def take(scenes: T, which: Any) -> T:
    """Select scenes, or rows of another tree of arrays, by numbers, a slice or a mask."""
    return jax.tree.map(lambda part: part[which], scenes)


def joined(parts: Sequence[Scenes]) -> Scenes:
    """Concatenate several sets of scenes."""
    return Scenes(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def valid(scenes: Scenes, how: Cut = Cut()) -> Bool[np.ndarray, " s"]:  # noqa: B008 (immutable)
    """Return True for scenes without an overlap and without a vehicle off the drivable area.

    Raises:
      ValueError: arrays differ in their number of scenes, or a number is out of range.
    """
    _checked(how)
    check.rows("traffic: scenes", scenes)
    n = len(scenes.world)
    parts = scenes.vehicles, scenes.present, scenes.distance
    # Pad, so that maps with different numbers of scenes share the compiled program.
    good = _valid(how.half, how.tolerance, *(padded(part, capacity(n, 128)) for part in parts))
    return np.asarray(good)[:n]


@jax.jit
def _valid(half: float, tolerance: float, vehicles: Array, present: Array, distance: Array) -> Bool[Array, " s"]:
    check = partial(oracle.infractions, half=half, tolerance=tolerance)
    found = jax.vmap(check)(vehicles, present, distance.astype(jnp.float32))
    return ~jnp.any(found.collides | found.off_road, -1)


def _windows(
    place: sumo.World, vehicles: np.ndarray, rng: np.random.Generator, how: Cut
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield vehicles, presence and window of the scenes of a moment."""
    if len(vehicles) < how.least:
        return
    seen = np.zeros(len(vehicles), bool)
    for i in rng.permutation(len(vehicles)):
        if seen[i]:
            continue
        shift = rng.uniform(-how.near, how.near, 2)
        ahead = vehicles[i, 4:6]
        if place.focus is None:
            centre = vehicles[i, :2] + shift
        else:  # near the junction instead of its queues, turned by the heading of a near vehicle
            centre = np.asarray(place.focus) + shift
            near = np.flatnonzero(np.linalg.norm(vehicles[:, :2] - place.focus, axis=1) < how.half)
            if len(near):
                ahead = vehicles[rng.choice(near), 4:6]
        local = _moved(vehicles, centre, ahead)
        inside = np.flatnonzero(_reach(local) < how.half - 0.5)
        if how.least <= len(inside) <= how.most and not seen[inside].any():
            seen[inside] = True
            nearest = inside[np.argsort(np.linalg.norm(local[inside, :2], axis=1), kind="stable")[:VEHICLES]]
            scene = np.zeros((VEHICLES, 7))
            scene[: len(nearest)] = local[nearest]
            yield scene, np.arange(VEHICLES) < len(nearest), np.array([*centre, np.arctan2(ahead[1], ahead[0])])
        if place.focus is not None:
            return


def _moved(vehicles: np.ndarray, centre: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Transform vehicles to the frame of a window with its origin at `centre` and its x axis along `ahead`."""
    cos, sin = ahead
    turn = np.array([[cos, -sin], [sin, cos]])
    moved = vehicles.copy()
    moved[:, :2] = (vehicles[:, :2] - centre) @ turn
    moved[:, 4:6] = vehicles[:, 4:6] @ turn
    return moved


def _reach(vehicles: np.ndarray) -> np.ndarray:
    """Return the largest |x| or |y| of a vehicle's corners."""
    length, width, heading = vehicles[:, 2:3], vehicles[:, 3:4], np.abs(vehicles[:, 4:6])
    return (np.abs(vehicles[:, :2]) + length / 2 * heading + width / 2 * heading[:, ::-1]).max(1)


def distances(
    drivable: Any, window: Float[np.ndarray, "s 3"], half: float = HALF, cells: int = CELLS
) -> Float[np.ndarray, "s cells cells"]:
    """Return the signed distance, clipped to +-REACH metres, on the grids of windows.

    The windows interpolate one grid of FINE cells below them.  Windows that are far apart get separate grids.

    Args:
      drivable: a shapely geometry.
      window: centres x, y in metres and angles in radians, in the map's frame.
      half: half the width of a window, in metres.
      cells: cells of a window along a side.

    Raises:
      ValueError: a window is not finite, or a number is out of range.
    """
    import shapely

    check.shape("traffic: window", window, (None, 3))
    check.number("traffic: window", window)
    _checked(Cut(half, cells))
    if not len(window):
        return np.empty((0, cells, cells), np.float16)
    margin = half * np.sqrt(2) + REACH
    low, high = window[:, :2].min(0) - margin, window[:, :2].max(0) + margin
    if (high - low).max() > 400 and len(window) > 1:
        order = np.argsort(window[:, np.argmax(high - low)], kind="stable")
        first, second = np.array_split(order, 2)
        out = np.empty((len(window), cells, cells), np.float16)
        for part in (first, second):
            out[part] = distances(drivable, window[part], half, cells)
        return out
    x, y = (np.arange(start, end, FINE) + FINE / 2 for start, end in zip(low, high, strict=True))
    shapely.prepare(drivable)
    on = shapely.contains_xy(drivable, *np.meshgrid(x, y))
    field = signed_distance(on, FINE).clip(-REACH, REACH) if on.any() else np.full(on.shape, REACH)
    place = (np.arange(cells) + 0.5) / cells * 2 * half - half
    across, along = np.meshgrid(place, place, indexing="ij")
    out = np.empty((len(window), cells, cells), np.float16)
    for i, (cx, cy, angle) in enumerate(window):
        cos, sin = np.cos(angle), np.sin(angle)
        at = cx + cos * along - sin * across, cy + sin * along + cos * across
        rows, columns = ((position - axis[0]) / FINE for position, axis in zip(at[::-1], (y, x), strict=True))
        out[i] = ndimage.map_coordinates(field, [rows, columns], order=1, mode="nearest")
    return out


# Generating and storing.


class Recipe(NamedTuple):
    """Parameters of a data set, except its number of scenes."""

    seed: int = 0
    kinds: tuple[sumo.Kind, ...] = ("junction", "junction", "roundabout")
    """Kinds of maps 0, 1, .., repeated."""
    seconds: float = 450.0
    """Simulated seconds per map, with the warm-up; more seconds give more scenes, which are more alike."""
    least_scenes: int = 16
    """Leave out a map with fewer scenes, because one of its arms is starved."""
    cut: Cut = Cut()


LONG = Recipe(seconds=900.0, least_scenes=30)
"""About a hundred scenes per map, for the package's scenes and for the data set of TFDS."""


def of_map(recipe: Recipe, number: int, scratch: Path | None = None) -> Scenes:
    """Simulate the scenes of map `number`; return zero scenes if they are fewer than `least_scenes`.

    Args:
      recipe: parameters of the data set.
      number: number of the map, >= 0.
      scratch: folder for temporary files; default: the system's temporary folder.

    Raises:
      sumo.SumoError: SUMO is not installed, or fails.
    """
    kind = recipe.kinds[number % len(recipe.kinds)]
    seed = int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0] % 2**31)
    scenes = cut(sumo.simulate(kind, seed, recipe.seconds, scratch=scratch), number, recipe.seed, recipe.cut)
    return scenes if len(scenes.world) >= recipe.least_scenes else empty(recipe.cut)


def split_of(number: int) -> Split:
    """Return the split of a map: of ten maps in a row, one is for validation, one for tests, eight for training."""
    return {8: "validation", 9: "test"}.get(number % 10, "train")  # type: ignore[return-value]


def write(
    folder: Path,
    scenes: int,
    recipe: Recipe = Recipe(),  # noqa: B008 (immutable)
    workers: int | None = None,
    report: Callable[[int], Any] = lambda scenes: None,
    most: int | None = None,
) -> int:
    """Simulate maps 0, 1, .. until they have `scenes` scenes, one file per map; after a kill, the same call resumes.

    Files are written atomically, so a kill loses only unfinished maps.  SUMO is not needed if all maps are stored.

    Args:
      folder: made if it is missing.
      scenes: least number of scenes, >= 1.
      recipe: parameters of the data set.
      workers: number of processes; default: one per core.
      report: called with the number of scenes so far, at least once a second; an error in it ends the workers at once.
      most: count at most this many scenes of a map; its file holds all.

    Returns:
      The number of maps.

    Raises:
      ValueError: the folder holds other scenes, or too many maps in a row are left out.
      sumo.SumoError: SUMO is not installed, or fails.
    """
    for name, number in (("scenes", scenes), ("most", most), ("workers", workers)):
        if number is not None:
            check.number(f"traffic: {name}", number, at_least=1, whole=True)
    check.number("traffic: seed", recipe.seed, at_least=0, whole=True)
    check.number("traffic: seconds", recipe.seconds, above=0, at_most=MOST_SECONDS)
    check.number("traffic: least_scenes", recipe.least_scenes, at_least=0, whole=True)
    folder.mkdir(parents=True, exist_ok=True)
    wanted, found_recipe = _as_json(recipe), recipe_of(folder)
    if found_recipe is None:
        files.store_text(folder / RECIPE, json.dumps(wanted, indent=1))
    elif differ := {key: value for key, value in _as_json(found_recipe).items() if value != wanted[key]}:
        raise ValueError(f"traffic: {folder} must hold scenes of {wanted}, got {differ}: name another folder")
    workers = workers or os.cpu_count() or 1
    have = maps = barren = 0
    with _scratch(folder) as scratch, _pool(workers) as pool:
        pending: dict[int, Future] = {}
        for number in count():
            if number in pending or not _file(folder, number).exists():
                for ahead in range(number, number + 2 * workers):
                    if ahead not in pending and not _file(folder, ahead).exists():
                        with command.shielded():  # because `submit` may start a worker
                            pending[ahead] = pool.submit(_make, folder, recipe, ahead, scratch)
            if number in pending:
                making = pending.pop(number)
                while not wait([making], 0.5).done:
                    report(have)
                try:
                    making.result()
                except BrokenProcessPool:
                    report(have)
                    raise sumo.SumoError(
                        "traffic: a worker was killed, perhaps because memory ran out: take fewer workers than "
                        f"{workers}; the same command resumes after the finished maps"
                    ) from None
            found = counted(folder, number, most)
            have, maps, barren = have + found, number + 1, 0 if found else barren + 1
            report(have)
            if have >= scenes:
                return maps
            if barren == BARREN:
                raise ValueError(
                    f"traffic: maps must have {recipe.least_scenes} scenes or more in {recipe.seconds:g} s, "
                    f"got {BARREN} in a row with fewer: simulate longer"
                )
    return maps


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder for temporary files of simulations; remove the folders of killed processes."""
    prefix = f".simulating-{socket.gethostname()}-"
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        if not _runs(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    own = folder / f"{prefix}{os.getpid()}"
    own.mkdir(exist_ok=True)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _runs(process: str) -> bool:
    """Return False if this machine surely has no process of this number besides this one."""
    if sys.platform == "win32" or not process.isdecimal():  # on Windows `os.kill` would end the process
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return int(process) != os.getpid()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield worker processes, which end with this process, and at once after an error."""
    context = multiprocessing.get_context("spawn")
    closed, open_end = context.Pipe(duplex=False)  # only this process holds the open end
    pool = ProcessPoolExecutor(workers, context, initializer=command.end_with, initargs=(closed.recv_bytes,))
    try:
        yield pool
    except BaseException:
        open_end.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        open_end.close()
        closed.close()


MOST_SECONDS = 1e6
"""Largest number of simulated seconds."""
RECIPE = "recipe.json"
BARREN = 60
"""Left-out maps in a row that end with an error.  Of 682 maps 180 were left out, at most 4 in a row."""


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(recipe._asdict() | {"cut": recipe.cut._asdict()}))


def recipe_of(folder: Path) -> Recipe | None:
    """Read the recipe of the scenes in a folder; None if the folder has no recipe.

    Raises:
      ValueError: the file is damaged.
    """
    path = folder / RECIPE
    if not path.exists():
        return None
    try:
        fields = json.loads(regular(path).read_text())
        return Recipe(**fields | {"kinds": tuple(fields["kinds"]), "cut": Cut(**fields["cut"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold a recipe of scenes, got a damaged file ({error!r})") from None


def _make(folder: Path, recipe: Recipe, number: int, scratch: Path) -> None:
    scenes = of_map(recipe, number, scratch)
    files.store(_file(folder, number), lambda file: np.savez_compressed(file, **scenes._asdict()))


def _file(folder: Path, number: int) -> Path:
    return folder / f"map-{number:06d}.npz"


def counted(folder: Path, number: int, most: int | None = None) -> int:
    """Return the number of scenes of `stored`."""
    n = len(files.load(regular(_file(folder, number)), SCENES, "world")[0])
    return n if most is None else min(n, most)


def stored(folder: Path, number: int, most: int | None = None) -> Scenes:
    """Read the scenes of map `number` in the order of time, at most `most` of them, evenly spread.

    Raises:
      ValueError: the file is missing or damaged.
    """
    scenes = Scenes(*files.load(regular(_file(folder, number)), SCENES, *Scenes._fields))
    try:
        check.rows(f"{_file(folder, number)}: arrays", scenes)
    except ValueError as error:
        raise DataError(str(error)) from None
    return spread(scenes, most)


def spread(scenes: Scenes, most: int | None) -> Scenes:
    """Keep at most `most` scenes, evenly spread; None keeps all.

    Raises:
      ValueError: `most` is below 1.
    """
    if most is not None:
        check.number("traffic: most", most, at_least=1, whole=True)
    n = len(scenes.world)
    return scenes if most is None or n <= most else take(scenes, np.arange(most) * n // most)


def read(folder: Path, split: Split | None = None, scenes: int | None = None, most: int | None = None) -> Scenes:
    """Read the scenes of a split, or of all maps, in order.

    Args:
      folder: folder of `write`.
      split: None for all maps.
      scenes: use only this many scenes, the first of the folder; None for all.
      most: scenes per map at most, evenly spread.

    Raises:
      ValueError: the folder has too few scenes or none of the split, or a number is out of range.
    """
    if scenes is not None:
        check.number("traffic: scenes", scenes, at_least=1, whole=True)
    numbers = sorted(int(path.stem.removeprefix("map-")) for path in folder.glob("map-*.npz"))
    if not numbers:
        raise ValueError(
            f"traffic: {folder} must hold files map-000000.npz .., got none: run `python -m gendiff.data.traffic`"
        )
    stored_scenes = joined([stored(folder, number, most) for number in numbers])
    if scenes is not None:
        if len(stored_scenes.world) < scenes:
            raise ValueError(f"traffic: {folder} must hold {scenes} scenes, got {len(stored_scenes.world)}")
        stored_scenes = take(stored_scenes, slice(scenes))
    found = of_split(stored_scenes, split)
    if not len(found.world):
        raise DataError(
            f"traffic: {folder}: maps of {split} must have scenes, got none; {len(numbers)} maps are too few"
        )
    return found


def of_split(scenes: Scenes, split: Split | None) -> Scenes:
    """Select the scenes of a split; None selects all.

    Raises:
      ValueError: the split is unknown.
    """
    if split is None:
        return scenes
    check.choice("traffic: split", split, get_args(Split))
    return take(scenes, [split_of(int(number)) == split for number in scenes.world])


# The data set in the package.


def embedded(split: Split | None = None) -> Scenes:
    """Read a few hundred scenes of about 20 maps, for short runs without SUMO; distances have 64 x 64 cells.

    Distances are rounded to multiples of `QUANTUM`, so they err by at most 0.08 m.  `valid(.., Cut(cells=64))` is True
    for all scenes.  `python -m gendiff.data.traffic FOLDER --embed gendiff/data/traffic_smoke.npz` makes the file, with
    the maps in FOLDER.

    Raises:
      ValueError: the file is damaged, or the split is unknown.
    """
    vehicles, present, steps, window, world = files.load(EMBEDDED, SCENES, *Scenes._fields)
    distance = _metres(np.cumsum(steps, 1, dtype=np.int8))
    return of_split(Scenes(vehicles, present, distance, window, world.astype(int)), split)


def embed(
    folder: Path, path: Path, workers: int | None = None, report: Callable[[int], Any] = lambda scenes: None
) -> int:
    """Make the file that `embedded` reads, with the maps in `folder`; return its number of scenes.

    Raises:
      ValueError: the folder holds other scenes.
      sumo.SumoError: SUMO is not installed, or fails.
    """
    write(folder, SMOKE, LONG, workers, report, SMOKE_MOST)
    scenes = read(folder, scenes=SMOKE, most=SMOKE_MOST)
    steps = np.rint(halved(scenes.distance) / QUANTUM).astype(np.int8)
    scenes = scenes._replace(distance=_metres(steps), world=scenes.world.astype(np.int16))
    keep = valid(scenes, Cut(cells=SMOKE_CELLS))
    # Store differences along y, modulo 256, because they compress to two thirds of the size.
    scenes = scenes._replace(distance=np.diff(steps, axis=1, prepend=np.int8(0)))
    kept, version = take(scenes, keep)._asdict(), importlib.metadata.version("libsumo")
    files.store(path, lambda file: np.savez_compressed(file, **kept, sumo=version))
    return int(keep.sum())


def halved(distance: Float[np.ndarray, "s 2*n 2*n"]) -> Float[np.ndarray, "s n n"]:
    """Interpolate distances bilinearly at the centres of cells twice as wide, in float32.

    Raises:
      ValueError: the number of rows or columns is odd.
    """
    check.shape("halved: distance", distance, (None, 2 * (distance.shape[1] // 2), 2 * (distance.shape[2] // 2)))
    s, rows, columns = distance.shape
    return distance.reshape(s, rows // 2, 2, columns // 2, 2).mean((2, 4), dtype=np.float32)


def _metres(steps: np.ndarray) -> np.ndarray:
    return (steps * np.float32(QUANTUM)).astype(np.float16)


def main() -> None:
    """Write scenes from the command line."""
    parser = argparse.ArgumentParser(
        "python -m gendiff.data.traffic", description="Simulate scenes; the same command resumes a stopped run."
    )
    parser.add_argument("folder", type=files.argument)
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=get_args(sumo.Kind), default=Recipe().kinds, help="kinds of the maps, repeated"
    )
    parser.add_argument("--seconds", type=float, default=Recipe().seconds, help="simulated seconds per map")
    parser.add_argument(
        "--least-scenes", type=int, default=Recipe().least_scenes, help="leave out maps with fewer scenes"
    )
    parser.add_argument("--most", type=int, help="count at most this many scenes of a map; default: all")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument(
        "--embed", type=files.argument, metavar="FILE", help="write only the package's small data set, into FILE"
    )
    options = parser.parse_args()
    command.heed()
    with tqdm(total=SMOKE if options.embed else options.scenes, unit=" scenes") as bar:

        def report(have: int) -> None:
            distributed.stop_if_noticed("every map that was finished")
            bar.update(have - bar.n)

        try:
            if options.embed:
                message = f"{options.embed}: {embed(options.folder, options.embed, options.workers, report)} scenes"
            else:
                recipe = Recipe(options.seed, tuple(options.kinds), options.seconds, options.least_scenes)
                maps = write(options.folder, options.scenes, recipe, options.workers, report, options.most)
                message = f"{options.folder}: {maps} maps"
        except (ValueError, OSError, sumo.SumoError) as error:
            parser.error(str(error))
        except distributed.Preempted as error:
            bar.close()
            parser.exit(error.status, f"{error}\n")
    command.say(message)


if __name__ == "__main__":
    main()
