"""Maze2D: a controller drives a point mass through mazes, as in the relative-reward paper (NeurIPS 2023).

Mazes and physics are D4RL's (Fu et al. 2020), simulated by MuJoCo.  The controller, the starts and the rules for kept
episodes are those of the paper's code.  Lengths are in cells, times in steps of 0.01 s; an observation is (x, y, vx,
vy).

    python -m gendiff.data.maze2d FOLDER --maze umaze --goal 3 --transitions 1000000
"""

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from gendiff import check, command, distributed
from gendiff.data import episodes, files
from gendiff.data.episodes import Attempts, Episodes, Holds, Report
from gendiff.data.mazes import (
    MAZES,
    Goal,
    Maze,
    Points,
    States,
    cells,
    named,
    number,
    physics,
    routes,
    wall_distance,
    walls,
)

Start: TypeAlias = Literal["inverse_area", "area"]


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
    check.choice("maze2d: start", rules.start, get_args(Start))
    if goal is not None and not any(np.array_equal(np.rint(goal), cell) for cell in cells(maze)):
        raise ValueError(f"maze2d: goal must be a point in a free cell of the maze {maze.name}, got {goal}")
    # Few environments for few rows, because unfinished episodes are lost at the end.
    environments = min(environments, 1 + transitions // 500)
    return lambda first: attempts(maze, seed, goal, rules, environments, threads, first)


def simulated(
    folder: Path,
    maze: str | Maze,
    base: int,
    expert: int,
    seed: int,
    report: Callable[[str, int, int], object] = lambda name, rows, of: None,
) -> list[Episodes]:
    """Read the base set of a maze, and the experts' of its goals; the first process simulates the missing ones.

    Args:
      folder: of all sets.
      base, expert: transitions of a set.
      seed: of the data.
      report: called with a set's name, its rows so far and its transitions, for every hundredth.
    """
    sets = []
    for i, goal in enumerate((None, *named(maze).goals)):
        n = base if goal is None else expert
        name = f"base-{n}" if goal is None else f"goal-{i}-{n}"
        shown = [-n]

        def hundredth(rows: int, name: str = name, n: int = n, shown: list[int] = shown) -> None:
            if rows >= min(n, shown[0] + n // 100):
                shown[0] = rows
                report(name, rows, n)

        distributed.first(partial(write, folder / name, maze, n, 100 * seed + i, goal, report=hundredth))
        sets.append(distributed.everywhere(partial(episodes.read, folder / name)))
    return sets


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
