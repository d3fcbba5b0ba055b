"""The processes of a run, one a host: how they start, who they are, and how they agree.

All processes run the same program on the same arguments.  Users find these names in `gendiff.distributed`.
"""

import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gendiff import command

T = TypeVar("T")


class StartError(Exception):
    """The processes of a run cannot find each other."""


class Disagreement(Exception):
    """The processes of a run have different arguments."""


class Elsewhere(Exception):
    """Another process of the run failed, with this message."""


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
