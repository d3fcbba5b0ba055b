"""Maze2D: a point mass that a controller drives through mazes, as the relative-reward paper (NeurIPS 2023) made it.

Mazes and physics are D4RL's (Fu et al. 2020), stepped by MuJoCo; the controller, the starts and the rules for what is
kept are those of the paper's code.  Lengths are in cells, times in steps of 0.01 s; an observation is (x, y, vx, vy).

    python -m gendiff.data.maze2d FOLDER --maze umaze --goal 3 --transitions 1000000
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse.csgraph import shortest_path
from tqdm import tqdm

from gendiff import check, command
from gendiff.data import episodes, files
from gendiff.data.episodes import Attempts, Episodes, Holds, Report

States: TypeAlias = Float[np.ndarray, "n 4"]
Points: TypeAlias = Float[np.ndarray, "n 2"]
Step: TypeAlias = Callable[[States, Points], States]
"""(states, actions) -> the states 0.01 s later.  The motors clip actions to [-1, 1]."""
Start: TypeAlias = Literal["inverse_area", "area"]
Goal: TypeAlias = tuple[float, float]


class Maze(NamedTuple):
    """A maze of unit cells; cell (i, j) is row i, column j, and its centre is the point x = i, y = j."""

    name: str
    rows: tuple[str, ...]
    """`#` is wall, all else is free; the rim is wall."""
    goals: tuple[Goal, ...]
    """The paper's goals 1 to 8."""
    planned: bool = True
    """False where no wall is in the way: the controller heads straight for its goal."""

    @property
    def extent(self) -> tuple[int, int]:
        """Cells along x and y, walls included."""
        return len(self.rows), len(self.rows[0])


_OPEN = ("#######", "#     #", "#     #", "#     #", "#######")
_UMAZE = ("#####", "#   #", "### #", "#   #", "#####")
_MEDIUM = ("########", "#  ##  #", "#  #   #", "##   ###", "#  #   #", "# #  # #", "#   #  #", "########")
_LARGE = (
    "############",
    "#    #     #",
    "# ## # # # #",
    "#      #   #",
    "# #### ### #",
    "#  # #     #",
    "## # # # ###",
    "#  #   #   #",
    "############",
)
MAZES: dict[str, Maze] = {
    "open": Maze("open", _OPEN, ((1, 1), (1, 5), (1.3, 1.7), (2, 3), (2.3, 4.3), (2.7, 3.1), (3, 1), (3, 5)), False),
    "umaze": Maze("umaze", _UMAZE, ((1, 1), (1, 2), (1, 3), (1.3, 2.7), (2, 3), (3, 1), (3, 2), (3, 3))),
    "medium": Maze("medium", _MEDIUM, ((1, 1), (1, 6), (2, 2), (4, 4), (4, 6), (5, 3), (6, 1), (6, 6))),
    "large": Maze("large", _LARGE, ((1, 1), (1, 10), (3, 6), (3, 8), (5, 2), (5, 4), (7, 1), (7, 10))),
}


@cache
def walls(maze: Maze) -> Bool[np.ndarray, "x y"]:
    """Which cells are wall."""
    solid = np.array([[cell == "#" for cell in row.ljust(maze.extent[1])] for row in maze.rows])
    if len({len(row) for row in maze.rows}) != 1 or np.pad(~solid[1:-1, 1:-1], 1).sum() != (~solid).sum():
        raise ValueError(f"maze2d: {maze.name}: expected rows of one length within a rim of wall, given {maze.rows}")
    return solid


@cache
def cells(maze: Maze) -> Int[np.ndarray, "c 2"]:
    """The free cells, row by row."""
    return np.argwhere(~walls(maze))


@cache
def number(maze: Maze) -> Int[np.ndarray, "x y"]:
    """Row in `cells` of each cell; -1 for a wall."""
    numbers = np.full(maze.extent, -1)
    numbers[~walls(maze)] = np.arange(len(cells(maze)))
    return numbers


_AROUND = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1).reshape(9, 2)


