"""Labels: marked samples, and their training sets."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check
from gendiff.static import by_value
from gendiff.types import PRNGKey, Sample, Samples

Rater: TypeAlias = Callable[[Samples], np.ndarray]
"""Samples (n, *shape) -> 1 if benign, 0 if malign, NaN if undecided: an oracle's or a person's marks."""
Batches: TypeAlias = Callable[[PRNGKey], Samples]
"""key -> a batch of samples."""
Pair: TypeAlias = tuple[Samples, Samples]
"""Malign and benign samples."""


class Labelled(NamedTuple):
    """Marked samples."""

    malign: Samples
    benign: Samples
    seen: Any
    """Number of samples that the rater looked at."""


class Sets(NamedTuple):
    """Training sets of K rewards, with n images per reward."""

    images: np.ndarray
    """(K, n, *shape)."""
    labels: np.ndarray
    """(K, n), 1 for benign."""


def mark(batches: Batches, rater: Rater, malign: int, benign: int, budget: int, key: PRNGKey) -> Labelled:
    """Mark samples in the order of drawing until both classes have enough.

    Returns:
      The first `malign` malign samples, and all benign ones up to the last sample.

    Raises:
      ValueError: the budget runs out; `batches` gives no samples, or NaN; a mark is not 1, 0 or NaN; or malign, benign
        or budget is < 1.
    """
    return mark_all(lambda runs, keys: [batches(keys[0])], [rater], malign, benign, budget, [key])[0]


def mark_all(
    batches: Callable[[list[int], list[PRNGKey]], Sequence[Samples]],
    raters: Sequence[Rater],
    malign: int,
    benign: int,
    budget: int,
    keys: Sequence[PRNGKey],
) -> list[Labelled]:
    """`mark` the samples of several runs, which draw together until all have enough.

    Args:
      batches: (indices of the runs that need more, their keys) -> their batches.
    """
    for name, value in (("malign", malign), ("benign", benign), ("budget", budget)):
        check.number(f"censoring.mark: {name}", value, at_least=1, whole=True)
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in raters]
    labelled: list[Labelled | None] = [None] * len(parts)
    while waiting := [k for k, labels in enumerate(labelled) if labels is None]:
        folded = [jax.random.fold_in(keys[k], len(parts[k])) for k in waiting]
        try:
            drawn = batches(waiting, folded)
        except StopIteration as error:  # of an ended stream; a generator would turn it into a RuntimeError
            raise ValueError(
                "censoring.mark: batches must give samples, got none. Draw more, or mark fewer."
            ) from error
        for k, samples in zip(waiting, drawn, strict=True):
            left = budget - sum(len(marks) for _, marks in parts[k])
            parts[k].append(_marked(samples, raters[k], left))
            samples, marks = map(np.concatenate, zip(*parts[k], strict=True))
            labelled[k] = _enough(samples, marks, malign, benign, budget)
    return [labels for labels in labelled if labels is not None]


def _marked(samples: Samples, rater: Rater, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Mark a batch, at most `most` samples; refuse an empty one, because marking would never end."""
    samples = np.asarray(samples)
    rows = check.rows("censoring.mark: samples", samples)
    check.number("censoring.mark: number of samples", rows, at_least=1, whole=True)
    check.number("censoring.mark: samples", samples)
    samples = samples[:most]
    marks = check.shape("censoring.mark: marks", np.asarray(rater(samples), np.float64), (len(samples),))
    if not np.all(np.isin(marks, (0.0, 1.0)) | np.isnan(marks)):
        raise ValueError(f"censoring.mark: marks must be 1, 0 or NaN, got {np.unique(marks)}")
    return samples, marks


