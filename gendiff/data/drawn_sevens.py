"""Synthetic sevens in place of MNIST's, for tests and for a first run without a download."""

import numpy as np
from jaxtyping import Float, UInt8

from gendiff import check

SIDE = 28


def draw(n: int, seed: int) -> UInt8[np.ndarray, "n 28 28"]:
    """Draw n sevens without a stroke across: a bar and a stem of random place, slope and thickness; 255 is ink.

    Raises:
      ValueError: `n` or `seed` is negative.
    """
    check.number("drawn_sevens: n", n, at_least=0, whole=True)
    check.number("drawn_sevens: seed", seed, at_least=0, whole=True)
    rng = np.random.default_rng(seed)
    jitter = lambda centre, width: rng.uniform(centre - width, centre + width, n)
    left = np.stack([jitter(7.0, 1.5), jitter(7.0, 1.5)], -1)
    right = np.stack([jitter(20.5, 1.5), jitter(6.5, 1.5)], -1)
    foot = np.stack([jitter(12.0, 3.0), jitter(22.5, 1.2)], -1)
    half, soft = rng.uniform(0.7, 1.4, n), rng.uniform(0.7, 1.2, n)
    distance = np.minimum(to_segment(left, right), to_segment(right, foot))
    ink = np.clip(1 - (distance - half[:, None, None]) / soft[:, None, None], 0, 1)
    return np.round(255 * ink).astype(np.uint8)


def to_segment(start: Float[np.ndarray, "n 2"], end: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 28 28"]:
    """Return the distance in pixels of all pixels (x, y) to the segment of an image; a segment may be a point."""
    check.shape("to_segment: start", start, (None, 2))
    check.shape("to_segment: end", end, start.shape)
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([x, y], -1)[None].astype(np.float64)
    along = (end - start)[:, None, None]
    length = np.sum(along**2, -1)
    share = np.clip(np.sum((pixels - start[:, None, None]) * along, -1) / np.where(length > 0, length, 1), 0, 1)
    return np.linalg.norm(pixels - start[:, None, None] - share[..., None] * along, axis=-1)
