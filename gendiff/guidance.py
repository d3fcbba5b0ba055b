"""Guidance: Denoiser -> Denoiser.  Steering, inpainting and clipping are all of this one type and compose with
`chain`."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from gendiff.denoiser import Denoiser
from gendiff.potential import Interval, Potential
from gendiff.process import Process
from gendiff.types import Sample, Scalar, Time

Guidance: TypeAlias = Callable[[Denoiser], Denoiser]
Strength: TypeAlias = Callable[[Time], Scalar]
"""t -> the factor between grad log r and the shift of x_0."""
Reward: TypeAlias = Callable[[Sample], Scalar]
"""log r of a clean sample."""


def chain(*guidances: Guidance) -> Guidance:
    """Applies guidances from first to last: `chain(a, b)(denoiser)` is `b(a(denoiser))`; `chain()` changes nothing."""

    def guidance(denoiser: Denoiser) -> Denoiser:
        for each in guidances:
            denoiser = each(denoiser)
        return denoiser

    return guidance


def score_strength(process: Process) -> Strength:
    """sigma^2 / alpha: x_0 is shifted as the score is by grad log r (Tweedie)."""
    return lambda t: process.sigma(t) ** 2 / process.alpha(t)


def mean_strength(process: Process, next_time: Callable[[Time], Time], variance: str = "posterior") -> Strength:
    """The shift of x_0 that moves the mean of an ancestral step by Sigma grad log r.

    With mu = c_x x + c_0 x_0 it is Sigma / c_0: sigma_s^2 / alpha_s for the posterior variance, and sigma_t^2 / alpha_s
    for beta_t, on any grid of times.

    Args:
      next_time: t -> s, the sampler's next time (`lambda t: t - 1` on the full chain of a DDPM; `successor(grid)`).
      variance: "posterior" or "beta", the Sigma of the sampler.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"guidance: variance: expected 'posterior' or 'beta', given {variance!r}")

    def strength(t: Time) -> Scalar:
        s = next_time(t)
        return process.sigma(s if variance == "posterior" else t) ** 2 / process.alpha(s)

    return strength


def successor(grid: Float[Array, " steps+1"]) -> Callable[[Time], Time]:
    """t -> the next time of a decreasing grid, the largest that is below t."""
    return lambda t: jnp.max(jnp.where(grid < t, grid, grid[-1]))


def steer(potential: Potential, strength: Strength, within: Interval | None = None) -> Guidance:
    """x_0 + strength(t) grad log r, with the gradient at the noisy x, not through the denoiser.

    Args:
      within: where it steers (guidance in a limited interval, Kynkäänniemi et al. 2404.07724); elsewhere, in a sampler,
        whose samples are all at one time, log r is not evaluated.
    """
    gradient = jax.grad(potential)

    def shifted(denoiser: Denoiser, x: Sample, t: Time) -> Sample:
        shift = lambda: strength(t) * gradient(x, t)
        if within is None:
            return denoiser(x, t) + shift()
        return denoiser(x, t) + jax.lax.cond(within(t), shift, lambda: jnp.zeros_like(x, jax.eval_shape(shift).dtype))

    return lambda denoiser: lambda x, t: shifted(denoiser, x, t)


def guide(
    process: Process, potential: Potential, scale: Scalar | float = 1.0, within: Interval | None = None
) -> Guidance:
    """Steers with the score form, x_0 + scale sigma^2 / alpha grad log r.

    By Tweedie's formula this is score + scale grad log r: the denoiser of p_t(x) r(x, t)^scale (Gen-neG, eq. 8).  A
    Bayes classifier needs scale 1.
    """
    strength = score_strength(process)
    return steer(potential, lambda t: scale * strength(t), within)


def guide_mean(
    process: Process,
    potential: Potential,
    next_time: Callable[[Time], Time],
    scale: Scalar | float = 1.0,
    variance: str = "posterior",
) -> Guidance:
    """Steers with the mean form, mu + scale Sigma grad log r, of Dhariwal and Nichol (2021), Algorithm 1.

    With the posterior variance the last step (s = 0) is not guided at all, where infractions are decided: prefer
    `guide`.  Censored sampling's DDPM mode is this with variance "beta".  Arguments: see `mean_strength`.
    """
    strength = mean_strength(process, next_time, variance)
    return steer(potential, lambda t: scale * strength(t))


def universal(reward: Reward, strength: Strength) -> Guidance:
    """x_0 + strength(t) grad_x log r(x_0_hat(x)), with the gradient through the denoiser (Bansal et al. 2023).

    Args:
      reward: log r of a clean sample.
    """

    def guidance(denoiser: Denoiser) -> Denoiser:
        def guided(x: Sample, t: Time) -> Sample:
            x0, pull = jax.vjp(lambda x: denoiser(x, t), x)
            return x0 + strength(t) * pull(jax.grad(reward)(x0))[0]

        return guided

    return guidance


def backward(reward: Reward, steps: int, rate: float, low: float = -1.0, high: float = 1.0) -> Guidance:
    """`steps` of Adam from x_0_hat up log r, with fresh moments each time, kept within [low, high] (2307.02770).

    Adam moves a pixel by about `rate` a step whatever the gradient, so none moves by more than about steps * rate.
    steps = 0 only clips.
    """
    if steps < 0:
        raise ValueError(f"backward: steps: expected 0 or more, given {steps}")
    optimiser = optax.adam(rate)

    def move(state: tuple, _: None) -> tuple[tuple, None]:
        x0, moments = state
        x0 = jnp.clip(x0, low, high)
        change, moments = optimiser.update(-jax.grad(reward)(x0), moments)
        return (optax.apply_updates(x0, change), moments), None

    def ascend(x0: Sample) -> Sample:
        if not steps:
            return jnp.clip(x0, low, high)
        (x0, _), _ = jax.lax.scan(move, (x0, optimiser.init(x0)), length=steps)
        return jnp.clip(x0, low, high)

    return lambda denoiser: lambda x, t: ascend(denoiser(x, t))


def clip(low: float | Array, high: float | Array) -> Guidance:
    """Clips x_0 to [low, high], in data units (static thresholding)."""
    return lambda denoiser: lambda x, t: jnp.clip(denoiser(x, t), low, high)


def inpaint(known: Sample, mask: Bool[Array, "*shape"]) -> Guidance:
    """Replaces x_0 by `known` where `mask` is true."""
    return lambda denoiser: lambda x, t: jnp.where(mask, known, denoiser(x, t))
