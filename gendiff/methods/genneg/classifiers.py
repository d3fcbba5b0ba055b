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


def split(synthetic: Synthetic, settings: ClassifierTraining, key: PRNGKey) -> tuple[Synthetic, Synthetic]:
    """Shuffles, selects, and splits into a training set and a held-out set; counts (so alpha) stay those of all draws.

    With select = "balanced" what the selection leaves over goes to the held-out set.

    Raises:
      ValueError: a class has fewer than 2 samples, or a setting is out of range.
    """
    check.choice("genneg: select", settings.select, ("all", "balanced"))
    check.number("genneg: held_out", settings.held_out, at_least=0, below=1)
    parts: tuple[list, list] = ([], [])
    smaller = min(size_of(synthetic.positives), size_of(synthetic.negatives))
    shuffle = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # on the host, where the samples are
    for samples in (synthetic.positives, synthetic.negatives):
        size = smaller if settings.select == "balanced" else size_of(samples)
        order = shuffle.permutation(size_of(samples))
        held = max(1, int(settings.held_out * size))
        if size - held < 1:
            raise ValueError(f"genneg: expected at least 2 samples of each class, given {size_of(samples)}")
        for part, which in zip(parts, (order[held:size], np.concatenate([order[:held], order[size:]])), strict=True):
            part.append(jax.tree.map(lambda a: a[which], samples))  # noqa: B023 (used at once)
    train, held_out = (synthetic._replace(positives=pair[0], negatives=pair[1]) for pair in parts)
    return train, held_out


def classifier_loss(problem: OracleProblem, shift: Scalar | float) -> losses.Loss:
    """Cross-entropy of `network + shift`, an example is (x_0, label, weight), after its condition if it has one."""
    process = problem.process._replace(sample_time=problem.classifier_time)
    plain = losses.cross_entropy(process, lambda phi, x, t: problem.network(phi, x, t) + shift)
    return plain if problem.bind_network is None else losses.conditional(plain, problem.bind_network)


def fit_classifier(
    problem: OracleProblem,
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
    asked = classifier_training(problem, train, held_out, start, settings, key, density, conditions)
    return fitted(training.train(*asked._replace(host=host)), train, settings)


def classifier_training(
    problem: OracleProblem,
    train: Synthetic,
    held_out: Synthetic,
    start: Params,
    settings: ClassifierTraining,
    key: PRNGKey,
    density: tuple[np.ndarray, np.ndarray] | None = None,
    conditions: Any = None,
) -> training.Training:
    """The training of `fit_classifier`, with its arguments and errors."""
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
    return training.Training(key, start, task, context, settings.training)


def fitted(state: training.State, train: Synthetic, settings: ClassifierTraining) -> Params:
    """The classifier, {"net": phi, "shift": scalar}, of a training that has ended."""
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
    rows = training.capacity(max(map(size_of, pools)))
    densities = tuple(np.ones(size_of(pool)) for pool in pools) if density is None else density
    for name, each, pool in zip(("positives", "negatives"), densities, pools, strict=True):
        # The cumulative sum would carry one NaN to all samples after it.
        check.shape(f"genneg: density of the {name}", each, (size_of(pool),))
        check.number(f"genneg: density of the {name}", each, at_least=0)
        check.number(f"genneg: sum of the density of the {name}", np.sum(each), above=0)
    most = settings.validation
    held = tuple(jax.tree.map(lambda a: a[:most], each) for each in (held_out.positives, held_out.negatives))
    # Everything that differs between rounds is an argument, and pools are padded: all rounds share one program.
    context = {
        "pool": _one_pool(pools, rows),
        "edges": tuple(np.cumsum(training.padded(each, rows), dtype=np.float64) for each in densities),
        "held_out": _one_pool(held, most),
        "counts": tuple(float(size_of(pool)) for pool in held),
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
def classifier_task(problem: OracleProblem, half: int, most: int) -> Callable[[dict], training.Task]:
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


def calibration(
    problem: OracleProblem, classifier: Params, held_out: Synthetic, key: PRNGKey, times: Array
) -> Calibration:
    """Calibration of one classifier on the held-out part of the samples that it was made for."""
    positives, negatives = held_out.positives, held_out.negatives
    c = probability(problem)
    return calibrate(problem.process, c, classifier, positives, negatives, held_out.alpha, key, times)


@by_value
def probability(problem: OracleProblem) -> Callable[[Params, Sample, Time], Scalar]:
    """(classifier, x, t) -> C(x, t)."""
    return lambda classifier, x, t: jax.nn.sigmoid(wide(logit(problem)(classifier, x, t)))


class Round(NamedTuple):
    """What one round made."""

    number: int
    """1, 2 .. R."""
    guided: Guided
    """The model after this round."""
    classifier: Params
    train: Synthetic
    held_out: Synthetic


def replay(rounds: list[Round], problem: OracleProblem) -> tuple[Synthetic, Synthetic, tuple[np.ndarray, np.ndarray]]:
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
def _probabilities(problem: OracleProblem, classifiers: Params, points: Samples) -> Array:
    """C_k of each point (n, K) at the sampler's least noise."""
    low = problem.process.grid(problem.steps)[-2]
    c = potential.scalar("replay", probability(problem))
    of_all = lambda x: jax.vmap(c, (0, None, None))(classifiers, x, low)
    return distributed.chunked(of_all, points, problem.chunk)
