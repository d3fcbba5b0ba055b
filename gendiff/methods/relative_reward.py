"""Relative reward functions: what separates two diffusion models, as a potential (Nuti, Franzmeyer and Henriques 2023,
"Extracting reward functions from diffusion models", NeurIPS).

    two frozen models, base and expert, over one process       `Diffusion`, `check`
    their difference at noisy samples                           `examples` (Algorithm 1), `along_paths` (Algorithm 2)
    the same of any models, or of one network's, stored         `collect`, `pool`
    rho(x_t, t), whose gradient in x is that difference         `fit`      many rewards in one program
    steer the base model with rho                               `steer`    a perfect rho turns it into the expert

Every difference of two models is one factor of t times that of their denoisers (`factor`):

    means of a step   c_1(t) (e - b)            published
    scores            alpha / sigma^2 (e - b)   rho is then log p_e,t / p_b,t
    noise             alpha / sigma (e - b)     sigma times that of the scores: no larger where there is little noise

A reward is known up to a constant for each t: compare its values at one t only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff import check as arguments
from gendiff import distributed, guidance, losses, potential, sampling, training
from gendiff.denoiser import Denoiser, Model, denoise
from gendiff.guidance import Guidance, Strength
from gendiff.losses import Aligned
from gendiff.potential import Logit, Potential
from gendiff.process import Process, posterior
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, Time


class Switches(NamedTuple):
    """What is fitted.  The published code and paper differ from each other, and from what is right in principle."""

    target: Literal["mean", "score", "x0", "noise"] = "mean"
    """Which difference of expert and base the gradient matches."""
    at: Literal["x", "base_mean"] = "x"
    """Where the gradient is taken: at x_t, or at the mean of the base model's step, labelled t all the same."""
    masked: bool = True
    """Coordinates that both models were trained to be given are given here too, and do not count."""
    strided: bool = False
    """Windows of a trajectory are every n-th frame, not neighbours."""
    activation: Literal["leaky_relu", "mish", "gelu"] = "mish"
    """A piecewise linear one leaves the biases and the embedding of time without any gradient."""
    normaliser: Literal["shared", "own"] = "shared"
    """Both models see data in the same units, or each in its own, in which their difference means nothing exact."""
    weighting: Literal["target", "mean", "score", "x0", "noise"] = "target"
    """Of the times: the squared error counts as that of this difference.  The target's own is none: that of means then
    counts little but the last few steps."""


PUBLISHED = Switches("mean", "base_mean", False, True, "leaky_relu", "own")
"""What the released code runs."""
PRINCIPLED = Switches("noise", "x", True, False, "mish", "shared")
"""One normaliser, smooth activation, gradient at x_t, contiguous windows, conditions given and masked."""


class Diffusion(NamedTuple):
    """A frozen diffusion model: what `check` compares."""

    name: str
    process: Process
    denoiser: Denoiser
    shape: tuple[int, ...]
    normaliser: tuple[np.ndarray, np.ndarray] | None = None
    """Lower and upper ends of the data, by coordinate; None where the model sees data as they are."""


def check(base: Diffusion, expert: Diffusion, switches: Switches = PRINCIPLED) -> None:
    """Raises ValueError where the difference of two models means nothing: shapes, processes, units."""
    names = f"{base.name} and {expert.name}"
    for model in (base, expert):
        if model.process.steps is None:
            time = jax.ShapeDtypeStruct((), jnp.float32)
        else:
            time = jax.ShapeDtypeStruct((), jnp.int32)
        given = jax.eval_shape(model.denoiser, jax.ShapeDtypeStruct(model.shape, jnp.float32), time).shape
        if given != model.shape:
            raise ValueError(f"relative reward: {model.name}: expected a denoiser of {model.shape}, given {given}")
    if base.shape != expert.shape:
        raise ValueError(f"relative reward: {names}: expected one shape, given {base.shape} and {expert.shape}")
    if not _same(base.process, expert.process):
        raise ValueError(f"relative reward: {names}: expected one process, given two with other noise levels or steps")
    units = [model.normaliser for model in (base, expert)]
    alike = (units[0] is None) == (units[1] is None) and (
        units[0] is None or all(np.allclose(a, b) for a, b in zip(*units, strict=True))  # type: ignore[arg-type]
    )
    if switches.normaliser == "shared" and not alike:
        raise ValueError(
            f"relative reward: {names}: expected one normaliser, given two; their outputs are in other units. Train "
            "both in the units of one data set (preset `principled`), or ask for normaliser='own' as was published"
        )


