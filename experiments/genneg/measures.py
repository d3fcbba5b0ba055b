"""Measure Gen-neG's models: samples and their time, bounds, calibration, and twisted SMC beside them."""

import time
from collections.abc import Callable, Mapping, Sequence
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
from experiments.lab.table import markdown
from gendiff import distributed, runs, smc
from gendiff.denoiser import Denoiser
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, OracleProblem, Request
from gendiff.metrics import rates
from gendiff.metrics.calibration import Calibration
from gendiff.metrics.rates import Estimate
from gendiff.types import PRNGKey, Sample, Scalar

T = TypeVar("T")


class Subject(NamedTuple):
    """A model of several runs that is being measured."""

    lab: Lab
    members: list[Run]
    name: str
    """Of its row."""
    problem: OracleProblem
    model: Model
    scale: Callable[[Run], float] = lambda run: run.config.guidance_scale
    """Factor on the guidance."""


def evaluate(
    lab: Lab, name: str, problem: OracleProblem, model: Model, measure: Callable[[Subject], Sequence[Any]], kind: Any,
    metrics: Callable[[Run], dict[str, Estimate]], paper: dict[str, float] | None,
    factor: Callable[[Run], float] = lambda run: 1.0,
) -> None:  # fmt: skip
    """Measure a model of all runs as the phase `evaluate/<name>`, and add its row.

    Args:
      measure: gives a NamedTuple of type `kind` for each run.
      metrics: gives the row of a run from that phase.
      factor: multiplies `guidance_scale`.
    """
    scale = lambda run: factor(run) * run.config.guidance_scale
    compute = lambda members: measure(Subject(lab, members, name, problem, model, scale))
    lab.together(f"evaluate/{name}", compute, kind)
    lab.each(lambda run: run.add(name, metrics(run), paper))


class Drawn(NamedTuple):
    """Samples of one run, before the oracle's verdicts."""

    samples: np.ndarray
    """(n, *shape)."""
    seconds: float
    """Of a sample, without compilation: the median over batches after the first; NaN if there was one batch."""


def samples(
    subject: Subject, key: Key, n: int, size: int, conditions: Callable[[np.ndarray], Any] | None = None,
    again: bool = False,
) -> list[Drawn]:  # fmt: skip
    """Draw n samples of each run, `size` at a time.

    Args:
      conditions: sample numbers -> their conditions.
      again: draw a single batch twice, to time it.
    """
    models = [subject.model(run) for run in subject.members]
    parts: list[list[np.ndarray]] = [[] for _ in models]
    seconds: list[float] = []

    def draw(first: int) -> list[np.ndarray]:
        rows = None if conditions is None else conditions(np.arange(first, first + size) % n)
        requests = lambda: [
            Request(guided, jax.random.fold_in(key(run), first), subject.scale(run), rows)
            for run, guided in zip(subject.members, models, strict=True)
        ]
        work = lambda: genneg.draw_all(subject.problem, requests(), size, subject.lab.mesh)
        return timed(work, seconds, again and n <= size)

    def report(done: int) -> None:
        for run in subject.members:
            run.progress(f"evaluate {subject.name}", done, n, {})

    report(0)
    for first in range(0, n, size):
        for kept, batch in zip(parts, draw(first), strict=True):
            kept.append(batch)
        report(min(first + size, n))
    median = float(np.median(seconds[1:])) / size if seconds[1:] else float("nan")
    return [Drawn(np.concatenate(kept)[:n], median) for kept in parts]


def timed(work: Callable[[], T], seconds: list[float], again: bool) -> T:
    """Do work and append its time; `again` repeats it, because the first time compiles."""
    for _ in range(1 + again):
        begun = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begun)
    return result


