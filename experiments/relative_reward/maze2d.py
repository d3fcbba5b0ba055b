"""Relative rewards in Maze2D: the reward of two diffusion models finds the expert's goal (Nuti, Franzmeyer and
Henriques 2023, section 5.1).

A base model learns paths between random places of a maze, an expert paths to a goal. A potential learns the difference
of the two models. It should be highest at the goal, tell the expert's paths from the base set's, and steer the base
model to the goal.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np

from experiments.lab import figures
from experiments.lab.config import Between, Distinct, Scheduled
from experiments.lab.experiment import Experiment, Paper
from experiments.lab.phases import Lab, Run
from experiments.lab.programs import Program
from experiments.lab.table import Column, Row
from experiments.relative_reward import programs as plan
from experiments.relative_reward import rows, trajectories
from experiments.relative_reward.rows import Rewards, Steered, at
from experiments.relative_reward.trajectories import HEAT, PLANS, Family, PathsConfig, Place
from gendiff.data import maze2d as data
from gendiff.data import mazes, windows
from gendiff.methods.relative_reward import PRINCIPLED, PUBLISHED
from gendiff.metrics import heat


@dataclasses.dataclass(frozen=True)
class MazeConfig(PathsConfig):
    """The data, the diffusion models, the rewards and their evaluation."""

    mazes: Annotated[tuple[Literal["open", "umaze", "medium", "large"], ...], Distinct()] = ("open", "umaze")
    """Mazes of the table."""
    transitions: Annotated[int, Between(1000, 10_000_000)] = 200_000
    """Transitions (time steps of 10 ms) of a maze's base set."""
    expert_transitions: Annotated[int, Between(1000, 10_000_000)] = 100_000
    """Transitions of the set of an expert, of eight."""
    small: Annotated[int, Between(1000, 10_000_000)] = 10_000
    """Transitions of all sets of the row `small-data`."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the data."""
    places: Annotated[int, Between(100, 1_000_000)] = 4000
    """Held-out windows of the base set, of 64 time steps, in a heat map."""
    plans: Annotated[int, Between(10, 1_000_000)] = 256
    """Paths from held-out starts, of which the table counts those that end at the goal."""
    radius: Annotated[float, Between(0.05, 2.0)] = 0.5
    """Largest distance to the goal, in cells, of a path that ends there."""


PRESETS = {
    "smoke": MazeConfig(
        preset="smoke", mazes=("umaze",), transitions=4000, expert_transitions=2000, small=1000, width=8,
        multipliers=(1, 2), diffusion_steps=20, models=Scheduled(40, batch=16, rate=2e-3), seeds=1, pool=128,
        rewards=Scheduled(40, batch=32, rate=1e-3), window=4, widths=(16,), grid=(4,), places=200, compared=64,
        plans=16,
    ),
    "default": MazeConfig(),
    "paper": MazeConfig(
        preset="paper", mazes=("open", "umaze", "medium", "large"), transitions=10_000_000,
        expert_transitions=10_000_000, horizon=256, stride=1, width=32, multipliers=(1, 4, 8),
        models=Scheduled(500_000, batch=128, rate=2e-4, schedule="constant"), seeds=5, pool=100_000,
        rewards=Scheduled(100_000, batch=256, rate=5e-5, schedule="constant"), window=4, widths=(128, 64, 32),
        grid=(1, 4, 64, 256), places=10_000, compared=25_600, plans=1000,
    ),
}  # fmt: skip

COLUMNS = (
    Column("goal_recovery", "goal recovered %", percent=True, digits=1),
    Column("discriminability", "discriminability %", percent=True, digits=1),
    Column("discriminability_in_sample", "the same, in sample %", percent=True, digits=1),
    Column("goal_rate", "paths that end at the goal %", percent=True, digits=1),
    Column("gradient_r2", "gradient R2", digits=2),
    Column("seconds", "seconds", digits=1),
)
NOTES = """\
Intervals are 95 %: Wilson's for rates over goals and seeds (which share the diffusion models of a maze), Student's over
goals for the others (means over seeds). goal recovered: the highest place of the smoothed heat map lies within a cell
of the goal. discriminability: balanced accuracy of a logistic regression, base against expert, on the reward of a path
of {compared_steps} time steps, noised to the first tenth of the times. It is fitted on half the held-out episodes and
scored on the others. Values are centred and scaled by the base's mean and deviation at their time, because a reward is
known up to a constant of the time; "in sample" fits and scores on the same training paths without centring, as the
published code does. gradient R2: share of the squared difference of the two models that the reward's gradient explains,
on held-out paths. paths that end at the goal: within {radius:g} cells, of {plans} paths of {horizon} frames from
held-out starts per goal. seconds: of training, per reward (rows of models: per model).
`published`: as the released code; `principled`: one normaliser, smooth activation, gradient at x_t, contiguous windows,
masked conditions. `published-best-per-goal`: the best window per goal, on rewards of another seed. `discriminator`: the
same network as a classifier, by its log-odds. `small-data`: `principled` with all models and rewards trained on
{small:,} transitions. Only rewards of the first seed steer. The paper has 78.75 +- 8.96 % of goals recovered for open
and umaze, 77.50 +- 9.15 % for medium and large, 78.12 +- 6.40 % for all four, 75.0 % with 10,000 transitions, and a
discriminability of 83.76 % in sample, with the best of 24 configurations per goal."""
PAPER = {
    "published-best-per-goal/open+umaze": {"goal_recovery": 0.7875},
    "published-best-per-goal/medium+large": {"goal_recovery": 0.7750},
    "published-best-per-goal/open+umaze+medium+large": {"goal_recovery": 0.7812, "discriminability_in_sample": 0.8376},
    "small-data/open+umaze+medium+large": {"goal_recovery": 0.75},
}
COORDINATES = ("a_x", "a_y", "x", "y", "v_x", "v_y")
"""Coordinates of a row of a path; actions come first."""
PLACE = slice(2, 4)
GOALS = 8
LEARNT = ("published", "principled", "published-best-per-goal", "discriminator", "small-data")
DRAWN = {"unsteered": (False, False), "steered": (False, True), "expert": (True, False)}
"""Row of paths -> (the expert draws them, its reward steers)."""


