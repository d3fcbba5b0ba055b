"""Checkpoints: complete or absent, verified when read.  The only file that imports Orbax.

Orbax writes into a temporary folder and renames it at the end, so a killed save leaves nothing that looks complete.
A manifest (gendiff.manifest) stands in its metadata, so a checkpoint comes back as it was written, or not at all.

Where a run has several processes all of them save and read at the same calls, and need one file system.  Arrays are
written whole, so that a checkpoint serves any number of processes and devices.
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
    """A checkpoint could not be written or read; what had been written before is untouched."""


def save(folder: Path, tree: Any, **notes: Any) -> None:
    """Write a new checkpoint.

    Args:
      tree: nested dicts (keys: text) and lists of arrays and numbers.
      notes: values that JSON can hold.

    Raises:
      ValueError: `load` could not return the same tree or notes.
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
    """Read the tree (of NumPy arrays) and the notes that `save` wrote.

    Raises:
      CheckpointError: the checkpoint is damaged, or of a later gendiff.
    """
    stored = _read(folder)
    return stored.tree, stored.notes


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
        """Begin to write a state (any pytree of arrays and keys), and the position of `data` if it has `get_state`.

        Raises:
          ValueError: `restore` could not return the same arrays.
          CheckpointError: this one cannot be begun, or the last one was not written.
        """
        # A copy: the state's own buffers are donated to the next step.
        whole = jax.tree.map(np.array, distributed.gather(_without_keys(state)))
        position = data.get_state() if hasattr(data, "get_state") else None
        metadata = manifest.write(whole, {"data": position}, manifest.keys(state))
        self._finish()
        if jax.process_count() > 1:
            # Orbax numbers its barriers by the newest operation of a process: of two writes under way, those of the
            # older one would have other names on each process, and never meet.
            if Checkpoints._newest is not None:
                Checkpoints._newest._finish()
            Checkpoints._newest = self
        with _writing(self.folder / str(step)):
            _check_room(self.folder, whole)
            if self._checkpointer is None:
                self._checkpointer = self._open()
            filled = manifest.filled(whole)
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
        """The newest checkpoint in the structure and sharding of `state`, or `state` itself if there is none.

        Raises:
          CheckpointError: it is damaged, or holds arrays of other names, shapes or types than `state`.
        """
        step = self.latest()
        distributed.agree(f"checkpoint {self.folder}: the newest step", str(step))  # a file system may lag on a host
        if step is None:
            return state
        folder = self.folder / str(step)
        stored = _read(folder, order=list(manifest.named(state)))
        _check_like(folder, stored, state)
        found = manifest.named(stored.tree)
        if stored.notes.get("data") is not None and hasattr(data, "set_state"):
            data.set_state(stored.notes["data"])
        leaves = [_as(found[name], leaf) for name, leaf in manifest.named(state).items()]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def latest(self) -> int | None:
        """The newest step, or None."""
        self.close()
        if not self.folder.exists():
            return None
        with _reading(self.folder), self._open() as checkpointer:
            return None if checkpointer.latest is None else checkpointer.latest.step


def _without_keys(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if distributed.is_key(leaf) else leaf, tree)


def _as(value: np.ndarray, like: Any) -> Any:
    """`value` as an array like another: a key if that is one, on its devices."""
    if not isinstance(like, jax.Array):
        return value
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

    def once(self, name: str, compute: Callable[[], Any], kind: Callable[..., Any] = dict, like: Any = None) -> Any:
        """`compute()`, or its result of an earlier run.

        Args:
          name: of the phase, such as "round-1/draws"; a folder below the archive's.
          compute: gives a dict, or a NamedTuple of type `kind`, of (nested dicts and lists of) arrays and numbers.
          like: a tree with the names, shapes and types of the result, where they are known before; None: any.

        Raises:
          CheckpointError: the stored result is damaged, or has other fields than `kind` or other arrays than `like`.
        """
        distributed.stop_if_preempted("every phase that was finished")
        stored = self.held(name, kind, like)
        if stored is not None:
            return stored
        begun = time.perf_counter()
        result = jax.block_until_ready(compute())
        return self.keep(name, result, time.perf_counter() - begun, kind)

    def held(self, name: str, kind: Callable[..., Any] = dict, like: Any = None) -> Any:
        """The result of an earlier run, or None; arguments and errors of `once`."""
        folder = None if self.folder is None else self.folder / name / "result"
        if folder is None or not distributed.first(folder.exists):
            return None
        stored = _read(folder)
        if not isinstance(stored.notes.get("seconds"), int | float):  # format 1 has no checksum of its notes
            raise _damaged(folder)
        if like is not None:
            _check_like(folder, stored, like)
        result = _built(folder, kind, stored.tree)
        self.seconds[name] = stored.notes["seconds"]
        return result

    def keep(self, name: str, result: Any, seconds: float, kind: Callable[..., Any] = dict) -> Any:
        """Store the result of a phase that took so many seconds, and return it as `once` does."""
        self.seconds[name] = seconds
        own = result if isinstance(result, dict) else result._asdict()
        if self.folder is None:
            return result if jax.process_count() == 1 else kind(**distributed.gather(own))
        phase = self.folder / name
        manifest.check_containers(own)
        fields = distributed.gather(own)
        save(phase / "result", fields, seconds=seconds)
        if jax.process_count() > 1:  # all go on with the same bits, whatever each computed
            fields, _ = load(phase / "result")
        # The way to a result need not be kept once the result is.
        distributed.first(lambda: shutil.rmtree(phase / "steps", ignore_errors=True))
        return kind(**fields)

    def steps(self, name: str) -> Checkpoints | None:
        """Checkpoints for the training run of a phase; they go once the phase's result is stored."""
        return None if self.folder is None else Checkpoints(self.folder / name / "steps")


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


def _sync(folder: Path) -> None:
    """Make a checkpoint survive a crash of the machine; 20 ms.  TensorStore syncs the arrays, Orbax no metadata."""
    if not distributed.is_first():
        return
    for path in folder.rglob("*METADATA"):
        files.sync(path)
        files.sync(path.parent)
    files.sync(folder.parent)


def _read(folder: Path, order: list[str] | None = None) -> Stored:
    """Read and verify a checkpoint; `order` is that of `manifest.verify`."""
    with _reading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it takes shapes and sharding from the file, as we want
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
        f"checkpoint {folder}: must have the checksums that it was written with, got others: the files are damaged. "
        f"{DELETE}"
    )


def _check_like(folder: Path, stored: Stored, like: Any) -> None:
    if difference := manifest.difference(stored, like):
        raise CheckpointError(
            f"checkpoint {folder}: {difference}. It is complete, but of another configuration: name another folder, or "
            "use the configuration that wrote it."
        )


def _built(folder: Path, kind: Callable[..., Any], fields: dict[str, Any]) -> Any:
    """`kind(**fields)` of a stored result."""
    try:
        return kind(**fields)
    except TypeError as error:
        raise CheckpointError(
            f"checkpoint {folder}: must have the fields of {kind.__name__}, got {', '.join(fields)} ({error}). It is "
            "complete, but of another version: name another folder, or use the version that wrote it."
        ) from None


DELETE = "Delete this folder and run the same command again; what is beside it is kept."


def _reading(folder: Path) -> contextlib.AbstractContextManager[None]:
    return _failing(
        f"checkpoint {folder}: must be complete, got files that cannot be read",
        DELETE,
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
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"  # TensorStore's lines are long