def equal_parts(n: int, most: int) -> int:
    """The size of the fewest equal parts of n, at most `most`; the last part may be shorter."""
    return -(-n // -(-n // most))


Bound = Callable[[Denoiser, PRNGKey, Sample], Scalar]
"""A bound on log p(x_0), by value."""


def bounds(subject: Subject, bound: Bound, points: Array, key: Key, conditions: Any = None) -> list[np.ndarray]:
    """The bound of every point (n, *shape), for each run; the same key gives the same noise for every model."""
    arguments = [(subject.model(run), points, conditions, key(run), subject.scale(run)) for run in subject.members]
    results = runs.call(_bounds, (subject.problem, bound), subject.lab.mesh, arguments)
    return [distributed.gather(result, len(points)) for result in results]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _bounds(
    problem: OracleProblem, bound: Bound, mesh: Any, guided: Guided, points: Array, conditions: Any, key: Array,
    scale: float,
) -> Array:  # fmt: skip
    def of_point(arguments: tuple[PRNGKey, Sample, Any]) -> Scalar:
        key, x0, condition = arguments
        return bound(genneg.denoiser(problem, genneg.bound(problem, guided, condition), scale), key, x0)

    inputs = jax.random.split(key, len(points)), points, conditions
    return distributed.chunked(of_point, inputs, problem.chunk, mesh, cut=False)


def conditioned(values: np.ndarray, alpha: Estimate) -> tuple[Estimate, Estimate]:
    """The mean bound and its gain for p(x | good), because log p(x | good) = log p(x) - log alpha for every good x."""
    gain = Estimate(-np.log(alpha.value), -np.log(alpha.high), -np.log(alpha.low), alpha.n)
    return rates.shifted(rates.mean(values), gain.value), gain


# Calibration.


def calibrate(lab: Lab, name: str, problem: OracleProblem, classifier: str, split: str, key: Key, times: Array) -> None:
    """Compute a classifier's calibration on the held-out part of its samples, as `calibration/<name>`."""
    report = lambda run: genneg.calibration(problem, run[classifier], run[split][1], key(run), times)
    lab.once(f"calibration/{name}", report, Calibration)


def calibrations(run: Run) -> dict[str, tuple[Calibration, float]]:
    """Classifier -> its calibration, and the share alpha of good samples that it was trained for."""
    names = [phase.removeprefix("calibration/") for phase in run.results if phase.startswith("calibration/")]
    alpha = lambda name: run[f"{'round-1' if name == 'replay' else name}/split"][1].alpha
    return {name: (run[f"calibration/{name}"], alpha(name)) for name in names}


def calibration_table(run: Run, gains: Mapping[str, float]) -> str:
    """Every classifier's mean C beside alpha, and the gain of its row beside the ideal one; `gains`: row -> gain."""
    head = (
        "classifier", "alpha", "largest gap of mean C to alpha", "mean calibration error", "ideal gain", "gain seen",
    )  # fmt: skip
    before, body = 0.0, []
    for name, (report, alpha) in calibrations(run).items():
        gain = gains[name]
        added = gain - (0.0 if name == "replay" else before)
        before = gain
        gap, error = float(np.abs(np.asarray(report.mean) - alpha).max()), float(np.mean(report.error))
        body.append([name, f"{alpha:.4f}", f"{gap:.4f}", f"{error:.4f}", f"{-np.log(alpha):+.4f}", f"{added:+.4f}"])
    return markdown(head, body)


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
        return self.steps or sampler_steps


def populations(
    mesh: jax.sharding.Mesh, problem: OracleProblem, particles: int, guided: Guided, keys: Array,
    conditions: Any = None, chunk: int = 1,
) -> smc.Population:  # fmt: skip
    """Draw a population for each key and each row of the conditions, `chunk` of them at a time on a device."""
    arguments = distributed.place(mesh, (guided, keys, conditions))
    return distributed.gather(_populations(problem, particles, chunk, mesh, *arguments), len(keys))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _populations(
    problem: OracleProblem, particles: int, chunk: int, mesh: Any, guided: Guided, keys: Array, conditions: Any
) -> smc.Population:
    grid = problem.process.grid(problem.steps)

    def of_key(arguments: tuple[PRNGKey, Any]) -> smc.Population:
        key, condition = arguments
        model = genneg.bound(problem, guided, condition)
        plain, steered = genneg.denoiser(problem, Guided(model.theta)), genneg.denoiser(problem, model)
        twist = genneg.twist(problem, model)
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
        rows = conditions(np.arange(first, first + size) % n)
        keys = lambda: jax.random.split(jax.random.fold_in(key, first), size)  # noqa: B023 (used at once)
        draw = lambda: populations(lab.mesh, problem, particles, guided, keys(), rows, 8)  # noqa: B023
        drawn = timed(draw, seconds, again=n <= size)
        repeated = jax.tree.map(lambda a: np.repeat(a, particles, 0), rows)
        verdicts = genneg.verdicts(problem.oracle, drawn.particles.reshape(-1, *problem.shape), repeated)
        good = verdicts.all(1).reshape(size, particles)
        for i in np.flatnonzero(good.any(1) & (np.arange(first, first + size) < n)):
            population = jax.tree.map(lambda a: a[i], drawn)  # noqa: B023 (used at once)
            chosen = smc.judge(population, good[i], jax.random.fold_in(key, n + first + i))
            samples.append(np.asarray(chosen.samples[0]))
            numbers.append(first + int(i))
            effective[first + int(i)] = float(chosen.effective)
        run.progress("smc", min(first + size, n), n, {"good": len(samples)})
    kept = np.asarray(samples, np.float32).reshape(-1, *problem.shape)
    return Chosen(kept, np.asarray(numbers, int), effective, np.asarray(np.median(seconds[1:]) / size))


def pooled(drawn: smc.Population, problem: OracleProblem, key: PRNGKey) -> dict[str, Any]:
    """The good particles of independent populations, judged as one, with an interval of log alpha."""
    count = len(drawn.log_weights)
    joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), drawn._replace(resampled=jnp.zeros((1, 1))))
    good = jnp.asarray(genneg.verdicts(problem.oracle, np.asarray(joined.particles)))
    chosen = smc.judge(joined, good, key)
    # Populations are independent, so their own estimates of alpha give the interval of the pooled one.
    estimates = np.exp(drawn.log_weights) * np.asarray(good).reshape(count, -1)
    estimate = rates.mean(estimates.mean(1))
    interval = np.log(np.maximum([estimate.low, estimate.high], 1e-12)) - float(chosen.log_alpha)
    return chosen._asdict() | {"log_alpha_interval": interval, "resampled": drawn.resampled}


def alpha_of(result: dict[str, Any]) -> Estimate:
    """The share of good samples, as SMC estimates it."""
    log_alpha = float(result["log_alpha"])
    low, high = np.exp(log_alpha + result["log_alpha_interval"])
    return Estimate(float(np.exp(log_alpha)), float(low), float(high), len(result["samples"]))
