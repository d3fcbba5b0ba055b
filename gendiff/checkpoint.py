"""Checkpoints: complete or absent, verified when read.  The only file that imports Orbax.

Orbax writes into a temporary folder and renames it at the end, so a killed save leaves nothing that looks complete.  A
checksum of every array stands in the checkpoint's metadata and is compared when it is read.

Where a run has several processes all of them save and read at the same calls, and need one file system.  Arrays are
written whole, so that a checkpoint serves any number of processes and devices.
"""

import contextlib
import errno
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gendiff import distributed

Tree = TypeVar("Tree")
FORMAT = 1
"""Of what this version writes; it reads no later ones."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what had been written before is untouched."""


def save(folder: Path, tree: Any, **notes: Any) -> None:
    """Writes nested dicts of arrays as a new checkpoint, with `notes` that JSON can hold."""
    tree = distributed.gather(tree)
    metadata = {"format": FORMAT, "checksums": _checksums(tree), "empty": _empty(tree), **notes}
    # Orbax refuses arrays of size 0: their shapes stand in the metadata, and a zero takes their place.
    tree = jax.tree.map(lambda leaf: leaf if leaf.size else np.zeros(1, leaf.dtype), tree)
    with _writing(folder):
        _check_room(folder.parent, tree)
        ocp.save(folder.absolute(), tree, custom_metadata=metadata)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` wrote: nested dicts of NumPy arrays, and the notes."""
    with _reading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it takes shapes and sharding from the file, as we want
        stored = ocp.metadata(folder.absolute()).custom_metadata
        _check_format(folder, stored)
        tree = jax.tree.map(np.asarray, ocp.load(folder.absolute()))
    empty = stored.get("empty", {}) if stored else {}
    shaped = lambda path, leaf: np.zeros(empty[path], leaf.dtype) if path in empty else leaf
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: shaped(jax.tree_util.keystr(path), leaf), tree)
    _verify(folder, tree, stored)
    return tree, {name: value for name, value in stored.items() if name not in ("format", "checksums", "empty")}


class Checkpoints:
    """The checkpoints of one training run, by step, written in the background.

    Args:
      keep: how many of the newest are kept.
    """

    _newest: ClassVar["Checkpoints | None"] = None
    """Of a process among several: what was last begun to be written."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._writing: tuple[int, Any] | None = None

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Begins to write a state (any pytree of arrays and keys), and the position of `data` if it has `get_state`.

        Raises:
          CheckpointError: this one cannot be begun, or the last one was not written.
        """
        # A copy: the state's own buffers are donated to the next step.
        whole = jax.tree.map(np.array, distributed.gather(_without_keys(state)))
        position = data.get_state() if hasattr(data, "get_state") else None
        self._finish()
        if jax.process_count() > 1:
            # Orbax numbers its barriers by the newest operation of a process: of two writes under way, those of the
            # older one would have other names on each process, and never meet.
            if Checkpoints._newest is not None:
                Checkpoints._newest._finish()
            Checkpoints._newest = self
        metadata = {"format": FORMAT, "checksums": _checksums(whole), "data": position}
        with _writing(self.folder / str(step)):
            _check_room(self.folder, whole)
            if self._checkpointer is None:
                self._checkpointer = self._open()
            self._writing = step, self._checkpointer.save_async(step, whole, custom_metadata=metadata, overwrite=True)

    def _finish(self) -> None:
        if self._writing is None:
            return
        (step, response), self._writing = self._writing, None
        with _writing(self.folder / str(step)):
            response.result()

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """What was begun in it is written at its end, also when something fails, which stays what is raised."""
        try:
            yield
        except distributed.Preempted:  # which says what is written
            self.close()
            raise
        except BaseException as error:
            if not _lost(error):  # else nobody is there to write it with
                with contextlib.suppress(Exception):
                    self.close()
            raise
        self.close()

    def close(self) -> None:
        """Waits until everything that was begun is written.

        Raises:
          CheckpointError: it could not be.
        """
        try:
            self._finish()
        finally:
            checkpointer, self._checkpointer = self._checkpointer, None
            if checkpointer is not None:
                checkpointer.close()

    def _open(self) -> ocp.training.Checkpointer:
        newest = ocp.training.preservation_policies.LatestN(self.keep)
        return ocp.training.Checkpointer(self.folder.absolute(), preservation_policy=newest)

    def restore(self, state: Tree, data: Any = None) -> Tree:
        """The newest checkpoint in the structure, types and sharding of `state`, or `state` itself if there is none."""
        step = self.latest()
        distributed.agree(f"checkpoint {self.folder}: the newest step", str(step))  # a file system may lag on a host
        if step is None:
            return state
        folder = self.folder / str(step)
        like = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(_without_keys, state))
        with _reading(folder), self._open() as checkpointer:
            stored = checkpointer.metadata(step).custom_metadata
            _check_format(folder, stored)
            restored = checkpointer.load(step, like)
        _verify(folder, restored, stored)
        if stored and stored.get("data") is not None and hasattr(data, "set_state"):
            data.set_state(stored["data"])
        return jax.tree.map(_as, restored, state)

    def latest(self) -> int | None:
        """The newest step, or None."""
        self.close()
        if not self.folder.exists():
            return None
        with self._open() as checkpointer:
            return None if checkpointer.latest is None else checkpointer.latest.step


def _without_keys(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if distributed.is_key(leaf) else leaf, tree)


def _as(value: np.ndarray, like: jax.Array) -> jax.Array:
    """`value` as an array like another: a key if that is one, on its devices."""
    whole: Any = value
    if distributed.is_key(like):
        whole = jax.random.wrap_key_data(jax.numpy.asarray(value), impl=jax.random.key_impl(like))
    return distributed.put(whole, like.sharding)


class Archive:
    """The results of an experiment's named phases, each computed once and kept in a folder.

    `Archive(None)` keeps nothing, so that a method reads the same with and without.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        """Wall-clock time of each phase, from its first computation also when it was read; of a phase that was stopped
        and resumed, the time since it was resumed."""

    def once(self, name: str, compute: Callable[[], Any], kind: Callable[..., Any] = dict) -> Any:
        """`compute()`, or what it gave in an earlier run.

        Args:
          name: of the phase, such as "round-1/draws"; a folder below the archive's.
          compute: gives a dict, or a NamedTuple of type `kind`, of (nested dicts of) arrays and numbers.
        """
        distributed.stop_if_preempted("every phase that was finished")
        phase = None if self.folder is None else self.folder / name
        if phase is not None and distributed.first((phase / "result").exists):
            fields, notes = load(phase / "result")
            self.seconds[name] = notes["seconds"]
            return kind(**fields)
        begun = time.perf_counter()
        result: Any = jax.block_until_ready(compute())
        self.seconds[name] = time.perf_counter() - begun
        fields = distributed.gather(result if isinstance(result, dict) else result._asdict())
        if phase is None:
            return result if jax.process_count() == 1 else kind(**fields)
        save(phase / "result", fields, seconds=self.seconds[name])
        if jax.process_count() > 1:  # all go on with the same bits, whatever each computed
            fields, _ = load(phase / "result")
        # The way to a result need not be kept once the result is.
        distributed.first(lambda: shutil.rmtree(phase / "steps", ignore_errors=True))
        return kind(**fields)

    def steps(self, name: str) -> Checkpoints | None:
        """Checkpoints for the training run of a phase; they go once the phase's result is stored."""
        return None if self.folder is None else Checkpoints(self.folder / name / "steps")


def _check_format(folder: Path, stored: Any) -> None:
    given = (stored or {}).get("format", 0)
    if given > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder}: expected format {FORMAT} or earlier, given {given}, of a later gendiff"
        )


def _check_room(folder: Path, tree: Any) -> None:
    """Makes and removes a folder there and asks whether the arrays fit, on every process: Orbax tries again and again
    for minutes where one cannot write."""
    wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".room-"):
            pass
        if (free := shutil.disk_usage(folder).free) < wanted:
            raise OSError(errno.ENOSPC, f"expected room for {wanted:,} bytes, given {free:,}")

    distributed.everywhere(make)


def _checksums(tree: Any) -> list[int]:
    # Nested dicts come back from a file with sorted keys, which is the order of `jax.tree.leaves`.
    return [zlib.crc32(np.ascontiguousarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def _empty(tree: Any) -> dict[str, list[int]]:
    """The shapes of the arrays of size 0, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves if leaf.size == 0}


def _verify(folder: Path, tree: Any, stored: Any) -> None:
    if not stored or stored.get("checksums") != _checksums(tree):
        raise CheckpointError(
            f"checkpoint {folder}: expected the checksums it was written with, given other contents: the files are "
            "damaged. Delete this folder and run the same command again; what is beside it is kept."
        )


def _reading(folder: Path) -> contextlib.AbstractContextManager[None]:
    return _failing(
        f"checkpoint {folder}: expected a complete checkpoint of this run, given one that cannot be read",
        "Delete this folder and run the same command again; what is beside it is kept.",
    )


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return _failing(
        f"checkpoint {folder}: could not be written",
        "What was stored before is complete: make room or mend the cause, and run the same command again.",
    )


@contextlib.contextmanager
def _failing(problem: str, remedy: str) -> Iterator[None]:
    """Orbax and TensorStore raise many types: they become one, and the cause stays attached."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if _lost(error):
            raise  # there is nothing wrong with the files
        raise CheckpointError(f"{problem} ({_first_line(error)}). {remedy}") from error


def _lost(error: BaseException) -> bool:
    """Whether it may mean that another process of the run was lost."""
    return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
