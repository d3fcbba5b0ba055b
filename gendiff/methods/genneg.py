"""Gen-neG: guide a diffusion model away from what an oracle calls bad (2307.16463, Algorithm 1).

    theta_0 <- a diffusion model of the data;  model_0 <- [theta_0; no classifiers]
    for each round i:
        draw from model_i, ask the oracle               `collect`         -> positives, negatives
        alpha_i <- share of positives among all draws   `Synthetic.alpha`
        phi_i <- weighted cross-entropy                 `fit_classifier`  -> C_i(x_t, t) = p(y = 1 | x_t)
        model_{i+1} <- stack:   [theta; classifiers + (phi_i)]            `append`
                       distill: [psi; no classifiers]   `distill`

With the Bayes classifier the guided model is p(x | y = 1): each data point gains exactly -log(alpha_i) nats.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check, distributed, guidance, losses, potential, sampling, together, training
from gendiff.checkpoint import Archive
from gendiff.denoiser import Denoiser, Model, denoise
from gendiff.metrics.calibration import Calibration, calibrate
from gendiff.oracles.oracle import Oracle, label
from gendiff.potential import Logit, Potential
from gendiff.process import Process
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, Time, Valid, wide

Report = Callable[[str, int, int, dict[str, float]], None]
"""(phase, done, of, metrics): called as work goes on."""


class Problem(NamedTuple):
    """What is steered, and by whom.  Static: two equal problems share their compiled programs."""

    process: Process
    model: Model
    """(theta, x, t) -> x_0."""
    network: Logit
    """(phi, x, t) -> scalar, the classifier's logit without its shift."""
    oracle: Oracle | Callable[[Samples, Any], Samples]
    """Samples (n, *shape) -> Boolean (n,), True is good."""
    shape: tuple[int, ...]
    """Of one sample."""
    kernel: Callable[[Process, Denoiser], sampling.Kernel]
    """The sampler, the same for synthetic data and for evaluation: another one has another alpha."""
    steps: int
    weight: losses.Weight
    """Of the denoising loss, for distillation and refitting."""
    classifier_time: Callable[[PRNGKey], Time]
    """Draws the noise levels that classifiers train on."""
    chunk: int = 1024
    """Samples at a time and device."""
    bind: losses.Bind | None = None
    """Where samples have conditions (maps, texts): binds theta to one.  The oracle is then asked (samples, conditions)
    and may answer with several labels a sample, (n, m); a sample is good if all of them are True."""
    bind_network: losses.Bind | None = None
    """The same for phi; the network may then give m logits."""
    within: potential.Interval | None = None
    """Where classifiers guide; None: at all noise levels."""


class Guided(NamedTuple):
    """The current model: a denoiser's parameters and K >= 0 classifiers, stacked on axis 0 (None for K = 0)."""

    theta: Params
    classifiers: Params = None

    @property
    def members(self) -> int:
        """K, the number of classifiers."""
        return 0 if self.classifiers is None else potential.leading_size(self.classifiers)


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


class ClassifierTraining(NamedTuple):
    """How a classifier is trained."""

    training: training.Settings
    half: int = 256
    """Half of the batch, >= 1: so many positives and as many negatives."""
    weighting: Literal["importance", "shift", "none"] = "importance"
    """importance: eq. 12, weights 2 alpha and 2 (1 - alpha).  shift: unweighted, and log(alpha / (1 - alpha)) is
    added to the logit when it guides; the same optimum.  none: without importance sampling, the paper's ablation."""
    select: Literal["all", "balanced"] = "all"
    """balanced: the paper's N of each class.  all: each half from its whole class; the same optimum, less variance."""
    held_out: float = 0.1
    """Share of each class that is kept for validation and calibration, in [0, 1); at least one sample is."""
    validation: int = 4096
    """The most held-out samples of each class that a validation uses, >= 1; calibration uses all."""


