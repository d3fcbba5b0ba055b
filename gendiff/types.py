"""The array types of the vocabulary.  Every function takes ONE example; batch with `jax.vmap`."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

PRNGKey: TypeAlias = Key[Array, ""]
"""A typed key, `jax.random.key(seed)`."""
Params: TypeAlias = Any
"""A pytree of arrays."""
Scalar: TypeAlias = Float[Array, ""]
Time: TypeAlias = jax.Array
"""Scalar, in the units of the process: sigma for EDM, an integer 0..T for DDPM."""
Sample: TypeAlias = Float[Array, "*shape"]
"""One example: a point (2,), an image (h, w, c), a scene (agents, features)."""
Samples: TypeAlias = Float[jax.Array | np.ndarray, "n *shape"]
"""A batch of examples, on a device or on the host."""
Valid: TypeAlias = Bool[jax.Array | np.ndarray, " n"]
"""An oracle's verdicts on a batch; True is valid."""
BATCH = "batch"
"""Name of the batch axis, over which a loss may take means (batch normalisation, contrasts)."""


def wide(x: Any) -> jax.Array:
    """x in float32, or in its own wider type, because narrow sums, log-ratios and places lose digits.

    In bfloat16 a place 50 m away is rounded to 0.25 m.
    """
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
