"""The censored model: a denoiser steered by an ensemble of rewards, and how it draws."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gendiff import check, distributed, guidance, potential, runs, sampling
from gendiff.denoiser import Model
from gendiff.guidance import Reward
from gendiff.potential import Logit, Potential
from gendiff.process import Process
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, wide


class LabelProblem(NamedTuple):
    """The model to censor.  Static: two equal problems share their compiled programs."""

    process: Process
    model: Model
    """(theta, x, t) -> x_0."""
    network: Logit
    """(phi, x, t) -> h, with r = sigmoid(h) the probability of benign."""
    shape: tuple[int, ...]
    """Shape of a sample."""
    steps: int
    """Steps of the sampler; if fewer than the process has, they are equally spaced."""
    clean: Callable[[Params, Sample], Scalar] | None = None
    """(phi, x_0) -> h of a clean sample; default: the network at the time of the least noise."""
    in_batch: Callable[[Params, Sample], tuple[Scalar, Params]] | None = None
    """(phi, x_0) -> (h, phi with the batch's moments), inside a map over `types.BATCH`, for rewards of clean samples
    with batch normalisation.  With it `fit` trains `clean` and not `network`."""
    low: float = -1.0
    high: float = 1.0
    """Range of the data.  Augmented images may exceed it by at most twice its width."""
    chunk: int = 64
    """Samples that a device draws at a time."""


class Censoring(NamedTuple):
    """Settings of the guidance, with the paper's symbols."""

    scale: Scalar | float = 1.0
    """omega, on the sum over the ensemble, >= 0."""
    recurrence: int | Int[Array, ""] = 1
    """R, passes through every step, >= 1."""
    backward: int = 0
    """B, steps of Adam on x_0_hat per pass, >= 0."""
    backward_rate: float = 2e-4
    """Adam's rate, in units of the data, >= 0."""
    universal: bool = False
    """Take the gradient of the reward of x_0_hat, through the model, instead of the reward of x_t."""
    mode: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm: ancestral steps of variance beta, and a mean shifted by beta omega grad log r.  ddim: eta = 0, and a score
    shifted by omega grad log r."""


class Diverged(FloatingPointError):
    """Guided samples that are not finite.  `samples` holds the finite samples."""

    def __init__(self, message: str, samples: Samples) -> None:
        super().__init__(message)
        self.samples = samples


@by_value
def log_reward(problem: LabelProblem) -> Logit:
    """Return (phi, x_t, t) -> log r."""
    return potential.log_probability(problem.network)


@by_value
def clean_log_reward(problem: LabelProblem) -> Callable[[Params, Sample], Scalar]:
    """Return (phi, x_0) -> log r of a clean sample."""
    first = lambda: problem.process.grid(problem.process.steps or problem.steps)[-2]
    at_first = lambda phi, x0: problem.network(phi, x0, first())
    logit = potential.scalar("censoring: clean reward", problem.clean or at_first)
    return lambda phi, x0: jax.nn.log_sigmoid(wide(logit(phi, x0)))


def total_reward(problem: LabelProblem, rewards: Params) -> Reward:
    """Return x_0 -> sum_k log r_k."""
    total = potential.stack(lambda phi, x0, t: clean_log_reward(problem)(phi, x0), rewards)
    return lambda x0: total(x0, jnp.zeros(()))


def kernel(
    problem: LabelProblem, theta: Params, rewards: Params, settings: Censoring, condition: Potential | None = None
) -> sampling.Kernel:
    """Return the step of the censored sampler.

    Args:
      rewards: K parameter trees stacked on axis 0, or None for no censoring.
      condition: a further potential, such as s log p(class | x_t), which omega does not scale.
    """
    process, ddim = problem.process, settings.mode == "ddim"
    clip = guidance.clip(problem.low, problem.high)
    if ddim:
        strength = guidance.score_strength(process)
    else:
        strength = guidance.mean_strength(process, guidance.successor(process.grid(problem.steps)), "beta")
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
    step = sampling.ddim(process, censored) if ddim else sampling.ancestral(process, censored, "beta")
    return sampling.recurrent(process, step, settings.recurrence)


class Request(NamedTuple):
    """The samples of a run."""

    theta: Params
    rewards: Params
    """K parameter trees stacked on axis 0; None draws from the uncensored model."""
    settings: Censoring
    key: PRNGKey


def draw(
    problem: LabelProblem,
    theta: Params,
    rewards: Params,
    settings: Censoring,
    key: PRNGKey,
    n: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Samples:
    """Draw n censored samples (n, *shape); with rewards None, of the uncensored model.

    Raises:
      Diverged: a sample is not finite.
      ValueError: n < 1, or a setting is out of range.
    """
    return draw_all(problem, [Request(theta, rewards, settings, key)], n, mesh)[0]


def draw_all(
    problem: LabelProblem, requests: Sequence[Request], n: int, mesh: jax.sharding.Mesh | None = None
) -> list[Samples]:
    """`draw` for several runs, whose settings may differ in scale and recurrence; equal shapes share a program."""
    check.number("censoring.draw: n", n, at_least=1, whole=True)
    for request in requests:
        check_settings(request.settings)
    # Scale and recurrence are arguments, so that all runs share a program.
    static = {
        settings._replace(scale=0.0, recurrence=settings.recurrence if rewards is None else 1)
        for _, rewards, settings, _ in requests
    }
    if len(static) > 1:
        raise ValueError(f"censoring.draw: settings of runs must agree but for scale and recurrence, got {static}")
    arguments = [
        (theta, rewards, key, float(settings.scale), settings.recurrence) for theta, rewards, settings, key in requests
    ]
    results = runs.call(drawn, (problem, *static, n), mesh, arguments)
    return [
        _all_finite(problem, request.settings, *distributed.gather(result, n))
        for request, result in zip(requests, results, strict=True)
    ]


def _all_finite(problem: LabelProblem, settings: Censoring, samples: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Return the samples; raise Diverged if a sample has fewer finite steps than the sampler."""
    if finite.min() < problem.steps:
        raise Diverged(
            f"censoring.draw: samples must be finite, got {np.sum(finite < problem.steps)} of {len(finite)} that are "
            f"not, first in step {finite.min() + 1} of {problem.steps}, with scale {settings.scale:g}: guidance "
            "diverges. Lower the scale, or take more steps.",
            samples[finite == problem.steps],
        )
    return samples


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def drawn(
    problem: LabelProblem,
    settings: Censoring,
    n: int,
    mesh: Any,
    theta: Params,
    rewards: Params,
    key: PRNGKey,
    scale: Scalar,
    times: Int[Array, ""],
) -> tuple[Samples, Int[Array, " n"]]:
    """Draw samples and their numbers of finite steps: the compiled program of `draw`."""
    recurrence = settings.recurrence if rewards is None else times
    step = kernel(problem, theta, rewards, settings._replace(scale=scale, recurrence=recurrence))
    grid = problem.process.grid(problem.steps)
    sample = lambda key: sampling.watched(problem.process, step, grid, key, problem.shape)
    return distributed.chunked(sample, jax.random.split(key, n), problem.chunk, mesh, cut=False)


def check_settings(settings: Censoring) -> None:
    """Raise ValueError if a setting is out of range."""
    for name, least in (("recurrence", 1), ("backward", 0)):
        check.number(f"censoring: {name}", getattr(settings, name), at_least=least, whole=True)
    for name in ("scale", "backward_rate"):
        check.number(f"censoring: {name}", getattr(settings, name), at_least=0)
    check.choice("censoring: mode", settings.mode, ("ddpm", "ddim"))


def evaluations(problem: LabelProblem, settings: Censoring, members: int) -> int:
    """Count the network evaluations of a sample; a gradient counts as two more of its network."""
    check.number("evaluations: members", members, at_least=0, whole=True)
    if not members:
        return problem.steps
    model, reward = (3, 3 * members) if settings.universal else (1, 3 * members)
    return problem.steps * int(settings.recurrence) * (model + reward * (1 + settings.backward))
