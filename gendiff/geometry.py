"""Oriented boxes as points; `gendiff.oracles.boxes` decides overlaps."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gendiff import check
from gendiff.types import wide

Boxes = Float[Array, "*n 6"]
"""x, y of the centre, length along and width across the heading, cos and sin of the heading."""
Points = Float[Array, "*n p 2"]

# NumPy, because a JAX array would start the devices when this file is imported.
AROUND = np.array([(1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1)], np.float32) / 2
"""Corners, alternating with the middles of the edges, in units of length and width."""


def outline(boxes: Boxes, corners_only: bool = False) -> Points:
    """Points in order around a box, (8, 2): corners alternating with middles of edges; or the corners, (4, 2).

    Raises:
      ValueError: the last axis of the boxes does not have length 6.
    """
    boxes = wide(boxes)
    check.shape("outline: boxes", boxes, (*boxes.shape[:-1], 6))
    around = jnp.asarray(AROUND[::2] if corners_only else AROUND, boxes.dtype)
    around = around.reshape((1,) * (boxes.ndim - 1) + around.shape)
    along, across = jnp.moveaxis(around * boxes[..., None, 2:4], -1, 0)
    cos, sin = boxes[..., None, 4], boxes[..., None, 5]
    return boxes[..., None, :2] + jnp.stack([cos * along - sin * across, sin * along + cos * across], -1)
