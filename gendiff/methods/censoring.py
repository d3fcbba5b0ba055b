"""Censored sampling: a frozen diffusion model and minutes of human labels (Yoon et al. 2023, 2307.02770).

    someone marks samples of the model              `collect`    -> some malign, some benign
    K sets that share the malign ones               `bootstrap`
    r_k(x_t, t), the probability of benign          `fit`        alpha-weighted cross-entropy, all K in one program
    p(x) prod_k r_k(x)                              `draw`       guidance, backward guidance, recurrence
    where most is malign, again and again           `imitate`    marks samples of the censored model

Labels are 1 for benign and 0 for malign throughout, and an ensemble is a sum of log-sigmoids, not a mean.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gendiff import check as arguments
from gendiff import distributed, guidance, losses, potential, programs, runs, sampling, training
from gendiff.checkpoint import Archive
from gendiff.denoiser import Model
from gendiff.guidance import Reward
from gendiff.potential import Logit, Potential
from gendiff.process import Process
from gendiff.static import by_value
from gendiff.steps import packed, unpacked
from gendiff.types import BATCH, Params, PRNGKey, Sample, Samples, Scalar, wide

Rater: TypeAlias = Callable[[Samples], np.ndarray]
"""Samples (n, *shape) -> 1 where benign, 0 where malign, NaN where undecided: a person's marks, or an oracle."""
Draw: TypeAlias = Callable[[PRNGKey], Samples]
"""key -> a batch of samples."""


class Problem(NamedTuple):
    """What is censored.  Static: two equal problems share their compiled programs."""

    process: Process
    model: Model
    """(theta, x, t) -> x_0."""
    network: Logit
    """(phi, x, t) -> h, with r = sigmoid(h) the probability of benign."""
    shape: tuple[int, ...]
    """Of one sample."""
    steps: int
    """Of the sampler; fewer than the process has are taken at equal distances."""
    clean: Callable[[Params, Sample], Scalar] | None = None
    """(phi, x_0) -> h of a clean sample; default: the network at the time of the least noise."""
    in_batch: Callable[[Params, Sample], tuple[Scalar, Params]] | None = None
    """(phi, x_0) -> h of one sample of a batch, and phi with the batch's moments, below a map over `types.BATCH`.  For
    rewards of clean samples that normalise by the batch: where it is given, `fit` trains `clean` and not `network`."""
    low: float = -1.0
    high: float = 1.0
    """Range of the data.  Images may leave it (augmentation), but by no more than twice its width."""
    chunk: int = 64
    """Samples at a time and device."""


