"""Losses: (params, key, example) -> scalar, for one example; `mean` makes the loss of a batch."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gendiff import potential
from gendiff.denoiser import Denoiser, Model
from gendiff.potential import Logit
from gendiff.process import Process, perturb
from gendiff.types import Params, PRNGKey, Sample, Scalar, Time

Loss: TypeAlias = Callable[[Params, PRNGKey, Any], Scalar]
Weight: TypeAlias = Callable[[Time], Scalar]


def noised(process: Process, key: PRNGKey, x0: Sample) -> tuple[Sample, Time]:
    """Draws a training time and x_t given x_0."""
    time_key, noise_key = jax.random.split(key)
    t = process.sample_time(time_key)
    return perturb(process, noise_key, x0, t)[0], t


def edm_weight(data_std: float = 0.5) -> Weight:
    """(sigma^2 + sd^2) / (sigma sd)^2 of Karras et al. (2022): unit weight on EDM's F."""
    return lambda t: 1.0 / t**2 + 1.0 / data_std**2


def epsilon_weight(process: Process) -> Weight:
    """alpha^2 / sigma^2: with it, the squared error of x_0 is that of eps (Ho et al. 2020, eq. 14)."""
    return lambda t: (process.alpha(t) / process.sigma(t)) ** 2


def denoising(process: Process, model: Model, weight: Weight) -> Loss:
    """Denoising score matching, weight(t) || D(x_t, t) - x_0 ||^2; an example is x_0."""

    def loss(params: Params, key: PRNGKey, x0: Sample) -> Scalar:
        x, t = noised(process, key, x0)
        return weight(t) * jnp.sum((model(params, x, t) - x0) ** 2)

    return loss


def cross_entropy(process: Process, logit: Logit) -> Loss:
    """Importance-weighted cross-entropy of Gen-neG, eq. 12; an example is (x_0, label in [0, 1], weight)."""

    def loss(params: Params, key: PRNGKey, example: tuple[Sample, Scalar, Scalar]) -> Scalar:
        x0, label, weight = example
        x, t = noised(process, key, x0)
        value = logit(params, x, t)
        return weight * (jax.nn.softplus(value) - label * value)

    return loss


def distillation(process: Process, model: Model, teacher: Denoiser, weight: Weight) -> Loss:
    """weight(t) || D(x_t, t) - teacher(x_t, t) ||^2, Gen-neG eq. 13; an example is x_0, the teacher is not trained."""

    def loss(params: Params, key: PRNGKey, x0: Sample) -> Scalar:
        x, t = noised(process, key, x0)
        target = jax.lax.stop_gradient(teacher(x, t))
        return weight(t) * jnp.sum((model(params, x, t) - target) ** 2)

    return loss


def regression(model: Model, weight: Weight) -> Loss:
    """weight(t) || D(x_t, t) - target ||^2 on stored targets; an example is (x_t, t, target)."""

    def loss(params: Params, key: PRNGKey, example: tuple[Sample, Time, Sample]) -> Scalar:
        x, t, target = example
        return weight(t) * jnp.sum((model(params, x, t) - target) ** 2)

    return loss


def ensemble(loss: Loss) -> Loss:
    """The sum of a loss over K members: parameters are stacked on axis 0, and so is an example, one for each member.

    The gradient of each member is that of its own loss, so one training run trains all of them (with an optimiser that
    works element by element, without a common limit on the norm of the gradient).
    """

    def total(params: Params, key: PRNGKey, examples: Any) -> Scalar:
        # As numbers: where members are a loop, its gradient reads the keys a second time, on purpose.
        keys = jax.random.key_data(jax.random.split(key, potential.leading_size(params)))
        return jnp.sum(
            potential.over_members(
                lambda each: loss(each[0], jax.random.wrap_key_data(each[1]), each[2]), (params, keys, examples)
            )
        )

    return total


def mean(loss: Loss) -> Loss:
    """Mean of a loss over a batch (a pytree with one leading axis), with one key an example."""

    def batch_loss(params: Params, key: PRNGKey, batch: Any) -> Scalar:
        size = jax.tree.leaves(batch)[0].shape[0]
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, jax.random.split(key, size), batch))

    return batch_loss