def bound(problem: Problem, guided: Guided, condition: Any) -> Guided:
    """The model for one condition; for None, the model itself."""
    bind, bind_network = problem.bind, problem.bind_network
    if condition is None:
        return guided
    if bind is None or bind_network is None:
        raise ValueError("genneg: conditions: expected a problem with bind and bind_network, given None for them")
    if guided.classifiers is None:
        return Guided(bind(guided.theta, condition))
    each = lambda classifier: classifier | {"net": bind_network(classifier["net"], condition)}
    return Guided(bind(guided.theta, condition), potential.over_members(each, guided.classifiers))


def logit(problem: Problem) -> Logit:
    """The logit of a classifier {"net": phi, "shift": scalar}, shift the prior's log-odds or 0."""
    return lambda classifier, x, t: problem.network(classifier["net"], x, t) + classifier["shift"]


def denoiser(problem: Problem, guided: Guided, scale: float = 1.0) -> Denoiser:
    """The guided denoiser, D + sigma^2 / alpha sum_k grad log C_k (eq. 8)."""
    plain = partial(problem.model, guided.theta)
    if guided.classifiers is None:
        return plain
    log_c = potential.stack(potential.log_probability(logit(problem)), guided.classifiers)
    return guidance.guide(problem.process, log_c, scale, problem.within)(plain)


def twist(problem: Problem, guided: Guided) -> Potential:
    """sum_k log C_k(x, t) where classifiers guide, 0 elsewhere: for `gendiff.smc`."""
    log_c = potential.stack(potential.log_probability(logit(problem)), guided.classifiers)
    return log_c if problem.within is None else potential.limited(log_c, problem.within)


def append(guided: Guided, classifier: Params) -> Guided:
    """The model with one more classifier."""
    if guided.classifiers is None:
        return guided._replace(classifiers=potential.stacked(classifier))
    return guided._replace(classifiers=_joined(guided.classifiers, classifier))


@jax.jit
def _joined(classifiers: Params, classifier: Params) -> Params:
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new[None]]), classifiers, classifier)


def draw(
    problem: Problem,
    guided: Guided,
    key: PRNGKey,
    n: int,
    mesh: jax.sharding.Mesh | None = None,
    scale: float = 1.0,
    conditions: Any = None,
) -> np.ndarray:
    """n samples of a model, whole on every process; `conditions`, a pytree with n rows, one for each.

    Raises:
      ValueError: n < 1, `problem.steps` or `problem.chunk` is out of range, the scale is not finite, there are not n
        conditions, or the model gives another shape than that of a sample.
    """
    check.number("genneg.draw: n", n, at_least=1, whole=True)
    check.number("genneg.draw: scale", scale)
    if conditions is not None:
        rows = check.rows("genneg.draw: conditions", conditions)
        check.number("genneg.draw: rows of the conditions", rows, at_least=n, at_most=n, whole=True)
    return distributed.gather(together.call(_draw, (problem, n), mesh, (guided, key, scale, conditions)), n)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(problem: Problem, n: int, mesh: Any, guided: Guided, key: PRNGKey, scale: float, conditions: Any) -> Samples:
    grid = problem.process.grid(problem.steps)

    def one(given: tuple[PRNGKey, Any]) -> Sample:
        key, condition = given
        kernel = problem.kernel(problem.process, denoiser(problem, bound(problem, guided, condition), scale))
        return sampling.sample(problem.process, kernel, grid, key, problem.shape)

    return distributed.chunked(one, (jax.random.split(key, n), conditions), problem.chunk, mesh, cut=False)


