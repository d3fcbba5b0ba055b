"""Recorded scenes of traffic, from CommonRoad files (Althoff, Koschi and Manzinger 2017, "CommonRoad: composable
benchmarks for motion planning on roads"): XML of the versions 2018b and 2020a.

Some files hold simulated traffic; their `source` tells.

The vehicles are the dynamic obstacles of the types VEHICLES.  Pedestrians, bicycles, trains and obstacles of unknown
type are left out, and so is what stands for good: parked vehicles and construction.  The vehicle of the planning
problem, which was cut out of the recording, is missing too: the file does not tell its size.

Drivable is the union of the lanelets, but for footways and cycle tracks.  What lies between the lanelets of a junction
is not drivable on these maps.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
from jaxtyping import Float, Int

from gendiff import check
from gendiff.data import DataError, regular, sumo, traffic
from gendiff.data.traffic import Cut, Scenes

VERSIONS = ("2018b", "2020a")
VEHICLES = frozenset({"car", "truck", "bus", "taxi", "priorityVehicle", "motorcycle"})
"""Types of obstacles."""
OTHERS = frozenset({"sidewalk", "crosswalk", "bicycleLane", "border"})
"""Types of lanelets that are not for vehicles."""
EVERY = 2.0
"""Seconds from one moment to the next: most recordings are shorter than 10 s."""


def read_world(path: Path | str, every: float = EVERY) -> sumo.World:
    """The drivable area and the vehicles of a file, in the coordinates of its map.

    Where a value is an interval, or a position a rectangle or a circle, its middle counts.  Speeds are along the
    heading, negative in reverse; missing ones follow from the positions.

    Args:
      path: a file.
      every: seconds from one moment to the next, from the first state on; rounded to steps of the file, one or more.

    Raises:
      ValueError: `every` is not positive.
      DataError: the file is missing, or is no CommonRoad file, or has no lanelets, no vehicles or a damaged value.
      ImportError: shapely is not installed.
    """
    _, world = _recorded(Path(path), every)
    if not world.moments:
        raise DataError(f"commonroad: {path}: expected moving vehicles ({', '.join(sorted(VEHICLES))}), given none")
    return world


def scenes(
    path: Path | str,
    how: Cut = Cut(),  # noqa: B008 (immutable)
    every: float = EVERY,
    seed: int = 0,
    keep_invalid: bool = False,
) -> Scenes:
    """Windows of all moments of a file, or of all files *.xml in a folder and its folders, also behind links.

    Maps are numbered by the names of their places in order, such as USA_US101 of the benchmark USA_US101-26_1_T-1:
    files of one place may show the same road.  Files of a folder without vehicles are maps only, and give no scenes.

    Recorded vehicles may overlap, or leave the lanelets.  Such scenes are left out; to count or to see them:

        found = commonroad.scenes(folder, how, keep_invalid=True)
        left_out = ~traffic.valid(found, how)

    Args:
      path: a file or a folder.
      how: how windows are cut; recordings with 12 vehicles within 100 m are few, so that a `least` below 12 gives more
        scenes, padded.
      every: seconds from one moment to the next; see `read_world`.
      seed: of the places of windows.
      keep_invalid: whether scenes with an overlap, or with a vehicle off the drivable area, are kept.

    Raises:
      ValueError: a number is out of range.
      DataError: there is no such file, or it is damaged (see `read_world`), or there are no scenes.
      ImportError: shapely is not installed.
    """
    path = Path(path)
    files = _xml(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"commonroad: {path}: expected files *.xml, given a folder without")
    recorded = [_recorded(file, every) for file in files]
    names = sorted({name for name, _ in recorded})
    parts = [traffic.windows(world, names.index(name), seed, how) for name, world in recorded]
    found = traffic.joined([traffic.empty(how), *parts])
    if not len(found.world):
        most = max((len(moment.vehicles) for _, world in recorded for moment in world.moments), default=0)
        raise DataError(
            f"commonroad: {path}: expected {how.least} or more vehicles in a window of {2 * how.half:g} m, "
            f"given {most} at most at one moment, on all of a map"
        )
    if keep_invalid:
        return found
    good = traffic.valid(found, how)
    if not good.any():
        raise DataError(
            f"commonroad: {path}: expected valid scenes, given {len(good)} with overlaps or vehicles off the lanelets"
        )
    return traffic.take(found, good)


def _xml(folder: Path) -> list[Path]:
    """Files *.xml in a folder and its folders, each folder once: a link may lead to one above it."""
    found, seen = [], set()
    for name, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # so that the same folder is kept of two that are one
        found += [Path(name) / each for each in names if each.endswith(".xml")]
    return sorted(found)


def _recorded(path: Path, every: float) -> tuple[str, sumo.World]:
    """The name of the file's place, and what was seen there."""
    check.number("commonroad: every", every, above=0)
    with _told(f"commonroad: {path}"):
        root = _root(path)
        # Country and map; C- in front of them stands for cooperative.
        name = (root.get("benchmarkID") or path.stem).removeprefix("C-").split("-")[0]
        return name, sumo.World(_drivable(root), None, _moments(root, every))


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


