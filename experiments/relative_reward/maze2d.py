"""Relative rewards in Maze2D: a reward from two diffusion models, whose highest place is the expert's goal (Nuti,
Franzmeyer and Henriques 2023, section 5.1).

A base model learns paths between random places of a maze, an expert paths to one goal. A potential learns the
difference of the two models. Where it is highest should be the goal, it should tell the expert's paths from others, and
adding its gradient to the base model should lead there.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import figures
from experiments.contract import (
    Between,
    Column,
    Config,
    ConfigError,
    Distinct,
    Folder,
    Progress,
    Results,
    Row,
    main,
)
from experiments.lab.experiment import Experiment, Paper
from gendiff import denoiser, distributed, guidance, losses, potential, process, sampling, static, training
from gendiff.checkpoint import Archive
from gendiff.data import episodes, maze2d
from gendiff.data.episodes import Episodes, Normaliser, Windows
from gendiff.losses import Aligned
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward import PRINCIPLED, PUBLISHED, Diffusion, Switches
from gendiff.metrics import discriminability, heat, rates
from gendiff.metrics.heat import Heat
from gendiff.metrics.rates import Estimate
from gendiff.nets.temporal import TemporalUnet
from gendiff.nets.window_mlp import WindowMLP
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Sample, Samples, Time

ACTIONS = 2
"""Actions come first in a row: a_x, a_y, x, y, v_x, v_y."""
PLACE = slice(ACTIONS, ACTIONS + 2)
GOALS = 8


@dataclasses.dataclass(frozen=True)
class MazeConfig(Config):
    """The data, the diffusion models, the rewards and their evaluation."""

    mazes: Annotated[tuple[Literal["open", "umaze", "medium", "large"], ...], Distinct()] = ("open", "umaze")
    """Mazes that are run."""
    transitions: Annotated[int, Between(1000, 10_000_000)] = 200_000
    """Transitions (time steps of 10 ms) of the base set of each maze."""
    expert_transitions: Annotated[int, Between(1000, 10_000_000)] = 100_000
    """The same for each of the eight experts."""
    small: Annotated[int, Between(1000, 10_000_000)] = 10_000
    """The same for all sets of the row `small-data`."""
    held_out: Annotated[float, Between(0.01, 0.5)] = 0.1
    """Share of the episodes, the last ones, that nothing is trained on."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the data."""
    horizon: Annotated[int, Between(8, 1000)] = 32
    """Frames of a path that the diffusion models make."""
    stride: Annotated[int, Between(1, 100)] = 3
    """Time steps from frame to frame; the paper has every step, and a longer horizon."""

    width: Annotated[int, Between(8, 512)] = 16
    """Channels of the U-Net's first level."""
    multipliers: Annotated[tuple[int, ...], Between(1, 64)] = (1, 2, 4)
    """Channels of its levels in units of the width."""
    diffusion_steps: Annotated[int, Between(10, 1000)] = 100
    """T of the diffusion models, on a cosine schedule."""
    steps: Annotated[int, Between(1, 10_000_000)] = 2000
    """Training steps of each diffusion model."""
    batch: Annotated[int, Between(1, 100_000)] = 32
    """Paths of a batch of them."""
    rate: Annotated[float, Between(1e-7, 1.0)] = 2e-3
    """Their rate of learning (Adam)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How it falls."""
    decay: Annotated[float, Between(0.0, 0.99999)] = 0.995
    """Decay of the averaged weights that are used afterwards."""

    seeds: Annotated[int, Between(1, 100)] = 3
    """Rewards of each goal, from other initial values and batches; the diffusion models are the same."""
    pool: Annotated[int, Between(100, 1_000_000)] = 8192
    """Noisy paths at which the targets are computed, once for all rewards of a maze; 100,000 of 256 steps take 6 GB."""
    reward_steps: Annotated[int, Between(1, 10_000_000)] = 2000
    """Training steps of a reward."""
    reward_batch: Annotated[int, Between(1, 100_000)] = 128
    """Paths of a batch of them."""
    reward_rate: Annotated[float, Between(1e-7, 1.0)] = 1e-3
    """Their rate of learning (Adam)."""
    reward_schedule: Literal["cosine", "constant"] = "cosine"
    """How it falls."""
    window: Annotated[int, Between(1, 256)] = 8
    """Frames of a reward's window."""
    widths: Annotated[tuple[int, ...], Between(1, 4096)] = (64, 32)
    """Hidden widths of the reward's network."""
    grid: Annotated[tuple[int, ...], Between(1, 256), Distinct()] = (4, 8, 32)
    """Windows that the row `published-best-per-goal` chooses from, goal by goal, by the discriminability in sample as
    the paper did, but on rewards of a seed of its own (the paper chose also among data and widths)."""
    places: Annotated[int, Between(100, 1_000_000)] = 4000
    """Held-out windows of the base set, of 64 time steps, that a heat map is made of."""
    compared: Annotated[int, Between(10, 1_000_000)] = 4096
    """Held-out paths of the base set and of the expert's for the discriminability."""
    compared_steps: Annotated[int, Between(1, 1000)] = 256
    """Their time steps, the paper's; rewards take paths of any length."""

    plans: Annotated[int, Between(10, 1_000_000)] = 256
    """Paths from held-out starts, of which the share that ends at the goal is counted."""
    guidance_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """Factor on the reward's gradient when it steers; a perfect reward needs 1."""
    radius: Annotated[float, Between(0.05, 2.0)] = 0.5
    """Distance to the goal, in cells, that counts as having reached it."""