def wall_distance(maze: Maze, points: Points) -> Float[np.ndarray, " n"]:
    """Distance to the squares of the walls in a point's cell and the eight around it; infinite without one.

    The physical walls lie elsewhere: next to a wall the ball's centre moves in [i - 0.6, i + 0.2] (D4RL's offset).
    Beyond the maze all is wall.

    Raises:
      ValueError: the points are not (n, 2), or one is not finite.
    """
    check.shape("wall_distance: points", points, (None, 2))
    check.number("wall_distance: points", points)
    around = np.rint(points).astype(int)[:, None] + _AROUND
    beside = np.clip(around + 1, 0, np.array(maze.extent) + 1)
    solid = np.pad(walls(maze), 1, constant_values=True)[beside[..., 0], beside[..., 1]]
    gap = np.maximum(abs(points[:, None] - around) - 0.5, 0)
    return np.where(solid, np.hypot(gap[..., 0], gap[..., 1]), np.inf).min(1)


# Physics.


def xml(maze: Maze) -> str:
    """The maze as MuJoCo's XML: D4RL's model, without what is only seen."""
    box = '<geom type="box" pos="{} {} 0" size="0.5 0.5 0.2"/>'
    boxes = "".join(box.format(i + 1, j + 1) for i, j in np.argwhere(walls(maze)))
    joints = '<joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/>'
    motor = '<motor joint="{}" ctrlrange="-1 1" ctrllimited="true" gear="100"/>'
    return f"""<mujoco>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default>
        <joint damping="1" limited="false"/>
        <geom friction="0.5 0.1 0.1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
      </default>
      <worldbody>
        <geom type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0"/>
        <body pos="1.2 1.2 0"><geom type="sphere" size="0.1" contype="1"/>{joints}</body>
        {boxes}
      </worldbody>
      <actuator>{motor.format("x")}{motor.format("y")}</actuator>
    </mujoco>"""


@contextmanager
def physics(maze: Maze, threads: int | None = None, largest_speed: float | None = None) -> Iterator[Step]:
    """A step of many independent environments, as long as the context lasts.

    The solver begins each step afresh, so that a step depends on state and action alone.  Where the ball meets a wall,
    D4RL's, which begins with its last solution, differs by the solver's tolerance (1e-5 in position).

    Args:
      threads: default: one a core.
      largest_speed: of each axis, clipped before a step: 5 in D4RL, none in the paper's data.

    Raises:
      ValueError: `threads` is below 1, or `largest_speed` is not positive.
      ImportError: MuJoCo is not installed.
    """
    if threads is not None:
        check.number("maze2d: threads", threads, at_least=1, whole=True)
    if largest_speed is not None:
        check.number("maze2d: largest_speed", largest_speed, above=0)
    try:
        import mujoco
        from mujoco import rollout
    except ImportError:
        raise ImportError("maze2d: expected MuJoCo, given none: pip install 'gendiff[maze]'") from None
    threads = threads or os.cpu_count() or 1
    fastest = np.inf if largest_speed is None else largest_speed
    model = mujoco.MjModel.from_xml_string(xml(maze))
    data = [mujoco.MjData(model) for _ in range(threads)]
    with rollout.Rollout(nthread=threads) as pool:

        def step(states: States, actions: Points) -> States:
            time, velocities = np.zeros((len(states), 1)), np.clip(states[:, 2:], -fastest, fastest)
            before = np.concatenate([time, states[:, :2], velocities], 1)
            after, _ = pool.rollout(model, data, before, actions[:, None])
            return after[:, 0, 1:]

        yield step


# The controller.


class Controller(NamedTuple):
    """A PD controller on the way from waypoint to waypoint; the values are the paper's."""

    p_gain: float = 3.0
    d_gain: float = -((3 / 10) ** 0.5)
    reach: float = 0.3
    """A point is reached at less than this distance .."""
    displacement: float = 0.1
    """.. if the last step was shorter than this (10 cells a second)."""
    offset: tuple[float, float] = (-0.24, 0.24)
    """A random vector, each coordinate uniform between these, is added to the waypoints but the last."""
    each: bool = False
    """One vector for each waypoint; or the same for all."""
    largest: float | None = None
    """Of the action, in each coordinate."""