def collect(
    problem: Problem,
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
    for name, value in (("per_class", per_class), ("budget", budget), ("batch", batch)):
        check.number(f"genneg.collect: {name}", value, at_least=1, whole=True)
    if conditions is not None:
        rows = check.rows("genneg.collect: conditions", conditions)
        check.number("genneg.collect: rows of the conditions", rows, at_least=1, whole=True)
    kept: dict[bool, list] = {True: [], False: []}
    counts = {True: 0, False: 0}
    report(0, budget, {})
    while min(counts.values()) < per_class and sum(counts.values()) < budget:
        drawn = sum(counts.values())
        samples, good = _labelled(problem, guided, jax.random.fold_in(key, drawn), batch, mesh, conditions)
        samples, good = jax.tree.map(lambda a: a[: budget - drawn], (samples, good))  # noqa: B023 (used at once)
        for value in (True, False):
            kept[value].append(jax.tree.map(lambda a: a[good == value], samples))  # noqa: B023
            counts[value] += int((good == value).sum())
        report(sum(counts.values()), budget, {"good": counts[True], "bad": counts[False]})
    for value, name in ((True, "positive"), (False, "negative")):
        if counts[value] == 0:
            raise ValueError(
                f"genneg: no {name} within the draw budget: expected at least one sample that the oracle calls "
                f"{'good' if value else 'bad'}, given 0 of {sum(counts.values())} draws (budget {budget}): take fewer "
                "rounds, or a larger budget"
            )
    joined = {value: jax.tree.map(lambda *parts: np.concatenate(parts), *kept[value]) for value in (True, False)}
    return Synthetic(joined[True], joined[False], counts[True], counts[False])


def _labelled(
    problem: Problem, guided: Guided, key: PRNGKey, n: int, mesh: jax.sharding.Mesh | None, conditions: Any
) -> tuple[Any, np.ndarray]:
    """n samples, as `Synthetic` holds them, and which are good."""
    rows, given = None, None
    if conditions is not None:
        choice = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        rows = choice.integers(0, _size(conditions), n)
        given = jax.tree.map(lambda a: a[rows], conditions)
    samples = draw(problem, guided, key, n, mesh, conditions=given)
    if not np.isfinite(samples).all():
        raise FloatingPointError(f"genneg: samples: expected finite numbers, given {_not_finite(samples)}")
    labels = verdicts(problem.oracle, samples, given)
    if conditions is None:
        return samples, labels
    return {"x": samples, "row": rows, "labels": labels}, np.asarray(labels.all(1))


def verdicts(oracle: Callable[..., Valid], samples: Samples, conditions: Any = None) -> np.ndarray:
    """`oracles.oracle.label`, each process its share of the samples."""
    return distributed.by_process(partial(label, oracle), samples, *(() if conditions is None else (conditions,)))


def _not_finite(samples: np.ndarray) -> str:
    bad = (~np.isfinite(samples)).reshape(len(samples), -1).any(1).sum()
    return f"NaN or infinity in {bad} of {len(samples)} samples"


def split(synthetic: Synthetic, settings: ClassifierTraining, key: PRNGKey) -> tuple[Synthetic, Synthetic]:
    """Shuffles, selects, and splits into a training set and a held-out set; counts (so alpha) stay those of all draws.

    With select = "balanced" what the selection leaves over goes to the held-out set.

    Raises:
      ValueError: a class has fewer than 2 samples, or a setting is out of range.
    """
    check.choice("genneg: select", settings.select, ("all", "balanced"))
    check.number("genneg: held_out", settings.held_out, at_least=0, below=1)
    parts: tuple[list, list] = ([], [])
    smaller = min(_size(synthetic.positives), _size(synthetic.negatives))
    shuffle = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # on the host, where the samples are
    for samples in (synthetic.positives, synthetic.negatives):
        size = smaller if settings.select == "balanced" else _size(samples)
        order = shuffle.permutation(_size(samples))
        held = max(1, int(settings.held_out * size))
        if size - held < 1:
            raise ValueError(f"genneg: expected at least 2 samples of each class, given {_size(samples)}")
        for part, which in zip(parts, (order[held:size], np.concatenate([order[:held], order[size:]])), strict=True):
            part.append(jax.tree.map(lambda a: a[which], samples))  # noqa: B023 (used at once)
    train, held_out = (synthetic._replace(positives=pair[0], negatives=pair[1]) for pair in parts)
    return train, held_out


def _size(samples: Any) -> int:
    return check.rows("genneg: samples", samples)


def classifier_loss(problem: Problem, shift: Scalar | float) -> losses.Loss:
    """Cross-entropy of `network + shift`, an example is (x_0, label, weight), after its condition if it has one."""
    process = problem.process._replace(sample_time=problem.classifier_time)
    plain = losses.cross_entropy(process, lambda phi, x, t: problem.network(phi, x, t) + shift)
    return plain if problem.bind_network is None else losses.conditional(plain, problem.bind_network)


def fit_classifier(
    problem: Problem,
    train: Synthetic,
    held_out: Synthetic,
    start: Params,
    settings: ClassifierTraining,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
    density: tuple[np.ndarray, np.ndarray] | None = None,
    conditions: Any = None,
) -> Params:
    """phi with the least held-out loss (eq. 12), as {"net": phi, "shift": scalar}.

    Args:
      train, held_out: from `split`.
      start: phi to begin from.
      density: how often each of the positives and negatives of `train` is to be drawn, relative to the others, where
        they are not plain samples of one model (replay).
      conditions: those of `collect`.

    Raises:
      ValueError: a setting is out of range, or `density` is not a finite number >= 0 for each sample and > 0 for some.
    """
    check.choice("genneg: weighting", settings.weighting, ("importance", "shift", "none"))
    check.number("genneg: half", settings.half, at_least=1, whole=True)
    check.number("genneg: validation", settings.validation, at_least=1, whole=True)
    several = isinstance(train.positives, dict) and train.positives["labels"].ndim > 1
    if settings.weighting == "shift" and several:
        raise ValueError(
            "genneg: weighting: expected 'importance' or 'none' with several labels a sample, given 'shift': halves of "
            "good and bad samples shift each label's odds by another number"
        )
    context = classifier_context(train, held_out, settings, key, density, conditions)
    task = classifier_task(problem, settings.half, settings.validation)
    state = training.train(key, start, task, context, settings.training, host)
    return {"net": state.best, "shift": jnp.float32(0.0 if settings.weighting == "none" else _prior(train))}


def classifier_context(
    train: Synthetic,
    held_out: Synthetic,
    settings: ClassifierTraining,
    key: PRNGKey,
    density: tuple[np.ndarray, np.ndarray] | None = None,
    conditions: Any = None,
) -> dict[str, Any]:
    """What the task of `fit_classifier` reads, of its arguments."""
    importance = settings.weighting == "importance"
    positive, negative = (2 * train.alpha, 2 * (1 - train.alpha)) if importance else (1.0, 1.0)
    pools = (train.positives, train.negatives)
    rows = training.capacity(max(map(_size, pools)))
    densities = tuple(np.ones(_size(pool)) for pool in pools) if density is None else density
    for name, each, pool in zip(("positives", "negatives"), densities, pools, strict=True):
        # The cumulative sum would carry one NaN to all samples after it.
        check.shape(f"genneg: density of the {name}", each, (_size(pool),))
        check.number(f"genneg: density of the {name}", each, at_least=0)
        check.number(f"genneg: sum of the density of the {name}", np.sum(each), above=0)
    most = settings.validation
    held = tuple(jax.tree.map(lambda a: a[:most], each) for each in (held_out.positives, held_out.negatives))
    # Everything that differs between rounds is an argument, and pools are padded: all rounds share one program.
    context = {
        "pool": _one_pool(pools, rows),
        "edges": tuple(np.cumsum(training.padded(each, rows), dtype=np.float64) for each in densities),
        "held_out": _one_pool(held, most),
        "counts": tuple(float(_size(pool)) for pool in held),
        "weights": (positive, negative),
        # Under importance weights the network learns log q1/q0 on top of the prior's log-odds: it starts calibrated.
        "shift": _prior(train) if importance else 0.0,
    }
    whole = lambda a: np.issubdtype(np.asarray(a).dtype, np.integer)
    context = jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if whole(a) else jnp.float32), context)
    return context | {"key": jax.random.fold_in(key, 2**31 - 1), "conditions": conditions}


