import importlib.util
import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff.data import episodes, maze2d, mazes
from gendiff.data.maze2d import Controller, Rules
from gendiff.data.mazes import MAZES

needs_mujoco = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="MuJoCo is not installed")
every_maze = pytest.mark.parametrize("maze", MAZES.values(), ids=MAZES)
MASS = 1000 * 4 / 3 * np.pi * 0.1**3


def free_step(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Semi-implicit Euler with the damping 1 implicit: m (v' - v) = dt (100 a - v')."""
    positions, velocities = states[:, :2], states[:, 2:]
    velocities = velocities + 0.01 * (100 * np.clip(actions, -1, 1) - velocities) / (MASS + 0.01)
    return np.concatenate([positions + 0.01 * velocities, velocities], 1)


# Mazes.


def test_sizes_of_the_mazes():
    assert [maze.extent for maze in MAZES.values()] == [(5, 7), (5, 5), (8, 8), (9, 12)]
    assert [len(mazes.cells(maze)) for maze in MAZES.values()] == [15, 7, 26, 46]
    assert [mazes.routes(maze).shape[-1] for maze in MAZES.values()] == [6, 6, 11, 19]


@every_maze
def test_goals_are_eight_free_places_in_order(maze):
    assert len(maze.goals) == len(set(maze.goals)) == 8
    assert list(maze.goals) == sorted(maze.goals)
    assert (mazes.wall_distance(maze, np.array(maze.goals)) > 0).all()


@every_maze
def test_the_wall_distance_is_that_of_all_squares(maze):
    points = np.random.default_rng(0).uniform([0, 0], np.array(maze.extent) - 1, (400, 2))
    squares = np.array([(i, j) for i, row in enumerate(maze.rows) for j, cell in enumerate(row) if cell == "#"])
    nearest = np.clip(points[:, None], squares - 0.5, squares + 0.5)
    expected = np.linalg.norm(points[:, None] - nearest, axis=-1).min(1)
    found = mazes.wall_distance(maze, points)
    near = np.isfinite(found)  # the middle of a large hall sees no wall
    np.testing.assert_allclose(found[near], expected[near], atol=1e-12)
    assert (expected[~near] > 1).all()


@every_maze
def test_routes_are_those_of_q_iteration(maze):
    free = [tuple(int(i) for i in cell) for cell in mazes.cells(maze)]
    moves = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]
    after = lambda cell, move: (cell[0] + move[0], cell[1] + move[1])
    stay = lambda cell, move: after(cell, move) if after(cell, move) in free else cell
    onwards = np.array([[free.index(stay(cell, move)) for move in moves] for cell in free])
    every = np.arange(len(free))
    for goal in every:
        value = np.zeros((len(free), 5))
        for _ in range(25):
            value = (every == goal)[:, None] + 0.99 * value.max(1)[onwards]
        place = every
        for step in mazes.routes(maze)[:, goal].T:
            place = onwards[place, np.argmax(value[place], 1)]
            np.testing.assert_array_equal(step, place)
        assert (place == goal).all()


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (("####", "#  #", "###"), "rows of one length"),
        (("####", "#   ", "####"), "within a rim of wall"),
        (("#####", "# # #", "#####"), "connected free cells"),
    ],
)
def test_impossible_mazes(rows, what):
    with pytest.raises(ValueError, match=f"mine must have .*{what}"):
        mazes.routes(mazes.Maze("mine", rows, ()))


# Physics.


@needs_mujoco
def test_a_step_in_free_space_has_a_closed_form():
    rng = np.random.default_rng(0)
    states = np.concatenate([rng.uniform([1, 1], [3, 5], (200, 2)), rng.uniform(-10, 10, (200, 2))], 1)
    actions = rng.uniform(-2, 2, (200, 2))
    with mazes.physics(MAZES["open"], 1) as step:
        np.testing.assert_allclose(step(states, actions), free_step(states, actions), rtol=0, atol=1e-12)
    slow = states.copy()
    slow[:, 2:] = slow[:, 2:].clip(-5, 5)
    with mazes.physics(MAZES["open"], 2, largest_speed=5.0) as step:
        np.testing.assert_allclose(step(states, actions), free_step(slow, actions), rtol=0, atol=1e-12)


@needs_mujoco
@pytest.mark.parametrize("axis", [0, 1])
def test_walls_stop_the_ball_and_let_it_slide(axis):
    """The first and last free cell along each axis of the open maze; the other axis moves as in free space.

    (So it does within one cell: the seam between two walls brakes a little.)
    """
    last = (3, 5)[axis]
    states = np.array([[2.4, 2.5, 0, 0]] * 2)
    actions = np.full((2, 2), 0.02)
    actions[:, axis] = (-1, 1)
    alone = states
    with mazes.physics(MAZES["open"], 1) as step:
        for _ in range(150):
            states, alone = step(states, actions), free_step(alone, actions)
    np.testing.assert_allclose(states[:, axis], [1 - 0.597, last + 0.197], atol=2e-3)
    np.testing.assert_allclose(states[:, 2 + axis], 0, atol=1e-2)
    other = [1 - axis, 3 - axis]
    np.testing.assert_allclose(states[:, other], alone[:, other], atol=1e-9)


# The controller.

NUMBERS = st.floats(-3, 3)


@given(numbers=st.lists(NUMBERS, min_size=8, max_size=8), factor=st.floats(0, 0.999), step=st.floats(0, 0.099))
def test_decisions(numbers, factor, step):
    place, velocity, waypoint, goal = np.array(numbers).reshape(4, 1, 2)
    state = np.concatenate([place, velocity], 1)
    towards = lambda point: 3 * (point - place) - np.sqrt(0.3) * velocity
    decide = lambda moved, waypoint, goal: maze2d.control(
        Controller(), state, place - [moved * np.sqrt(0.5)], waypoint, goal
    )
    far = place + np.sign(goal) + (goal == 0)
    near = place + factor * 0.3 * np.array([[0.6, 0.8]])
    for waypoint_is_near, goal_is_near, moved in np.ndindex(2, 2, 2):
        w, g = (near if waypoint_is_near else far), (near if goal_is_near else far)
        action, solved, reached = decide(np.array([step, step + 0.11])[[moved, moved]], w, g)
        assert bool(solved[0]) == bool(goal_is_near and not moved)
        assert bool(reached[0]) == bool(waypoint_is_near and not goal_is_near and not moved)
        np.testing.assert_allclose(action, towards(g if solved[0] else w), atol=1e-12)
    upstream = maze2d.control(maze2d.D4RL, state, place, waypoint, far)[0]
    np.testing.assert_allclose(upstream, np.clip(10 * (waypoint - place) - velocity, -1, 1), atol=1e-12)


@pytest.mark.parametrize("controller", [Controller(), maze2d.D4RL])
def test_waypoints_are_the_cells_of_the_route_with_an_offset(controller):
    maze = MAZES["large"]
    starts, paths = maze2d.begin(maze, 0, np.arange(400), None, Rules(controller))
    free = mazes.cells(maze).tolist()
    offsets = []
    for start, path in zip(starts, paths, strict=True):
        route = mazes.routes(maze)[free.index(np.rint(start).tolist()), free.index(np.rint(path[-1]).tolist())]
        count = np.sum(route != route[-1])
        np.testing.assert_array_equal(path[count:], np.tile(path[-1], (len(path) - count, 1)))
        offset = path[:count] - mazes.cells(maze)[route[:count]]
        if not controller.each:
            np.testing.assert_allclose(offset, np.tile(offset[:1], (count, 1)), atol=1e-12)
        offsets.append(offset if controller.each else offset[:1])
    low, high = controller.offset
    # Kolmogorov-Smirnov, false-alarm rate 1e-4.
    assert stats.kstest(np.concatenate(offsets).ravel(), stats.uniform(low, high - low).cdf).pvalue > 1e-4


# Starts.


def test_areas_of_the_cells():
    areas = np.concatenate([maze2d.rooms(maze)[2] for maze in MAZES.values() if maze.planned])
    assert sorted({round(float(area), 3) for area in areas}) == [0.355, 0.48, 0.548, 0.605, 0.672]


@every_maze
@pytest.mark.parametrize("start", ["inverse_area", "area"])
def test_densities_of_starts_and_goals(maze, start):
    n = 20_000
    points = maze2d.places(maze, np.random.default_rng(0).random((n, maze2d.PROPOSALS, 3)), Rules(start=start))
    assert (mazes.wall_distance(maze, points) >= 0.26 - 1e-12).all()
    low, high, area = maze2d.rooms(maze)
    rectangle = np.prod(high - low, 1)
    # Where starts may be: without the quarter discs around corners (the area that the paper's code takes has squares).
    allowed = rectangle - np.round((rectangle - area) / 0.26**2) * np.pi / 4 * 0.26**2
    assert (allowed / rectangle).min() > 0.8
    share = allowed if start == "area" or maze.name == "open" else allowed / rectangle / area
    cells = mazes.cells(maze).tolist()
    counts = np.bincount([cells.index(cell) for cell in np.rint(points).astype(int).tolist()], minlength=len(cells))
    # Chi-square over the cells; false-alarm rate 1e-4 for each maze and distribution.
    assert stats.chisquare(counts, n * share / share.sum()).pvalue > 1e-4
    if maze.name == "open":
        for axis, end in enumerate((3.24, 5.24)):
            assert stats.kstest(points[:, axis], stats.uniform(0.76, end - 0.76).cdf).pvalue > 1e-4


# Episodes.


def plain(maze: mazes.Maze, seed: int, attempt: int) -> np.ndarray | None:
    """One attempt of the paper's loop, step by step, in scalar code on MuJoCo's own."""
    import mujoco

    (start,), (path,) = maze2d.begin(maze, seed, np.array([attempt]))
    model = mujoco.MjModel.from_xml_string(mazes.xml(maze))
    data = mujoco.MjData(model)
    data.qpos[:] = before = start
    at, rows = 0, []
    while True:
        place, velocity = data.qpos.copy(), data.qvel.copy()
        slow = np.linalg.norm(before - place) < 0.1
        solved = slow and np.linalg.norm(path[-1] - place) < 0.3
        waypoint = path[-1] if solved else path[at]
        action = 3 * (waypoint - place) - 0.3**0.5 * velocity
        at += bool(not solved and slow and np.linalg.norm(waypoint - place) < 0.3)
        rows.append(np.concatenate([place, velocity, action]))
        if mazes.wall_distance(maze, place[None])[0] < 0.26:
            return None
        if solved or len(rows) == 1000:
            return np.array(rows) if solved or at else None
        before, data.ctrl[:] = place, action
        data.qacc_warmstart[:] = 0  # a step depends on the state alone
        mujoco.mj_step(model, data)


@needs_mujoco
@pytest.mark.parametrize(("name", "first"), [("open", 0), ("umaze", 10**6), ("medium", 0)])
def test_attempts_are_those_of_a_plain_loop(name, first):
    maze = MAZES[name]
    for i, attempt in enumerate(islice(maze2d.attempts(maze, 3, environments=5, threads=1, first=first), 12)):
        expected = plain(maze, 3, first + i)
        assert (attempt is None) == (expected is None)
        if attempt is not None and expected is not None:
            np.testing.assert_allclose(np.concatenate(attempt, 1), expected, rtol=1e-6, atol=1e-6)


@needs_mujoco
def test_episodes_do_not_depend_on_how_they_are_run():
    one = maze2d.generate("medium", 3000, 1, environments=1, threads=1)
    many = maze2d.generate(MAZES["medium"], 3000, 1, environments=7, threads=2)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)
    assert 3000 <= len(one.actions) < 3000 + one.lengths[-1]
    assert not np.array_equal(maze2d.generate("medium", 1, 2).actions[:5], one.actions[:5])


SPEC = {"open": (39, 1000, 0.0), "umaze": (66, 600, 0.06), "medium": (137, 290, 0.12), "large": (212, 190, 0.13)}
"""Mean length and share of discarded attempts of an independent replica, from about so many episodes each."""


@needs_mujoco
@pytest.mark.parametrize("name", SPEC)
def test_statistics_of_base_episodes(name):
    maze, (mean, of, share) = MAZES[name], SPEC[name]
    tried = list(islice(maze2d.attempts(maze, 0, environments=150, threads=1), 300))
    kept = [attempt for attempt in tried if attempt is not None]
    lengths = np.array([len(rows) for rows, _ in kept])
    # Both samples' errors and the table's rounding; 4 standard errors, false-alarm rate 6e-5 each.
    error = lengths.std() * np.sqrt(1 / len(lengths) + 1 / of)
    assert abs(lengths.mean() - mean) < 4 * error + 0.5
    discarded = 1 - len(kept) / len(tried)
    assert abs(discarded - share) < 4 * np.sqrt(share * (1 - share) * (1 / len(tried) + 1 / of)) + 0.005
    seen, done = (np.concatenate(part) for part in zip(*kept, strict=True))
    assert (mazes.wall_distance(maze, seen[:, :2]) > 0.26 - 1e-6).all()
    largest = abs(done).max(0)
    # 3 times the longest straight way in the open maze, else about 1.5 cells and some speed.
    assert (largest < ([7.45, 13.45] if name == "open" else 5.6)).all()
    assert (largest > ([6, 11] if name == "open" else 4)).all()


@needs_mujoco
@every_maze
def test_an_expert_goes_to_its_goal(maze):
    goal = maze.goals[3]
    observations, actions, lengths = maze2d.generate(maze, 3000, 5, goal)
    ends = np.cumsum(lengths) - 1
    assert (np.hypot(*(observations[ends, :2] - goal).T) < 0.3).all()
    assert (observations[ends + 1 - lengths, 2:] == 0).all()
    # The last action heads for the exact goal, and is stored as it is.
    expected = 3 * (goal - observations[ends, :2]) - 0.3**0.5 * observations[ends, 2:]
    np.testing.assert_allclose(actions[ends], expected, atol=1e-5)
    if maze.name == "open":
        assert abs(actions).max() > 2
        np.testing.assert_allclose(
            actions, 3 * (goal - observations[:, :2]) - 0.3**0.5 * observations[:, 2:], atol=1e-5
        )


@needs_mujoco
def test_a_limit_ends_episodes_and_discards_those_that_got_nowhere():
    run = lambda rules: list(islice(maze2d.attempts(MAZES["umaze"], 0, None, rules, 20, 1), 60))
    short, whole = run(Rules(limit=30)), run(Rules())
    ends = {len(rows) for rows, _ in filter(None, short)}
    assert max(ends) == 30
    assert any(a is None and b is not None for a, b in zip(short, whole, strict=True))
    for a, b in zip(short, whole, strict=True):
        if a is not None and b is not None:
            np.testing.assert_array_equal(a[0], b[0][:30])


@needs_mujoco
def test_a_stopped_data_set_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    def stop(rows):
        if rows > 1500:
            raise KeyboardInterrupt

    goal = MAZES["umaze"].goals[2]
    arguments = ("umaze", 2500, 4, goal, Rules(), 1000)
    with pytest.raises(KeyboardInterrupt):
        maze2d.write(tmp_path / "stopped", *arguments, report=stop)
    holds = maze2d.write(tmp_path / "stopped", *arguments)
    assert maze2d.write(tmp_path / "whole", *arguments, environments=2) == holds
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes()
    read, made = episodes.read(tmp_path / "stopped"), maze2d.generate("umaze", 2500, 4, goal)
    for a, b in zip(read, made, strict=True):
        np.testing.assert_array_equal(a, b)
    assert holds.shards == 3

    command = ["maze2d", str(tmp_path / "cli"), "--maze", "umaze", "--goal", "3", "--transitions", "500", "--seed", "4"]
    monkeypatch.setattr(sys, "argv", command)
    maze2d.main()
    first = episodes.read(tmp_path / "cli")
    assert f"{len(first.lengths)} episodes, {len(first.actions)} transitions" in capsys.readouterr().out
    np.testing.assert_array_equal(first.observations, made.observations[: len(first.observations)])
    monkeypatch.setattr(sys, "argv", [*command[:-1], "5"])
    with pytest.raises(SystemExit):
        maze2d.main()
    assert "must be a folder of {'seed': 5}, got one of {'seed': 4}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"maze": "small"}, "maze must be 'open' or 'umaze' or 'medium' or 'large', got 'small'"),
        ({"goal": (2, 1.4)}, r"goal must be a point in a free cell of the maze umaze, got \(2, 1.4\)"),
        ({"goal": (9, 1)}, "a free cell of the maze umaze"),
        ({"transitions": 0}, "transitions must be >= 1 and whole, got 0"),
        ({"seed": -1}, "seed must be >= 0 and whole, got -1"),
        ({"environments": 0}, "environments must be >= 1 and whole, got 0"),
        ({"rules": Rules(start="uniform")}, "start must be 'inverse_area' or 'area', got 'uniform'"),
        ({"rules": Rules(limit=0)}, "limit must be >= 1"),
        ({"rules": Rules(clearance=np.nan)}, "clearance must be >= 0 and < 0.5, got nan"),
        ({"threads": 0}, "threads must be >= 1 and whole, got 0"),
        ({"threads": -1}, "threads must be >= 1 and whole, got -1"),
        ({"transitions": 1.5}, "transitions must be >= 1 and whole, got 1.5"),
        ({"goal": (np.nan, 1)}, "a free cell of the maze umaze"),
    ],
)
def test_what_cannot_be_made_is_named(change, what, tmp_path):
    arguments = {"maze": "umaze", "transitions": 10, "seed": 0, **change}
    with pytest.raises(ValueError, match=what):
        maze2d.generate(**arguments)
    with pytest.raises(ValueError, match=what):
        maze2d.write(tmp_path, **arguments)
    assert not any(tmp_path.iterdir())


def test_beyond_the_maze_all_is_wall():
    points = np.array([[-30.0, 1.0], [1.0, 90.0], [-0.9, -0.9], [1e9, 1e9]])
    np.testing.assert_array_equal(mazes.wall_distance(MAZES["umaze"], points), 0)
    for bad, what in ((points * np.nan, "points must be a finite number, got nan"), (points[:, :1], "have shape")):
        with pytest.raises(ValueError, match=what):
            mazes.wall_distance(MAZES["umaze"], bad)


@needs_mujoco
def test_a_goal_that_cannot_be_reached_is_an_error():
    with pytest.raises(ValueError, match="got 2000 discarded ones in a row"):
        maze2d.generate("umaze", 10**6, 0, (0.51, 0.51), threads=1)


def test_without_mujoco_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"pip install 'gendiff\[maze\]'"):
        maze2d.generate("open", 1, 0)


@needs_mujoco
def test_the_physics_is_that_of_gymnasium_robotics():
    """Its point maze has D4RL's physics, with speeds up to 5, x the column, y upwards, and 0 in the maze's middle.

    In D4RL the walls lie 0.2 nearer to the origin.
    """
    gymnasium = pytest.importorskip("gymnasium")
    gymnasium.register_envs(pytest.importorskip("gymnasium_robotics"))
    layout = [[int(cell == "#") for cell in row] for row in MAZES["umaze"].rows]
    env = gymnasium.make("PointMaze_UMaze-v3", maze_map=layout).unwrapped.point_env
    turned = lambda x, y: np.array([y, -x])
    place = lambda state: turned(*(state[0, :2] + 0.2 - 2))
    rng = np.random.default_rng(0)
    state = np.array([[1.0, 1.0, 0.0, 0.0]])
    env.set_state(place(state), np.zeros(2))
    with mazes.physics(MAZES["umaze"], 1, 5.0) as step:
        for action in np.repeat(rng.uniform(-1, 1, (40, 2)), 10, 0):
            env.step(turned(*action))
            state = step(state, action[None])
            np.testing.assert_allclose(env.data.qpos, place(state), atol=1e-3)
            np.testing.assert_allclose(env.data.qvel, turned(*state[0, 2:]), atol=1e-2)
    env.close()
