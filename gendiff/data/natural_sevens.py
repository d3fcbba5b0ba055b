"""Sevens that their writers crossed, and others: random training examples, and labels by eye of 400 test sevens.

A vision model gave the labels twice, from contact sheets and at the labelling page; no person did.  A sample is called
<subset>/<row of the test sevens>, and is found by the hash of its pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff.data import mnist
from gendiff.data.mnist import Pixels
from gendiff.feedback import consensus, labels
from gendiff.feedback.samples import content_hash
from gendiff.types import PRNGKey

HAND = Path(__file__).with_name("natural_sevens.jsonl")
"""Labels from contact sheets."""
PAGE = Path(__file__).with_name("natural_sevens_page.jsonl")
"""Labels of the same sevens at the page."""
NATURAL = 0.25
"""Share of the crossed examples that their writers crossed; the others are uncrossed ones with a new stroke."""


class Pools(NamedTuple):
    """Training sevens."""

    uncrossed: Pixels
    natural: Pixels
    """Crossed by their writers."""


def pools(place: Path | None, seed: int) -> Pools:
    """Read the training sevens; without natural crossed ones (data that are not MNIST), drawn ones stand for them."""
    sevens = mnist.read(7, "train", place)
    crossed = mnist.naturally_crossed(sevens)
    uncrossed = sevens[~crossed]
    return Pools(uncrossed, sevens[crossed] if crossed.any() else mnist.crossed(uncrossed, seed))


def example(keys: Sequence[PRNGKey], pools: Pools, size: int) -> tuple[Float[Array, "s s 1"], Bool[Array, ""]]:
    """Draw a seven in [-1, 1], crossed in half of the cases; the four keys choose kind, images and stroke."""
    kind_key, image_key, natural_key, stroke_key = keys
    kind, resize = jax.random.uniform(kind_key), mnist.triangle(mnist.SIDE, size)
    crossed, natural = kind < 0.5, kind < 0.5 * NATURAL
    pick = lambda key, pool: jnp.asarray(pool)[jax.random.randint(key, (), 0, len(pool))] / 255.0
    ink = pick(image_key, pools.uncrossed)
    ink = jnp.where(crossed, mnist.cross(stroke_key, ink), ink)
    ink = jnp.where(natural, pick(natural_key, pools.natural), ink)
    return 2 * (resize @ ink @ resize.T)[..., None] - 1, crossed


class Marked(NamedTuple):
    """Sevens, and whether a stroke crosses them."""

    images: Pixels
    crossed: Bool[np.ndarray, " n"]


def marked(sevens: Pixels, subset: Literal["random", "highest", "doubtful"]) -> Marked:
    """Find the sevens of a subset: random ones, those with the highest scores of a first classifier, or those with the
    smallest |logit| of a second one.  Those whose labels differ, or are "undecided", are left out."""
    said = consensus.merge(labels.read(HAND, PAGE))
    chosen = {mark.hash for mark in labels.read(HAND) if mark.sample.startswith(f"{subset}/")}
    hashes = [content_hash(image) for image in sevens]
    rows = [i for i, content in enumerate(hashes) if content in chosen and said[content] != "undecided"]
    return Marked(sevens[rows], np.array([said[hashes[i]] == "malign" for i in rows], bool))


def pairs(sevens: Pixels, seed: int) -> Marked:
    """Each seven that its writer did not cross, without and with a drawn stroke: first all without."""
    uncrossed = sevens[~mnist.naturally_crossed(sevens)]
    images = np.concatenate([uncrossed, mnist.crossed(uncrossed, seed)])
    return Marked(images, np.arange(len(images)) >= len(uncrossed))


def agreement() -> consensus.Pair:
    """Return how often both files say the same, of three labels."""
    (pair,) = consensus.agreement(labels.read(HAND, PAGE)).pairs.values()
    return pair
