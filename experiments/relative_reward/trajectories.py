"""Diffusion models of paths (Diffuser, Janner et al. 2022) and rewards of windows, for any environment."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.lab.config import Between, Config, ConfigError, Distinct, SameProgram, Scheduled
from experiments.lab.phases import Lab, Run
from experiments.relative_reward import rows
from experiments.relative_reward.rows import Rewards, at
from gendiff import denoiser, nets, process, training
from gendiff.data import windows
from gendiff.data.windows import Normaliser, Windows
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward import PUBLISHED, Models, PairProblem, PoolRequest, Switches
from gendiff.nets.temporal import TemporalUnet
from gendiff.nets.window_mlp import WindowMLP
from gendiff.process import Process
from gendiff.static import by_value
from gendiff.types import Params


@dataclasses.dataclass(frozen=True)
class PathsConfig(Config):
    """Diffusion models of paths, and rewards of their windows."""

    held_out: Annotated[float, Between(0.01, 0.5)] = 0.1
    """Share of the episodes, the last ones, to hold out of all trainings."""
    horizon: Annotated[int, Between(8, 1000)] = 32
    """Frames of a path of the diffusion models."""
    stride: Annotated[int, Between(1, 100)] = 3
    """Time steps between frames; the paper takes 1, and a longer horizon."""

    width: Annotated[int, Between(8, 512)] = 16
    """Channels of the U-Net's first level."""
    multipliers: Annotated[tuple[int, ...], Between(1, 64)] = (1, 2, 4)
    """Channels of its levels, in units of the width."""
    diffusion_steps: Annotated[int, Between(10, 1000)] = 100
    """T of the diffusion models, on a cosine schedule."""
    models: Scheduled = Scheduled(2000, batch=32, rate=2e-3)
    """Training of a diffusion model, on batches of paths."""
    decay: Annotated[float, Between(0.0, 0.99999)] = 0.995
    """Decay of the diffusion models' averaged weights, which all later phases use."""

    seeds: Annotated[int, Between(1, 100)] = 3
    """Rewards per expert, with their own initial values and batches but the same diffusion models."""
    pool: Annotated[int, Between(100, 1_000_000)] = 8192
    """Noisy paths with targets, which all rewards share; 100,000 of 256 frames take 6 GB."""
    rewards: Scheduled = Scheduled(2000, batch=128, rate=1e-3)
    """Training of a reward, on batches of paths."""
    window: Annotated[int, Between(1, 256)] = 8
    """Frames of a reward's window."""
    widths: Annotated[tuple[int, ...], Between(1, 4096)] = (64, 32)
    """Hidden widths of the reward's network."""
    grid: Annotated[tuple[int, ...], Between(1, 256), Distinct()] = (4, 8, 32)
    """Windows to choose from, goal by goal, in the row `published-best-per-goal`: by the discriminability in sample as
    in the paper, but on a seed that the row does not report. The paper also chose data and widths."""
    compared: Annotated[int, Between(10, 1_000_000)] = 4096
    """Held-out paths of the base set and of an expert's, for the discriminability."""
    compared_steps: Annotated[int, Between(1, 1000)] = 256
    """Time steps of these paths, as in the paper; rewards take paths of any length."""
    guidance_scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 1.0
    """Factor on the gradient of a reward that steers; a perfect reward needs 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [window for window in (self.window, *self.grid) if self.horizon % window]:
            raise ConfigError(f"--window and --grid must divide --horizon {self.horizon}, got {wrong[0]}")


DATA, BASE, POOL, REWARDS, HEAT, COMPARE, PLANS, HELD = range(8)
"""Purposes of random keys."""


class Place(NamedTuple):
    """An environment, whose paths have rows of actions and states."""

    name: str
    number: int
    """Purpose of its random keys."""
    actions: int
    """Coordinates of an action, which come first in a row."""
    coordinates: int
    """Coordinates of a row."""
    experts: int

    def key(self, run: Run, purpose: int, index: int = 0) -> Array:
        """Return the random key of a purpose."""
        return jax.random.fold_in(jax.random.fold_in(run.key(self.number), purpose), index)


class Family(NamedTuple):
    """A base model of a place and its experts."""

    place: Place
    name: str
    switches: Switches
    small: bool = False
    """Train on the small sets."""
    conditions: tuple[int, ...] = (0, -1)
    """Frames whose state the models get as conditions: both ends as published; the first alone if a reward steers."""

    def known(self, config: PathsConfig) -> np.ndarray:
        """Return (horizon, d), True for the coordinates that the models get as conditions."""
        mask = np.zeros((config.horizon, self.place.coordinates), bool)
        mask[list(self.conditions), self.place.actions :] = True
        return mask

    def models(self, config: PathsConfig) -> Models:
        """Return the models for the rewards."""
        network = clamped(model(config)) if self.switches == PUBLISHED else model(config)
        return Models(chain(config.diffusion_steps), network, self.switches)

    def rewards(
        self, config: PathsConfig, window: int = 0, experts: Sequence[int] = (), seeds: int = 0, first: int = 0
    ) -> Rewards:
        """Return the rewards of the configuration, or of another window, other experts and seeds."""
        strided, activation = self.switches.strided, self.switches.activation
        network = WindowMLP(window or config.window, config.widths, strided, activation)
        model = denoiser.zero_based(network.apply)
        problem = PairProblem(chain(config.diffusion_steps), model, config.rewards.batch)
        return Rewards(problem, network, experts or range(self.place.experts), seeds or config.seeds, first)

    def thetas(self, run: Run) -> Any:
        """Return the parameters of the base model and of the experts, stacked on axis 0."""
        return run[f"{self.place.name}/diffusers"][self.name]

    def units(self, run: Run, i: int) -> Normaliser:
        """Return the units of model i (0: the base model): its own, or the base model's for all."""
        own = self.switches.normaliser == "own"
        return windows.fit(run[f"{self.place.name}/episodes"][self.small][i if own else 0][0])

    def windows(self, run: Run, i: int, held_out: bool = False, horizon: int = 0, units: int | None = None) -> Windows:
        """Return the windows of set i, in the units of model `units`, by default i."""
        episodes = run[f"{self.place.name}/episodes"][self.small and not held_out][i][held_out]
        return windows.windows(episodes, self.units(run, i if units is None else units), horizon or run.config.horizon)


