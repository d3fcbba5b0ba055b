"""Devices and processes: one mesh per run, arrays that all of its processes share, and what they agree on.

A mesh has two axes.  `replica` is for independent runs (seeds, goals, members, configurations), `data` for the batch of
a training; either may be 1.  Samples, which are independent too, are drawn over both.  Compiled SPMD: a function is
written for the whole batch, `jit` splits it over the mesh, and the collectives are the compiler's (one all-reduce in a
training step, none in sampling).

Several processes of one run (a host of a pod each, or any machines) all run the same program on the same arguments.
What a process holds whole becomes a global array by `put`, a result that is split comes back by `gather`, and what only
one of them can do, such as writing a table, is done by `first`.
"""

import collections
import hashlib
import json
import math
import os
import signal
import socket
import sys
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
    """The processes of a run did not find each other."""


class Disagreement(Exception):
    """The processes of a run were started differently."""


class Elsewhere(Exception):
    """Another process of the run failed; its message."""


class Preempted(Exception):
    """The machine is to be given back; everything that was computed is stored."""

    status = command.STOPPED
    """Exit status of the command."""


class Interrupted(Preempted):
    """The user pressed Ctrl-C; everything that was computed is stored."""

    status = command.INTERRUPTED


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run, if there are any; before the first use of a device.

    On a TPU pod (also of Kubernetes) and under SLURM and Open MPI JAX finds them itself, under Kubernetes without TPUs
    if `jax[k8s]` is installed.  Elsewhere each process is told with
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.  On a single machine nothing
    happens.  GENDIFF_START_SECONDS (300) is how long to wait for the others, GENDIFF_HEARTBEAT_SECONDS (30) after which
    silence a process counts as lost.

    Raises:
      StartError: of the three variables one is missing or no number, or the others did not come.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: environment[name] for name in names if environment.get(name)}
    # A shorter silence is that of a process which is about to say what went wrong.
    wait, heartbeat = (
        _number(environment, name, default, least)
        for name, default, least in (("GENDIFF_START_SECONDS", 300, 1), ("GENDIFF_HEARTBEAT_SECONDS", 30, 5))
    )
    own: dict[str, Any] = {}
    if given:
        missing = [name for name in names if name not in given]
        if missing:
            raise StartError(f"{', '.join(missing)}: expected with {', '.join(given)}, given none")
        _check_address(given[names[0]])
        count, index = (_number(environment, name, 0, least) for name, least in zip(names[1:], (1, 0), strict=True))
        if index >= count:
            raise StartError(f"JAX_PROCESS_ID: expected 0 to {count - 1}, given {index}")
        if count == 1:
            return
        own = {"coordinator_address": given[names[0]], "num_processes": count, "process_id": index}
    where = own.get("coordinator_address", "the coordinator that JAX finds")
    whom = f"all {own['num_processes']} processes of the run" if own else "all processes of the run"
    # JAX aborts the process when its own time is up, with a page of addresses; we speak before it.
    late = threading.Timer(wait, _leave, (f"error: {where}: expected {whom} within {wait} s, given not all of them",))
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
        reason = str(error).strip().splitlines()[0]
        raise StartError(f"{where}: expected {whom} within {wait} s ({reason})") from None
    finally:
        late.cancel()
    # On CPUs programs that are under way together would mix up their collectives.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _leave(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(2)


def _check_address(text: str) -> None:
    host, colon, port = text.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise StartError(
            f"JAX_COORDINATOR_ADDRESS must be host:port with a port from 1 to 65535, got {text!r}: name the host of "
            "process 0 and a free port there"
        )


MOST = 1_000_000
"""Of numbers in the environment, which JAX keeps in 32 bits."""


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= MOST:
        raise StartError(f"{name} must be a whole number from {least} to {MOST}, got {text!r}")
    return int(text)


def joined() -> bool:
    """Whether this process is one of several of a run."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes tables, pictures and progress: true on a single machine."""
    return jax.process_index() == 0


