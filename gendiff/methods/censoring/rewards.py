"""The rewards of censored sampling: their training, and their values of clean samples."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gendiff import check, distributed, losses, potential, training
from gendiff.methods.censoring.labels import Sets
from gendiff.methods.censoring.model import LabelProblem, clean_log_reward
from gendiff.static import by_value
from gendiff.types import BATCH, Params, PRNGKey, Samples, Scalar


class RewardTraining(NamedTuple):
    """Settings of the rewards' training."""

    training: training.Settings
    """A reward that goes on training counts the steps of all rounds so far."""
    batch: int = 128
    benign_weight: float = 0.02
    """alpha, the weight of the benign term, >= 0: below 1, doubtful samples count as malign."""


def fit(
    problem: LabelProblem, sets: Sets, start: Params | training.State, settings: RewardTraining, key: PRNGKey
) -> training.State:
    """Train K rewards at once; `state.last` are K parameter trees stacked on axis 0.

    Args:
      start: K stacked trees, or the state of an earlier fit to continue, with its moments and its step.

    Raises:
      ValueError: a setting or a pixel is out of range, or a reward lacks labels of a class.
    """
    return fitted(problem, training.train(*reward_training(problem, sets, start, settings, key)), sets)


def reward_training(
    problem: LabelProblem, sets: Sets, start: Params | training.State, settings: RewardTraining, key: PRNGKey
) -> training.Training:
    """Return the training of `fit`, with its arguments and errors; set its host, and pass its state to `fitted`."""
    check.number("censoring: batch", settings.batch, at_least=1, whole=True)
    check.number("censoring: benign_weight", settings.benign_weight, at_least=0)
    check.shape("censoring: labels", sets.labels, np.shape(sets.images)[:2])
    check_range(problem, "images", sets.images)
    for name, label in (("malign", 0), ("benign", 1)):
        labels = np.sum(sets.labels == label, axis=1)
        check.number(f"censoring: number of {name} labels of a reward", labels, at_least=1, whole=True)
    # Pad, so that sets of other sizes share the compiled program.
    n = sets.labels.shape[1]
    pad = lambda a: np.pad(a, [(0, 0), (0, training.capacity(n, 1024) - n)] + [(0, 0)] * (a.ndim - 2))
    context = (*(jnp.asarray(pad(a), jnp.float32) for a in sets), jnp.int32(n), jnp.float32(settings.benign_weight))
    return training.Training(key, start, reward_task(problem, settings.batch), context, settings.training)


def fitted(problem: LabelProblem, state: training.State, sets: Sets) -> training.State:
    """Put the moments of the training sets into the state of a finished training.

    Rewards of clean samples with batch normalisation train with the moments of the batch, and get the exact moments of
    their training sets in the end.  The reference takes running averages of momentum 0.1, which lag behind the
    parameters and depend on the last batches.
    """
    return state if problem.in_batch is None else state._replace(last=settled(problem, state.last, sets.images))


@partial(jax.jit, static_argnums=0)
def settled(problem: LabelProblem, rewards: Params, images: Float[Array, "K n *shape"]) -> Params:
    """Return K stacked rewards with the moments of their own clean images, all in one batch."""
    assert problem.in_batch is not None
    of_batch = jax.vmap(problem.in_batch, (None, 0), (0, None), axis_name=BATCH)
    return potential.over_members(lambda member: of_batch(*member)[1], (rewards, jnp.asarray(images, jnp.float32)))


@by_value
def reward_task(problem: LabelProblem, batch: int) -> Callable[[tuple], training.Task]:
    """Minimise the cross-entropy -alpha y log r - (1 - y) log (1 - r) of all members, at uniform times or at t = 0."""
    process, logit, in_batch = problem.process, problem.network, problem.in_batch
    if in_batch is not None:
        process = process._replace(sample_time=lambda key: jnp.zeros((), int))  # t = 0 is data
        logit = lambda phi, x, t: in_batch(phi, x)[0]
    loss = losses.Ensemble(losses.cross_entropy(process, logit))

    def task(context: tuple[Array, Array, Array, Scalar]) -> training.Task:
        images, labels, n, benign_weight = context
        members = len(labels)

        def draw_batch(key: PRNGKey) -> tuple:
            rows = jax.random.randint(key, (batch, members), 0, n)
            y = labels[jnp.arange(members)[None], rows]
            return images[jnp.arange(members)[None], rows], y, jnp.where(y == 1, benign_weight, 1.0)

        return training.Task(loss, draw_batch)

    return task


def check_range(problem: LabelProblem, name: str, images: Samples) -> None:
    """Raise ValueError if a pixel is not finite or far out of range, such as 0..255 in place of [-1, 1]."""
    margin = 2 * (problem.high - problem.low)
    title = f"censoring: {name}, of range [{problem.low:g}, {problem.high:g}],"
    check.number(title, images, at_least=problem.low - margin, at_most=problem.high + margin)


@partial(jax.jit, static_argnums=0)
def scores(problem: LabelProblem, rewards: Params, samples: Samples) -> Float[Array, "n K"]:
    """Return log r_k of n clean samples and K members."""
    log_r = clean_log_reward(problem)
    of_sample = lambda x0: potential.over_members(lambda phi: log_r(phi, x0), rewards)
    return distributed.chunked(of_sample, samples, problem.chunk)


def reject(problem: LabelProblem, rewards: Params, samples: Samples, key: PRNGKey, scale: float = 1.0) -> np.ndarray:
    """Choose the samples of the uncensored model to keep, by rejection with the rewards: (n,) True to keep.

    The probability of a sample is (prod_k r_k(x) / m)^scale, with m the largest product of these samples, because a
    small alpha makes all r_k small and would reject almost every sample.

    Raises:
      ValueError: scale < 0, a sample is out of range, a reward is NaN, or all rewards are 0.
    """
    check.number("reject: scale", scale, at_least=0)
    check_range(problem, "samples", samples)
    log_r = scores(problem, rewards, jnp.asarray(samples)).sum(1)
    check.number("reject: log-rewards", log_r, at_most=0, infinite=True)  # a NaN would be the largest
    check.number("reject: largest log-reward", log_r.max())
    return np.asarray(jnp.log(jax.random.uniform(key, (len(samples),))) < scale * (log_r - log_r.max()))


def disagreement(problem: LabelProblem, rewards: Params, samples: Samples) -> np.ndarray:
    """Return (n,) the standard deviation of r_k over the members: the larger, the more a label teaches.

    Raises:
      ValueError: a sample is out of range, or a reward is NaN, because NaN would sort as the largest.
    """
    check_range(problem, "samples", samples)
    log_r = np.asarray(scores(problem, rewards, jnp.asarray(samples)))
    return np.exp(check.number("disagreement: log-rewards", log_r, at_most=0, infinite=True)).std(1)