def families(maze: str) -> list[Family]:
    """Return the diffusion models of a maze."""
    place = Place(maze, sorted(mazes.MAZES).index(maze), 2, len(COORDINATES), GOALS)
    return [
        Family(place, "published", PUBLISHED),
        Family(place, "principled", PRINCIPLED, conditions=(0,)),
        Family(place, "small-data", PRINCIPLED, True, conditions=(0,)),
    ]


def table(lab: Lab) -> None:
    """Train and measure the rows, maze by maze."""
    for maze in lab.config.mazes:
        published, principled, _ = models = families(maze)
        lab.each(partial(load, maze))
        trajectories.diffusers(lab, published.place, models)
        for family in models:
            trajectories.pools(lab, family)
            learnt(lab, family.name, family)
        trajectories.best_per_expert(lab, "published-best-per-goal", published, evaluate)
        learnt(lab, "discriminator", principled)
        steering(lab, principled)
        lab.each(partial(forget, maze))
    lab.each(add_rows)


def load(maze: str, run: Run) -> None:
    """Simulate or read the data of a maze."""
    config, folder = run.config, run.folder.path / "data" / maze
    report = lambda name, done, of: run.progress.alone(f"{maze}/data/{name}", of)(done)
    sizes = (config.transitions, config.expert_transitions), (config.small, config.small)
    sets = [data.simulated(folder, maze, *size, config.data_seed, report) for size in sizes]
    divide = lambda episodes: windows.divide(windows.thinned(episodes, config.stride), config.held_out)
    run.results[f"{maze}/episodes"] = [list(map(divide, of_size)) for of_size in sets]


def forget(maze: str, run: Run) -> None:
    """Free the memory of a maze's data and pools."""
    for phase in list(run.results):
        if phase.startswith(maze) and phase.endswith(("/episodes", "pool")):
            del run.results[phase]


def learnt(lab: Lab, row: str, family: Family) -> None:
    """Train and measure the rewards of a family, or their discriminators."""
    rewards = family.rewards(lab.config)
    evaluate(lab, row, family, rewards, trajectories.train(lab, row, family, rewards))


