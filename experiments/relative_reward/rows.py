"""The rows of relative rewards (2306.01804), for any base model and its experts.

A run trains the rewards of several experts and seeds side by side.  They lie on axis 0, expert by expert, and so do
their values in a row of the table.
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
from gendiff.losses import Aligned
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward import Models, PairProblem, PoolRequest
from gendiff.metrics import discriminability, heat, rates
from gendiff.metrics.heat import Heat
from gendiff.metrics.rates import Estimate
from gendiff.nets.window_mlp import WindowMLP
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Samples


class Rewards(NamedTuple):
    """Rewards of all pairs of an expert and a seed."""

    problem: PairProblem
    network: Any
    """The Flax module of `problem`."""
    experts: Sequence[int]
    """Numbers of the experts, from 0, rising."""
    seeds: int
    first: int = 0
    """Number of the first seed."""

    @property
    def owners(self) -> Any:
        """The experts of the rewards, (K,)."""
        return np.repeat(np.asarray(self.experts, np.int32), self.seeds)

    def start(self, key: PRNGKey, *inputs: Any) -> Params:
        """Initialise parameters, which depend only on the expert and the seed, not on the other rewards."""
        numbers = [10_000 * expert + self.first + seed for expert in self.experts for seed in range(self.seeds)]
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers))
        return nets.fresh_members(self.network, keys, *inputs)


def at(stacked: Params, i: Any) -> Params:
    """Return member i, or the members of a slice, of stacked parameters."""
    return jax.tree.map(lambda a: a[i], stacked)


# Pools and rewards.


def pool(lab: Lab, phase: str, models: Models, request: Callable[[Run], PoolRequest], piece: int) -> None:
    """Compute the differences of all experts at noisy samples for all rewards, `piece` samples at a time."""

    def compute(members: list[Run]) -> list[Aligned]:
        requests = [request(run) for run in members]

        def report(done: int) -> None:
            for run in members:
                run.progress(phase, done, len(requests[0].x0), {})

        return relative_reward.pools(models, requests, piece, lab.mesh, report)

    lab.together(phase, compute, Aligned)


# Measurements.


def accuracies(pairs: Sequence[tuple[np.ndarray, np.ndarray]], held_out: bool) -> np.ndarray:
    """Return the discriminability (K,) of pairs of values, of the base model's samples and of an expert's."""
    return np.array([discriminability.accuracy(*pair, held_out).value for pair in pairs])


def heat_maps(
    rewards: Rewards, phis: Params, paths: Samples, places: np.ndarray, extent: tuple[int, int], key: PRNGKey
) -> list[Heat]:
    """Map every reward at the least noise; all frames of a window take its value.

    Args:
      paths: (n, horizon, d).
      places: (n, horizon, 2), in cells.
      extent: size of the map, in cells.
    """
    network: WindowMLP = rewards.network
    values = np.asarray(_of_windows(network, rewards.problem.process, paths, phis, key))
    points = np.asarray(jax.vmap(network.split)(jnp.asarray(places))).reshape(-1, 2)
    return [heat.heat(points, np.repeat(value.ravel(), network.window), extent) for value in values]


@partial(jax.jit, static_argnums=(0, 1))
def _of_windows(network: WindowMLP, p: Process, paths: Samples, phis: Params, key: PRNGKey) -> Array:
    """Return the rewards (K, n, windows) of the windows of paths, noised to t = 1."""
    noise = lambda key, x0: process.perturb(p, key, x0, jnp.int32(1))[0]
    noisy = jax.vmap(noise)(jax.random.split(key, len(paths)), paths)
    of_path = lambda phi, x: network.apply(phi, network.split(x), jnp.zeros(()), method="of_windows")
    return potential.over_members(lambda phi: jax.vmap(partial(of_path, phi))(noisy), phis)


# Steering.


class Steered(NamedTuple):
    """Samples of a run, steered by a reward: the arrays of `relative_reward.steered`."""

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
    """Draw the steered samples (cases, n, *shape) of a run, as `samples`; all cases have the same shapes."""

    def compute(members: list[Run]) -> list[dict[str, np.ndarray]]:
        requests, drawn = [cases(run) for run in members], []
        for case in zip(*requests, strict=True):
            results = runs.call(relative_reward.steered, (models, network), lab.mesh, case)
            drawn.append([distributed.gather(samples, len(case[0].held)) for samples in results])
            for run in members:
                run.progress(phase, len(drawn), len(requests[0]), {})
        return [{"samples": np.stack(of_run)} for of_run in zip(*drawn, strict=True)]

    lab.together(phase, compute)


def denoising_path(models: Models, rewards: Rewards, case: Steered, shown: int) -> dict[str, np.ndarray]:
    """Return the steered path of a case, with a single `held`, as windows with their rewards at `shown` times."""
    p, network, held = models.process, rewards.network, jnp.asarray(case.held)
    kernel = relative_reward.kernel(models, rewards.problem.network, case.theta, case.phi, case.scale, case.known)
    grid = p.grid(p.steps or 100)
    chosen = jnp.linspace(0, len(grid) - 1, shown).astype(int)
    states = jax.jit(lambda key: sampling.states(p, kernel(held), grid, key, held.shape))(case.key)[chosen]
    of_state = lambda x, t: network.apply(case.phi, network.split(x), t, method="of_windows")
    values = jax.jit(jax.vmap(of_state))(states, jnp.maximum(grid[chosen] - 1, 0))
    arrays = {"times": grid[chosen], "windows": jax.vmap(network.split)(states), "rewards": values}
    return {name: np.asarray(array) for name, array in arrays.items()}


# Rows of the table.


def add(run: Run, row: str, **values: Sequence[Any] | np.ndarray) -> None:
    """Append values to a row of a run, `run[row][metric]`."""
    results = run.results.setdefault(row, {})
    for metric, more in values.items():
        results.setdefault(metric, []).extend(more)


def measured(parts: Sequence[Mapping[str, list]], seeds: int, columns: Sequence[Column]) -> dict[str, Estimate]:
    """Estimate the metrics of a row over its parts, such as environments.

    Args:
      seeds: values per expert, whose mean counts as a single value, because they share the models.
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
