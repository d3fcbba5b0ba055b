"""Gen-neG: guide a diffusion model away from samples that an oracle rejects (2307.16463, Algorithm 1).

`run` is the algorithm.  With the Bayes classifier the guided model is p(x | y = 1): a data point gains exactly
-log(alpha_i) nats in round i, with alpha_i the share of good samples.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gendiff import check, training
from gendiff.checkpoint import Archive
from gendiff.methods.genneg.base import base_task
from gendiff.methods.genneg.classifiers import (
    ClassifierTraining,
    Fit,
    Round,
    calibration,
    classifier_context,
    classifier_loss,
    classifier_task,
    classifier_training,
    fit_classifier,
    fitted,
    probability,
    replay,
    split,
)
from gendiff.methods.genneg.model import (
    Guided,
    OracleProblem,
    Request,
    append,
    bound,
    denoiser,
    draw,
    draw_all,
    drawn,
    guided_share,
    logit,
    twist,
)
from gendiff.methods.genneg.samples import Synthetic, accepted, collect, collect_all, mixture, verdicts
from gendiff.methods.genneg.students import (
    Lesson,
    Points,
    StudentTraining,
    denoising_loss,
    distill,
    distill_trainings,
    refit,
    refit_training,
    student_task,
    teach,
)
from gendiff.types import Params, PRNGKey

__all__ = [
    "ClassifierTraining", "Fit", "Guided", "Lesson", "OracleProblem", "Points", "Report", "Request", "Round",
    "Rounds", "StudentTraining", "Synthetic", "accepted", "append", "base_task", "bound", "calibration",
    "classifier_context", "classifier_loss", "classifier_task", "classifier_training", "collect", "collect_all",
    "denoiser", "denoising_loss", "distill", "distill_trainings", "draw", "draw_all", "drawn", "fit_classifier",
    "fitted", "guided_share", "logit", "mixture", "probability", "refit", "refit_training", "replay", "run",
    "split", "student_task", "teach", "twist", "verdicts",
]  # fmt: skip

Report = Callable[[str, int, int, dict[str, float]], None]
"""(phase, done, of, metrics), called during a phase."""


class Rounds(NamedTuple):
    """Settings of the rounds."""

    rounds: int
    per_class: int
    """N, the samples of a class that a round wants."""
    budget: int
    """Largest number of samples that a round draws."""
    classifier: ClassifierTraining
    mode: Literal["stack", "distill"] = "stack"
    student: StudentTraining | None = None
    """Settings of a round's student, in mode "distill"."""
    stored: int = 2**18
    """Answers of the teacher that a student learns from."""
    batch: int = 16384
    """Samples drawn at a time."""


def run(
    problem: OracleProblem,
    theta: Params,
    initial_classifier: Callable[[PRNGKey], Params],
    settings: Rounds,
    key: PRNGKey,
    archive: Archive = Archive(None),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
    report: Report = lambda phase, done, of, metrics: None,
) -> Iterator[Round]:
    """Algorithm 1: yield the rounds as they end; phases that the archive holds are read::

        theta_0 <- a diffusion model of the data;  model_0 <- [theta_0; no classifiers]
        for i in rounds:
            draw from model_i, ask the oracle               `collect`         -> positives, negatives
            alpha_i <- share of positives among all draws   `Synthetic.alpha`
            phi_i <- weighted cross-entropy                 `fit_classifier`  -> C_i(x_t, t) = p(y = 1 | x_t)
            model_{i+1} <- stack:   [theta; classifiers + (phi_i)]            `append`
                           distill: [psi; no classifiers]                     `distill`

    Args:
      theta: parameters of the model that was trained on data.
      initial_classifier: key -> phi.
      mesh: the devices that sample; training uses `distributed.training_mesh`.

    Raises:
      ValueError: a setting is out of range; see also `collect`.
    """
    check.number("genneg: rounds", settings.rounds, at_least=1, whole=True)
    check.choice("genneg: mode", settings.mode, ("stack", "distill"))
    guided = Guided(theta)
    for number in range(1, settings.rounds + 1):
        keys = jax.random.split(jax.random.fold_in(key, number), 5)
        ended = one_round(problem, guided, number, initial_classifier, settings, keys, archive, mesh, report)
        guided = ended.guided
        yield ended


def one_round(
    problem: OracleProblem,
    guided: Guided,
    number: int,
    initial_classifier: Callable[[PRNGKey], Params],
    settings: Rounds,
    keys: PRNGKey,
    archive: Archive,
    mesh: jax.sharding.Mesh | None,
    report: Report,
) -> Round:
    """Draw from the current model, fit a classifier to the oracle's verdicts, and stack or distil it."""
    name, fitting = f"round-{number}", settings.classifier
    draw_key, split_key, start_key, fit_key, student_key = keys
    wanted, budget, batch = settings.per_class, settings.budget, settings.batch
    count = lambda done, of, metrics: report(f"{name} draws", done, of, metrics)

    def host(phase: str, steps: int) -> training.Host:
        note = lambda step, metrics: report(phase, step, steps, metrics)
        return training.Host(checkpoints=archive.steps(phase), report=note)

    draws = lambda: collect(problem, guided, draw_key, wanted, budget, batch, mesh=mesh, report=count)
    synthetic = archive.once(f"{name}/draws", draws, Synthetic)

    train, held_out = split(synthetic, fitting, split_key)
    fit = Fit(train, held_out, initial_classifier(start_key), fit_key)
    phi = lambda: fit_classifier(problem, fit, fitting, host(f"{name}/classifier", fitting.training.steps))
    classifier = archive.once(f"{name}/classifier", phi, like={"net": fit.start, "shift": jnp.float32(0)})

    stack = append(guided, classifier)
    if settings.mode == "stack":
        return Round(number, stack, classifier, train, held_out)
    if settings.student is None:
        raise ValueError("genneg: student must say how to train a student in mode 'distill', got None")
    pool_key, mixture_key, distill_key = jax.random.split(student_key, 3)
    student, place = settings.student, host(f"{name}/student", settings.student.training.steps)

    def teach_student() -> Params:
        good = accepted(problem, stack, pool_key, wanted, budget, batch, mesh)
        points = Points(mixture(good, synthetic.negatives, settings.stored, mixture_key))
        return distill(problem, Lesson(stack, points, guided.theta, distill_key), student, place, mesh)

    psi = archive.once(f"{name}/student", teach_student, like=guided.theta)
    return Round(number, Guided(psi), classifier, train, held_out)
