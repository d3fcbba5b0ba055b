"""A network of traffic scenes: the encoder of the map and the transformer over vehicles, together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gendiff.nets.scene_transformer import MapEncoder, Place, SceneTransformer
from gendiff.types import Params, Scalar


class SceneNetwork(NamedTuple):
    """Map encoder and transformer as a network: `init`, `bind` the parameters to a place, `apply`."""

    trunk: SceneTransformer
    """Module for the vehicles."""

    @property
    def encoder(self) -> MapEncoder:
        """Module for the map."""
        return MapEncoder(self.trunk.width, self.trunk.heads)

    def init(self, key: Array, place: Place) -> Params:
        """Draw initial parameters {"map": .., "scene": ..}."""
        map_key, scene_key = jax.random.split(key)
        memory, encoder = self.encoder.init_with_output(map_key, place.distance)
        u = jnp.zeros((len(place.present), 7))
        return {"map": encoder, "scene": self.trunk.init(scene_key, u, jnp.zeros(()), place, memory)}

    def bind(self, params: Params, place: Place) -> Params:
        """Return parameters for a place, with the encoded map, which does not depend on vehicles or noise."""
        memory = self.encoder.apply(params["map"], place.distance)
        return {"scene": params["scene"], "place": place, "memory": memory}

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
    """Replace a classifier's fresh parameters by a denoiser's, except the head and other shapes."""
    known = dict(jax.tree_util.tree_flatten_with_path(theta)[0])

    def begin(path: Any, leaf: Array) -> Array:
        source, name = known.get(path), jax.tree_util.keystr(path)
        if source is None or "output" in name:
            return leaf
        # Cut, because one matrix has the relative encodings of all layers, and the classifier may have fewer.
        cut = source[..., : leaf.shape[-1]] if "relat" in name else source
        return jnp.asarray(cut) if cut.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(begin, fresh)