def _prior(train: Synthetic) -> float:
    """Log-odds of a good label."""
    rate = check.number("genneg: share of good labels", train.label_rate, above=0, below=1)
    return float(np.log(rate / (1 - rate)))


@by_value
def classifier_task(problem: Problem, half: int, most: int) -> Callable[[dict], training.Task]:
    """The task of `fit_classifier`."""

    def task(context: dict) -> training.Task:
        loss = classifier_loss(problem, context["shift"])
        positive, negative = context["weights"]

        def examples(samples: Any, good: Array, weights: Array) -> tuple:
            """(x_0, label, weight), after the condition if there is one."""
            if context["conditions"] is None:
                return samples, good.astype(jnp.float32), weights
            condition = jax.tree.map(lambda a: a[samples["row"]], context["conditions"])
            return condition, (samples["x"], samples["labels"], weights)

        def draw_batch(key: PRNGKey) -> tuple:
            # By index into one pool: halves that are put together would be moved between the devices of a mesh.
            places, good = jax.random.uniform(key, (2 * half,)), jnp.arange(2 * half) < half
            one, other = (jnp.searchsorted(each, each[-1] * places, side="right") for each in context["edges"])
            rows = jnp.where(good, one, other + len(context["edges"][0]))
            samples = jax.tree.map(lambda a: a[rows], context["pool"])
            return examples(samples, good, jnp.where(good, positive, negative))

        def validate(phi: Params) -> Scalar:
            place = jnp.arange(2 * most) % most
            good = jnp.arange(2 * most) < most
            share = jnp.where(good, positive / context["counts"][0], negative / context["counts"][1]) / 2
            there = place < jnp.where(good, context["counts"][0], context["counts"][1])
            share = jnp.where(there, share, 0.0)
            # The same noise at every validation, on purpose.
            keys = jax.random.split(jax.random.clone(context["key"]), 2 * most)
            given = (keys, examples(context["held_out"], good, share))
            return jnp.sum(distributed.chunked(lambda each: loss(phi, *each), given, problem.chunk))

        return training.Task(loss, draw_batch, validate)

    return task


