"""What is measured of Gen-neG's models: samples and their time, bounds, calibration, and twisted SMC beside them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.genneg.rows import Key, Model
from experiments.lab.config import Between
from experiments.lab.phases import Lab, Run
from gendiff import distributed, runs, smc
from gendiff.denoiser import Denoiser
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, OracleProblem, Request
from gendiff.metrics import rates
from gendiff.metrics.calibration import Calibration
from gendiff.metrics.rates import Estimate
from gendiff.types import PRNGKey, Sample, Scalar

T = TypeVar("T")


class Drawn(NamedTuple):
    """Samples of one run that are to be judged."""

    samples: np.ndarray
    """(n, *shape)."""
    seconds: float
    """Of a sample, without compilation: the median over batches after the first; NaN if there was one batch."""


def samples(
    lab: Lab,
    members: Sequence[Run],
    phase: str,
    problem: OracleProblem,
    model: Model,
    key: Key,
    n: int,
    size: int,
    scale: Callable[[Run], float],
    conditions: Callable[[np.ndarray], Any] | None = None,
    again: bool = False,
) -> list[Drawn]:
    """Draw n samples of each run, `size` at a time.

    Args:
      conditions: sample numbers -> their conditions.
      again: draw a single batch twice, to time it.
    """
    models = [model(run) for run in members]
    parts: list[list[np.ndarray]] = [[] for _ in members]
    seconds: list[float] = []
    for run in members:
        run.progress(phase, 0, n, {})
    for first in range(0, n, size):
        here = None if conditions is None else conditions(np.arange(first, first + size) % n)
        requests = lambda: [
            Request(guided, jax.random.fold_in(key(run), first), scale(run), here)  # noqa: B023 (used at once)
            for run, guided in zip(members, models, strict=True)
        ]
        draw = lambda: genneg.draw_all(problem, requests(), size, lab.mesh)  # noqa: B023
        for kept, batch in zip(parts, timed(draw, seconds, again and n <= size), strict=True):
            kept.append(batch)
        for run in members:
            run.progress(phase, min(first + size, n), n, {})
    median = float(np.median(seconds[1:])) / size if seconds[1:] else float("nan")
    return [Drawn(np.concatenate(kept)[:n], median) for kept in parts]


def timed(work: Callable[[], T], seconds: list[float], again: bool) -> T:
    """Do work and note its time; `again` does it once more, because the first time compiles."""
    for _ in range(1 + again):
        begun = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begun)
    return result


def equal_parts(n: int, most: int) -> int:
    """The size of the fewest equal parts of n with at most so many each; the last may be a little shorter."""
    return -(-n // -(-n // most))


Bound = Callable[[Denoiser, PRNGKey, Sample], Scalar]
"""A bound on log p(x_0), by value."""


def bounds(
    lab: Lab,
    members: Sequence[Run],
    problem: OracleProblem,
    bound: Bound,
    model: Model,
    points: Array,
    key: Key,
    scale: Callable[[Run], float],
    conditions: Any = None,
) -> list[np.ndarray]:
    """The bound of each point (n, *shape), for each run; the same key gives the same noise for every model."""
    arguments = [(model(run), points, conditions, key(run), scale(run)) for run in members]
    return [
        distributed.gather(found, len(points)) for found in runs.call(_bounds, (problem, bound), lab.mesh, arguments)
    ]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _bounds(
    problem: OracleProblem,
    bound: Bound,
    mesh: Any,
    guided: Guided,
    points: Array,
    conditions: Any,
    key: Array,
    scale: float,
) -> Array:
    def of_point(arguments: tuple[PRNGKey, Sample, Any]) -> Scalar:
        key, x0, condition = arguments
        return bound(genneg.denoiser(problem, genneg.bound(problem, guided, condition), scale), key, x0)

    inputs = jax.random.split(key, len(points)), points, conditions
    return distributed.chunked(of_point, inputs, problem.chunk, mesh, cut=False)


def calibrate(lab: Lab, name: str, problem: OracleProblem, classifier: str, split: str, key: Key, times: Array) -> None:
    """Calibration of a classifier, on the held-out part of its samples, as `calibration/<name>`."""
    report = lambda run: genneg.calibration(problem, run[classifier], run[split][1], key(run), times)
    lab.once(f"calibration/{name}", report, Calibration)


# Twisted SMC, with a classifier as twist.


@dataclass(frozen=True)
class Smc:
    """The twisted SMC sampler."""

    steps: Annotated[int | None, Between(2, 10_000)] = None
    """Ancestral steps; default: as many as the sampler's."""
    particles: Annotated[int, Between(2, 10_000_000)] = 1024
    """Particles of one population."""
    populations: Annotated[int, Between(2, 1_000_000)] = 16
    """Independent populations."""

    def length(self, sampler_steps: int) -> int:
        """The ancestral steps, beside a sampler of so many."""
        return self.steps or sampler_steps


