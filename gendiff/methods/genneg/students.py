"""One network in place of a stack of classifiers: distilled (eq. 13), or refitted on valid samples."""

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
    """The points that a student learns from."""

    x: Samples
    """(n, *shape)."""
    rows: Any = None
    """(n,), the rows of `conditions`; None without conditions."""
    conditions: Any = None
    """A pytree of arrays with one leading axis."""


class StudentTraining(NamedTuple):
    """Settings of a student's training."""

    training: training.Settings
    batch: int = 1024
    """Examples of a step, >= 1."""
    model: Model | None = None
    """(psi, x, t) -> x_0; None: the problem's model."""


class Lesson(NamedTuple):
    """The arguments of `distill` that a run has for itself."""

    teacher: Guided
    points: Points
    """Clean points, such as those of `mixture`."""
    start: Params
    """psi to begin from: theta, or the parameters of `StudentTraining.model`."""
    key: PRNGKey


def distill(
    problem: OracleProblem,
    lesson: Lesson,
    settings: StudentTraining,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
) -> Params:
    """Return psi whose denoiser matches the guided one (eq. 13): 1 network evaluation instead of 1 + 3 K.

    The teacher answers once a point.  Its answers have no Monte Carlo noise, so training may reuse them, at the same
    cost for any K.

    Args:
      mesh: the devices of the teacher.

    Raises:
      ValueError: the lesson has no points, a point is not finite, or batch < 1.
    """
    (arguments,) = distill_trainings(problem, [lesson], settings, mesh)
    return training.train(*arguments._replace(host=host)).best


def distill_trainings(
    problem: OracleProblem, lessons: Sequence[Lesson], settings: StudentTraining, mesh: jax.sharding.Mesh | None = None
) -> list[training.Training]:
    """Ask the teachers of several runs and return the trainings of `distill`; equal teachers share a program."""
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
    """Return the task of a student, of the context (examples, rows of their conditions, count, conditions).

    Batches are drawn from the first `count` examples.
    """

    def task(context: tuple) -> training.Task:
        examples, rows, count, conditions = context
        if bind is None or conditions is None:
            return training.Task(loss, lambda key: training.minibatch(key, examples, batch, count))

        def draw_batch(key: PRNGKey) -> tuple:
            chosen, chosen_rows = training.minibatch(key, (examples, rows), batch, count)
            return jax.tree.map(lambda a: a[chosen_rows], conditions), chosen

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
    """Return examples (x_t, t, guided denoiser at x_t), one an x_0.

    Times follow the problem's `classifier_time`, because the teacher differs from theta there.
    """
    process = problem.process._replace(sample_time=problem.classifier_time)

    def example(arguments: tuple[PRNGKey, Sample, Any]) -> tuple[Sample, Time, Sample]:
        key, x0, row = arguments
        condition = None if conditions is None else jax.tree.map(lambda a: a[row], conditions)
        x, t = losses.noised(process, key, x0)
        return x, t, denoise("distill: teacher", denoiser(problem, bound(problem, teacher, condition)), x, t)

    return distributed.chunked(example, (jax.random.split(key, len(x0)), x0, rows), problem.chunk, mesh)


def refit(problem: OracleProblem, points: Points, start: Params, settings: StudentTraining, key: PRNGKey) -> Params:
    """Train a denoiser on valid samples by the denoising loss, without classifiers or guidance.

    Raises:
      ValueError: there is no point, a point is not finite, or batch < 1.
    """
    return training.train(*refit_training(problem, points, start, settings, key)).best


def refit_training(
    problem: OracleProblem, points: Points, start: Params, settings: StudentTraining, key: PRNGKey
) -> training.Training:
    """Return the training of `refit`."""
    _check("refit: accepted", points.x)
    check.number("refit: batch", settings.batch, at_least=1, whole=True)
    task = student_task(denoising_loss(problem), settings.batch, problem.bind)
    # Pad, so that runs share one program although the oracle accepts different numbers of samples.
    size = training.capacity(len(points.x))
    examples, rows = jax.tree.map(lambda a: jnp.asarray(training.padded(a, size)), (points.x, points.rows))
    context = (examples, rows, jnp.int32(len(points.x)), points.conditions)
    return training.Training(key, start, task, context, settings.training)


def _check(name: str, samples: Samples) -> None:
    """Raise ValueError if there is no sample, or one is not finite, because training would fail later."""
    check.number(f"{name}: number of samples", len(samples), at_least=1, whole=True)
    check.number(name, samples)


def denoising_loss(problem: OracleProblem) -> losses.Loss:
    """Return the training loss of theta."""
    return losses.denoising(problem.process, problem.model, problem.weight)
