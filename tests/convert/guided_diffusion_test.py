"""The networks against a statement in PyTorch of the same blocks, with the names of the public checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from gendiff.convert import guided_diffusion, state_dict  # noqa: E402
from gendiff.nets.unet import HalfUNet, UNet  # noqa: E402


def norm(channels):
    return nn.GroupNorm(32, channels)


class Pass(nn.Module):
    """A block that has no embedding."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, e):
        return self.block(x)


class ResBlock(nn.Module):
    def __init__(self, inside, outside, emb, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(norm(inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * outside))
        last = nn.Conv2d(outside, outside, 3, padding=1)
        self.out_layers = nn.Sequential(norm(outside), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)
        self.resample = resample

    def move(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x, e):
        h = self.in_layers[2](self.move(self.in_layers[1](self.in_layers[0](x))))
        scale, shift = self.emb_layers(e)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.out_layers[3](F.silu(h)) + self.skip_connection(self.move(x))


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, e):
        n, c = x.shape[:2]
        flat = x.reshape(n, c, -1)
        each = self.qkv(self.norm(flat)).reshape(n, self.heads, 3, c // self.heads, -1)
        q, k, v = each.unbind(2)  # head by head, q, k and v within each
        weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c // self.heads), -1)
        y = (v @ weights.transpose(-1, -2)).reshape(n, c, -1)
        return (flat + self.proj_out(y)).reshape(x.shape)


class AttentionPool2d(nn.Module):
    def __init__(self, size, channels, heads, outputs):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x):
        n, c = x.shape[:2]
        x = x.reshape(n, c, -1)
        x = torch.cat([x.mean(-1, keepdim=True), x], -1) + self.positional_embedding[None]
        q, k, v = self.qkv_proj(x).reshape(n, 3, self.heads, c // self.heads, -1).unbind(1)  # all q, all k, all v
        weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c // self.heads), -1)
        return self.c_proj((v @ weights.transpose(-1, -2)).reshape(n, c, -1))[:, :, 0]


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, e):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, e):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    def forward(self, x, e):
        for block in self:
            x = block(x, e) if not isinstance(block, nn.Conv2d) else block(x)
        return x


class ADM(nn.Module):
    """The U-Net, or with `outputs` the classifier."""

    def __init__(self, size, inside, net, outside=None, outputs=None):
        super().__init__()
        width, emb = net.width, 4 * net.width
        self.width = width
        heads = lambda c: net.heads if net.head_channels is None else max(1, c // net.head_channels)
        attention = lambda c, size: [AttentionBlock(c, heads(c))] if size in net.attention else []
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if net.classes:
            self.label_emb = nn.Embedding(net.classes, emb)
        c = width * net.multipliers[0]
        stages, widths = [Stage(nn.Conv2d(inside, c, 3, padding=1))], [c]
        for level, multiplier in enumerate(net.multipliers):
            for _ in range(net.blocks):
                stages.append(Stage(ResBlock(c, multiplier * width, emb), *attention(multiplier * width, size)))
                c = multiplier * width
                widths.append(c)
            if level < len(net.multipliers) - 1:
                stages.append(Stage(ResBlock(c, c, emb, "down") if net.resample_blocks else Down(c)))
                widths.append(c)
                size //= 2
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(ResBlock(c, c, emb), AttentionBlock(c, heads(c)), ResBlock(c, c, emb))
        self.half = outputs is not None
        if self.half:
            self.out = nn.Sequential(norm(c), nn.SiLU(), AttentionPool2d(size, c, heads(c), outputs))
            return
        stages = []
        for level, multiplier in reversed(list(enumerate(net.multipliers))):
            for i in range(net.blocks + 1):
                new = multiplier * width
                blocks = [ResBlock(c + widths.pop(), new, emb), *attention(new, size)]
                c = new
                if level and i == net.blocks:
                    blocks.append(ResBlock(c, c, emb, "up") if net.resample_blocks else Up(c))
                    size *= 2
                stages.append(Stage(*blocks))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, outside, 3, padding=1))

    def forward(self, x, t, label=None):
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)[None]
        e = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
        if label is not None:
            e = e + self.label_emb(label)
        maps = []
        for stage in self.input_blocks:
            x = stage(x, e)
            maps.append(x)
        x = self.middle_block(x, e)
        for stage in () if self.half else self.output_blocks:
            x = stage(torch.cat([x, maps.pop()], 1), e)
        return self.out(x)


