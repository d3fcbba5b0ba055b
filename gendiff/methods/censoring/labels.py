"""Labels: samples that someone marks, and the training sets that they make."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check
from gendiff.types import PRNGKey, Sample, Samples

Rater: TypeAlias = Callable[[Samples], np.ndarray]
"""Samples (n, *shape) -> 1 where benign, 0 where malign, NaN where undecided: a person's marks, or an oracle."""
Batches: TypeAlias = Callable[[PRNGKey], Samples]
"""key -> a batch of samples."""
Pair: TypeAlias = tuple[Samples, Samples]
"""Malign and benign samples."""


class Labelled(NamedTuple):
    """Marked samples."""

    malign: Samples
    benign: Samples
    seen: Any
    """Number of samples that were looked at to find them."""


class Sets(NamedTuple):
    """Training sets of K rewards, of n images each."""

    images: np.ndarray
    """(K, n, *shape)."""
    labels: np.ndarray
    """(K, n), 1 for benign."""


def mark(batches: Batches, rater: Rater, malign: int, benign: int, budget: int, key: PRNGKey) -> Labelled:
    """Mark samples in the order they come until there are enough of both classes.

    Returns:
      The first `malign` malign samples, and all benign ones that were seen.

    Raises:
      ValueError: the budget ran out; `batches` gives no samples, or NaN; the rater does not give 1, 0 or NaN for each;
        or malign, benign or budget is < 1.
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
    """`mark` for each of several runs, which draw together until each has enough.

    Args:
      batches: (places of the runs that want more, a key for each of them) -> a batch for each of them.
    """
    for name, value in (("malign", malign), ("benign", benign), ("budget", budget)):
        check.number(f"censoring.mark: {name}", value, at_least=1, whole=True)
    marks, found = [_Marks(budget) for _ in raters], dict[int, Labelled]()
    while waiting := [k for k in range(len(marks)) if k not in found]:
        folded = [jax.random.fold_in(keys[k], len(marks[k].samples)) for k in waiting]
        try:
            drawn = batches(waiting, folded)
        except StopIteration as error:  # a stream that has ended; within a generator it would be a RuntimeError
            raise ValueError(
                "censoring.mark: batches must give samples, got none. Draw more, or ask for fewer."
            ) from error
        for k, samples in zip(waiting, drawn, strict=True):
            marks[k].add(samples, raters[k])
            labelled = marks[k].enough(malign, benign)
            if labelled is not None:
                found[k] = labelled
    return [found[k] for k in range(len(marks))]


class _Marks:
    """The marked samples of one run."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.samples: list[np.ndarray] = []
        self.marks: list[np.ndarray] = []

    def add(self, samples: Samples, rater: Rater) -> None:
        """Mark a batch, as far as the budget goes; an empty one is refused, because marking would never end."""
        samples = np.asarray(samples)
        rows = check.rows("censoring.mark: samples", samples)
        check.number("censoring.mark: number of samples", rows, at_least=1, whole=True)
        check.number("censoring.mark: samples", samples)
        samples = samples[: self.budget - sum(map(len, self.samples))]
        marks = check.shape("censoring.mark: marks", np.asarray(rater(samples), np.float64), (len(samples),))
        if not np.all(np.isin(marks, (0.0, 1.0)) | np.isnan(marks)):
            raise ValueError(f"censoring.mark: marks must be 1, 0 or NaN, got {np.unique(marks)}")
        self.samples.append(samples)
        self.marks.append(marks)

    def enough(self, malign: int, benign: int) -> Labelled | None:
        """The labels as soon as there are enough; ValueError where the budget has run out."""
        samples, marks = np.concatenate(self.samples), np.concatenate(self.marks)
        ends = np.flatnonzero((np.cumsum(marks == 0) >= malign) & (np.cumsum(marks == 1) >= benign))
        if len(ends):
            samples, marks = samples[: ends[0] + 1], marks[: ends[0] + 1]
            return Labelled(samples[marks == 0][:malign], samples[marks == 1], len(samples))
        if len(marks) >= self.budget:
            raise ValueError(
                f"censoring.mark: {malign} malign and {benign} benign samples must be within {self.budget}, got "
                f"{np.sum(marks == 0)} and {np.sum(marks == 1)}: raise the budget, or ask for fewer"
            )
        return None


