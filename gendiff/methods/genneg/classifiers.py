"""Gen-neG's classifiers: importance-weighted cross-entropy on a model's own samples (eq. 12), and their calibration."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check, distributed, losses, potential, training
from gendiff.methods.genneg.model import Guided, OracleProblem, logit
from gendiff.methods.genneg.samples import Synthetic, size_of
from gendiff.metrics.calibration import Calibration, calibrate
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, Time, wide


class ClassifierTraining(NamedTuple):
    """Settings of a classifier's training."""

    training: training.Settings
    half: int = 256
    """Positives, and negatives, of a batch, >= 1."""
    weighting: Literal["importance", "shift", "none"] = "importance"
    """importance: eq. 12, weights 2 alpha and 2 (1 - alpha).  shift: no weights, and guidance adds
    log(alpha / (1 - alpha)) to the logit; the same optimum.  none: the paper's ablation without importance sampling."""
    select: Literal["all", "balanced"] = "all"
    """balanced: the paper's N samples of a class.  all: all samples; the same optimum, less variance."""
    held_out: float = 0.1
    """Share of a class for validation and calibration, in [0, 1), but at least one sample."""
    validation: int = 4096
    """Largest number of held-out samples of a class in a validation, >= 1; calibration uses all."""


class Fit(NamedTuple):
    """The arguments of `fit_classifier` that a run has for itself."""

    train: Synthetic
    """From `split`."""
    held_out: Synthetic
    start: Params
    """phi to begin from."""
    key: PRNGKey
    density: tuple[np.ndarray, np.ndarray] | None = None
    """Relative frequencies of the training positives and negatives in batches, >= 0 (`replay`); None: equal."""
    conditions: Any = None
    """The conditions of `collect`."""


def split(synthetic: Synthetic, settings: ClassifierTraining, key: PRNGKey) -> tuple[Synthetic, Synthetic]:
    """Shuffle, select and split samples into a training set and a held-out set; both keep the counts of all draws.

    With select = "balanced", the held-out set gets the samples that are not selected.

    Raises:
      ValueError: a class has fewer than 2 samples, or a setting is out of range.
    """
    check.choice("genneg: select", settings.select, ("all", "balanced"))
    check.number("genneg: held_out", settings.held_out, at_least=0, below=1)
    classes = synthetic.positives, synthetic.negatives
    smaller = min(map(size_of, classes))
    shuffle = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # on the host, where the samples are
    parts: tuple[list, list] = ([], [])
    for samples in classes:
        size = smaller if settings.select == "balanced" else size_of(samples)
        order = shuffle.permutation(size_of(samples))
        held = max(1, int(settings.held_out * size))
        if size - held < 1:
            raise ValueError(f"genneg: a class must have at least 2 samples, got {size_of(samples)}: draw more")
        for part, rows in zip(parts, (order[held:size], np.concatenate([order[:held], order[size:]])), strict=True):
            part.append(jax.tree.map(lambda a: a[rows], samples))  # noqa: B023 (used at once)
    train, held_out = (synthetic._replace(positives=pair[0], negatives=pair[1]) for pair in parts)
    return train, held_out


def classifier_loss(problem: OracleProblem, shift: Scalar | float) -> losses.Loss:
    """Cross-entropy of `network + shift`; an example is (x_0, label, weight), or (condition, (x_0, labels, weight))."""
    process = problem.process._replace(sample_time=problem.classifier_time)
    plain = losses.cross_entropy(process, lambda phi, x, t: problem.network(phi, x, t) + shift)
    return plain if problem.bind_network is None else losses.conditional(plain, problem.bind_network)


def fit_classifier(
    problem: OracleProblem,
    fit: Fit,
    settings: ClassifierTraining,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
) -> Params:
    """Return the classifier of least held-out loss (eq. 12), {"net": phi, "shift": scalar}.

    Raises:
      ValueError: a setting is out of range, or the density of a class is not finite, negative or 0 everywhere.
    """
    state = training.train(*classifier_training(problem, fit, settings)._replace(host=host))
    return fitted(state, fit.train, settings)