def _one_pool(pools: tuple[Any, Any], rows: int) -> Any:
    """Positives and then negatives, both padded to so many rows."""
    return jax.tree.map(lambda *parts: np.concatenate([training.padded(a, rows) for a in parts]), *pools)


def calibration(problem: Problem, classifier: Params, held_out: Synthetic, key: PRNGKey, times: Array) -> Calibration:
    """Calibration of one classifier on the held-out part of the samples that it was made for."""
    positives, negatives = held_out.positives, held_out.negatives
    c = probability(problem)
    return calibrate(problem.process, c, classifier, positives, negatives, held_out.alpha, key, times)


@by_value
def probability(problem: Problem) -> Callable[[Params, Sample, Time], Scalar]:
    """(classifier, x, t) -> C(x, t)."""
    return lambda classifier, x, t: jax.nn.sigmoid(wide(logit(problem)(classifier, x, t)))


def distill(
    problem: Problem,
    teacher: Guided,
    x0: Samples,
    start: Params,
    batch: int,
    settings: training.Settings,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
    model: Model | None = None,
    conditions: Any = None,
    rows: Any = None,
) -> Params:
    """psi whose denoiser matches the guided one (eq. 13), so that one network evaluation replaces 1 + 3 K.

    Args:
      x0: the points that are noised (see `mixture`).  The teacher is asked once about each: its answers have no Monte
        Carlo noise, so they bear being used again, and training costs the same for any number of classifiers.
      start: psi to begin from: theta, or a new network's parameters with its `model`.
      batch: examples a step.
      mesh: the devices that ask it.
      model: the student's, (psi, x, t) -> x_0; default the problem's own.
      conditions, rows: those that samples may have, and the rows of those of x0.

    Raises:
      ValueError: x0 has no row or a number that is not finite, or batch < 1.
    """
    _points("distill: x0", x0)
    check.number("distill: batch", batch, at_least=1, whole=True)
    examples = together.call(
        teach, (problem,), mesh, (teacher, jnp.asarray(x0), jax.random.fold_in(key, 1), conditions, rows)
    )
    model = problem.model if model is None else model
    task = student_task(losses.regression(model, problem.weight), batch, problem.bind)
    given = (examples, rows, jnp.int32(len(x0)), conditions)
    return training.train(jax.random.fold_in(key, 2), start, task, given, settings, host).best


