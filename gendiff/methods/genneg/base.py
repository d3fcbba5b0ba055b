"""The baseline of samples with conditions: denoising score matching with validation."""

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
"""Number of a child key that `split` does not return."""


@by_value
def base_task(
    problem: OracleProblem, batch: int, change: Callable[[PRNGKey, Any], Any]
) -> Callable[[Any], training.Task]:
    """Return the task of a baseline, of the context (training examples, validation examples, keys of validation).

    An example is (condition, x_0).  If the training examples are None, batches come from the host.

    Args:
      change: augmentation in training, (key, example) -> example, by value.
    """
    assert problem.bind is not None
    loss = losses.conditional(denoising_loss(problem), problem.bind)

    def task(context: Any) -> training.Task:
        train, held_out, keys = context

        def draw(key: PRNGKey) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, 1), batch)
            return jax.vmap(change)(keys, training.minibatch(key, train, batch))

        def validate(theta: Params) -> Array:
            # The same noise at every validation, so that losses compare.
            examples = (jax.random.clone(keys), held_out)
            return jnp.mean(distributed.chunked(lambda example: loss(theta, *example), examples, 64))

        def changed(theta: Params, key: PRNGKey, example: Any) -> Scalar:
            return loss(theta, key, change(jax.random.fold_in(key, APART), example))

        return training.Task(changed, None, validate) if train is None else training.Task(loss, draw, validate)

    return task
