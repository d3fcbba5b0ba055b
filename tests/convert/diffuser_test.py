"""The U-Net against a statement in PyTorch of the same blocks, with the names of Diffuser's checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from gendiff.convert import diffuser  # noqa: E402
from gendiff.nets.temporal import TemporalUnet  # noqa: E402

D = 5


class Lambda(nn.Module):
    """A function, in a place of its own."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


class Block(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        conv, norm = nn.Conv1d(inside, outside, 5, padding=2), nn.GroupNorm(8, outside)
        self.block = nn.Sequential(conv, nn.Identity(), norm, nn.Identity(), nn.Mish())

    def forward(self, x):
        return self.block(x)


class Residual(nn.Module):
    def __init__(self, inside, outside, width):
        super().__init__()
        self.blocks = nn.ModuleList([Block(inside, outside), Block(outside, outside)])
        self.time_mlp = nn.Sequential(nn.Mish(), nn.Linear(width, outside))
        self.residual_conv = nn.Identity() if inside == outside else nn.Conv1d(inside, outside, 1)

    def forward(self, x, e):
        return self.blocks[1](self.blocks[0](x) + self.time_mlp(e)[:, :, None]) + self.residual_conv(x)


class Resample(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


class Rival(nn.Module):
    def __init__(self, net, d):
        super().__init__()
        width, n = net.width, net.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(n, dtype=torch.double) / (n - 1))
        angles = lambda t: t[:, None] * frequencies
        inner, outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        waves = lambda t: torch.cat([angles(t).sin(), angles(t).cos()], -1).to(inner.weight.dtype)
        self.time_mlp = nn.Sequential(Lambda(waves), inner, nn.Mish(), outer)
        widths = [d, *(width * multiplier for multiplier in net.multipliers)]
        half = lambda c: Resample(nn.Conv1d(c, c, 3, stride=2, padding=1))
        twice = lambda c: Resample(nn.ConvTranspose1d(c, c, 4, stride=2, padding=1))
        stage = lambda a, b, move: nn.ModuleList([Residual(a, b, width), Residual(b, b, width), nn.Identity(), move])
        n = len(net.multipliers)
        self.downs = nn.ModuleList(
            stage(widths[i], widths[i + 1], half(widths[i + 1]) if i + 1 < n else nn.Identity()) for i in range(n)
        )
        self.mid_block1, self.mid_block2 = (Residual(widths[-1], widths[-1], width) for _ in range(2))
        self.ups = nn.ModuleList(stage(2 * widths[i + 1], widths[i], twice(widths[i])) for i in reversed(range(1, n)))
        self.final_conv = nn.Sequential(Block(width, width), nn.Conv1d(width, d, 1))

    def forward(self, x, t):
        x, e, maps = x.transpose(1, 2), self.time_mlp(t), []
        for first, second, _, move in self.downs:
            maps.append(second(first(x, e), e))
            x = move(maps[-1])
        x = self.mid_block2(self.mid_block1(x, e), e)
        for first, second, _, move in self.ups:
            x = move(second(first(torch.cat([x, maps.pop()], 1), e), e))
        return self.final_conv(x).transpose(1, 2)


NETS = {"maze": TemporalUnet(8, (1, 4, 8)), "locomotion": TemporalUnet(8, (1, 2, 2, 3))}


def like(net):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((16, D)), jnp.zeros(()))


def rival(net):
    torch.manual_seed(0)
    theirs = Rival(net, D)
    for module in theirs.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return theirs


def arrays(module):
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 16, D)).astype(np.float32)
    return x, np.int32([0, 40, 99]), y


def slopes(net, params, x, t):
    """Gradients in x of |net(x, t)|^2."""
    return jax.vmap(jax.grad(lambda x, t: jnp.sum(net.apply(params, x, t) ** 2)), (0, 0))(x, t)