def populations(
    mesh: jax.sharding.Mesh,
    problem: OracleProblem,
    particles: int,
    guided: Guided,
    keys: Array,
    conditions: Any = None,
    chunk: int = 1,
) -> smc.Population:
    """A population for each key, and for each row of the conditions; `chunk` of them at a time and device."""
    arguments = distributed.place(mesh, (guided, keys, conditions))
    return distributed.gather(_populations(problem, particles, chunk, mesh, *arguments), len(keys))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _populations(
    problem: OracleProblem, particles: int, chunk: int, mesh: Any, guided: Guided, keys: Array, conditions: Any
) -> smc.Population:
    grid = problem.process.grid(problem.steps)

    def of_key(arguments: tuple[PRNGKey, Any]) -> smc.Population:
        key, condition = arguments
        here = genneg.bound(problem, guided, condition)
        plain, steered = genneg.denoiser(problem, Guided(here.theta)), genneg.denoiser(problem, here)
        twist = genneg.twist(problem, here)
        return smc.twisted(problem.process, plain, steered, twist, grid, key, problem.shape, particles)

    return distributed.chunked(of_key, (keys, conditions), chunk, mesh, cut=False)


class Chosen(NamedTuple):
    """One good sample of every population that has a good particle."""

    samples: np.ndarray
    """(m, *shape)."""
    numbers: np.ndarray
    """(m,) of their populations."""
    effective: np.ndarray
    """(n,) effective numbers of good particles of all populations; 0 where none is good."""
    seconds: np.ndarray
    """Of a population, without compilation."""


def one_of_each(
    lab: Lab, run: Run, problem: OracleProblem, particles: int, guided: Guided, key: PRNGKey, n: int,
    conditions: Callable[[np.ndarray], Any], batch: int = 64,
) -> Chosen:  # fmt: skip
    """Draw n populations, each of its own condition, and choose one good sample of each.

    Args:
      conditions: numbers of populations -> their conditions.
      batch: populations drawn at a time, at most.
    """
    size = equal_parts(n, batch)
    samples: list[np.ndarray] = []
    numbers: list[int] = []
    seconds: list[float] = []
    effective = np.zeros(n)
    run.progress("smc", 0, n, {})
    for first in range(0, n, size):
        told = conditions(np.arange(first, first + size) % n)
        keys = lambda: jax.random.split(jax.random.fold_in(key, first), size)  # noqa: B023 (used at once)
        draw = lambda: populations(lab.mesh, problem, particles, guided, keys(), told, 8)  # noqa: B023
        found = timed(draw, seconds, again=n <= size)
        repeated = jax.tree.map(lambda a: np.repeat(a, particles, 0), told)
        verdicts = genneg.verdicts(problem.oracle, found.particles.reshape(-1, *problem.shape), repeated)
        good = verdicts.all(1).reshape(size, particles)
        for i in np.flatnonzero(good.any(1) & (np.arange(first, first + size) < n)):
            population = jax.tree.map(lambda a: a[i], found)  # noqa: B023 (used at once)
            judged = smc.judge(population, good[i], jax.random.fold_in(key, n + first + i))
            samples.append(np.asarray(judged.samples[0]))
            numbers.append(first + int(i))
            effective[first + int(i)] = float(judged.effective)
        run.progress("smc", min(first + size, n), n, {"good": len(samples)})
    kept = np.asarray(samples, np.float32).reshape(-1, *problem.shape)
    return Chosen(kept, np.asarray(numbers, int), effective, np.asarray(np.median(seconds[1:]) / size))


def pooled(found: smc.Population, problem: OracleProblem, key: PRNGKey) -> dict[str, Any]:
    """The good particles of independent populations, judged as one, with an interval of log alpha."""
    count = len(found.log_weights)
    joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found._replace(resampled=jnp.zeros((1, 1))))
    good = jnp.asarray(genneg.verdicts(problem.oracle, np.asarray(joined.particles)))
    judged = smc.judge(joined, good, key)
    # Populations are independent: their own estimates of alpha give the interval of the pooled one.
    estimates = np.exp(found.log_weights) * np.asarray(good).reshape(count, -1)
    estimate = rates.mean(estimates.mean(1))
    interval = np.log(np.maximum([estimate.low, estimate.high], 1e-12)) - float(judged.log_alpha)
    return judged._asdict() | {"log_alpha_interval": interval, "resampled": found.resampled}


def alpha_of(result: dict[str, Any]) -> Estimate:
    """The share of good samples, as SMC estimates it."""
    log_alpha = float(result["log_alpha"])
    low, high = np.exp(log_alpha + result["log_alpha_interval"])
    return Estimate(float(np.exp(log_alpha)), float(low), float(high), len(result["samples"]))


def conditioned(bounds: np.ndarray, alpha: Estimate) -> tuple[Estimate, Estimate]:
    """Bound, and its gain, of a model conditioned on good: log p(x) - log alpha on every good x."""
    gain = Estimate(-np.log(alpha.value), -np.log(alpha.high), -np.log(alpha.low), alpha.n)
    return rates.shifted(rates.mean(bounds), gain.value), gain