def _same(a: Process, b: Process) -> bool:
    if a.steps != b.steps:
        return False
    times = a.grid(8 if a.steps is None else a.steps)
    levels = lambda p: np.stack([jax.vmap(p.alpha)(times), jax.vmap(p.sigma)(times)])
    return bool(np.allclose(levels(a), levels(b), rtol=1e-4, atol=1e-6))


# Targets.


def factor(process: Process, target: str, next_time: Callable[[Time], Time] | None = None) -> Strength:
    """t -> what the difference of two denoisers is multiplied with.

    Args:
      next_time: for "mean", the end of the step from t; t - 1 in a discrete chain.
    """
    arguments.choice("relative reward: target", target, ("mean", "score", "x0", "noise"))
    alpha, sigma = process.alpha, process.sigma
    if target == "mean":
        if next_time is None and process.steps is None:
            raise ValueError("relative reward: target 'mean': expected next_time for a process without steps")
        after = next_time or (lambda t: t - 1)

        def first(t: Time) -> Scalar:  # c_1, of mean = c_1 x_0 + c_2 x
            one, zero = jnp.ones(()), jnp.zeros(())
            return posterior(process, zero, one, t, after(t))[0]

        return first
    powers = {"x0": lambda t: jnp.ones(()), "noise": lambda t: alpha(t) / sigma(t)}
    powers["score"] = lambda t: alpha(t) / sigma(t) ** 2
    return powers[target]


def aligned(
    process: Process,
    base: Denoiser,
    experts: Callable[[Sample, Time], Float[Array, "G *shape"]],
    switches: Switches,
    x: Sample,
    t: Time,
    known: Bool[Array, "*shape"] | None = None,
) -> Aligned:
    """The example of a noisy sample, with one target for each of G experts on axis 0.

    Args:
      experts: (x, t) -> the x_0 of all experts, so that the base model is evaluated once for all of them.
      known: coordinates that both models are given; `switches.masked` leaves them out.

    Raises:
      ValueError: a model, or `known`, has another shape than x, or a switch is none of its values.
    """
    arguments.choice("relative reward: at", switches.at, ("x", "base_mean"))
    if known is not None:
        arguments.shape("relative reward: known", known, jnp.shape(x))
    first, unit = denoise("relative reward: base", base, x, t), factor(process, switches.target)(t)
    others = arguments.shape("relative reward: x_0 of the experts", experts(x, t), (None, *jnp.shape(x)))
    at = base_mean(process, x, first, t) if switches.at == "base_mean" else x
    counts = ~known if switches.masked and known is not None else jnp.ones(x.shape, bool)
    relative = 1.0 if switches.weighting == "target" else (factor(process, switches.weighting)(t) / unit) ** 2
    return Aligned(at, t, unit * (others - first[None]), relative * counts.astype(jnp.float32))


def base_mean(process: Process, x: Sample, x0: Sample, t: Time) -> Sample:
    """The mean of one step of a discrete chain from x, given the base model's x_0."""
    if process.steps is None:
        raise ValueError("relative reward: at 'base_mean': expected a process with steps, given one in continuous time")
    return posterior(process, x, x0, t, t - 1)[0]


def given(x: Sample, x0: Sample, known: Bool[Array, "*shape"] | None) -> Sample:
    """x with the clean values where they are known."""
    return x if known is None else jnp.where(known, x0, x)


def examples(
    process: Process,
    base: Denoiser,
    experts: Callable[[Sample, Time], Float[Array, "G *shape"]],
    switches: Switches,
    known: Bool[Array, "*shape"] | None = None,
) -> Callable[[PRNGKey, Sample], Aligned]:
    """(key, x_0) -> an example at a random time: Algorithm 1, with data of either model or of both."""

    def example(key: PRNGKey, x0: Sample) -> Aligned:
        x, t = losses.noised(process, key, x0)
        seen = given(x, x0, known if switches.masked else None)
        return aligned(process, base, experts, switches, seen, t, known)

    return example


