"""Maze2D: a controller drives a point mass through mazes, as in the relative-reward paper (NeurIPS 2023).

Mazes and physics are D4RL's (Fu et al. 2020), simulated by MuJoCo.  The controller, the starts and the rules for kept
episodes are those of the paper's code.  Lengths are in cells, times in steps of 0.01 s; an observation is (x, y, vx,
vy).

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
"""A function (states, actions) -> states 0.01 s later.  The motors clip actions to [-1, 1]."""
Start: TypeAlias = Literal["inverse_area", "area"]
Goal: TypeAlias = tuple[float, float]


class Maze(NamedTuple):
    """A maze of unit cells; cell (i, j) is row i, column j, and its centre is the point x = i, y = j."""

    name: str
    rows: tuple[str, ...]
    """`#` is wall, other characters are free; the rim is wall."""
    goals: tuple[Goal, ...]
    """The paper's goals 1 to 8."""
    planned: bool = True
    """False for a maze without inner walls: the controller heads straight for its goal."""

    @property
    def extent(self) -> tuple[int, int]:
        """Numbers of cells along x and y, with the walls."""
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
    """Return True for the cells that are wall.

    Raises:
      ValueError: the rows differ in length, or the rim is not wall.
    """
    solid = np.array([[cell == "#" for cell in row.ljust(maze.extent[1])] for row in maze.rows])
    if len({len(row) for row in maze.rows}) != 1 or np.pad(~solid[1:-1, 1:-1], 1).sum() != (~solid).sum():
        raise ValueError(f"maze2d: {maze.name} must have rows of one length within a rim of wall, got {maze.rows}")
    return solid


@cache
def cells(maze: Maze) -> Int[np.ndarray, "c 2"]:
    """List the free cells, row by row."""
    return np.argwhere(~walls(maze))


@cache
def number(maze: Maze) -> Int[np.ndarray, "x y"]:
    """Return the row in `cells` of a cell (x, y); -1 for a wall."""
    numbers = np.full(maze.extent, -1)
    numbers[~walls(maze)] = np.arange(len(cells(maze)))
    return numbers


_AROUND = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1).reshape(9, 2)


def wall_distance(maze: Maze, points: Points) -> Float[np.ndarray, " n"]:
    """Return the distance to the wall squares among a point's cell and its eight neighbours; infinite without a wall.

    The physical walls are shifted: next to a wall, the ball's centre moves in [i - 0.6, i + 0.2] (D4RL's offset).
    Cells outside of the maze are wall.

    Raises:
      ValueError: the points are not (n, 2), or not finite.
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
    """Return the maze as MuJoCo's XML: D4RL's model without its visual parts."""
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
    """Context manager: yield a step function of many independent environments.

    The solver starts cold at every step, so a step depends on state and action alone.  D4RL's solver starts warm: at a
    wall the two differ by the solver's tolerance (1e-5 in position).

    Args:
      maze: the maze.
      threads: default: one per core.
      largest_speed: limit of |vx| and |vy|, applied before a step: 5 in D4RL; None, as in the paper's data: no limit.

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
        raise ImportError("maze2d: MuJoCo must be installed, got none: pip install 'gendiff[maze]'") from None
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
    """A PD controller from waypoint to waypoint; the defaults are the paper's values."""

    p_gain: float = 3.0
    d_gain: float = -((3 / 10) ** 0.5)
    reach: float = 0.3
    """A point counts as reached below this distance, in cells, and below `displacement`."""
    displacement: float = 0.1
    """Limit of the length of the last step at a reached point, in cells (10 cells a second)."""
    offset: tuple[float, float] = (-0.24, 0.24)
    """Bounds of a random vector, uniform in both coordinates, which shifts all waypoints but the last."""
    each: bool = False
    """True: draw a vector per waypoint.  False: all waypoints share a vector."""
    largest: float | None = None
    """Largest absolute value of an action's coordinate; None: no limit."""


D4RL = Controller(10.0, -1.0, 0.1, 0.1, (-0.2, 0.0), True, 1.0)
"""D4RL's own values.  D4RL also rounds goals to their cells, and continues from one goal to the next."""


