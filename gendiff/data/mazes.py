"""The mazes of Maze2D and a point mass in them: D4RL's (Fu et al. 2020), simulated by MuJoCo.

Lengths are in cells, times in steps of 0.01 s; a state is (x, y, vx, vy).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse.csgraph import shortest_path

from gendiff import check

States: TypeAlias = Float[np.ndarray, "n 4"]
Points: TypeAlias = Float[np.ndarray, "n 2"]
Step: TypeAlias = Callable[[States, Points], States]
"""A function (states, actions) -> states 0.01 s later.  The motors clip actions to [-1, 1]."""
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


def named(maze: str | Maze) -> Maze:
    """Return a maze, or look up its name in `MAZES`."""
    return MAZES[check.choice("maze2d: maze", maze, list(MAZES))] if isinstance(maze, str) else maze


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
