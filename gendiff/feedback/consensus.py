"""Merging of several raters: the samples' labels, the two classes, and the raters' agreement."""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gendiff.feedback.labels import LABELS, Label, LabelError, Mark, latest, seconds
from gendiff.feedback.regular import shown
from gendiff.feedback.samples import Samples


class Classes(NamedTuple):
    """Indices into the samples, in their order."""

    malign: np.ndarray
    """(M,), int."""
    benign: np.ndarray
    """(B,), int."""


class Pair(NamedTuple):
    """Agreement of two raters on their common samples."""

    n: int
    """Number of common samples."""
    share: float
    """Share of equal labels, in [0, 1]; NaN without common samples."""
    kappa: float
    """Cohen's kappa, at most 1, 0 for chance; NaN if both raters use only one label, the same."""


class Agreement(NamedTuple):
    """Agreement of all raters over the three labels."""

    pairs: dict[tuple[str, str], Pair]
    n: int
    """Number of samples that all raters have marked."""
    kappa: float
    """Fleiss' kappa over these n samples; NaN with less than two raters, n = 0, or only one label."""


def merge(marks: Iterable[Mark]) -> dict[str, Label]:
    """Return the majority label of marked samples, by content hash; a tie is undecided."""
    votes: dict[str, list[Label]] = {}
    for mark in latest(marks).values():
        if mark.label is not None:
            votes.setdefault(mark.hash, []).append(mark.label)
    return {content: _winner(said) for content, said in votes.items()}


def _winner(votes: list[Label]) -> Label:
    if len(votes) == 1:  # fast path, because a page merges all samples after every mark
        return votes[0]
    ranked = collections.Counter(votes).most_common(2)
    return "undecided" if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def check(samples: Samples, marks: Iterable[Mark]) -> None:
    """Check that all marks are of these samples.

    Raises:
      LabelError: no sample has a mark's content hash.
    """
    known = set(samples.hashes)
    for mark in marks:
        if mark.hash not in known:
            by_id = dict(zip(samples.ids, samples.hashes, strict=True))
            wanted = f"the content hash {by_id[mark.sample][:12]}" if mark.sample in by_id else "the hash of a sample"
            raise LabelError(
                f"label of sample {mark.sample} must have {wanted} in {shown(samples.place)}, got {mark.hash[:12]}, "
                "of other samples: name another file for these samples (the labels are unchanged)"
            )


def aligned(samples: Samples, marks: Sequence[Mark]) -> list[Label | None]:
    """Check the marks, and return the samples' merged labels; None for an unmarked sample."""
    check(samples, marks)
    merged = merge(marks)
    return [merged.get(content) for content in samples.hashes]


def classes(samples: Samples, marks: Sequence[Mark], malign: int = 1, benign: int = 1) -> Classes:
    """Return the indices of malign and benign samples.

    Args:
      samples: the labelled samples.
      marks: marks of one or more raters.
      malign: number of malign samples needed.
      benign: number of benign samples needed.

    Raises:
      LabelError: the marks are of other samples, or too few of a class.
    """
    merged = aligned(samples, marks)
    indices = lambda wanted: np.array([i for i, label in enumerate(merged) if label == wanted], int)
    found = Classes(indices("malign"), indices("benign"))
    if len(found.malign) < malign or len(found.benign) < benign:
        raise LabelError(
            f"labels of {shown(samples.place)} must be at least {malign} malign and {benign} benign, got "
            f"{len(found.malign)} malign and {len(found.benign)} benign ({merged.count('undecided')} undecided, "
            f"{merged.count(None)} unmarked): resume with `python -m gendiff.feedback {shown(samples.place)}`"
        )
    return found


def agreement(marks: Iterable[Mark]) -> Agreement:
    """Return the share of equal labels and Cohen's kappa for pairs of raters, and Fleiss' kappa of all."""
    by_rater: dict[str, dict[str, Label]] = collections.defaultdict(dict)
    for mark in latest(marks).values():
        if mark.label is not None:
            by_rater[mark.rater][mark.hash] = mark.label
    pairs = {(a, b): _pair(by_rater[a], by_rater[b]) for a, b in itertools.combinations(sorted(by_rater), 2)}
    common = sorted(set.intersection(*(set(said) for said in by_rater.values()))) if by_rater else []
    counts = [[sum(said[content] == label for said in by_rater.values()) for label in LABELS] for content in common]
    return Agreement(pairs, len(common), fleiss(np.array(counts).reshape(-1, len(LABELS))))


def cohen(table: np.ndarray) -> float:
    """Return kappa = (p_o - p_e) / (1 - p_e) of two raters' contingency table (L, L) (Cohen 1960, eq. 1)."""
    share = table / table.sum()
    return _beyond_chance(float(np.trace(share)), float(share.sum(1) @ share.sum(0)))


def fleiss(counts: np.ndarray) -> float:
    """Return kappa of counts (N, L): number of the n >= 2 raters with label j for sample i (Fleiss 1971, eqs. 3-7)."""
    raters = counts[0].sum() if len(counts) else 0
    if raters < 2:
        return math.nan
    observed = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    return _beyond_chance(observed.mean(), ((counts.sum(0) / counts.sum()) ** 2).sum())


def _beyond_chance(observed: float, expected: float) -> float:
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan


def _pair(first: dict[str, Label], second: dict[str, Label]) -> Pair:
    table = np.zeros((len(LABELS), len(LABELS)))
    for content in first.keys() & second.keys():
        table[LABELS.index(first[content]), LABELS.index(second[content])] += 1
    n = int(table.sum())
    return Pair(n, float(np.trace(table)) / n, cohen(table)) if n else Pair(0, math.nan, math.nan)


def report(samples: Samples, marks: Sequence[Mark]) -> str:
    """Write counts, minutes and agreement as a few lines of text."""
    merged, minutes = aligned(samples, marks), seconds(marks)
    mine = collections.Counter((mark.rater, mark.label) for mark in latest(marks).values())
    lines = [f"{len(samples) - merged.count(None)} of {len(samples)} {samples.kind}s marked: {_counts(merged.count)}"]
    for rater in sorted(minutes):
        lines.append(f"  {rater}: {_counts(lambda label, r=rater: mine[r, label])}; {minutes[rater] / 60:.1f} minutes")
    if samples.left_out:
        lines.append(f"  left out of the samples: {samples.left_out}")
    agreed = agreement(marks)
    for (a, b), pair in agreed.pairs.items():
        lines.append(f"  {a} and {b}: {_percent(pair.share)} equal on {pair.n}, Cohen's kappa {pair.kappa:.2f}")
    if len(agreed.pairs) > 1:
        lines.append(f"  all raters: Fleiss' kappa {agreed.kappa:.2f} on {agreed.n}")
    return "\n".join(lines)


def _counts(count: Callable[[Label], int]) -> str:
    return ", ".join(f"{count(label)} {label}" for label in LABELS)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"
