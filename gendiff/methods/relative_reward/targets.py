"""Examples for relative rewards: noisy samples with the difference of two models."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff import check, distributed, losses, potential, runs, sampling
from gendiff.denoiser import Denoiser, Model, denoise
from gendiff.guidance import Strength
from gendiff.losses import Aligned
from gendiff.process import Process, posterior
from gendiff.types import Params, PRNGKey, Sample, Samples, Time

Experts: TypeAlias = Callable[[Sample, Time], Float[Array, "G *shape"]]
"""(x, t) -> x_0 of G experts, which share one evaluation of the base model."""
Known: TypeAlias = Bool[Array, "*shape"] | None
"""True for the coordinates that both models get as conditions; None: there are none."""


class Switches(NamedTuple):
    """Choices of the objective.  The published code differs from the paper, and both from the exact method."""

    target: Literal["mean", "score", "x0", "noise"] = "mean"
    """The difference of expert and base that the gradient matches."""
    at: Literal["x", "base_mean"] = "x"
    """Where to take the gradient: at x_t, or at the mean of the base model's step, with the time t in both cases."""
    masked: bool = True
    """Keep the clean values of the models' conditions, and leave these coordinates out of the error."""
    strided: bool = False
    """A window has every n-th frame of a trajectory, not neighbours."""
    activation: Literal["leaky_relu", "mish", "gelu"] = "mish"
    """Of the reward.  A piecewise linear one gives the biases and the time embedding no gradient."""
    normaliser: Literal["shared", "own"] = "shared"
    """Both models see data in the same units, or in their own, where their difference has no exact meaning."""
    weighting: Literal["target", "mean", "score", "x0", "noise"] = "target"
    """The difference whose squared error counts.  "target" adds no weight; of means only the last steps then count."""


PUBLISHED = Switches("mean", "base_mean", False, True, "leaky_relu", "own")
"""The choices of the released code."""
PRINCIPLED = Switches("noise", "x", True, False, "mish", "shared")
"""One normaliser, smooth activation, gradient at x_t, contiguous windows, conditions kept and masked."""


class Models(NamedTuple):
    """A base model and its experts, which share a process and a network.  Static."""

    process: Process
    model: Model
    """(theta, x, t) -> x_0."""
    switches: Switches = PRINCIPLED


class Diffusion(NamedTuple):
    """A frozen diffusion model."""

    name: str
    process: Process
    denoiser: Denoiser
    shape: tuple[int, ...]
    normaliser: tuple[np.ndarray, np.ndarray] | None = None
    """Lower and upper ends of the data by coordinate; None if the model sees raw data."""


def check_pair(base: Diffusion, expert: Diffusion, switches: Switches = PRINCIPLED) -> None:
    """Raise ValueError if two models differ in shape, process or units, because their difference has no meaning."""
    names = f"relative reward: {base.name} and {expert.name}"
    for model in (base, expert):
        time = jax.ShapeDtypeStruct((), jnp.float32 if model.process.steps is None else jnp.int32)
        x0 = jax.eval_shape(model.denoiser, jax.ShapeDtypeStruct(model.shape, jnp.float32), time)
        check.shape(f"relative reward: x_0 of {model.name}", x0, model.shape)
    if base.shape != expert.shape:
        raise ValueError(f"{names} must have one shape, got {base.shape} and {expert.shape}")
    if not _same(base.process, expert.process):
        raise ValueError(f"{names} must have one process, got two with other noise levels or steps")
    units = [model.normaliser for model in (base, expert) if model.normaliser is not None]
    alike = not units or (len(units) == 2 and all(np.allclose(a, b) for a, b in zip(*units, strict=True)))
    if switches.normaliser == "shared" and not alike:
        raise ValueError(
            f"{names} must have one normaliser, got two, so their outputs differ in units. Train both in the units of "
            "one data set (switches `PRINCIPLED`), or choose normaliser='own' as the released code does"
        )