def control(
    controller: Controller, states: States, previous: Points, waypoints: Points, goals: Points
) -> tuple[Points, Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Compute actions a = p (w - position) + d velocity; w is the waypoint, or the goal after it is reached.

    Args:
      controller: gains and limits.
      states: (x, y, vx, vy).
      previous: positions of the step before.
      waypoints, goals: current waypoints, and the goals.

    Returns:
      The actions; True where the goal is reached; True where the waypoint is reached and the goal is not.
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
    """Return shortest paths, indexed [start, goal], as rows in `cells`, without the start, padded with the goal.

    Among shortest paths, it takes the first possible move of y - 1, y + 1, x - 1, x + 1 at every cell.  D4RL's planner
    takes the same path (greedy in Q, ties to the first action).

    Raises:
      ValueError: the free cells are not connected.
    """
    free = np.arange(len(cells(maze)))
    beside = number(maze)[tuple((cells(maze)[:, None] + [(0, -1), (0, 1), (-1, 0), (1, 0)]).T)].T
    graph = np.zeros((len(free), len(free)))
    graph[np.nonzero(beside >= 0)[0], beside[beside >= 0]] = 1
    distance = shortest_path(graph, unweighted=True)
    if np.isinf(distance).any():
        raise ValueError(f"maze2d: {maze.name} must have connected free cells, got {maze.rows}")
    onwards = np.where((beside >= 0)[..., None], distance[beside], np.inf)
    towards = beside[free[:, None], np.argmin(onwards, 1)]
    towards[free, free] = free
    route = [towards]
    while len(route) < distance.max():
        route.append(towards[route[-1], free])
    return np.stack(route, -1)


# Episodes.


class Rules(NamedTuple):
    """Starts of episodes, and conditions to keep them; the defaults are the paper's values."""

    controller: Controller = Controller()
    start: Start = "inverse_area"
    """Distribution of the cells of starts and random goals; within a cell they are uniform.  `inverse_area`, of the
    paper's code, prefers small cells; `area` is uniform in space.  In the open maze both are uniform."""
    clearance: float = 0.26
    """Least distance to walls, in cells, of starts and goals; an episode that comes nearer is discarded."""
    limit: int = 1000
    """Largest number of rows of an episode; one that has not reached its first waypoint by then is discarded."""
    largest_speed: float | None = None
    """See `physics`."""


PAPER = Rules()
PROPOSALS = 16
"""Candidates for a start or goal; the first with the clearance is taken.  A candidate fails with probability below 0.2.
If all 16 fail, the start is too near to a wall, and its episode is discarded."""


@cache
def rooms(maze: Maze, clearance: float = 0.26) -> tuple[Points, Points, Float[np.ndarray, " c"]]:
    """Return lower corners, upper corners and areas of the free cells' parts with the clearance to adjacent walls.

    The area excludes a square of the clearance at a corner with a wall diagonally behind it, as in the paper's code.
    """
    at = cells(maze)
    solid = lambda i, j: walls(maze)[at[:, 0] + i, at[:, 1] + j]
    low = at - 0.5 + clearance * np.stack([solid(-1, 0), solid(0, -1)], 1)
    high = at + 0.5 - clearance * np.stack([solid(1, 0), solid(0, 1)], 1)
    corners = sum((solid(i, j) & ~solid(i, 0) & ~solid(0, j)).astype(int) for i in (-1, 1) for j in (-1, 1))
    return low, high, np.prod(high - low, 1) - clearance**2 * corners


def places(maze: Maze, uniform: Float[np.ndarray, "n proposals 3"], rules: Rules = PAPER) -> Points:
    """Map numbers uniform in [0, 1) to random points with the clearance to walls."""
    low, high, area = rooms(maze, rules.clearance)
    # Points near corners are rejected later, so a uniform density needs the area of the full rectangle.
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
    """Draw starts and waypoints of attempts; the last waypoint is the goal.  Attempt i has the generator (seed, i)."""
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
    """Yield attempts first, first + 1, .. endlessly; they do not depend on `environments` or `threads`."""
    with physics(maze, threads, rules.largest_speed) as step:
        lanes = np.arange(environments)
        names = first + lanes
        starts, paths = begin(maze, seed, names, goal, rules)
        states, previous = np.concatenate([starts, np.zeros_like(starts)], 1), starts
        at, row = np.zeros(environments, int), np.zeros(environments, int)
        log = np.empty((environments, rules.limit, 6), np.float32)
        finished: dict[int, Any] = {}
        while True:
            actions, solved, reached = control(rules.controller, states, previous, paths[lanes, at], paths[:, -1])
            at += reached
            log[lanes, row] = np.concatenate([states, actions], 1)
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
    """Generate episodes with `transitions` rows or more, to random goals (base data) or to a fixed goal (an expert's).

    The episodes depend only on the arguments up to `rules`.

    Args:
      maze: a maze, or its name in `MAZES`.
      transitions: least number of rows.
      seed: seed of starts, goals and offsets.
      goal: exact goal (x, y); None for random goals.
      rules: controller, starts and conditions.
      environments: largest number of simultaneous environments.
      threads: default: one per core.
      report: see `gendiff.data.episodes.Report`.

    Raises:
      ValueError: the maze is unknown, the goal is not free or not reachable, or a number is out of range.
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
    """Generate episodes into a folder, for `episodes.read`; after a kill, the same call resumes (`episodes.write`).

    Raises:
      ValueError: see `generate`; or the folder holds other data.
    """
    run = _run(maze, transitions, seed, goal, rules, environments, threads)
    configuration = {
        "maze": named(maze)._replace(goals=())._asdict(),
        "seed": int(seed),
        "goal": None if goal is None else [float(coordinate) for coordinate in goal],
        "rules": rules._asdict() | {"controller": rules.controller._asdict()},
    }
    return episodes.write(folder, configuration, run, transitions, shard, report)


def named(maze: str | Maze) -> Maze:
    """Return a maze, or look up its name in `MAZES`."""
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
    for name, value, least in (
        ("transitions", transitions, 1),
        ("seed", seed, 0),
        ("environments", environments, 1),
        ("limit", rules.limit, 1),
        ("threads", 1 if threads is None else threads, 1),
    ):
        check.number(f"maze2d: {name}", value, at_least=least, whole=True)
    check.number("maze2d: clearance", rules.clearance, at_least=0, below=0.5)
    if threads is not None:
        check.number("maze2d: threads", threads, at_least=1, whole=True)
    check.choice("maze2d: start", rules.start, get_args(Start))
    if goal is not None and not any(np.array_equal(np.rint(goal), cell) for cell in cells(maze)):
        raise ValueError(f"maze2d: goal must be a point in a free cell of the maze {maze.name}, got {goal}")
    # Few environments for few rows, because unfinished episodes are lost at the end.
    environments = min(environments, 1 + transitions // 500)
    return lambda first: attempts(maze, seed, goal, rules, environments, threads, first)


def main() -> None:
    """Write a data set from the command line."""
    about = "Generate Maze2D data; the same command resumes a stopped run."
    parser = argparse.ArgumentParser("python -m gendiff.data.maze2d", description=about)
    parser.add_argument("folder", type=files.argument)
    parser.add_argument("--maze", default="umaze", choices=MAZES)
    parser.add_argument("--goal", type=int, choices=range(1, 9), help="goal of an expert; default: random goals")
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default="inverse_area", choices=get_args(Start), help="area: uniform in space")
    parser.add_argument("--threads", type=int, help="default: one per core")
    options = parser.parse_args()
    goal = None if options.goal is None else MAZES[options.maze].goals[options.goal - 1]
    with tqdm(total=options.transitions, unit=" rows", unit_scale=True) as bar:

        def report(rows: int) -> None:
            if not bar.n:
                bar.initial = bar.n = rows  # so that the rate does not count rows of earlier runs
            bar.update(rows - bar.n)

        try:
            data = (options.maze, options.transitions, options.seed, goal, Rules(start=options.start))
            holds = write(options.folder, *data, threads=options.threads, report=report)
        except (ValueError, OSError, ImportError) as error:
            parser.error(str(error))
    command.say(f"{options.folder}: {holds.episodes} episodes, {holds.transitions} transitions")


if __name__ == "__main__":
    main()