def classifier_training(problem: OracleProblem, fit: Fit, settings: ClassifierTraining) -> training.Training:
    """Return the training of `fit_classifier`, which raises the same errors."""
    check.choice("genneg: weighting", settings.weighting, ("importance", "shift", "none"))
    check.number("genneg: half", settings.half, at_least=1, whole=True)
    check.number("genneg: validation", settings.validation, at_least=1, whole=True)
    several = isinstance(fit.train.positives, dict) and fit.train.positives["labels"].ndim > 1
    if settings.weighting == "shift" and several:
        raise ValueError(
            "genneg: weighting must be 'importance' or 'none' for samples with several labels, got 'shift', which has "
            "a different shift for every label"
        )
    task = classifier_task(problem, settings.half, settings.validation)
    return training.Training(fit.key, fit.start, task, classifier_context(fit, settings), settings.training)


def fitted(state: training.State, train: Synthetic, settings: ClassifierTraining) -> Params:
    """Return the classifier of a training that has ended, {"net": phi, "shift": scalar}."""
    return {"net": state.best, "shift": jnp.float32(0.0 if settings.weighting == "none" else _prior(train))}


def classifier_context(fit: Fit, settings: ClassifierTraining) -> dict[str, Any]:
    """Return the context of `classifier_task`."""
    train, importance = fit.train, settings.weighting == "importance"
    pools = (train.positives, train.negatives)
    rows = training.capacity(max(map(size_of, pools)))
    densities = tuple(np.ones(size_of(pool)) for pool in pools) if fit.density is None else fit.density
    for name, density, pool in zip(("positives", "negatives"), densities, pools, strict=True):
        # Check, because the cumulative sum would carry one NaN to all samples after it.
        check.shape(f"genneg: density of the {name}", density, (size_of(pool),))
        check.number(f"genneg: density of the {name}", density, at_least=0)
        check.number(f"genneg: sum of the density of the {name}", np.sum(density), above=0)
    most = settings.validation
    held = tuple(jax.tree.map(lambda a: a[:most], pool) for pool in (fit.held_out.positives, fit.held_out.negatives))
    # Rounds share one program, because all that differs between them is an argument, and pools are padded.
    context = {
        "pool": _one_pool(pools, rows),
        "edges": tuple(np.cumsum(training.padded(density, rows), dtype=np.float64) for density in densities),
        "held_out": _one_pool(held, most),
        "counts": tuple(float(size_of(pool)) for pool in held),
        "weights": (2 * train.alpha, 2 * (1 - train.alpha)) if importance else (1.0, 1.0),
        # With importance weights the network starts calibrated, because it learns log q1/q0 on top of the prior.
        "shift": _prior(train) if importance else 0.0,
    }
    integral = lambda a: np.issubdtype(np.asarray(a).dtype, np.integer)
    context = jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if integral(a) else jnp.float32), context)
    return context | {"key": jax.random.fold_in(fit.key, 2**31 - 1), "conditions": fit.conditions}


def _prior(train: Synthetic) -> float:
    """Log-odds of a good label."""
    rate = check.number("genneg: share of good labels", train.label_rate, above=0, below=1)
    return float(np.log(rate / (1 - rate)))


@by_value
def classifier_task(problem: OracleProblem, half: int, most: int) -> Callable[[dict], training.Task]:
    """Return the task of `fit_classifier`: batches of `half` samples a class, validations of at most `most`."""

    def task(context: dict) -> training.Task:
        loss = classifier_loss(problem, context["shift"])
        positive, negative = context["weights"]

        def examples(samples: Any, good: Array, weights: Array) -> tuple:
            if context["conditions"] is None:
                return samples, good.astype(jnp.float32), weights
            condition = jax.tree.map(lambda a: a[samples["row"]], context["conditions"])
            return condition, (samples["x"], samples["labels"], weights)

        def draw_batch(key: PRNGKey) -> tuple:
            # Index one pool, because a concatenation of two halves would move them between the devices of a mesh.
            places, good = jax.random.uniform(key, (2 * half,)), jnp.arange(2 * half) < half
            first, second = (jnp.searchsorted(edges, edges[-1] * places, side="right") for edges in context["edges"])
            rows = jnp.where(good, first, second + len(context["edges"][0]))
            samples = jax.tree.map(lambda a: a[rows], context["pool"])
            return examples(samples, good, jnp.where(good, positive, negative))

        def validate(phi: Params) -> Scalar:
            place = jnp.arange(2 * most) % most
            good = jnp.arange(2 * most) < most
            share = jnp.where(good, positive / context["counts"][0], negative / context["counts"][1]) / 2
            present = place < jnp.where(good, context["counts"][0], context["counts"][1])
            share = jnp.where(present, share, 0.0)
            # The same noise at every validation, so that losses compare.
            keys = jax.random.split(jax.random.clone(context["key"]), 2 * most)
            batch = (keys, examples(context["held_out"], good, share))
            return jnp.sum(distributed.chunked(lambda example: loss(phi, *example), batch, problem.chunk))

        return training.Task(loss, draw_batch, validate)

    return task


