import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from gendiff.nets import unet
from gendiff.nets.unet import HalfUNet, UNet

MNIST = {"width": 128, "multipliers": (1, 2, 2, 2)}
ADM_128 = {"width": 256, "multipliers": (1, 1, 2, 3, 4), "attention": (32, 16, 8), "head_channels": None}
BEDROOM = {"width": 256, "multipliers": (1, 1, 2, 2, 4, 4), "attention": (32, 16, 8)}
TENCH = HalfUNet(width=128, multipliers=(1, 1, 2, 3, 4), attention=(32, 16, 8))
SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}


def abstract(net, *shape, **more):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(()), **more))


def start(net, *shape, **more):
    """Parameters away from the initial zeros, under which most gradients vanish."""
    leaves, structure = jax.tree.flatten(abstract(net, *shape, **more))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def images(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("net", "shape", "count"),
    [
        (UNet(channels=1, **MNIST, blocks=3, attention=(16, 8), head_channels=None), (32, 32, 1), 52_538_369),
        (HalfUNet(**MNIST, attention=(16, 8, 4)), (32, 32, 1), 17_835_521),
        (TENCH, (128, 128, 3), 42_055_553),
        (TENCH.clone(outputs=1000), (128, 128, 3), 42_568_040),
        (UNet(channels=6, **ADM_128, resample_blocks=True, classes=1000), (128, 128, 3), 421_529_606),
        (UNet(channels=6, **BEDROOM, resample_blocks=True, dropout=0.1), (256, 256, 3), 552_814_086),
    ],
)
def test_parameters_are_as_many_as_published(net, shape, count):
    more = {} if net.classes is None else {"label": 0}
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(net, *shape, **more))) == count


def test_default_network_is_small():
    for net in (UNet(), HalfUNet()):
        assert 5e5 < sum(leaf.size for leaf in jax.tree.leaves(abstract(net, 16, 16, 1))) < 3e6


def test_embedding_is_cosines_then_sines():
    given = np.asarray(jax.jit(lambda t: unet.embedding(t, 128))(jnp.int32(700)))
    angles = 700 * np.exp(-np.log(10_000) * np.arange(64) / 64)
    np.testing.assert_allclose(given, np.concatenate([np.cos(angles), np.sin(angles)]), atol=2e-4)
    np.testing.assert_array_equal(given, unet.embedding(jnp.float32(700), 128))


@pytest.mark.parametrize(
    ("channels", "least", "count"),
    [(128, 4, 32), (192, 4, 32), (640, 4, 32), (96, 4, 24), (32, 4, 8), (48, 4, 12), (20, 4, 5), (6, 4, 1), (7, 4, 1),
     (2, 4, 1), (64, 1, 32), (32, 1, 32), (48, 1, 24)],
)  # fmt: skip
def test_groups(channels, least, count):
    assert unet.groups(channels, least) == count


def test_group_norm_of_one_image():
    x = 3 + 2 * images(0, 5, 4, 4, 12)
    ours, theirs = unet.GroupNorm(), nn.GroupNorm(3, epsilon=1e-5, reduction_axes=(-3, -2, -1), use_fast_variance=False)
    params = {"params": {"scale": images(1, 12), "bias": images(2, 12)}}
    film = images(3, 12), images(4, 12)
    plain = jax.jit(jax.vmap(lambda x: ours.apply(params, x)))(x)
    np.testing.assert_allclose(plain, theirs.apply(params, x), atol=2e-6)
    modulated = jax.jit(jax.vmap(lambda x: ours.apply(params, x, film)))(x)
    plain = np.asarray(plain)
    np.testing.assert_allclose(
        modulated, plain * (1 + film[0][None, None, None]) + film[1][None, None, None], atol=5e-6
    )


def test_group_norm_is_in_float32():
    x = (100 + images(0, 8, 8, 16)).astype(jnp.bfloat16)
    module = unet.GroupNorm()
    params = module.init(jax.random.key(0), x)
    given = module.apply(params, x)
    assert given.dtype == jnp.bfloat16
    np.testing.assert_allclose(given.astype(np.float32), module.apply(params, x.astype(np.float32)), atol=0.02)


