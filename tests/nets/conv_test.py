import itertools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gendiff.nets import conv, conv_cpu

CASES = [  # window, stride, padding, length, rank
    (3, 1, (1, 1), 6, 2),
    (3, 2, (1, 1), 8, 1),
    (3, 2, (1, 1), 7, 2),
    (1, 1, (0, 0), 5, 2),
    (1, 2, (0, 0), 5, 2),
    (5, 1, (2, 2), 8, 1),
    (5, 1, (2, 2), 4, 1),  # shorter than the window
    (3, 1, (1, 1), 2, 2),
    (3, 1, (1, 1), 1, 1),
    (4, 2, (1, 1), 8, 1),
    (7, 2, (3, 3), 9, 2),
    (3, 3, (1, 1), 7, 1),
    (2, 1, (1, 0), 6, 1),
    (2, 3, (0, 0), 7, 2),  # windows with gaps
]
LABELS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}
CANONICAL = {"b01f_01io->b01f", "b0f_0io->b0f"}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(x, w, stride, padding):
    return lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=LABELS[len(stride)])


def correlate(x, w, stride, padding):
    return conv.correlate(x[None], w[None], stride, padding)[0]


def derivatives(convolution, x, w, c):
    """The value of a nonlinear function of a convolution and all its derivatives up to the second order."""
    value = lambda x, w: jnp.sum(jnp.tanh(convolution(x, w)) * c)
    size = lambda x, w: sum(jnp.sum(gradient**2) for gradient in jax.grad(value, (0, 1))(x, w))
    return convolution(x, w), jax.grad(value, (0, 1))(x, w), jax.grad(size, (0, 1))(x, w)


def assert_close(given, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, float(np.abs(b).max())))


def assert_as_lax(x, w, stride, padding):
    """The value and all derivatives up to the second order."""
    c = normal(2, *jax.eval_shape(lambda: reference(x, w, stride, padding)).shape)
    ours, theirs = (
        jax.jit(lambda x, w, f=f: derivatives(lambda x, w: f(x, w, stride, padding), x, w, c))
        for f in (correlate, reference)
    )
    assert_close(ours(x, w), theirs(x, w))