def _one_pool(pools: tuple[Any, Any], rows: int) -> Any:
    """Concatenate positives and negatives, both padded to `rows`."""
    return jax.tree.map(lambda *parts: np.concatenate([training.padded(a, rows) for a in parts]), *pools)


def calibration(
    problem: OracleProblem, classifier: Params, held_out: Synthetic, key: PRNGKey, times: Array
) -> Calibration:
    """Calibrate a classifier on the held-out samples of its round, at the times (L,)."""
    positives, negatives, c = held_out.positives, held_out.negatives, probability(problem)
    return calibrate(problem.process, c, classifier, positives, negatives, held_out.alpha, key, times)


@by_value
def probability(problem: OracleProblem) -> Callable[[Params, Sample, Time], Scalar]:
    """Return (classifier, x, t) -> C(x, t)."""
    return lambda classifier, x, t: jax.nn.sigmoid(wide(logit(problem)(classifier, x, t)))


class Round(NamedTuple):
    """The result of a round."""

    number: int
    """1, 2 .. R."""
    guided: Guided
    """The model after this round."""
    classifier: Params
    train: Synthetic
    held_out: Synthetic


def replay(rounds: list[Round], problem: OracleProblem) -> tuple[Synthetic, Synthetic, tuple[np.ndarray, np.ndarray]]:
    """Pool the samples of all rounds with weights, for ONE classifier of the first model in place of the stack.

    Samples of round k follow p_0(x) r_k(x) with r_k = prod_{j <= k} C_j(x) / alpha_j.  A pool of n_k from round k
    follows p_0 sum_k (n_k / n) r_k.  So 1 / sum_k (n_k / n) r_k weights it back to p_0.  This is the balance heuristic
    of Veach and Guibas 1995, bounded by n / n_0 because r_0 = 1.  Samples that the first classifiers miss occur many
    times with small weights; the later classifiers of a stack know nothing more.

    Returns:
      A training set and a held-out set with alpha of the first model, and the training set's `Fit.density`.
    """
    check.number("genneg: rounds", len(rounds), at_least=1, whole=True)
    first = rounds[0].train
    classifiers = potential.stacked(*(ended.classifier for ended in rounds))
    alphas = np.array([ended.train.alpha for ended in rounds])
    pools, weights = [], []
    for name in ("positives", "negatives"):
        parts = [getattr(ended.train, name) for ended in rounds]
        points = np.concatenate(parts)
        rows = training.padded(points, training.capacity(len(points)))
        ratios = np.cumprod(np.asarray(_probabilities(problem, classifiers, rows))[: len(points)] / alphas, axis=1)
        ratios = np.concatenate([np.ones((len(points), 1)), ratios[:, :-1]], axis=1)
        pools.append(points)
        # m_k selected samples of a class stand for m_k / P_k(class) draws of round k.
        shares = np.array([len(part) for part in parts]) / (alphas if name == "positives" else 1 - alphas)
        weights.append(1.0 / (ratios @ (shares / shares.sum())))
    return first._replace(positives=pools[0], negatives=pools[1]), rounds[0].held_out, (weights[0], weights[1])


@partial(jax.jit, static_argnums=0)
def _probabilities(problem: OracleProblem, classifiers: Params, points: Samples) -> Array:
    """C_k of points, (n, K), at the sampler's least noise."""
    low = problem.process.grid(problem.steps)[-2]
    c = potential.scalar("replay", probability(problem))
    of_all = lambda x: jax.vmap(c, (0, None, None))(classifiers, x, low)
    return distributed.chunked(of_all, points, problem.chunk)
