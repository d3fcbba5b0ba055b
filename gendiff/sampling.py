"""Kernel: (key, x_t, t, s) -> x_s with s < t.  Sampler: a `lax.scan` of a kernel down a grid."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gendiff import check
from gendiff.denoiser import Denoiser, denoise
from gendiff.process import Process, falling, posterior, transition
from gendiff.types import PRNGKey, Sample, Scalar, Time

Kernel: TypeAlias = Callable[[PRNGKey, Sample, Time, Time], Sample]
"""`(key, x_t, t, s) -> x_s` with s < t."""


def ddim(process: Process, denoiser: Denoiser, eta: float = 0.0) -> Kernel:
    """DDIM (Song et al. 2021, eq. 12), 0 <= eta <= 1: eta = 0 is deterministic, eta = 1 is ancestral sampling."""
    check.number("ddim: eta", eta, at_least=0, at_most=1)

    def kernel(key: PRNGKey, x: Sample, t: Time, s: Time) -> Sample:
        x0 = denoise("ddim", denoiser, x, t)
        eps = (x - process.alpha(t) * x0) / process.sigma(t)
        _, variance = posterior(process, x, x0, t, s)
        up = eta * jnp.sqrt(jnp.maximum(variance, 0.0))
        down = jnp.sqrt(jnp.maximum(process.sigma(s) ** 2 - up**2, 0.0))
        return process.alpha(s) * x0 + down * eps + up * jax.random.normal(key, x.shape)

    return kernel


def ancestral_moments(
    process: Process, denoiser: Denoiser, x: Sample, t: Time, s: Time, variance: str = "posterior"
) -> tuple[Sample, Float[Array, ""]]:
    """Mean and standard deviation of an ancestral step from x_t to x_s (Ho et al. 2020, eq. 11).

    Args:
      variance: "posterior" (beta-tilde) or "beta", which is larger.
    """
    check.choice("ancestral: variance", variance, ("posterior", "beta"))
    mean, small = posterior(process, x, denoise("ancestral", denoiser, x, t), t, s)
    _, large = transition(process, t, s)
    return mean, jnp.sqrt(jnp.maximum(small if variance == "posterior" else large, 0.0))


def ancestral(process: Process, denoiser: Denoiser, variance: str = "posterior") -> Kernel:
    """Ancestral sampling; the step to s = 0 adds no noise.  Arguments: see `ancestral_moments`."""
    check.choice("ancestral: variance", variance, ("posterior", "beta"))

    def kernel(key: PRNGKey, x: Sample, t: Time, s: Time) -> Sample:
        mean, std = ancestral_moments(process, denoiser, x, t, s, variance)
        return mean + jnp.where(process.sigma(s) == 0, 0.0, std) * jax.random.normal(key, x.shape)

    return kernel


def heun(
    process: Process,
    denoiser: Denoiser,
    churn: float = 0.0,
    churn_low: float = 0.0,
    churn_high: float = jnp.inf,
    churn_noise: float = 1.0,
) -> Kernel:
    """Heun's second-order step of the probability-flow ODE in x / alpha (Karras et al. 2022, Algorithms 1 and 2).

    A step evaluates the denoiser twice, the step to s = 0 once.

    Args:
      churn: gamma of Algorithm 2, that is S_churn / steps, in [0, sqrt(2) - 1]; 0 is the deterministic sampler.
        Needs a process in continuous time with t = sigma (EDM).
      churn_low, churn_high: S_tmin and S_tmax, the noise levels between which noise is added, 0 <= low <= high.
      churn_noise: S_noise, the factor on the standard deviation of the added noise, >= 0.

    Raises:
      ValueError: an argument is out of range, or churn > 0 on a discrete chain.
    """
    check.number("heun: churn", churn, at_least=0, at_most=2**0.5 - 1 + 1e-6)
    check.number("heun: churn_low", churn_low, at_least=0)
    check.number("heun: churn_high", churn_high, at_least=churn_low, infinite=True)
    check.number("heun: churn_noise", churn_noise, at_least=0)
    if churn and process.steps is not None:
        raise ValueError(f"heun: churn must be 0 on a discrete chain, got {churn}: use edm")

    def silent(t: Time) -> Bool[Array, ""]:
        return process.alpha(t) < 1e-3  # x / alpha has lost its digits, or has no value

    def signal(t: Time) -> Scalar:
        return jnp.where(silent(t), 1.0, process.alpha(t))

    def noise_level(t: Time) -> Scalar:
        return process.sigma(t) / signal(t)

    def kernel(key: PRNGKey, x: Sample, t: Time, s: Time) -> Sample:
        y = x / signal(t)
        if churn:
            gamma = jnp.where((t >= churn_low) & (t <= churn_high), churn, 0.0)
            raised = t * (1 + gamma)
            added = jnp.sqrt(jnp.maximum(raised**2 - t**2, 0.0)) * churn_noise
            y, t = y + added * jax.random.normal(key, x.shape), raised
        dt = noise_level(s) - noise_level(t)
        x0 = denoise("heun", denoiser, signal(t) * y, t)
        first = (y - x0) / noise_level(t)
        last = process.sigma(s) == 0

        def moved(slope: Sample, x0: Sample) -> Sample:
            """x_s / alpha_s; from alpha_t = 0 by the same ODE in x / sigma, whose slope in alpha / sigma is x_0."""
            from_noise = x0 + noise_level(s) / process.sigma(t) * (x - process.alpha(t) * x0)
            return jnp.where(silent(t), from_noise, y + dt * slope).astype(x0.dtype)

        def corrected() -> tuple[Sample, Sample]:
            y = moved(first, x0)
            x0_s = denoise("heun", denoiser, process.alpha(s) * y, jnp.where(last, t, s))
            second = (y - x0_s) / noise_level(jnp.where(last, t, s))
            return (0.5 * (first + second)).astype(first.dtype), 0.5 * (x0 + x0_s)

        # `cond`, not `where`: a batch shares s, so the last step saves its second evaluation.
        return process.alpha(s) * moved(*jax.lax.cond(last, lambda: (first, x0), corrected))

    return kernel


def recurrent(process: Process, kernel: Kernel, times: int | Int[Array, ""]) -> Kernel:
    """Take `kernel` `times` times in a step, and noise its result back from s to t in between (Bansal et al. 2023).

    The noise is the process's own q(x_t | x_s), so x_t keeps its distribution.

    Args:
      times: >= 1; 1 is `kernel`.  As an array, all numbers of times share a compiled program.
    """
    check.number("recurrent: times", times, at_least=1, whole=True)

    def recurring(key: PRNGKey, x: Sample, t: Time, s: Time) -> Sample:
        ratio, variance = transition(process, t, s)

        def once(i: Array, carry: tuple[Sample, Sample]) -> tuple[Sample, Sample]:
            x, _ = carry
            # The first pass uses the step's key.  The others use keys below `apart`, because a kernel may fold its own
            # from the step's.
            move_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.clone(apart), i))
            data = jnp.where(i == 0, jax.random.key_data(key), jax.random.key_data(move_key))
            new = _like("recurrent", kernel(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)), x, t, s), x)
            back = ratio * new + jnp.sqrt(jnp.maximum(variance, 0.0)) * jax.random.normal(noise_key, x.shape)
            return back.astype(new.dtype), new

        apart = jax.random.fold_in(jax.random.clone(key), np.uint32(2**32 - 1))
        return jax.lax.fori_loop(0, times, once, (x, x))[1]

    return kernel if isinstance(times, int) and times == 1 else recurring


def pinned(kernel: Kernel, known: Sample, mask: Bool[Array, "*shape"]) -> Kernel:
    """Hold the coordinates in `mask` at the clean values `known` in every state (Janner et al. 2022, section 3.1).

    For models that were trained with these values clean; `guidance.inpaint` holds x_0 alone.
    """

    def hold(x: Sample) -> Sample:
        for name, value in (("mask", mask), ("known", known)):
            check.broadcasts(f"pinned: {name}", value, jnp.shape(x))
        return jnp.where(mask, known, x)

    return lambda key, x, t, s: hold(kernel(key, hold(x), t, s))


def sample(process: Process, kernel: Kernel, grid: Float[Array, " steps+1"], key: PRNGKey, shape: tuple) -> Sample:
    """Draw x_T ~ N(0, sigma_T^2) and run `kernel` down `grid`; returns x_0 of `shape`, in JAX's default float type.

    Raises:
      ValueError: a step returns another shape, or the grid does not fall.
    """
    return refine(kernel, grid, key, _start(process, grid, key, shape))


def _start(process: Process, grid: Float[Array, " steps+1"], key: PRNGKey, shape: tuple) -> Sample:
    """x_T; its key follows those of the steps."""
    falling("sample: grid", grid)
    return process.sigma(grid[0]) * jax.random.normal(jax.random.fold_in(key, len(grid) - 1), shape)


def watched(
    process: Process, kernel: Kernel, grid: Float[Array, " steps+1"], key: PRNGKey, shape: tuple
) -> tuple[Sample, Int[Array, ""]]:
    """`sample`, and the number of its steps with finite numbers: fewer than all if guidance diverged."""

    def kept(key: PRNGKey, state: tuple, t: Time, s: Time) -> tuple:
        x, finite = state
        new = kernel(key, x, t, s)
        return new, finite + jnp.all(jnp.isfinite(new)).astype(jnp.int32)

    return refine(kept, grid, key, (_start(process, grid, key, shape), jnp.zeros((), jnp.int32)))


def refine(kernel: Callable, grid: Float[Array, " steps+1"], key: PRNGKey, x: Any) -> Any:
    """Run `kernel` down `grid` from x, a sample at time grid[0]."""
    return _scan(kernel, grid, key, x, lambda x: None)[0]


def states(process: Process, kernel: Kernel, grid: Float[Array, " steps+1"], key: PRNGKey, shape: tuple) -> Sample:
    """All states of `sample`, (steps + 1, *shape), in the order of the grid."""
    start = _start(process, grid, key, shape)
    return jnp.concatenate([start[None], _scan(kernel, grid, key, start, lambda x: x)[1]])


def _scan(
    kernel: Callable, grid: Float[Array, " steps+1"], key: PRNGKey, x: Any, keep: Callable[[Any], Any]
) -> tuple[Any, Any]:
    falling("sample: grid", grid)

    def step(x: Any, move: tuple) -> tuple[Any, Any]:
        i, t, s = move
        new = kernel(jax.random.fold_in(key, i), x, t, s)
        x = jax.tree.map(lambda new, old: _like("sample", new, old), new, x)
        return x, keep(x)

    return jax.lax.scan(step, x, (jnp.arange(len(grid) - 1), grid[:-1], grid[1:]))


def _like(caller: str, new: Any, old: Any) -> Array:
    """x_s in the float type of x_t, because the carry of a loop keeps its type; ValueError for another shape."""
    check.shape(f"{caller}: x_s of the kernel", new, jnp.shape(old))
    dtype = jnp.result_type(old)
    return jnp.asarray(new, dtype) if jnp.issubdtype(dtype, jnp.floating) else new
