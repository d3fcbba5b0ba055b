import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from gendiff.nets import temporal
from gendiff.nets.temporal import GroupNorm, TemporalUnet

TINY = TemporalUnet(width=8, multipliers=(1, 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def abstract(net, *shape):
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(()))


def start(net, *shape):
    """Parameters of which none is 0."""
    leaves, structure = jax.tree.flatten(abstract(net, *shape))
    return jax.tree.unflatten(structure, [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize(
    ("net", "shape", "count"),
    [
        (TemporalUnet(), (256, 6), 3_682_118),
        (TemporalUnet(), (128, 6), 3_682_118),
        (TemporalUnet(multipliers=(1, 2, 4, 8)), (32, 14), 3_956_302),
        (TemporalUnet(multipliers=(1, 2, 4, 8)), (32, 23), 3_958_327),
    ],
)
def test_parameters_are_as_many_as_published(net, shape, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(net, *shape))) == count


def test_mish_and_its_derivatives():
    x = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -100, 100, 1e4]])
    e = np.exp(np.clip(x, -700, 100))
    # tanh(ln(1 + e)) = 1 - s with s = 2 / ((1 + e)^2 + 1), and s' = -(1 + e) e s^2.
    w, s = e * (e + 2) / (e * (e + 2) + 2), 2 / ((1 + e) ** 2 + 1)
    s1 = -(1 + e) * e * s**2
    s2 = -(e + 2 * e**2) * s**2 - 2 * (1 + e) * e * s * s1
    inside = abs(x) < 1000
    for function, exact in (
        (temporal.mish, x * w),
        (jax.grad(temporal.mish), w - x * s1),
        (jax.grad(jax.grad(temporal.mish)), -2 * s1 - x * s2),
    ):
        given = np.asarray(jax.jit(jax.vmap(function))(x.astype(np.float32)))
        assert np.isfinite(given).all()
        np.testing.assert_allclose(given[inside], exact[inside], rtol=1e-5, atol=3e-6)


def test_embedding_is_sines_then_cosines():
    given = jax.jit(lambda t: temporal.embedding(t, 32))(jnp.int32(99))
    angles = 99 * np.exp(-np.arange(16) * np.log(10_000) / 15)
    np.testing.assert_allclose(given, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-5)


def test_group_norm_of_one_sequence():
    x = 3 + 2 * normal(0, 5, 7, 24)
    theirs = nn.GroupNorm(8, epsilon=1e-5, reduction_axes=(-2, -1), use_fast_variance=False)
    params = {"params": {"scale": normal(1, 24), "bias": normal(2, 24)}}
    given = jax.jit(jax.vmap(lambda x: GroupNorm().apply(params, x)))(x)
    np.testing.assert_allclose(given, theirs.apply(params, x), atol=3e-6)
    fresh = GroupNorm().init(jax.random.key(0), x[0])["params"]
    assert (fresh["scale"] == 1).all()
    assert not fresh["bias"].any()


def test_one_example_at_a_time():
    params, x, t = start(TINY, 8, 3), normal(1, 3, 8, 3), np.int32([0, 7, 99])
    one = jax.jit(TINY.apply)
    together = jax.jit(jax.vmap(TINY.apply, (None, 0, 0)))(params, x, t)
    assert together.shape == x.shape
    for i in range(3):
        np.testing.assert_allclose(together[i], one(params, x[i], t[i]), atol=2e-5)
    assert np.abs(one(params, x[0], t[0]) - one(params, x[0], t[1])).max() > 1e-3, "it reads the time"
    np.testing.assert_array_equal(one(params, x[0], t[1]), one(params, x[0], np.float32(7)))


def test_any_length_that_halves():
    for multipliers, horizon in (((1,), 3), ((1, 2), 2), ((1, 2, 4), 12), ((2, 1, 1), 4)):
        net = TemporalUnet(8, multipliers)
        assert jax.eval_shape(net.apply, abstract(net, horizon, 5), jnp.zeros((horizon, 5)), 0).shape == (horizon, 5)


@pytest.mark.parametrize("shape", [(6, 3), (0, 3), (8,), (2, 8, 3)])
def test_lengths_that_do_not_are_named(shape):
    with pytest.raises(ValueError, match=re.escape(f"horizon a multiple of 4, got {shape}")):
        abstract(TemporalUnet(8, (1, 2, 4)), *shape)


def test_channels_must_divide_into_groups():
    with pytest.raises(ValueError, match="channels must be a multiple of 8, got 12"):
        abstract(TemporalUnet(12), 8, 3)


def test_bfloat16_stays():
    half = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)
    params, x, one = start(TINY, 8, 3), normal(0, 8, 3), jax.jit(TINY.apply)
    given = one(half(params), half(x), 5)
    assert given.dtype == jnp.bfloat16
    np.testing.assert_allclose(given.astype(np.float32), one(params, x, 5), rtol=0, atol=0.2)


def products(jaxpr, shape):
    """Shapes of the products with kernels of a shape, in a program and the programs within."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.shape == shape:
            yield equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner, shape)


def test_embedding_is_computed_once_for_all_samples():
    program = jax.make_jaxpr(jax.vmap(TINY.apply, (None, 0, None)))(abstract(TINY, 8, 3), jnp.zeros((5, 8, 3)), 0)
    assert list(products(program.jaxpr, (8, 32))) == [(32,)]


def model(params, x):
    return jax.vmap(TINY.apply, (None, 0, 0))(params, x, jnp.arange(len(x)))


def potential(params, x):
    return jnp.sum(TINY.apply(params, x, 3) ** 2)


def trained(params, x):
    return descended(params, lambda params: jnp.mean((model(params, x) - x) ** 2))


def aligned(params, x):
    slope = jax.vmap(jax.grad(potential, 1), (None, 0))
    return descended(params, lambda params: jnp.mean((slope(params, x) - x) ** 2))


def descended(params, loss):
    step = lambda params, _: (jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params)), None)
    return lax.scan(step, params, length=3)[0]


def sampled(params, x):
    return lax.scan(lambda x, _: (0.9 * x + 0.1 * model(params, x), None), x, length=3)[0]


@pytest.mark.parametrize("run", [sampled, trained, aligned])
def test_loops_hold_only_the_fast_convolution(run):
    if jax.default_backend() != "cpu":
        pytest.skip("of the CPU's formulations")
    # Of lengths 8 and 4, which is less than the window.
    text = jax.jit(run).lower(start(TINY, 8, 3), normal(0, 2, 8, 3)).compile().as_text()
    lines = [line for line in text.splitlines() if " convolution(" in line]
    assert lines
    assert all("dim_labels=b0f_0io->b0f" in line for line in lines)
    assert not any(re.search(r"[lr]hs_dilate=|group_count=|rhs_reversal=", line) for line in lines)
