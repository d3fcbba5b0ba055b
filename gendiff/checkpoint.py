"""Checkpoints: complete or absent, verified when read.  Only this file imports Orbax.

Orbax writes into a temporary folder and renames it at the end, so a killed save leaves no folder that looks complete.
The metadata hold a manifest (`gendiff.manifest`), so that damage is found.

All processes of a run save and read at the same calls, in one file system.  A checkpoint serves any number of processes
and devices, because it holds complete arrays.
"""

import contextlib
import errno
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gendiff import distributed, manifest
from gendiff.data import files
from gendiff.manifest import FORMAT, Stored

Tree = TypeVar("Tree")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; earlier checkpoints are untouched."""


def save(folder: Path, tree: Any, **notes: Any) -> None:
    """Write a new checkpoint.

    Args:
      tree: nested dicts (keys: text) and lists of arrays and numbers.
      notes: values that JSON can hold.

    Raises:
      ValueError: `load` cannot return the same tree or notes.
      CheckpointError: the file system refuses.
    """
    manifest.check_containers(tree)
    tree = distributed.gather(tree)
    metadata = manifest.write(tree, notes)
    with _writing(folder):
        _check_room(folder.parent, tree)
        ocp.save(folder.absolute(), manifest.filled(tree), custom_metadata=metadata)
        _sync(folder)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Read the tree, of NumPy arrays, and the notes.

    Raises:
      CheckpointError: the checkpoint is damaged, or of a later gendiff.
    """
    stored = _read(folder)
    return stored.tree, stored.notes


