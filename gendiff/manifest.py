"""The manifest of a checkpoint: the name, type, shape and checksum of every array, with its own checksum.

If the files differ from the manifest, the checkpoint is damaged; if a state does, it is of another configuration.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore

from gendiff import distributed

FORMAT = 2
"""The format that this version writes.  It also reads format 1, which has no checksum of the notes."""


class Damaged(Exception):
    """The files of a checkpoint differ from its manifest."""


class Stored(NamedTuple):
    """A verified checkpoint."""

    tree: Any
    """Nested dicts and lists of NumPy arrays."""
    notes: dict[str, Any]
    keys: dict[str, str] | None
    """Name -> implementation of the typed PRNG keys; None if unknown (format 1)."""


def check_containers(tree: Any, where: str = "") -> None:
    """Refuse containers and leaves that a file would not return as they are.

    Raises:
      ValueError: a key is no text, a container is neither a dict nor a list, or a leaf is no array or number.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            # No file system stores a lone surrogate, which `encode` drops here.
            if not isinstance(key, str) or key != key.encode(errors="ignore").decode():
                raise ValueError(f"checkpoint: keys of {where or 'the tree'} must be text, got {key!r}: use str(key)")
            check_containers(value, f"{where}.{key}" if where else key)
    elif type(tree) is list:
        for i, value in enumerate(tree):
            check_containers(value, f"{where}.{i}")
    elif distributed.is_key(tree):
        raise ValueError(f"checkpoint: {where} must be an array, got PRNG keys: save jax.random.key_data of them")
    elif tree is not None and not (hasattr(tree, "dtype") or isinstance(tree, bool | int | float | complex)):
        raise ValueError(f"checkpoint: {where} must be an array, a dict or a list, got {type(tree).__name__}")


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by Orbax's names, such as `params.layers.0.kernel`.

    Raises:
      ValueError: two leaves have one name, so Orbax would overwrite the first.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"checkpoint: arrays must have different names, got {name!r} twice: use keys without dots")
        leaves[name] = leaf
    return leaves


def keys(tree: Any) -> dict[str, str]:
    """Name -> implementation of the leaves that are typed PRNG keys."""
    return {name: str(jax.random.key_impl(leaf)) for name, leaf in named(tree).items() if distributed.is_key(leaf)}


def write(tree: Any, notes: dict[str, Any], keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The manifest of a tree, for JSON.

    Args:
      tree: any pytree of NumPy arrays; of PRNG keys, their data.
      notes: values that JSON can hold.
      keys: the implementations of the PRNG keys (`keys`).

    Raises:
      ValueError: an array or the notes cannot be stored.
    """
    arrays = {}
    for name, leaf in named(tree).items():
        if not _storable(leaf.dtype):
            raise ValueError(
                f"checkpoint: {name or 'the array'} must be numbers or Booleans in a type of TensorStore and the byte "
                f"order of this machine, got {leaf.dtype}: convert it with astype"
            )
        arrays[name] = [str(leaf.dtype), list(leaf.shape), _checksum(leaf)]
    if not arrays:
        raise ValueError("checkpoint: the tree must have at least one array, got none")
    try:
        read = json.loads(json.dumps(notes))
        text = json.dumps({"arrays": arrays, "keys": dict(keys or {}), "notes": notes})
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: notes must be values that JSON can hold, got others ({error})") from None
    if not _same(read, notes):
        raise ValueError(
            f"checkpoint: notes must come back from JSON as they are, got {notes!r}, which becomes {read!r}"
        )
    # A text, because its checksum must not depend on Orbax's order of a dict.
    return {"format": FORMAT, "manifest": text, "crc32": zlib.crc32(text.encode())}


def _same(read: Any, notes: Any) -> bool:
    """Return True for equal values of JSON: a tuple is no list, 1 as a key is no text, NaN equals NaN."""
    if isinstance(notes, dict):
        return read.keys() == notes.keys() and all(_same(read[key], notes[key]) for key in notes)
    if isinstance(notes, list):
        return all(map(_same, read, notes))
    return bool(read == notes or (read != read and notes != notes))


def _storable(dtype: np.dtype) -> bool:
    if not dtype.isnative or dtype.names or dtype.kind in "OSUMm":
        return False
    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):  # such as long doubles
        return False
    return True


def _checksum(leaf: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).tobytes())


def filled(tree: Any) -> Any:
    """Replace every array of size 0 by a zero, because Orbax refuses empty arrays."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else np.zeros(1, leaf.dtype), tree)


def verify(tree: Any, written: Any, order: list[str] | None = None) -> Stored:
    """Compare the arrays of a file with its manifest.

    Args:
      tree: nested dicts and lists of NumPy arrays.
      written: the manifest, of `write` or of format 1.
      order: names of the state's arrays, in the order of format 1's checksums; None: the order of `tree`.

    Raises:
      Damaged: they differ.  A damaged `written` may also raise any other exception.
    """
    arrays = named(tree)
    if written.get("format", 0) < FORMAT:
        return _verify_1(tree, written, list(arrays) if order is None else order)
    if zlib.crc32(written["manifest"].encode()) != written["crc32"]:
        raise Damaged
    held = json.loads(written["manifest"])
    if {*arrays} != {*held["arrays"]}:
        raise Damaged
    for name, (dtype, shape, checksum) in held["arrays"].items():
        leaf = arrays[name] = arrays[name] if 0 not in shape else np.zeros(shape, arrays[name].dtype)
        if [str(leaf.dtype), list(leaf.shape), _checksum(leaf)] != [dtype, shape, checksum]:
            raise Damaged
    return Stored(jax.tree.unflatten(jax.tree.structure(tree), arrays.values()), held["notes"], held["keys"])


def _verify_1(tree: Any, written: dict[str, Any], order: list[str]) -> Stored:
    """Format 1: a list of checksums, and the shapes of empty arrays by path."""
    empty = written.get("empty", {})
    shaped = lambda path, leaf: np.zeros(empty[path], leaf.dtype) if path in empty else leaf
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: shaped(jax.tree_util.keystr(path), leaf), tree)
    arrays = named(tree)
    # The checksums of a state with other names cannot be compared; `difference` refuses it.
    if {*order} == {*arrays} and written["checksums"] != [_checksum(arrays[name]) for name in order]:
        raise Damaged
    own = ("format", "checksums", "empty")
    return Stored(tree, {name: value for name, value in written.items() if name not in own}, None)


def difference(stored: Stored, like: Any) -> str:
    """Describe the arrays of a checkpoint whose name, type or shape differs from a state's; "" if none does."""
    own = keys(like)
    wanted = {name: _described(leaf, own.get(name)) for name, leaf in named(like).items()}
    known = own if stored.keys is None else stored.keys
    arrays = {name: _described(leaf, known.get(name)) for name, leaf in named(stored.tree).items()}
    names = [name for name in {**wanted, **arrays} if wanted.get(name) != arrays.get(name)]
    lines = [f"{name} must be {wanted.get(name, 'absent')}, got {arrays.get(name, 'none')}" for name in names[:3]]
    return "; ".join(lines) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _described(leaf: Any, keys: str | None) -> str:
    if distributed.is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype} {tuple(leaf.shape)}" + (f" (keys of {keys})" if keys else "")
