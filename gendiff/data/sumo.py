"""Simulated traffic on random junctions, random roundabouts and real places, by SUMO.

SUMO is by Alvarez Lopez et al. 2018, "Microscopic traffic simulation using SUMO".  The extra `traffic` installs its
programs and libraries.  A process runs one simulation at a time, because `libsumo` is global.
"""

import gzip
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import Float

from gendiff import check

Kind: TypeAlias = Literal["junction", "roundabout", "bs3d", "drt", "a10kw", "ingolstadt", "fokr_bs"]
"""Random junctions and roundabouts, and five real places in SUMO's package."""

PLACES = {
    "bs3d": "tools/game/bs3d/bs.net.xml",  # Braunschweig, centre
    "drt": "tools/game/DRT/osm.net.xml",  # Berlin, south-east
    "a10kw": "tools/game/A10KW/osm.net.xml",  # motorway around Berlin
    "ingolstadt": "tools/game/fkk_in/ingolstadt.net.xml.gz",  # junction
    "fokr_bs": "tools/game/fokr_bs_demo/fokr_bs.net.xml.gz",  # Braunschweig, junction
}
STEP = 0.5
"""Seconds per simulation step."""
TYPES = 120
"""Vehicle types per simulation."""


class Fleet(NamedTuple):
    """A kind of vehicles: its share, and its sizes in metres, as clipped normal distributions."""

    share: float
    vehicle_class: str
    length: tuple[float, float]
    """Mean and standard deviation."""
    width: tuple[float, float]
    """Mean and standard deviation."""
    lengths: tuple[float, float]
    """Least and largest length."""


FLEETS = (
    Fleet(0.80, "passenger", (4.55, 0.35), (1.83, 0.07), (3.5, 5.4)),
    Fleet(0.12, "passenger", (5.6, 0.5), (2.0, 0.06), (4.8, 7.0)),  # vans
    Fleet(0.06, "truck", (8.5, 1.2), (2.45, 0.05), (6.5, 12.0)),
    Fleet(0.02, "bus", (12.0, 0.5), (2.55, 0.03), (11.0, 13.0)),
)
WIDTHS = (1.6, 2.6)
SPEEDS = (8.33, 11.1, 13.89, 16.67)
"""Speed limits in m/s: 30, 40, 50 and 60 km/h."""


class Moment(NamedTuple):
    """All vehicles at a time, in the map's frame."""

    seconds: float
    vehicles: Float[np.ndarray, "n 7"]
    """x, y of the centre, length and width in metres, cos and sin of the yaw, speed in m/s."""


class World(NamedTuple):
    """A place and its traffic."""

    drivable: Any
    """The area where cars may drive: a shapely geometry, in metres."""
    focus: tuple[float, float] | None
    """Point that windows surround, in metres; None: windows lie anywhere on the map."""
    moments: list[Moment]


class SumoError(RuntimeError):
    """SUMO is not installed, or one of its programs failed."""


def simulate(
    kind: Kind,
    seed: int,
    seconds: float = 450.0,
    warm_up: float = 240.0,
    every: float = 5.0,
    scratch: Path | None = None,
) -> World:
    """Simulate the traffic of a random or real place, and record it every `every` seconds after the warm-up.

    The same arguments give the same traffic, with the same version of SUMO.

    Args:
      kind: see `Kind`.
      seed: seed of the place and its traffic, in 0..2^31 - 1.
      seconds: simulated seconds, with the warm-up.
      warm_up: seconds before the first moment.
      every: seconds between moments, at least STEP.
      scratch: folder for temporary files; default: the system's temporary folder.

    Raises:
      ValueError: the kind is unknown, or a number is out of range.
      SumoError: SUMO is not installed, or fails.
    """
    check.choice("sumo: kind", kind, get_args(Kind))
    check.number("sumo: seed", seed, at_least=0, below=2**31, whole=True)
    check.number("sumo: seconds", seconds, above=0)
    check.number("sumo: warm_up", warm_up, at_least=0)
    check.number("sumo: every", every, at_least=STEP)
    home = _home()
    with tempfile.TemporaryDirectory(prefix="gendiff-sumo-", dir=scratch) as name:
        folder = Path(name)
        types = folder / "types.add.xml"
        types.write_text(_types(seed))
        if kind in PLACES:
            net, routes, more = *_place(home, kind, seed, seconds, folder), []
            focus = None
        else:
            net, routes, focus = _junction(home, kind == "roundabout", seed, seconds, folder)
            more = ["-a", str(types)]
        drivable = _drivable(net)
        moments = list(_run(home, net, routes, more, seed, seconds, warm_up, every))
    return World(drivable, focus, moments)


