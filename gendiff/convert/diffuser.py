"""Conversion of Diffuser's checkpoints (`TemporalUnet` without attention) to `gendiff.nets.temporal`."""

import re
from pathlib import Path
from typing import Literal

from gendiff.convert import state_dict
from gendiff.convert.state_dict import StateDict
from gendiff.types import Params

LAYERS = {"conv": "block.0", "norm": "block.2", "time": "time_mlp.1", "layers_1": "1", "layers_3": "3"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def read(file: str | Path, weights: Literal["ema", "model"] = "ema") -> StateDict:
    """Read the averaged or the raw weights of a checkpoint of Diffuser's trainer, in float32; run no code of the file.

    Raises:
      DataError: see `state_dict.read`; or the checkpoint lacks the part.
    """
    return state_dict.read(file, weights)


def temporal_unet(state: StateDict, like: Params) -> Params:
    """Convert the parameters of a `TemporalUnet`.

    Args:
      state: state dict of the network, or of the diffusion around it (`read(file)`), whose own tables are left out.
      like: `jax.eval_shape(net.init, key, x, t)`, for the shapes.

    Raises:
      ValueError: keys or shapes differ from the network's; the message names them.
    """
    state = state_dict.unwrapped(state)
    inside = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    return state_dict.parameters(state_dict.unwrapped(inside or state), like, name)


def name(path: tuple[str, ...]) -> str:
    """Return the key of a leaf: params/downs_1_0/blocks_0/norm/scale -> downs.1.0.blocks.0.block.2.weight."""
    *layers, leaf = path[1:]
    parts = [LAYERS.get(layer, re.sub(r"_(\d)", r".\1", layer)) for layer in layers]
    if re.fullmatch(r"(downs|ups)\.\d+\.3", parts[0]):
        parts.append("conv")
    return ".".join([*parts, LEAVES[leaf]])