@by_value
def student_task(loss: losses.Loss, batch: int, bind: losses.Bind | None) -> Callable[[tuple], training.Task]:
    """Batches of examples with their conditions, if any.

    The context is (examples, rows of their conditions, count, conditions); only the first `count` examples count.
    """

    def task(context: tuple) -> training.Task:
        examples, rows, count, conditions = context
        if bind is None or conditions is None:
            return training.Task(loss, lambda key: training.minibatch(key, examples, batch, count))

        def draw_batch(key: PRNGKey) -> tuple:
            chosen, which = training.minibatch(key, (examples, rows), batch, count)
            return jax.tree.map(lambda a: a[which], conditions), chosen

        return training.Task(losses.conditional(loss, bind), draw_batch)

    return task


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
        check.number(f"mixture: number of {name} samples", _size(points), at_least=1, whole=True)
    pick = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    picked = []
    for points, size in ((good, n - int(share * n)), (bad, int(share * n))):
        if size:
            rows = pick.integers(0, _size(points), size)
            picked.append(jax.tree.map(lambda a: np.asarray(a)[rows], points))  # noqa: B023 (used at once)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *picked)


@partial(jax.jit, static_argnums=(0, 1))
def teach(
    problem: Problem,
    mesh: Any,
    teacher: Guided,
    x0: Samples,
    key: PRNGKey,
    conditions: Any = None,
    rows: Any = None,
) -> tuple[Samples, Array, Samples]:
    """An example (x_t, t, guided denoiser at x_t) for each x_0.

    At the problem's `classifier_time`, not the denoiser's: that is where the teacher differs from theta.
    """
    process = problem.process._replace(sample_time=problem.classifier_time)

    def example(given: tuple[PRNGKey, Sample, Any]) -> tuple[Sample, Time, Sample]:
        key, x0, row = given
        condition = None if conditions is None else jax.tree.map(lambda a: a[row], conditions)
        x, t = losses.noised(process, key, x0)
        return x, t, denoise("distill: teacher", denoiser(problem, bound(problem, teacher, condition)), x, t)

    return distributed.chunked(example, (jax.random.split(key, len(x0)), x0, rows), problem.chunk, mesh)


def refit(
    problem: Problem,
    accepted: Samples,
    start: Params,
    batch: int,
    settings: training.Settings,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
    conditions: Any = None,
    rows: Any = None,
) -> Params:
    """Rejection, then refit: the denoising loss on samples that the oracle accepts.  No classifier, no guidance.

    Raises:
      ValueError: `accepted` has no row or a number that is not finite, or batch < 1.
    """
    _points("refit: accepted", accepted)
    check.number("refit: batch", batch, at_least=1, whole=True)
    task = student_task(denoising_loss(problem), batch, problem.bind)
    # Padded, because the oracle accepts another number in every run: all share one program.
    size = training.capacity(len(accepted))
    examples, rows = jax.tree.map(lambda a: jnp.asarray(training.padded(a, size)), (accepted, rows))
    return training.train(key, start, task, (examples, rows, jnp.int32(len(accepted)), conditions), settings, host).best


def _points(name: str, samples: Samples) -> None:
    """Raises ValueError where a set of samples is empty, or not finite: training would fail later, or on some seeds."""
    check.number(f"{name}: number of samples", len(samples), at_least=1, whole=True)
    check.number(name, samples)


