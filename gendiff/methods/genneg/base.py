"""The model that Gen-neG begins with, of samples that have conditions: denoising score matching with validation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gendiff import distributed, losses, training
from gendiff.methods.genneg.model import OracleProblem
from gendiff.methods.genneg.students import denoising_loss
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Scalar

APART = 2**31
"""A child of a key that `split` does not give."""


@by_value
def base_task(
    problem: OracleProblem, batch: int, change: Callable[[PRNGKey, Any], Any]
) -> Callable[[Any], training.Task]:
    """The task of a baseline; its context is training examples, validation examples, and keys for these.

    An example is (condition, x_0).  Without training examples batches come from the host.

    Args:
      change: (key, example) -> example, by value: augmentation in training.
    """
    assert problem.bind is not None
    loss = losses.conditional(denoising_loss(problem), problem.bind)

    def task(context: Any) -> training.Task:
        train, held_out, keys = context

        def draw(key: PRNGKey) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, 1), batch)
            return jax.vmap(change)(keys, training.minibatch(key, train, batch))

        def validate(theta: Params) -> Array:
            # The same noise at every validation, on purpose.
            examples = (jax.random.clone(keys), held_out)
            return jnp.mean(distributed.chunked(lambda example: loss(theta, *example), examples, 64))

        def changed(theta: Params, key: PRNGKey, example: Any) -> Scalar:
            return loss(theta, key, change(jax.random.fold_in(key, APART), example))

        return training.Task(changed, None, validate) if train is None else training.Task(loss, draw, validate)

    return task