def _same(a: Process, b: Process) -> bool:
    if a.steps != b.steps:
        return False
    times = a.grid(a.steps or 8)
    levels = lambda p: np.stack([jax.vmap(p.alpha)(times), jax.vmap(p.sigma)(times)])
    return bool(np.allclose(levels(a), levels(b), rtol=1e-4, atol=1e-6))


def factor(process: Process, target: str) -> Strength:
    """Return t -> the factor that turns the difference of two denoisers into that of `target`."""
    check.choice("relative reward: target", target, ("mean", "score", "x0", "noise"))
    if target == "mean" and process.steps is None:
        raise ValueError("relative reward: target 'mean' must have a process with steps, got continuous time")
    alpha, sigma = process.alpha, process.sigma
    factors: dict[str, Strength] = {
        "mean": lambda t: posterior(process, jnp.zeros(()), jnp.ones(()), t, t - 1)[0],  # c_1: mean = c_1 x_0 + c_2 x
        "x0": lambda t: jnp.ones(()),
        "noise": lambda t: alpha(t) / sigma(t),
        "score": lambda t: alpha(t) / sigma(t) ** 2,
    }
    return factors[target]


def aligned(
    process: Process, base: Denoiser, experts: Experts, switches: Switches, x: Sample, t: Time, known: Known = None
) -> Aligned:
    """Make the example of a noisy sample, with targets (G, *shape); `switches.masked` leaves out known coordinates.

    Raises:
      ValueError: a model's x_0, or `known`, differs from x in shape, or a switch has no such value.
    """
    check.choice("relative reward: at", switches.at, ("x", "base_mean"))
    if known is not None:
        check.shape("relative reward: known", known, jnp.shape(x))
    x0, unit = denoise("relative reward: base", base, x, t), factor(process, switches.target)(t)
    x0_experts = check.shape("relative reward: x_0 of the experts", experts(x, t), (None, *jnp.shape(x)))
    at = base_mean(process, x, x0, t) if switches.at == "base_mean" else x
    counts = ~known if switches.masked and known is not None else jnp.ones(x.shape, bool)
    weight = 1.0 if switches.weighting == "target" else (factor(process, switches.weighting)(t) / unit) ** 2
    return Aligned(at, t, unit * (x0_experts - x0[None]), weight * counts.astype(jnp.float32))


def base_mean(process: Process, x: Sample, x0: Sample, t: Time) -> Sample:
    """Return the mean of the base model's step from x in a discrete chain, with its x_0."""
    if process.steps is None:
        raise ValueError("relative reward: at 'base_mean' needs a process with steps, got continuous time: use at='x'")
    return posterior(process, x, x0, t, t - 1)[0]


def _with_known(x: Sample, x0: Sample, known: Known) -> Sample:
    return x if known is None else jnp.where(known, x0, x)


def examples(
    process: Process, base: Denoiser, experts: Experts, switches: Switches, known: Known = None
) -> Callable[[PRNGKey, Sample], Aligned]:
    """Return (key, x_0) -> an example at a random time (Algorithm 1); the data may be those of either model."""

    def example(key: PRNGKey, x0: Sample) -> Aligned:
        x, t = losses.noised(process, key, x0)
        x = _with_known(x, x0, known if switches.masked else None)
        return aligned(process, base, experts, switches, x, t, known)

    return example


def along_paths(
    process: Process,
    walker: Denoiser,
    base: Denoiser,
    experts: Experts,
    switches: Switches,
    grid: Float[Array, " steps+1"],
    shape: tuple[int, ...],
    known: Known = None,
) -> Callable[[PRNGKey, Sample], Aligned]:
    """Return (key, clean) -> the examples at all steps of a sampler's path, on axis 0 (Algorithm 2, without data).

    Args:
      walker: the model that draws the path by ancestral sampling: `base` or an expert.
      known: coordinates with the values of `clean`, which nothing else uses.
    """
    kernel = sampling.ancestral(process, walker)

    def examples_of_path(key: PRNGKey, clean: Sample) -> Aligned:
        step = kernel if known is None else sampling.pinned(kernel, clean, known)
        states = sampling.states(process, step, grid, key, shape)[:-1]
        of = lambda x, t: aligned(process, base, experts, switches, _with_known(x, clean, known), t, known)
        return jax.lax.map(lambda pair: of(*pair), (states, grid[:-1]))

    return examples_of_path


