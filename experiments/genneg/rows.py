"""The rows of Gen-neG (2307.16463): what its tables compare, for any model and oracle.

Each function asks the lab for a phase of all runs.  An experiment chooses the models and their settings, and measures
them: `samples` draws what it counts infractions on, and `bounds` averages its likelihood.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.lab.config import Between
from experiments.lab.phases import Lab, Run
from gendiff import distributed, runs, smc
from gendiff.denoiser import Denoiser
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, Points, Problem, Request, Synthetic
from gendiff.metrics import rates
from gendiff.metrics.calibration import Calibration
from gendiff.metrics.rates import Estimate
from gendiff.types import Params, PRNGKey, Sample, Scalar

Model = Callable[[Run], Guided]
"""The model of each run."""
Key = Callable[[Run], PRNGKey]
"""A random key of each run."""


@dataclass(frozen=True)
class Draws:
    """The samples that a round learns from."""

    per_class: Annotated[int, Between(10, 100_000_000)] = 20_000
    """Samples of each class that a round wants."""
    budget: Annotated[int, Between(100, 1_000_000_000)] = 300_000
    """The most samples that a round draws for them."""
    batch: Annotated[int, Between(16, 1_000_000)] = 16_384
    """Samples drawn at a time."""


# Rounds.


def draws(lab: Lab, phase: str, problem: Problem, model: Model, key: Key, wanted: Draws, conditions: Any = None) -> str:
    """Draw from a model and ask the oracle, for `<phase>/draws`; return that name."""
    name = f"{phase}/draws"

    def compute(members: list[Run]) -> list[Synthetic]:
        requests = [Request(model(run), key(run), conditions=conditions) for run in members]
        report = lambda k, done, of, metrics: members[k].progress(f"{phase} draws", done, of, metrics)
        size = wanted.per_class, wanted.budget, wanted.batch
        return genneg.collect_all(problem, requests, *size, mesh=lab.mesh, report=report)

    lab.together(name, compute, Synthetic)
    return name


class Fit(NamedTuple):
    """A classifier that a run fits."""

    train: Synthetic
    held_out: Synthetic
    start: Params
    key: PRNGKey
    density: tuple[np.ndarray, np.ndarray] | None = None


def classifier(
    lab: Lab,
    phase: str,
    problem: Problem,
    settings: genneg.ClassifierTraining,
    fit: Callable[[Run], Fit],
    conditions: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Fit a classifier to judged samples."""
    fits: dict[Run, Fit] = {}

    def asked(run: Run) -> Any:
        fits[run] = found = fit(run)
        train, held_out, start, key, density = found
        return genneg.classifier_training(problem, train, held_out, start, settings, key, density, conditions)

    result = lambda run, state: genneg.fitted(state, fits[run].train, settings)
    lab.train(phase, asked, result, mesh)


def rounds(
    lab: Lab, problem: Problem, settings: genneg.Rounds, start: Callable[[PRNGKey], Params], key: Key
) -> Iterator[int]:
    """Algorithm 1 for all runs (see `genneg.run`, which is the same for one): the numbers of the rounds, as they end.

    A run has `round-<i>/draws`, `round-<i>/split`, `round-<i>/classifier`, and `round-<i>`, the model after it.
    """
    how, student = settings.classifier, settings.student
    wanted = Draws(settings.per_class, settings.budget, settings.batch)
    for number in range(1, settings.rounds + 1):
        name = f"round-{number}"
        keys = {run: jax.random.split(jax.random.fold_in(key(run), number), 5) for run in lab.runs}
        before = partial(model_after, number - 1)
        drawn = draws(lab, name, problem, before, lambda run: keys[run][0], wanted)  # noqa: B023 (used at once)
        lab.each(lambda run: run.results.update({f"{name}/split": genneg.split(run[drawn], how, keys[run][1])}))  # noqa: B023
        fit = lambda run: Fit(*run[f"{name}/split"], start(keys[run][2]), keys[run][3])  # noqa: B023
        classifier(lab, f"{name}/classifier", problem, how, fit)
        stack = lambda run: genneg.append(before(run), run[f"{name}/classifier"])  # noqa: B023
        if settings.mode == "stack":
            lab.each(lambda run: run.results.update({name: stack(run)}))  # noqa: B023
        else:
            assert student is not None
            teach = partial(_lesson, lab, problem, settings, name, before, stack, keys)
            distilled(lab, f"{name}/student", problem, teach, student)
            lab.each(lambda run: run.results.update({name: Guided(run[f"{name}/student"])}))  # noqa: B023
        yield number


def model_after(number: int, run: Run) -> Guided:
    """The model of a run after a round; after none, the baseline."""
    return run[f"round-{number}"] if number else Guided(run["baseline"])


