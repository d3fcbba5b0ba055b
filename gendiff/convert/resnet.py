"""Conversion of torchvision's ResNet checkpoints to `gendiff.nets.resnet`."""

import jax
import numpy as np

from gendiff.convert import state_dict
from gendiff.convert.state_dict import StateDict
from gendiff.types import Params

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def resnet(state: StateDict, like: Params) -> Params:
    """Convert the variables (`params` and `batch_stats`) of a `ResNet`.

    Args:
      state: `state_dict.read(file)`.
      like: `jax.eval_shape(net.init, key, x)`, with the checkpoint's outputs; `with_head_of` exchanges them later.

    Raises:
      ValueError: keys or shapes differ from the network's; the message names them.
    """
    state = state_dict.unwrapped(state)
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return state_dict.parameters(kept, like, name)


def name(path: tuple[str, ...]) -> str:
    """Return the key of a leaf: params/layer2_0/downsample_0/kernel -> layer2.0.downsample.0.weight."""
    *layers, leaf = path[1:]
    return ".".join([*(layer.replace("_", ".") for layer in layers), LEAVES[leaf]])


def with_head_of(variables: Params, start: Params) -> Params:
    """Replace the last layer by that of `start`, to use the features of `variables` for other classes."""
    return variables | {"params": variables["params"] | {"fc": jax.tree.map(np.asarray, start["params"]["fc"])}}
