"""A network of scenes, and a classifier that begins with a denoiser."""

import jax
import jax.numpy as jnp
import numpy as np

from gendiff.nets.scene_network import SceneNetwork, begin_from
from gendiff.nets.scene_transformer import Place, SceneTransformer, Units

UNITS = Units((0.0, 0.0, 4.8, 1.9, 0.0, 0.0, 5.0), (25.0, 25.0, 1.2, 0.25, 1.0, 1.0, 5.0), 50.0)
PLACE = Place(jnp.zeros((32, 32)), jnp.ones(3, bool))


def parameters(head: str, layers: int, seed: int, width: int = 16) -> tuple[SceneNetwork, dict]:
    network = SceneNetwork(SceneTransformer(UNITS, head, width, layers, heads=2, hidden=4))
    return network, network.init(jax.random.key(seed), PLACE)


def test_size_is_that_of_the_vehicles_part():
    network, params = parameters("agent", 1, 0)
    assert network.size == sum(leaf.size for leaf in jax.tree.leaves(params["scene"]))


def test_a_classifier_begins_with_the_denoiser_s_first_layers():
    (_, theta), (_, fresh) = parameters("denoise", 2, 0), parameters("agent", 1, 1)
    begun = begin_from(theta, fresh)
    assert jax.tree.structure(begun) == jax.tree.structure(fresh)
    same = lambda one, other: all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    scene, old = begun["scene"]["params"], theta["scene"]["params"]
    assert same(begun["map"], theta["map"])
    assert same(scene["self0"], old["self0"])
    assert same(scene["output"], fresh["scene"]["params"]["output"])
    np.testing.assert_array_equal(scene["relation"]["kernel"], old["relation"]["kernel"][:, :4])


def test_other_widths_stay_fresh():
    (_, theta), (_, fresh) = parameters("denoise", 1, 0), parameters("agent", 1, 1, width=8)
    begun = begin_from(theta, fresh)
    np.testing.assert_array_equal(
        begun["scene"]["params"]["input"]["kernel"], fresh["scene"]["params"]["input"]["kernel"]
    )