def name() -> str:
    """What log lines of this process begin with; nothing on a single machine."""
    if not joined() or jax.process_count() == 1:
        return ""
    return f"[process {jax.process_index()} of {jax.process_count()}, {socket.gethostname()}] "


def first(function: Callable[[], T]) -> T:
    """What `function` gives on the first process, on all of them; JSON must be able to hold it.

    Raises:
      Elsewhere: on the others, where it raised on the first.
    """
    if jax.process_count() == 1:
        return function()
    failed: Exception | SystemExit | None = None
    document = b""
    if is_first():
        try:
            document = json.dumps({"value": function()}).encode()
        except (Exception, SystemExit) as error:
            failed, document = error, json.dumps({"error": _said(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(document))))
    padded = np.zeros(size, np.uint8)
    padded[: len(document)] = np.frombuffer(document, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if failed is not None:
        raise failed
    if "error" in told:
        raise Elsewhere(f"process 0: {told['error']}")
    return told["value"]


def everywhere(function: Callable[[], T]) -> T:
    """What `function` gives here, once it has succeeded on every process; an exit is a failure.

    Raises:
      Elsewhere: it raised on another one, which is named.
    """
    if jax.process_count() == 1:
        return function()
    value: Any = None
    failed: Exception | SystemExit | None = None
    try:
        value = function()
    except (Exception, SystemExit) as error:
        failed = error
    message = np.zeros(400, np.uint8)
    text = ("" if failed is None else _said(failed)).encode()[: len(message)]
    message[: len(text)] = np.frombuffer(text, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(message))
    if failed is not None:
        raise failed
    for index, each in enumerate(every):
        if each.any():
            raise Elsewhere(f"process {index}: {each.tobytes().rstrip(bytes(1)).decode(errors='replace')}")
    return value


def _said(error: BaseException) -> str:
    """What the other processes are told of an error."""
    return f"exit with status {error.code}" if isinstance(error, SystemExit) else str(error) or type(error).__name__


def agree(what: str, value: str) -> None:
    """Compares `value` over the processes.

    Raises:
      Disagreement: on all of them, naming those that have another one than process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    every = np.asarray(multihost_utils.process_allgather(digest))
    others = [str(index) for index, each in enumerate(every) if (each != every[0]).any()]
    if others:
        raise Disagreement(
            f"{what}: expected the same on all {len(every)} processes, given another than process 0's on process "
            f"{', '.join(others)}"
        )


# Preemption.

_asked = 0
_stopping = False


def heed_notices() -> None:
    """Treat SIGTERM (preemption) and Ctrl-C as requests to stop after the next checkpoint, from now on."""
    if jax.process_count() == 1:  # of several, JAX listens to SIGTERM and tells them all; Ctrl-C ends a process at once
        command.heed()


def preempted() -> bool:
    """Whether the run is to stop now: on all processes at the same call, which all must make."""
    global _asked, _stopping
    if jax.process_count() == 1:
        return command.noticed()
    if not _stopping:  # JAX says it at one call alone
        _asked += 1
        _stopping = bool(multihost_utils.reached_preemption_sync_point(_asked))
    return _stopping


def stop_if_noticed(what: str) -> None:
    """Raises Preempted after a notice in what one process does alone, which cannot ask the others.

    Of several processes none stops here: the notice waits for the next call that all of them make.
    """
    if command.noticed():
        stop(what)


def stop_if_preempted(what: str) -> None:
    """Raises Preempted after a notice; `what` is the last thing that is stored."""
    if preempted():
        stop(what)


def stop(what: str) -> NoReturn:
    """Raise Preempted, after Ctrl-C its subclass Interrupted; `what` is the last thing that is stored."""
    number = signal.SIGINT if signal.SIGINT in command.notices else signal.SIGTERM
    kind = Interrupted if number == signal.SIGINT else Preempted
    raise kind(f"{command.stopped_by(number)}: {what} is stored; the same command goes on from there")


# Meshes.


def make_mesh(devices: list[jax.Device] | None = None, replica: int = 1) -> jax.sharding.Mesh:
    """A mesh of all devices of all processes, or of the given ones.

    Of several slices, which a slower network joins, neighbours on `data` lie in one slice as far as that goes, so that
    an all-reduce is one within each slice and a small one among them.

    Args:
      replica: length of the axis `replica`; `data` has the rest.
    """
    devices = jax.devices() if devices is None else devices
    if not devices:
        raise ValueError("distributed: devices: expected one or more, given none")
    if replica < 1 or len(devices) % replica:
        raise ValueError(f"distributed: replica: expected a divisor of {len(devices)} devices, given {replica}")
    data = len(devices) // replica
    # Explicit axes, the default, reject `alphas[t]` and concatenation with replicated arrays, which diffusion needs.
    types = (jax.sharding.AxisType.Auto,) * 2
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(sizes) == 1:
        try:
            return jax.make_mesh((replica, data), EVERY_DEVICE, axis_types=types, devices=devices)
        except NotImplementedError:  # it splits the axes of a torus on v5e alone: 8 x 8 of 4 x 4 x 4
            whole = mesh_utils.create_device_mesh((replica, data), devices, allow_split_physical_axes=True)
            return jax.sharding.Mesh(whole, EVERY_DEVICE, axis_types=types)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"distributed: expected slices of one size, given {sorted(sizes.values())} devices")
    # `jax.make_mesh` refuses slices.  Those that divide `replica` go there: replicas have nothing to tell each other.
    rows = math.gcd(replica, len(sizes))
    between = rows, len(sizes) // rows
    within = replica // between[0], data // between[1]
    whole = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(whole, EVERY_DEVICE, axis_types=types)


def training_mesh(
    batch: int | None = None, devices: list[jax.Device] | None = None, *, every_core: bool = False
) -> jax.sharding.Mesh:
    """All accelerators, or one CPU device a process: its cores share each operation better than they share a batch.

    Args:
      batch: examples of a step.  Where the devices do not divide it, `data` has as many of them as do, and the others
        are copies of these on `replica`: 1,000 examples on 64 devices are 8 parts, computed 8 times.
      every_core: all CPU devices too, where they divide the batch; for networks of operations so small that cores
        cannot share them (1.2 times as fast for `gendiff.nets.scene_transformer` on two cores).
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
    """Sharding of an array that every device holds whole."""
    return jax.NamedSharding(mesh, jax.P())


def fully_sharded(mesh: jax.sharding.Mesh, tree: Any, least: int = 2**14) -> Any:
    """Shardings that leave each device a part of every large array (FSDP): along the longest axis that `data` divides.

    Args:
      tree: of arrays or their shapes.
      least: elements of an array from which on it is split.
    """
    devices = mesh.shape["data"]

    def one(leaf: Any) -> jax.NamedSharding:
        able = [(size, -axis) for axis, size in enumerate(leaf.shape) if size % devices == 0]
        if not able or leaf.size < least or is_key(leaf):
            return replicated(mesh)
        return jax.NamedSharding(mesh, jax.P(*[None] * -max(able)[1], "data"))

    return jax.tree.map(one, tree)


# Arrays.


def is_key(leaf: Any) -> bool:
    """Whether an array, or a shape with a type, is of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def put(tree: Any, sharding: Any) -> Any:
    """Global arrays from a tree that every process holds whole, or that is global already.

    Args:
      sharding: one for all leaves, or a tree of them.
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
    whole = _gather(leaf) if is_global else np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """A copy of `tree` on every device of the mesh; the copy may be donated, the original stays."""
    # `may_alias=False` alone still shares the original's buffer where there are several devices.
    return put(jax.tree.map(jnp.copy, tree), replicated(mesh))


def place(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
    """`tree` on every device of the mesh, wherever it was; without a mesh, as it is."""
    return tree if mesh is None else put(tree, replicated(mesh))


def shard(mesh: jax.sharding.Mesh, local: Any) -> Any:
    """Global arrays from this process's rows of a batch, split over the axis `data`.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    if jax.process_count() > 1 and mesh.shape["replica"] > 1:
        raise ValueError(f"batch: expected all {mesh.size} devices on the axis `data`, given a mesh of {mesh.shape}")
    here = len(mesh.local_devices) // mesh.shape["replica"]
    rows = check.rows("batch", local)
    if rows % here:
        raise ValueError(f"batch: expected a multiple of the {here} devices of a process, given {rows} rows")
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(split(mesh), np.asarray(a)), local)


def gather(tree: Any, n: int | None = None) -> Any:
    """All arrays whole, as NumPy's, on every process.

    Args:
      n: rows of them, where `chunked` left more.
    """
    return jax.tree.map(lambda leaf: _gather(leaf)[:n] if n is not None else _gather(leaf), tree)


def _gather(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def local(tree: Any) -> Any:
    """This process's copies of arrays that are replicated, for computations that it makes alone."""
    if jax.process_count() == 1:
        return tree
    is_global = lambda leaf: isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return jax.tree.map(lambda leaf: leaf.addressable_data(0) if is_global(leaf) else leaf, tree)


def by_process(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` of arrays with a common leading axis, each process on its share of the rows, as on one.

    Args:
      function: on the host, such as an oracle: trees of arrays with n rows -> tree of arrays with n rows, of 32 bits at
        most.
    """
    here = lambda *inputs: jax.tree.map(np.asarray, function(*inputs))
    n, processes = check.rows("by_process: inputs", inputs), jax.process_count()
    if processes == 1 or n == 0:
        return here(*inputs)
    # Equal shares, the last rows again where they do not come out even.
    size = -(-n // processes)
    rows = np.minimum(np.arange(size) + size * jax.process_index(), n - 1)
    mine = everywhere(lambda: here(*jax.tree.map(lambda a: a[rows], inputs)))
    whole = lambda a: np.asarray(a).reshape(-1, *a.shape[2:])[:n]
    return jax.tree.map(whole, multihost_utils.process_allgather(mine))


def split_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Inside `jit`: the batch split over the axis `data`; what has no axis for it is left to the compiler.

    Raises:
      ValueError: the batch is not divided by the devices.
    """
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim}
    devices = mesh.shape["data"]
    if uneven := [size for size in sizes if size % devices]:
        raise ValueError(f"batch: expected a multiple of the mesh's {devices} devices, given {uneven[0]} examples")
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
    """`vmap(function)(inputs)`, in chunks that stay in the cache (or in memory), split over the devices of a mesh.

    Without a collective where the devices divide the examples, or the results are not cut.

    Args:
      function: of one example.
      inputs: a pytree of arrays with a common leading axis of n examples; results do not depend on chunks or devices.
      chunk: most examples at a time and device, >= 1; n is padded to equal chunks with copies of the last example.
      cut: False leaves the results of these copies at the end: rows that the devices do not divide could not stay where
        they are.  `gather(results, n)` cuts them off outside of the program.
    """
    check.number("chunked: chunk", chunk, at_least=1, whole=True)
    n = check.number("chunked: examples", check.rows("chunked: inputs", inputs), at_least=1, whole=True)
    devices = 1 if mesh is None else mesh.size
    chunks = -(-n // (devices * chunk))
    size = -(-n // (devices * chunks))

    def here(parts: Any) -> Any:
        parts = jax.tree.map(lambda a: a.reshape(chunks, size, *a.shape[1:]), parts)
        outputs = jax.lax.map(jax.vmap(function), parts)
        return jax.tree.map(lambda a: a.reshape(chunks * size, *a.shape[2:]), outputs)

    total = devices * chunks * size
    if total != n:
        inputs = jax.tree.map(lambda a: a[jnp.minimum(jnp.arange(total), n - 1)], inputs)
    if mesh is not None:
        each = jax.P(EVERY_DEVICE)
        here = jax.shard_map(here, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)
    outputs = here(inputs)
    return jax.tree.map(lambda a: a[:n], outputs) if cut and total != n else outputs
