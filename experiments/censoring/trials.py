"""The parts of a trial of censored sampling: labels, rewards and samples.  Every part is a phase of all runs.

trial-<t>/labels                           marked samples of the model
trial-<t>/ensemble, union, universal       rewards
<row>/samples-<t>                          samples of a row, and their time
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
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
"""(run, trial) -> (K rewards stacked on axis 0 or None, their guidance)."""


class Reward(NamedTuple):
    """A kind of reward: of noisy or of clean images."""

    problem: LabelProblem
    new: Callable[[PRNGKey], Params]
    """key -> initial parameters."""
    purpose: int = REWARDS
    """Of its random keys."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A model of all runs and its censors, with the options of `CensoringConfig`."""

    lab: Lab
    model: str
    """Phase of the model's parameters."""
    noisy: Reward
    clean: Reward
    """For universal guidance."""
    judge: Rater
    """Samples -> (n,) True if benign."""
    measure: Callable[[Samples], dict[str, Estimate]]
    """Samples of a trial -> malign_rate, precision and recall."""
    change: Callable[[PRNGKey, Sample], Sample]
    """Augmentation of a labelled image."""
    meaning: str
    """Meaning of "malign", for a person who labels."""

    @property
    def config(self) -> Any:
        """The options that all runs share."""
        return self.lab.config

    # Labels.

    def rater(self, run: Run, name: str, n: int) -> Rater:
        """Return the oracle, or a person who marks n or more samples of both classes at a page per batch."""
        if self.config.labels.rater == "oracle":
            return self.judge

        def marked(images: Samples) -> list[float]:
            try:
                return batches.marks(np.asarray(images), run.folder.path / "labels", name, n, n, self.meaning)
            except ValueError:  # too few labels, because a signal closed the page
                distributed.stop_if_noticed("every label")
                raise

        return lambda images: np.asarray(distributed.first(lambda: marked(images)))  # only one process has a page

    def mark(
        self, phase: str, name: str, n: int, key: Callable[[Run], PRNGKey], trial: int, censor: Censor | None = None
    ) -> None:
        """Mark samples of the model, or of a censored one, until both classes have n; `name` is that of the pages."""
        labels = self.config.labels
        # The oracle sees the batch of a row's samples, which saves a compiled program.
        size = self.config.samples // 2 if labels.rater == "oracle" else min(labels.budget, 400)

        def compute(members: list[Run]) -> list[Labelled]:
            def drawn(indices: list[int], keys: list[PRNGKey]) -> Sequence[Samples]:
                waiting = [members[i] for i in indices]
                requests = [self.request(run, trial, censor, k) for run, k in zip(waiting, keys, strict=True)]
                return censoring.draw_all(self.noisy.problem, requests, size, self.lab.mesh)

            raters = [self.rater(run, name, n) for run in members]
            return censoring.mark_all(drawn, raters, n, n, labels.budget, [key(run) for run in members])

        self.lab.together(phase, compute, Labelled)

    def pairs(self, run: Run, trial: int) -> list[Pair]:
        """Return the labels of the members of a trial's ensemble."""
        labels, key = run[f"trial-{trial}/labels"], fold(run, BOOTSTRAP, trial)
        return censoring.bootstrap(labels, self.config.members, self.config.labels.per_class, key)

    def augmented(self, labels: list[Pair], key: PRNGKey) -> Sets:
        """Return training sets of labels and their changed copies."""
        return censoring.augmented(labels, self.config.labels.copies, key, self.change)

    # Rewards.

    def fit(
        self, phase: str, reward: Reward, labels: Callable[[Run], list[Pair]], alpha: float, number: int, times: int = 1
    ) -> None:
        """Train a reward on every pair of labels, for `times` the steps of an ensemble; `number` selects its keys."""
        sets: dict[Run, Sets] = {}

        def job(run: Run) -> training.Training:
            key = fold(run, reward.purpose, number)
            sets[run] = self.augmented(labels(run), jax.random.fold_in(key, 0))
            settings = reward_training(self.config, alpha, times * self.config.reward.steps)
            return rewards_training(reward, sets[run], settings, key)

        self.lab.train(phase, job, lambda run, state: censoring.fitted(reward.problem, state, sets[run]).last)

    def fit_ensemble(self, trial: int) -> None:
        """Mark the labels of a trial, and fit an ensemble."""
        name, config = f"trial-{trial}", self.config
        key = lambda run: fold(run, LABELS, trial)
        self.mark(f"{name}/labels", f"{name}-labels", config.labels.per_class, key, trial)
        labels = lambda run: self.pairs(run, trial)
        self.fit(f"{name}/ensemble", self.noisy, labels, config.weights.ensemble, trial)

    def fit_union(self, trial: int) -> None:
        """Fit a single reward to the labels of all members."""
        labels = lambda run: [censoring.union(self.pairs(run, trial))]
        self.fit(f"trial-{trial}/union", self.noisy, labels, self.config.weights.union, trial, times=3)

    def fit_universal(self, trial: int) -> None:
        """Fit an ensemble of clean images to the same labels."""
        labels = lambda run: self.pairs(run, trial)
        self.fit(f"trial-{trial}/universal", self.clean, labels, self.config.weights.ensemble, trial)

    def universal(self, scale: float = 1.0) -> Censoring:
        """Return the guidance by rewards of clean images."""
        return Censoring(scale, recurrence=self.config.guidance.universal_recurrence, universal=True)

    # Samples.

    def request(self, run: Run, trial: int, censor: Censor | None, key: PRNGKey) -> Request:
        """Return the request for samples of a trial; without a censor, of the model itself."""
        rewards, settings = (censor or uncensored)(run, trial)
        return Request(run[self.model], rewards, settings, key)

    def cost(self, settings: Censoring, members: int) -> float:
        """Count the network evaluations of a sample."""
        return censoring.evaluations(self.noisy.problem, settings, members)

    def draw(self, row: str, trial: int, censor: Censor) -> None:
        """Draw the samples of a trial in two halves, and time the second one, which compiles nothing."""
        n, phase = self.config.samples // 2, f"{row}/samples-{trial}"

        def compute(members: list[Run]) -> list[dict[str, Any]]:
            requests = [self.request(run, trial, censor, fold(run, SAMPLES, trial)) for run in members]
            problem = self.clean.problem if requests[0].settings.universal else self.noisy.problem
            halves, seconds = [], 0.0
            for i in range(2):
                for run in members:
                    run.progress(phase, i, 2, {})
                begun = time.perf_counter()
                half = [request._replace(key=jax.random.fold_in(request.key, i)) for request in requests]
                halves.append(censoring.draw_all(problem, half, n, self.lab.mesh))
                seconds = (time.perf_counter() - begun) / n
            for run in members:
                run.progress(phase, 2, 2, {})
            return [{"samples": np.concatenate(parts), "seconds": seconds} for parts in zip(*halves, strict=True)]

        self.lab.together(phase, compute)


def fold(run: Run, purpose: int, trial: int) -> PRNGKey:
    """Return the random key of a purpose in a trial."""
    return jax.random.fold_in(run.key(purpose), trial)


def uncensored(run: Run, trial: int) -> tuple[None, Censoring]:
    """Censor nothing."""
    return None, Censoring()


def rewards_training(reward: Reward, sets: Sets, settings: RewardTraining, key: PRNGKey) -> training.Training:
    """Return the training of new rewards, one per training set."""
    start = potential.stacked(*(reward.new(jax.random.fold_in(key, 10 + k)) for k in range(len(sets.labels))))
    return censoring.reward_training(reward.problem, sets, start, settings, jax.random.fold_in(key, 1))


def reward_training(config: Any, alpha: float, steps: int) -> RewardTraining:
    """Return the settings of a reward's training."""
    group = dataclasses.replace(config.reward, steps=steps)
    settings = group.settings(0.0, 50, 0, schedule="linear", clip=None, weight_decay=0.05)
    return RewardTraining(settings, group.batch, alpha)
