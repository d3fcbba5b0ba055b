"""The rows of relative rewards (2306.01804): what its tables compare, for any base model and its experts.

Rewards of several experts and seeds train side by side in a run.  They lie on axis 0, expert by expert, and so do their
values in a row of the table.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.lab.phases import Lab, Run
from experiments.lab.table import Column
from gendiff import distributed, nets, potential, process, runs, sampling
from gendiff.denoiser import Model
from gendiff.losses import Aligned
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward import PairProblem, PoolRequest, Switches
from gendiff.metrics import discriminability, heat, rates
from gendiff.metrics.heat import Heat
from gendiff.metrics.rates import Estimate
from gendiff.nets.window_mlp import WindowMLP
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Sample, Samples


class Models(NamedTuple):
    """A base model and its experts, of one network."""

    process: Process
    model: Model
    switches: Switches
    known: np.ndarray
    """(*shape), True for the coordinates that the models get as conditions."""


class Rewards(NamedTuple):
    """Rewards of experts x seeds."""

    problem: PairProblem
    network: Any
    """The Flax module of `problem`."""
    experts: Sequence[int]
    """Their numbers, from 0, rising."""
    seeds: int
    first: int = 0
    """Number of the first seed."""

    @property
    def owners(self) -> np.ndarray:
        """(K,), the expert of each reward."""
        return np.repeat(np.asarray(self.experts, np.int32), self.seeds)

    def start(self, key: PRNGKey, *inputs: Any) -> Params:
        """Initial parameters; those of an expert and a seed are the same whatever else is trained."""
        numbers = [10_000 * expert + self.first + seed for expert in self.experts for seed in range(self.seeds)]
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers))
        return nets.fresh_members(self.network, keys, *inputs)


def at(stacked: Params, i: Any) -> Params:
    """A member, or members, of stacked parameters."""
    return jax.tree.map(lambda a: a[i], stacked)


# Pools and rewards.


def pool(lab: Lab, phase: str, models: Models, request: Callable[[Run], PoolRequest], piece: int) -> None:
    """Compute the differences of all experts at noisy samples, `piece` at a time, for all rewards."""

    def compute(members: list[Run]) -> list[Aligned]:
        asked = [request(run) for run in members]
        n = len(asked[0].x0)
        report = lambda done: [run.progress(phase, done, n, {}) for run in members]
        switches = models.switches
        return relative_reward.pools(models.process, models.model, switches, asked, piece, lab.mesh, report)

    lab.together(phase, compute, Aligned)


# Measurements.


def accuracies(pairs: Sequence[tuple[np.ndarray, np.ndarray]], held_out: bool) -> np.ndarray:
    """(K,) discriminability, of values of the base model's samples and of the expert's."""
    return np.array([discriminability.accuracy(*pair, held_out).value for pair in pairs])


def heat_maps(
    rewards: Rewards, phis: Params, paths: Samples, places: np.ndarray, extent: tuple[int, int], key: PRNGKey
) -> list[Heat]:
    """A heat map of every reward at the least noise; the frames of a window have its value.

    Args:
      paths: (n, horizon, d).
      places: (n, horizon, 2), in cells.
      extent: of the map, in cells.
    """
    network: WindowMLP = rewards.network
    values = np.asarray(_of_windows(network, rewards.problem.process, paths, phis, key))
    points = np.asarray(jax.vmap(network.split)(places)).reshape(-1, 2)
    return [heat.heat(points, np.repeat(value.ravel(), network.window), extent) for value in values]


@partial(jax.jit, static_argnums=(0, 1))
def _of_windows(network: WindowMLP, p: Process, paths: Samples, phis: Params, key: PRNGKey) -> Array:
    """(K, n, windows) rewards of the windows of paths at t = 1."""
    noise = lambda key, x0: process.perturb(p, key, x0, jnp.int32(1))[0]
    noisy = jax.vmap(noise)(jax.random.split(key, len(paths)), paths)
    of_path = lambda phi, x: network.apply(phi, network.split(x), jnp.zeros(()), method="of_windows")
    return potential.over_members(lambda phi: jax.vmap(partial(of_path, phi))(noisy), phis)


# Steering.


class Steered(NamedTuple):
    """Samples that a run asks for, steered by a reward; arguments of `relative_reward.steered`."""

    theta: Params
    phi: Params
    scale: float
    known: Array
    held: Samples
    """(n, *shape), with the values of the known coordinates."""
    key: PRNGKey


def steer(
    lab: Lab, phase: str, models: Models, network: potential.Logit, cases: Callable[[Run], list[Steered]]
) -> None:
    """Draw the samples (cases, n, *shape) of the base model that rewards steer, as `samples`; cases of equal shapes."""
    static = (models.process, models.model, network, models.switches)

    def compute(members: list[Run]) -> list[dict[str, np.ndarray]]:
        asked, drawn = [cases(run) for run in members], []
        for same in zip(*asked, strict=True):
            found = runs.call(relative_reward.steered, static, lab.mesh, same)
            n = len(same[0].held)
            drawn.append([distributed.gather(samples, n) for samples in found])
            for run in members:
                run.progress(phase, len(drawn), len(asked[0]), {})
        return [{"samples": np.stack(of_run)} for of_run in zip(*drawn, strict=True)]

    lab.together(phase, compute)


def on_the_way(
    models: Models, rewards: Rewards, theta: Params, phi: Params, scale: float, start: Sample, key: PRNGKey, shown: int
) -> dict[str, np.ndarray]:
    """A steered path on its way from noise, at `shown` of the sampler's times, as windows, with their rewards."""
    p, network = models.process, rewards.network
    known = jnp.asarray(models.known)
    kernel = relative_reward.kernel(
        p, models.model, rewards.problem.network, models.switches, theta, phi, scale, known
    )  # fmt: skip
    grid = p.grid(p.steps or 100)
    places = jnp.linspace(0, len(grid) - 1, shown).astype(int)
    states = jax.jit(lambda key: sampling.states(p, kernel(start), grid, key, start.shape))(key)[places]
    of_state = lambda x, t: network.apply(phi, network.split(x), t, method="of_windows")
    values = jax.jit(jax.vmap(of_state))(states, jnp.maximum(grid[places] - 1, 0))
    found = {"times": grid[places], "windows": jax.vmap(network.split)(states), "rewards": values}
    return {name: np.asarray(value) for name, value in found.items()}


# Rows of the table.


def add(run: Run, row: str, **values: Sequence[Any] | np.ndarray) -> None:
    """Add values to a row of a run, as `run[row][metric]`."""
    kept = run.results.setdefault(row, {})
    for metric, more in values.items():
        kept.setdefault(metric, []).extend(more)


def measured(parts: Sequence[Mapping[str, list]], seeds: int, columns: Sequence[Column]) -> dict[str, Estimate]:
    """The metrics of a row, whose values are in several parts, such as environments.

    Args:
      seeds: values of an expert, of which the mean counts, because they share the models.
    """
    row = {}
    for metric in (column.metric for column in columns if column.metric in parts[0]):
        values = np.array([value for part in parts for value in part[metric]])
        if values.dtype == bool:
            row[metric] = rates.rate(int(values.sum()), len(values))
        elif metric == "seconds":
            row[metric] = rates.exact(float(values.mean()))
        else:
            row[metric] = rates.mean(values.reshape(-1, seeds).mean(1))
    return row