def along_paths(
    process: Process,
    walker: Denoiser,
    base: Denoiser,
    experts: Callable[[Sample, Time], Float[Array, "G *shape"]],
    switches: Switches,
    grid: Float[Array, " steps+1"],
    shape: tuple[int, ...],
    known: Bool[Array, "*shape"] | None = None,
) -> Callable[[PRNGKey, Sample], Aligned]:
    """(key, clean) -> the examples at every step of one path of a sampler, on axis 0: Algorithm 2, which needs no data.

    Args:
      walker: the model that is sampled from (ancestral), `base` or an expert.
      known: coordinates that the models are given, at the values of `clean` (else it is not read).
    """
    kernel = sampling.ancestral(process, walker)

    def examples_of_path(key: PRNGKey, clean: Sample) -> Aligned:
        step = kernel if known is None else sampling.pinned(kernel, clean, known)
        states = sampling.states(process, step, grid, key, shape)[:-1]
        of = lambda x, t: aligned(process, base, experts, switches, given(x, clean, known), t, known)
        return jax.lax.map(lambda pair: of(*pair), (states, grid[:-1]))

    return examples_of_path


def collect(
    base: Diffusion,
    experts: Sequence[Diffusion],
    switches: Switches,
    key: PRNGKey,
    x0: Samples,
    known: Bool[Array, "*shape"] | None = None,
) -> Aligned:
    """Examples (n) with the targets of all experts (n, G, *shape), of any models over one process (Algorithm 1).

    The denoisers' parameters become constants of the compiled program; `pool` has them as arguments.

    Args:
      x0: (n, *shape) data.

    Raises:
      ValueError: two models do not fit together (see `check`), there is no expert, or x0 is empty, not finite, or of
        another shape.
    """
    arguments.number("relative reward: experts", len(experts), at_least=1, whole=True)
    for expert in experts:
        check(base, expert, switches)
    _data(x0, base.shape)
    every = lambda x, t: jnp.stack([expert.denoiser(x, t) for expert in experts])
    example = examples(base.process, base.denoiser, every, switches, known)
    run = jax.jit(lambda keys, x0: distributed.chunked(lambda pair: example(*pair), (keys, x0), 64))
    found = run(jax.random.split(key, len(x0)), jnp.asarray(x0))
    arguments.number("relative reward: targets, differences of the models' x_0,", np.asarray(found.target))
    return found


def _data(x0: Samples, shape: Sequence[int | None]) -> None:
    """Raises ValueError where data are empty, not finite, or of another shape: targets would be, in a few examples."""
    arguments.shape("relative reward: x0", x0, (None, *shape))
    arguments.number("relative reward: number of x0", len(x0), at_least=1, whole=True)
    arguments.number("relative reward: x0", x0)


def pool(
    process: Process,
    model: Model,
    switches: Switches,
    theta: Params,
    thetas: Params,
    known: Bool[Array, "*shape"] | None,
    key: PRNGKey,
    x0: Samples,
    piece: int = 1024,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[int], None] = lambda examples: None,
) -> Aligned:
    """Examples (n) with the targets of all experts (n, G, *shape), computed once for all rewards.

    In the published code 98 % of the time goes into computing these anew for every reward and step.

    Args:
      model: network of the base model and of the experts, with parameters first.
      theta, thetas: the base model's parameters, and those of G experts stacked on axis 0.
      known: coordinates that the models are given.
      x0: (n, *shape) data.
      piece: examples of one call of the compiled program, which pools of any size share; >= 1.

    Raises:
      ValueError: x0 is empty or not finite, or piece < 1.
    """
    x0 = np.asarray(x0)
    _data(x0, x0.shape[1:])
    arguments.number("relative reward: piece", piece, at_least=1, whole=True)
    keys = jax.random.split(key, len(x0))
    made = []
    for i in range(0, len(x0), piece):
        rows = np.minimum(np.arange(i, i + piece), len(x0) - 1)
        given = distributed.place(mesh, (theta, thetas, known, keys[rows], x0[rows]))
        made.append(distributed.gather(_pool(process, model, switches, mesh, *given), piece))
        report(min(i + piece, len(x0)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(x0)], *made)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pool(
    process: Process,
    model: Model,
    switches: Switches,
    mesh: jax.sharding.Mesh | None,
    theta: Params,
    thetas: Params,
    known: Bool[Array, "*shape"] | None,
    keys: PRNGKey,
    x0: Samples,
) -> Aligned:
    experts = lambda x, t: potential.over_members(lambda phi: model(phi, x, t), thetas)
    example = examples(process, partial(model, theta), experts, switches, known)
    return distributed.chunked(lambda pair: example(*pair), (keys, x0), 64, mesh, cut=False)