# Programs.


def _home() -> Path:
    """Find SUMO's folder in SUMO_HOME or in the package; set SUMO_HOME, because its tools read it."""
    found = importlib.util.find_spec("sumo")
    package = list(found.submodule_search_locations or []) if found else []
    # Look for the program, because `libsumo` sets SUMO_HOME to a package without programs.
    places = [Path(place) for place in (os.environ.get("SUMO_HOME"), *package) if place]
    home = next((place for place in places if _program(place, "sumo").exists()), None)
    missing = [name for name in ("libsumo", "sumolib", "shapely") if importlib.util.find_spec(name) is None]
    if home is None or missing:
        lacking = ", ".join([*missing, *([] if home else ["eclipse-sumo with its program sumo"])])
        raise SumoError(f"sumo: {lacking} must be installed, got none: pip install 'gendiff[traffic]'")
    os.environ["SUMO_HOME"] = str(home)
    return home


def _program(home: Path, name: str) -> Path:
    return home / "bin" / (name + (".exe" if sys.platform == "win32" else ""))


def _call(*command: Any) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise SumoError(f"sumo: {Path(str(command[0])).name} ended with status {done.returncode}: {' '.join(lines)}")


# Places.


def _place(home: Path, kind: str, seed: int, seconds: float, folder: Path) -> tuple[Path, Path]:
    """Prepare a real place with trips between random edges, dense enough for queues."""
    source, net = home / PLACES[kind], folder / "place.net.xml"
    if not source.exists():
        raise SumoError(f"sumo: {kind} needs the file {source}, got an installation without it: install another SUMO")
    net.write_bytes(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
    routes = folder / "routes.rou.xml"
    _call(
        sys.executable, home / "tools" / "randomTrips.py", "-n", net, "-a", folder / "types.add.xml",
        "-o", folder / "trips.xml", "-r", routes, "-b", 0, "-e", seconds, "--insertion-density", 60,
        "--fringe-factor", 4, "-L", "-l", "--edge-permission", "passenger", "--random-departpos",
        "-t", 'type="mix" departSpeed="random" departLane="random"', "--min-distance", 150, "--seed", seed,
        "--no-validate",
    )  # fmt: skip
    return net, routes


def _junction(
    home: Path, roundabout: bool, seed: int, seconds: float, folder: Path
) -> tuple[Path, Path, tuple[float, float]]:
    """Make a junction or a roundabout: three to five curved arms, one to three lanes, flows between all arms."""
    rng = np.random.default_rng((seed, 0))
    arms = int(rng.choice([3, 4, 4, 4, 5]))
    angles = _angles(rng, arms)
    width, speed = rng.uniform(3.0, 3.7), rng.choice(SPEEDS)
    control = rng.choice(["traffic_light", "traffic_light", "priority", "right_before_left", "allway_stop"])
    radius = rng.uniform(14, 24) if roundabout else 0.0
    nodes = [] if roundabout else [_tag("node", id="c", x=0, y=0, type=control)]
    edges, incoming = [], []
    for i, angle in enumerate(angles):
        length, bend = rng.uniform(150, 210), rng.normal(0, 0.22)
        far = np.linspace(radius, length, 8)
        turned = angle + bend * ((far - radius) / length) ** 2
        points = np.stack([far * np.cos(turned), far * np.sin(turned)], -1)
        inner = f"r{i}" if roundabout else "c"
        nodes.append(_tag("node", id=f"e{i}", x=points[-1, 0], y=points[-1, 1]))
        if roundabout:
            nodes.append(_tag("node", id=inner, x=points[0, 0], y=points[0, 1], type="priority"))
        lanes = int(rng.choice([1, 2] if roundabout else [1, 2, 2, 3]))
        incoming.append(lanes)
        common = {"width": width, "speed": speed, "priority": 1, "spreadType": "right"}
        out = max(1, min(2, lanes))
        edges.append(
            _tag(
                "edge", id=f"in{i}", to=inner, numLanes=lanes, shape=_shape(points[::-1]), **common, **{"from": f"e{i}"}
            )
        )
        edges.append(
            _tag("edge", id=f"out{i}", to=f"e{i}", numLanes=out, shape=_shape(points), **common, **{"from": inner})
        )
    if roundabout:
        lanes, gaps = int(rng.choice([1, 2])), np.diff(angles, append=angles[0] + 2 * np.pi)
        for i, (angle, gap) in enumerate(zip(angles, gaps, strict=True)):
            ring = np.linspace(angle, angle + gap, 9)
            shape = _shape(radius * np.stack([np.cos(ring), np.sin(ring)], -1))
            how = {"width": max(width, 3.5), "speed": 7.5, "priority": 9, "spreadType": "center", "from": f"r{i}"}
            edges.append(_tag("edge", id=f"ring{i}", to=f"r{(i + 1) % arms}", numLanes=lanes, shape=shape, **how))
    (folder / "j.nod.xml").write_text("<nodes>" + "\n".join(nodes) + "</nodes>")
    (folder / "j.edg.xml").write_text("<edges>" + "\n".join(edges) + "</edges>")
    net, routes = folder / "j.net.xml", folder / "j.rou.xml"
    _call(
        _program(home, "netconvert"), "-n", folder / "j.nod.xml", "-e", folder / "j.edg.xml", "-o", net,
        "--no-turnarounds", "true", "--junctions.corner-detail", 8,
        "--default.junctions.radius", f"{rng.uniform(4, 9):.1f}", "--roundabouts.guess", "true",
        "--tls.default-type", "actuated", "--no-warnings", "true",
    )  # fmt: skip
    routes.write_text("<routes>" + "\n".join(_flows(rng, incoming, seconds)) + "</routes>")
    inner_nodes = [node for node in _network(net).getNodes() if node.getID()[0] in "cr"]
    x, y = np.mean([node.getCoord() for node in inner_nodes], 0)
    return net, routes, (float(x), float(y))


def _angles(rng: np.random.Generator, arms: int) -> np.ndarray:
    """Draw directions at least 48 degrees apart."""
    while True:
        angles = np.sort(rng.uniform(0, 2 * np.pi, arms))
        if np.min(np.diff(angles, append=angles[0] + 2 * np.pi)) > math.radians(48):
            return angles


def _flows(rng: np.random.Generator, incoming: list[int], seconds: float) -> Iterator[str]:
    """Yield flows of vehicles between all pairs of arms; arms with more lanes have more vehicles."""
    for i, lanes in enumerate(incoming):
        rate = lanes**0.8 * rng.uniform(200, 520) / 3600
        shares = iter(rng.dirichlet(np.full(len(incoming) - 1, 2.0)))
        for j in range(len(incoming)):
            if j != i:
                how = {"departLane": "best", "departSpeed": "desired", "departPos": "base"}
                ends = {"from": f"in{i}", "to": f"out{j}", "begin": 0, "end": seconds}
                yield _tag("flow", id=f"f{i}-{j}", type="mix", probability=min(0.9, rate * next(shares)), **ends, **how)


def _types(seed: int) -> str:
    rng = np.random.default_rng((seed, 1))
    kinds = rng.choice(len(FLEETS), TYPES, p=[fleet.share for fleet in FLEETS])
    tags = []
    for i, fleet in enumerate(FLEETS[kind] for kind in kinds):
        tags.append(
            _tag(
                "vType",
                id=f"t{i}",
                vClass=fleet.vehicle_class,
                probability=1,
                length=np.clip(rng.normal(*fleet.length), *fleet.lengths),
                width=np.clip(rng.normal(*fleet.width), *WIDTHS),
                minGap=rng.uniform(1.2, 3.0),
                tau=rng.uniform(0.9, 1.6),
                sigma=rng.uniform(0.2, 0.8),
                speedFactor=f"normc({rng.uniform(0.9, 1.1):.2f},0.1,0.5,1.5)",
                latAlignment=rng.choice(["center", "center", "arbitrary", "left", "right"]),
                maxSpeedLat=0.8,
                lcSigma=rng.uniform(0, 0.25),
                minGapLat=0.5,
                lcPushy=rng.uniform(0, 0.3),
            )
        )
    return '<additional><vTypeDistribution id="mix">' + "\n".join(tags) + "</vTypeDistribution></additional>"


def _tag(name: str, **attributes: Any) -> str:
    text = lambda value: f"{value:.4f}" if isinstance(value, float) else str(value)
    return f"<{name} {' '.join(f'{key}={quoteattr(text(value))}' for key, value in attributes.items())}/>"


def _shape(points: np.ndarray) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


# Drivable area.


def _network(net: Path) -> Any:
    import sumolib

    return sumolib.net.readNet(str(net), withInternal=True)


def _drivable(net: Path) -> Any:
    """Join all lanes for cars, also within junctions, and the junctions' areas, without seams."""
    import shapely
    from shapely.geometry import LineString, Polygon

    network, parts = _network(net), []
    for edge in network.getEdges(withInternal=True):
        for lane in edge.getLanes():
            if lane.allows("passenger") and len(lane.getShape()) > 1:
                line = LineString(lane.getShape())
                parts.append(line.buffer(lane.getWidth() / 2, cap_style="flat", join_style="round", quad_segs=4))
    parts += [Polygon(node.getShape()).buffer(0) for node in network.getNodes() if len(node.getShape()) > 2]
    return shapely.union_all(parts).buffer(0.15).buffer(-0.15)


# Simulation.


def _run(
    home: Path,
    net: Path,
    routes: Path,
    more: list[str],
    seed: int,
    seconds: float,
    warm_up: float,
    every: float,
) -> Iterator[Moment]:
    """Yield moments of a simulation with lateral movement; collided vehicles stay on the road, so that they show."""
    libsumo: ModuleType = importlib.import_module("libsumo")
    options = {
        "--step-length": STEP, "--lateral-resolution": 0.4, "--seed": seed, "--time-to-teleport": 45,
        "--time-to-teleport.highways": 0, "--device.rerouting.probability": 0.6, "--device.rerouting.period": 60,
        "--device.rerouting.adaptation-interval": 10, "--collision.action": "none", "--ignore-route-errors": "true",
        "--default.speeddev": 0.1, "--max-depart-delay": 60, "--no-step-log": "true", "--no-warnings": "true",
        "--xml-validation": "never",
    }  # fmt: skip
    words = [str(part) for option in options.items() for part in option]
    try:
        libsumo.start([str(_program(home, "sumo")), "-n", str(net), "-r", str(routes), *more, *words])
    except Exception as error:  # libsumo raises several types of its own
        raise SumoError(f"sumo: the simulation did not start: {error}") from None
    try:
        for step in range(1, round(seconds / STEP) + 1):
            libsumo.simulationStep()
            if step * STEP >= warm_up and step % round(every / STEP) == 0:
                yield Moment(step * STEP, _vehicles(libsumo.vehicle))
    finally:
        libsumo.close()


def _vehicles(vehicle: Any) -> np.ndarray:
    names = vehicle.getIDList()
    if not names:
        return np.zeros((0, 7))
    column = lambda get: np.array([get(name) for name in names], float)
    front, length, speed = column(vehicle.getPosition), column(vehicle.getLength), column(vehicle.getSpeed)
    yaw = np.radians(90 - column(vehicle.getAngle))  # SUMO's angle is a compass bearing
    heading = np.stack([np.cos(yaw), np.sin(yaw)], -1)
    centre = front - length[:, None] / 2 * heading  # SUMO's position is the middle of the front bumper
    states = np.concatenate([centre, length[:, None], column(vehicle.getWidth)[:, None], heading, speed[:, None]], 1)
    return states[np.isfinite(states).all(1) & (np.abs(states[:, :2]) < 1e6).all(1)]
