"""Devices: meshes, shardings and global arrays; also the names of `gendiff.processes` and `gendiff.preemption`.

A mesh has two axes: `replica` for independent runs (seeds, goals, members, configurations), `data` for the batch of a
training.  Samples are drawn over both.  Compiled SPMD: a function is written for the complete batch, `jit` splits it
over the mesh, and the compiler adds the collectives (one all-reduce in a training step, none in sampling).

`put` turns local arrays into a global one, `gather` brings a split result back, and `first` runs on one process, for
example to write a table.
"""

# ruff: noqa: I001 (its fix gives every `X as X` its own statement)

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils

from gendiff import check
from gendiff.preemption import (
    Interrupted as Interrupted,
    Preempted as Preempted,
    heed_notices as heed_notices,
    preempted as preempted,
    stop as stop,
    stop_if_noticed as stop_if_noticed,
    stop_if_preempted as stop_if_preempted,
)
from gendiff.processes import (
    Disagreement as Disagreement,
    Elsewhere as Elsewhere,
    StartError as StartError,
    agree as agree,
    everywhere as everywhere,
    first as first,
    is_first as is_first,
    joined as joined,
    name as name,
    start as start,
)

EVERY_DEVICE = ("replica", "data")


# Meshes.


def make_mesh(devices: list[jax.Device] | None = None, replica: int = 1) -> jax.sharding.Mesh:
    """A mesh of `devices`, by default of all devices of all processes.

    A slower network joins slices.  So neighbours on `data` lie in one slice if possible, and an all-reduce is one
    within every slice and a small one between them.

    Args:
      replica: length of the axis `replica`; `data` has the rest.
    """
    devices = jax.devices() if devices is None else devices
    if not devices:
        raise ValueError("mesh: devices must be one or more, got none")
    if replica < 1 or len(devices) % replica:
        raise ValueError(f"mesh: replica must be a divisor of {len(devices)} devices, got {replica}")
    data = len(devices) // replica
    # Auto, because explicit axes reject `alphas[t]` and concatenation with replicated arrays.
    types = (jax.sharding.AxisType.Auto,) * 2
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(sizes) == 1:
        try:
            return jax.make_mesh((replica, data), EVERY_DEVICE, axis_types=types, devices=devices)
        except NotImplementedError:  # it splits the axes of a torus on v5e alone: 8 x 8 of 4 x 4 x 4
            grid = mesh_utils.create_device_mesh((replica, data), devices, allow_split_physical_axes=True)
            return jax.sharding.Mesh(grid, EVERY_DEVICE, axis_types=types)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"mesh: slices must have one size, got {sorted(sizes.values())} devices")
    # `jax.make_mesh` refuses slices.  Put slices on `replica` if they divide it, because replicas do not communicate.
    rows = math.gcd(replica, len(sizes))
    between = rows, len(sizes) // rows
    within = replica // between[0], data // between[1]
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, EVERY_DEVICE, axis_types=types)


def training_mesh(
    batch: int | None = None, devices: list[jax.Device] | None = None, *, every_core: bool = False
) -> jax.sharding.Mesh:
    """A mesh of all accelerators, or of one CPU device a process, because cores share an operation best.

    Args:
      batch: examples of a step.  `data` has as many devices as divide it, and `replica` repeats their work: 1,000
        examples on 64 devices are 8 parts, computed 8 times.
      every_core: use all CPU devices if they divide the batch, for operations too small for several cores (1.2 times
        as fast for `gendiff.nets.scene_transformer` on two cores).
    """
    devices = jax.devices() if devices is None else devices
    if devices[0].platform == "cpu" and not (every_core and batch and batch % len(devices) == 0):
        by_process = {device.process_index: device for device in reversed(devices)}
        devices = [by_process[index] for index in sorted(by_process)]
    return make_mesh(devices, 1 if batch is None else len(devices) // math.gcd(batch, len(devices)))


def split(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Sharding of a batch: axis 0 over the mesh's axis `data`."""
    return jax.NamedSharding(mesh, jax.P("data"))


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Sharding of an array with a copy on every device."""
    return jax.NamedSharding(mesh, jax.P())


def fully_sharded(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shardings that split arrays of 2^14 numbers or more (FSDP) along the longest axis that `data` divides.

    The tree may have shapes in place of arrays.
    """
    devices = mesh.shape["data"]

    def sharding(leaf: Any) -> jax.NamedSharding:
        axes = [(size, -axis) for axis, size in enumerate(leaf.shape) if size % devices == 0]
        if not axes or leaf.size < 2**14 or is_key(leaf):
            return replicated(mesh)
        return jax.NamedSharding(mesh, jax.P(*[None] * -max(axes)[1], "data"))

    return jax.tree.map(sharding, tree)


# Arrays.


def is_key(leaf: Any) -> bool:
    """Return True for an array, or a `jax.ShapeDtypeStruct`, of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def put(tree: Any, sharding: Any) -> Any:
    """Global arrays from a tree of global arrays, or of local ones that are equal on all processes.

    Args:
      sharding: a sharding for all leaves, or a tree of shardings.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, jax.NamedSharding):
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)
    return jax.tree.map(_put, tree, sharding)