# Networks.


def chain(steps: int) -> Process:
    """Return the diffusion process of all models."""
    return process.ddpm(process.cosine_betas(steps))


def model(config: PathsConfig) -> denoiser.Model:
    """Return Diffuser's network, which predicts x_0 and counts time from 0."""
    return denoiser.zero_based(unet_of(config).apply)


@by_value
def clamped(model: denoiser.Model) -> denoiser.Model:
    """Clip the model's x_0 to the data's range, as the published code does for its means in Maze2D."""
    return lambda theta, x, t: jnp.clip(model(theta, x, t), -1.0, 1.0)


def unet_of(config: PathsConfig) -> TemporalUnet:
    """Return the diffusion models' network; 3,682,118 parameters in the preset `paper` of Maze2D."""
    return TemporalUnet(config.width, config.multipliers)


def diffuser_task(config: PathsConfig) -> Callable[[dict[str, Any]], training.Task]:
    """Return the task of the diffusion models."""
    return windows.denoising(chain(config.diffusion_steps), model(config), config.models.batch, config.horizon)


# Phases.
#
# `<place>/episodes` holds the data of a run: large and small sets, (training, held-out) of the base model and experts.


def diffusers(lab: Lab, place: Place, families: Sequence[Family]) -> None:
    """Train the base models and the experts of all families in one program, stacked on axis 0."""
    config, count = lab.config, place.experts + 1
    sets = [(family, i) for family in families for i in range(count)]

    def job(run: Run) -> training.Training:
        parts = [family.windows(run, i) for family, i in sets]
        sizes = np.array([len(part.begin) for part in parts], np.int32)
        known = np.stack([family.known(config) for family, _ in sets])
        keys = [place.key(run, BASE, i) for i in (0, 1)]
        return diffuser_training(config, place, windows.stack(parts), sizes, known, *keys)

    by_family = lambda run, state: {
        family.name: at(state.best, slice(i * count, (i + 1) * count)) for i, family in enumerate(families)
    }
    lab.train(f"{place.name}/diffusers", job, by_family)


