"""Relative rewards in Maze2D: a reward from two diffusion models, whose highest place is the expert's goal (Nuti,
Franzmeyer and Henriques 2023, section 5.1).

A base model learns paths between random places of a maze, an expert paths to one goal. A potential learns the
difference of the two models. Where it is highest should be the goal, it should tell the expert's paths from others, and
adding its gradient to the base model should lead there.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

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
    """Mazes that are run."""
    transitions: Annotated[int, Between(1000, 10_000_000)] = 200_000
    """Transitions (time steps of 10 ms) of the base set of each maze."""
    expert_transitions: Annotated[int, Between(1000, 10_000_000)] = 100_000
    """The same for each of the eight experts."""
    small: Annotated[int, Between(1000, 10_000_000)] = 10_000
    """The same for all sets of the row `small-data`."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the data."""
    places: Annotated[int, Between(100, 1_000_000)] = 4000
    """Held-out windows of the base set, of 64 time steps, that a heat map is made of."""
    plans: Annotated[int, Between(10, 1_000_000)] = 256
    """Paths from held-out starts, of which the share that ends at the goal is counted."""
    radius: Annotated[float, Between(0.05, 2.0)] = 0.5
    """Distance to the goal, in cells, that counts as having reached it."""


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
goals for the others (means over seeds). goal recovered: the highest place of the smoothed heat map lies within one cell
of the goal. discriminability: balanced accuracy of a logistic regression on the reward of a path of {compared_steps}
time steps, noised to the first tenth of the times, base against expert: fitted on half the held-out episodes, scored on
the others, each value less the base's mean at its time and in units of its deviation there (a reward is known up to a
constant for each time); "in sample" fits and scores on the same training paths as they are, as the published code does.
gradient R2: share of the squared difference of the two models that the reward's gradient explains, on held-out paths.
paths that end at the goal: within {radius:g} cells, of {plans} paths of {horizon} frames from held-out starts for each
goal. seconds: of training, for each reward (rows of models: for each model).
`published`: as the released code; `principled`: one normaliser, smooth activation, gradient at x_t, contiguous windows,
given states masked. `published-best-per-goal`: the window chosen for each goal on rewards of another seed.
`discriminator`: the same network as a classifier, by its log-odds. `small-data`: `principled` with all models and
rewards trained on {small:,} transitions. Only the rewards of the first seed steer. The paper gives 78.75 +- 8.96 % of
goals recovered for open and umaze, 77.50 +- 9.15 % for medium and large, 78.12 +- 6.40 % for all four, 75.0 % with
10,000 transitions, and a discriminability of 83.76 % in sample, each goal with the best of 24 configurations."""
PAPER = {
    "published-best-per-goal/open+umaze": {"goal_recovery": 0.7875},
    "published-best-per-goal/medium+large": {"goal_recovery": 0.7750},
    "published-best-per-goal/open+umaze+medium+large": {
        "goal_recovery": 0.7812,
        "discriminability_in_sample": 0.8376,
    },
    "small-data/open+umaze+medium+large": {"goal_recovery": 0.75},
}
COORDINATES = ("a_x", "a_y", "x", "y", "v_x", "v_y")
"""Of a row of a path; actions come first."""
PLACE = slice(2, 4)
GOALS = 8
LEARNT = ("published", "principled", "published-best-per-goal", "discriminator", "small-data")
DRAWN = {"unsteered": (False, False), "steered": (False, True), "expert": (True, False)}
"""Rows of paths: whether the expert draws them, and whether its reward steers."""


def families(maze: str) -> list[Family]:
    """The diffusion models of a maze."""
    place = Place(maze, sorted(mazes.MAZES).index(maze), 2, len(COORDINATES), GOALS)
    return [
        Family(place, "published", PUBLISHED),
        Family(place, "principled", PRINCIPLED, given=(0,)),
        Family(place, "small-data", PRINCIPLED, True, given=(0,)),
    ]


def table(lab: Lab) -> None:
    """Every row, maze by maze."""
    for maze in lab.config.mazes:
        published, principled, small = models = families(maze)
        lab.each(partial(load, maze))
        trajectories.diffusers(lab, published.place, models)
        learnt(lab, published)
        learnt(lab, principled)
        trajectories.best_per_expert(lab, "published-best-per-goal", published, evaluate)
        rewards = principled.rewards(lab.config)
        phase = trajectories.discriminators(lab, "discriminator", principled, rewards)
        evaluate(lab, "discriminator", principled, rewards, phase)
        learnt(lab, small)
        steering(lab, principled)
        lab.each(partial(forget, maze))
    lab.each(add_rows)


def load(maze: str, run: Run) -> None:
    """Simulate or read the data of a maze."""
    config, folder = run.config, run.folder.path / "data" / maze
    report = lambda name, done, of: run.progress.alone(f"{maze}/data/{name}", of)(done)
    sizes = (config.transitions, config.expert_transitions), (config.small, config.small)
    sets = [data.simulated(folder, maze, *size, config.data_seed, report) for size in sizes]
    parted = lambda every: windows.divide(windows.thinned(every, config.stride), config.held_out)
    run.results[f"{maze}/episodes"] = [[parted(every) for every in of_size] for of_size in sets]


def forget(maze: str, run: Run) -> None:
    """Free the memory of a maze's data and pools."""
    large = [phase for phase in run.results if phase.startswith(maze) and phase.endswith(("/episodes", "pool"))]
    for phase in large:
        del run.results[phase]


