"""Devices and processes: meshes, global arrays, agreement and preemption.

A mesh has two axes: `replica` for independent runs (seeds, goals, members, configurations), `data` for the batch of a
training.  Samples are drawn over both.  Compiled SPMD: a function is written for the complete batch, `jit` splits it
over the mesh, and the compiler adds the collectives (one all-reduce in a training step, none in sampling).

All processes of a run, one a host, run the same program on the same arguments.  `put` turns local arrays into a global
one, `gather` brings a split result back, and `first` runs on one process, for example to write a table.
"""

import collections
import hashlib
import json
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils

from gendiff import check, command

T = TypeVar("T")
EVERY_DEVICE = ("replica", "data")


# Processes.


class StartError(Exception):
    """The processes of a run cannot find each other."""


class Disagreement(Exception):
    """The processes of a run have different arguments."""


class Elsewhere(Exception):
    """Another process of the run failed, with this message."""


class Preempted(Exception):
    """SIGTERM asked the run to stop; everything computed is stored."""

    status = command.STOPPED
    """Exit status of the command."""


class Interrupted(Preempted):
    """Ctrl-C asked the run to stop; everything computed is stored."""

    status = command.INTERRUPTED


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the run; call it before the first use of a device.

    On a single machine nothing happens.  JAX finds the processes of a TPU pod (also of Kubernetes), of SLURM and of
    Open MPI, and of Kubernetes without TPUs if `jax[k8s]` is installed.  Elsewhere set JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    GENDIFF_START_SECONDS (300) limits the wait for the others.  A process that is silent for GENDIFF_HEARTBEAT_SECONDS
    (30) counts as lost.

    Raises:
      StartError: a variable is missing or out of range, or a process does not join in time.
    """
    wait = _number(environment, "GENDIFF_START_SECONDS", 300, 1)
    # At least 5 s, so that a failing process can still report its error.
    heartbeat = _number(environment, "GENDIFF_HEARTBEAT_SECONDS", 30, 5)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    present = [name for name in names if environment.get(name)]
    missing = [name for name in names if name not in present]
    own: dict[str, Any] = {}
    where, processes = "the coordinator that JAX finds", "all processes of the run"
    if present:
        if missing:
            raise StartError(f"{', '.join(missing)} must be set beside {', '.join(present)}, got none: set all or none")
        where = environment[names[0]]
        host, _, port = where.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise StartError(
                f"JAX_COORDINATOR_ADDRESS must be host:port with a port from 1 to 65535, got {where!r}: name the host "
                "of process 0 and a free port there"
            )
        count, index = (_number(environment, name, 0, least) for name, least in zip(names[1:], (1, 0), strict=True))
        if index >= count:
            raise StartError(f"JAX_PROCESS_ID must be < JAX_NUM_PROCESSES ({count}), got {index}")
        if count == 1:
            return
        own = {"coordinator_address": where, "num_processes": count, "process_id": index}
        processes = f"all {count} processes of the run"
    demand = f"{where}: {processes} must join within {wait} s"
    remedy = "start every process, with an address that it can reach"
    # Report first, because JAX aborts the process after its own timeout, with a page of addresses.
    late = threading.Timer(wait, command.fail, (f"{demand}, got fewer: {remedy}",))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **own,
            initialization_timeout=wait + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        if own or "coordinator_address" not in str(error):
            raise StartError(f"distributed: {error}") from None
    except RuntimeError as error:
        raise StartError(f"{demand}, got {str(error).strip().splitlines()[0]}: {remedy}") from None
    finally:
        late.cancel()
    # On CPU, run one program at a time, because concurrent collectives interleave.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


MOST = 1_000_000
"""Largest number in the environment; JAX has 32 bits for it."""


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= MOST:
        raise StartError(f"{name} must be a whole number from {least} to {MOST}, got {text!r}")
    return int(text)


def joined() -> bool:
    """Return True if this process is one of several of a run."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Return True for the process that writes tables, pictures and progress, as on a single machine."""
    return jax.process_index() == 0


def name() -> str:
    """The prefix of this process's log lines; empty on a single machine."""
    if not joined() or jax.process_count() == 1:
        return ""
    return f"[process {jax.process_index()} of {jax.process_count()}, {socket.gethostname()}] "