def diffuser_training(
    config: PathsConfig, place: Place, sets: Windows, sizes: np.ndarray, known: np.ndarray, start: Array, key: Array
) -> training.Training:
    """Return the training of K models side by side, on K sets of windows.

    Args:
      sets: stacked on axis 0.
      sizes: (K,) numbers of windows.
      known: (K, horizon, d), as in `Family.known`.
      start: the key of the initial parameters.
    """
    own = {"windows": sets, "count": jnp.asarray(sizes), "known": jnp.asarray(known)}
    starts, keys = (training.keys(key, len(sizes)) for key in (start, key))
    params = nets.fresh_members(unet_of(config), starts, *example(config, place))
    settings = config.models.settings(config.decay, warmup=100, clip=None)
    return training.Training(keys, params, diffuser_task(config), own, settings, own=True)


def example(config: PathsConfig, place: Place) -> tuple[Array, Array]:
    """Return a path and a time, to initialise networks."""
    return jnp.zeros((config.horizon, place.coordinates)), jnp.zeros(())


def pools(lab: Lab, family: Family) -> None:
    """Compute noisy paths of the base set with the differences of all experts, as `pool` and `held-out-pool`."""
    models, piece, known = family.models(lab.config), lab.config.pool // 8, jnp.asarray(family.known(lab.config))

    def request(n: int, purpose: int, run: Run) -> PoolRequest:
        key, thetas = partial(family.place.key, run, purpose), family.thetas(run)
        source = family.windows(run, 0, held_out=purpose == HELD)
        x0 = windows.draw(key(0), source, n, run.config.horizon)
        return PoolRequest(at(thetas, 0), at(thetas, slice(1, None)), known, key(1), x0)

    for name, n, purpose in (("pool", lab.config.pool, POOL), ("held-out-pool", piece, HELD)):
        rows.pool(lab, f"{family.place.name}/{family.name}/{name}", models, partial(request, n, purpose), piece)


def train(lab: Lab, row: str, family: Family, rewards: Rewards) -> str:
    """Train the rewards of a row, or the classifiers of `discriminator`, as a phase, and return its name."""
    phase = f"{family.place.name}/{row}/rewards"

    def job(run: Run) -> training.Training:
        key, problem = partial(family.place.key, run, REWARDS), rewards.problem
        shared = begin(run.config, family.place, rewards, key())
        if row == "discriminator":
            base, experts = base_and_experts(run, family)
            return relative_reward.discriminator_training(problem, base, experts, *shared, key(2))
        number = 1000 + 100 * rewards.network.window + rewards.first
        pool = run[f"{family.place.name}/{family.name}/pool"]
        return relative_reward.reward_training(problem, pool, *shared, key(number))

    lab.train(phase, job, lambda run, state: state.last)  # the published evaluations use no averages
    return phase


def begin(config: PathsConfig, place: Place, rewards: Rewards, start: Array) -> tuple[Any, Params, training.Settings]:
    """Return the experts, the initial parameters (of the key `start`) and the settings of a training of rewards."""
    return rewards.owners, rewards.start(start, *example(config, place)), config.rewards.settings(0.0, clip=None)


def base_and_experts(run: Run, family: Family) -> tuple[Array, Array]:
    """Draw paths of the base set and of the experts' sets (on axis 0), in the base model's units."""
    config, key = run.config, partial(family.place.key, run, POOL)
    draw = lambda i, index: windows.draw(key(index), family.windows(run, i, units=0), config.pool, config.horizon)
    return draw(0, 10), jnp.stack([draw(expert + 1, expert) for expert in range(family.place.experts)])


