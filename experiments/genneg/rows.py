"""The rows of Gen-neG (2307.16463): the models that its tables compare, for any network and oracle.

Every function asks the lab for a phase of all runs.  An experiment chooses the models and their settings, and measures
them (`measures`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Annotated, Any

import jax

from experiments.lab.config import Between
from experiments.lab.phases import Lab, Run
from gendiff import training
from gendiff.methods import genneg
from gendiff.methods.genneg import Fit, Guided, OracleProblem, Points, Request, Synthetic
from gendiff.types import Params, PRNGKey

Model = Callable[[Run], Guided]
Key = Callable[[Run], PRNGKey]


def key(purpose: int) -> Key:
    """The random key of a purpose, of each run."""
    return lambda run: run.key(purpose)


@dataclass(frozen=True)
class Draws:
    """The samples that a round learns from."""

    per_class: Annotated[int, Between(10, 100_000_000)] = 20_000
    """Samples of each class that a round wants."""
    budget: Annotated[int, Between(100, 1_000_000_000)] = 300_000
    """The most samples that a round draws for them."""
    batch: Annotated[int, Between(16, 1_000_000)] = 16_384
    """Samples drawn at a time."""


# Models.


def baseline(run: Run) -> Guided:
    """The model that was trained on data."""
    return Guided(run["baseline"])


def student(phase: str) -> Model:
    """The network that a phase distilled or refitted."""
    return lambda run: Guided(run[phase])


def steered(*phases: str) -> Model:
    """The baseline with the classifiers of phases."""
    return lambda run: reduce(genneg.append, [run[phase] for phase in phases], baseline(run))


def model_after(number: int, run: Run) -> Guided:
    """The model of a run after a round; the baseline after round 0."""
    return run[f"round-{number}"] if number else baseline(run)


# Rounds.


def draws(
    lab: Lab, phase: str, problem: OracleProblem, model: Model, key: Key, size: Draws, conditions: Any = None
) -> str:
    """Draw from a model and ask the oracle, for `<phase>/draws`; return that name."""
    name = f"{phase}/draws"

    def compute(members: list[Run]) -> list[Synthetic]:
        requests = [Request(model(run), key(run), conditions=conditions) for run in members]
        report = lambda k, done, of, metrics: members[k].progress(f"{phase} draws", done, of, metrics)
        numbers = size.per_class, size.budget, size.batch
        return genneg.collect_all(problem, requests, *numbers, mesh=lab.mesh, report=report)

    lab.together(name, compute, Synthetic)
    return name


def classifier(
    lab: Lab, phase: str, problem: OracleProblem, settings: genneg.ClassifierTraining, fit: Callable[[Run], Fit],
    conditions: Any = None, mesh: jax.sharding.Mesh | None = None,
) -> None:  # fmt: skip
    """Fit a classifier to samples with the oracle's verdicts."""
    fits: dict[Run, Fit] = {}

    def job(run: Run) -> training.Training:
        fits[run] = fit(run)._replace(conditions=conditions)
        return genneg.classifier_training(problem, fits[run], settings)

    lab.train(phase, job, lambda run, state: genneg.fitted(state, fits[run].train, settings), mesh)


def rounds(
    lab: Lab, problem: OracleProblem, settings: genneg.Rounds, start: Callable[[PRNGKey], Params], key: Key
) -> Iterator[int]:
    """Run Algorithm 1 for all runs, as `genneg.run` does for one, and yield the number of every round at its end.

    A run has `round-<i>/draws`, `round-<i>/split`, `round-<i>/classifier`, and `round-<i>`, the model after it.
    """
    for number in range(1, settings.rounds + 1):
        _round(lab, problem, settings, start, key, number)
        yield number


def _round(
    lab: Lab, problem: OracleProblem, settings: genneg.Rounds, start: Callable[[PRNGKey], Params], key: Key, number: int
) -> None:
    name, before, size = f"round-{number}", partial(model_after, number - 1), (settings.per_class, settings.budget)
    keys = {run: jax.random.split(jax.random.fold_in(key(run), number), 5) for run in lab.runs}
    drawn = draws(lab, name, problem, before, lambda run: keys[run][0], Draws(*size, settings.batch))
    split = lambda run: genneg.split(run[drawn], settings.classifier, keys[run][1])
    lab.each(lambda run: run.results.update({f"{name}/split": split(run)}))
    fit = lambda run: Fit(*run[f"{name}/split"], start(keys[run][2]), keys[run][3])
    classifier(lab, f"{name}/classifier", problem, settings.classifier, fit)
    after: Model = lambda run: genneg.append(before(run), run[f"{name}/classifier"])

    def lesson(run: Run) -> genneg.Lesson:
        pool_key, mixture_key, distill_key = jax.random.split(keys[run][4], 3)
        teacher = after(run)
        good = genneg.accepted(problem, teacher, pool_key, *size, settings.batch, lab.mesh)
        points = genneg.mixture(good, run[drawn].negatives, settings.stored, mixture_key)
        return genneg.Lesson(teacher, Points(points), before(run).theta, distill_key)

    model = after
    if settings.mode == "distill":
        assert settings.student is not None
        distilled(lab, f"{name}/student", problem, lesson, settings.student)
        model = student(f"{name}/student")
    lab.each(lambda run: run.results.update({name: model(run)}))


def replay(run: Run, problem: OracleProblem, numbers: Sequence[int], start: Params, key: PRNGKey) -> Fit:
    """One classifier of the baseline, from the samples of all rounds."""
    ended = [
        genneg.Round(i, run[f"round-{i}"], run[f"round-{i}/classifier"], *run[f"round-{i}/split"]) for i in numbers
    ]
    train, held_out, density = genneg.replay(ended, problem)
    return Fit(train, held_out, start, key, density)


# One network in place of a stack.


def distilled(
    lab: Lab, phase: str, problem: OracleProblem, lesson: Callable[[Run], genneg.Lesson],
    settings: genneg.StudentTraining, mesh: jax.sharding.Mesh | None = None,
) -> None:  # fmt: skip
    """Distil a guided model into one network."""

    def compute(members: list[Run]) -> list[Params]:
        jobs = genneg.distill_trainings(problem, [lesson(run) for run in members], settings, lab.mesh)
        return [state.best for state in lab.trained(phase, members, jobs, mesh)]

    lab.together(phase, compute)


def refitted(
    lab: Lab, phase: str, problem: OracleProblem, points: Callable[[Run], Points], settings: genneg.StudentTraining,
    key: Key, mesh: jax.sharding.Mesh | None = None,
) -> None:  # fmt: skip
    """Train the baseline on with accepted samples."""
    job = lambda run: genneg.refit_training(problem, points(run), run["baseline"], settings, key(run))
    lab.train(phase, job, mesh=mesh)