def denoising_loss(problem: Problem) -> losses.Loss:
    """The loss that theta was trained with."""
    return losses.denoising(problem.process, problem.model, problem.weight)


class Round(NamedTuple):
    """What one round made."""

    number: int
    """1, 2 .. R."""
    guided: Guided
    """The model after this round."""
    classifier: Params
    train: Synthetic
    held_out: Synthetic


class Rounds(NamedTuple):
    """How the rounds go."""

    rounds: int
    per_class: int
    """N, the samples of each class that a round wants."""
    budget: int
    """The most samples that a round may draw for them."""
    classifier: ClassifierTraining
    mode: Literal["stack", "distill"] = "stack"
    student: training.Settings | None = None
    """How a round's student is trained, in mode "distill"."""
    student_batch: int = 1024
    stored: int = 2**18
    """Answers of the teacher that a student learns from."""
    batch: int = 16384
    """Samples drawn at a time."""


def run(
    problem: Problem,
    theta: Params,
    initial_classifier: Callable[[PRNGKey], Params],
    settings: Rounds,
    key: PRNGKey,
    archive: Archive = Archive(None),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
    report: Report = lambda phase, done, of, metrics: None,
) -> Iterator[Round]:
    """Algorithm 1: yields each round as it ends.  Phases that the archive holds are not run again.

    Args:
      theta: parameters of the model that was trained on data.
      initial_classifier: key -> phi.
      mesh: the devices that sample; classifiers and students train on one.
      report: called as work goes on.

    Raises:
      ValueError: a setting is out of range; see also `collect`.
    """
    check.number("genneg: rounds", settings.rounds, at_least=1, whole=True)
    guided = Guided(theta)
    for number in range(1, settings.rounds + 1):
        one = one_round(problem, guided, number, initial_classifier, settings, key, archive, mesh, report)
        guided = one.guided
        yield one


def one_round(
    problem: Problem,
    guided: Guided,
    number: int,
    initial_classifier: Callable[[PRNGKey], Params],
    settings: Rounds,
    key: PRNGKey,
    archive: Archive,
    mesh: jax.sharding.Mesh | None,
    report: Report,
) -> Round:
    """Draws from the current model, fits a classifier, and stacks or distils it."""
    check.choice("genneg: mode", settings.mode, ("stack", "distill"))
    name = f"round-{number}"
    draw_key, split_key, start_key, fit_key, student_key = jax.random.split(jax.random.fold_in(key, number), 5)
    wanted, budget, batch = settings.per_class, settings.budget, settings.batch
    count = lambda done, of, metrics: report(f"{name} draws", done, of, metrics)
    synthetic = archive.once(
        f"{name}/draws",
        lambda: collect(problem, guided, draw_key, wanted, budget, batch, mesh=mesh, report=count),
        Synthetic,
    )
    train, held_out = split(synthetic, settings.classifier, split_key)
    place = host(archive, report, f"{name}/classifier", settings.classifier.training.steps)
    start = initial_classifier(start_key)
    classifier = archive.once(
        f"{name}/classifier",
        lambda: fit_classifier(problem, train, held_out, start, settings.classifier, fit_key, place),
        like={"net": start, "shift": jnp.float32(0)},
    )
    stack = append(guided, classifier)
    if settings.mode == "stack":
        return Round(number, stack, classifier, train, held_out)
    if settings.student is None:
        raise ValueError("genneg: student: expected training settings in mode 'distill', given None")
    pool_key, mixture_key, student_key = jax.random.split(student_key, 3)
    student, place = settings.student, host(archive, report, f"{name}/student", settings.student.steps)

    def teach_student() -> Params:
        good = accepted(problem, stack, pool_key, wanted, settings, mesh)
        x0 = mixture(good, synthetic.negatives, settings.stored, mixture_key)
        return distill(problem, stack, x0, guided.theta, settings.student_batch, student, student_key, place, mesh)

    psi = archive.once(f"{name}/student", teach_student, like=guided.theta)
    return Round(number, Guided(psi), classifier, train, held_out)