# Measurements.


def compared(
    run: Run, family: Family, rewards: Rewards, phase: str, held_out: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rewards of base and expert paths, in the base model's units, at the first tenth of the times."""
    config, window, key = run.config, rewards.network.window, partial(family.place.key, run, COMPARE)
    frames = -(-config.compared_steps // (config.stride * window)) * window
    paths = [
        windows.draw_by_halves(key(i), family.windows(run, model, held_out, frames, 0), config.compared, frames)
        for i, model in enumerate((0, *(expert + 1 for expert in rewards.experts)))
    ]
    noise, latest, problem = lambda i: key(100 + i), max(1, config.diffusion_steps // 10), rewards.problem
    return relative_reward.told_apart(
        problem.process, problem.network, run[phase], rewards.owners, paths, noise, latest, held_out
    )


def evaluate(
    lab: Lab, row: str, family: Family, rewards: Rewards, phase: str, more: Callable[..., dict], search: float = 0.0
) -> None:
    """Measure discriminability and fit of rewards, and add them to a row of the place.

    Args:
      more: (run, family, rewards, phase) -> further results.
      search: seconds per expert that the training does not count.
    """
    place, name, problem = family.place.name, phase.replace("/rewards", "/evaluation"), rewards.problem

    def compute(run: Run) -> dict[str, np.ndarray]:
        pairs = {held_out: compared(run, family, rewards, phase, held_out) for held_out in (True, False)}
        results = {
            "discriminability": rows.accuracies(pairs[True], True),
            "discriminability_in_sample": rows.accuracies(pairs[False], False),
            "pairs": np.array(pairs[True][:: rewards.seeds]),
        }
        if row != "discriminator":
            pool, bounds = run[f"{place}/{family.name}/held-out-pool"], relative_reward.tenths(problem.process)
            fits = relative_reward.quality(problem.network, run[phase], rewards.owners, pool, bounds)
            results["gradient_r2"] = np.array([fit.overall for fit in fits])
            for expert, fit in zip(rewards.experts, fits[:: rewards.seeds], strict=True):
                by_time = {f"r2_below_{int(b)}": float(r) for b, r in zip(fit.times[1:], fit.r2, strict=True)}
                run.folder.log(maze=place, row=row, goal=expert + 1, **by_time)
        return results | more(run, family, rewards, phase)

    def add(run: Run) -> None:
        seconds = (run.seconds(phase) / len(rewards.experts) + search) / rewards.seeds
        values = {"seconds": [seconds] * len(rewards.owners), "expert": rewards.experts}
        rows.add(run, f"{place}/{row}", **run[name], **values)

    lab.once(name, compute)
    lab.each(add)


def best_per_expert(lab: Lab, row: str, family: Family, evaluate: Callable[..., None]) -> None:
    """Choose the best window per expert, as published, but on a seed that the row does not report."""
    candidates = [family.rewards(lab.config, window, seeds=1, first=1000) for window in lab.config.grid]
    phases = [train(lab, f"published-grid-{rewards.network.window}", family, rewards) for rewards in candidates]

    def choose(run: Run) -> None:
        config, alone = run.config, Lab([run])  # runs choose different windows
        pairs = [compared(run, family, *pair, False) for pair in zip(candidates, phases, strict=True)]
        best = np.asarray(config.grid)[np.argmax([rows.accuracies(of_window, False) for of_window in pairs], 0)]
        for window in np.unique(best).tolist():
            rewards = family.rewards(config, window, np.flatnonzero(best == window).tolist())
            goals = "-".join(str(expert + 1) for expert in rewards.experts)
            phase = train(alone, f"published-best-{window}-of-{goals}", family, rewards)
            search = run.seconds(*phases) / family.place.experts
            evaluate(alone, row, family, rewards, phase, search=search)

    lab.each(choose)
