"""One mesh, one axis: batches are split over `data`, parameters are replicated.

Compiled SPMD: a function is written for the whole batch, `jit` splits it over the mesh, and the collectives are the
compiler's (one all-reduce in a training step, none in sampling).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A 1-D mesh of all devices, or of the given ones, with the axis `data`."""
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default, reject `alphas[t]` and concatenation with replicated arrays, which diffusion needs.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def training_mesh() -> jax.sharding.Mesh:
    """All accelerators, or one CPU device: its cores share each operation better than they share a batch."""
    devices = jax.devices()
    return make_mesh(devices[:1] if devices[0].platform == "cpu" else devices)


def split(mesh: jax.sharding.Mesh, axis: int = 0) -> jax.NamedSharding:
    """Sharding of an array whose axis `axis` is the batch."""
    return jax.NamedSharding(mesh, jax.P(*[None] * axis, "data"))


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Sharding of an array that every device holds whole."""
    return jax.NamedSharding(mesh, jax.P())


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """A copy of `tree` on every device of the mesh; the copy may be donated, the original stays."""
    # `may_alias=False` alone still shares the original's buffer where there are several devices.
    return jax.device_put(jax.tree.map(jnp.copy, tree), replicated(mesh))


def place(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
    """`tree` on every device of the mesh, wherever it was; without a mesh, as it is."""
    return tree if mesh is None else jax.device_put(tree, replicated(mesh))


def shard(mesh: jax.sharding.Mesh, local: Any) -> Any:
    """Global arrays from this process's rows of a batch, split over `data`."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(split(mesh), np.asarray(a)), local)


def split_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Inside `jit`: the batch split over `data`; where its size is no multiple of the devices, left to the compiler."""
    even = lambda a: a.ndim and a.shape[0] % mesh.size == 0
    constrain = lambda a: jax.lax.with_sharding_constraint(a, split(mesh)) if even(a) else a
    return jax.tree.map(constrain, batch)


def chunked(
    function: Callable[[Any], Any], inputs: Any, chunk: int = 1024, mesh: jax.sharding.Mesh | None = None
) -> Any:
    """`vmap(function)(inputs)`, in chunks that stay in the cache (or in memory), split over the devices of a mesh.

    Args:
      function: of one example.
      inputs: a pytree of arrays with a common leading axis of n examples; results do not depend on chunks or devices.
      chunk: most examples at a time and device; n is padded to equal chunks with copies of the last example.
    """
    n = jax.tree.leaves(inputs)[0].shape[0]
    if n < 1:
        raise ValueError("distributed: chunked: expected one example or more, given none")
    devices = 1 if mesh is None else mesh.size
    chunks = -(-n // (devices * chunk))
    size = devices * -(-n // (devices * chunks))
    rows = jnp.minimum(jnp.arange(chunks * size), n - 1).reshape(chunks, size)
    parts = jax.tree.map(lambda a: a[rows], inputs)
    if mesh is not None:
        parts = jax.lax.with_sharding_constraint(parts, split(mesh, axis=1))
    outputs = jax.lax.map(jax.vmap(function), parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], outputs)
