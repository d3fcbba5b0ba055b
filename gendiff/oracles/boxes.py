"""Overlaps of oriented boxes, by the separating axis theorem.

A box is (x, y, length, width, cos yaw, sin yaw): its centre, its extents along and across its heading, and the heading.
Two convex shapes are apart if and only if their projections on some axis are apart.  For two rectangles the four
directions of their edges suffice (Gottschalk, Lin and Manocha 1996, "OBBTree", section 5).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gendiff import check
from gendiff.geometry import Boxes
from gendiff.types import wide

LEAST = 0.1
"""Least length and width of a mended box, in metres."""
HEADING = 0.5
"""Largest deviation of |(cos, sin)| from 1; boxes beyond it are degenerate."""


def _boxes(name: str, boxes: Boxes) -> Boxes:
    boxes = wide(boxes)
    return check.shape(f"{name}: boxes", boxes, (*boxes.shape[:-1], 6))


def degenerate(boxes: Boxes) -> Bool[Array, "*n"]:
    """Return True for boxes with a length or width <= 0, or with a bad heading (HEADING); NaN is degenerate."""
    boxes = _boxes("degenerate", boxes)
    size = jnp.linalg.norm(boxes[..., 4:6], axis=-1)
    return ~(jnp.all(boxes[..., 2:4] > 0, -1) & (jnp.abs(size - 1) < HEADING))


def mended(boxes: Boxes) -> Boxes:
    """Raise length and width to LEAST or more, and normalise the heading; a heading (0, 0) becomes (1, 0)."""
    boxes = _boxes("mended", boxes)
    heading = boxes[..., 4:6]
    size = jnp.linalg.norm(heading, axis=-1, keepdims=True)
    ahead = jnp.zeros_like(heading).at[..., 0].set(1)
    heading = jnp.where(size > 0, heading / jnp.where(size > 0, size, 1), ahead)
    return jnp.concatenate([boxes[..., :2], jnp.maximum(boxes[..., 2:4], LEAST), heading], -1)


def overlap(a: Boxes, b: Boxes, margin: float = 0.0) -> Bool[Array, "*n"]:
    """Return True if boxes overlap or touch.

    Args:
      a, b: boxes with positive extents and headings of norm 1 (see `mended`), of shapes that broadcast.
      margin: boxes count as apart only if more than this many metres separate them along an axis.

    Raises:
      ValueError: the last axis does not have length 6, or `margin` is not finite.
    """
    a, b = _boxes("overlap", a), _boxes("overlap", b)
    check.number("overlap: margin", margin)
    return ~(_apart(a, b, margin) | _apart(b, a, margin))


def _apart(a: Boxes, b: Boxes, margin: float) -> Bool[Array, "*n"]:
    """Return True if the projections on a direction of a's edges are apart."""
    turn = lambda u, v: (u[..., 0] * v[..., 0] + u[..., 1] * v[..., 1], u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])
    ahead, aside = turn(a[..., 4:6], b[..., :2] - a[..., :2])
    cos, sin = map(jnp.abs, turn(a[..., 4:6], b[..., 4:6]))
    length, width = b[..., 2], b[..., 3]
    along = a[..., 2] + length * cos + width * sin
    across = a[..., 3] + length * sin + width * cos
    return (2 * jnp.abs(ahead) > along + 2 * margin) | (2 * jnp.abs(aside) > across + 2 * margin)


def collisions(
    boxes: Float[Array, "*n k 6"], present: Bool[Array, "*n k"] | None = None, margin: float = 0.0
) -> Bool[Array, "*n k k"]:
    """Return True for pairs of k boxes that overlap; symmetric, False on the diagonal and for absent boxes.

    Raises:
      ValueError: see `overlap`; or the shape of `present` is not (*n, k).
    """
    boxes = _boxes("collisions", boxes)
    if present is not None:
        check.shape("collisions: present", present, boxes.shape[:-1])
    pairs = overlap(boxes[..., :, None, :], boxes[..., None, :, :], margin)
    pairs &= jnp.broadcast_to(~jnp.eye(boxes.shape[-2], dtype=bool), pairs.shape)
    return pairs if present is None else pairs & present[..., :, None] & present[..., None, :]
