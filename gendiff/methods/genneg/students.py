"""One network in place of a stack of classifiers: distilled (eq. 13), or refitted on samples that are good."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gendiff import check, distributed, losses, runs, training
from gendiff.denoiser import Model, denoise
from gendiff.methods.genneg.model import Guided, OracleProblem, bound, denoiser
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Sample, Samples, Time


class Points(NamedTuple):
    """Points that a student learns from, with their conditions if samples have such."""

    x: Samples
    """(n, *shape)."""
    rows: Any = None
    """(n,) rows of `conditions`."""
    conditions: Any = None
    """A pytree of arrays with one leading axis."""


class StudentTraining(NamedTuple):
    """How a student is trained."""

    training: training.Settings
    batch: int = 1024
    """Examples a step, >= 1."""
    model: Model | None = None
    """(psi, x, t) -> x_0; None: the problem's own."""


def distill(
    problem: OracleProblem,
    teacher: Guided,
    points: Points,
    start: Params,
    settings: StudentTraining,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
) -> Params:
    """psi whose denoiser matches the guided one (eq. 13), so that one network evaluation replaces 1 + 3 K.

    Args:
      points: what is noised (see `mixture`).  The teacher is asked once about each point: its answers have no Monte
        Carlo noise, so they bear being used again, and training costs the same for any number of classifiers.
      start: psi to begin from: theta, or the parameters of a new network with its `settings.model`.
      mesh: the devices that ask the teacher.

    Raises:
      ValueError: a point is missing or not finite, or batch < 1.
    """
    asked = distill_trainings(problem, [Lesson(teacher, points, start, key)], settings, mesh)[0]
    return training.train(*asked._replace(host=host)).best


class Lesson(NamedTuple):
    """The arguments of `distill` that each run has for itself."""

    teacher: Guided
    points: Points
    start: Params
    key: PRNGKey


def distill_trainings(
    problem: OracleProblem, lessons: Sequence[Lesson], settings: StudentTraining, mesh: jax.sharding.Mesh | None = None
) -> list[training.Training]:
    """Ask the teachers of several runs, those that agree in one program, and return the trainings of `distill`."""
    check.number("distill: batch", settings.batch, at_least=1, whole=True)
    for lesson in lessons:
        _check("distill: x0", lesson.points.x)
    questions = [
        (teacher, jnp.asarray(points.x), jax.random.fold_in(key, 1), points.conditions, points.rows)
        for teacher, points, _, key in lessons
    ]
    model = problem.model if settings.model is None else settings.model
    task = student_task(losses.regression(model, problem.weight), settings.batch, problem.bind)
    trainings = []
    for (_, points, start, key), answers in zip(lessons, runs.call(teach, (problem,), mesh, questions), strict=True):
        context = (answers, points.rows, jnp.int32(len(points.x)), points.conditions)
        trainings.append(training.Training(jax.random.fold_in(key, 2), start, task, context, settings.training))
    return trainings


@by_value
def student_task(loss: losses.Loss, batch: int, bind: losses.Bind | None) -> Callable[[tuple], training.Task]:
    """Batches of examples with their conditions, if any.

    The context is (examples, rows of their conditions, count, conditions); only the first `count` examples count.
    """

    def task(context: tuple) -> training.Task:
        examples, rows, count, conditions = context
        if bind is None or conditions is None:
            return training.Task(loss, lambda key: training.minibatch(key, examples, batch, count))

        def draw_batch(key: PRNGKey) -> tuple:
            chosen, which = training.minibatch(key, (examples, rows), batch, count)
            return jax.tree.map(lambda a: a[which], conditions), chosen

        return training.Task(losses.conditional(loss, bind), draw_batch)

    return task


@partial(jax.jit, static_argnums=(0, 1))
def teach(
    problem: OracleProblem,
    mesh: Any,
    teacher: Guided,
    x0: Samples,
    key: PRNGKey,
    conditions: Any = None,
    rows: Any = None,
) -> tuple[Samples, Array, Samples]:
    """An example (x_t, t, guided denoiser at x_t) for each x_0.

    At the problem's `classifier_time`, not the denoiser's: that is where the teacher differs from theta.
    """
    process = problem.process._replace(sample_time=problem.classifier_time)

    def example(given: tuple[PRNGKey, Sample, Any]) -> tuple[Sample, Time, Sample]:
        key, x0, row = given
        condition = None if conditions is None else jax.tree.map(lambda a: a[row], conditions)
        x, t = losses.noised(process, key, x0)
        return x, t, denoise("distill: teacher", denoiser(problem, bound(problem, teacher, condition)), x, t)

    return distributed.chunked(example, (jax.random.split(key, len(x0)), x0, rows), problem.chunk, mesh)


def refit(
    problem: OracleProblem,
    points: Points,
    start: Params,
    settings: StudentTraining,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
) -> Params:
    """Rejection, then refit: the denoising loss on samples that the oracle accepts.  No classifier, no guidance.

    Raises:
      ValueError: a point is missing or not finite, or batch < 1.
    """
    return training.train(*refit_training(problem, points, start, settings, key)._replace(host=host)).best


def refit_training(
    problem: OracleProblem, points: Points, start: Params, settings: StudentTraining, key: PRNGKey
) -> training.Training:
    """The training of `refit`."""
    _check("refit: accepted", points.x)
    check.number("refit: batch", settings.batch, at_least=1, whole=True)
    task = student_task(denoising_loss(problem), settings.batch, problem.bind)
    # Padded, because the oracle accepts another number in every run: all share one program.
    size = training.capacity(len(points.x))
    examples, rows = jax.tree.map(lambda a: jnp.asarray(training.padded(a, size)), (points.x, points.rows))
    context = (examples, rows, jnp.int32(len(points.x)), points.conditions)
    return training.Training(key, start, task, context, settings.training)


def _check(name: str, samples: Samples) -> None:
    """Raises ValueError where a set of samples is empty, or not finite: training would fail later, or on some seeds."""
    check.number(f"{name}: number of samples", len(samples), at_least=1, whole=True)
    check.number(name, samples)


def denoising_loss(problem: OracleProblem) -> losses.Loss:
    """The loss that theta was trained with."""
    return losses.denoising(problem.process, problem.model, problem.weight)
