"""Flax modules, one architecture per file; only this folder imports Flax."""

from functools import partial
from typing import Any

import jax

from gendiff.types import Params, PRNGKey


@partial(jax.jit, static_argnums=0)
def fresh(network: Any, key: PRNGKey, *inputs: Any) -> Params:
    """Draw a network's initial parameters for inputs of these shapes; equal networks share a compiled program."""
    return network.init(key, *inputs)


def fresh_members(network: Any, keys: PRNGKey, *inputs: Any) -> Params:
    """Draw initial parameters for every key (K,), stacked on axis 0."""
    return jax.vmap(lambda key: fresh(network, key, *inputs))(keys)