def bootstrap(labelled: Labelled, members: int, benign: int, key: PRNGKey) -> list[Pair]:
    """K pairs (malign, benign): all have the same malign samples, and `benign` of the benign ones of their own.

    Raises:
      ValueError: members or benign is < 1, or there are not so many labels.
    """
    check.number("bootstrap: members", members, at_least=1, whole=True)
    check.number("bootstrap: benign", benign, at_least=1, whole=True)
    for name, pool, least in (("malign", labelled.malign, 1), ("benign", labelled.benign, benign)):
        check.number(f"bootstrap: number of {name} labels", len(pool), at_least=least, whole=True)
    choices = [np.random.default_rng(np.asarray(jax.random.key_data(k))) for k in jax.random.split(key, members)]
    pick = lambda choice: labelled.benign[choice.permutation(len(labelled.benign))[:benign]]
    return [(labelled.malign, pick(choice)) for choice in choices]


def union(pairs: list[Pair]) -> Pair:
    """One set from the sets of all members, with every sample once."""
    malign, benign = (np.unique(np.concatenate(samples), axis=0) for samples in zip(*pairs, strict=True))
    return malign, benign


def augmented(pairs: list[Pair], copies: int, key: PRNGKey, change: Callable[[PRNGKey, Sample], Sample]) -> Sets:
    """Training sets: the samples and `copies` random changes of each, computed once before the training.

    Raises:
      ValueError: copies < 0, no pair, or sets of several sizes.
    """
    check.number("augmented: copies", copies, at_least=0, whole=True)
    check.number("augmented: pairs", len(pairs), at_least=1, whole=True)
    sizes = {(len(malign), len(benign)) for malign, benign in pairs}
    if len(set(map(sum, sizes))) != 1:
        raise ValueError(f"augmented: pairs must have as many labels each, got (malign, benign) {sorted(sizes)}")
    images = np.stack([np.concatenate(pair) for pair in pairs])
    labels = np.stack([np.repeat([0.0, 1.0], [len(malign), len(benign)]) for malign, benign in pairs])
    keys = jax.random.split(key, (len(pairs), copies, images.shape[1]))
    changed = np.asarray(_changed(change, keys, jnp.asarray(images, jnp.float32)))
    images = np.concatenate([images[:, None], changed], 1).reshape(len(pairs), -1, *images.shape[2:])
    return Sets(images, np.tile(labels, (1, copies + 1)))


@partial(jax.jit, static_argnums=0)
def _changed(change: Callable[[PRNGKey, Sample], Sample], keys: PRNGKey, images: Array) -> Array:
    return jax.vmap(jax.vmap(jax.vmap(change), (0, None)))(keys, images)


def rotation(degrees: float, background: float = -1.0) -> Callable[[PRNGKey, Sample], Sample]:
    """(key, image (h, w, c)) -> the image turned by an angle uniform in [-degrees, degrees], bilinear."""
    check.number("rotation: degrees", degrees, at_least=0)

    def change(key: PRNGKey, image: Sample) -> Sample:
        angle = jax.random.uniform(key, minval=-degrees, maxval=degrees) * jnp.pi / 180
        h, w, _ = image.shape
        y, x = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing="ij")
        rows = jnp.cos(angle) * y - jnp.sin(angle) * x + (h - 1) / 2
        columns = jnp.sin(angle) * y + jnp.cos(angle) * x + (w - 1) / 2
        turn = partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant", cval=background)
        return jax.vmap(lambda channel: turn(channel, [rows, columns]), -1, -1)(image)

    return change
