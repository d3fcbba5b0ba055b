"""Labelled samples of a model: drawing, the oracle's verdicts, rejection, and mixtures."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from gendiff import check, distributed
from gendiff.methods.genneg.model import Guided, OracleProblem, Request, draw_all
from gendiff.oracles.oracle import label
from gendiff.types import PRNGKey, Samples, Valid


class Synthetic(NamedTuple):
    """Labelled samples of one model, as arrays (n, *shape).

    Samples with conditions are dicts of "x" (n, *shape), "row" (n,), the rows of their conditions, and "labels" (n, m).
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
        """Share of good labels among the labels of all draws; alpha if a sample has one label."""
        if not isinstance(self.negatives, dict):
            return self.alpha
        return self.alpha + (1 - self.alpha) * float(np.mean(self.negatives["labels"]))

    def relabelled(self, change: Callable[[Any], Any]) -> "Synthetic":
        """Apply `change` to the labels: Booleans (n, m) -> (n, l) or (n,)."""
        classes = (self.positives, self.negatives)
        positives, negatives = (samples | {"labels": change(samples["labels"])} for samples in classes)
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
    """Draw batches until both classes have `per_class` samples, or until `budget` samples are drawn.

    Args:
      conditions: a pytree of arrays with one leading axis; a sample gets a random row.

    Raises:
      ValueError: a class has no sample within the budget; or per_class, budget or batch is < 1.
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
    """`collect` for several runs, which draw together; `report` gets the run's index first."""
    for name, value in (("per_class", per_class), ("budget", budget), ("batch", batch)):
        check.number(f"genneg.collect: {name}", value, at_least=1, whole=True)
    for request in requests:
        if request.conditions is not None:
            rows = check.rows("genneg.collect: conditions", request.conditions)
            check.number("genneg.collect: rows of the conditions", rows, at_least=1, whole=True)
    pools = [_Pool(budget) for _ in requests]
    for k in range(len(pools)):
        report(k, 0, budget, {})
    wants = lambda pool: min(pool.counts.values()) < per_class and pool.drawn < budget
    while waiting := [k for k, pool in enumerate(pools) if wants(pool)]:
        batches = [requests[k]._replace(key=jax.random.fold_in(requests[k].key, pools[k].drawn)) for k in waiting]
        for k, (samples, good) in zip(waiting, _labelled(problem, batches, batch, mesh), strict=True):
            pools[k].add(samples, good)
            report(k, pools[k].drawn, budget, {"good": pools[k].counts[True], "bad": pools[k].counts[False]})
    return [pool.synthetic() for pool in pools]


class _Pool:
    """The labelled samples of a run."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.kept: dict[bool, list] = {True: [], False: []}
        self.counts = {True: 0, False: 0}

    @property
    def drawn(self) -> int:
        """Number of samples, within the budget."""
        return sum(self.counts.values())

    def add(self, samples: Any, good: np.ndarray) -> None:
        """Add a batch, as far as the budget goes."""
        samples, good = jax.tree.map(lambda a: a[: self.budget - self.drawn], (samples, good))
        for value, kept in self.kept.items():
            kept.append(jax.tree.map(lambda a: a[good == value], samples))  # noqa: B023 (used at once)
            self.counts[value] += int((good == value).sum())

    def synthetic(self) -> Synthetic:
        """Return all samples; raises ValueError if a class has none."""
        for value, name in ((True, "valid"), (False, "invalid")):
            if self.counts[value] == 0:
                raise ValueError(
                    f"genneg: draws must hold an {name} sample, got 0 of {self.drawn}: raise the budget "
                    f"({self.budget}) or run fewer rounds"
                )
        join = lambda kept: jax.tree.map(lambda *parts: np.concatenate(parts), *kept)
        return Synthetic(join(self.kept[True]), join(self.kept[False]), self.counts[True], self.counts[False])


def _labelled(
    problem: OracleProblem, requests: Sequence[Request], n: int, mesh: jax.sharding.Mesh | None
) -> list[tuple[Any, np.ndarray]]:
    """Draw n samples a run, in the form of `Synthetic`, and which are good (n,)."""
    chosen: list[tuple[Request, np.ndarray | None]] = []
    for request in requests:
        rows = None
        if request.conditions is not None:
            choice = np.random.default_rng(np.asarray(jax.random.key_data(request.key)))
            rows = choice.integers(0, size_of(request.conditions), n)
            request = request._replace(conditions=jax.tree.map(lambda a: a[rows], request.conditions))  # noqa: B023
        chosen.append((request, rows))
    labelled: list[tuple[Any, np.ndarray]] = []
    draws = draw_all(problem, [request for request, _ in chosen], n, mesh)
    for (request, rows), samples in zip(chosen, draws, strict=True):
        if not np.isfinite(samples).all():
            bad = (~np.isfinite(samples)).reshape(n, -1).any(1).sum()
            raise FloatingPointError(f"genneg: samples must be finite, got NaN or infinity in {bad} of {n} samples")
        labels = verdicts(problem.oracle, samples, request.conditions)
        if rows is None:
            labelled.append((samples, labels))
        else:
            labelled.append(({"x": samples, "row": rows, "labels": labels}, np.asarray(labels.all(1))))
    return labelled


def verdicts(oracle: Callable[..., Valid], samples: Samples, conditions: Any = None) -> np.ndarray:
    """Call `oracles.oracle.label`; every process labels its share of the samples."""
    return distributed.by_process(partial(label, oracle), samples, *(() if conditions is None else (conditions,)))


def size_of(samples: Any) -> int:
    """Return the number of samples of an array, or of a dict of arrays as in `Synthetic`."""
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
    """Draw at least n valid samples of a model, by rejection.

    Raises:
      ValueError: n, the budget or the batch is < 1, or the budget does not give n valid samples.
      FloatingPointError: a sample is not finite.
    """
    for name, value in (("n", n), ("budget", budget), ("batch", batch)):
        check.number(f"genneg.accepted: {name}", value, at_least=1, whole=True)
    kept: list[np.ndarray] = []
    for i in range(-(-budget // batch)):
        ((samples, good),) = _labelled(problem, [Request(guided, jax.random.fold_in(key, i))], batch, mesh)
        kept.append(samples[good])
        if sum(map(len, kept)) >= n:
            return np.concatenate(kept)
    count = sum(map(len, kept))
    raise ValueError(f"genneg: {budget} draws must hold {n} valid samples, got {count}: raise the budget")


def mixture(good: Any, bad: Any, n: int, key: PRNGKey, share: float = 0.25) -> Any:
    """Draw n points for `distill`, with replacement, a `share` of them bad; arrays or dicts as in `Synthetic`.

    Bad points are needed, because a student of good samples alone does not learn where the teacher pushes samples out.

    Raises:
      ValueError: n < 1, share is not in [0, 1), or a class with a share > 0 has no sample.
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
