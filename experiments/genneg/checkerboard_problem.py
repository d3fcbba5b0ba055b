"""Gen-neG on a checkerboard (2307.16463, section 6.1, Figures 2 and 3).

A diffusion model learns 1,000 points of a checkerboard.  An oracle says which of its samples miss the filled cells, and
rounds of classifiers steer it away from them.  One run prints every row beside the paper's numbers.  This file has the
options, networks and trainings; `checkerboard` has the rows.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.genneg import programs as plan
from experiments.genneg.measures import Smc
from experiments.genneg.rows import Draws
from experiments.lab.config import Between, Config, ConfigError, SameProgram, Training, Validated, replaced
from experiments.lab.phases import Run
from experiments.lab.programs import KEY, Program, abstract, planned, trained
from gendiff import denoiser, guidance, likelihood, losses, nets, potential, process, sampling, static, training
from gendiff.data import checkerboard as data
from gendiff.methods import genneg
from gendiff.nets.mlp import MLPClassifier, ResidualMLP
from gendiff.oracles import checkerboard as oracle
from gendiff.static import by_value
from gendiff.types import Params

DATA_STD = 0.5
"""EDM's sigma_data; a board of half-width 1 has a standard deviation of 0.577."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A residual network of points."""

    width: Annotated[int, Between(8, 4096)] = 128
    """Width."""
    depth: Annotated[int, Between(1, 64)] = 3
    """Residual blocks."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """The oracle as guidance at low noise."""

    draws: Annotated[int, Between(4, 1_000_000)] = 64
    """Draws of x_0 that the oracle judges, for each sample and evaluation; a multiple of 4."""
    wide: Annotated[float, Between(1.0, 100.0)] = 3.0
    """Standard deviation of half of the draws, in units of x_0's."""
    below: Annotated[float, Between(0.0, 80.0)] = 0.1
    """Noise level below which the oracle guides."""

    def __post_init__(self) -> None:
        if self.draws % 4:
            raise ConfigError(f"--judged.draws must be a multiple of 4, got {self.draws}")


@dataclasses.dataclass(frozen=True)
class CheckerboardConfig(Config):
    """The board, the model, the rounds and the evaluation."""

    cells: Annotated[int, Between(2, 32)] = 4
    """Cells along a side of the board."""
    half_width: Annotated[float, Between(0.1, 10.0)] = 1.0
    """Half of the board's side, in data units."""
    points: Annotated[int, Between(10, 10_000_000)] = 1000
    """Training points."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 1235
    """Seed of the training, held-out and test points: one data set for all runs."""
    rounds: Annotated[int, Between(1, 20)] = 3
    """Rounds of Gen-neG."""
    mode: Literal["stack", "distill"] = "stack"
    """Add a round's classifier to the stack, or distil it into the model at once."""
    seeds: Annotated[int, Between(1, 100)] = 1
    """Independent runs, side by side; for several runs, intervals are over them (Student)."""

    network: Network = Network()
    """The denoiser's."""
    baseline: Validated = Validated(6000, batch=1000, patience=2000)
    """Of the baseline, until the held-out ELBO does not improve."""
    draws: Draws = Draws()
    """Of a round."""
    classifier_network: Network = Network(64, 2)
    """A classifier's."""
    classifier: Validated = Validated(8000, batch=512, rate=5e-3)
    """Of a classifier; half of a batch are positives."""
    weighting: Literal["importance", "shift"] = "importance"
    """The paper's importance weights, or an unweighted loss with the prior's log-odds added to the logit."""
    select: Literal["all", "balanced"] = "all"
    """Train on all draws, each class half of the batch, or on equally many of both (the paper)."""
    student: Training = Training(5000, batch=1000)
    """Of a distilled or refitted model."""
    stored: Annotated[int, Between(1, 1_000_000_000)] = 2**18
    """Answers of the teacher from which a student learns."""

    guidance_scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 1.0
    """Factor on the classifiers' guidance in evaluations; models that others learn from, and `smc`, have 1."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = 18
    """Heun steps, for synthetic data and evaluation alike."""
    smc: Smc = Smc(100)
    """Of the row `smc`."""
    judged: Judged = Judged()
    """The row `accepted`."""
    samples: Annotated[int, Between(100, 1_000_000_000)] = 100_000
    """Samples of a model for its infraction rate."""
    elbo_points: Annotated[int, Between(10, 100_000_000)] = 50_000
    """Fresh points of the board that the ELBO is averaged over."""
    elbo_levels: Annotated[int, Between(1, 10_000)] = 32
    """Stratified noise levels of a point."""

    @property
    def batch(self) -> int:
        """Samples drawn at a time."""
        return min(self.draws.batch, self.samples)


PRESETS = {
    "smoke": CheckerboardConfig(
        preset="smoke", rounds=1, network=Network(32, 1), classifier_network=Network(32, 1),
        baseline=Validated(300, batch=1000, patience=300), draws=Draws(500, 8000),
        classifier=Validated(150, batch=256, rate=5e-3), student=Training(150, batch=1000), stored=4096,
        sampler_steps=8, smc=Smc(12, 128, 4), judged=Judged(16), samples=4000, elbo_points=500, elbo_levels=8,
    ),
    "default": CheckerboardConfig(),
    "paper": CheckerboardConfig(
        preset="paper", rounds=5, seeds=5, baseline=Validated(20_000, batch=1000, patience=5000),
        draws=Draws(50_000, 5_000_000), classifier=Validated(20_000, batch=2048, rate=5e-3),
        student=Training(20_000, batch=1000), stored=2**22, samples=1_000_000, elbo_levels=128,
        smc=Smc(256, 4096, 64),
    ),
}  # fmt: skip


class Purpose:
    """Of random keys."""

    DATA, HELD_OUT, TEST, START, BASELINE, ROUNDS, SAMPLES, ELBO, STUDENT, REFIT, REPLAY, SMC, CALIBRATION = range(13)


def board(config: CheckerboardConfig, purpose: int, n: int) -> Array:
    """n points of the board, (n, 2)."""
    key = jax.random.fold_in(jax.random.key(config.data_seed), purpose)
    return data.draw(key, n, config.cells, config.half_width)


# The model, its networks and its oracle.


def denoiser_network(config: CheckerboardConfig) -> ResidualMLP:
    """EDM's F, for the baseline and every refitted model."""
    return ResidualMLP(2, config.network.width, config.network.depth, data_std=DATA_STD)


