"""PyTorch's state dicts, read and laid out as Flax parameters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from gendiff.types import Params

StateDict: TypeAlias = dict[str, np.ndarray]
Name: TypeAlias = Callable[[tuple[str, ...]], str]
"""The path of a Flax leaf -> the key of a state dict."""


def read(file: str | Path, part: str | None = None) -> StateDict:
    """The arrays of a checkpoint in float32, `.safetensors` or PyTorch's own; no code in the file is run.

    Args:
      part: of a checkpoint that is a dict of state dicts.

    Raises:
      ValueError: the file, or its part, is no flat dict of tensors.
    """
    if Path(file).suffix == ".safetensors":
        from safetensors.numpy import load_file

        return {key: np.asarray(value, np.float32) for key, value in load_file(file).items()}
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)
    if part is not None:
        given = state if isinstance(state, Mapping) else {}
        if not isinstance(given.get(part), Mapping):
            what = ", ".join(map(str, given)) or type(state).__name__
            raise ValueError(f"{file}: expected a checkpoint with a state dict {part!r}, given {what[:200]}")
        state = given[part]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file}: expected a flat dict of tensors; give the part of it that is a state dict")
    return {key: value.float().numpy() for key, value in state.items()}


def parameters(state: StateDict, like: Params, name: Name) -> Params:
    """Parameters with the structure and shapes of `like`, from a state dict of which every key is used exactly once.

    Args:
      like: `jax.eval_shape(net.init, key, x, t)`.
      name: of a leaf's path in it.

    Raises:
      ValueError: a key is missing, unknown, asked for twice or of another shape; the message has all of them.
    """
    leaves, structure = jax.tree.flatten_with_path(like)
    keys = [name(tuple(part.key for part in path)) for path, _ in leaves]
    wrong = [f"{key}: missing" for key in dict.fromkeys(keys) if key not in state]
    wrong += [f"{key}: unknown" for key in state if key not in set(keys)]
    wrong += [f"{key}: asked for {keys.count(key)} times" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    leaf_of = {key: leaf for key, (_, leaf) in zip(keys, leaves, strict=True) if key in state}
    arrays = {key: _laid_out(state[key], len(leaf.shape)) for key, leaf in leaf_of.items()}
    for key, array in arrays.items():
        if array.shape != leaf_of[key].shape:
            wrong.append(f"{key}: expected shape {leaf_of[key].shape}, given {array.shape} (in our order)")
    if wrong:
        shown = "\n  ".join(wrong[:20])
        raise ValueError(f"state dict: {len(wrong)} keys do not fit the network:\n  {shown}")
    return jax.tree.unflatten(structure, [np.array(arrays[key], np.float32) for key in keys])


def _laid_out(array: np.ndarray, rank: int) -> np.ndarray:
    """(o, i, *window) -> (*window, i, o), where windows of 1 belong to a matrix product."""
    while array.ndim > max(rank, 2) and array.shape[-1] == 1:
        array = array[..., 0]
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim >= 2 else array
