"""A transformer over the vehicles of a traffic scene, for denoisers and for classifiers.

Vehicles are a set, and the network is equivariant to permutations.  Relations of two vehicles (relative position, gaps)
enter self-attention as a relative positional encoding in queries, keys and values (Wu et al. 2021, "Rethinking and
improving relative position encoding", eq. 16, with a network in place of their table).  The map enters by
cross-attention, and by its distances to the edge of the drivable area at a vehicle's noisy outline.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float

from gendiff.geometry import outline
from gendiff.nets.mlp import sine_cosine, sinusoidal
from gendiff.types import Scalar

Head: TypeAlias = Literal["denoise", "scene", "agent", "pair"]
ABSENT = 1e4
"""Logit of absent vehicles and pairs; its log C and their gradient are 0 in float32."""


class Place(NamedTuple):
    """The condition of a scene."""

    distance: Float[Array, "c c"]
    """Signed distance to the edge of the drivable area in metres; see `gendiff.oracles.drivable`."""
    present: Bool[Array, " k"]
    """True for rows with a vehicle."""


class Units(NamedTuple):
    """The network's coordinates u of (x, y, length, width, cos, sin, speed): metres = scale u + shift."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    half: float
    """Half the width of the map, in metres."""

    def metres(self, u: Float[Array, "*s k 7"]) -> Float[Array, "*s k 7"]:
        """Return vehicles with lengths in metres and speeds in m/s."""
        shift, scale = self._arrays(u)
        return u * scale + shift

    def normalised(self, vehicles: Float[Array, "*s k 7"], present: Bool[Array, "*s k"]) -> Float[Array, "*s k 7"]:
        """Return the network's coordinates; zeros for absent vehicles."""
        shift, scale = self._arrays(vehicles)
        return jnp.where(present[..., None], (vehicles - shift) / scale, 0.0)

    def _arrays(self, like: Array) -> tuple[Array, Array]:
        shape = (1,) * (like.ndim - 1) + (7,)
        return jnp.asarray(self.shift, jnp.float32).reshape(shape), jnp.asarray(self.scale, jnp.float32).reshape(shape)


Memory: TypeAlias = tuple[Float[Array, "heads tokens e"], Float[Array, "heads tokens e"]]
"""Keys and values of the attention to a map, common to all layers."""


