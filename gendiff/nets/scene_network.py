"""A network of traffic scenes: the encoder of the map and the transformer over vehicles, together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gendiff.nets.scene_transformer import Head, MapEncoder, Place, SceneTransformer, Units
from gendiff.types import Params, Scalar


class SceneNetwork(NamedTuple):
    """Map encoder and transformer as a network: `init`, `bind` the parameters to a place, `apply`."""

    units: Units
    head: Head = "denoise"
    width: int = 128
    layers: int = 4
    heads: int = 8
    expansion: int = 2
    hidden: int = 32

    @property
    def encoder(self) -> MapEncoder:
        """Module for the map."""
        return MapEncoder(self.width, self.heads)

    @property
    def trunk(self) -> SceneTransformer:
        """Module for the vehicles."""
        return SceneTransformer(self.units, self.head, self.width, self.layers, self.heads, self.expansion, self.hidden)

    def init(self, key: Array, place: Place) -> Params:
        """Draw initial parameters {"map": .., "scene": ..}."""
        map_key, scene_key = jax.random.split(key)
        memory, encoder = self.encoder.init_with_output(map_key, place.distance)
        u = jnp.zeros((len(place.present), 7))
        return {"map": encoder, "scene": self.trunk.init(scene_key, u, jnp.zeros(()), place, memory)}

    def bind(self, params: Params, place: Place) -> Params:
        """Return parameters for a place, with the encoded map, which does not depend on vehicles or noise."""
        return {
            "scene": params["scene"],
            "place": place,
            "memory": self.encoder.apply(params["map"], place.distance),
        }

    def apply(self, bound: Params, u: Float[Array, "k 7"], c_noise: Scalar) -> Array:
        """Return the head's output, for parameters bound to a place."""
        out: Any = self.trunk.apply(bound["scene"], u, c_noise, bound["place"], bound["memory"])
        return out

    @property
    def size(self) -> int:
        """Number of parameters of the vehicles' part, which a sampler evaluates in every step."""
        place = Place(jnp.zeros((64, 64)), jnp.ones(2, bool))
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.init, jax.random.key(0), place)["scene"]))


def begin_from(theta: Params, fresh: Params) -> Params:
    """Return a classifier's fresh parameters with those of a denoiser in their place: all but the head, of as many
    layers as the classifier has; those of another shape stay fresh."""
    known = dict(jax.tree_util.tree_flatten_with_path(theta)[0])

    def begin(path: Any, leaf: Array) -> Array:
        found, name = known.get(path), jax.tree_util.keystr(path)
        if found is None or "output" in name:
            return leaf
        # The relative encodings of all layers stand side by side in one matrix.
        cut = found[..., : leaf.shape[-1]] if "relat" in name else found
        return jnp.asarray(cut) if cut.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(begin, fresh)
