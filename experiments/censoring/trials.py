"""The parts of a trial of censored sampling: labels, rewards and samples, each a phase of all runs.

trial-<t>/labels                           marked samples of the model
trial-<t>/ensemble, union, universal       rewards
<row>/samples-<t>                          samples of a row, and their time
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.lab.phases import Lab, Run
from gendiff import distributed, potential, training
from gendiff.feedback import batches
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Labelled, LabelProblem, Rater, Request, RewardTraining, Sets
from gendiff.methods.censoring.labels import Pair
from gendiff.metrics.rates import Estimate
from gendiff.types import Params, PRNGKey, Sample, Samples

BASE, SECOND, LABELS, REWARDS, SAMPLES, BOOTSTRAP, ACTIVE, IMITATION, REJECTION, POOL, CLEAN = range(11)
"""Purposes of random keys."""
Censor = Callable[[Run, int], tuple[Params, Censoring]]
"""(run, trial) -> K rewards stacked on axis 0, or None, and how they guide."""


class Reward(NamedTuple):
    """A kind of reward: of noisy images, or of clean ones."""

    problem: LabelProblem
    new: Callable[[PRNGKey], Params]
    """key -> fresh parameters."""
    purpose: int = REWARDS
    """Of its random keys."""


@dataclass(frozen=True)
class Study:
    """A model of all runs, and what censors it; the options are those of `CensoringConfig`."""

    lab: Lab
    model: str
    """Phase of the model's parameters."""
    noisy: Reward
    clean: Reward
    """For universal guidance."""
    judge: Rater
    """Samples -> (n,) True where benign."""
    measure: Callable[[Samples], dict[str, Estimate]]
    """Samples of a trial -> malign_rate, precision and recall."""
    change: Callable[[PRNGKey, Sample], Sample]
    """Augmentation of a labelled image."""
    meaning: str
    """Of "malign", for a person who labels."""

    @property
    def config(self) -> Any:
        """The options that all runs share."""
        return self.lab.config


def fold(run: Run, purpose: int, trial: int) -> PRNGKey:
    """The random key of a purpose in a trial."""
    return jax.random.fold_in(run.key(purpose), trial)


def uncensored(run: Run, trial: int) -> tuple[None, Censoring]:
    """The model itself."""
    return None, Censoring()


# Labels.


def rater(study: Study, run: Run, name: str, n: int) -> Rater:
    """The oracle, or a person at a page for each batch, who marks n of each class or more."""
    if study.config.labels.rater == "oracle":
        return study.judge

    def marked(images: Samples) -> list[float]:
        try:
            return batches.marks(images, run.folder.path / "labels", name, n, n, study.meaning)
        except ValueError:  # too few labels, because a signal closed the page
            distributed.stop_if_noticed("every label")
            raise

    return lambda images: np.asarray(distributed.first(lambda: marked(images)))  # the page is one process's


def mark(
    study: Study, phase: str, name: str, n: int, key: Callable[[Run], PRNGKey], trial: int, censor: Censor = uncensored
) -> None:
    """Mark samples until there are n of each class; `name` is that of a person's pages."""
    samples, labels = study.config.samples, study.config.labels
    # The oracle sees as many at a time as are drawn for a row: one compiled program less.
    size = samples // 2 if labels.rater == "oracle" else min(labels.budget, 400)

    def compute(members: list[Run]) -> list[Labelled]:
        def drawn(places: list[int], keys: list[PRNGKey]) -> Sequence[Samples]:
            chosen = [members[place] for place in places]
            asked = [Request(run[study.model], *censor(run, trial), k) for run, k in zip(chosen, keys, strict=True)]
            return censoring.draw_all(study.noisy.problem, asked, size, study.lab.mesh)

        raters = [rater(study, run, name, n) for run in members]
        return censoring.mark_all(drawn, raters, n, n, labels.budget, [key(run) for run in members])

    study.lab.together(phase, compute, Labelled)


def pairs(study: Study, run: Run, trial: int) -> list[Pair]:
    """The labels of each member of a trial's ensemble."""
    labels, key = run[f"trial-{trial}/labels"], fold(run, BOOTSTRAP, trial)
    return censoring.bootstrap(labels, study.config.members, study.config.labels.per_class, key)


def union(study: Study, run: Run, trial: int) -> list[Pair]:
    """The labels of all members of a trial's ensemble, as one set."""
    return [censoring.union(pairs(study, run, trial))]