class Checkpoints:
    """The newest `keep` checkpoints of a training run, by step, written in the background."""

    _newest: ClassVar["Checkpoints | None"] = None
    """The last one that began to write, of several processes."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._writing: tuple[int, Any] | None = None

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Begin to write a state (any pytree of arrays and keys), and the position of `data` if it has `get_state`.

        Raises:
          ValueError: `restore` cannot return the same arrays.
          CheckpointError: this write cannot begin, or the previous one failed.
        """
        data_of = lambda leaf: jax.random.key_data(leaf) if distributed.is_key(leaf) else leaf
        # Copy, because the next step donates the state's buffers.
        arrays = jax.tree.map(np.array, distributed.gather(jax.tree.map(data_of, state)))
        position = data.get_state() if hasattr(data, "get_state") else None
        metadata = manifest.write(arrays, {"data": position}, manifest.keys(state))
        self._finish()
        if jax.process_count() > 1:
            # Finish the previous write first, because two concurrent Orbax saves deadlock across processes.
            if Checkpoints._newest is not None:
                Checkpoints._newest._finish()
            Checkpoints._newest = self
        with _writing(self.folder / str(step)):
            _check_room(self.folder, arrays)
            if self._checkpointer is None:
                self._checkpointer = self._open()
            filled = manifest.filled(arrays)
            self._writing = step, self._checkpointer.save_async(step, filled, custom_metadata=metadata, overwrite=True)

    def _finish(self) -> None:
        if self._writing is None:
            return
        (step, response), self._writing = self._writing, None
        with _writing(self.folder / str(step)):
            response.result()
            _sync(self.folder / str(step))

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """On exit wait for pending writes, also after an error, then re-raise that error."""
        try:
            yield
        except distributed.Preempted:  # whose message says that all is written
            self.close()
            raise
        except BaseException as error:
            if not _lost(error):  # because a write needs all processes
                with contextlib.suppress(Exception):
                    self.close()
            raise
        self.close()

    def close(self) -> None:
        """Wait for pending writes; raises CheckpointError if one fails."""
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
        """The newest checkpoint in the structure and sharding of `state`, or `state` without checkpoints.

        Raises:
          CheckpointError: the checkpoint is damaged, or its arrays have other names, shapes or types than `state`.
        """
        step = self.latest()
        # Compare, because a shared file system may lag on a host.
        distributed.agree(f"checkpoint {self.folder}: the newest step", str(step))
        if step is None:
            return state
        folder = self.folder / str(step)
        wanted = manifest.named(state)
        stored = _read(folder, order=list(wanted))
        _check_like(folder, stored, state)
        arrays = manifest.named(stored.tree)
        if stored.notes.get("data") is not None and hasattr(data, "set_state"):
            data.set_state(stored.notes["data"])
        leaves = [_as(arrays[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def latest(self) -> int | None:
        """The newest step; None without checkpoints."""
        self.close()
        if not self.folder.exists():
            return None
        with _reading(self.folder), self._open() as checkpointer:
            return None if checkpointer.latest is None else checkpointer.latest.step


def _as(value: np.ndarray, like: Any) -> Any:
    """`value` as a key, and on the devices, of `like`."""
    if not isinstance(like, jax.Array):
        return value
    array: Any = value
    if distributed.is_key(like):
        array = jax.random.wrap_key_data(jax.numpy.asarray(value), impl=jax.random.key_impl(like))
    return distributed.put(array, like.sharding)


class Archive:
    """The results of an experiment's named phases, computed once and stored in a folder.

    `Archive(None)` stores nothing, so that a method reads the same without a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        """Wall-clock time of the phases, stored with their results; of a resumed phase, since it was resumed."""

    def once(self, name: str, compute: Callable[[], Any], kind: Callable[..., Any] = dict, like: Any = None) -> Any:
        """`compute()`, or its result of an earlier run.

        Args:
          name: of the phase, such as "round-1/draws", a folder of the archive.
          compute: returns a dict, or a NamedTuple of type `kind`, of (nested dicts and lists of) arrays and numbers.
          like: a tree with the names, shapes and types of the result; None: any.

        Raises:
          CheckpointError: the stored result is damaged, or has other fields than `kind` or other arrays than `like`.
        """
        distributed.stop_if_preempted("every phase that was finished")
        stored = self.held(name, kind, like)
        if stored is not None:
            return stored
        start = time.perf_counter()
        result = jax.block_until_ready(compute())
        return self.keep(name, result, time.perf_counter() - start, kind)

    def held(self, name: str, kind: Callable[..., Any] = dict, like: Any = None) -> Any:
        """The result of an earlier run, or None; for arguments and errors see `once`."""
        folder = None if self.folder is None else self.folder / name / "result"
        if folder is None or not distributed.first(folder.exists):
            return None
        stored = _read(folder)
        if not isinstance(stored.notes.get("seconds"), int | float):  # format 1 has no checksum of its notes
            raise _damaged(folder)
        if like is not None:
            _check_like(folder, stored, like)
        try:
            result = kind(**stored.tree)
        except TypeError as error:
            fields = ", ".join(stored.tree)
            raise CheckpointError(
                f"checkpoint {folder}: must have the fields of {kind.__name__}, got {fields} ({error}). It is "
                "complete, but of another version: name another folder, or use the version that wrote it."
            ) from None
        self.seconds[name] = stored.notes["seconds"]
        return result

    def keep(self, name: str, result: Any, seconds: float, kind: Callable[..., Any] = dict) -> Any:
        """Store the result of a phase and its seconds, and return it as `once` does."""
        self.seconds[name] = seconds
        fields = result if isinstance(result, dict) else result._asdict()
        if self.folder is None:
            return result if jax.process_count() == 1 else kind(**distributed.gather(fields))
        phase = self.folder / name
        manifest.check_containers(fields)
        fields = distributed.gather(fields)
        save(phase / "result", fields, seconds=seconds)
        if jax.process_count() > 1:  # because all processes must go on with the same bits
            fields, _ = load(phase / "result")
        distributed.first(lambda: shutil.rmtree(phase / "steps", ignore_errors=True))
        return kind(**fields)

    def steps(self, name: str) -> Checkpoints | None:
        """Checkpoints of a phase's training, which `keep` removes."""
        return None if self.folder is None else Checkpoints(self.folder / name / "steps")


def _check_room(folder: Path, tree: Any) -> None:
    """Check on every process that the folder can be written and has room, because Orbax retries for minutes."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    def attempt() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".room-"):
            pass
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(errno.ENOSPC, f"free space must be >= {size:,} bytes, got {free:,}")

    distributed.everywhere(attempt)


def _sync(folder: Path) -> None:
    """Sync the metadata (20 ms), which Orbax does not, so that a checkpoint survives a crash of the machine."""
    if not distributed.is_first():
        return
    for path in folder.rglob("*METADATA"):
        files.sync(path)
        files.sync(path.parent)
    files.sync(folder.parent)


def _read(folder: Path, order: list[str] | None = None) -> Stored:
    """Read and verify a checkpoint; `order` is that of `manifest.verify`."""
    with _reading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Orbax warns that shapes and sharding are those of the file
        written = ocp.metadata(folder.absolute()).custom_metadata
        if written.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"checkpoint {folder}: format must be <= {FORMAT}, got {written['format']}: "
                "read it with a later gendiff"
            )
        tree = jax.tree.map(np.asarray, ocp.load(folder.absolute()))
        try:
            return manifest.verify(tree, written, order)
        except manifest.Damaged:
            raise _damaged(folder) from None


def _damaged(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder}: must have the checksums of its manifest, got others: the files are damaged. {DELETE}"
    )


def _check_like(folder: Path, stored: Stored, like: Any) -> None:
    if difference := manifest.difference(stored, like):
        raise CheckpointError(
            f"checkpoint {folder}: {difference}. It is complete, but of another configuration: name another folder, or "
            "use the configuration that wrote it."
        )


DELETE = "Delete this folder and run the same command again; the folders beside it stay."


def _reading(folder: Path) -> contextlib.AbstractContextManager[None]:
    return _failing(f"checkpoint {folder}: must be complete, got files that cannot be read", DELETE)


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    remedy = "The checkpoints before it are complete: free space or repair the cause, and run the same command again."
    return _failing(f"checkpoint {folder}: could not be written", remedy)


@contextlib.contextmanager
def _failing(problem: str, remedy: str) -> Iterator[None]:
    """Raise the many errors of Orbax and TensorStore as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if _lost(error):
            raise  # because the files are intact
        line = str(error).strip().partition("\n")[0][:300]  # TensorStore's lines are long
        raise CheckpointError(f"{problem} ({type(error).__name__}: {line}). {remedy}") from error


def _lost(error: BaseException) -> bool:
    """Return True if the error may mean that another process of the run is lost."""
    return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)
