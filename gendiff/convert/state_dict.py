"""Readers of PyTorch's state dicts, and their conversion to Flax parameters."""

import importlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gendiff.data import DataError, regular
from gendiff.types import Params

StateDict: TypeAlias = dict[str, np.ndarray]
Name: TypeAlias = Callable[[tuple[str, ...]], str]
"""A function from the path of a Flax leaf to the key of a state dict."""

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes of all keys, from DataParallel, `torch.compile` and a module around the network."""
SHOWN = 10
"""Largest number of keys of a kind in an error."""
NUMBERS: dict[str, Any] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "BOOL": "?", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
"""Number types of safetensors files."""


def read(file: str | Path, part: str | None = None) -> StateDict:
    """Read the arrays of a checkpoint in float32, `.safetensors` or PyTorch's own; run no code of the file.

    Args:
      file: a safetensors file, or a state dict or `dict(model.named_parameters())` stored by `torch.save`.
      part: key of a state dict, if the checkpoint is a dict of state dicts; safetensors files have no parts.

    Raises:
      DataError: the file is missing, damaged or not a checkpoint, or it, or its part, is not a flat dict of tensors.
        The message names the file and the cause.
    """
    path = regular(file)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    torch = _library("torch")
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many types; `_cause` drops torch's advice to run the file's code
        raise DataError(f"{file} must be a PyTorch checkpoint, got {_cause(path, error)}") from None
    if part is not None:
        found = state if isinstance(state, Mapping) else {}
        if not isinstance(found.get(part), Mapping):
            raise DataError(f"{file} must have a state dict {part!r}, got {_contents(state)}")
        state = found[part]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{file} must be a flat dict of tensors, got {_contents(state)}; name its part that is one")
    try:
        return unwrapped(state, ())
    except Exception as error:  # some tensors have no memory
        raise DataError(f"{file} must hold plain tensors, got others ({_line(error)})") from None


def unwrapped(state: Mapping[str, Any], wrappers: Iterable[str] = WRAPPERS) -> StateDict:
    """Return the arrays of a state dict in float32; remove wrappers from the keys if all keys have them.

    Args:
      state: arrays, or PyTorch's tensors and parameters.
      wrappers: prefixes to remove.
    """
    keys = [str(key) for key in state]
    while prefix := next((text for text in wrappers if keys and all(key.startswith(text) for key in keys)), None):
        keys = [key.removeprefix(prefix) for key in keys]
    return {key: _array(value) for key, value in zip(keys, state.values(), strict=True)}


def parameters(state: StateDict, like: Params, name: Name) -> Params:
    """Convert a state dict to parameters with the structure and shapes of `like`; use every key exactly once.

    Args:
      state: arrays in PyTorch's order of axes.
      like: `jax.eval_shape(net.init, key, x, t)`.
      name: function from a leaf's path to its key.

    Raises:
      ValueError: a key is missing, unknown, asked for twice or of another shape.  The message names up to SHOWN keys of
        a kind, and the common prefix of the unknown keys.
    """
    leaves, structure = jax.tree.flatten_with_path(like)
    keys = [name(tuple(part.key for part in path)) for path, _ in leaves]
    leaf_of = {key: leaf for key, (_, leaf) in zip(keys, leaves, strict=True) if key in state}
    arrays = {key: _laid_out(state[key], len(leaf.shape)) for key, leaf in leaf_of.items()}
    unknown = [key for key in state if key not in set(keys)]
    kinds = {
        "missing": [f"{key}: missing" for key in dict.fromkeys(keys) if key not in state],
        "unknown": [f"{key}: unknown" for key in unknown],
        "asked for again": [f"{key}: asked for {keys.count(key)} times" for key in leaf_of if keys.count(key) > 1],
        "of another shape": [
            f"{key}: must have shape {leaf_of[key].shape}, got {array.shape} (in our order)"
            for key, array in arrays.items()
            if array.shape != leaf_of[key].shape
        ],
    }
    if wrong := sum(map(len, kinds.values())):
        lines = []
        for kind, found in kinds.items():
            more = len(found) - SHOWN
            lines += found[:SHOWN] + [f".. and {more} more that are {kind}"] * (more > 0)
        if len(unknown) > 1 and (prefix := _shared(unknown)):
            lines.append(f"all unknown keys begin with {prefix!r}: take it off, or give the part that lacks it")
        shown = "\n  ".join(lines)
        raise ValueError(f"state dict: {wrong} keys must fit the network, got {len(state)} keys:\n  {shown}")
    return jax.tree.unflatten(structure, [np.array(arrays[key], np.float32) for key in keys])


def _shared(keys: list[str]) -> str:
    """Return the common prefix of all keys, up to a dot."""
    pairs = zip(min(keys).split(".")[:-1], max(keys).split(".")[:-1], strict=False)
    return "".join(f"{a}." for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _laid_out(array: np.ndarray, rank: int) -> np.ndarray:
    """Transpose (o, i, *window) to (*window, i, o); drop windows of 1 if the layer is a matrix product."""
    while array.ndim > max(rank, 2) and array.shape[-1] == 1:
        array = array[..., 0]
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim >= 2 else array


def _array(value: Any) -> np.ndarray:
    """Convert to float32; detach tensors first, because NumPy refuses gradients and PyTorch's bfloat16."""
    return np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value, np.float32)


def _safetensors(path: Path) -> StateDict:
    library = _library("safetensors")
    try:
        tensors = library.deserialize(path.read_bytes())  # bytes, because its NumPy reader lacks bfloat16
    except Exception as error:  # safetensors' own type
        raise DataError(f"{path} must be a safetensors checkpoint, got {_cause(path, error)}") from None
    if unknown := sorted({tensor["dtype"] for _, tensor in tensors} - NUMBERS.keys()):
        raise DataError(f"{path} must hold numbers of {', '.join(NUMBERS)}, got {', '.join(unknown)}")
    array = lambda tensor: np.frombuffer(tensor["data"], NUMBERS[tensor["dtype"]]).reshape(tensor["shape"])
    return {key: array(tensor).astype(np.float32) for key, tensor in tensors}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"state dict: {name} must be installed, got none: pip install 'gendiff[convert]'") from None


def _verify(path: Path) -> None:
    """Verify the checksums of PyTorch's zip archive, because `torch.load` ignores them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if record := archive.testzip():
                raise ValueError(f"the checksum of {record} differs")


def _cause(path: Path, error: Exception) -> str:
    """Explain why a file is not a checkpoint, from its first bytes and the error."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        return "an empty file: download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: run `git lfs pull`, or download the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: download the file itself"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"an object of {code[1]}, whose code is not run: save its state dict instead"
    return f"another file, or one that was cut off or damaged ({_line(error)})"


def _line(error: Exception) -> str:
    """Return the first line of an error, without PyTorch's advice to run the file's code."""
    text = next(iter(str(error).splitlines()), "")
    return type(error).__name__ if "weights" in text.lower() or not text else f"{type(error).__name__}: {text[:200]}"


def _contents(state: Any) -> str:
    """Summarise the content of a checkpoint, for an error."""
    return (", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__)[:200] or "an empty dict"
