"""Conversion of OpenAI's guided-diffusion checkpoints (`UNetModel`, `EncoderUNetModel`) to `gendiff.nets.unet`.

A network of a width below 128 needs `least=1`, because these models always have 32 groups.  The module does not support
the option `use_new_attention_order`, which orders channels differently; no published checkpoint uses it.
"""

from gendiff.convert import state_dict
from gendiff.convert.state_dict import StateDict
from gendiff.types import Params

BLOCKS = {"input": "input_blocks", "middle": "middle_block", "output": "output_blocks", "time": "time_embed"}
LAYERS = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "output": "proj_out",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "positions": "positional_embedding"}


def unet(state: StateDict, like: Params) -> Params:
    """Convert the parameters of a `UNet` or a `HalfUNet`.

    Args:
      state: `state_dict.read(file)`.
      like: `jax.eval_shape(net.init, key, x, t)`, for the shapes.

    Raises:
      ValueError: keys or shapes differ from the network's; the message names them.
    """
    state = state_dict.unwrapped(state)
    if "label_emb.weight" in state:  # transpose, because `parameters` transposes it like a kernel
        state["label_emb.weight"] = state["label_emb.weight"].T
    return state_dict.parameters(state, like, name)


def name(path: tuple[str, ...]) -> str:
    """Return the key of a leaf: params/input_1_0/conv_in/kernel -> input_blocks.1.0.in_layers.2.weight."""
    if path[-1] == "label":
        return "label_emb.weight"
    block, *layers, leaf = path[1:]
    first, *numbers = block.split("_")
    parts = [BLOCKS.get(first, first), *numbers]
    if block == "out_2" and (layers or leaf == "positions"):
        parts += [{"qkv": "qkv_proj", "output": "c_proj"}[layer] for layer in layers]
    elif layers:
        parts += [LAYERS[layer] for layer in layers]
    elif first == "output":
        parts.append("conv")  # after doubling the extents
    elif first == "input" and numbers[0] != "0":
        parts.append("op")  # halves the extents
    return ".".join([*parts, LEAVES[leaf]])