def _put(leaf: Any, sharding: jax.NamedSharding) -> jax.Array:
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if is_global and leaf.sharding == sharding:
        return leaf
    if is_key(leaf):
        data = _put(jax.random.key_data(jax.random.clone(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = _gather(leaf) if is_global else np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Copy `tree` to every device of the mesh; the caller may donate the copy."""
    # `may_alias=False` alone shares the original's buffer if there are several devices.
    return put(jax.tree.map(jnp.copy, tree), replicated(mesh))


def place(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
    """Put `tree` on every device of the mesh; without a mesh, return it."""
    return tree if mesh is None else put(tree, replicated(mesh))


def shard(mesh: jax.sharding.Mesh, local: Any) -> Any:
    """Global arrays from this process's rows of a batch, split over the axis `data`.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    if jax.process_count() > 1 and mesh.shape["replica"] > 1:
        raise ValueError(f"batch: mesh must have all {mesh.size} devices on the axis `data`, got {dict(mesh.shape)}")
    _check_divides(check.rows("batch", local), len(mesh.local_devices) // mesh.shape["replica"])
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(split(mesh), np.asarray(a)), local)


def _check_divides(rows: int, devices: int) -> None:
    if rows % devices:
        raise ValueError(f"batch: rows must be a multiple of the {devices} devices, got {rows}")


def gather(tree: Any, n: int | None = None) -> Any:
    """NumPy arrays from local or global ones.  Collective, unless all arrays are local or replicated.

    Args:
      n: keep the first n rows, because `chunked` may leave more.
    """
    return jax.tree.map(lambda leaf: _gather(leaf)[:n] if n is not None else _gather(leaf), tree)


def _gather(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def local(tree: Any) -> Any:
    """This process's copies of replicated arrays, for computations of one process."""
    if jax.process_count() == 1:
        return tree
    is_global = lambda leaf: isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return jax.tree.map(lambda leaf: leaf.addressable_data(0) if is_global(leaf) else leaf, tree)


def by_process(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, with the rows split over the processes.  Collective.

    Args:
      function: a function on the host, such as an oracle: trees of arrays with n rows -> tree of arrays with n rows, of
        at most 32 bits.
      inputs: trees of arrays with a common leading axis.
    """
    on_host = lambda *inputs: jax.tree.map(np.asarray, function(*inputs))
    n, processes = check.rows("by_process: inputs", inputs), jax.process_count()
    if processes == 1 or n == 0:
        return on_host(*inputs)
    # Equal shares, padded with the last row.
    size = -(-n // processes)
    rows = np.minimum(np.arange(size) + size * jax.process_index(), n - 1)
    share = everywhere(lambda: on_host(*jax.tree.map(lambda a: a[rows], inputs)))
    joined_rows = lambda a: np.asarray(a).reshape(-1, *a.shape[2:])[:n]
    return jax.tree.map(joined_rows, multihost_utils.process_allgather(share))


def split_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Inside `jit`: the batch split over the axis `data`; the compiler places its scalars.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    for leaf in jax.tree.leaves(batch):
        _check_divides(leaf.shape[0] if leaf.ndim else 0, mesh.shape["data"])
    constrain = lambda a: jax.lax.with_sharding_constraint(a, split(mesh)) if a.ndim else a
    return jax.tree.map(constrain, batch)


def chunked(
    function: Callable[[Any], Any],
    inputs: Any,
    chunk: int = 1024,
    mesh: jax.sharding.Mesh | None = None,
    *,
    cut: bool = True,
) -> Any:
    """`vmap(function)(inputs)`, in chunks that fit the cache or the memory, split over the devices of a mesh.

    Results do not depend on chunks or devices.

    Args:
      inputs: a pytree of arrays with a common leading axis of n >= 1 examples.
      chunk: most examples at a time and device, >= 1; copies of the last example pad n to equal chunks.
      cut: False keeps the results of the padding, which `gather(results, n)` drops.  True needs a collective if the
        devices do not divide the examples.
    """
    check.number("chunked: chunk", chunk, at_least=1, whole=True)
    n = check.number("chunked: examples", check.rows("chunked: inputs", inputs), at_least=1, whole=True)
    devices = 1 if mesh is None else mesh.size
    chunks = -(-n // (devices * chunk))
    size = -(-n // (devices * chunks))

    def on_device(parts: Any) -> Any:
        parts = jax.tree.map(lambda a: a.reshape(chunks, size, *a.shape[1:]), parts)
        outputs = jax.lax.map(jax.vmap(function), parts)
        return jax.tree.map(lambda a: a.reshape(chunks * size, *a.shape[2:]), outputs)

    total = devices * chunks * size
    if total != n:
        inputs = jax.tree.map(lambda a: a[jnp.minimum(jnp.arange(total), n - 1)], inputs)
    if mesh is not None:
        rows = jax.P(EVERY_DEVICE)
        on_device = jax.shard_map(on_device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    outputs = on_device(inputs)
    return jax.tree.map(lambda a: a[:n], outputs) if cut and total != n else outputs