def student_network(config: CheckerboardConfig) -> ResidualMLP:
    """EDM's F of a distilled model: as large as the baseline's, with the sharper features of the classifiers.

    With them the baseline would overfit its 1,000 points; a student may ask its teacher for any number of answers.
    """
    return ResidualMLP(2, config.network.width, config.network.depth, fourier=64, high=24.0, data_std=DATA_STD)


def classifier_network(config: CheckerboardConfig) -> MLPClassifier:
    return MLPClassifier(config.classifier_network.width, config.classifier_network.depth, data_std=DATA_STD)


def initialised(network: Any, key: Array) -> Params:
    """Fresh parameters of a network of points."""
    return nets.fresh(network, key, jnp.zeros(2), jnp.zeros(()))


def problem(config: CheckerboardConfig, student: bool = False) -> genneg.OracleProblem:
    """EDM in two dimensions, with its networks, sampler and oracle; the network is the baseline's or a student's."""
    network = student_network(config) if student else denoiser_network(config)
    return genneg.OracleProblem(
        process=process.edm(),
        model=denoiser.from_edm(network.apply, DATA_STD),
        network=potential.from_edm(process.edm(), classifier_network(config).apply, DATA_STD),
        oracle=oracle.checkerboard(config.cells, config.half_width),
        shape=(2,),
        kernel=sampling.heun,
        steps=config.sampler_steps,
        weight=losses.edm_weight(DATA_STD),
        classifier_time=process.classifier_time(),
    )


def judged_times(config: CheckerboardConfig) -> potential.Interval:
    """The times at which the oracle guides."""
    return potential.clear(process.edm(), (1 + config.judged.below**2) ** -0.5)


def judged_problem(config: CheckerboardConfig) -> genneg.OracleProblem:
    """The problem with the oracle as guidance in the last steps."""
    setup = problem(config)
    draws = guidance.normal_draws(config.judged.draws, setup.shape, config.judged.wide)
    last_steps = static.partial(guidance.accepted, setup.process, setup.oracle, draws, judged_times(config))
    return setup._replace(last_steps=last_steps)


# Trainings.


def base_task(config: CheckerboardConfig) -> Callable[[tuple[Array, Array, Array]], training.Task]:
    """The task of a configuration's baseline."""
    return points_task(problem(config), min(32, config.elbo_levels), config.baseline.batch)


@by_value
def points_task(
    setup: genneg.OracleProblem, levels: int, batch: int
) -> Callable[[tuple[Array, Array, Array]], training.Task]:
    """Denoising of points; the context is the points, held-out points, and the keys of their noise."""
    loss = losses.denoising(setup.process, setup.model, setup.weight)

    def task(context: tuple[Array, Array, Array]) -> training.Task:
        points, held_out, keys = context

        def draw(key: Array) -> Array:
            return points if len(points) <= batch else training.minibatch(key, points, batch)

        def validate(theta: Params) -> Array:
            bound = lambda key, x: likelihood.elbo(partial(setup.model, theta), key, x, levels)
            return -jnp.mean(jax.vmap(bound)(keys, held_out))

        return training.Task(loss, draw, validate)

    return task


def base_training(run: Run) -> training.Training:
    """The training of theta: denoising score matching, stopped by the held-out ELBO."""
    config = run.config
    held_out = min(4000, config.elbo_points)
    keys = jax.random.split(run.key(Purpose.ELBO), held_out)
    context = (board(config, Purpose.DATA, config.points), board(config, Purpose.HELD_OUT, held_out), keys)
    start = initialised(denoiser_network(config), run.key(Purpose.START))
    settings = config.baseline.settings(0.998, 500, 0, schedule="constant")
    return training.Training(run.key(Purpose.BASELINE), start, base_task(config), context, settings)


def classifier_training(config: CheckerboardConfig) -> genneg.ClassifierTraining:
    settings = config.classifier.settings(0.998, 500, 200)
    return genneg.ClassifierTraining(settings, config.classifier.batch // 2, config.weighting, config.select)


def student_training(config: CheckerboardConfig) -> genneg.StudentTraining:
    return genneg.StudentTraining(config.student.settings(0.998, 500, 200), config.student.batch)


def programs(config: CheckerboardConfig) -> dict[str, Program]:
    """The programs that take most of the time."""
    setup, new = problem(config), partial(initialised, classifier_network(config))

    def baseline(batch: int) -> training.Training:
        # A step takes all points: another batch is another number of points.
        sized = replaced(config, {"points": batch, "baseline.batch": batch})
        return abstract(lambda: base_training(planned(sized)))

    samples = np.zeros((config.draws.budget // 5, 2), np.float32)
    theta, phi = baseline(config.points).params, jax.eval_shape(new, KEY)
    guided = plan.stack(theta, phi, config.rounds)
    return {
        "base": trained("baseline", "points", config.points, baseline, pool=True),
        "classifier": plan.classifier("a classifier", "points", setup, classifier_training(config), new, samples),
        "sampler": plan.guided(f"Heun, guided by {config.rounds} classifiers", setup, config.batch, guided),
    }