D4RL = Controller(10.0, -1.0, 0.1, 0.1, (-0.2, 0.0), True, 1.0)
"""D4RL's own values.  (D4RL also rounds goals to their cells, and goes on from one goal to the next.)"""


def control(
    controller: Controller, states: States, previous: Points, waypoints: Points, goals: Points
) -> tuple[Points, Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """One decision: a = p (w - position) + d velocity, with w the waypoint, or the goal once that is reached.

    Args:
      previous: positions one step ago.

    Returns:
      The actions; where the goal is reached; where not the goal but the waypoint is.
    """
    positions, velocities = states[:, :2], states[:, 2:]
    distance = lambda points: np.hypot(*(points - positions).T)
    slow = distance(previous) < controller.displacement
    solved = slow & (distance(goals) < controller.reach)
    reached = ~solved & slow & (distance(waypoints) < controller.reach)
    towards = np.where(solved[:, None], goals, waypoints)
    largest = np.inf if controller.largest is None else controller.largest
    actions = controller.p_gain * (towards - positions) + controller.d_gain * velocities
    return np.clip(actions, -largest, largest), solved, reached


@cache
def routes(maze: Maze) -> Int[np.ndarray, "c c longest"]:
    """[start, goal]: the free cells after the start of a shortest path, by their rows in `cells`; the goal fills up.

    Of several shortest paths it takes at each cell the first of the moves y - 1, y + 1, x - 1, x + 1 that is on one.
    That is the path of D4RL's planner (greedy in Q, ties to the first action).
    """
    every = np.arange(len(cells(maze)))
    beside = number(maze)[tuple((cells(maze)[:, None] + [(0, -1), (0, 1), (-1, 0), (1, 0)]).T)].T
    graph = np.zeros((len(every), len(every)))
    graph[np.nonzero(beside >= 0)[0], beside[beside >= 0]] = 1
    distance = shortest_path(graph, unweighted=True)
    if np.isinf(distance).any():
        raise ValueError(f"maze2d: {maze.name}: expected free cells that are connected, given {maze.rows}")
    onwards = np.where((beside >= 0)[..., None], distance[beside], np.inf)
    towards = beside[every[:, None], np.argmin(onwards, 1)]
    towards[every, every] = every
    route = [towards]
    while len(route) < distance.max():
        route.append(towards[route[-1], every])
    return np.stack(route, -1)


# Episodes.


class Rules(NamedTuple):
    """How episodes begin, and which are kept; the values are the paper's."""

    controller: Controller = Controller()
    start: Start = "inverse_area"
    """How likely a cell is for starts and random goals, which are uniform in it: the paper's code makes small cells
    likelier; `area` is uniform in space.  The open maze is uniform with both."""
    clearance: float = 0.26
    """Starts and goals are as far from walls, and an episode that comes nearer is discarded."""
    limit: int = 1000
    """Rows of an episode; one that ends so on its way to the first waypoint is discarded."""
    largest_speed: float | None = None
    """See `physics`."""


PAPER = Rules()
PROPOSALS = 16
"""Places drawn for a start or goal; the first that is far from walls is taken.  Each is too near with a probability
below 0.2.  Were all 16, the start is too near, and its episode discarded."""


@cache
def rooms(maze: Maze, clearance: float = 0.26) -> tuple[Points, Points, Float[np.ndarray, " c"]]:
    """Lower and upper corner of the part of each free cell that is away from walls beside it, and the part's area.

    The area lacks a square of the clearance at each corner with a wall behind it, as in the paper's code.
    """
    at = cells(maze)
    solid = lambda i, j: walls(maze)[at[:, 0] + i, at[:, 1] + j]
    low = at - 0.5 + clearance * np.stack([solid(-1, 0), solid(0, -1)], 1)
    high = at + 0.5 - clearance * np.stack([solid(1, 0), solid(0, 1)], 1)
    corners = sum((solid(i, j) & ~solid(i, 0) & ~solid(0, j)).astype(int) for i in (-1, 1) for j in (-1, 1))
    return low, high, np.prod(high - low, 1) - clearance**2 * corners


def places(maze: Maze, uniform: Float[np.ndarray, "n proposals 3"], rules: Rules = PAPER) -> Points:
    """Random points away from walls, made of numbers uniform in [0, 1)."""
    low, high, area = rooms(maze, rules.clearance)
    # A uniform point in a cell's rectangle, rejected near corners: for a uniform density the rectangle's area counts.
    weight = np.prod(high - low, 1) if rules.start == "area" or not maze.planned else 1 / area
    cell = np.searchsorted(np.cumsum(weight) / np.sum(weight), uniform[..., 0], "right").clip(max=len(low) - 1)
    points = low[cell] + (high - low)[cell] * uniform[..., 1:]
    far = wall_distance(maze, points.reshape(-1, 2)).reshape(cell.shape) >= rules.clearance
    return points[np.arange(len(points)), np.argmax(far, 1)]


def begin(
    maze: Maze,
    seed: int,
    attempts: Int[np.ndarray, " n"],
    goal: Goal | None = None,
    rules: Rules = PAPER,
) -> tuple[Points, Float[np.ndarray, "n longest 2"]]:
    """Starts and waypoints of attempts; the last waypoint is the goal.  Attempt i has the generator (seed, i)."""
    longest = routes(maze).shape[-1] if maze.planned else 1
    generator = lambda i: np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
    uniform = np.stack([generator(i).random(6 * PROPOSALS + 2 * longest) for i in attempts])
    start, target, offset = np.split(uniform, [3 * PROPOSALS, 6 * PROPOSALS], 1)
    starts = places(maze, start.reshape(-1, PROPOSALS, 3), rules)
    goals = places(maze, target.reshape(-1, PROPOSALS, 3), rules) if goal is None else np.tile(goal, (len(starts), 1))
    if not maze.planned:
        return starts, goals[:, None]
    first, last = (number(maze)[tuple(np.rint(points).astype(int).T)] for points in (starts, goals))
    path = routes(maze)[first, last]
    low, high = rules.controller.offset
    offset = low + (high - low) * offset.reshape(-1, longest, 2)
    between = cells(maze)[path] + (offset if rules.controller.each else offset[:, :1])
    return starts, np.where((path == last[:, None])[..., None], goals[:, None], between)


def attempts(
    maze: Maze,
    seed: int,
    goal: Goal | None = None,
    rules: Rules = PAPER,
    environments: int = 2048,
    threads: int | None = None,
    first: int = 0,
) -> Attempts:
    """Attempts first, first + 1 .. without end, in this order; they do not depend on `environments` or `threads`."""
    with physics(maze, threads, rules.largest_speed) as step:
        every = np.arange(environments)
        names = first + every
        starts, paths = begin(maze, seed, names, goal, rules)
        states, previous = np.concatenate([starts, np.zeros_like(starts)], 1), starts
        at, row = np.zeros(environments, int), np.zeros(environments, int)
        log = np.empty((environments, rules.limit, 6), np.float32)
        finished: dict[int, Any] = {}
        while True:
            actions, solved, reached = control(rules.controller, states, previous, paths[every, at], paths[:, -1])
            at += reached
            log[every, row] = np.concatenate([states, actions], 1)
            late = row == rules.limit - 1
            discarded = (wall_distance(maze, states[:, :2]) < rules.clearance) | (late & (at == 0))
            over = np.flatnonzero(solved | late | discarded)
            for i in over:
                rows = log[i, : row[i] + 1].copy()
                finished[names[i]] = None if discarded[i] else (rows[:, :4], rows[:, 4:])
            while first in finished:
                yield finished.pop(first)
                first += 1
            previous, states, row = states[:, :2], step(states, actions), row + 1
            if len(over):
                names[over] = np.max(names) + 1 + np.arange(len(over))
                previous[over], paths[over] = begin(maze, seed, names[over], goal, rules)
                states[over] = np.concatenate([previous[over], np.zeros((len(over), 2))], 1)
                at[over] = row[over] = 0


def generate(
    maze: str | Maze,
    transitions: int,
    seed: int,
    goal: Goal | None = None,
    rules: Rules = PAPER,
    environments: int = 2048,
    threads: int | None = None,
    report: Report = lambda rows: None,
) -> Episodes:
    """Episodes with `transitions` rows or more: random starts to random goals (base data), or all to one (an expert's).

    They depend on the arguments up to `rules` only.

    Args:
      maze: one, or its name in `MAZES`.
      goal: (x, y), exact; None for random ones.
      environments: at most so many run at once.

    Raises:
      ValueError: an unknown maze, a goal that is no free place or cannot be reached, or numbers out of range.
    """
    run = _run(maze, transitions, seed, goal, rules, environments, threads)
    with closing(run(0)) as stream:
        return episodes.take(stream, transitions, report)[0]


def write(
    folder: Path,
    maze: str | Maze,
    transitions: int,
    seed: int,
    goal: Goal | None = None,
    rules: Rules = PAPER,
    shard: int = 100_000,
    environments: int = 2048,
    threads: int | None = None,
    report: Report = lambda rows: None,
) -> Holds:
    """`generate` into a folder, for `episodes.read`; after a kill the same call goes on (see `episodes.write`).

    Raises:
      ValueError: as `generate`, and where the folder holds other data.
    """
    run = _run(maze, transitions, seed, goal, rules, environments, threads)
    configuration = {
        "maze": named(maze)._replace(goals=())._asdict(),
        "seed": int(seed),
        "goal": None if goal is None else [float(each) for each in goal],
        "rules": rules._asdict() | {"controller": rules.controller._asdict()},
    }
    return episodes.write(folder, configuration, run, transitions, shard, report)


def named(maze: str | Maze) -> Maze:
    """A maze of its name, or itself."""
    return MAZES[check.choice("maze2d: maze", maze, list(MAZES))] if isinstance(maze, str) else maze


def _run(
    maze: str | Maze,
    transitions: int,
    seed: int,
    goal: Goal | None,
    rules: Rules,
    environments: int,
    threads: int | None,
) -> Callable[[int], Attempts]:
    maze = named(maze)
    for name, given, least in (
        ("transitions", transitions, 1),
        ("seed", seed, 0),
        ("environments", environments, 1),
        ("limit", rules.limit, 1),
        ("threads", 1 if threads is None else threads, 1),
    ):
        check.number(f"maze2d: {name}", given, at_least=least, whole=True)
    check.number("maze2d: clearance", rules.clearance, at_least=0, below=0.5)
    if threads is not None:
        check.number("maze2d: threads", threads, at_least=1, whole=True)
    check.choice("maze2d: start", rules.start, get_args(Start))
    if goal is not None and not any(np.array_equal(np.rint(goal), cell) for cell in cells(maze)):
        raise ValueError(f"maze2d: goal: expected a point in a free cell of the maze {maze.name}, given {goal}")
    # Few environments for few rows: those that are still under way at the end are in vain.
    environments = min(environments, 1 + transitions // 500)
    return lambda first: attempts(maze, seed, goal, rules, environments, threads, first)


def main() -> None:
    """Writes a data set from the command line."""
    about = "Makes Maze2D data; goes on where it was stopped."
    parser = argparse.ArgumentParser("python -m gendiff.data.maze2d", description=about)
    parser.add_argument("folder", type=files.argument)
    parser.add_argument("--maze", default="umaze", choices=MAZES)
    parser.add_argument("--goal", type=int, choices=range(1, 9), help="an expert's; without one: random goals")
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default="inverse_area", choices=get_args(Start), help="area: uniform in space")
    parser.add_argument("--threads", type=int, help="default: one a core")
    given = parser.parse_args()
    goal = None if given.goal is None else MAZES[given.maze].goals[given.goal - 1]
    with tqdm(total=given.transitions, unit=" rows", unit_scale=True) as bar:

        def report(rows: int) -> None:
            if not bar.n:
                bar.initial = bar.n = rows  # so that the rate is of what is made now
            bar.update(rows - bar.n)

        try:
            what = (given.maze, given.transitions, given.seed, goal, Rules(start=given.start))
            holds = write(given.folder, *what, threads=given.threads, report=report)
        except (ValueError, OSError, ImportError) as error:
            parser.error(str(error))
    command.say(f"{given.folder}: {holds.episodes} episodes, {holds.transitions} transitions")


if __name__ == "__main__":
    main()