# Rewards.


class Problem(NamedTuple):
    """What rewards are trained on: the same network for all."""

    process: Process
    network: Logit
    """(phi, x, t) -> rho."""
    batch: int = 256
    mode: Literal["reverse", "directional"] = "reverse"
    """How the second-order gradient is taken; see `losses.gradient_alignment`."""


def fit(
    problem: Problem,
    examples: Aligned,
    goals: Array,
    start: Params,
    settings: training.Settings,
    key: PRNGKey,
    host: training.Host = training.Host(),  # noqa: B008 (immutable)
) -> training.State:
    """Trains K rewards at once, spread over the devices, on one pool of examples.

    Args:
      examples: as `pool` makes them, with targets (n, G, *shape).
      goals: (K,), the expert of each reward, in 0 .. G - 1.
      start: K parameter trees stacked on axis 0.

    Returns:
      The last states; `last` are the rewards (the published evaluations use them, not their averages).

    Raises:
      ValueError: a target is not finite, and the message has its place; a goal has no expert; batch < 1.
    """
    arguments.number("relative reward: batch", problem.batch, at_least=1, whole=True)
    n = arguments.rows("relative reward: examples", examples)
    arguments.number("relative reward: number of examples", n, at_least=1, whole=True)
    finite = np.isfinite(np.asarray(examples.target)).reshape(len(examples.t), examples.target.shape[1], -1).all(-1)
    if not finite.all():
        row, goal = np.argwhere(~finite)[0]
        raise ValueError(
            f"relative reward: targets: expected finite numbers, given {np.sum(~finite)} examples of {finite.size} "
            f"that are not, the first at t = {examples.t[row]}, of expert {goal}: a model diverges there"
        )
    arguments.shape("relative reward: goals", goals, (None,))
    arguments.number("relative reward: number of goals", len(goals), at_least=1, whole=True)
    last = examples.target.shape[1] - 1
    arguments.number("relative reward: goals", np.asarray(goals), at_least=0, at_most=last, whole=True)
    goals = jnp.asarray(goals, jnp.int32)
    keys, context = training.keys(key, len(goals)), (examples, {"goal": goals})
    return training.train(keys, start, reward_task(problem), context, settings, host, own=(False, True))


@by_value
def reward_task(problem: Problem) -> Callable[[tuple[Aligned, dict[str, Array]]], training.Task]:
    """Gradient alignment on a pool, against the expert of the run."""
    loss = losses.gradient_alignment(problem.network, problem.mode)

    def task(context: tuple[Aligned, dict[str, Array]]) -> training.Task:
        examples, own = context

        def draw(key: PRNGKey) -> Aligned:
            rows = jax.random.randint(key, (problem.batch,), 0, len(examples.t))
            x, t, weight = (a[rows] for a in (examples.x, examples.t, examples.weight))
            return Aligned(x, t, examples.target[rows, own["goal"]], weight)

        return training.Task(loss, draw)

    return task


def strength(process: Process, switches: Switches, scale: Scalar | float = 1.0) -> Strength:
    """How far grad rho shifts x_0: 1 / `factor`, so that a perfect reward at scale 1 turns base into expert."""
    arguments.number("relative reward: scale", scale)
    each = factor(process, switches.target)
    return lambda t: scale / each(t)


def steer(process: Process, rho: Potential, switches: Switches, scale: Scalar | float = 1.0) -> Guidance:
    """Steers the base model with its reward; with `at="base_mean"`, by the gradient where it was fitted."""
    arguments.choice("relative reward: at", switches.at, ("x", "base_mean"))
    shift, gradient = strength(process, switches, scale), jax.grad(potential.scalar("relative reward", rho))
    if switches.at == "x":
        return guidance.steer(rho, shift)

    def steering(base: Denoiser) -> Denoiser:
        def steered(x: Sample, t: Time) -> Sample:
            x0 = denoise("relative reward: base", base, x, t)
            return x0 + shift(t) * gradient(base_mean(process, x, x0, t), t)

        return steered

    return steering


# Is it a gradient at all, and how well is it fitted?