def _lesson(
    lab: Lab, problem: Problem, settings: genneg.Rounds, name: str, before: Model, stack: Model, keys: Any, run: Run
) -> genneg.Lesson:
    """What the student of a round learns from."""
    pool_key, mixture_key, distill_key = jax.random.split(keys[run][4], 3)
    teacher = stack(run)
    good = genneg.accepted(
        problem, teacher, pool_key, settings.per_class, settings.budget, settings.batch, lab.mesh
    )  # fmt: skip
    points = genneg.mixture(good, run[f"{name}/draws"].negatives, settings.stored, mixture_key)
    return genneg.Lesson(teacher, Points(points), before(run).theta, distill_key)


def replay(run: Run, problem: Problem, numbers: Sequence[int], start: Params, key: PRNGKey) -> Fit:
    """One classifier of the baseline, from the samples of all rounds."""
    ended = [
        genneg.Round(i, run[f"round-{i}"], run[f"round-{i}/classifier"], *run[f"round-{i}/split"]) for i in numbers
    ]
    train, held_out, density = genneg.replay(ended, problem)
    return Fit(train, held_out, start, key, density)


# One network in place of a stack.


def distilled(
    lab: Lab,
    phase: str,
    problem: Problem,
    lesson: Callable[[Run], genneg.Lesson],
    settings: genneg.StudentTraining,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Distil a guided model into one network."""
    asked = lambda members: genneg.distill_trainings(problem, [lesson(run) for run in members], settings, lab.mesh)
    lab.train(phase, asked, mesh=mesh, at_once=True)


def refitted(
    lab: Lab,
    phase: str,
    problem: Problem,
    points: Callable[[Run], Points],
    settings: genneg.StudentTraining,
    key: Key,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Train the baseline on with accepted samples."""
    asked = lambda run: genneg.refit_training(problem, points(run), run["baseline"], settings, key(run))
    lab.train(phase, asked, mesh=mesh)


# Measurements.


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
    problem: Problem,
    model: Model,
    key: Key,
    n: int,
    size: int,
    scale: Callable[[Run], float],
    conditions: Callable[[np.ndarray], Any] | None = None,
    timed: bool = False,
) -> list[Drawn]:
    """Draw n samples of each run, `size` at a time.

    Args:
      conditions: sample numbers -> their conditions.
      timed: draw a single batch again, because the first one compiles.
    """
    models, parts = [model(run) for run in members], [[] for _ in members]
    took: list[float] = []
    for run in members:
        run.progress(phase, 0, n, {})
    for first in (*range(0, n, size), *((0,) if timed and n <= size else ())):
        begun = time.perf_counter()
        here = None if conditions is None else conditions(np.arange(first, first + size) % n)
        requests = [
            Request(guided, jax.random.fold_in(key(run), first), scale(run), here)
            for run, guided in zip(members, models, strict=True)
        ]
        for kept, batch in zip(parts, genneg.draw_all(problem, requests, size, lab.mesh), strict=True):
            kept.append(batch)
        took.append(time.perf_counter() - begun)
        for run in members:
            run.progress(phase, min(first + size, n), n, {})
    seconds = float(np.median(took[1:])) / size if took[1:] else float("nan")
    return [Drawn(np.concatenate(kept)[:n], seconds) for kept in parts]


Bound = Callable[[Denoiser, PRNGKey, Sample], Scalar]
"""A bound on log p(x_0), by value."""


def bounds(
    lab: Lab,
    members: Sequence[Run],
    problem: Problem,
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
    problem: Problem, bound: Bound, mesh: Any, guided: Guided, points: Array, conditions: Any, key: Array, scale: float
) -> Array:
    def of_point(arguments: tuple[PRNGKey, Sample, Any]) -> Scalar:
        key, x0, condition = arguments
        return bound(genneg.denoiser(problem, genneg.bound(problem, guided, condition), scale), key, x0)

    inputs = jax.random.split(key, len(points)), points, conditions
    return distributed.chunked(of_point, inputs, problem.chunk, mesh, cut=False)


def calibrate(lab: Lab, name: str, problem: Problem, classifier: str, split: str, key: Key, times: Array) -> None:
    """Calibration of a classifier, on the held-out part of its samples, as `calibration/<name>`."""
    report = lambda run: genneg.calibration(problem, run[classifier], run[split][1], key(run), times)
    lab.once(f"calibration/{name}", report, Calibration)


# Twisted SMC, with a classifier as twist.


def populations(
    mesh: jax.sharding.Mesh,
    problem: Problem,
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
    problem: Problem, particles: int, chunk: int, mesh: Any, guided: Guided, keys: Array, conditions: Any
) -> smc.Population:
    grid = problem.process.grid(problem.steps)

    def of_key(arguments: tuple[PRNGKey, Any]) -> smc.Population:
        key, condition = arguments
        here = genneg.bound(problem, guided, condition)
        plain, steered = genneg.denoiser(problem, Guided(here.theta)), genneg.denoiser(problem, here)
        twist = genneg.twist(problem, here)
        return smc.twisted(problem.process, plain, steered, twist, grid, key, problem.shape, particles)

    return distributed.chunked(of_key, (keys, conditions), chunk, mesh, cut=False)


def pooled(found: smc.Population, problem: Problem, key: PRNGKey) -> dict[str, Any]:
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
