"""Labelled samples of a model: drawn and judged, split, mixed, and kept for one classifier of all rounds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from gendiff import check, distributed
from gendiff.methods.genneg.model import Guided, OracleProblem, Request, draw, draw_all
from gendiff.oracles.oracle import label
from gendiff.types import PRNGKey, Samples, Valid


class Synthetic(NamedTuple):
    """Labelled samples of one model: arrays, or, where they have conditions, dicts of arrays.

    Then "x" are the samples, "row" (n,) the rows of their conditions, "labels" (n, m) the oracle's.
    """

    positives: Any
    negatives: Any
    good: Any
    """Number of good samples among all draws, before any selection."""
    bad: Any

    @property
    def alpha(self) -> float:
        """P(good) under the model, from all draws."""
        return float(self.good) / (float(self.good) + float(self.bad))

    @property
    def label_rate(self) -> float:
        """Share of good labels among all of all draws: alpha, where a sample has one."""
        if not isinstance(self.negatives, dict):
            return self.alpha
        return self.alpha + (1 - self.alpha) * float(np.mean(self.negatives["labels"]))

    def relabelled(self, change: Callable[[Any], Any]) -> "Synthetic":
        """The same samples with other labels: `change` of (n, m) Booleans, (n, l) or (n,)."""
        positives, negatives = (each | {"labels": change(each["labels"])} for each in (self.positives, self.negatives))
        return self._replace(positives=positives, negatives=negatives)


def collect(
    problem: OracleProblem,
    guided: Guided,
    key: PRNGKey,
    per_class: int,
    budget: int,
    batch: int = 16384,
    *,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[int, int, dict[str, float]], None] = lambda done, of, metrics: None,
    conditions: Any = None,
) -> Synthetic:
    """Draws batches until both classes have `per_class` samples, or `budget` samples have been drawn.

    Args:
      conditions: a pytree of arrays with one leading axis; each sample has one of its rows, at random.

    Raises:
      ValueError: the budget gave no sample of one class; or per_class, budget or batch is < 1.
      FloatingPointError: a sample is not finite.
    """
    of_run = lambda run, done, of, metrics: report(done, of, metrics)
    request = Request(guided, key, conditions=conditions)
    return collect_all(problem, [request], per_class, budget, batch, mesh=mesh, report=of_run)[0]


def collect_all(
    problem: OracleProblem,
    requests: Sequence[Request],
    per_class: int,
    budget: int,
    batch: int = 16384,
    *,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[int, int, int, dict[str, float]], None] = lambda run, done, of, metrics: None,
) -> list[Synthetic]:
    """`collect` for each of several runs, which draw together until each has enough; `report` has the run's place."""
    for name, value in (("per_class", per_class), ("budget", budget), ("batch", batch)):
        check.number(f"genneg.collect: {name}", value, at_least=1, whole=True)
    for request in requests:
        if request.conditions is not None:
            rows = check.rows("genneg.collect: conditions", request.conditions)
            check.number("genneg.collect: rows of the conditions", rows, at_least=1, whole=True)
    pools = [_Pool(budget) for _ in requests]
    for k in range(len(pools)):
        report(k, 0, budget, {})
    while waiting := [k for k, pool in enumerate(pools) if pool.least < per_class and pool.drawn < budget]:
        batches = [requests[k]._replace(key=jax.random.fold_in(requests[k].key, pools[k].drawn)) for k in waiting]
        for k, (samples, good) in zip(waiting, _labelled(problem, batches, batch, mesh), strict=True):
            pools[k].add(samples, good)
            report(k, pools[k].drawn, budget, {"good": pools[k].counts[True], "bad": pools[k].counts[False]})
    return [pool.synthetic() for pool in pools]