SMALL = {"width": 32, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "least": 1}
NETS = {
    "plain": UNet(channels=2, **SMALL, head_channels=None, heads=2),
    "blocks, classes, learned variance": UNet(channels=4, **SMALL, head_channels=16, resample_blocks=True, classes=5),
    "half": HalfUNet(**SMALL, head_channels=32),
}
SIZE, CHANNELS, LABEL = 8, 2, 3


def rival(net):
    torch.manual_seed(0)
    if isinstance(net, UNet):
        return ADM(SIZE, CHANNELS, net, outside=net.channels)
    return ADM(SIZE, CHANNELS, net, outputs=net.outputs or 1)


def like(net):
    label = None if net.classes is None else LABEL
    image, t = jnp.zeros((SIZE, SIZE, CHANNELS)), jnp.zeros(())
    return jax.eval_shape(lambda: net.init(jax.random.key(0), image, t, label))


def arrays(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_values_and_gradients_are_those_of_pytorch(net):
    theirs = rival(net)
    params = guided_diffusion.unet(arrays(theirs), like(net))
    label = None if net.classes is None else LABEL
    x = np.random.default_rng(0).normal(size=(3, SIZE, SIZE, CHANNELS)).astype(np.float32)
    t = np.float32([0, 400, 999])

    def both(x, t):
        value, pull = jax.vjp(lambda x: net.apply(params, x, t, label), x)
        return value, pull(jnp.ones_like(value))[0]

    given, gradient = jax.jit(jax.vmap(both))(x, t)
    image = torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_(True)
    expected = theirs(image, torch.tensor(t), None if label is None else torch.full((3,), label))
    expected.sum().backward()
    answer = expected.detach().numpy()
    answer = answer.transpose(0, 2, 3, 1) if answer.ndim == 4 else answer.reshape(given.shape)
    assert np.abs(answer).max() > 1e-2
    np.testing.assert_allclose(given, answer, rtol=0, atol=1e-5 * max(1, np.abs(answer).max()))
    slope = image.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-5 * max(1, np.abs(slope).max()))


def test_every_key_is_used_once():
    net = NETS["half"]
    state = arrays(rival(net))
    keys = [guided_diffusion.name(tuple(part.key for part in path)) for path, _ in jax.tree.leaves_with_path(like(net))]
    assert sorted(keys) == sorted(state)


def test_errors_name_the_keys():
    net = NETS["half"]
    state = arrays(rival(net))
    lost = {key: value for key, value in state.items() if key != "middle_block.1.qkv.bias"}
    with pytest.raises(ValueError, match=r"middle_block\.1\.qkv\.bias: missing"):
        guided_diffusion.unet(lost, like(net))
    with pytest.raises(ValueError, match=r"out\.7\.weight: unknown"):
        guided_diffusion.unet(state | {"out.7.weight": np.zeros(3)}, like(net))
    with pytest.raises(ValueError, match=r"time_embed\.0\.weight: must have shape \(32, 128\), got \(32, 100\)"):
        guided_diffusion.unet(state | {"time_embed.0.weight": np.zeros((100, 32))}, like(net))


def test_names_are_those_of_the_public_checkpoints():
    name = lambda path: guided_diffusion.name(tuple(path.split("/")))
    assert name("params/input_0_0/kernel") == "input_blocks.0.0.weight"
    assert name("params/input_3_0/kernel") == "input_blocks.3.0.op.weight"
    assert name("params/input_1_0/norm_out/scale") == "input_blocks.1.0.out_layers.0.weight"
    assert name("params/output_2_2/bias") == "output_blocks.2.2.conv.bias"
    assert name("params/output_2_1/output/kernel") == "output_blocks.2.1.proj_out.weight"
    assert name("params/out_2/positions") == "out.2.positional_embedding"
    assert name("params/out_2/output/bias") == "out.2.c_proj.bias"
    assert name("params/label") == "label_emb.weight"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_are_read(tmp_path, suffix):
    state, file = rival(NETS["half"]).state_dict(), tmp_path / f"model{suffix}"
    state["out.2.c_proj.bias"] = state["out.2.c_proj.bias"].half()
    if suffix == ".pt":
        torch.save(state, file)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, file)
    given = state_dict.read(file)
    assert given.keys() == state.keys()
    for key, value in given.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[key].float().numpy())


def test_files_of_other_things_are_refused(tmp_path):
    file = tmp_path / "run.pt"
    torch.save({"state_dict": rival(NETS["half"]).state_dict(), "step": 3}, file)
    with pytest.raises(ValueError, match="got state_dict, step; name its part"):
        state_dict.read(file)
