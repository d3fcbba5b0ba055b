import jax
import jax.numpy as jnp
import numpy as np

from gendiff.nets import resnet

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


def test_running_averages_reach_the_moments_of_the_data():
    module = resnet.BatchNorm(momentum=0.5)
    variables = module.init(jax.random.key(0), IMAGES[0])
    step = jax.vmap(
        lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]), (None, 0), (0, None), axis_name=resnet.BATCH
    )
    for _ in range(25):
        normalised, updated = jax.jit(step)(variables, IMAGES)
        variables = variables | updated
    statistics = variables["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], IMAGES.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(statistics["var"], IMAGES.var((0, 1, 2), ddof=1), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(normalised).mean((0, 1, 2)), np.zeros(2), atol=1e-5)
    np.testing.assert_allclose(np.asarray(normalised).var((0, 1, 2)), np.ones(2), rtol=1e-3)