def heat_maps(run: Run, family: Family, rewards: Rewards, phase: str) -> dict[str, np.ndarray]:
    """Map the rewards of held-out windows of the base set at the least noise, and look for the goals."""
    config, maze, window = run.config, mazes.MAZES[family.place.name], rewards.network.window
    length = -(-max(64 // config.stride, window) // window) * window
    key = partial(family.place.key, run, HEAT)
    paths = windows.draw(key(0), family.windows(run, 0, True, length), config.places, length)
    heats = rows.heat_maps(rewards, run[phase], paths, places_of(run, family, paths), maze.extent, key(1))
    recovered = [heat.recovered(field, maze.goals[i]) for field, i in zip(heats, rewards.owners, strict=True)]
    mean, counts = zip(*[field[:2] for field in heats[:: rewards.seeds]], strict=True)
    return {"goal_recovery": np.array(recovered), "mean": np.stack(mean), "counts": np.stack(counts)}


evaluate = partial(trajectories.evaluate, more=heat_maps)


def places_of(run: Run, family: Family, paths: Any) -> np.ndarray:
    """Return the places (.., 2), in cells, of rows (.., 6) in the units of the base model."""
    return windows.unnormalise(family.units(run, 0), np.asarray(paths))[..., PLACE]


def steering(lab: Lab, family: Family) -> None:
    """Draw paths to all goals from held-out starts: of the base model, steered by its reward, and of the expert."""
    config, name, rewards = lab.config, family.place.name, family.rewards(lab.config)
    models, known = family.models(config), jnp.asarray(family.known(config))
    goals, phis = np.array(mazes.MAZES[name].goals), f"{name}/{family.name}/rewards"

    def case(run: Run, row: str, goal: int) -> Steered:
        (expert, steered), key = DRAWN[row], partial(family.place.key, run, PLANS)
        theta, phi = at(family.thetas(run), (goal + 1) * expert), at(run[phis], goal * rewards.seeds)
        held = windows.draw(key(10 + goal), family.windows(run, 0, True), config.plans, config.horizon)
        return Steered(theta, phi, run.config.guidance_scale * steered, known, held, key(100 + goal))

    def add(row: str, run: Run) -> None:
        places = run.results[f"{name}/{row}/places"] = places_of(run, family, run[f"{name}/plans/{row}"]["samples"])
        near = np.hypot(*(places[:, :, -1] - goals[:, None]).transpose(2, 0, 1)) <= run.config.radius
        seconds = run.seconds(f"{name}/diffusers") / (len(families(name)) * (GOALS + 1))
        rows.add(run, f"{name}/{row}", goal_rate=near.ravel(), seconds=[seconds] * GOALS)

    def denoising(run: Run) -> dict[str, Any]:
        """Denoise a path to the first goal, from the farthest start, with the rewards of its windows, for a figure."""
        first = case(run, "steered", 0)
        start = first.held[int(np.argmax(np.hypot(*(places_of(run, family, first.held[:, 0]) - goals[0]).T)))]
        first = first._replace(held=start, key=family.place.key(run, PLANS, 2))
        path = lambda scale: rows.denoising_path(models, rewards, first._replace(scale=scale), 6)
        paths = {"unsteered": path(0.0), "steered": path(run.config.guidance_scale)}
        for states in paths.values():
            states["places"] = places_of(run, family, states.pop("windows")).reshape(6, -1, 2)
        return paths

    for row in DRAWN:
        cases = lambda run, row=row: [case(run, row, goal) for goal in range(GOALS)]
        rows.steer(lab, f"{name}/plans/{row}", models, rewards.problem.network, cases)
        lab.each(partial(add, row))
    lab.once(f"{name}/denoising", denoising)


def add_rows(run: Run) -> None:
    """Add the rows over all mazes, followed by their rows maze by maze."""
    seeds, names = run.config.seeds, run.config.mazes
    for row in (*LEARNT, *DRAWN):
        parts = [run[f"{maze}/{row}"] for maze in names]
        run.add(row, rows.measured(parts, seeds, COLUMNS), PAPER.get(f"{row}/{'+'.join(names)}"))
        if len(names) > 1:
            for maze, part in zip(names, parts, strict=True):
                run.add(f"{row}/{maze}", rows.measured([part], seeds, COLUMNS))


def row_names(config: MazeConfig) -> list[str]:
    """Return the names of the rows of a run: over all mazes and, if there are several, of single mazes."""
    parts = ["", *(f"/{maze}" for maze in config.mazes if len(config.mazes) > 1)]
    return [row + part for row in (*LEARNT, *DRAWN) for part in parts]


def programs(config: MazeConfig) -> dict[str, Program]:
    """Return the programs that take the time of a maze."""
    models = families(config.mazes[0])
    return plan.of_paths(config, models, models[1], config.transitions, config.plans)


def draw_figures(folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Draw heat maps (the paper's Fig. 3), histograms, and plans coloured by reward (Fig. 1)."""
    run = members[0]
    for name in run.config.mazes:
        goals, walls = mazes.MAZES[name].goals, mazes.walls(mazes.MAZES[name])
        for row in LEARNT:
            values = run[f"{name}/{row}"]
            heats = [(values["mean"][i], values["counts"][i]) for i in np.argsort(values["expert"])]
            figures.heat_maps(folder / f"heat-{name}-{row}.png", heats, walls, goals)
        panels = {f"goal {i}": tuple(pair) for i, pair in enumerate(run[f"{name}/principled"]["pairs"], 1)}
        figures.histograms(folder / f"histograms-{name}.png", panels)
        plans = {row: list(run[f"{name}/{row}/places"]) for row in DRAWN}
        figures.plans(folder / f"plans-{name}.png", plans, walls, goals)
        paths = {row: run[f"{name}/denoising"][row] for row in ("unsteered", "steered")}
        shown = {row: (path["places"], np.repeat(path["rewards"], run.config.window, 1)) for row, path in paths.items()}
        times = paths["steered"]["times"].tolist()
        figures.denoising(folder / f"denoising-{name}.png", shown, times, walls, goals[0])


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """Return the text below the table."""
    return NOTES.format(**dataclasses.asdict(members[0].config))


EXPERIMENT = Experiment(
    "relative_reward.maze2d", MazeConfig, PRESETS, table, COLUMNS, row_names,
    Paper("Extracting reward functions from diffusion models", "2306.01804", "section 5.1, Figures 1 and 3", PAPER),
    extras=("maze",), notes=notes, figures=draw_figures, programs=programs,
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