def _enough(samples: np.ndarray, marks: np.ndarray, malign: int, benign: int, budget: int) -> Labelled | None:
    """Return the labels once both classes have enough; raise ValueError if the budget runs out before."""
    ends = np.flatnonzero((np.cumsum(marks == 0) >= malign) & (np.cumsum(marks == 1) >= benign))
    if len(ends):
        samples, marks = samples[: ends[0] + 1], marks[: ends[0] + 1]
        return Labelled(samples[marks == 0][:malign], samples[marks == 1], len(samples))
    if len(marks) >= budget:
        raise ValueError(
            f"censoring.mark: {malign} malign and {benign} benign samples must be within {budget}, got "
            f"{np.sum(marks == 0)} and {np.sum(marks == 1)}: raise the budget, or mark fewer"
        )
    return None


def bootstrap(labelled: Labelled, members: int, benign: int, key: PRNGKey) -> list[Pair]:
    """Make K pairs (malign, benign): all share the malign samples, and every pair draws `benign` benign ones.

    Raises:
      ValueError: members or benign is < 1, or the labels are fewer.
    """
    check.number("bootstrap: members", members, at_least=1, whole=True)
    check.number("bootstrap: benign", benign, at_least=1, whole=True)
    for name, pool, least in (("malign", labelled.malign, 1), ("benign", labelled.benign, benign)):
        check.number(f"bootstrap: number of {name} labels", len(pool), at_least=least, whole=True)
    rngs = [np.random.default_rng(np.asarray(jax.random.key_data(k))) for k in jax.random.split(key, members)]
    return [(labelled.malign, labelled.benign[rng.permutation(len(labelled.benign))[:benign]]) for rng in rngs]


def union(pairs: list[Pair]) -> Pair:
    """Join the sets of all members into one, with every sample once."""
    malign, benign = (np.unique(np.concatenate(samples), axis=0) for samples in zip(*pairs, strict=True))
    return malign, benign


def augmented(pairs: list[Pair], copies: int, key: PRNGKey, change: Callable[[PRNGKey, Sample], Sample]) -> Sets:
    """Make training sets of the samples and `copies` random changes of every sample, once before the training.

    Raises:
      ValueError: copies < 0, no pair, or pairs that differ in their number of labels.
    """
    check.number("augmented: copies", copies, at_least=0, whole=True)
    check.number("augmented: pairs", len(pairs), at_least=1, whole=True)
    sizes = {(len(malign), len(benign)) for malign, benign in pairs}
    if len(set(map(sum, sizes))) != 1:
        raise ValueError(f"augmented: pairs must have equally many labels, got (malign, benign) {sorted(sizes)}")
    images = np.stack([np.concatenate(pair) for pair in pairs])
    labels = np.stack([np.repeat([0.0, 1.0], [len(malign), len(benign)]) for malign, benign in pairs])
    keys = jax.random.split(key, (len(pairs), copies, images.shape[1]))
    changed = np.asarray(_changed(change, keys, jnp.asarray(images, jnp.float32)))
    images = np.concatenate([images[:, None], changed], 1).reshape(len(pairs), -1, *images.shape[2:])
    return Sets(images, np.tile(labels, (1, copies + 1)))


@partial(jax.jit, static_argnums=0)
def _changed(change: Callable[[PRNGKey, Sample], Sample], keys: PRNGKey, images: Array) -> Array:
    return jax.vmap(jax.vmap(jax.vmap(change), (0, None)))(keys, images)


@by_value
def rotation(degrees: float) -> Callable[[PRNGKey, Sample], Sample]:
    """Return (key, image (h, w, c)) -> the image, rotated bilinearly by a uniform angle up to `degrees`; -1 fills."""
    check.number("rotation: degrees", degrees, at_least=0)

    def change(key: PRNGKey, image: Sample) -> Sample:
        angle = jax.random.uniform(key, minval=-degrees, maxval=degrees) * jnp.pi / 180
        h, w, _ = image.shape
        y, x = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing="ij")
        rows = jnp.cos(angle) * y - jnp.sin(angle) * x + (h - 1) / 2
        columns = jnp.sin(angle) * y + jnp.cos(angle) * x + (w - 1) / 2
        turn = partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant", cval=-1.0)
        return jax.vmap(lambda channel: turn(channel, [rows, columns]), -1, -1)(image)

    return change
