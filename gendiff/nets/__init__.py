"""Flax modules, one architecture a file; the only folder that imports Flax."""

from functools import partial
from typing import Any

import jax

from gendiff.types import Params, PRNGKey


@partial(jax.jit, static_argnums=0)
def fresh(network: Any, key: PRNGKey, *inputs: Any) -> Params:
    """Draw a network's initial parameters for inputs of these shapes; equal networks share the compiled program."""
    return network.init(key, *inputs)