class Censoring(NamedTuple):
    """How the rewards guide (section 1.5 of the method: names of the reference in brackets)."""

    scale: Scalar | float = 1.0
    """omega, on the sum over the ensemble."""
    recurrence: int | Int[Array, ""] = 1
    """R, passes through each step."""
    backward: int = 0
    """B, steps of Adam on x_0_hat in each pass."""
    backward_rate: float = 2e-4
    """Adam's rate, in units of the data."""
    universal: bool = False
    """The gradient is that of the reward of x_0_hat, through the model, and not that of the reward of x_t."""
    mode: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm: ancestral steps of variance beta, and a mean shifted by beta omega grad log r.  ddim: eta = 0, and a score
    shifted by omega grad log r."""


class RewardTraining(NamedTuple):
    """How rewards are trained."""

    training: training.Settings
    """Its steps are those of all rounds so far where rewards are trained on."""
    batch: int = 128
    benign_weight: float = 0.02
    """alpha, the weight of the benign term: below 1, what is doubtful counts as malign."""


class Labelled(NamedTuple):
    """Marked samples."""

    malign: Samples
    benign: Samples
    seen: Any
    """How many were looked at to find them."""


class Sets(NamedTuple):
    """Training sets of K rewards, of n images each."""

    images: np.ndarray
    """(K, n, *shape)."""
    labels: np.ndarray
    """(K, n), 1 for benign."""


class Diverged(FloatingPointError):
    """Guidance made samples that are not finite.  `samples` holds those that were finished before."""

    def __init__(self, message: str, samples: Samples) -> None:
        super().__init__(message)
        self.samples = samples


@by_value
def log_reward(problem: Problem) -> Logit:
    """(phi, x_t, t) -> log r."""
    return potential.log_probability(problem.network)


@by_value
def clean_log_reward(problem: Problem) -> Callable[[Params, Sample], Scalar]:
    """(phi, x_0) -> log r of a clean sample."""
    first = lambda: problem.process.grid(problem.process.steps or problem.steps)[-2]
    at_first = lambda phi, x0: problem.network(phi, x0, first())
    logit = at_first if problem.clean is None else problem.clean
    logit = potential.scalar("censoring: clean reward", logit)
    return lambda phi, x0: jax.nn.log_sigmoid(wide(logit(phi, x0)))


def total_reward(problem: Problem, rewards: Params) -> Reward:
    """x_0 -> sum_k log r_k."""
    ignoring_time = lambda phi, x0, t: clean_log_reward(problem)(phi, x0)
    total = potential.stack(ignoring_time, rewards)
    return lambda x0: total(x0, jnp.zeros(()))


def kernel(
    problem: Problem, theta: Params, rewards: Params, settings: Censoring, condition: Potential | None = None
) -> sampling.Kernel:
    """One step of the censored sampler.

    Args:
      rewards: K parameter trees stacked on axis 0, or None for no censoring.
      condition: a further potential, such as s log p(class | x_t), on which omega does not act.
    """
    process = problem.process
    clip = guidance.clip(problem.low, problem.high)
    if settings.mode == "ddpm":
        after = guidance.successor(process.grid(problem.steps))
        strength = guidance.mean_strength(process, after, "beta")
    else:
        strength = guidance.score_strength(process)
    scaled = lambda t: settings.scale * strength(t)
    chain = []
    if rewards is None:
        chain.append(clip)
    elif settings.universal:
        chain.append(guidance.universal(total_reward(problem, rewards), scaled))
    else:
        chain += [clip, guidance.steer(potential.stack(log_reward(problem), rewards), scaled)]
    if condition is not None:
        chain.append(guidance.steer(condition, strength))
    if rewards is not None and settings.backward:
        reward = total_reward(problem, rewards)
        chain.append(guidance.backward(reward, settings.backward, settings.backward_rate, problem.low, problem.high))
    censored = guidance.chain(*chain, clip)(partial(problem.model, theta))
    step = (
        sampling.ddim(process, censored) if settings.mode == "ddim" else sampling.ancestral(process, censored, "beta")
    )
    return sampling.recurrent(process, step, settings.recurrence)


def draw(
    problem: Problem,
    theta: Params,
    rewards: Params,
    settings: Censoring,
    key: PRNGKey,
    n: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Samples:
    """n censored samples; with rewards None, n samples of the model.

    Raises:
      Diverged: a sample is not finite.
      ValueError: n < 1, or a setting is out of range.
    """
    check(settings)
    arguments.number("censoring.draw: n", n, at_least=1, whole=True)
    # Scale and recurrence are arguments, so that all of them share one program.
    given = (theta, rewards, key, float(settings.scale), settings.recurrence)
    program = settings._replace(scale=0.0, recurrence=settings.recurrence if rewards is None else 1)
    samples, finite = distributed.gather(runs.call(_draw, (problem, program, n), mesh, [given])[0], n)
    if finite.min() < problem.steps:
        raise Diverged(
            f"censoring: guidance diverged in {np.sum(finite < problem.steps)} of {n} samples, first in step "
            f"{finite.min() + 1} of {problem.steps}, with scale {settings.scale:g}: expected finite numbers. Lower the "
            "scale, or take more steps.",
            samples[finite == problem.steps],
        )
    return samples


def check(settings: Censoring) -> None:
    """Raises ValueError for settings out of range."""
    for name, least, whole in (
        ("recurrence", 1, True),
        ("backward", 0, True),
        ("scale", 0, False),
        ("backward_rate", 0, False),
    ):
        arguments.number(f"censoring: {name}", getattr(settings, name), at_least=least, whole=whole)
    arguments.choice("censoring: mode", settings.mode, ("ddpm", "ddim"))


def _in_range(problem: Problem, name: str, images: Samples) -> None:
    """Raises ValueError where a pixel is not finite, or far out of range: 0..255 in place of [-1, 1]."""
    margin = 2 * (problem.high - problem.low)
    wanted = f"censoring: {name}, of range [{problem.low:g}, {problem.high:g}],"
    arguments.number(wanted, images, at_least=problem.low - margin, at_most=problem.high + margin)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    problem: Problem,
    settings: Censoring,
    n: int,
    mesh: Any,
    theta: Params,
    rewards: Params,
    key: PRNGKey,
    scale: Scalar,
    times: Int[Array, ""],
) -> tuple[Samples, Int[Array, " n"]]:
    recurrence = settings.recurrence if rewards is None else times
    step = kernel(problem, theta, rewards, settings._replace(scale=scale, recurrence=recurrence))
    grid = problem.process.grid(problem.steps)
    one = lambda key: sampling.watched(problem.process, step, grid, key, problem.shape)
    return distributed.chunked(one, jax.random.split(key, n), problem.chunk, mesh, cut=False)


def evaluations(problem: Problem, settings: Censoring, members: int) -> int:
    """Network evaluations for one sample; a gradient counts as two more of its network."""
    arguments.number("evaluations: members", members, at_least=0, whole=True)
    if not members:
        return problem.steps
    model, reward = (3, 3 * members) if settings.universal else (1, 3 * members)
    return problem.steps * int(settings.recurrence) * (model + reward * (1 + settings.backward))


# Labels.


def collect(draw: Draw, rater: Rater, malign: int, benign: int, budget: int, key: PRNGKey) -> Labelled:
    """Marks samples in the order they come until there are enough of both classes.

    Returns:
      The first `malign` malign samples, and all benign ones that were seen.

    Raises:
      ValueError: the budget ran out; `draw` gives no samples, or NaN; the rater does not give 1, 0 or NaN for each; or
        malign, benign or budget is < 1.
    """
    for name, value in (("malign", malign), ("benign", benign), ("budget", budget)):
        arguments.number(f"censoring.collect: {name}", value, at_least=1, whole=True)
    found: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    while True:
        samples = _drawn(draw, jax.random.fold_in(key, len(found)))[: budget - sum(map(len, found))]
        found.append(samples)
        marks.append(np.asarray(rater(samples), np.float64))
        if marks[-1].shape != (len(samples),):
            raise ValueError(f"censoring: labels: expected one a sample, ({len(samples)},), given {marks[-1].shape}")
        if not np.all(np.isin(marks[-1], (0.0, 1.0)) | np.isnan(marks[-1])):
            raise ValueError(f"censoring: labels: expected 1, 0 or NaN, given {np.unique(marks[-1])}")
        mark = np.concatenate(marks)
        enough = np.flatnonzero((np.cumsum(mark == 0) >= malign) & (np.cumsum(mark == 1) >= benign))
        if len(enough):
            seen, mark = np.concatenate(found)[: enough[0] + 1], mark[: enough[0] + 1]
            return Labelled(seen[mark == 0][:malign], seen[mark == 1], len(seen))
        if len(mark) >= budget:
            raise ValueError(
                f"censoring: labels: expected {malign} malign and {benign} benign samples within {budget}, given "
                f"{np.sum(mark == 0)} and {np.sum(mark == 1)}"
            )


def _drawn(draw: Draw, key: PRNGKey) -> np.ndarray:
    """A batch of one sample or more; without any, `collect` would never end."""
    try:
        samples = np.asarray(draw(key))
    except StopIteration as error:  # of a stream that has ended: within a generator it would be a RuntimeError
        raise ValueError("censoring.collect: draw must give samples, got none. Draw more, or ask for fewer.") from error
    rows = arguments.rows("censoring.collect: samples of draw", samples)
    arguments.number("censoring.collect: number of samples of draw", rows, at_least=1, whole=True)
    arguments.number("censoring.collect: samples of draw", samples)
    return samples


def bootstrap(labelled: Labelled, members: int, benign: int, key: PRNGKey) -> list[tuple[Samples, Samples]]:
    """K pairs (malign, benign): all have the same malign samples, each its own `benign` of the benign ones.

    Raises:
      ValueError: members or benign is < 1, or there are not so many labels.
    """
    arguments.number("bootstrap: members", members, at_least=1, whole=True)
    arguments.number("bootstrap: benign", benign, at_least=1, whole=True)
    for name, pool, least in (("malign", labelled.malign, 1), ("benign", labelled.benign, benign)):
        arguments.number(f"bootstrap: number of {name} labels", len(pool), at_least=least, whole=True)
    keys = jax.random.split(key, members)
    choose = [np.random.default_rng(np.asarray(jax.random.key_data(each))) for each in keys]
    pick = lambda generator: labelled.benign[generator.permutation(len(labelled.benign))[:benign]]
    return [(labelled.malign, pick(generator)) for generator in choose]


def union(pairs: list[tuple[Samples, Samples]]) -> tuple[Samples, Samples]:
    """One set from those of all members, each sample once."""
    return tuple(np.unique(np.concatenate(each), axis=0) for each in zip(*pairs, strict=True))  # type: ignore[return-value]


def augmented(
    pairs: list[tuple[Samples, Samples]], copies: int, key: PRNGKey, change: Callable[[PRNGKey, Sample], Sample]
) -> Sets:
    """Training sets: the samples and `copies` random changes of each, made once and for all.

    Raises:
      ValueError: copies < 0, no pair, or sets of several sizes.
    """
    arguments.number("augmented: copies", copies, at_least=0, whole=True)
    arguments.number("augmented: pairs", len(pairs), at_least=1, whole=True)
    sizes = {(len(malign), len(benign)) for malign, benign in pairs}
    if len(set(map(sum, sizes))) != 1:
        raise ValueError(f"censoring: labels: expected as many for each reward, given (malign, benign) {sorted(sizes)}")
    images = np.stack([np.concatenate(pair) for pair in pairs])
    labels = np.stack([np.repeat([0.0, 1.0], [len(malign), len(benign)]) for malign, benign in pairs])
    keys = jax.random.split(key, (len(pairs), copies, images.shape[1]))
    changed = np.asarray(_changed(change, keys, jnp.asarray(images, jnp.float32)))
    every = np.concatenate([images[:, None], changed], 1)
    return Sets(every.reshape(len(pairs), -1, *images.shape[2:]), np.tile(labels, (1, copies + 1)))


@partial(jax.jit, static_argnums=0)
def _changed(change: Callable[[PRNGKey, Sample], Sample], keys: PRNGKey, images: Array) -> Array:
    return jax.vmap(jax.vmap(jax.vmap(change), (0, None)))(keys, images)


def rotation(degrees: float, background: float = -1.0) -> Callable[[PRNGKey, Sample], Sample]:
    """(key, image (h, w, c)) -> the image turned by an angle uniform in [-degrees, degrees], bilinear."""
    arguments.number("rotation: degrees", degrees, at_least=0)

    def change(key: PRNGKey, image: Sample) -> Sample:
        angle = jax.random.uniform(key, minval=-degrees, maxval=degrees) * jnp.pi / 180
        h, w, _ = image.shape
        y, x = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing="ij")
        rows = jnp.cos(angle) * y - jnp.sin(angle) * x + (h - 1) / 2
        columns = jnp.sin(angle) * y + jnp.cos(angle) * x + (w - 1) / 2
        turn = partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant", cval=background)
        return jax.vmap(lambda channel: turn(channel, [rows, columns]), -1, -1)(image)

    return change


# Rewards.


def fit(
    problem: Problem,
    sets: Sets,
    start: Params | training.State,
    settings: RewardTraining,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
) -> training.State:
    """Trains K rewards at once; `state.last` are K parameter trees stacked on axis 0.

    Rewards of clean samples with batch normalisation are trained by the moments of each batch, in all layers, and get
    those of their whole training set in the end, exactly (`settled`).  The reference has running averages instead, of
    momentum 0.1, which lag behind the parameters and depend on the last batches.

    Args:
      start: K stacked trees, or the state of an earlier fit to go on from, with its moments and its step.

    Raises:
      ValueError: a setting or a pixel is out of range, or a reward lacks labels of a class.
    """
    arguments.number("censoring: batch", settings.batch, at_least=1, whole=True)
    arguments.number("censoring: benign_weight", settings.benign_weight, at_least=0)
    arguments.shape("censoring: labels", sets.labels, np.shape(sets.images)[:2])
    _in_range(problem, "images", sets.images)
    for name, there in (("malign", sets.labels == 0), ("benign", sets.labels == 1)):
        if not np.all(np.any(there, axis=1)):
            raise ValueError(f"censoring: {name}: expected at least one label for every reward, given none")
    # Padded, so that sets of other sizes share the compiled program.
    n = sets.labels.shape[1]
    pad = lambda a: np.pad(a, [(0, 0), (0, training.capacity(n, 1024) - n)] + [(0, 0)] * (a.ndim - 2))
    context = (*(jnp.asarray(pad(a), jnp.float32) for a in sets), jnp.int32(n), jnp.float32(settings.benign_weight))
    task = reward_task(problem, settings.batch)
    state = training.train(key, start, task, context, settings.training, host)
    return state if problem.in_batch is None else state._replace(last=settled(problem, state.last, sets.images))


@partial(jax.jit, static_argnums=0)
def settled(problem: Problem, rewards: Params, images: Float[Array, "K n *shape"]) -> Params:
    """K stacked rewards with the moments of these clean images, all in one batch, each with those of its own."""
    assert problem.in_batch is not None
    whole = jax.vmap(problem.in_batch, (None, 0), (0, None), axis_name=BATCH)
    return potential.over_members(lambda each: whole(*each)[1], (rewards, jnp.asarray(images, jnp.float32)))


def _clean(key: PRNGKey) -> Array:
    return jnp.zeros((), int)  # t = 0 is data


@by_value
def reward_task(problem: Problem, batch: int) -> Callable[[tuple], training.Task]:
    """alpha-weighted cross-entropy of all members, -alpha y log r - (1 - y) log (1 - r), at uniform times or clean."""
    process, logit, in_batch = problem.process, problem.network, problem.in_batch
    if in_batch is not None:
        process = process._replace(sample_time=_clean)
        logit = lambda phi, x, t: in_batch(phi, x)[0]
    loss = losses.Ensemble(losses.cross_entropy(process, logit))

    def task(context: tuple[Array, Array, Array, Scalar]) -> training.Task:
        images, labels, n, benign_weight = context
        members = len(labels)

        def draw_batch(key: PRNGKey) -> tuple:
            rows = jax.random.randint(key, (batch, members), 0, n)
            y = labels[jnp.arange(members)[None], rows]
            return images[jnp.arange(members)[None], rows], y, jnp.where(y == 1, benign_weight, 1.0)

        return training.Task(loss, draw_batch)

    return task


class Round(NamedTuple):
    """What one round of imitation made."""

    number: int
    rewards: Params
    """One reward, stacked on axis 0."""
    labelled: Labelled
    """All labels so far."""


def imitate(
    problem: Problem,
    theta: Params,
    start: Callable[[PRNGKey], Params],
    rater: Rater,
    steps: tuple[int, ...],
    per_class: int,
    settings: RewardTraining,
    censoring: Censoring,
    prepare: Callable[[Labelled, PRNGKey], Sets],
    key: PRNGKey,
    archive: Archive = Archive(None),  # noqa: B008 (immutable)
    batch: int = 64,
    budget: int = 10_000,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[str, int, int, dict[str, float]], None] = lambda phase, done, of, metrics: None,
    name: str = "imitation",
    rounds_see: bool = True,
) -> Iterator[Round]:
    """Imitation learning: each round marks `per_class` more of each class among samples that the reward so far censors.

    Args:
      start: key -> one reward's parameters.
      steps: training steps at which each round ends, counted over all rounds, such as (500, 1500, 3000).
      prepare: labels -> training set of one reward, such as augmentation.
      per_class, batch, budget: >= 1; see `collect`.
      rounds_see: False marks samples of the uncensored model in every round: the same labels without imitation.
    """
    arguments.number("imitate: steps of the first round", steps[0] if steps else 0, at_least=1, whole=True)
    arguments.number("imitate: steps from round to round", np.diff(steps), at_least=1, whole=True)
    arguments.number("imitate: batch", batch, at_least=1, whole=True)
    rewards: Params = None
    state: training.State | None = None
    kept: list[Labelled] = []
    for number, last in enumerate(steps, 1):
        draw_key, prepare_key, start_key, fit_key = jax.random.split(jax.random.fold_in(key, number), 4)
        seen_by = rewards if rounds_see else None
        one_batch = partial(draw, problem, theta, seen_by, censoring, n=batch, mesh=mesh)
        marked = archive.once(
            f"{name}-{number}/labels",
            lambda d=one_batch, k=draw_key: collect(d, rater, per_class, per_class, budget, k),
            Labelled,
        )
        kept.append(marked._replace(benign=marked.benign[:per_class]))
        every = Labelled(
            np.concatenate([each.malign for each in kept]),
            np.concatenate([each.benign for each in kept]),
            sum(int(each.seen) for each in kept),
        )
        phase = f"{name}-{number}/reward"
        host = training.Host(
            None, archive.steps(phase), lambda step, metrics, p=phase, n=last: report(p, step, n, metrics)
        )
        fresh = potential.stacked(start(start_key))
        begin = fresh if state is None else state
        fitted = settings._replace(training=settings.training._replace(steps=last))
        sets = prepare(every, prepare_key)
        arrays = archive.once(
            phase,
            lambda s=sets, b=begin, f=fitted, k=fit_key, h=host: packed(fit(problem, s, b, f, k, h)),
            like=jax.eval_shape(lambda k, f=fitted, p=fresh: packed(programs.begin(f.training, k, p)), fit_key),
        )
        state = unpacked(arrays, fresh, fitted.training)
        rewards = state.last
        yield Round(number, rewards, every)


def reject(problem: Problem, rewards: Params, samples: Samples, key: PRNGKey, scale: float = 1.0) -> np.ndarray:
    """Which samples of the model to keep: rejection with the same reward, and no guidance.

    Each with the probability prod_k (r_k(x) / largest)^scale, the largest product being that of these samples: a small
    alpha makes every r_k small, so without it next to nothing would be kept.

    Raises:
      ValueError: scale < 0, a sample is out of range or a reward NaN, or all rewards are 0.
    """
    arguments.number("reject: scale", scale, at_least=0)
    _in_range(problem, "samples", samples)
    log_r = scores(problem, rewards, jnp.asarray(samples)).sum(1)
    arguments.number("reject: log-rewards", log_r, at_most=0, infinite=True)  # one NaN would be the largest
    arguments.number("reject: largest log-reward", log_r.max())
    return np.asarray(jnp.log(jax.random.uniform(key, (len(samples),))) < scale * (log_r - log_r.max()))


@partial(jax.jit, static_argnums=0)
def scores(problem: Problem, rewards: Params, samples: Samples) -> Float[Array, "n K"]:
    """log r_k of each clean sample and member."""
    one = lambda x0: potential.over_members(lambda phi: clean_log_reward(problem)(phi, x0), rewards)
    return distributed.chunked(one, samples, problem.chunk)


def disagreement(problem: Problem, rewards: Params, samples: Samples) -> np.ndarray:
    """Standard deviation over the members of r_k: where it is large, a label teaches most (query by committee).

    Raises:
      ValueError: a sample is out of range, or a reward NaN, which would sort as the largest.
    """
    _in_range(problem, "samples", samples)
    log_r = np.asarray(scores(problem, rewards, jnp.asarray(samples)))
    return np.exp(arguments.number("disagreement: log-rewards", log_r, at_most=0, infinite=True)).std(1)
