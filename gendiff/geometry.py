"""Oriented boxes as points.  What is an overlap is for `gendiff.oracles.boxes`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gendiff import check
from gendiff.types import wide

Boxes = Float[Array, "*n 6"]
"""x, y of the centre, length along and width across the heading, cos and sin of the heading."""
Points = Float[Array, "*n p 2"]

# NumPy's: an array of JAX would start its devices when this file is imported.
AROUND = np.array([(1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1)], np.float32) / 2
"""Corners and, between them, the middles of the edges, in units of length and width."""


def outline(boxes: Boxes, corners_only: bool = False) -> Points:
    """The four corners, in order around the box, and the middle of the edge after each: (8, 2), or (4, 2).

    Raises:
      ValueError: the last axis of the boxes has another length than 6.
    """
    boxes = wide(boxes)
    check.shape("outline: boxes", boxes, (*boxes.shape[:-1], 6))
    around = jnp.asarray(AROUND[::2] if corners_only else AROUND, boxes.dtype)
    around = around.reshape((1,) * (boxes.ndim - 1) + around.shape)
    along, across = jnp.moveaxis(around * boxes[..., None, 2:4], -1, 0)
    cos, sin = boxes[..., None, 4], boxes[..., None, 5]
    return boxes[..., None, :2] + jnp.stack([cos * along - sin * across, sin * along + cos * across], -1)