PRESETS = {
    "smoke": MazeConfig(
        preset="smoke", mazes=("umaze",), transitions=4000, expert_transitions=2000, small=1000, width=8,
        multipliers=(1, 2), diffusion_steps=20, steps=40, batch=16, seeds=1, pool=128, reward_steps=40,
        reward_batch=32, window=4, widths=(16,), grid=(4,), places=200, compared=64, plans=16,
    ),
    "default": MazeConfig(),
    "paper": MazeConfig(
        preset="paper", mazes=("open", "umaze", "medium", "large"), transitions=10_000_000,
        expert_transitions=10_000_000, horizon=256, stride=1, width=32, multipliers=(1, 4, 8), steps=500_000, batch=128,
        rate=2e-4, schedule="constant", seeds=5, pool=100_000, reward_steps=100_000, reward_batch=256, reward_rate=5e-5,
        reward_schedule="constant", window=4, widths=(128, 64, 32), grid=(1, 4, 64, 256), places=10_000,
        compared=25_600, plans=1000,
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
DATA, BASE, POOL, REWARDS, HEAT, COMPARE, PLANS, HELD = range(8)
"""What the keys are for."""


class Family(NamedTuple):
    """Diffusion models that belong together: one base model and eight experts."""

    name: str
    switches: Switches
    small: bool = False
    given: tuple[int, ...] = (0, -1)
    """Frames whose state the models are given: both ends as published; only the first leaves the end free, which
    steering needs."""


FAMILIES = (
    Family("published", PUBLISHED),
    Family("principled", PRINCIPLED, given=(0,)),
    Family("small-data", PRINCIPLED, True, given=(0,)),
)


def chain(steps: int) -> Process:
    """The diffusion process of all models."""
    return process.ddpm(process.cosine_betas(steps))


def model(config: MazeConfig) -> denoiser.Model:
    """Diffuser's network predicts x_0; it counts time from 0."""
    return denoiser.zero_based(unet_of(config).apply)


@static.by_value
def clamped(model: denoiser.Model) -> denoiser.Model:
    """The model with x_0 within the data's range, as the published code computes its means in Maze2D."""
    return lambda theta, x, t: jnp.clip(model(theta, x, t), -1.0, 1.0)


def unet_of(config: MazeConfig) -> TemporalUnet:
    """The diffusion models' network; 3,682,118 parameters in the preset `paper`."""
    return TemporalUnet(config.width, config.multipliers)


def reward_of(config: MazeConfig, switches: Switches, window: int) -> WindowMLP:
    """The rewards' network."""
    return WindowMLP(window, config.widths, switches.strided, switches.activation)


def reward_problem(config: MazeConfig, switches: Switches, window: int) -> relative_reward.PairProblem:
    """What rewards are trained on."""
    network = denoiser.zero_based(reward_of(config, switches, window).apply)
    return relative_reward.PairProblem(chain(config.diffusion_steps), network, config.reward_batch)


def diffuser_task(config: MazeConfig) -> Callable[[dict[str, Any]], training.Task]:
    """The task of a configuration's diffusion models."""
    return windows_task(chain(config.diffusion_steps), model(config), config.batch, config.horizon)


@static.by_value
def windows_task(
    chain: Process, model: denoiser.Model, batch: int, horizon: int
) -> Callable[[dict[str, Any]], training.Task]:
    """Denoising of windows of a run's own data, with its own given states; the mean over the coordinates."""
    weight = lambda t: jnp.float32(1 / (horizon * len(COORDINATES)))

    def task(own: dict[str, Any]) -> training.Task:
        loss = losses.denoising(chain, model, weight, own["known"])
        return training.Task(loss, lambda key: minibatch(key, own["windows"], own["count"], batch, horizon))

    return task


COORDINATES = ("a_x", "a_y", "x", "y", "v_x", "v_y")


def minibatch(key: PRNGKey, windows: Windows, count: Array, batch: int, horizon: int) -> Array:
    """Windows (batch, horizon, 6) at random."""
    rows = jax.random.randint(key, (batch,), 0, count)
    return jax.vmap(lambda i: episodes.window(windows, i, horizon))(rows)


@static.by_value
def discriminator_task(problem: relative_reward.PairProblem) -> Callable[[tuple], training.Task]:
    """Cross-entropy of base against the run's expert, in equal numbers, at the times of the diffusion models."""
    loss = losses.cross_entropy(problem.process, problem.network)

    def task(context: tuple[dict[str, Array], dict[str, Array]]) -> training.Task:
        paths, own = context

        def draw(key: PRNGKey) -> tuple[Array, Array, Array]:
            rows = jax.random.randint(key, (problem.batch,), 0, paths["base"].shape[0])
            label = (jnp.arange(problem.batch) % 2).astype(jnp.float32)
            theirs = paths["experts"][own["goal"], rows]
            x0 = jnp.where(label[:, None, None] == 1, theirs, paths["base"][rows])
            return x0, label, jnp.ones_like(label)

        return training.Task(loss, draw)

    return task


class Maze:
    """All rows of one maze."""

    def __init__(self, name: str, config: MazeConfig, folder: Folder, archive: Archive, progress: Progress) -> None:
        self.name, self.config, self.folder, self.progress = name, config, folder, progress
        self.archive = Archive(archive.folder and archive.folder / name)
        self.maze, self.process = maze2d.MAZES[name], chain(config.diffusion_steps)
        self.key = jax.random.fold_in(jax.random.key(config.seed), sorted(maze2d.MAZES).index(name))
        self.mesh = distributed.make_mesh()
        self.rows: dict[str, dict[str, list[Any]]] = {}
        self.heats: dict[str, dict[int, Heat]] = {}
        self.histograms: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def all(self) -> None:
        """Every row, in the order of the table."""
        published, principled, small = FAMILIES
        self.models = self.diffusers()
        self.reward_rows("published", published, self.config.window)
        self.reward_rows("principled", principled, self.config.window)
        self.best_per_goal(published)
        self.discriminator(principled)
        self.reward_rows("small-data", small, self.config.window)
        self.steering(principled)

    def fold(self, purpose: int, index: int = 0) -> Array:
        return jax.random.fold_in(jax.random.fold_in(self.key, purpose), index)

    def report(self, phase: str, steps: int) -> Callable[[int, dict], None]:
        return lambda step, metrics: self.progress(f"{self.name}/{phase}", step, steps, metrics)

    # Data.

    @cache  # noqa: B019 (a run lives as long as its process)
    def data(self, goal: int | None, small: bool = False) -> tuple[Episodes, Episodes]:
        """Training and held-out episodes, of the base set or of the expert of a goal."""
        config = self.config
        n = config.small if small else config.transitions if goal is None else config.expert_transitions
        which = "base" if goal is None else f"goal-{goal + 1}"
        place = self.folder.path / "data" / self.name / f"{which}-{n}"
        phase = f"data/{which}-{n}"
        shown, show = [-n], self.progress.alone(f"{self.name}/{phase}", n)

        def report(rows: int) -> None:
            if rows >= min(n, shown[0] + n // 100):
                shown[0] = rows
                show(rows)

        def simulate() -> None:
            maze2d.write(
                place, self.maze, n, seed=config.data_seed * 100 + (0 if goal is None else goal + 1),
                goal=None if goal is None else self.maze.goals[goal], report=report,
            )  # fmt: skip

        distributed.first(simulate)
        every = distributed.everywhere(lambda: episodes.read(place))
        return cut(episodes.thinned(every, config.stride), config.held_out)

    def normaliser(self, goal: int | None, switches: Switches, small: bool) -> Normaliser:
        """Of a model: the base set's for all, or each its own."""
        return episodes.fit(self.data(None if switches.normaliser == "shared" else goal, small)[0])

    def windows(
        self,
        goal: int | None,
        family: Family,
        held_out: bool = False,
        units: int | None = -1,
        horizon: int | None = None,
    ) -> Windows:
        """The windows of a set, in the units of its own model, or in those of another one (`units`)."""
        each = self.data(goal, family.small and not held_out)[held_out]
        normaliser = self.normaliser(goal if units == -1 else units, family.switches, family.small)
        return episodes.windows(each, normaliser, horizon or self.config.horizon)

    def known(self, family: Family) -> np.ndarray:
        """(horizon, 6), True where the models are given the state."""
        mask = np.zeros((self.config.horizon, len(COORDINATES)), bool)
        mask[list(family.given), ACTIONS:] = True
        return mask

    def paths(self, windows: Windows, n: int, key: PRNGKey) -> Array:
        """n windows at random, (n, horizon, 6)."""
        return _paths(windows, jnp.int32(len(windows.begin)), n, self.config.horizon, key)

    def by_halves(self, windows: Windows, n: int, horizon: int, key: PRNGKey) -> Array:
        """n windows at random: those at even places of every other episode, those at odd places of the rest."""
        odd = np.unique(windows.last, return_inverse=True)[1] % 2
        halves = [windows._replace(begin=windows.begin[odd == k], last=windows.last[odd == k]) for k in (0, 1)]
        if not len(halves[1].begin):
            raise ValueError(f"maze2d: {self.name}: expected two held-out episodes or more, given one")
        pair = [
            _paths(half, jnp.int32(len(half.begin)), -(-n // 2), horizon, jax.random.fold_in(key, k))
            for k, half in enumerate(halves)
        ]
        return jnp.stack(pair, 1).reshape(-1, *pair[0].shape[1:])[:n]

    # Diffusion models.

    def diffusers(self) -> dict[str, Params]:
        """The base model and the eight experts of every family, stacked on axis 0: all in one program."""
        config = self.config
        sets = [(family, goal) for family in FAMILIES for goal in (None, *range(GOALS))]
        phase = "diffusers"

        def compute() -> dict[str, Params]:
            each = [self.windows(goal, family) for family, goal in sets]
            own = {
                "windows": alike(each),
                "count": jnp.asarray([len(w.begin) for w in each], jnp.int32),
                "known": jnp.asarray(np.stack([self.known(family) for family, _ in sets])),
            }
            start = _fresh(unet_of(config), config.horizon, training.keys(self.fold(BASE, 0), len(sets)))
            settings = training.Settings(
                config.steps, config.rate, config.decay, often(config.steps), min(100, config.steps // 5),
                config.schedule, clip=None,
            )  # fmt: skip
            host = training.Host(None, self.archive.steps(phase), self.report(phase, config.steps))
            keys = training.keys(self.fold(BASE, 1), len(sets))
            state = training.train(keys, start, diffuser_task(config), own, settings, host, own=True)
            return {
                family.name: at(state.best, slice(i * (GOALS + 1), (i + 1) * (GOALS + 1)))
                for i, family in enumerate(FAMILIES)
            }

        models = self.archive.once(phase, compute)
        self.check(models)
        return distributed.place(self.mesh, models)

    def check(self, models: dict[str, Params]) -> None:
        """The two models of every pair fit together."""
        shape = (self.config.horizon, len(COORDINATES))
        for family in FAMILIES:
            pair = []
            for goal in (None, 0):
                theta = at(models[family.name], 0 if goal is None else goal + 1)
                units = self.normaliser(goal, family.switches, family.small)
                name = f"{self.name} base" if goal is None else f"{self.name} goal {goal + 1}"
                pair.append(
                    Diffusion(name, self.process, partial(model(self.config), theta), shape, (units.low, units.high))
                )
            relative_reward.check_pair(pair[0], pair[1], family.switches)

    @cache  # noqa: B019
    def pool(self, family: Family, held_out: bool = False) -> Aligned:
        """Noisy paths of the base set, and the differences of all experts there."""
        config, purpose = self.config, HELD if held_out else POOL
        piece = config.pool // 8
        n = piece if held_out else config.pool
        phase = f"{family.name}/{'held-out-' if held_out else ''}pool"
        report = lambda done: self.progress(f"{self.name}/{phase}", done, n, {})

        def compute() -> Aligned:
            thetas = self.models[family.name]
            network = clamped(model(config)) if family.switches == PUBLISHED else model(config)
            paths = self.paths(self.windows(None, family, held_out), n, self.fold(purpose, 0))
            known, key = jnp.asarray(self.known(family)), self.fold(purpose, 1)
            request = relative_reward.PoolRequest(at(thetas, 0), at(thetas, slice(1, None)), known, key, paths)
            pools = relative_reward.pools(self.process, network, family.switches, [request], piece, self.mesh, report)
            return pools[0]

        return self.archive.once(phase, compute, Aligned)

    # Rewards.

    def rewards(self, name: str, family: Family, window: int, goals: list[int], first: int, seeds: int) -> Params:
        """Rewards of goals x seeds, goal by goal, stacked on axis 0; seed numbers from `first` on."""
        config = self.config
        problem = reward_problem(config, family.switches, window)
        start = self.fresh(family.switches, window, goals, first, seeds)
        phase = f"{name}/rewards"
        host = training.Host(None, self.archive.steps(phase), self.report(phase, config.reward_steps))
        which = jnp.asarray(np.repeat(goals, seeds), jnp.int32)

        pool = self.pool(family)  # not in the time of these rewards: all share it

        def compute() -> Params:
            key = self.fold(REWARDS, 1000 + 100 * window + first)
            asked = relative_reward.reward_training(problem, pool, which, start, self.reward_settings(), key)
            return training.train(*asked._replace(host=host)).last

        return self.archive.once(phase, compute)

    def fresh(self, switches: Switches, window: int, goals: list[int], first: int, seeds: int) -> Params:
        """Initial values, those of a goal and a seed the same whatever else is trained."""
        config = self.config
        numbers = [goal * 10_000 + first + seed for goal in goals for seed in range(seeds)]
        keys = jax.vmap(partial(jax.random.fold_in, self.fold(REWARDS, 0)))(jnp.asarray(numbers))
        return _fresh(reward_of(config, switches, window), config.horizon, keys)

    def reward_settings(self) -> training.Settings:
        config, steps = self.config, self.config.reward_steps
        return training.Settings(
            steps, config.reward_rate, 0.0, often(steps), schedule=config.reward_schedule, clip=None
        )

    def reward_rows(self, name: str, family: Family, window: int) -> None:
        """Trains and evaluates the rewards of one configuration."""
        goals, seeds = list(range(GOALS)), self.config.seeds
        rewards = self.rewards(name, family, window, goals, 0, seeds)
        seconds = self.archive.seconds[f"{name}/rewards"] / (GOALS * seeds)
        self.evaluate(name, family, window, rewards, goals, seeds, seconds)

    def evaluate(
        self, name: str, family: Family, window: int, rewards: Params, goals: list[int], seeds: int, seconds: float
    ) -> None:
        """Heat maps, discriminability and the fit of rewards (goals x seeds), which are added to the row `name`."""
        row = self.rows.setdefault(name, {})
        add = lambda metric, values: row.setdefault(metric, []).extend(values)
        heats = self.heat_maps(family, window, rewards)
        numbers = [goal for goal in goals for _ in range(seeds)]
        add("goal_recovery", [heat.recovered(h, self.maze.goals[g]) for h, g in zip(heats, numbers, strict=True)])
        self.heats.setdefault(name, {}).update(zip(goals, heats[::seeds], strict=True))
        for held_out, metric in ((True, "discriminability"), (False, "discriminability_in_sample")):
            values = self.compared(family, window, rewards, numbers, held_out)
            add(metric, [discriminability.accuracy(base, expert, held_out).value for base, expert in values])
            if held_out and name == "principled":
                self.histograms = dict(enumerate(values[::seeds]))
        if name != "discriminator":
            problem = reward_problem(self.config, family.switches, window)
            fits = relative_reward.quality(
                problem.network, rewards, jnp.asarray(numbers), self.pool(family, True), bounds(self.process)
            )
            add("gradient_r2", [fit.overall for fit in fits])
            for number, fit in zip(numbers[::seeds], fits[::seeds], strict=True):
                by_time = {f"r2_below_{int(b)}": float(r) for b, r in zip(fit.times[1:], fit.r2, strict=True)}
                self.folder.log(maze=self.name, row=name, goal=number + 1, **by_time)
        add("seconds", [seconds] * len(numbers))

    def heat_maps(self, family: Family, window: int, rewards: Params) -> list[Heat]:
        """One for each reward, of held-out windows of the base set at the least noise."""
        config = self.config
        length = -(-max(64 // config.stride, window) // window) * window
        data = self.windows(None, family, held_out=True, horizon=length)
        paths = _paths(data, jnp.int32(len(data.begin)), config.places, length, self.fold(HEAT, 0))
        network = reward_of(config, family.switches, window)
        values = _of_windows(network, self.process, paths, rewards, self.fold(HEAT, 1))
        units = self.normaliser(None, family.switches, family.small)
        frames = jax.vmap(network.split)(paths)  # (n, windows, frames, 6): each frame gets its window's value
        places = episodes.unnormalise(units, np.asarray(frames))[..., PLACE].reshape(-1, 2)
        each = [np.repeat(np.asarray(v).ravel(), window) for v in values]
        return [heat.heat(places, v, self.maze.extent) for v in each]

    def compared(
        self, family: Family, window: int, rewards: Params, numbers: list[int], held_out: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rewards of base and expert paths, both in the base model's units, at the first tenth of the times.

        A reward is known up to a constant for each time, and has units of its own at each: held-out values are less the
        base's mean at their time, in units of its standard deviation.
        """
        config = self.config
        problem = reward_problem(config, family.switches, window)
        frames = -(-config.compared_steps // (config.stride * window)) * window
        sets = [self.windows(goal, family, held_out, None, frames) for goal in (None, *sorted(set(numbers)))]
        drawn = [self.by_halves(w, config.compared, frames, self.fold(COMPARE, i)) for i, w in enumerate(sets)]
        latest = max(1, config.diffusion_steps // 10)
        noisy = [_noisy(self.process, latest, self.fold(COMPARE, 100 + i), x) for i, x in enumerate(drawn)]
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for i, goal in enumerate(sorted(set(numbers)), 1):
            of_goal = at(rewards, np.flatnonzero(np.equal(numbers, goal)))
            base, expert = (np.asarray(_values(problem.network, of_goal, *noisy[each])) for each in (0, i))
            if held_out:
                times, theirs = (np.asarray(noisy[each][1]) for each in (0, i))
                mean, spread = by_time(base[:, ::2], times[::2], latest)
                base = (base - mean[:, times]) / spread[:, times]
                expert = (expert - mean[:, theirs]) / spread[:, theirs]
            pairs.extend(zip(base, expert, strict=True))
        return pairs

    def best_per_goal(self, family: Family) -> None:
        """The published protocol: the best configuration of each goal; chosen on a seed that is not reported."""
        config, goals = self.config, list(range(GOALS))
        success = []
        for window in config.grid:
            tried = self.rewards(f"published-grid-{window}", family, window, goals, 1000, 1)
            pairs = self.compared(family, window, tried, goals, False)
            success.append([discriminability.accuracy(*pair, False).value for pair in pairs])
        best = [config.grid[int(i)] for i in np.argmax(success, 0)]
        search = sum(self.archive.seconds[f"published-grid-{window}/rewards"] for window in config.grid) / GOALS
        for window in sorted(set(best)):
            chosen = [goal for goal in goals if best[goal] == window]
            name = "-".join(["published-best", str(window), "of", *(str(goal + 1) for goal in chosen)])
            rewards = self.rewards(name, family, window, chosen, 0, config.seeds)
            seconds = (self.archive.seconds[f"{name}/rewards"] / len(chosen) + search) / config.seeds
            self.evaluate("published-best-per-goal", family, window, rewards, chosen, config.seeds, seconds)

    def discriminator(self, family: Family) -> None:
        """A classifier of base against expert of the same network; its log-odds are the reward."""
        config, goals = self.config, list(range(GOALS))
        phase, window = "discriminator/rewards", config.window
        host = training.Host(None, self.archive.steps(phase), self.report(phase, config.reward_steps))
        which = {"goal": jnp.asarray(np.repeat(goals, config.seeds), jnp.int32)}

        def compute() -> Params:
            n = config.pool
            draw = lambda goal: self.paths(
                self.windows(goal, family, units=None), n, self.fold(POOL, 10 if goal is None else goal)
            )
            paths = {"base": draw(None), "experts": jnp.stack([draw(goal) for goal in goals])}
            start = self.fresh(family.switches, window, goals, 0, config.seeds)
            keys = training.keys(self.fold(REWARDS, 2), len(which["goal"]))
            task = discriminator_task(reward_problem(config, PRINCIPLED, config.window))
            context, settings = (paths, which), self.reward_settings()
            return training.train(keys, start, task, context, settings, host, own=(False, True)).last

        rewards = self.archive.once(phase, compute)
        seconds = self.archive.seconds[phase] / len(which["goal"])
        self.evaluate("discriminator", family, window, rewards, goals, config.seeds, seconds)

    # Steering.

    def steering(self, family: Family) -> None:
        """How many paths from held-out starts end at each goal: of the base model, steered by its reward, and of the
        expert."""
        config = self.config
        problem = reward_problem(config, family.switches, config.window)
        all_rewards = self.rewards("principled", family, config.window, list(range(GOALS)), 0, config.seeds)
        thetas = self.models[family.name]
        held_out = self.windows(None, family, held_out=True)
        from_there = [self.paths(held_out, config.plans, self.fold(PLANS, 10 + goal)) for goal in range(GOALS)]
        units = self.normaliser(None, family.switches, family.small)
        known = jnp.asarray(self.known(family))
        self.plans: dict[str, list[np.ndarray]] = {}

        def ends(name: str, goal: int, theta: Params, phi: Params, scale: float) -> None:
            place = partial(distributed.place, self.mesh)
            draw = lambda: _plans(
                self.process, model(config), problem.network, family.switches, self.mesh,
                *place((known, theta, phi, scale, from_there[goal], self.fold(PLANS, 100 + goal))),
            )  # fmt: skip
            plans = lambda: {"plans": distributed.gather(draw(), config.plans)}
            drawn = self.archive.once(f"plans/{name}-{goal + 1}", plans)["plans"]
            self.progress(f"{self.name}/plans/{name}", goal + 1, GOALS, {})
            places = episodes.unnormalise(units, np.asarray(drawn))[..., PLACE]
            self.plans.setdefault(name, []).append(places)
            near = np.hypot(*(places[:, -1] - self.maze.goals[goal]).T) <= config.radius
            row = self.rows.setdefault(name, {})
            row.setdefault("goal_rate", []).extend(near.tolist())
            row.setdefault("seconds", []).append(self.archive.seconds["diffusers"] / (len(FAMILIES) * (GOALS + 1)))

        for goal in range(GOALS):
            phi = at(all_rewards, goal * config.seeds)
            ends("unsteered", goal, at(thetas, 0), phi, 0.0)
            ends("steered", goal, at(thetas, 0), phi, config.guidance_scale)
            ends("expert", goal, at(thetas, goal + 1), phi, 0.0)
        first = episodes.unnormalise(units, np.asarray(from_there[0][:, 0]))[:, PLACE]
        furthest = int(np.argmax(np.hypot(*(first - self.maze.goals[0]).T)))
        self.denoising(family, at(thetas, 0), at(all_rewards, 0), from_there[0][furthest : furthest + 1])

    def denoising(self, family: Family, theta: Params, phi: Params, start: Samples) -> None:
        """One path towards the first goal on its way from noise, and the reward of its windows, for a figure."""
        config, network = self.config, reward_of(self.config, family.switches, self.config.window)
        units, known = self.normaliser(None, family.switches, family.small), jnp.asarray(self.known(family))
        problem = reward_problem(config, family.switches, config.window)
        shown = jnp.linspace(0, config.diffusion_steps, 6).astype(int)
        self.paths_of_times: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, scale in (("unsteered", 0.0), ("steered", config.guidance_scale)):
            kernel = _kernel(self.process, model(config), problem.network, family.switches, known, theta, phi, scale)
            grid = self.process.grid(config.diffusion_steps)
            path = lambda key, kernel=kernel, grid=grid: sampling.states(
                self.process, kernel(start[0]), grid, key, start[0].shape
            )
            states = jax.jit(path)(self.fold(PLANS, 2))[shown]
            times = jnp.maximum(grid[shown] - 1, 0)
            each = lambda x, t: network.apply(phi, network.split(x), t, method="of_windows")
            rewards = jax.jit(jax.vmap(each))(states, times)
            frames = jax.vmap(network.split)(states)
            places = episodes.unnormalise(units, np.asarray(frames))[..., PLACE].reshape(len(shown), -1, 2)
            self.paths_of_times[name] = places, np.repeat(np.asarray(rewards), network.window, 1)
        self.times = [int(t) for t in grid[shown]]


def at(stacked: Params, i: Any) -> Params:
    """A member, or members, of stacked parameters."""
    return jax.tree.map(lambda a: a[i], stacked)


@partial(jax.jit, static_argnums=(0, 1))
def _fresh(network: Any, horizon: int, keys: PRNGKey) -> Params:
    """Initial values, one set for each key."""
    init = lambda key: network.init(key, jnp.zeros((horizon, len(COORDINATES))), jnp.zeros(()))
    return jax.vmap(init)(keys)


@partial(jax.jit, static_argnums=(0, 1))
def _noisy(process: Process, latest: int, key: PRNGKey, paths: Array) -> tuple[Array, Array]:
    """Paths noised to times 1 .. `latest`, and the times."""
    early = process._replace(sample_time=lambda key: jax.random.randint(key, (), 1, latest + 1))
    return jax.vmap(partial(losses.noised, early))(jax.random.split(key, len(paths)), paths)


@partial(jax.jit, static_argnums=(2, 3))
def _paths(windows: Windows, count: Array, n: int, horizon: int, key: PRNGKey) -> Array:
    return minibatch(key, windows, count, n, horizon)


@partial(jax.jit, static_argnums=(0, 1))
def _of_windows(network: WindowMLP, process: Process, paths: Samples, rewards: Params, key: PRNGKey) -> Array:
    """(K, n, windows) rewards of the windows of paths at t = 1."""
    keys = jax.random.split(key, len(paths))
    noisy = jax.vmap(lambda key, x0: perturbed(process, key, x0))(keys, paths)
    each = lambda phi, x: network.apply(phi, network.split(x), jnp.zeros(()), method="of_windows")
    return potential.over_members(lambda phi: jax.vmap(partial(each, phi))(noisy), rewards)


def perturbed(p: Process, key: PRNGKey, x0: Sample) -> Sample:
    """x_1: the least noise."""
    return process.perturb(p, key, x0, jnp.int32(1))[0]


@partial(jax.jit, static_argnums=0)
def _values(network: potential.Logit, rewards: Params, x: Array, t: Time) -> Array:
    """(K, n)."""
    return potential.over_members(lambda phi: jax.vmap(partial(network, phi))(x, t), rewards)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _plans(
    process: Process,
    model: denoiser.Model,
    network: potential.Logit,
    switches: Switches,
    mesh: jax.sharding.Mesh,
    known: Array,
    theta: Params,
    phi: Params,
    scale: Array,
    starts: Samples,
    key: PRNGKey,
) -> Samples:
    """Paths from the given states, steered by scale times the reward."""
    kernel = _kernel(process, model, network, switches, known, theta, phi, scale)
    grid = process.grid(process.steps or 100)
    one = lambda pair: sampling.sample(process, kernel(pair[1]), grid, pair[0], pair[1].shape)
    return distributed.chunked(one, (jax.random.split(key, len(starts)), starts), 64, mesh, cut=False)


def _kernel(
    process: Process,
    model: denoiser.Model,
    network: potential.Logit,
    switches: Switches,
    known: Array,
    theta: Params,
    phi: Params,
    scale: Array | float,
) -> Callable[[Sample], sampling.Kernel]:
    """A path whose known states are held -> the steps of the steered sampler."""
    steer = relative_reward.steer(process, partial(network, phi), switches, scale)
    steered = guidance.chain(steer, guidance.clip(-1.0, 1.0))(partial(model, theta))
    return lambda path: sampling.pinned(sampling.ancestral(process, steered), path, known)


def bounds(p: Process) -> np.ndarray:
    """Bounds of the noise levels at which the fit is reported, by tenths of T."""
    steps = p.steps or 0
    return np.unique(np.concatenate([[1], np.linspace(0, steps, 11)[1:].astype(int) + 1]))


def cut(every: Episodes, share: float) -> tuple[Episodes, Episodes]:
    """The first and the last episodes."""
    last = max(1, round(share * len(every.lengths)))
    if last >= len(every.lengths):
        raise ValueError(f"maze2d: expected more than one complete episode, given {len(every.lengths)}")
    middle = len(every.lengths) - last
    row = int(every.lengths[:middle].sum())
    part = lambda rows, lengths: Episodes(every.observations[rows], every.actions[rows], every.lengths[lengths])
    return part(slice(row), slice(middle)), part(slice(row, None), slice(middle, None))


def by_time(values: np.ndarray, times: np.ndarray, latest: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations (K, latest + 1) of values (K, n) at each time; 0 and 1 where there are too few."""
    mean, spread = np.zeros((len(values), latest + 1)), np.ones((len(values), latest + 1))
    for t in range(latest + 1):
        there = values[:, times == t]
        if there.shape[1] > 1:
            mean[:, t], spread[:, t] = there.mean(1), np.maximum(there.std(1), 1e-12)
    return mean, spread


def often(steps: int) -> int:
    """Steps between checkpoints: large models and long runs must not write all the time."""
    return min(steps, max(100, steps // 50))


def alike(each: list[Windows]) -> Windows:
    """Sets of windows stacked on axis 0, padded to the largest."""
    longest = lambda name: max(len(getattr(w, name)) for w in each)
    pad = lambda name: np.stack([training.padded(np.asarray(getattr(w, name)), longest(name)) for w in each])
    return Windows(pad("rows"), pad("begin"), pad("last"), np.stack([w.still for w in each]))


PAPER = {
    "published-best-per-goal/open+umaze": {"goal_recovery": 0.7875},
    "published-best-per-goal/medium+large": {"goal_recovery": 0.7750},
    "published-best-per-goal/open+umaze+medium+large": {
        "goal_recovery": 0.7812,
        "discriminability_in_sample": 0.8376,
    },
    "small-data/open+umaze+medium+large": {"goal_recovery": 0.75},
}
NAMES = (
    "published", "principled", "published-best-per-goal", "discriminator", "small-data", "unsteered", "steered",
    "expert",
)  # fmt: skip


def table(mazes: list[Maze]) -> Iterator[Row]:
    """Each row overall, then by maze."""
    seeds = mazes[0].config.seeds
    together = "+".join(maze.name for maze in mazes)
    for name in NAMES:
        yield Row(name, measured([maze.rows[name] for maze in mazes], seeds), PAPER.get(f"{name}/{together}", {}))
        if len(mazes) > 1:
            for maze in mazes:
                yield Row(f"{name}/{maze.name}", measured([maze.rows[name]], seeds))


def measured(parts: list[dict[str, list[Any]]], seeds: int) -> dict[str, Estimate]:
    """The metrics of a row over mazes, goals and seeds."""
    row = {}
    for metric in parts[0]:
        values = [each for part in parts for each in part[metric]]
        if metric in ("goal_recovery", "goal_rate"):
            row[metric] = rates.rate(int(np.sum(values)), len(values))
        elif metric == "seconds":
            row[metric] = rates.exact(float(np.mean(values)))
        else:
            row[metric] = rates.mean(np.reshape(values, (-1, seeds)).mean(1))
    return row


def run(config: MazeConfig) -> Results:
    """Runs what the folder does not hold yet, and writes the table and the figures."""
    if wrong := [window for window in (config.window, *config.grid) if config.horizon % window]:
        raise ConfigError(f"--window, --grid: expected divisors of the horizon {config.horizon}, given {wrong[0]}")
    folder = Folder("relative_reward.maze2d", config)
    progress = Progress(folder)
    mazes = []
    for name in config.mazes:
        maze = Maze(name, config, folder, folder.archive, progress)
        maze.all()
        mazes.append(maze)
    progress.close()
    for maze in mazes:
        draw_figures(folder, maze)
    notes = NOTES.format(**dataclasses.asdict(config))
    return folder.finish(list(table(mazes)), COLUMNS, notes)


def draw_figures(folder: Folder, maze: Maze) -> None:
    """Heat maps (the paper's Fig. 3), histograms, and plans coloured by reward (Fig. 1)."""
    walls = maze2d.walls(maze.maze)
    for name, heats in maze.heats.items():
        path = folder.path / f"heat-{maze.name}-{name}.png"
        figures.heat_maps(path, [(h.mean, h.counts) for _, h in sorted(heats.items())], walls, maze.maze.goals)
    figures.histograms(
        folder.path / f"histograms-{maze.name}.png", {f"goal {g + 1}": pair for g, pair in maze.histograms.items()}
    )
    figures.plans(folder.path / f"plans-{maze.name}.png", maze.plans, walls, maze.maze.goals)
    path = folder.path / f"denoising-{maze.name}.png"
    figures.denoising(path, maze.paths_of_times, maze.times, walls, maze.maze.goals[0])


def row_names(config: MazeConfig) -> list[str]:
    """Names of the rows of a run: over all mazes, and with several mazes of each maze alone."""
    mazes = ["", *(f"/{maze}" for maze in config.mazes if len(config.mazes) > 1)]
    return [name + maze for name in NAMES for maze in mazes]


EXPERIMENT = Experiment(
    "relative_reward.maze2d", MazeConfig, PRESETS, run, COLUMNS, row_names,
    Paper("Extracting reward functions from diffusion models", "2306.01804", "section 5.1, Figures 1 and 3", PAPER),
    extras=("maze",),
)  # fmt: skip


if __name__ == "__main__":
    main(MazeConfig, PRESETS, run)