def pool_of_models(
    base: Diffusion, experts: Sequence[Diffusion], switches: Switches, key: PRNGKey, x0: Samples, known: Known = None
) -> Aligned:
    """Compute a pool from models of several networks, whose parameters become constants of the compiled program.

    Raises:
      ValueError: `check_pair` refuses two models, experts are missing, a target is not finite, or x0 is empty, not
        finite, or of another shape.
    """
    check.number("relative reward: experts", len(experts), at_least=1, whole=True)
    for expert in experts:
        check_pair(base, expert, switches)
    _check_data(x0, base.shape)
    of_experts = lambda x, t: jnp.stack([expert.denoiser(x, t) for expert in experts])
    example = examples(base.process, base.denoiser, of_experts, switches, known)
    program = jax.jit(lambda keys, x0: distributed.chunked(lambda pair: example(*pair), (keys, x0), 64))
    pool = program(jax.random.split(key, len(x0)), jnp.asarray(x0))
    check.number("relative reward: targets, differences of the models' x_0,", np.asarray(pool.target))
    return pool


def _check_data(x0: Samples, shape: Sequence[int]) -> None:
    check.shape("relative reward: x0", x0, (None, *shape))
    check.number("relative reward: number of x0", len(x0), at_least=1, whole=True)
    check.number("relative reward: x0", x0)


class PoolRequest(NamedTuple):
    """The pool of a run."""

    theta: Params
    """Parameters of the base model."""
    thetas: Params
    """Parameters of G experts, stacked on axis 0."""
    known: Known
    key: PRNGKey
    x0: Samples
    """(n, *shape) data."""


def pools(
    models: Models,
    requests: Sequence[PoolRequest],
    piece: int = 1024,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[int], None] = lambda examples: None,
) -> list[Aligned]:
    """Compute n examples with the targets of all experts (n, G, *shape) for every run, once for all its rewards.

    The published code computes the targets again for every reward and step, which takes 98 % of its time.  Runs whose
    arrays agree in shape share a program.

    Args:
      requests: of runs, with data of one size.
      piece: examples of a call of the compiled program, which pools of any size share; >= 1.
      report: called with the number of finished examples.

    Raises:
      ValueError: x0 is empty or not finite, or piece < 1.
    """
    parts: list[list[Aligned]] = []
    n = len(requests[0].x0)
    for of_runs in zip(*(_pieces(request, piece) for request in requests), strict=True):
        pieces = runs.call(pooled, (models,), mesh, of_runs)
        parts.append([distributed.gather(examples, piece) for examples in pieces])
        report(min(len(parts) * piece, n))
    join = lambda *arrays: np.concatenate(arrays)[:n]
    return [jax.tree.map(join, *of_run) for of_run in zip(*parts, strict=True)]


def _pieces(request: PoolRequest, piece: int) -> list[PoolRequest]:
    """Cut a request into pieces with a key for every example, and pad the last piece."""
    x0 = np.asarray(request.x0)
    _check_data(x0, x0.shape[1:])
    check.number("relative reward: piece", piece, at_least=1, whole=True)
    keys = jax.random.split(request.key, len(x0))
    rows = [np.minimum(np.arange(i, i + piece), len(x0) - 1) for i in range(0, len(x0), piece)]
    return [request._replace(key=keys[indices], x0=x0[indices]) for indices in rows]


@partial(jax.jit, static_argnums=(0, 1))
def pooled(
    models: Models, mesh: Any, theta: Params, thetas: Params, known: Known, keys: PRNGKey, x0: Samples
) -> Aligned:
    """Compute a piece of a pool: the compiled program of `pools`."""
    process, model, switches = models
    experts = lambda x, t: potential.over_members(lambda phi: model(phi, x, t), thetas)
    example = examples(process, partial(model, theta), experts, switches, known)
    return distributed.chunked(lambda pair: example(*pair), (keys, x0), 64, mesh, cut=False)