def convolutions(function, *arguments):
    """The labels of all convolutions in the compiled program, and whether one is dilated or grouped."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    lines = [line for line in text.splitlines() if " convolution(" in line]
    assert not any(re.search(r"[lr]hs_dilate=|group_count=|rhs_reversal=", line) for line in lines)
    return {re.search(r"dim_labels=(\S+?)[,\s]", line)[1] for line in lines}


@pytest.mark.parametrize(("window", "stride", "padding", "length", "rank"), CASES)
def test_values_and_derivatives_are_those_of_lax(window, stride, padding, length, rank):
    how = (stride,) * rank, (padding,) * rank
    x, w = normal(0, 2, *(length,) * rank, 3), normal(1, *(window,) * rank, 3, 4)
    assert_as_lax(x, w, *how)


def test_extents_need_not_be_equal():
    x, w = normal(0, 2, 9, 2, 3), normal(1, 3, 5, 3, 4)
    how = (2, 1), ((1, 1), (2, 2))
    c = normal(2, 2, 5, 2, 4)
    assert_close(*(derivatives(lambda x, w, f=f: f(x, w, *how), x, w, c) for f in (correlate, reference)))


@pytest.mark.parametrize("sides", [((1, 1), (1, 1)), ((0, 0), (2, 2)), ((2, 1), (1, 2))])
def test_tiles(sides):
    # Kernels of 3 x 3 of many channels: in tiles, where the extents are even (the last are odd).
    x, w = normal(0, 2, 6, 8, 32), normal(1, 3, 3, 32, 40) / 10
    assert_as_lax(x, w, (1, 1), sides)
    forwards = convolutions(lambda x, w: correlate(x, w, (1, 1), sides), x, w)
    assert bool(forwards) == (jax.default_backend() != "cpu" or sides[0] == (2, 1))


@pytest.mark.parametrize("sides", [((2, 2),), ((4, 0),), ((3, 2),)])
def test_tiles_in_a_row(sides):
    # Windows of 5 of many channels: in tiles of 4, unless their number does not divide the length (the last).
    x, w = normal(0, 2, 32, 40), normal(1, 5, 40, 32) / 14
    assert_as_lax(x, w, (1,), sides)
    forwards = convolutions(lambda x, w: correlate(x, w, (1,), sides), x, w)
    assert bool(forwards) == (jax.default_backend() != "cpu" or sides[0] == (3, 2))


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_toom_cook_is_the_convolution(m, k):
    points = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))[: m + k - 2]
    tiles = conv_cpu._toom_cook(m, k, points)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(m + k - 1), rng.standard_normal(k)
    expected = np.correlate(x, w)
    np.testing.assert_allclose(tiles.output @ ((tiles.kernel @ w) * (tiles.image @ x)), expected, atol=1e-12)


@pytest.mark.parametrize("sides", [((1, 1), (1, 1)), ((0, 0), (2, 0)), ((2, 1), (1, 2))])
@pytest.mark.parametrize(("i", "o", "wide"), [(16, 16, 4), (1, 16, 4), (5, 8, 6), (16, 1, 0), (20, 3, 0)])
def test_few_features(i, o, wide, sides):
    # Neighbours in a row together, in a window as `wide`, or products added up where there is hardly a feature (0).
    x, w = normal(0, 2, 6, 8, i), normal(1, 3, 3, i, o) / 10
    assert_as_lax(x, w, (1, 1), sides)
    if jax.default_backend() == "cpu" and sides[1] != (1, 2):  # which leaves rows that are odd
        text = jax.jit(lambda x, w: correlate(x, w, (1, 1), sides)).lower(x, w).compile().as_text()
        assert (f"window={{size=3x{wide} stride=1x{wide - 2}" in text) == (wide > 0)
        assert (" convolution(" in text) == (wide > 0)


@pytest.mark.parametrize("stride", [1, 2])
def test_forward_mode(stride):
    how = (stride, stride), ((1, 1), (1, 1))
    x, w, dx, dw = normal(0, 2, 6, 6, 3), normal(1, 3, 3, 3, 4), normal(2, 2, 6, 6, 3), normal(3, 3, 3, 3, 4)
    second = lambda f: jax.jvp(jax.grad(lambda x, w: jnp.sum(f(x, w, *how) ** 3), (0, 1)), (x, w), (dx, dw))
    assert_close(*(jax.jit(lambda f=f: second(f))() for f in (correlate, reference)))


AXES = [axes for axes in itertools.product((None, 0, 1), repeat=2) if axes != (None, None)]


@pytest.mark.parametrize("axes", AXES)
def test_vmap(axes):
    how = (2,), ((1, 1),)
    x, w, c = normal(0, 2, 6, 3), normal(1, 3, 3, 4), normal(2, 2, 3, 4)
    many = lambda seed, array, axis: array if axis is None else np.stack([array, normal(seed, *array.shape)], axis)
    xs, ws = many(4, x, axes[0]), many(5, w, axes[1])
    mapped = lambda f: jax.vmap(lambda x, w: derivatives(lambda x, w: f(x, w, *how), x, w, c), axes)(xs, ws)
    assert_close(*(jax.jit(lambda f=f: mapped(f))() for f in (correlate, reference)))


def test_vmap_of_vmap():
    # Members of examples: the kernel is shared within a member, also by its gradient.
    xs, ws = normal(0, 3, 4, 5, 2), normal(1, 3, 3, 2, 2)
    how = (1,), ((1, 1),)

    def losses(convolution):
        one = lambda w, x: jnp.sum(convolution(x[None], w, *how) ** 2)
        return jax.vmap(jax.value_and_grad(lambda w, xs: jnp.mean(jax.vmap(one, (None, 0))(w, xs))))(ws, xs)

    assert_close(*(jax.jit(lambda f=f: losses(f))() for f in (correlate, reference)))


def of_one(x, w):
    y = jnp.tanh(correlate(x[None], w[0], (1,) * (x.ndim - 1), ((1, 1),) * (x.ndim - 1))[0])
    return jnp.sum(correlate(y[None], w[1], (2,) * (x.ndim - 1), ((1, 1),) * (x.ndim - 1)) ** 2)


def guided(w, x):
    step = lambda x, _: (x + jax.vmap(jax.grad(of_one), (0, None))(x, w), None)
    return lax.scan(step, x, length=3)[0]


def trained(w, x):
    loss = lambda w: jnp.mean(jax.vmap(of_one, (0, None))(x, w))
    return lax.scan(lambda w, _: (jax.tree.map(jnp.subtract, w, jax.grad(loss)(w)), None), w, length=3)[0]


def aligned(w, x):
    loss = lambda w: jnp.mean(jax.vmap(lambda x: jnp.sum(jax.grad(of_one)(x, w) ** 2))(x))
    return lax.scan(lambda w, _: (jax.tree.map(jnp.subtract, w, jax.grad(loss)(w)), None), w, length=3)[0]


def ensemble(w, x):
    return jax.vmap(trained, (0, None))(jax.tree.map(lambda a: jnp.stack([a, a]), w), x)


@pytest.mark.parametrize("length", [8, 2])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("run", [guided, trained, aligned, ensemble])
def test_loops_hold_only_the_fast_convolution(run, rank, length):
    if jax.default_backend() != "cpu":
        pytest.skip("of the CPU's formulations")
    w = tuple(normal(i, *(3,) * rank, 4, 4) for i in range(2))
    assert convolutions(run, w, normal(3, 5, *(length,) * rank, 4)) <= CANONICAL


def test_the_check_sees_other_convolutions():
    if jax.default_backend() != "cpu":
        pytest.skip("of the CPU's formulations")
    x, w = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 4)
    naive = lambda x: jax.grad(lambda x: jnp.sum(reference(x, w, (1, 1), ((1, 1), (1, 1))) ** 2))(x)
    assert not convolutions(lambda x: lax.scan(lambda x, _: (naive(x), None), x, length=3)[0], x) <= CANONICAL


def test_a_batch_has_one_gradient_of_the_kernel():
    w = (normal(0, 3, 3, 4, 4), normal(1, 3, 3, 4, 4))
    text = str(jax.make_jaxpr(trained)(w, normal(2, 5, 8, 8, 4)))
    shapes = set(re.findall(r":f32\[([\d,]+)\] = gather_kernel", text))
    assert shapes == {"1,3,3,4,4"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_convolutions_of_xla(platform):
    w = (normal(0, 3, 3, 4, 4), normal(1, 3, 3, 4, 4))
    text = jax.jit(trained).trace(w, normal(2, 5, 2, 2, 4)).lower(lowering_platforms=(platform,)).as_text()
    # Two forwards, one gradient in x and two in w; on a CPU these would be matrix products.
    assert text.count("stablehlo.convolution") == 5


def test_same_padding_and_strides_of_the_layer():
    shape = lambda layer, *x: jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.zeros(x))[0].shape
    for k, length in itertools.product((1, 3, 5, 7), (4, 5, 16)):
        assert shape(conv.Conv(6, (k,)), length, 2) == (length, 6)
        assert shape(conv.Conv(6, (k, k), stride=2), length, length, 2) == (-(-length // 2), -(-length // 2), 6)
    assert shape(conv.ConvTranspose(6), 8, 2) == (16, 6)
    assert shape(conv.ConvTranspose(6, (4, 4)), 8, 3, 2) == (16, 6, 6)


def test_layers_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    x = normal(0, 4, 6)  # channels last, shorter than the window of 5
    with torch.no_grad():
        for theirs, layer, order in (
            (torch.nn.Conv1d(6, 3, 5, padding=2), conv.Conv(3, (5,)), (2, 1, 0)),
            (torch.nn.Conv1d(6, 3, 3, stride=2, padding=1), conv.Conv(3, (3,), stride=2), (2, 1, 0)),
            (torch.nn.ConvTranspose1d(6, 3, 4, 2, 1), conv.ConvTranspose(3), (2, 1, 0)),
        ):
            expected = theirs(torch.tensor(x.T[None]))[0].numpy().T
            params = {"kernel": theirs.weight.numpy().transpose(order), "bias": theirs.bias.numpy()}
            assert_close(layer.apply({"params": params}, x), expected)


def test_initial_values_are_those_of_pytorch():
    params = conv.Conv(50, (3, 3)).init(jax.random.key(0), jnp.zeros((4, 4, 10)))["params"]
    bound = 90**-0.5
    for leaf in params.values():
        assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
        np.testing.assert_allclose(float(jnp.std(params["kernel"])), bound / 3**0.5, rtol=0.03)
    transposed = conv.ConvTranspose(8).init(jax.random.key(0), jnp.zeros((4, 100)))["params"]["kernel"]
    assert transposed.shape == (4, 8, 100)
    assert 0.9 * 32**-0.5 < float(jnp.abs(transposed).max()) <= 32**-0.5
    zero = conv.Conv(3, initial=jax.nn.initializers.zeros).init(jax.random.key(0), jnp.zeros((4, 4, 2)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(zero))


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        conv.Conv(3).init(jax.random.key(0), jnp.zeros((8, 8)))
    with pytest.raises(ValueError, match="must fit"):
        correlate(jnp.zeros((1, 4, 3)), jnp.zeros((3, 2, 5)), (1,), ((1, 1),))
    with pytest.raises(ValueError, match="window must fit into"):
        correlate(jnp.zeros((1, 2, 3)), jnp.zeros((5, 3, 5)), (1,), ((0, 0),))
    with pytest.raises(ValueError, match="must fit"):
        conv.spread(jnp.zeros((1, 1, 4, 5)), jnp.zeros((1, 3, 2, 5)), (1,), ((1, 1),), (9,))