def accepted(
    problem: Problem, guided: Guided, key: PRNGKey, n: int, settings: Rounds, mesh: jax.sharding.Mesh | None = None
) -> Samples:
    """At least n samples of a model that the oracle calls good: rejection sampling.

    Raises:
      ValueError: n, the budget or the batch is < 1, a sample is not finite, or the budget does not give n.
    """
    for name, value in (("n", n), ("budget", settings.budget), ("batch", settings.batch)):
        check.number(f"genneg.accepted: {name}", value, at_least=1, whole=True)
    kept: list[np.ndarray] = []
    for i in range(-(-settings.budget // settings.batch)):
        samples = draw(problem, guided, jax.random.fold_in(key, i), settings.batch, mesh)
        if not np.isfinite(samples).all():
            raise ValueError(f"genneg: expected finite samples, given NaN or infinite ones in draw {i + 1}")
        kept.append(samples[verdicts(problem.oracle, samples)])
        if sum(map(len, kept)) >= n:
            return np.concatenate(kept)
    raise ValueError(f"genneg: expected {n} good samples within {settings.budget} draws, given {sum(map(len, kept))}")


def host(
    archive: Archive, report: Report, phase: str, steps: int, mesh: jax.sharding.Mesh | None = None
) -> training.Host:
    """Where a phase of training keeps its checkpoints and whom it reports to."""
    return training.Host(mesh, archive.steps(phase), lambda step, metrics: report(phase, step, steps, metrics))


def replay(rounds: list[Round], problem: Problem) -> tuple[Synthetic, Synthetic, tuple[np.ndarray, np.ndarray]]:
    """The samples of all rounds as one weighted set for ONE classifier of the first model, in place of the stack.

    Samples of round k follow p_0(x) r_k(x) with r_k = prod_{j <= k} C_j(x) / alpha_j.  Pooled, n_k from each round,
    they follow p_0 sum_k (n_k / n) r_k, so 1 / sum_k (n_k / n) r_k weights them back to p_0 (the balance heuristic of
    Veach and Guibas 1995: bounded by n / n_0, since r_0 = 1).  What the first classifiers miss stands there many
    times with small weights, which is all that a stack's later classifiers know more.

    Returns:
      A training set and a held-out set with alpha of the first model, and the weights of the training set's positives
      and negatives, for `fit_classifier`.
    """
    check.number("genneg: rounds", len(rounds), at_least=1, whole=True)
    first = rounds[0].train
    classifiers = potential.stacked(*(each.classifier for each in rounds))
    alphas = np.array([each.train.alpha for each in rounds])
    pools, weights = [], []
    for name in ("positives", "negatives"):
        points = np.concatenate([getattr(each.train, name) for each in rounds])
        rows = training.padded(points, training.capacity(len(points)))
        ratios = np.cumprod(np.asarray(_probabilities(problem, classifiers, rows))[: len(points)] / alphas, axis=1)
        ratios = np.concatenate([np.ones((len(points), 1)), ratios[:, :-1]], axis=1)
        pools.append(points)
        # m_k samples of the class stand for m_k / P_k(class) draws of round k, whatever the selection left of them.
        drawn = np.array([len(getattr(each.train, name)) for each in rounds])
        shares = drawn / (alphas if name == "positives" else 1 - alphas)
        weights.append(1.0 / (ratios @ (shares / shares.sum())))
    return first._replace(positives=pools[0], negatives=pools[1]), rounds[0].held_out, (weights[0], weights[1])


@partial(jax.jit, static_argnums=0)
def _probabilities(problem: Problem, classifiers: Params, points: Samples) -> Array:
    """C_k of each point (n, K) at the sampler's least noise."""
    low = problem.process.grid(problem.steps)[-2]
    c = potential.scalar("replay", probability(problem))
    of_all = lambda x: jax.vmap(c, (0, None, None))(classifiers, x, low)
    return distributed.chunked(of_all, points, problem.chunk)
