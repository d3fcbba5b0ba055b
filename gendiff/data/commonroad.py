"""Recorded traffic scenes from CommonRoad files, XML of the versions 2018b and 2020a.

The format is by Althoff, Koschi and Manzinger 2017, "CommonRoad: composable benchmarks for motion planning on roads".
Some files hold simulated traffic; their element `source` says so.

The vehicles are the dynamic obstacles of the types VEHICLES.  The module leaves out pedestrians, bicycles, trains,
obstacles of unknown type, parked vehicles and construction.  The vehicle of the planning problem is also missing,
because the file does not tell its size.

The drivable area is the union of the lanelets without footways and cycle tracks.  The gaps between the lanelets of a
junction are not drivable on these maps.
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
"""Obstacle types that are vehicles."""
OTHERS = frozenset({"sidewalk", "crosswalk", "bicycleLane", "border"})
"""Lanelet types that are not for vehicles."""
EVERY = 2.0
"""Seconds between moments; short, because most recordings are shorter than 10 s."""


def read_world(path: Path | str, every: float = EVERY) -> sumo.World:
    """Read the drivable area and the vehicles of a file, in the coordinates of its map.

    An interval, or a position given as a rectangle or a circle, counts as its centre.  Speeds are along the heading,
    negative in reverse; a missing speed is computed from the positions.

    Args:
      path: a file.
      every: seconds between moments, from the first state on; rounded to one or more steps of the file.

    Raises:
      ValueError: `every` is not positive.
      DataError: the file is missing or not CommonRoad's, or has no lanelets, no vehicles or a damaged value.
      ImportError: shapely is not installed.
    """
    _, world = _recorded(Path(path), every)
    if not world.moments:
        raise DataError(
            f"commonroad: {path}: the file must have moving vehicles ({', '.join(sorted(VEHICLES))}), got none"
        )
    return world


def scenes(
    path: Path | str,
    how: Cut = Cut(),  # noqa: B008 (immutable)
    every: float = EVERY,
    seed: int = 0,
    keep_invalid: bool = False,
) -> Scenes:
    """Cut windows from all moments of a file, or of all *.xml files below a folder; follow links.

    A map's number is the rank of its place name, such as USA_US101 of the benchmark USA_US101-26_1_T-1.  Files of one
    place share a number, because they may show the same road.  In a folder, files without vehicles give no scenes.

    Recorded vehicles may overlap, or leave the lanelets.  Such scenes are left out; to count or to see them:

        found = commonroad.scenes(folder, how, keep_invalid=True)
        left_out = ~traffic.valid(found, how)

    Args:
      path: a file or a folder.
      how: parameters of the windows.  Few recordings have 12 vehicles within 100 m, so a `least` below 12 gives more
        scenes, which are padded.
      every: seconds between moments; see `read_world`.
      seed: seed of the windows' places.
      keep_invalid: keep scenes with an overlap, or with a vehicle off the drivable area.

    Raises:
      ValueError: a number is out of range.
      DataError: the file is missing or damaged (see `read_world`), or no scene is found.
      ImportError: shapely is not installed.
    """
    path = Path(path)
    files = _xml(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"commonroad: {path} must hold files *.xml, got a folder without them")
    recorded = [_recorded(file, every) for file in files]
    names = sorted({name for name, _ in recorded})
    parts = [traffic.windows(world, names.index(name), seed, how) for name, world in recorded]
    found = traffic.joined([traffic.empty(how), *parts])
    if not len(found.world):
        most = max((len(moment.vehicles) for _, world in recorded for moment in world.moments), default=0)
        raise DataError(
            f"commonroad: {path} must have {how.least} or more vehicles in a window of {2 * how.half:g} m, "
            f"got at most {most} at one moment on a map: lower `least`"
        )
    if keep_invalid:
        return found
    good = traffic.valid(found, how)
    if not good.any():
        raise DataError(
            f"commonroad: {path} must have valid scenes, got {len(good)} with overlaps or vehicles off the lanelets: "
            "keep_invalid=True shows them"
        )
    return traffic.take(found, good)


def _xml(folder: Path) -> list[Path]:
    """Return the *.xml files below a folder.  Visit a folder once, because a link may lead to a parent."""
    found, seen = [], set()
    for name, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # two links to one folder: always keep the same one
        found += [Path(name) / file for file in names if file.endswith(".xml")]
    return sorted(found)


def _recorded(path: Path, every: float) -> tuple[str, sumo.World]:
    """Return the name of the file's place, and its world."""
    check.number("commonroad: every", every, above=0)
    with _located(f"commonroad: {path}"):
        root = _root(path)
        # Keep country and map; the prefix C- means cooperative.
        name = (root.get("benchmarkID") or path.stem).removeprefix("C-").split("-")[0]
        return name, sumo.World(_drivable(root), None, _moments(root, every))


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the place before the text of every ValueError raised inside."""
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
        raise ImportError("commonroad: shapely must be installed, got none: pip install 'gendiff[traffic]'") from None
    lanelets = root.findall("lanelet")
    # make_valid splits a lanelet whose bounds cross, which happens where it is pinched off.
    parts = [shapely.make_valid(shapely.Polygon(_lanelet(lanelet))) for lanelet in lanelets if _for_vehicles(lanelet)]
    area = shapely.union_all(parts).buffer(0.15).buffer(-0.15)
    if area.is_empty:
        raise ValueError(f"lanelets for vehicles must have an area, got none among {len(lanelets)} lanelets")
    return area


def _for_vehicles(lanelet: Element) -> bool:
    types, one_way, both_ways = (_texts(lanelet, name) for name in ("laneletType", "userOneWay", "userBidirectional"))
    users = one_way | both_ways
    return not types & OTHERS and (not users or bool(users & {*VEHICLES, "vehicle"}))


def _lanelet(lanelet: Element) -> list[tuple[float, float]]:
    with _located(f"lanelet {lanelet.get('id')}"):
        left, right = (
            [_point(point) for point in lanelet.iterfind(f"{side}Bound/point")] for side in ("left", "right")
        )
        if min(len(left), len(right)) < 2:
            raise ValueError(f"bounds must have 2 points or more, got {len(left)} and {len(right)}")
        return [*left, *reversed(right)]


# Vehicles.


def _moments(root: Element, every: float) -> list[sumo.Moment]:
    seconds = _number(root.get("timeStepSize"), "timeStepSize")
    if seconds <= 0:
        raise ValueError(f"timeStepSize must be > 0, got {seconds:g}")
    dynamic = [obstacle for obstacle in root.iterfind("obstacle") if "dynamic" in _texts(obstacle, "role")]  # 2018b
    dynamic += root.iterfind("dynamicObstacle")  # 2020a
    tracks = [_track(obstacle, seconds) for obstacle in dynamic if _texts(obstacle, "type") & VEHICLES]
    if not tracks:
        return []
    steps, vehicles = (np.concatenate(part) for part in zip(*tracks, strict=True))
    stride = max(1, round(every / seconds))
    kept = [step for step in np.unique(steps) if (step - steps.min()) % stride == 0]
    return [sumo.Moment(float(step * seconds), vehicles[steps == step]) for step in kept]


def _track(obstacle: Element, seconds: float) -> tuple[Int[np.ndarray, " t"], Float[np.ndarray, "t 7"]]:
    """Return the steps of an obstacle, and its state at these steps."""
    with _located(f"obstacle {obstacle.get('id')}"):
        length, width, ahead, aside, turn = _rectangle(obstacle)
        # By time, because some trajectories repeat the initial state.
        found = [*obstacle.iterfind("initialState"), *obstacle.iterfind("trajectory/state")]
        states = {_time(state): state for state in found}
        if not states:
            raise ValueError("an obstacle must have an initialState or a trajectory, got neither")
        steps = np.array(sorted(states))
        x, y, yaw, speed = np.array([_state(states[step]) for step in steps]).T
        x, y = x + ahead * np.cos(yaw) - aside * np.sin(yaw), y + ahead * np.sin(yaw) + aside * np.cos(yaw)
        cos, sin = np.cos(yaw + turn), np.sin(yaw + turn)
        if np.isnan(speed).any():
            if len(steps) == 1:
                raise ValueError("an obstacle must have a velocity or two states, got one state without a velocity")
            velocity = np.gradient(np.stack([x, y]), steps * seconds, axis=1)
            speed = np.where(np.isnan(speed), velocity[0] * cos + velocity[1] * sin, speed)
        size = np.full((len(steps), 2), (length, width))
        return steps, np.column_stack([x, y, size, cos, sin, speed])


def _rectangle(obstacle: Element) -> tuple[float, float, float, float, float]:
    """Return length and width, the offset of the centre ahead and aside of the position, and the turn."""
    shape = _only(obstacle, "shape", "rectangle")
    value = lambda name, default=None: _number(shape.findtext(name, default), name)
    length, width = value("length"), value("width")
    if min(length, width) <= 0:
        raise ValueError(f"length and width must be > 0, got {length:g} and {width:g}")
    ahead = value("center/x", "0") - value("originXShift", "0")  # the shift leads from the centre to the position
    return length, width, ahead, value("center/y", "0"), value("orientation", "0")


def _time(state: Element) -> int:
    time = _middle(state, "time")
    if time % 1 or not 0 <= time < 2**53:
        raise ValueError(f"time must be a whole number of steps, got {time:g}")
    return int(time)


def _state(state: Element) -> tuple[float, float, float, float]:
    """Return x, y, yaw and speed; a missing speed is NaN."""
    with _located(f"step {_time(state)}"):
        place = _only(state, "position", "point", "rectangle", "circle")
        x, y = _point(place if place.tag == "point" else place.find("center"))
        speed = np.nan if state.find("velocity") is None else _middle(state, "velocity")
        return x, y, _middle(state, "orientation", period=2 * np.pi), speed


# XML.


def _root(path: Path) -> Element:
    """Return the root of a file; refuse entities, because a short file may expand to gigabytes."""
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
        raise ValueError(f"the file must be readable, got {error.strerror}") from None
    except expat.ExpatError as error:
        raise ValueError(f"the file must be CommonRoad's XML, got a file that is not XML ({error})") from None
    root = builder.close()
    if root.tag != "commonRoad":
        raise ValueError(f"the file must be CommonRoad's XML, got <{root.tag}>")
    if (version := root.get("commonRoadVersion")) not in VERSIONS:
        raise ValueError(f"commonRoadVersion must be {' or '.join(VERSIONS)}, got {version or 'none'}")
    return root


def _refused(name: str, *_: Any) -> None:
    raise ValueError(f"the XML must have no entities, got the entity {name!r}")


def _texts(element: Element, name: str) -> set[str]:
    return {(child.text or "").strip() for child in element.iterfind(name)}


def _only(element: Element, name: str, *tags: str) -> Element:
    """Return the only element in the child `name`; its tag must be in `tags`."""
    found = element.findall(f"{name}/*")
    if len(found) != 1 or found[0].tag not in tags:
        got = ", ".join(child.tag for child in found) or "none"
        raise ValueError(f"{name} must hold one {' or '.join(tags)}, got {got}")
    return found[0]


def _point(element: Element | None) -> tuple[float, float]:
    if element is None:
        raise ValueError("a rectangle or circle must have a center, got none")
    return _number(element.findtext("x"), "x"), _number(element.findtext("y"), "y")


def _middle(element: Element, name: str, period: float = 0.0) -> float:
    """Return an exact value, or the middle of an interval, which may wrap around at the period."""
    if (exact := element.findtext(f"{name}/exact")) is not None:
        return _number(exact, name)
    start, end = (_number(element.findtext(f"{name}/{edge}"), name) for edge in ("intervalStart", "intervalEnd"))
    return (start + end + (period if end < start else 0.0)) / 2


def _number(text: str | None, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{name} must be a number, got {'none' if text is None else repr(text.strip())}")
    return value
