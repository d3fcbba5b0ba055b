"""The rows of censored sampling (2307.02770): what its tables compare, for any model of images and any judge.

A `Study` asks the lab for the phases of all runs and trials.  An experiment chooses the models, rewards and judge:

    trial-<t>/labels      marked samples of the model           trial-<t>/ensemble, union, universal   rewards
    <row>/samples-<t>     samples of a row, with their time     scale, universal-scale                 omega
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from experiments.lab import figures
from experiments.lab.phases import Lab, Run
from experiments.lab.table import Row
from gendiff import distributed, potential
from gendiff.feedback import batches
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Imitation, Labelled, LabelProblem, Request, RewardTraining
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.steps import packed, unpacked
from gendiff.types import Params, PRNGKey, Sample, Samples

BASE, SECOND, LABELS, REWARDS, SAMPLES, BOOTSTRAP, ACTIVE, IMITATION, REJECTION, POOL, CLEAN = range(11)
"""Purposes of random keys."""
TUNING = 1_000_000
"""Number of the trial that chooses scales."""
Measured = dict[str, Estimate]
Rewards = Callable[[Run, int], Params]
"""(run, trial) -> rewards stacked on axis 0, or None."""
Settings = Callable[[Run], Censoring]


def fold(run: Run, purpose: int, trial: int) -> PRNGKey:
    """The random key of a purpose in a trial."""
    return jax.random.fold_in(run.key(purpose), trial)


def none(run: Run, trial: int) -> None:
    """No rewards."""


def rewards_of(kind: str) -> Rewards:
    """The rewards of a kind: ensemble, union, universal."""
    return lambda run, trial: run[f"trial-{trial}/{kind}"]


def plain(run: Run) -> Censoring:
    """Settings where no scale matters."""
    return Censoring()


class Reward(NamedTuple):
    """Rewards of one kind, time-dependent or of clean images."""

    problem: LabelProblem
    new: Callable[[PRNGKey], Params]
    """key -> parameters of one reward."""
    purpose: int = REWARDS
    """Of its random keys."""


@dataclass(frozen=True)
class Study:
    """A model of all runs, and what censors it.  The options are those of `CensoringConfig`."""

    lab: Lab
    model: str
    """Phase of the model's parameters."""
    noisy: Reward
    """The rewards of noisy images."""
    clean: Reward
    """The rewards of clean images, for universal guidance."""
    judge: Callable[[Samples], np.ndarray]
    """Samples -> (n,) True where benign: the oracle of labels."""
    measure: Callable[[Samples], Measured]
    """Samples of a trial -> malign_rate, precision and recall."""
    change: Callable[[PRNGKey, Sample], Sample]
    """Augmentation of labelled images."""
    meaning: str
    """Of malign, for a person who labels."""

    @property
    def config(self) -> Any:
        """The options of all runs, but for those that differ between them."""
        return self.lab.config

    # Labels and rewards.

    def rater(self, run: Run, name: str) -> censoring.Rater:
        """The oracle, or a person at a page for each batch, who may leave samples out."""
        if self.config.labels.rater == "oracle":
            return self.judge
        n = self.config.labels.per_class

        def marked(images: Samples) -> list[float]:
            try:
                return batches.marks(images, run.folder.path / "labels", name, n, n, self.meaning)
            except ValueError:  # too few labels, because a signal closed the page
                distributed.stop_if_noticed("every label")
                raise

        return lambda images: np.asarray(distributed.first(lambda: marked(images)))  # the page is one process's

    def mark(self, phase: str, name: str, n: int, key: Callable[[Run], Array], ask: Callable[[Run], Any]) -> None:
        """Mark samples until there are n of each class; `ask` gives (rewards, settings) of their sampler."""
        config = self.config
        # As many at a time as are drawn for a row: one compiled program less.
        size = config.samples // 2 if config.labels.rater == "oracle" else min(config.labels.budget, 400)

        def compute(members: list[Run]) -> list[Labelled]:
            def drawn(places: list[int], keys: list[Array]) -> Sequence[Samples]:
                asked = [Request(run[self.model], *ask(run), k) for run, k in zip(_at(members, places), keys, strict=True)]
                return censoring.draw_all(self.noisy.problem, asked, size, self.lab.mesh)

            raters = [self.rater(run, name) for run in members]
            return censoring.mark_all(drawn, raters, n, n, config.labels.budget, [key(run) for run in members])

        self.lab.together(phase, compute, Labelled)

    def pairs(self, run: Run, trial: int) -> list[tuple[Samples, Samples]]:
        """The labels of each member of a trial's ensemble."""
        marked, key = run[f"trial-{trial}/labels"], fold(run, BOOTSTRAP, trial)
        return censoring.bootstrap(marked, self.config.members, self.config.labels.per_class, key)

    def union(self, run: Run, trial: int) -> list[tuple[Samples, Samples]]:
        """The labels of all members as one set."""
        return [censoring.union(self.pairs(run, trial))]

    def ensemble(self, trial: int) -> None:
        """The labels and the ensemble of a trial."""
        name = f"trial-{trial}"
        self.mark(f"{name}/labels", f"{name}-labels", self.config.labels.per_class,
                  lambda run: fold(run, LABELS, trial), lambda run: (None, Censoring()))  # fmt: skip
        self.fit(f"{name}/ensemble", self.noisy, lambda run: self.pairs(run, trial), self.config.weights.ensemble, trial)

    def universal(self, trial: int) -> None:
        """The ensemble of a trial that sees clean images, with the same labels."""
        pairs = lambda run: self.pairs(run, trial)
        self.fit(f"trial-{trial}/universal", self.clean, pairs, self.config.weights.ensemble, trial)

    def fit(self, phase: str, reward: Reward, pairs: Callable[[Run], list], alpha: float, number: int, times: int = 1) -> None:
        """Train a reward on each pair, `times` as long as one of an ensemble; `number` is that of their keys."""
        sets: dict[Run, censoring.Sets] = {}

        def asked(run: Run) -> Any:
            chosen, key = pairs(run), fold(run, reward.purpose, number)
            sets[run] = self.augmented(chosen, jax.random.fold_in(key, 0))
            start = potential.stacked(*(reward.new(jax.random.fold_in(key, 10 + k)) for k in range(len(chosen))))
            how = self.how(alpha, times * self.config.reward.steps)
            return censoring.reward_training(reward.problem, sets[run], start, how, jax.random.fold_in(key, 1))

        self.lab.train(phase, asked, lambda run, state: censoring.fitted(reward.problem, state, sets[run]).last)

    def augmented(self, pairs: list, key: Array) -> censoring.Sets:
        """Training sets of rewards, with changed copies."""
        return censoring.augmented(pairs, self.config.labels.copies, key, self.change)

    def how(self, alpha: float, steps: int) -> RewardTraining:
        """How a reward is trained."""
        given = self.config.reward
        settings = given.settings(0.0, 50, 0, schedule="linear", clip=None, weight_decay=0.05)
        settings = settings._replace(steps=steps, every=min(50, steps))
        return RewardTraining(settings, given.batch, alpha)
