"""Censored sampling: a frozen diffusion model and minutes of human labels (Yoon et al. 2023, 2307.02770).

    a person or an oracle marks samples      `mark`       -> malign and benign samples
    K sets that share the malign samples     `bootstrap`, `augmented`
    r_k(x_t, t), the probability of benign   `fit`        alpha-weighted cross-entropy, all K in one program
    p(x) prod_k r_k(x)                       `draw`       guidance, backward guidance, recurrence
    rounds, if most samples are malign       `imitate`    marks samples of the censored model

Labels are 1 for benign and 0 for malign.  An ensemble sums its log-sigmoids; it does not average them.
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
    """Settings of the rounds of imitation."""

    steps: tuple[int, ...]
    """Training steps at the end of every round, counted over all rounds, such as (500, 1500, 3000)."""
    per_class: int
    """Labels per class that a round adds, >= 1."""
    training: RewardTraining
    """`steps` replaces its steps."""
    censoring: Censoring
    batch: int = 64
    """Samples drawn at a time, >= 1."""
    budget: int = 10_000
    """The most samples that a round looks at, >= 1."""
    rounds_see: bool = True
    """Mark samples of the censored model; False marks the uncensored model's in every round, for comparison."""


class Round(NamedTuple):
    """The result of one round of imitation."""

    number: int
    """1, 2 .."""
    rewards: Params
    """Parameters of the reward, stacked on axis 0."""
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
    name: str = "imitation",
) -> Iterator[Round]:
    """Mark samples of the censored model round by round, and train its reward on all labels so far (imitation)::

        r <- none;  labels <- {}
        for every round:
            labels <- labels + marked samples of p(x) r(x)      `mark`, `joined`
            r <- r, trained on with all labels                  `round_training`, `fitted`

    Args:
      new_reward: key -> parameters of a reward.
      prepare: (labels, key) -> training set of a reward, such as augmentation.
      name: first part of the phases' names in the archive.

    Raises:
      ValueError: steps do not rise from >= 1, batch < 1, or `mark` or `fit` refuses an argument.
    """
    ends = settings.steps
    check.number("imitate: steps of the first round", ends[0] if ends else 0, at_least=1, whole=True)
    check.number("imitate: steps from round to round", np.diff(ends), at_least=1, whole=True)
    check.number("imitate: batch", settings.batch, at_least=1, whole=True)
    state: training.State | None = None
    labelled: Labelled | None = None
    for number in range(1, len(ends) + 1):
        draw_key, prepare_key, start_key, fit_key = round_keys(key, number)
        seen_by = state.last if state is not None and settings.rounds_see else None
        sampler = partial(draw, problem, theta, seen_by, settings.censoring, n=settings.batch, mesh=mesh)
        label = partial(mark, sampler, rater, settings.per_class, settings.per_class, settings.budget, draw_key)
        labelled = joined(labelled, archive.once(f"{name}-{number}/labels", label, Labelled), settings.per_class)

        phase, start, sets = f"{name}-{number}/reward", new_reward(start_key), prepare(labelled, prepare_key)
        job = round_training(problem, settings, number, sets, start if state is None else state, fit_key)
        job = job._replace(host=training.Host(checkpoints=archive.steps(phase)))
        train = lambda job=job, sets=sets: packed(fitted(problem, training.train(*job), sets))
        fresh = lambda key, start, settings=job.settings: packed(programs.begin(settings, key, start))
        like = jax.eval_shape(fresh, fit_key, potential.stacked(start))
        state = unpacked(archive.once(phase, train, like=like), potential.stacked(start), job.settings)
        yield Round(number, state.last, labelled)


def round_keys(key: PRNGKey, number: int) -> PRNGKey:
    """Return the four keys of round 1, 2 ..: to draw samples, prepare sets, initialise a reward and fit it."""
    return jax.random.split(jax.random.fold_in(key, number), 4)


def joined(before: Labelled | None, marked: Labelled, per_class: int) -> Labelled:
    """Join all labels so far with a round's, of which `per_class` benign samples count."""
    marked = marked._replace(benign=marked.benign[:per_class], seen=int(marked.seen))
    if before is None:
        return marked
    malign, benign = (np.concatenate(pair) for pair in zip(before[:2], marked[:2], strict=True))
    return Labelled(malign, benign, before.seen + marked.seen)


def round_training(
    problem: LabelProblem, settings: Imitation, number: int, sets: Sets, start: Params | training.State, key: PRNGKey
) -> training.Training:
    """Return the training of a round, from a new reward or from the state of the previous round."""
    begin = start if isinstance(start, training.State) else potential.stacked(start)
    steps = settings.training.training._replace(steps=settings.steps[number - 1])
    return reward_training(problem, sets, begin, settings.training._replace(training=steps), key)
