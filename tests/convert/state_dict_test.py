"""Checkpoints that are damaged, wrapped or other things, and what errors say of them."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.convert import diffuser, guided_diffusion, resnet, state_dict
from gendiff.data import DataError

NAMES = [f"layer{i}.{leaf}" for i in range(20) for leaf in ("weight", "bias")]
LIKE = {"params": {name.replace(".", "/"): jax.ShapeDtypeStruct((2,), jnp.float32) for name in NAMES}}


def name(path):
    return path[1].replace("/", ".")


def state(prefix=""):
    return {prefix + key: np.full(2, i, np.float32) for i, key in enumerate(NAMES)}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "an empty file"),
        (LFS, "a pointer of Git LFS: run `git lfs pull`"),
        (PAGE, "a web page"),
        (b"<HTML>404", "a web page"),
        (b"plain text", "another file, or one that was cut off or damaged"),
        (b"\x80\x02}q\x00", "another file, or one that was cut off or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_told_with_its_cause(content, cause, suffix, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{path} must be a ") + f".*, got {cause}") as caught:
        state_dict.read(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_cut_file_is_told(suffix, kept, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    tensors = {"weight": torch.ones(200, 20)}
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*cut off or damaged"):
        state_dict.read(path)


def test_one_flipped_bit_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(200, 20)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.pt .*damaged \(ValueError: the checksum of \S+ differs\)"):
        state_dict.read(path)


@pytest.mark.parametrize("kind", ["none", "folder", "pipe", "loop"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_file_is_told_at_once(kind, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    what = {"folder": "a folder", "pipe": "a named pipe"}.get(kind, "none")
    with pytest.raises(DataError, match=f"model{suffix} must be a file, got {what}"):
        state_dict.read(path)


def test_code_in_a_file_is_named_and_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    for value in (torch.nn.Linear(2, 2), {"weight": np.ones(2)}):
        torch.save(value, tmp_path / "model.pt")
        with pytest.raises(DataError, match=r"got an object of \S+, whose code is not run: save its state") as caught:
            state_dict.read(tmp_path / "model.pt")
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kept", [[3], {"step": 3}, {"net": {"weight": 1}}, {}])
def test_what_holds_no_tensors_is_told(kept, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(kept, tmp_path / "model.pt")
    if kept != {}:
        with pytest.raises(DataError, match=r"must be a flat dict of tensors, got (list|step|net); name its part"):
            state_dict.read(tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"must have a state dict 'ema', got (list|step|net|an empty dict)"):
        state_dict.read(tmp_path / "model.pt", "ema")


@pytest.mark.parametrize("form", ["file", "dict"])
def test_named_parameters_are_read(form, tmp_path):
    torch = pytest.importorskip("torch")
    kept = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in state().items()}
    if form == "file":
        torch.save(kept, tmp_path / "model.pt")
        kept = state_dict.read(tmp_path / "model.pt")
        assert all(value.dtype == np.float32 for value in kept.values())
    params = state_dict.parameters(state_dict.unwrapped(kept), LIKE, name)
    jax.tree.map(np.testing.assert_array_equal, params, state_dict.parameters(state(), LIKE, name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_of_numbers_are_read_from_safetensors(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"weight": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)), "count": torch.tensor(3)}
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "model.safetensors")
    given = state_dict.read(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(given["weight"], np.arange(6).reshape(2, 3))
    assert given["count"] == 3
    assert given["weight"].dtype == np.float32


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_wrapper_before_all_keys_is_taken_off(prefix):
    given = state_dict.unwrapped(state(prefix))
    assert list(given) == NAMES
    partly = state(prefix) | {"step": np.ones(2)}
    assert list(state_dict.unwrapped(partly)) == [*state(prefix), "step"]


LEAVES = {"kernel": (3, 2), "bias": (2,)}
NETS = {
    "resnet": (resnet.resnet, "fc", "fc"),
    "guided diffusion": (guided_diffusion.unet, "time_0", "time_embed.0"),
    "diffuser": (diffuser.temporal_unet, "mid_block1", "mid_block1"),
}


@pytest.mark.parametrize("prefix", ["module.", "model.module.", "_orig_mod."])
@pytest.mark.parametrize("net", NETS)
def test_every_converter_takes_wrappers_off(net, prefix):
    convert, layer, key = NETS[net]
    like = {"params": {layer: {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in LEAVES.items()}}}
    arrays = {f"{prefix}{key}.weight": np.arange(6).reshape(2, 3), f"{prefix}{key}.bias": np.arange(2)}
    params = convert(arrays, like)["params"][layer]
    np.testing.assert_array_equal(params["kernel"], np.arange(6).reshape(2, 3).T)
    np.testing.assert_array_equal(params["bias"], np.arange(2))


def test_what_was_found_is_shown():
    with pytest.raises(ValueError, match=r"80 keys must fit the network, got 40 keys") as caught:
        state_dict.parameters(state("encoder.net."), LIKE, name)
    told = str(caught.value)
    assert "layer0.weight: missing" in told
    assert ".. and 30 more that are missing" in told
    assert "encoder.net.layer0.weight: unknown" in told
    assert "all unknown keys begin with 'encoder.net.': take it off" in told
    assert len(told.splitlines()) < 30
    with pytest.raises(ValueError, match=r"1 keys must fit the network, got 41 keys:\n  other\.step: unknown$"):
        state_dict.parameters(state() | {"other.step": np.ones(1)}, LIKE, name)
    with pytest.raises(ValueError, match=r"40 keys must fit the network, got 0 keys"):
        state_dict.parameters({}, LIKE, name)
