"""Relative reward functions: the difference of two diffusion models as the gradient of a potential (Nuti, Franzmeyer
and Henriques 2023, "Extracting reward functions from diffusion models", NeurIPS).

    two frozen models, base b and expert e, over one process      `Diffusion`, `check_pair`
    their difference at noisy samples                             `examples` (Algorithm 1), `along_paths` (Algorithm 2)
    a pool of differences, for many rewards                       `pools`, `pool_of_models`
    rho(x_t, t) <- | grad rho - factor(t) (e - b)(x_t, t) |^2     `reward_training`
    base model + grad rho / factor(t)                             `steer`: a perfect rho turns base into expert

Every such difference is the difference of the denoisers times a factor of t (`factor`):

    means of a step   c_1(t) (e - b)            published
    scores            alpha / sigma^2 (e - b)   rho is then log p_e,t / p_b,t
    noise             alpha / sigma (e - b)     sigma times the difference of scores: bounded at low noise

A reward is known up to a constant of t: compare its values at one t only.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check, losses, training
from gendiff.losses import Aligned
from gendiff.methods.relative_reward.measures import (
    Fit,
    asymmetry,
    by_time,
    difference,
    line_integral,
    quality,
    tenths,
    told_apart,
)  # fmt: skip
from gendiff.methods.relative_reward.steering import kernel, steer, steered, strength
from gendiff.methods.relative_reward.targets import (
    PRINCIPLED,
    PUBLISHED,
    Diffusion,
    Models,
    PoolRequest,
    Switches,
    aligned,
    along_paths,
    base_mean,
    check_pair,
    examples,
    factor,
    pool_of_models,
    pooled,
    pools,
)
from gendiff.potential import Logit
from gendiff.process import Process
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Samples

__all__ = [
    "PRINCIPLED", "PUBLISHED", "Diffusion", "Fit", "Models", "PairProblem", "PoolRequest", "Switches", "aligned",
    "along_paths", "asymmetry", "base_mean", "by_time", "check_pair", "difference", "discriminator_task",
    "discriminator_training", "examples", "factor", "kernel", "line_integral", "pool_of_models", "pooled", "pools",
    "quality", "reward_task", "reward_training", "steer", "steered", "strength", "tenths", "told_apart",
]  # fmt: skip


class PairProblem(NamedTuple):
    """The network and the process of all rewards of a pair of models.  Static."""

    process: Process
    network: Logit
    """(phi, x, t) -> rho."""
    batch: int = 256
    mode: Literal["reverse", "directional"] = "reverse"
    """How to take the second-order gradient; see `losses.gradient_alignment`."""


Examples: TypeAlias = tuple[Any, dict[str, Array]]
"""The examples that all rewards share, and the goal of one reward."""


def reward_training(
    problem: PairProblem, examples: Aligned, goals: Array, start: Params, settings: training.Settings, key: PRNGKey
) -> training.Training:
    """Return the training of K rewards at once on one pool of examples, for `training.train`.

    Args:
      examples: a pool, with targets (n, G, *shape).
      goals: (K,), the expert of each reward, in 0 .. G - 1.
      start: K parameter trees stacked on axis 0.

    Returns:
      The training, whose last parameters are the rewards: the published method takes no averages.

    Raises:
      ValueError: a target is not finite (the message names its row), a goal has no expert, or batch < 1.
    """
    n = check.rows("relative reward: examples", examples)
    check.number("relative reward: number of examples", n, at_least=1, whole=True)
    if not isinstance(examples.target, jax.core.Tracer):  # shapes have no numbers
        _check_targets(examples)
    experts = examples.target.shape[1]
    return _training(problem, reward_task(problem), examples, experts, goals, start, settings, key)


def _check_targets(examples: Aligned) -> None:
    finite = np.isfinite(np.asarray(examples.target)).reshape(*examples.target.shape[:2], -1).all(-1)
    if not finite.all():
        row, goal = np.argwhere(~finite)[0]
        raise ValueError(
            f"relative reward: targets must be finite, got {np.sum(~finite)} examples of {finite.size} that are not, "
            f"the first at t = {examples.t[row]}, of expert {goal}: a model diverges there"
        )


@by_value
def reward_task(problem: PairProblem) -> Callable[[Examples], training.Task]:
    """Fit a reward to a pool's differences of base and expert, by gradient alignment."""
    loss = losses.gradient_alignment(problem.network, problem.mode)

    def task(context: Examples) -> training.Task:
        examples, own = context

        def draw_batch(key: PRNGKey) -> Aligned:
            rows = jax.random.randint(key, (problem.batch,), 0, len(examples.t))
            x, t, weight = (a[rows] for a in (examples.x, examples.t, examples.weight))
            return Aligned(x, t, examples.target[rows, own["goal"]], weight)

        return training.Task(loss, draw_batch)

    return task


def discriminator_training(
    problem: PairProblem,
    base: Samples,
    experts: Array,
    goals: Array,
    start: Params,
    settings: training.Settings,
    key: PRNGKey,
) -> training.Training:
    """Return the training of K classifiers of base against expert, whose log-odds are rewards.

    Args:
      base: (n, *shape) data.
      experts: (G, n, *shape) data.
      goals, start: as in `reward_training`.

    Raises:
      ValueError: a goal has no expert, or batch < 1.
    """
    task = discriminator_task(problem)
    return _training(problem, task, (base, experts), len(experts), goals, start, settings, key)


@by_value
def discriminator_task(problem: PairProblem) -> Callable[[Examples], training.Task]:
    """Classify base against expert by cross-entropy, in equal numbers, at random times of the process."""
    loss = losses.cross_entropy(problem.process, problem.network)

    def task(context: Examples) -> training.Task:
        (base, experts), own = context

        def draw_batch(key: PRNGKey) -> tuple[Samples, Array, Array]:
            rows = jax.random.randint(key, (problem.batch,), 0, len(base))
            label = (jnp.arange(problem.batch) % 2).astype(jnp.float32)
            expert = label.reshape(-1, *[1] * (base.ndim - 1)) == 1
            return jnp.where(expert, experts[own["goal"], rows], base[rows]), label, jnp.ones_like(label)

        return training.Task(loss, draw_batch)

    return task


def _training(
    problem: PairProblem, task: Any, data: Any, experts: int, goals: Array, start: Params, settings: Any, key: PRNGKey
) -> training.Training:
    check.number("relative reward: batch", problem.batch, at_least=1, whole=True)
    check.shape("relative reward: goals", goals, (None,))
    check.number("relative reward: number of goals", len(goals), at_least=1, whole=True)
    check.number("relative reward: goals", np.asarray(goals), at_least=0, at_most=experts - 1, whole=True)
    context = (data, {"goal": jnp.asarray(goals, jnp.int32)})
    return training.Training(training.keys(key, len(goals)), start, task, context, settings, own=(False, True))