class Fit(NamedTuple):
    """How much of the squared difference a reward's gradient explains."""

    times: np.ndarray
    """(B + 1,) bounds of t."""
    r2: np.ndarray
    """(B,) 1 - |grad rho - y|^2 / |y|^2, summed over the examples of a bin and the coordinates that count: 1 is
    perfect, 0 is no reward at all.  NaN where there is no difference to explain."""
    overall: float
    """The same over all examples."""


def quality(network: Logit, rewards: Params, goals: Array, examples: Aligned, bounds: np.ndarray) -> list[Fit]:
    """The fit of K rewards, on held-out examples, by noise level; ValueError where the bounds of t do not rise."""
    arguments.number("quality: change from a bound to the next", np.diff(bounds), above=0)
    rest, size = map(np.asarray, _squares(network, rewards, jnp.asarray(goals, jnp.int32), examples))
    where = np.digitize(np.asarray(examples.t), bounds) - 1
    share = lambda k, inside: (
        float(1 - np.sum(rest[k][inside]) / np.sum(size[k][inside])) if size[k][inside].any() else np.nan
    )
    bins = [where == b for b in range(len(bounds) - 1)]
    every = np.ones(len(where), bool)
    return [
        Fit(np.asarray(bounds), np.array([share(k, inside) for inside in bins]), share(k, every))
        for k in range(len(rest))
    ]


@partial(jax.jit, static_argnums=0)
def _squares(network: Logit, rewards: Params, goals: Array, examples: Aligned) -> tuple[Array, Array]:
    """(K, n) squared error and squared target, over the coordinates that count."""

    def of_reward(run: tuple[Params, Array]) -> tuple[Array, Array]:
        phi, goal = run

        def one(example: Aligned) -> tuple[Scalar, Scalar]:
            y = example.target[goal]
            error = jax.grad(network, 1)(phi, example.x, example.t) - y
            return jnp.sum(example.weight * error**2), jnp.sum(example.weight * y**2)

        return distributed.chunked(one, examples, 256)

    return potential.over_members(of_reward, (rewards, goals))


def asymmetry(field: Denoiser, x: Sample, t: Time, key: PRNGKey, probes: int = 8) -> tuple[Scalar, Scalar]:
    """Estimates of ||J - J^T||^2 and ||J||^2 (Frobenius) of a field's Jacobian at x, by Hutchinson's random signs.

    sqrt(sum of the first / sum of the second) / 2 is 0 for a gradient of a potential, and 1 for a field that turns and
    nothing else: a reward can explain no more than the symmetric part.
    """
    arguments.number("asymmetry: probes", probes, at_least=1, whole=True)
    at = lambda x: denoise("asymmetry", field, x, t)

    def one(key: PRNGKey) -> tuple[Scalar, Scalar]:
        v = jax.random.rademacher(key, x.shape, x.dtype)
        along = jax.jvp(at, (x,), (v,))[1]
        across = jax.vjp(at, x)[1](v)[0]
        return jnp.sum((along - across) ** 2), 0.5 * jnp.sum(along**2 + across**2)

    first, second = jax.vmap(one)(jax.random.split(key, probes))
    return jnp.mean(first), jnp.mean(second)


def line_integral(field: Denoiser, start: Sample, end: Sample, t: Time, nodes: int = 16) -> Scalar:
    """The reward of `end` over `start`, int_0^1 <field(start + u (end - start), t), end - start> du (eq. 10).

    By Gauss and Legendre's rule with `nodes` evaluations.  For a conservative field it does not depend on the path,
    and a fitted rho must give the same difference: a check in low dimension.
    """
    arguments.number("line_integral: nodes", nodes, at_least=1, whole=True)
    arguments.shape("line_integral: end", end, jnp.shape(start))
    places, weights = np.polynomial.legendre.leggauss(nodes)
    direction = end - start
    along = lambda u: jnp.sum(denoise("line_integral", field, start + u * direction, t) * direction)
    values = jax.vmap(along)(jnp.asarray((places + 1) / 2, jnp.float32))
    return jnp.sum(jnp.asarray(weights / 2, jnp.float32) * values)


def difference(process: Process, base: Denoiser, expert: Denoiser, target: str) -> Denoiser:
    """The field that a reward is fitted to: (x, t) -> factor(t) (expert - base)."""
    each = factor(process, target)
    of = lambda model, x, t: denoise("difference", model, x, t)
    return lambda x, t: each(t) * (of(expert, x, t) - of(base, x, t))
