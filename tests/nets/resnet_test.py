import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import losses, types
from gendiff.nets import resnet
from gendiff.nets.conv import Conv

IMAGES = np.random.default_rng(0).normal(size=(3, 9, 8, 2)).astype(np.float32)
TINY = resnet.ResNet(widths=(4, 4, 4, 4), blocks=(1, 1, 1, 1))


def test_parameters_are_as_many_as_published():
    shapes = lambda outputs: jax.eval_shape(resnet.ResNet(outputs).init, jax.random.key(0), jnp.zeros((64, 64, 3)))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(shapes(None)["params"]) == 11_177_025
    assert count(shapes(1000)["params"]) == 11_689_512


def test_max_pool_is_that_of_xla():
    given = jax.vmap(resnet.max_pool)(IMAGES)
    window = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    np.testing.assert_array_equal(given, jax.lax.reduce_window(IMAGES, -jnp.inf, jax.lax.max, *window))


def test_an_image_knows_nothing_of_its_batch_but_in_training():
    shapes, rng = jax.eval_shape(TINY.init, jax.random.key(0), IMAGES[0]), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)
    evaluate = jax.jit(jax.vmap(lambda x: TINY.apply(variables, x)))
    np.testing.assert_allclose(evaluate(IMAGES)[:2], evaluate(IMAGES[:2]), rtol=1e-5)
    train = jax.jit(lambda images: resnet.train_logits(TINY, variables, images)[0])
    assert np.abs(train(IMAGES)[:2] - train(IMAGES[:2])).max() > 1e-3


def test_moments_of_a_whole_set_are_those_of_every_norm_s_input():
    # Evaluated with them, the inputs of all norms (the outputs of the convolutions before) have just these moments, and
    # the logits are those of the batch in training.
    shapes, rng = jax.eval_shape(TINY.init, jax.random.key(0), IMAGES[0]), np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    in_batch = jax.vmap(lambda x: resnet.in_batch(TINY, variables, x), axis_name=types.BATCH, out_axes=(0, None))
    logits, settled = jax.jit(in_batch)(IMAGES)
    convolved = lambda module, _: isinstance(module, Conv)
    evaluate = lambda x: TINY.apply(settled, x, capture_intermediates=convolved, mutable=["intermediates"])
    evaluated, seen = jax.jit(jax.vmap(evaluate))(IMAGES)
    np.testing.assert_allclose(evaluated, logits, rtol=1e-3, atol=1e-5)
    inputs = {
        jax.tree_util.keystr(path[1:-2], simple=True): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(seen)
    }
    norms = jax.tree.leaves_with_path(settled["batch_stats"], is_leaf=lambda tree: "mean" in tree)
    assert len(norms) == len(inputs) == 1 + 2 * 4 + 3
    for path, moments in norms:
        before = jax.tree_util.keystr(path, simple=True).replace("bn", "conv").replace("downsample_1", "downsample_0")
        np.testing.assert_allclose(moments["mean"], inputs[before].mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(moments["var"], inputs[before].var((0, 1, 2)), rtol=1e-3, atol=1e-6)


def test_gradient_reaches_all_layers_through_the_batch():
    net = resnet.ResNet(widths=(4, 6), blocks=(1, 1))
    variables = jax.jit(net.init)(jax.random.key(0), IMAGES[0])
    one = lambda params, key, x: resnet.in_batch(net, variables | {"params": params}, x)[0] ** 2
    gradient = jax.jit(jax.grad(losses.mean(one)))(variables["params"], jax.random.key(1), IMAGES)
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-5


def test_one_value_has_no_variance():
    module = resnet.BatchNorm()
    train = lambda x: module.apply(module.init(jax.random.key(0), x), x, True, mutable=["batch_stats"])[0]
    with pytest.raises(ValueError, match="must have 2 or more values of a channel in a training batch, got 1"):
        jax.vmap(train, axis_name=types.BATCH)(IMAGES[:1, :1, :1])


def test_running_averages_reach_the_moments_of_the_data():
    module = resnet.BatchNorm(momentum=0.5)
    variables = module.init(jax.random.key(0), IMAGES[0])
    step = jax.vmap(
        lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]), (None, 0), (0, None), axis_name=types.BATCH
    )
    for _ in range(25):
        normalised, updated = jax.jit(step)(variables, IMAGES)
        variables = variables | updated
    statistics = variables["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], IMAGES.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(statistics["var"], IMAGES.var((0, 1, 2), ddof=1), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(normalised).mean((0, 1, 2)), np.zeros(2), atol=1e-5)
    np.testing.assert_allclose(np.asarray(normalised).var((0, 1, 2)), np.ones(2), rtol=1e-3)