# Lanelets.


def _drivable(root: Element) -> Any:
    """The union of the lanelets for vehicles, without seams."""
    try:
        import shapely
    except ImportError:
        raise ImportError("commonroad: expected shapely, given none: pip install 'gendiff[traffic]'") from None
    # A lanelet whose bounds cross, as happens where it is pinched off, is made two that touch.
    lanelets = root.findall("lanelet")
    parts = [shapely.make_valid(shapely.Polygon(_lanelet(each))) for each in lanelets if _for_vehicles(each)]
    area = shapely.union_all(parts).buffer(0.15).buffer(-0.15)
    if area.is_empty:
        raise ValueError(f"expected lanelets for vehicles, with an area, given none among {len(lanelets)}")
    return area


def _for_vehicles(lanelet: Element) -> bool:
    types, one_way, both_ways = (_texts(lanelet, name) for name in ("laneletType", "userOneWay", "userBidirectional"))
    users = one_way | both_ways
    return not types & OTHERS and (not users or bool(users & {*VEHICLES, "vehicle"}))


def _lanelet(lanelet: Element) -> list[tuple[float, float]]:
    with _told(f"lanelet {lanelet.get('id')}"):
        left, right = ([_point(each) for each in lanelet.iterfind(f"{side}Bound/point")] for side in ("left", "right"))
        if min(len(left), len(right)) < 2:
            raise ValueError(f"expected bounds of 2 points or more, given {len(left)} and {len(right)}")
        return [*left, *reversed(right)]


# Vehicles.


def _moments(root: Element, every: float) -> list[sumo.Moment]:
    seconds = _number(root.get("timeStepSize"), "timeStepSize")
    if seconds <= 0:
        raise ValueError(f"expected a positive timeStepSize, given {seconds:g}")
    dynamic = [each for each in root.iterfind("obstacle") if "dynamic" in _texts(each, "role")]  # 2018b
    dynamic += root.iterfind("dynamicObstacle")  # 2020a
    tracks = [_track(each, seconds) for each in dynamic if _texts(each, "type") & VEHICLES]
    if not tracks:
        return []
    steps, vehicles = (np.concatenate(part) for part in zip(*tracks, strict=True))
    stride = max(1, round(every / seconds))
    kept = [step for step in np.unique(steps) if (step - steps.min()) % stride == 0]
    return [sumo.Moment(float(step * seconds), vehicles[steps == step]) for step in kept]


def _track(obstacle: Element, seconds: float) -> tuple[Int[np.ndarray, " t"], Float[np.ndarray, "t 7"]]:
    """Steps, and the vehicle at each of them."""
    with _told(f"obstacle {obstacle.get('id')}"):
        length, width, ahead, aside, turn = _rectangle(obstacle)
        # Some trajectories begin with the initial state.
        every = [*obstacle.iterfind("initialState"), *obstacle.iterfind("trajectory/state")]
        states = {_time(each): each for each in every}
        if not states:
            raise ValueError("expected an initialState or a trajectory, given none")
        steps = np.array(sorted(states))
        x, y, yaw, speed = np.array([_state(states[step]) for step in steps]).T
        x, y = x + ahead * np.cos(yaw) - aside * np.sin(yaw), y + ahead * np.sin(yaw) + aside * np.cos(yaw)
        cos, sin = np.cos(yaw + turn), np.sin(yaw + turn)
        if np.isnan(speed).any():
            if len(steps) == 1:
                raise ValueError("expected a velocity, or two states, given none")
            velocity = np.gradient(np.stack([x, y]), steps * seconds, axis=1)
            speed = np.where(np.isnan(speed), velocity[0] * cos + velocity[1] * sin, speed)
        size = np.full((len(steps), 2), (length, width))
        return steps, np.column_stack([x, y, size, cos, sin, speed])