def test_extents_are_halved_and_doubled():
    x = images(0, 4, 6, 2)
    np.testing.assert_allclose(unet.halved(x)[1, 2], x[2:4, 4:6].mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(unet.doubled(x), x.repeat(2, 0).repeat(2, 1))
    np.testing.assert_allclose(unet.halved(unet.doubled(x)), x, rtol=1e-6)


TINY = {"width": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
NETS = {
    "plain": UNet(channels=2, **SMALL),
    "odd widths": UNet(
        channels=2, **SMALL | {"width": 10, "head_channels": None, "heads": 5}, resample_blocks=True, film=False
    ),
    "half": HalfUNet(**SMALL, outputs=3),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_one_example_at_a_time(net):
    params, x, t = start(net, 8, 4, 2), images(1, 3, 8, 4, 2), np.float32([0, 400, 999])
    together = jax.jit(jax.vmap(net.apply, (None, 0, 0)))(params, x, t)
    shape = (8, 4, 2) if isinstance(net, UNet) else () if net.outputs is None else (3,)
    assert together.shape == (3, *shape)
    one = jax.jit(net.apply)
    for i in range(3):
        alone = one(params, x[i], t[i])
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    assert np.ptp(np.asarray(together), 0).max() > 1e-3, "it says something"


def test_time_may_be_an_integer():
    net = HalfUNet(**TINY)
    params, x = start(net, 4, 4, 1), images(0, 4, 4, 1)
    one = jax.jit(net.apply)
    assert float(one(params, x, jnp.int32(37))) == float(one(params, x, jnp.float32(37)))


def products(jaxpr, shape):
    """Shapes of the products with kernels of a shape, in a program and the programs within."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.shape == shape:
            yield equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner, shape)


@pytest.mark.parametrize("net", [NETS["plain"], NETS["half"]], ids=["whole", "half"])
def test_embedding_is_computed_once_for_all_samples(net):
    params, x = abstract(net, 8, 8, 2), jnp.zeros((5, 8, 8, 2))
    step = lambda params, x, t: jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(net.apply(params, x, t)))(x))(x)
    program = jax.make_jaxpr(step)(params, x, jnp.zeros(())).jaxpr
    assert set(products(program, (32, 32))) == {(32,)}  # in the embedding and to what FiLM takes of it


def test_starts_at_zero():
    net = UNet(channels=2, **TINY | {"blocks": 0})
    params = jax.jit(net.init)(jax.random.key(0), images(0, 8, 8, 2), jnp.zeros(()))
    assert not np.asarray(jax.jit(net.apply)(params, images(0, 8, 8, 2), jnp.float32(3))).any()
    for path, leaf in jax.tree.leaves_with_path(params["params"]):
        *_, layer, kind = (part.key for part in path)
        zero = layer in ("conv_out", "out_2", "output") or (
            kind == "bias" and layer in ("norm", "norm_in", "norm_out", "out_0")
        )
        assert (not leaf.any()) == zero, path


def test_class_conditioning():
    net = UNet(channels=1, **TINY, classes=4)
    params, x = start(net, 8, 8, 1, label=0), images(0, 8, 8, 1)
    given = jax.jit(jax.vmap(lambda label: net.apply(params, x, jnp.float32(5), label)))(jnp.arange(4))
    assert np.abs(given[1] - given[2]).max() > 1e-3
    assert np.isnan(jax.jit(net.apply)(params, x, jnp.float32(5), 4)).all(), "no class"
    with pytest.raises(ValueError, match="label"):
        net.apply(params, x, jnp.float32(5))
    with pytest.raises(ValueError, match="label"):
        NETS["plain"].init(jax.random.key(0), x, jnp.zeros(()), 1)


def test_dropout_is_for_training():
    net = UNet(channels=1, **TINY, dropout=0.5)
    params, x, t = start(net, 8, 8, 1), images(0, 8, 8, 1), jnp.float32(5)
    dropped = jax.jit(lambda key: net.apply(params, x, t, train=True, rngs={"dropout": key}))
    plain, a, b = jax.jit(net.apply)(params, x, t), dropped(jax.random.key(1)), dropped(jax.random.key(2))
    assert np.abs(plain - a).max() > 1e-3
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(plain, jax.jit(UNet(channels=1, **TINY).apply)(params, x, t))


def test_learned_variance_is_not_eps():
    x = images(0, 4, 4, 3)
    np.testing.assert_array_equal(unet.eps(np.concatenate([x, 1 + x], -1), x), x)
    np.testing.assert_array_equal(unet.eps(x, x), x)


def test_attention_is_softmax_of_products():
    q, k, v = images(0, 3, 2, 4), images(1, 5, 2, 4), images(2, 5, 2, 4)
    for head in range(2):
        logits = q[:, head] @ k[:, head].T / 2.0
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(unet.attend(q, k, v)[:, head], weights @ v[:, head], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9, 1), (7, 8, 1), (8, 8)])
def test_extents_must_halve(shape):
    with pytest.raises(ValueError, match="multiples of 2"):
        abstract(NETS["plain"], *shape)


def test_channels_must_divide_into_heads():
    with pytest.raises(ValueError, match="heads"):
        abstract(UNet(channels=1, **SMALL | {"head_channels": None, "heads": 3}), 8, 8, 1)


def test_bfloat16_stays():
    net = HalfUNet(**TINY)
    half = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)
    params, x = start(net, 8, 8, 1), images(0, 8, 8, 1)
    given = jax.jit(net.apply)(half(params), half(x), jnp.float32(500))
    assert given.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(given), net.apply(params, x, jnp.float32(500)), rtol=0.1, atol=0.1)


def value(net, params, x, t):
    return jnp.sum(net.apply(params, x, t) ** 2)


def guided(params, x):
    gradient = jax.vmap(jax.grad(lambda x, t: value(NETS["half"], params, x, t)), (0, None))
    return lax.scan(lambda x, t: (x + 1e-3 * gradient(x, t), None), x, jnp.arange(3.0))[0]


def trained(params, x):
    loss = lambda params, t: jnp.mean(jax.vmap(lambda x: value(NETS["plain"], params, x, t))(x))
    descend = lambda p, g: p - 1e-3 * g
    step = lambda params, t: (jax.tree.map(descend, params, jax.grad(loss)(params, t)), None)
    return lax.scan(step, params, jnp.arange(3.0))[0]


@pytest.mark.parametrize(("net", "run"), [("half", guided), ("plain", trained)])
def test_loops_hold_only_the_fast_convolution(net, run):
    if jax.default_backend() != "cpu":
        pytest.skip("of the CPU's formulations")
    text = jax.jit(run).lower(start(NETS[net], 8, 8, 2), images(0, 3, 8, 8, 2)).compile().as_text()
    lines = [line for line in text.splitlines() if " convolution(" in line]
    assert lines
    assert all("dim_labels=b01f_01io->b01f" in line for line in lines)
    assert not any(re.search(r"[lr]hs_dilate=|group_count=|rhs_reversal=", line) for line in lines)