class _Pool:
    """The labelled samples of one run."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.kept: dict[bool, list] = {True: [], False: []}
        self.counts = {True: 0, False: 0}

    @property
    def drawn(self) -> int:
        """Number of samples, within the budget."""
        return sum(self.counts.values())

    @property
    def least(self) -> int:
        """Number of samples of the smaller class."""
        return min(self.counts.values())

    def add(self, samples: Any, good: np.ndarray) -> None:
        """Take a batch, as far as the budget goes."""
        samples, good = jax.tree.map(lambda a: a[: self.budget - self.drawn], (samples, good))
        for value, kept in self.kept.items():
            kept.append(jax.tree.map(lambda a: a[good == value], samples))  # noqa: B023 (used at once)
            self.counts[value] += int((good == value).sum())

    def synthetic(self) -> Synthetic:
        """All samples.

        Raises:
          ValueError: a class has none.
        """
        for value, name, called in ((True, "positive", "good"), (False, "negative", "bad")):
            if self.counts[value] == 0:
                raise ValueError(
                    f"genneg: no {name} within the draw budget: expected at least one sample that the oracle calls "
                    f"{called}, given 0 of {self.drawn} draws (budget {self.budget}): take fewer rounds, or a larger "
                    "budget"
                )
        join = lambda kept: jax.tree.map(lambda *parts: np.concatenate(parts), *kept)
        return Synthetic(join(self.kept[True]), join(self.kept[False]), self.counts[True], self.counts[False])


def _labelled(
    problem: OracleProblem, requests: Sequence[Request], n: int, mesh: jax.sharding.Mesh | None
) -> list[tuple[Any, np.ndarray]]:
    """n samples for each run, as `Synthetic` holds them, and which are good."""
    rows: list[np.ndarray | None] = [_rows(request, n) for request in requests]
    bound = [
        request if row is None else request._replace(conditions=jax.tree.map(lambda a: a[row], request.conditions))  # noqa: B023
        for request, row in zip(requests, rows, strict=True)
    ]
    found: list[tuple[Any, np.ndarray]] = []
    for request, row, samples in zip(bound, rows, draw_all(problem, bound, n, mesh), strict=True):
        if not np.isfinite(samples).all():
            raise FloatingPointError(f"genneg: samples: expected finite numbers, given {_not_finite(samples)}")
        labels = verdicts(problem.oracle, samples, request.conditions)
        if row is None:
            found.append((samples, labels))
        else:
            found.append(({"x": samples, "row": row, "labels": labels}, np.asarray(labels.all(1))))
    return found


def _rows(request: Request, n: int) -> np.ndarray | None:
    """n rows of the conditions, at random; None if there are no conditions."""
    if request.conditions is None:
        return None
    choice = np.random.default_rng(np.asarray(jax.random.key_data(request.key)))
    return choice.integers(0, size_of(request.conditions), n)


def verdicts(oracle: Callable[..., Valid], samples: Samples, conditions: Any = None) -> np.ndarray:
    """`oracles.oracle.label`, each process its share of the samples."""
    return distributed.by_process(partial(label, oracle), samples, *(() if conditions is None else (conditions,)))


def _not_finite(samples: np.ndarray) -> str:
    bad = (~np.isfinite(samples)).reshape(len(samples), -1).any(1).sum()
    return f"NaN or infinity in {bad} of {len(samples)} samples"


def size_of(samples: Any) -> int:
    """Number of samples of an array, or of a dict of arrays as in `Synthetic`."""
    return check.rows("genneg: samples", samples)


def accepted(
    problem: OracleProblem,
    guided: Guided,
    key: PRNGKey,
    n: int,
    budget: int,
    batch: int = 16384,
    mesh: jax.sharding.Mesh | None = None,
) -> Samples:
    """At least n samples of a model that the oracle calls good: rejection sampling.

    Raises:
      ValueError: n, the budget or the batch is < 1, a sample is not finite, or the budget does not give n.
    """
    for name, value in (("n", n), ("budget", budget), ("batch", batch)):
        check.number(f"genneg.accepted: {name}", value, at_least=1, whole=True)
    kept: list[np.ndarray] = []
    for i in range(-(-budget // batch)):
        samples = draw(problem, guided, jax.random.fold_in(key, i), batch, mesh)
        if not np.isfinite(samples).all():
            raise ValueError(f"genneg: expected finite samples, given NaN or infinite ones in draw {i + 1}")
        kept.append(samples[verdicts(problem.oracle, samples)])
        if sum(map(len, kept)) >= n:
            return np.concatenate(kept)
    raise ValueError(f"genneg: expected {n} good samples within {budget} draws, given {sum(map(len, kept))}")


def mixture(good: Any, bad: Any, n: int, key: PRNGKey, share: float = 0.25) -> Any:
    """n points for `distill`, with replacement, `share` of them bad; arrays, or dicts of arrays as in `Synthetic`.

    A student that is asked about good samples alone never sees the regions that the teacher pushes samples out of, and
    what strays there stays there.

    Raises:
      ValueError: n < 1, share is not in [0, 1), or there is no good sample, or no bad one where share > 0.
    """
    check.number("mixture: n", n, at_least=1, whole=True)
    check.number("mixture: share", share, at_least=0, below=1)
    for name, points in (("good", good), *([("bad", bad)] if share else [])):
        check.number(f"mixture: number of {name} samples", size_of(points), at_least=1, whole=True)
    pick = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    picked = []
    for points, size in ((good, n - int(share * n)), (bad, int(share * n))):
        if size:
            rows = pick.integers(0, size_of(points), size)
            picked.append(jax.tree.map(lambda a: np.asarray(a)[rows], points))  # noqa: B023 (used at once)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *picked)