def learnt(lab: Lab, family: Family) -> None:
    """The row of a family's rewards."""
    trajectories.pools(lab, family)
    rewards = family.rewards(lab.config)
    evaluate(lab, family.name, family, rewards, trajectories.train(lab, family.name, family, rewards))


def heat_maps(run: Run, family: Family, rewards: Rewards, phase: str) -> dict[str, np.ndarray]:
    """Heat maps, of held-out windows of the base set at the least noise, and whether they recover the goals."""
    config, maze, window = run.config, mazes.MAZES[family.place.name], rewards.network.window
    length = -(-max(64 // config.stride, window) // window) * window
    key = partial(family.place.key, run, HEAT)
    drawn = windows.draw(key(0), family.windows(run, 0, True, length), config.places, length)
    heats = rows.heat_maps(rewards, run[phase], drawn, places_of(run, family, drawn), maze.extent, key(1))
    recovered = [heat.recovered(field, maze.goals[i]) for field, i in zip(heats, rewards.owners, strict=True)]
    mean, counts = zip(*[field[:2] for field in heats[:: rewards.seeds]], strict=True)
    return {"goal_recovery": np.array(recovered), "mean": np.stack(mean), "counts": np.stack(counts)}


evaluate = partial(trajectories.evaluate, more=heat_maps)


def places_of(run: Run, family: Family, rows_of_paths: Any) -> np.ndarray:
    """(.., 2) places in cells of rows (.., 6) in the units of the base model."""
    return windows.unnormalise(family.units(run, 0), np.asarray(rows_of_paths))[..., PLACE]


def steering(lab: Lab, family: Family) -> None:
    """How many paths from held-out starts end at each goal: of the base model, steered by its reward, and of the
    expert."""
    config, name, models, rewards = lab.config, family.place.name, family.models(lab.config), family.rewards(lab.config)
    goals, phis = np.array(mazes.MAZES[name].goals), f"{name}/{family.name}/rewards"

    def starts(run: Run, goal: int) -> Array:
        key, held_out = family.place.key(run, PLANS, 10 + goal), family.windows(run, 0, True)
        return windows.draw(key, held_out, config.plans, config.horizon)

    def cases(row: str, run: Run) -> list[Steered]:
        expert, steered = DRAWN[row]
        return [
            Steered(
                at(family.thetas(run), (goal + 1) * expert), at(run[phis], goal * rewards.seeds),
                run.config.guidance_scale * steered, jnp.asarray(models.known), starts(run, goal),
                family.place.key(run, PLANS, 100 + goal),
            )
            for goal in range(GOALS)
        ]  # fmt: skip

    def add(row: str, run: Run) -> None:
        places = run.results[f"{name}/{row}/places"] = places_of(run, family, run[f"{name}/plans/{row}"]["samples"])
        near = np.hypot(*(places[:, :, -1] - goals[:, None]).transpose(2, 0, 1)) <= run.config.radius
        seconds = run.seconds(f"{name}/diffusers") / (len(families(name)) * (GOALS + 1))
        rows.add(run, f"{name}/{row}", goal_rate=near.ravel(), seconds=[seconds] * GOALS)

    def denoising(run: Run) -> dict[str, Any]:
        """One path towards the first goal on its way from noise, and the reward of its windows, for a figure."""
        from_here, key = starts(run, 0), family.place.key(run, PLANS, 2)
        start = from_here[int(np.argmax(np.hypot(*(places_of(run, family, from_here[:, 0]) - goals[0]).T)))]
        pair = at(family.thetas(run), 0), at(run[phis], 0)
        way = lambda scale: rows.on_the_way(models, rewards, *pair, scale, start, key, 6)
        found = {"unsteered": way(0.0), "steered": way(run.config.guidance_scale)}
        for shown in found.values():
            shown["places"] = places_of(run, family, shown.pop("windows")).reshape(6, -1, 2)
        return found

    for row in DRAWN:
        rows.steer(lab, f"{name}/plans/{row}", models, rewards.problem.network, partial(cases, row))
        lab.each(partial(add, row))
    lab.once(f"{name}/denoising", denoising)


def add_rows(run: Run) -> None:
    """Each row overall, then by maze."""
    seeds, names = run.config.seeds, run.config.mazes
    for row in (*LEARNT, *DRAWN):
        parts = [run[f"{maze}/{row}"] for maze in names]
        run.add(row, rows.measured(parts, seeds, COLUMNS), PAPER.get(f"{row}/{'+'.join(names)}"))
        if len(names) > 1:
            for maze, part in zip(names, parts, strict=True):
                run.add(f"{row}/{maze}", rows.measured([part], seeds, COLUMNS))


def row_names(config: MazeConfig) -> list[str]:
    """Names of the rows of a run: over all mazes, and with several mazes of each maze alone."""
    parts = ["", *(f"/{maze}" for maze in config.mazes if len(config.mazes) > 1)]
    return [row + part for row in (*LEARNT, *DRAWN) for part in parts]


def programs(config: MazeConfig) -> dict[str, Program]:
    """The programs that take the time, of a maze."""
    models = families(config.mazes[0])
    return plan.of_paths(config, models, models[1], config.transitions, config.plans)


def draw_figures(folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Heat maps (the paper's Fig. 3), histograms, and plans coloured by reward (Fig. 1)."""
    run = members[0]
    for name in run.config.mazes:
        goals, walls = mazes.MAZES[name].goals, mazes.walls(mazes.MAZES[name])
        for row in LEARNT:
            found = run[f"{name}/{row}"]
            heats = [(found["mean"][i], found["counts"][i]) for i in np.argsort(found["expert"])]
            figures.heat_maps(folder / f"heat-{name}-{row}.png", heats, walls, goals)
        panels = {f"goal {i}": tuple(pair) for i, pair in enumerate(run[f"{name}/principled"]["pairs"], 1)}
        figures.histograms(folder / f"histograms-{name}.png", panels)
        plans = {row: list(run[f"{name}/{row}/places"]) for row in DRAWN}
        figures.plans(folder / f"plans-{name}.png", plans, walls, goals)
        ways = {row: run[f"{name}/denoising"][row] for row in ("unsteered", "steered")}
        shown = {row: (way["places"], np.repeat(way["rewards"], run.config.window, 1)) for row, way in ways.items()}
        times = ways["steered"]["times"].tolist()
        figures.denoising(folder / f"denoising-{name}.png", shown, times, walls, goals[0])


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """The text below the table."""
    return NOTES.format(**dataclasses.asdict(members[0].config))


EXPERIMENT = Experiment(
    "relative_reward.maze2d", MazeConfig, PRESETS, table, COLUMNS, row_names,
    Paper("Extracting reward functions from diffusion models", "2306.01804", "section 5.1, Figures 1 and 3", PAPER),
    extras=("maze",), notes=notes, figures=draw_figures, programs=programs,
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