def first(function: Callable[[], T]) -> T:
    """Run `function` on the first process, and return its value, which JSON can hold, on all.  Collective.

    Raises:
      Elsewhere: on the other processes, if `function` raised.
    """
    if jax.process_count() == 1:
        return function()
    text, failed = _attempt(lambda: json.dumps({"value": function()})) if is_first() else ("", None)
    document = (text if failed is None else json.dumps({"error": _message(failed)})).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(document))))
    received = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(_bytes(document, size))).tobytes())
    if failed is not None:
        raise failed
    if "error" in received:
        raise Elsewhere(f"process 0: {received['error']}")
    return received["value"]


def everywhere(function: Callable[[], T]) -> T:
    """Run `function` on every process, and return its value here once all have succeeded.  Collective.

    Raises:
      Elsewhere: it raised, or exited, on another process.
    """
    if jax.process_count() == 1:
        return function()
    value, failed = _attempt(function)
    message = ("" if failed is None else _message(failed)).encode()
    messages = np.asarray(multihost_utils.process_allgather(_bytes(message, 400)))
    if failed is not None:
        raise failed
    for index, reply in enumerate(messages):
        if reply.any():
            raise Elsewhere(f"process {index}: {reply.tobytes().rstrip(bytes(1)).decode(errors='replace')}")
    return value


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | SystemExit | None]:
    try:
        return function(), None
    except (Exception, SystemExit) as error:
        return None, error


def _bytes(text: bytes, size: int) -> np.ndarray:
    """A text as an array of `size` bytes, cut or padded with zeros."""
    return np.frombuffer(text[:size].ljust(size, bytes(1)), np.uint8)


def _message(error: BaseException) -> str:
    """The message of an error for the other processes."""
    return f"exit with status {error.code}" if isinstance(error, SystemExit) else str(error) or type(error).__name__


def agree(subject: str, value: str) -> None:
    """Compare `value` over the processes.  Collective.

    Raises:
      Disagreement: on all processes; it names the processes whose value is not that of process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = ", ".join(map(str, np.flatnonzero((digests != digests[0]).any(1))))
    if others:
        raise Disagreement(f"{subject} must be equal on all {len(digests)} processes, got another on process {others}")


# Preemption.

_asked = 0
_stopping = False


def heed_notices() -> None:
    """Treat SIGTERM (preemption) and Ctrl-C as requests to stop after the next checkpoint."""
    if jax.process_count() == 1:  # JAX tells several processes of SIGTERM; Ctrl-C ends one of them at once
        command.heed()


def preempted() -> bool:
    """Return True if the run must stop.  Collective: all processes must call it together."""
    global _asked, _stopping
    if jax.process_count() == 1:
        return command.noticed()
    if not _stopping:  # because JAX answers True once
        _asked += 1
        _stopping = bool(multihost_utils.reached_preemption_sync_point(_asked))
    return _stopping


def stop_if_noticed(stored: str) -> None:
    """As `stop_if_preempted`, for work that one process does alone; several processes never stop here."""
    if command.noticed():
        stop(stored)


def stop_if_preempted(stored: str) -> None:
    """Raise Preempted after a notice; `stored` names the newest thing on disk.  Collective."""
    if preempted():
        stop(stored)


def stop(stored: str) -> NoReturn:
    """Raise Preempted, or Interrupted after Ctrl-C; `stored` names the newest thing on disk."""
    number = signal.SIGINT if signal.SIGINT in command.notices else signal.SIGTERM
    kind = Interrupted if number == signal.SIGINT else Preempted
    raise kind(f"{command.stopped_by(number)}: {stored} is stored; the same command goes on from there")


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


def fully_sharded(mesh: jax.sharding.Mesh, tree: Any, least: int = 2**14) -> Any:
    """Shardings that split every large array (FSDP) along the longest axis that `data` divides.

    Args:
      tree: of arrays or their shapes.
      least: smallest size of an array that is split, in elements.
    """
    devices = mesh.shape["data"]

    def sharding(leaf: Any) -> jax.NamedSharding:
        axes = [(size, -axis) for axis, size in enumerate(leaf.shape) if size % devices == 0]
        if not axes or leaf.size < least or is_key(leaf):
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