def answers(theirs, x, t, dtype):
    """Values of PyTorch's network and gradients in x of |values|^2, computed in `dtype`."""
    z = torch.tensor(x, dtype=dtype, requires_grad=True)
    value = theirs.to(dtype)(z, torch.tensor(t))
    (slope,) = torch.autograd.grad((value**2).sum(), z)
    return value.detach().numpy(), slope.numpy()


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_values_and_gradients_are_those_of_pytorch(net):
    theirs, (x, t, _) = rival(net), batch()
    params = diffuser.temporal_unet(arrays(theirs), like(net))
    both = jax.jit(lambda params: (jax.vmap(net.apply, (None, 0, 0))(params, x, t), slopes(net, params, x, t)))
    # As near to double precision as PyTorch's own single precision, but for four times its rounding.
    single, double = (answers(theirs, x, t, dtype) for dtype in (torch.float, torch.double))
    for given, rounded, expected in zip(both(params), single, double, strict=True):
        assert expected.std() > 0.05
        rounding = np.abs(rounded - expected).max()
        assert rounding < 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(given, expected, rtol=0, atol=4 * rounding)


def test_second_derivatives_are_those_of_pytorch():
    # |net|^2 as a reward: the gradient in the parameters of how well its gradient in x is aligned.
    net = TemporalUnet(8, (1, 2))
    theirs, (x, t, y) = rival(net), batch()
    params = diffuser.temporal_unet(arrays(theirs), like(net))
    given = jax.jit(jax.grad(lambda params: jnp.mean((slopes(net, params, x, t) - y) ** 2)))(params)
    z = torch.tensor(x, dtype=torch.double, requires_grad=True)
    value = theirs.double()(z, torch.tensor(t))
    (slope,) = torch.autograd.grad((value**2).sum(), z, create_graph=True)
    ((slope - torch.tensor(y)) ** 2).mean().backward()
    state = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    expected = diffuser.temporal_unet(state, like(net))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_every_key_is_used_once():
    net = NETS["maze"]
    keys = [diffuser.name(tuple(part.key for part in path)) for path, _ in jax.tree.leaves_with_path(like(net))]
    assert sorted(keys) == sorted(arrays(rival(net)))


def test_names_are_those_of_the_public_checkpoints():
    name = lambda path: diffuser.name(("params", *path.split("/")))
    assert name("time_mlp/layers_1/kernel") == "time_mlp.1.weight"
    assert name("downs_0_0/blocks_0/conv/kernel") == "downs.0.0.blocks.0.block.0.weight"
    assert name("downs_2_1/blocks_1/norm/scale") == "downs.2.1.blocks.1.block.2.weight"
    assert name("downs_0_3/bias") == "downs.0.3.conv.bias"
    assert name("mid_block1/time/kernel") == "mid_block1.time_mlp.1.weight"
    assert name("ups_1_0/residual_conv/bias") == "ups.1.0.residual_conv.bias"
    assert name("ups_1_3/kernel") == "ups.1.3.conv.weight"
    assert name("final_conv_0/norm/bias") == "final_conv.0.block.2.bias"
    assert name("final_conv_1/kernel") == "final_conv.1.weight"


def test_checkpoints_of_the_trainer(tmp_path):
    net, file = NETS["maze"], tmp_path / "state_480000.pt"
    theirs = {f"model.{key}": value for key, value in rival(net).state_dict().items()}
    tables = {"betas": torch.ones(100), "loss_fn.weights": torch.ones(16, D)}
    averaged = {key: 2 * value for key, value in theirs.items()}
    torch.save({"step": 480_000, "model": theirs | tables, "ema": averaged | tables}, file)
    for weights, times in ({}, 2), ({"weights": "model"}, 1):
        params = diffuser.temporal_unet(diffuser.read(file, **weights), like(net))
        expected = diffuser.temporal_unet(arrays(rival(net)), like(net))
        jax.tree.map(lambda a, b, times=times: np.testing.assert_array_equal(a, times * b), params, expected)
    torch.save({"step": 3}, file)
    with pytest.raises(ValueError, match=r"480000\.pt must have a state dict 'ema', got step"):
        diffuser.read(file)


def test_errors_name_the_keys():
    net = NETS["maze"]
    state = {f"model.{key}": value for key, value in arrays(rival(net)).items()} | {"betas": np.ones(100)}
    lost = {key: value for key, value in state.items() if key != "model.ups.0.3.conv.bias"}
    with pytest.raises(ValueError, match=r"ups\.0\.3\.conv\.bias: missing"):
        diffuser.temporal_unet(lost, like(net))
    attention = {"model.mid_attn.fn.fn.to_out.bias": np.zeros(64)}
    with pytest.raises(ValueError, match=r"mid_attn\.fn\.fn\.to_out\.bias: unknown"):
        diffuser.temporal_unet(state | attention, like(net))