# Rewards.


def fit(
    study: Study,
    phase: str,
    reward: Reward,
    labels: Callable[[Run], list[Pair]],
    alpha: float,
    number: int,
    times: int = 1,
) -> None:
    """Train a reward on each pair of labels, `times` as long as an ensemble; `number` is that of their keys."""
    sets: dict[Run, Sets] = {}

    def asked(run: Run) -> training.Training:
        key, chosen = fold(run, reward.purpose, number), labels(run)
        sets[run] = augmented(study, chosen, jax.random.fold_in(key, 0))
        how = reward_training(study.config, alpha, times * study.config.reward.steps)
        return rewards_training(reward, sets[run], how, key)

    study.lab.train(phase, asked, lambda run, state: censoring.fitted(reward.problem, state, sets[run]).last)


def rewards_training(reward: Reward, sets: Sets, how: RewardTraining, key: PRNGKey) -> training.Training:
    """The training of new rewards, one on each of the sets."""
    start = potential.stacked(*(reward.new(jax.random.fold_in(key, 10 + k)) for k in range(len(sets.labels))))
    return censoring.reward_training(reward.problem, sets, start, how, jax.random.fold_in(key, 1))


def augmented(study: Study, labels: list[Pair], key: PRNGKey) -> Sets:
    """Training sets, with changed copies."""
    return censoring.augmented(labels, study.config.labels.copies, key, study.change)


def reward_training(config: Any, alpha: float, steps: int) -> RewardTraining:
    """How a reward trains for so many steps."""
    group = config.reward
    settings = group.settings(0.0, 50, 0, schedule="linear", clip=None, weight_decay=0.05)
    return RewardTraining(settings._replace(steps=steps, every=min(50, steps)), group.batch, alpha)


def fit_ensemble(study: Study, trial: int) -> None:
    """The labels of a trial, and the ensemble."""
    name, config = f"trial-{trial}", study.config
    key = lambda run: fold(run, LABELS, trial)
    mark(study, f"{name}/labels", f"{name}-labels", config.labels.per_class, key, trial)
    labels = lambda run: pairs(study, run, trial)
    fit(study, f"{name}/ensemble", study.noisy, labels, config.weights.ensemble, trial)


def fit_union(study: Study, trial: int) -> None:
    """One reward with the labels of the whole ensemble."""
    labels = lambda run: union(study, run, trial)
    fit(study, f"trial-{trial}/union", study.noisy, labels, study.config.weights.union, trial, times=3)


def fit_universal(study: Study, trial: int) -> None:
    """The ensemble of clean images, with the same labels."""
    labels = lambda run: pairs(study, run, trial)
    fit(study, f"trial-{trial}/universal", study.clean, labels, study.config.weights.ensemble, trial)


def universal_settings(study: Study, scale: float = 1.0) -> Censoring:
    """How rewards of clean images guide."""
    return Censoring(scale, recurrence=study.config.guidance.universal_recurrence, universal=True)


# Samples.


def evaluations(study: Study, settings: Censoring, members: int) -> float:
    """Evaluations of networks for a sample."""
    return censoring.evaluations(study.noisy.problem, settings, members)


def draw(study: Study, row: str, trial: int, censor: Censor) -> None:
    """Draw the samples of a trial in two halves; the time of a sample is the second's, without compilation."""
    n, phase = study.config.samples // 2, f"{row}/samples-{trial}"

    def compute(members: list[Run]) -> list[dict[str, Any]]:
        asked = [Request(run[study.model], *censor(run, trial), fold(run, SAMPLES, trial)) for run in members]
        problem = study.clean.problem if asked[0].settings.universal else study.noisy.problem
        halves, seconds = [], 0.0
        for i in range(2):
            for run in members:
                run.progress(phase, i, 2, {})
            begun = time.perf_counter()
            of_half = [request._replace(key=jax.random.fold_in(request.key, i)) for request in asked]
            halves.append(censoring.draw_all(problem, of_half, n, study.lab.mesh))
            seconds = (time.perf_counter() - begun) / n
        for run in members:
            run.progress(phase, 2, 2, {})
        return [{"samples": np.concatenate(parts), "seconds": seconds} for parts in zip(*halves, strict=True)]

    study.lab.together(phase, compute)