class MapEncoder(nn.Module):
    """An encoder of a map to the keys and values of the attention to it, a token per square.

    They do not depend on vehicles or noise, so a sampler computes them once.
    """

    width: int
    heads: int
    square: int = 16
    """Cells along a square's side."""
    every: int = 4
    """Stride at which the encoder reads cells; vehicles read precise distances at their own places (`roadside`)."""

    @nn.compact
    def __call__(self, distance: Float[Array, "c c"]) -> Memory:
        """Encode a map.

        Raises:
          ValueError: the map is not square, or its side is not a multiple of `square`.
        """
        if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or distance.shape[0] % self.square:
            raise ValueError(
                f"MapEncoder: distance must be a square map of a multiple of {self.square} cells, got {distance.shape}"
            )
        seen = distance[self.every // 2 :: self.every, self.every // 2 :: self.every].astype(jnp.float32)
        near = squares(seen, self.square // self.every)
        h = jnp.concatenate([near / 20, jnp.tanh(near), jnp.tanh(near / 4)], -1)
        h = nn.silu(nn.Dense(self.width, name="squares")(h))
        h = h + nn.silu(nn.Dense(self.width, name="mix")(h))
        centre = (np.arange(len(h)) + 0.5) / len(h) * 2 - 1
        y, x = (grid.ravel() for grid in np.meshgrid(centre, centre, indexing="ij"))
        where = waves(jnp.asarray(np.stack([x, y], -1), jnp.float32))
        tokens = h.reshape(-1, self.width) + nn.Dense(self.width, use_bias=False, name="where")(where)
        tokens = nn.LayerNorm(name="norm")(tokens)
        keys, values = (
            nn.Dense(self.width, use_bias=False, name=name)(tokens).reshape(-1, self.heads, self.width // self.heads)
            for name in ("keys", "values")
        )
        # Heads first, the order in which attention reads them.
        return jnp.swapaxes(keys, 0, 1), jnp.swapaxes(values, 0, 1)


def squares(x: Float[Array, "h w"], side: int) -> Float[Array, "h/side w/side side*side"]:
    """Cut x into flattened squares; times a matrix, this is a convolution whose stride equals its window."""
    h, w = x.shape
    parts = x.reshape(h // side, side, w // side, side)
    return jnp.moveaxis(parts, 2, 1).reshape(h // side, w // side, side * side)


def waves(at: Float[Array, "*n i"], octaves: int = 6) -> Float[Array, "*n 2*octaves*i"]:
    """Return sines and cosines of the coordinates; wavelengths are 2 to 2^(2 - octaves)."""
    # Clip first, because waves carry no information far from the data.
    phase = jnp.clip(at, -1.5, 1.5)[..., None] * (jnp.pi * 2.0 ** jnp.arange(octaves)).reshape((1,) * at.ndim + (-1,))
    return jnp.concatenate(sine_cosine(phase), -1).reshape(*at.shape[:-1], -1)


def turned(way: Float[Array, "*n 2"], ahead: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    """Rotate `way` from the x axis to `ahead`, and scale it by the length of `ahead`."""
    (x, y), (cos, sin) = jnp.moveaxis(way, -1, 0), jnp.moveaxis(ahead, -1, 0)
    return jnp.stack([x * cos - y * sin, x * sin + y * cos], -1)


def heading(vehicles: Float[Array, "k 7"]) -> Float[Array, "k 2"]:
    """Return the direction of (cos, sin), smooth everywhere; it is shorter than 1 for a small (cos, sin)."""
    raw = vehicles[:, 4:6]
    return raw / jnp.sqrt(jnp.sum(raw**2, -1, keepdims=True) + 0.01)


def relations(vehicles: Float[Array, "k 7"], noise: Scalar) -> Float[Array, "k k f"]:
    """Return features of vehicle j (axis 1) relative to vehicle i (axis 0).

    They are j's relative position in the window's and in i's frame, also as waves; its heading in i's frame; the gaps
    between the boxes along i's two axes; the largest of the four gaps along both boxes' axes; and 1 if i = j.  The
    largest gap is positive if and only if the boxes are apart (the separating axis theorem).

    Args:
      vehicles: noisy vehicles, in metres.
      noise: standard deviation of the noise of x and y in metres; it sets the resolution of gaps.
    """
    ahead = heading(vehicles)
    way = vehicles[None, :, :2] - vehicles[:, None, :2]
    back = (ahead * jnp.array([[1.0, -1.0]]))[:, None]
    mine, turn = turned(way, back), turned(ahead[None], back)
    far = jnp.sqrt(jnp.sum(way**2, -1) + 1e-2)
    cos, sin = jnp.abs(turn[..., 0]), jnp.abs(turn[..., 1])
    length, width = vehicles[:, 2], vehicles[:, 3]
    along = jnp.abs(mine[..., 0]) - 0.5 * (length[:, None] + length[None] * cos + width[None] * sin)
    across = jnp.abs(mine[..., 1]) - 0.5 * (width[:, None] + length[None] * sin + width[None] * cos)
    apart = jnp.maximum(along, across)
    apart = jnp.maximum(apart, apart.T)
    gaps = jnp.stack([along, across, apart], -1)
    return jnp.concatenate(
        [
            way / 25,
            mine / 25,
            turn,
            jnp.stack([far / 25, jnp.log(1 + far) / 3, jnp.eye(len(vehicles))], -1),
            gaps / 25,
            jnp.tanh(gaps / 3),
            jnp.tanh(gaps / (noise + 0.3)),
            waves(mine / 25, 4),
        ],
        -1,
    )


def roadside(vehicles: Float[Array, "k 7"], distance: Float[Array, "c c"], half: float) -> Float[Array, "k 41"]:
    """Return the signed distance to the edge of the drivable area, in metres, at places around a vehicle.

    The places are 8 of its outline (`gendiff.geometry.outline`), its centre, and rings around it (AROUND), in the
    vehicle's frame.  Outside of the map, the distance to the map is added to the value at the map's edge.
    """
    ahead = heading(vehicles)
    shapes = jnp.concatenate([vehicles[:, :4], ahead], -1)
    near = vehicles[:, None, :2] + turned(jnp.asarray(AROUND, jnp.float32)[None], ahead[:, None])
    points = jnp.concatenate([outline(shapes), near], 1)
    cells = distance.shape[0]
    place = [(points[..., axis] / half + 1) * (cells / 2) - 0.5 for axis in (1, 0)]
    beyond = jnp.sum(jnp.maximum(jnp.abs(points) - half, 0), -1)
    return map_coordinates(distance.astype(jnp.float32), place, order=1, mode="nearest") + beyond


RINGS = (2.0, 5.0, 10.0, 20.0)
"""Radii in metres."""
CIRCLE = np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1)
AROUND = np.concatenate([np.zeros((1, 2)), *(radius * CIRCLE for radius in RINGS)])
"""The centre, and eight places per ring."""
SMALL = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
"""Initialiser of the last layer of a part."""


class SceneTransformer(nn.Module):
    """The transformer (u, c_noise, place, keys and values of the map) -> output of the head.

    u = x_t / sqrt(alpha^2 + sigma^2) and c_noise = ln(sigma / alpha) / 4 are the same for DDPM and for EDM with
    sigma_data 1.  The head "denoise" returns (k, 7), "scene" a logit, and "agent" logits (k,).  The head "pair" returns
    logits (k (k - 1) / 2 + k,): first that a pair i < j does not overlap, in the order of `numpy.triu_indices`, then
    that a vehicle is on the drivable area.  Logits of absent vehicles are ABSENT.
    """

    units: Units
    head: Head = "denoise"
    width: int = 128
    layers: int = 4
    heads: int = 8
    expansion: int = 2
    """Width of the feed-forward layers in units of `width`."""
    hidden: int = 32
    """Width of the network of the relative encodings."""

    @nn.compact
    def __call__(self, u: Float[Array, "k 7"], c_noise: Scalar, place: Place, memory: Memory) -> Array:
        """Return the head's output."""
        present = place.present
        vehicles = self.units.metres(u)
        noise = self.units.scale[0] * jnp.sqrt(jax.nn.sigmoid(8 * c_noise))  # sigma^2 / (alpha^2 + sigma^2)
        related = relations(vehicles, noise)
        beside = roadside(vehicles, place.distance, self.units.half)
        time = nn.silu(nn.Dense(64, name="time")(sinusoidal(c_noise, 32)))
        # Slopes of the distance along and across a vehicle, because they give its heading relative to the road.
        sides = jnp.stack([beside[:, 1] - beside[:, 5], beside[:, 7] - beside[:, 3]], -1)
        slopes = sides / jnp.maximum(vehicles[:, 2:4], 1.0)
        sigma = noise / self.units.scale[0]
        own = jnp.concatenate(
            [
                u,
                waves(u / 2),
                waves(beside[:, 8:9] / 10, 4),
                slopes,
                jnp.tanh(slopes / (sigma + 0.02)),
                jnp.tanh(beside / 20),
                jnp.tanh(beside / 3),
                jnp.tanh(beside / (noise + 0.3)),
            ],
            -1,
        )
        # The hidden layers of all encodings in one product, because a single layer has few columns.
        encoded = nn.Dense(self.layers * self.hidden, name="relation")(related)
        encoded += nn.Dense(self.layers * self.hidden, use_bias=False, name="related_when")(time)[None, None]
        encoded = jnp.split(nn.silu(encoded), self.layers, -1)
        h = nn.Dense(self.width, name="input")(own) + nn.Dense(self.width, use_bias=False, name="when")(time)[None]
        for i in range(self.layers):
            film = nn.Dense(12 * self.width, kernel_init=nn.initializers.zeros, name=f"film{i}")(time)
            film = film.reshape(4, 3, 1, self.width)
            parts = (
                RelativeAttention(self.heads, name=f"self{i}"),
                FeedForward(self.expansion, name=f"after_self{i}"),
                CrossAttention(self.heads, name=f"map{i}"),
                FeedForward(self.expansion, name=f"after_map{i}"),
            )
            inputs: tuple[tuple[Any, ...], ...] = ((encoded[i], present), (), (memory,), ())
            for part, arguments, (gain, offset, gate) in zip(parts, inputs, film, strict=True):
                inner = nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + gain) + offset
                h = h + (1 + gate) * part(inner, *arguments)
        h = nn.LayerNorm(name="norm")(h)
        if self.head == "denoise":
            return self._answer(h, heading(vehicles))
        return self._read(h, related, present)

    def _answer(self, h: Array, ahead: Array) -> Array:
        """Return seven numbers; add a position and a heading from the vehicle's own frame, turned to the window's.

        The own frame helps, because noise along and across a lane looks the same for all directions of the lane.
        """
        zeros = nn.initializers.zeros
        out = nn.Dense(7, kernel_init=zeros, name="output")(h)
        own = nn.Dense(4, kernel_init=zeros, name="own")(h).reshape(-1, 2, 2)
        own = turned(own, ahead[:, None])
        nothing = jnp.zeros((len(h), 2))
        return out + jnp.concatenate([own[:, 0], nothing, own[:, 1], nothing[:, :1]], -1)

    def _read(self, h: Array, related: Array, present: Array) -> Array:
        k = len(h)
        last = lambda features, name: nn.Dense(features, kernel_init=nn.initializers.zeros, name=name)
        if self.head == "scene":
            share = present.astype(jnp.float32) / jnp.sum(present)
            return last(1, "output")(nn.silu(nn.Dense(self.width, name="pooled")(share @ h)))[0]
        agents = jnp.where(present, last(1, "output")(h)[:, 0], ABSENT)
        if self.head == "agent":
            return agents
        first, second = (nn.Dense(self.width // 2, name=name)(h) for name in ("one", "other"))
        inner = first[:, None] + second[None] + nn.Dense(self.width // 2, use_bias=False, name="related")(related)
        logits = last(1, "pairs")(nn.silu(inner))[..., 0]
        rows, columns = np.triu_indices(k, 1)
        both = present[rows] & present[columns]
        return jnp.concatenate([jnp.where(both, (logits + logits.T)[rows, columns], ABSENT), agents])


class FeedForward(nn.Module):
    """A feed-forward layer, W2 gelu(W1 h); W2 starts small."""

    expansion: int

    @nn.compact
    def __call__(self, h: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """Apply the layer."""
        d = h.shape[-1]
        return nn.Dense(d, kernel_init=SMALL)(nn.gelu(nn.Dense(self.expansion * d)(h)))


class CrossAttention(nn.Module):
    """Attention from vehicles to the keys and values of a map."""

    heads: int

    @nn.compact
    def __call__(self, h: Float[Array, "k d"], memory: Memory) -> Float[Array, "k d"]:
        """Apply the layer."""
        k, d = h.shape
        q = nn.Dense(d, use_bias=False, name="q")(h).reshape(k, self.heads, -1)
        keys, values = memory
        logits = jnp.einsum("ihe,hme->him", q, keys) / q.shape[-1] ** 0.5
        mixed = jnp.einsum("him,hme->ihe", jax.nn.softmax(logits, -1), values)
        return nn.Dense(d, kernel_init=SMALL, name="out")(mixed.reshape(k, d))


class RelativeAttention(nn.Module):
    """Self-attention with encodings R_ij of relations in queries, keys and values (Wu et al. 2021, eq. 16).

        logit_ij = (q_i . k_j + q_i . R^k_ij + k_j . R^q_ji) / sqrt(e),   out_i = sum_j a_ij (v_j + R^v_ij)

    R_ij = W r_ij with r = silu(U relation + V time); q, k and v share r and have their own W.  The layer computes
    q_i . W r as (W^T q_i) . r, so it does not need the k^2 encodings of the full width.
    """

    heads: int

    @nn.compact
    def __call__(
        self, h: Float[Array, "k d"], r: Float[Array, "k k f"], present: Bool[Array, " k"]
    ) -> Float[Array, "k d"]:
        """Apply the layer; absent vehicles get no attention."""
        k, d = h.shape
        size = d // self.heads
        q, key, v = (nn.Dense(d, use_bias=False, name=name)(h).reshape(k, self.heads, size) for name in ("q", "k", "v"))
        read = [self.param(f"read_{name}", nn.initializers.zeros, (self.heads, size, r.shape[-1])) for name in "qkv"]
        queries, offers = (jnp.einsum("ihe,hef->ihf", *pair) for pair in ((q, read[0]), (key, read[1])))
        logits = jnp.einsum("ihe,jhe->hij", q, key)
        logits += jnp.einsum("ihf,ijf->hij", queries, r) + jnp.einsum("jhf,jif->hij", offers, r)
        logits = jnp.where(present[None, None], logits / size**0.5, -1e9)
        share = jax.nn.softmax(logits, -1)
        mixed = jnp.einsum("hij,jhe->ihe", share, v)
        mixed += jnp.einsum("ihf,hef->ihe", jnp.einsum("hij,ijf->ihf", share, r), read[2])
        return nn.Dense(d, kernel_init=SMALL, name="out")(mixed.reshape(k, d))
