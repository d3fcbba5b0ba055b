"""Censored sampling: a frozen diffusion model and minutes of human labels (Yoon et al. 2023, 2307.02770).

    someone marks samples of the model              `mark`       -> some malign, some benign
    K sets that share the malign ones               `bootstrap`, `augmented`
    r_k(x_t, t), the probability of benign          `fit`        alpha-weighted cross-entropy, all K in one program
    p(x) prod_k r_k(x)                              `draw`       guidance, backward guidance, recurrence
    where most is malign, again and again           `imitate`    marks samples of the censored model

Labels are 1 for benign and 0 for malign throughout, and an ensemble is a sum of log-sigmoids, not a mean.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from gendiff import check, potential, programs, training
from gendiff.checkpoint import Archive
from gendiff.methods.censoring.labels import (
    Batches,
    Labelled,
    Rater,
    Sets,
    augmented,
    bootstrap,
    mark,
    mark_all,
    rotation,
    union,
)
from gendiff.methods.censoring.model import (
    Censoring,
    Diverged,
    LabelProblem,
    Request,
    clean_log_reward,
    draw,
    draw_all,
    drawn,
    evaluations,
    kernel,
    log_reward,
    total_reward,
)
from gendiff.methods.censoring.rewards import (
    RewardTraining,
    disagreement,
    fit,
    fitted,
    reject,
    reward_task,
    reward_training,
    scores,
    settled,
)
from gendiff.steps import packed, unpacked
from gendiff.types import Params, PRNGKey

__all__ = [
    "Batches", "Censoring", "Diverged", "Imitation", "LabelProblem", "Labelled", "Rater", "Request", "RewardTraining",
    "Round", "Sets", "augmented", "bootstrap", "clean_log_reward", "disagreement", "draw", "draw_all",
    "drawn", "evaluations", "fit", "fitted", "imitate", "joined", "kernel", "log_reward", "mark", "mark_all", "reject",
    "reward_task", "reward_training", "rotation", "round_keys", "round_training", "scores", "settled", "total_reward",
    "union",
]  # fmt: skip


class Imitation(NamedTuple):
    """How the rounds of imitation go."""

    steps: tuple[int, ...]
    """Training steps at which each round ends, counted over all rounds, such as (500, 1500, 3000)."""
    per_class: int
    """Labels of each class that a round adds, >= 1."""
    training: RewardTraining
    """Its steps are those of `steps`."""
    censoring: Censoring
    batch: int = 64
    """Samples drawn at a time, >= 1."""
    budget: int = 10_000
    """The most samples that a round looks at, >= 1."""
    rounds_see: bool = True
    """False marks samples of the uncensored model in every round: the same labels without imitation."""


class Round(NamedTuple):
    """The result of one round of imitation."""

    number: int
    """1, 2 .."""
    rewards: Params
    """One reward, stacked on axis 0."""
    labelled: Labelled
    """All labels so far."""


def imitate(
    problem: LabelProblem,
    theta: Params,
    new_reward: Callable[[PRNGKey], Params],
    rater: Rater,
    prepare: Callable[[Labelled, PRNGKey], Sets],
    settings: Imitation,
    key: PRNGKey,
    archive: Archive = Archive(None),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[str, int, int, dict[str, float]], None] = lambda phase, done, of, metrics: None,
    name: str = "imitation",
) -> Iterator[Round]:
    """Imitation learning: each round marks more samples, which the reward so far censors, and trains it on::

        r <- none;  labels <- {}
        for each round:
            labels <- labels + marked samples of p(x) r(x)      `mark`, `joined`
            r <- goes on training on all labels                 `round_training`, `fitted`

    Args:
      new_reward: key -> one reward's parameters.
      prepare: labels -> training set of one reward, such as augmentation.
      name: first part of the phases' names in the archive.
    """
    ends = settings.steps
    check.number("imitate: steps of the first round", ends[0] if ends else 0, at_least=1, whole=True)
    check.number("imitate: steps from round to round", np.diff(ends), at_least=1, whole=True)
    check.number("imitate: batch", settings.batch, at_least=1, whole=True)
    state: training.State | None = None
    labelled: Labelled | None = None
    for number, steps in enumerate(ends, 1):
        draw_key, prepare_key, start_key, fit_key = round_keys(key, number)
        seen_by = state.last if state is not None and settings.rounds_see else None
        sampler = partial(draw, problem, theta, seen_by, settings.censoring, n=settings.batch, mesh=mesh)
        goal = (settings.per_class, settings.per_class, settings.budget)
        look = partial(mark, sampler, rater, *goal, draw_key)
        labelled = joined(labelled, archive.once(f"{name}-{number}/labels", look, Labelled), settings.per_class)

        phase, start, sets = f"{name}-{number}/reward", new_reward(start_key), prepare(labelled, prepare_key)
        asked = round_training(problem, settings, number, sets, start if state is None else state, fit_key)
        host = training.Host(None, archive.steps(phase), partial(_report_steps, report, phase, steps))
        train = partial(_trained, problem, asked._replace(host=host), sets)
        like = jax.eval_shape(partial(_begun, asked.settings), fit_key, start)
        state = unpacked(archive.once(phase, train, like=like), potential.stacked(start), asked.settings)
        yield Round(number, state.last, labelled)


def round_keys(key: PRNGKey, number: int) -> PRNGKey:
    """The keys of round 1, 2 ..: to draw, to prepare sets, to start a reward, to fit it."""
    return jax.random.split(jax.random.fold_in(key, number), 4)


def joined(before: Labelled | None, marked: Labelled, per_class: int) -> Labelled:
    """All labels so far, with `per_class` benign ones of this round."""
    marked = marked._replace(benign=marked.benign[:per_class], seen=int(marked.seen))
    if before is None:
        return marked
    malign, benign = (np.concatenate(pair) for pair in zip(before[:2], marked[:2], strict=True))
    return Labelled(malign, benign, before.seen + marked.seen)


def round_training(
    problem: LabelProblem, settings: Imitation, number: int, sets: Sets, start: Params | training.State, key: PRNGKey
) -> training.Training:
    """The training of a round, from one new reward or from the state of the round before."""
    begin = start if isinstance(start, training.State) else potential.stacked(start)
    steps = settings.training.training._replace(steps=settings.steps[number - 1])
    return reward_training(problem, sets, begin, settings.training._replace(training=steps), key)


def _trained(problem: LabelProblem, asked: training.Training, sets: Sets) -> dict:
    return packed(fitted(problem, training.train(*asked), sets))


def _begun(settings: training.Settings, key: PRNGKey, reward: Params) -> dict:
    return packed(programs.begin(settings, key, potential.stacked(reward)))


def _report_steps(report: Callable, phase: str, steps: int, step: int, metrics: dict[str, float]) -> None:
    report(phase, step, steps, metrics)
