import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf

from gendiff import losses
from gendiff.losses import Aligned
from gendiff.nets.window_mlp import WindowMLP

D, HORIZON = 6, 12
ACTIVATIONS = {
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def abstract(net, *shape):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(()))


def start(net, *shape):
    """Parameters of which none is small."""
    leaves, structure = jax.tree.flatten(abstract(net, *shape))
    size = lambda leaf: 2 * leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0.2
    return jax.tree.unflatten(structure, [size(leaf) * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize(
    ("widths", "counts"),
    [((32,), (9_635, 10_211, 21_731, 58_595)), ((128, 64, 32), (23_715, 26_019, 72_099, 219_555))],
)
def test_parameters_are_as_many_as_published(widths, counts):
    for window, count in zip((1, 4, 64, 256), counts, strict=True):
        assert sum(leaf.size for leaf in jax.tree.leaves(abstract(WindowMLP(window, widths), 256, D))) == count


@given(window=st.integers(1, 5), n=st.integers(1, 6), strided=st.booleans())
def test_windows(window, n, strided):
    x = np.arange(window * n * 2).reshape(-1, 2)
    windows = np.asarray(WindowMLP(window, strided=strided).split(x))
    for j in range(n):
        np.testing.assert_array_equal(windows[j], x[j::n] if strided else x[j * window : (j + 1) * window])


def of_numpy(net, params, x, t):
    """The same in float64, with the embedding repeated for every window and joined to its frames."""
    act, p = ACTIVATIONS[net.activation], jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    linear = lambda layer, h: h @ layer["kernel"] + layer["bias"]
    angles = t * np.exp(-np.arange(16) * np.log(10_000) / 15)
    e = np.concatenate([np.sin(angles), np.cos(angles)])
    e = linear(p["time_mlp"]["layers_3"], act(linear(p["time_mlp"]["layers_1"], e)))
    n = len(x) // net.window
    frames = [x[j::n] if net.strided else x[j * net.window : (j + 1) * net.window] for j in range(n)]
    h = np.stack([np.concatenate([each.ravel(), e]) for each in frames])
    for i in range(len(net.widths) + 1):
        h = act(linear(p[f"layers_{i}"], h))
    assert h.shape == (n, 1)
    return linear(p["output"], h)[:, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("strided", [True, False])
def test_reward_is_the_mean_over_windows(activation, strided):
    net = WindowMLP(4, (9, 7), strided, activation)
    params, x = start(net, HORIZON, D), normal(0, HORIZON, D)
    expected = of_numpy(net, params, x, 37)
    each = jax.jit(lambda x, t: net.apply(params, net.split(x), t, method="of_windows"))(x, 37)
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(expected) > 1e-3
    for reduce, exact in (("mean", expected.mean()), ("sum", expected.sum())):
        rho = jax.jit(net.clone(reduce=reduce).apply)(params, x, np.float32(37))
        assert rho.shape == ()
        np.testing.assert_allclose(rho, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (WindowMLP(5), (12, 6), r"horizon a multiple of 5, got \(12, 6\)"),
        (WindowMLP(4), (12,), r"must be \(horizon, d\)"),
        (WindowMLP(4), (0, 6), r"must be \(horizon, d\)"),
        (WindowMLP(4, activation="relu"), (12, 6), "activation must be one of .*mish.*, got 'relu'"),
        (WindowMLP(4, reduce="max"), (12, 6), "reduce must be 'mean' or 'sum', got 'max'"),
    ],
)
def test_errors_name_what_is_wrong(net, shape, message):
    with pytest.raises(ValueError, match=message):
        abstract(net, *shape)


def test_single_windows_must_have_the_size():
    net = WindowMLP(4)
    with pytest.raises(ValueError, match=r"must be \(n, 4, d\), got \(3, 5, 6\)"):
        net.apply(abstract(net, HORIZON, D), jnp.zeros((3, 5, 6)), 0, method="of_windows")


def alignment(net, params, x, t, y):
    """mean((grad_x rho - y)^2) over a batch."""
    loss = losses.gradient_alignment(net.apply)
    each = lambda x, t, y: loss(params, jax.random.key(0), Aligned(x, t, y, jnp.float32(1)))
    return jnp.mean(jax.vmap(each)(x, t, y))


def batch(n=8):
    return normal(1, n, HORIZON, D), np.arange(n) * 11, 0.01 * normal(2, n, HORIZON, D)


def test_what_a_piecewise_linear_reward_cannot_learn():
    # Its gradient is constant between the kinks: neither the biases nor anything behind the time have a part in it.
    for activation in ACTIVATIONS:
        net = WindowMLP(4, (32, 16), activation=activation)
        params = start(net, HORIZON, D)
        gradient = jax.jit(jax.grad(alignment, 1), static_argnums=0)(net, params, *batch())["params"]
        first = gradient["layers_0"]["kernel"]
        of_frames, of_time = first[: 4 * D], first[4 * D :]
        kernels = [of_frames, gradient["layers_1"]["kernel"], gradient["output"]["kernel"]]
        biases = [gradient[f"layers_{i}"]["bias"] for i in range(3)]
        behind_t = [of_time, *jax.tree.leaves(gradient["time_mlp"])]
        assert all(np.abs(leaf).max() > 0 for leaf in kernels)
        assert all(np.any(leaf) == (activation != "leaky_relu") for leaf in (*biases, *behind_t))
        assert not gradient["output"]["bias"].any(), "the additive constant has no gradient in x"


def test_products_of_two_matrices():
    # The rows are the windows of all samples, but for the embedding, which is one for a sample.
    if jax.default_backend() != "cpu":
        pytest.skip("of the layout on a CPU")
    net, (x, t, y) = WindowMLP(4, (16, 8)), batch()
    lowered = jax.jit(jax.grad(alignment, 1), static_argnums=0).lower(net, start(net, HORIZON, D), x, t, y)
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", lowered.compile().as_text())
    outputs = [tuple(map(int, shape.split(","))) for shape in shapes]
    rows = len(x) * HORIZON // 4
    assert all(len(shape) <= 2 for shape in outputs)
    assert {(rows, 16), (rows, 8), (len(x), 16)} <= set(outputs)
    assert {shape[0] for shape in outputs if shape[1:] in {(32,), (128,)}} == {len(x)}


def test_initial_values_are_those_of_the_joined_layer():
    params = WindowMLP(4, (50,)).init(jax.random.key(0), jnp.zeros((HORIZON, D)), 0)["params"]["layers_0"]
    bound = (4 * D + 32) ** -0.5
    for leaf in (params["kernel"][: 4 * D], params["kernel"][4 * D :], params["bias"]):
        assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound


def rival(torch, net):
    """The network in PyTorch, written the plain way: windows as rows, the embedding joined to each."""
    nn = torch.nn
    act = {"leaky_relu": nn.LeakyReLU, "mish": nn.Mish, "gelu": nn.GELU}[net.activation]

    class Rival(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_mlp = nn.Sequential(nn.Linear(32, 128), act(), nn.Linear(128, 32))
            sizes = [net.window * D + 32, *net.widths, 1]
            layers = [each for a, b in itertools.pairwise(sizes) for each in (nn.Linear(a, b), act())]
            self.layers = nn.Sequential(*layers)
            self.output = nn.Linear(1, 1)

        def forward(self, x, t):
            n = x.shape[1] // net.window
            angles = t[:, None] * torch.exp(-torch.arange(16) * math.log(10_000) / 15)
            e = self.time_mlp(torch.cat([angles.sin(), angles.cos()], -1))
            values = []
            for j in range(n):
                frames = x[:, j::n] if net.strided else x[:, j * net.window : (j + 1) * net.window]
                values.append(self.output(self.layers(torch.cat([frames.flatten(1), e], 1))))
            return torch.cat(values, 1).mean(1)

    return Rival()


def params_of(module, like):
    state = {key: value.detach().numpy() for key, value in module.named_parameters()}

    def leaf(path, _):
        *layers, kind = (part.key for part in path[1:])
        names = {"layers_1": "0", "layers_3": "2"} if layers[0] == "time_mlp" else {}
        place = [names.get(each, each) for each in layers]
        if place[0].startswith("layers_"):
            place = ["layers", str(2 * int(place[0][7:]))]
        value = state[".".join([*place, {"kernel": "weight", "bias": "bias"}[kind]])]
        return value.T if kind == "kernel" else value

    return jax.tree.map_with_path(leaf, like)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("window", "widths", "strided"), [(4, (32,), True), (3, (24, 16, 8), False)])
def test_values_and_both_gradients_are_those_of_pytorch(activation, window, widths, strided):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = WindowMLP(window, widths, strided, activation)
    theirs = rival(torch, net)
    like = abstract(net, HORIZON, D)
    params, (x, t, y) = params_of(theirs, like), batch()
    z = torch.tensor(x, requires_grad=True)
    value = theirs(z, torch.tensor(t))
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    loss = ((slope - torch.tensor(y)) ** 2).mean()
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, each in zip(parameters, gradients, strict=True):
        parameter.data = torch.zeros_like(parameter) if each is None else each
    assert len(names) == len(jax.tree.leaves(like))

    def close(ours, exact):
        exact = np.asarray(exact)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())

    rewards = jax.jit(jax.vmap(jax.value_and_grad(net.apply, 1), (None, 0, 0)))
    for ours, exact in zip(rewards(params, x, t), (value, slope), strict=True):
        close(ours, exact.detach().numpy())
    ours, gradient = jax.jit(jax.value_and_grad(alignment, 1), static_argnums=0)(net, params, x, t, y)
    close(ours, loss.item())
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for one, exact in zip(jax.tree.leaves(gradient), jax.tree.leaves(params_of(theirs, like)), strict=True):
        np.testing.assert_allclose(one, exact, rtol=0, atol=1e-5 * max(np.abs(exact).max(), 1e-3 * largest))