def _rectangle(obstacle: Element) -> tuple[float, float, float, float, float]:
    """Length and width; how far ahead and aside of the obstacle's position the centre is; how far it is turned."""
    shape = _only(obstacle, "shape", "rectangle")
    given = lambda name, default=None: _number(shape.findtext(name, default), name)
    length, width = given("length"), given("width")
    if min(length, width) <= 0:
        raise ValueError(f"expected a positive length and width, given {length:g} and {width:g}")
    ahead = given("center/x", "0") - given("originXShift", "0")  # the shift is the position's, seen from the centre
    return length, width, ahead, given("center/y", "0"), given("orientation", "0")


def _time(state: Element) -> int:
    time = _middle(state, "time")
    if time % 1 or not 0 <= time < 2**53:
        raise ValueError(f"expected a whole number of steps as time, given {time:g}")
    return int(time)


def _state(state: Element) -> tuple[float, float, float, float]:
    """x, y, yaw and speed, NaN where it is missing."""
    with _told(f"step {_time(state)}"):
        place = _only(state, "position", "point", "rectangle", "circle")
        x, y = _point(place if place.tag == "point" else place.find("center"))
        speed = np.nan if state.find("velocity") is None else _middle(state, "velocity")
        return x, y, _middle(state, "orientation", period=2 * np.pi), speed


# XML.


def _root(path: Path) -> Element:
    """The root of a file.  One that declares entities, which may stand for gigabytes, is refused."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = _refused
    try:
        with regular(path).open("rb") as file:
            parser.ParseFile(file)
    except OSError as error:
        raise ValueError(f"expected a file, given none that can be read ({error.strerror})") from None
    except expat.ExpatError as error:
        raise ValueError(f"expected CommonRoad's XML, given a file that is not XML ({error})") from None
    root = builder.close()
    if root.tag != "commonRoad":
        raise ValueError(f"expected CommonRoad's XML, given <{root.tag}>")
    if (version := root.get("commonRoadVersion")) not in VERSIONS:
        raise ValueError(f"expected CommonRoad's version {' or '.join(VERSIONS)}, given {version or 'none'}")
    return root


def _refused(name: str, *_: Any) -> None:
    raise ValueError(f"expected XML without entities, given the entity {name!r}")


def _texts(element: Element, name: str) -> set[str]:
    return {(each.text or "").strip() for each in element.iterfind(name)}


def _only(element: Element, name: str, *tags: str) -> Element:
    """What is in the element's child, one of `tags` and alone there."""
    found = element.findall(f"{name}/*")
    if len(found) != 1 or found[0].tag not in tags:
        given = ", ".join(each.tag for each in found) or "none"
        raise ValueError(f"expected one {' or '.join(tags)} as {name}, given {given}")
    return found[0]


def _point(element: Element | None) -> tuple[float, float]:
    if element is None:
        raise ValueError("expected a centre, given none")
    return _number(element.findtext("x"), "x"), _number(element.findtext("y"), "y")


def _middle(element: Element, name: str, period: float = 0.0) -> float:
    """An exact value, or the middle of an interval, which may pass the end of a period."""
    if (exact := element.findtext(f"{name}/exact")) is not None:
        return _number(exact, name)
    start, end = (_number(element.findtext(f"{name}/{each}"), name) for each in ("intervalStart", "intervalEnd"))
    return (start + end + (period if end < start else 0.0)) / 2


def _number(text: str | None, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"expected a number as {name}, given {'none' if text is None else repr(text.strip())}")
    return value
