"""The manifest of a checkpoint: the name, type, shape and checksum of every array, and a checksum of all of that.

A checkpoint whose files do not agree with its manifest is damaged; one whose manifest does not agree with a state is of
another configuration.
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
"""Of what this version writes.  It also reads format 1, whose notes have no checksum, but no later format."""


class Damaged(Exception):
    """The files of a checkpoint do not agree with its manifest."""


class Stored(NamedTuple):
    """A verified checkpoint."""

    tree: Any
    """Nested dicts and lists of NumPy arrays."""
    notes: dict[str, Any]
    keys: dict[str, str] | None
    """The implementation of the arrays, by name, that are typed PRNG keys; None if unknown (format 1)."""


def check_containers(tree: Any, where: str = "") -> None:
    """Refuse what would come back from a file as something else.

    Raises:
      ValueError: a key is no text, a container is neither a dict nor a list, or a leaf is no array or number.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(key, str) or not _encodes(key):
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
    """The leaves of a pytree by name, such as `params.layers.0.kernel`: Orbax names them so.

    Raises:
      ValueError: two leaves have one name, so Orbax would write one over the other.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"checkpoint: arrays must have different names, got {name!r} twice: use keys without dots")
        leaves[name] = leaf
    return leaves


def keys(tree: Any) -> dict[str, str]:
    """The implementation of every leaf that is an array of typed PRNG keys, by name."""
    return {name: str(jax.random.key_impl(leaf)) for name, leaf in named(tree).items() if distributed.is_key(leaf)}


def write(tree: Any, notes: dict[str, Any], keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The manifest of NumPy arrays, as JSON holds it.

    Args:
      tree: any pytree, typed PRNG keys as their data.
      notes: values that JSON can hold.
      keys: of the tree before that.

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
        same = json.loads(json.dumps(notes))
        text = json.dumps({"arrays": arrays, "keys": dict(keys or {}), "notes": notes})
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: notes must be values that JSON can hold, got others ({error})") from None
    if not _same(same, notes):
        raise ValueError(
            f"checkpoint: notes must come back from JSON as they are, got {notes!r}, which becomes {same!r}"
        )
    # A text, because its checksum must not depend on how Orbax writes a dict.
    return {"format": FORMAT, "manifest": text, "crc32": zlib.crc32(text.encode())}


def _same(one: Any, two: Any) -> bool:
    """Whether two values are equal as JSON has them: a tuple is no list, 1 as a key is no text, NaN is NaN."""
    if isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in two)
    if isinstance(two, list):
        return all(map(_same, one, two))
    return bool(one == two or (one != one and two != two))


def _encodes(key: str) -> bool:
    """Whether a text is Unicode: half an emoji is not, and no file system stores it."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    """The tree with a zero in place of every array of size 0, because Orbax refuses those."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else np.zeros(1, leaf.dtype), tree)


def verify(tree: Any, written: Any, order: list[str] | None = None) -> Stored:
    """Compare what came back from a file with its manifest.

    Args:
      tree: nested dicts and lists of NumPy arrays.
      written: by `write`, or by format 1.
      order: the names of the state that format 1 was written from, whose order its checksums have; None: of `tree`.

    Raises:
      Damaged: they do not agree.  A damaged `written` may also raise any other exception.
    """
    found = named(tree)
    if written.get("format", 0) < FORMAT:
        return _verify_1(tree, written, list(found) if order is None else order)
    if zlib.crc32(written["manifest"].encode()) != written["crc32"]:
        raise Damaged
    held = json.loads(written["manifest"])
    if {*found} != {*held["arrays"]}:
        raise Damaged
    for name, (dtype, shape, checksum) in held["arrays"].items():
        leaf = found[name] = found[name] if 0 not in shape else np.zeros(shape, found[name].dtype)
        if [str(leaf.dtype), list(leaf.shape), _checksum(leaf)] != [dtype, shape, checksum]:
            raise Damaged
    return Stored(jax.tree.unflatten(jax.tree.structure(tree), found.values()), held["notes"], held["keys"])


def _verify_1(tree: Any, written: dict[str, Any], order: list[str]) -> Stored:
    """Format 1 has a list of checksums, and the shapes of arrays of size 0 by path."""
    empty = written.get("empty", {})
    shaped = lambda path, leaf: np.zeros(empty[path], leaf.dtype) if path in empty else leaf
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: shaped(jax.tree_util.keystr(path), leaf), tree)
    found = named(tree)
    # The arrays of another state cannot be compared, and `check` refuses them.
    if {*order} == {*found} and written["checksums"] != [_checksum(found[name]) for name in order]:
        raise Damaged
    own = ("format", "checksums", "empty")
    return Stored(tree, {name: value for name, value in written.items() if name not in own}, None)


def difference(stored: Stored, like: Any) -> str:
    """How the arrays of a checkpoint differ from those of a state in names, types and shapes; "" if they do not."""
    own = keys(like)
    wanted = {name: _described(_data(leaf), own.get(name)) for name, leaf in named(like).items()}
    known = own if stored.keys is None else stored.keys
    found = {name: _described(leaf, known.get(name)) for name, leaf in named(stored.tree).items()}
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    told = [f"{name} must be {wanted.get(name, 'absent')}, got {found.get(name, 'none')}" for name in names[:3]]
    return "; ".join(told) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _data(leaf: Any) -> Any:
    if distributed.is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _described(leaf: Any, keys: str | None) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}" + (f" (keys of {keys})" if keys else "")
