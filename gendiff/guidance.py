"""Guidance: Denoiser -> Denoiser.  Steering, inpainting and clipping have this type; `chain` composes them."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy  # loads `scipy.stats`, which takes over a second, at its first use
from jaxtyping import Array, Bool, Float

from gendiff import check
from gendiff.denoiser import Denoiser, denoise
from gendiff.potential import Interval, Potential, scalar
from gendiff.process import ROUNDING, Process, falling
from gendiff.static import by_value
from gendiff.types import Sample, Samples, Scalar, Time, Valid

Guidance: TypeAlias = Callable[[Denoiser], Denoiser]
"""Denoiser -> the steered denoiser."""
Strength: TypeAlias = Callable[[Time], Scalar]
"""t -> factor that turns grad log r into a shift of x_0."""
Reward: TypeAlias = Callable[[Sample], Scalar]
"""log r of a clean sample."""


@by_value
def chain(*guidances: Guidance) -> Guidance:
    """Apply guidances from first to last: `chain(a, b)(denoiser)` is `b(a(denoiser))`; `chain()` changes nothing."""
    return lambda denoiser: functools.reduce(lambda steered, guidance: guidance(steered), guidances, denoiser)


@by_value
def score_strength(process: Process) -> Strength:
    """sigma^2 / alpha, the shift of x_0 that adds grad log r to the score (Tweedie); 0 at alpha = 0.

    An x_t without signal has a constant potential, so nothing pushes it.
    """

    def strength(t: Time) -> Scalar:
        alpha = process.alpha(t)
        silent = alpha < ROUNDING
        return jnp.where(silent, 0.0, process.sigma(t) ** 2 / jnp.where(silent, 1.0, alpha))

    return strength


@by_value
def mean_strength(process: Process, next_time: Callable[[Time], Time], variance: str = "posterior") -> Strength:
    """The shift of x_0 that moves the mean of an ancestral step by Sigma grad log r.

    With mu = c_x x + c_0 x_0 it is Sigma / c_0, on any grid: sigma_s^2 / alpha_s for the posterior variance,
    sigma_t^2 / alpha_s for beta_t.

    Args:
      next_time: t -> s, the sampler's next time: `successor(grid)`, or `lambda t: t - 1` on a full chain.
      variance: "posterior" or "beta", the Sigma of the sampler.
    """
    check.choice("mean_strength: variance", variance, ("posterior", "beta"))

    def strength(t: Time) -> Scalar:
        s = next_time(t)
        return process.sigma(s if variance == "posterior" else t) ** 2 / process.alpha(s)

    return strength


def successor(grid: Float[Array, " steps+1"]) -> Callable[[Time], Time]:
    """t -> the largest time of a grid below t; raises ValueError if the grid does not fall."""
    falling("successor: grid", grid)
    return lambda t: jnp.max(jnp.where(grid < t, grid, grid[-1]))


@by_value
def steer(potential: Potential, strength: Strength, within: Interval | None = None) -> Guidance:
    """x_0 + strength(t) grad log r, with the gradient at the noisy x, not through the denoiser.

    Args:
      within: the times that are guided (Kynkäänniemi et al. 2404.07724); None: all.  A sampler, whose samples share
        t, does not evaluate log r at the others.

    Raises:
      ValueError: log r or the strength is no scalar, or x_0 does not have the shape of x.
    """
    gradient = jax.grad(scalar("steer", potential))

    def shifted(denoiser: Denoiser, x: Sample, t: Time) -> Sample:
        shift = lambda: check.shape("steer: strength", strength(t), ()) * gradient(x, t)
        x0 = denoise("steer", denoiser, x, t)
        if within is None:
            return x0 + shift()
        return x0 + jax.lax.cond(within(t), shift, lambda: jnp.zeros_like(x, jax.eval_shape(shift).dtype))

    return lambda denoiser: lambda x, t: shifted(denoiser, x, t)


@by_value
def guide(
    process: Process, potential: Potential, scale: Scalar | float = 1.0, within: Interval | None = None
) -> Guidance:
    """Steer in the score form, x_0 + scale sigma^2 / alpha grad log r.

    By Tweedie's formula this is score + scale grad log r, the denoiser of p_t(x) r(x, t)^scale (Gen-neG, eq. 8).  A
    Bayes classifier needs scale 1.
    """
    check.number("guide: scale", scale)
    strength = score_strength(process)
    return steer(potential, lambda t: scale * strength(t), within)


@by_value
def guide_mean(
    process: Process,
    potential: Potential,
    next_time: Callable[[Time], Time],
    scale: Scalar | float = 1.0,
    variance: str = "posterior",
) -> Guidance:
    """Steer in the mean form, mu + scale Sigma grad log r (Dhariwal and Nichol 2021, Algorithm 1).

    Prefer `guide`, because the posterior variance leaves the last step (s = 0) unguided, which decides infractions.
    Censored sampling's DDPM mode has variance "beta".  Arguments: see `mean_strength`.
    """
    check.number("guide_mean: scale", scale)
    strength = mean_strength(process, next_time, variance)
    return steer(potential, lambda t: scale * strength(t))


@by_value
def universal(reward: Reward, strength: Strength) -> Guidance:
    """x_0 + strength(t) grad_x log r(x_0_hat(x)), with the gradient through the denoiser (Bansal et al. 2023)."""
    gradient = jax.grad(scalar("universal", reward))

    def guidance(denoiser: Denoiser) -> Denoiser:
        def guided(x: Sample, t: Time) -> Sample:
            x0, pull = jax.vjp(lambda x: denoise("universal", denoiser, x, t), x)
            return x0 + check.shape("universal: strength", strength(t), ()) * pull(gradient(x0))[0]

        return guided

    return guidance


@by_value
def backward(reward: Reward, steps: int, rate: float, low: float = -1.0, high: float = 1.0) -> Guidance:
    """Climb log r from x_0_hat by `steps` of Adam with fresh moments, clipped to [low, high] (2307.02770).

    Adam moves a pixel by about `rate` a step for any gradient, so by at most about steps * rate.  steps = 0 only clips.

    Raises:
      ValueError: steps < 0, rate < 0 or low > high; log r is no scalar.
    """
    check.number("backward: steps", steps, at_least=0, whole=True)
    check.number("backward: rate", rate, at_least=0)
    _range("backward", low, high)
    gradient = jax.grad(scalar("backward", reward))
    optimiser = optax.adam(rate)

    def move(state: tuple, _: None) -> tuple[tuple, None]:
        x0, moments = state
        x0 = jnp.clip(x0, low, high)
        change, moments = optimiser.update(-gradient(x0), moments)
        return (optax.apply_updates(x0, change), moments), None

    def ascend(x0: Sample) -> Sample:
        if not steps:
            return jnp.clip(x0, low, high)
        (x0, _), _ = jax.lax.scan(move, (x0, optimiser.init(x0)), length=steps)
        return jnp.clip(x0, low, high)

    return lambda denoiser: lambda x, t: ascend(denoise("backward", denoiser, x, t))


@by_value
def clip(low: float | Array, high: float | Array) -> Guidance:
    """Clip x_0 to [low, high], in data units (static thresholding); raises ValueError if low > high."""
    _range("clip", low, high)

    def clipped(denoiser: Denoiser, x: Sample, t: Time) -> Sample:
        for name, bound in (("low", low), ("high", high)):
            check.broadcasts(f"clip: {name}", bound, jnp.shape(x))
        return jnp.clip(denoise("clip", denoiser, x, t), low, high)

    return lambda denoiser: lambda x, t: clipped(denoiser, x, t)


def _range(caller: str, low: float | Array, high: float | Array) -> None:
    """Raise ValueError if low > high or NaN, because `jnp.clip` would return `high`, or NaN, everywhere."""
    if not any(isinstance(bound, jax.core.Tracer) for bound in (low, high)):
        check.number(f"{caller}: high - low", np.subtract(high, low), at_least=0, infinite=True)


@by_value
def inpaint(known: Sample, mask: Bool[Array, "*shape"]) -> Guidance:
    """Replace x_0 by `known` where `mask` is True; raises ValueError if they do not broadcast to the shape of x."""

    def guided(denoiser: Denoiser, x: Sample, t: Time) -> Sample:
        for name, value in (("mask", mask), ("known", known)):
            check.broadcasts(f"inpaint: {name}", value, jnp.shape(x))
        return jnp.where(mask, known, denoise("inpaint", denoiser, x, t))

    return lambda denoiser: lambda x, t: guided(denoiser, x, t)


@by_value
def classifier_free(other: Denoiser, scale: Scalar | float, within: Interval | None = None) -> Guidance:
    """x_0 of `other` + scale (x_0 - x_0 of `other`): away from another model (Ho and Salimans 2022).

    Args:
      other: the same network bound to no condition, or to an unwanted one (a negative prompt); or a smaller or less
        trained network with the same condition (autoguidance, Karras et al. 2406.02507).
      scale: 1 is no guidance, 0 is `other`.
      within: the times that are guided (Kynkäänniemi et al. 2404.07724); None: all.  `other` is not evaluated at the
        others by a sampler, whose samples share t.

    Raises:
      ValueError: the scale is not finite, or an x_0 does not have the shape of x.
    """
    check.number("classifier_free: scale", scale)

    def away(denoiser: Denoiser, x: Sample, t: Time) -> Sample:
        x0 = denoise("classifier_free", denoiser, x, t)

        def guided() -> Sample:
            plain = denoise("classifier_free: other", other, x, t)
            return (plain + scale * (x0 - plain)).astype(x0.dtype)

        return guided() if within is None else jax.lax.cond(within(t), guided, lambda: x0)

    return lambda denoiser: lambda x, t: away(denoiser, x, t)


class Draws(NamedTuple):
    """K points of a standard normal distribution with weights, fixed and symmetric, for `accepted`."""

    points: Float[np.ndarray, "K *shape"]
    """Their weighted mean is 0 and their weighted variance 1 in every coordinate."""
    weights: Float[np.ndarray, " K"]
    """>= 0, sum 1."""


def normal_draws(n: int, shape: tuple[int, ...], wide: float = 1.0, seed: int = 0) -> Draws:
    """Draws from a scrambled Sobol sequence, half of them the negatives of the others.

    Args:
      n: >= 4 and a multiple of 4.
      wide: >= 1; half of the draws have this standard deviation, and all get importance weights.  They reach what a
        standard normal distribution rarely does.  In many dimensions all weight falls on few draws: take 1.

    Raises:
      ValueError: an argument is out of range.
    """
    check.number("normal_draws: n", n, at_least=4, whole=True)
    check.number("normal_draws: n / 4", n / 4 if n % 4 else n // 4, whole=True)
    check.number("normal_draws: wide", wide, at_least=1)
    size = math.prod(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a balance that only powers of two have
        uniform = scipy.stats.qmc.Sobol(size, rng=np.random.default_rng(seed)).random(n // 2)
    half = scipy.stats.norm.ppf(np.clip(uniform, 1e-9, 1 - 1e-9)) * np.where(np.arange(n // 2) % 2, wide, 1.0)[:, None]
    points = np.concatenate([half, -half])
    log_normal = -0.5 * np.sum(points**2, 1)
    log_wide = -0.5 * np.sum(points**2, 1) / wide**2 - size * np.log(wide)
    weights = np.exp(log_normal - np.logaddexp(log_normal, log_wide))
    points /= np.sqrt(np.average(points**2, axis=0, weights=weights))
    return Draws(points.reshape(n, *shape).astype(np.float32), (weights / weights.sum()).astype(np.float32))


@by_value
def accepted(
    process: Process,
    oracle: Callable[[Samples], Valid],
    draws: Draws,
    within: Interval,
    otherwise: Guidance = chain(),  # noqa: B008 (immutable)
    variance: str = "diagonal",
) -> Guidance:
    """The mean of those x_0 given x_t that the oracle accepts, where x_0 given x_t is nearly normal.

    By Tweedie's formulas x_0 given x_t has the mean D(x_t) and the covariance sigma^2 / alpha dD/dx.  At low noise it
    is nearly normal, so the denoiser of the good part is the mean of those of its draws that the oracle accepts.  Where
    all are accepted, the denoiser is D itself.

    Args:
      oracle: traceable by JAX (wrap one of the host in `jax.pure_callback`); asked K draws for each sample and step.
      draws: see `normal_draws`; of the shape of a sample.
      within: the times of low noise, such as `potential.clear(process, 0.995)`.  Samples of a sampler share t, so
        the others cost nothing.
      otherwise: the guidance at other times, and where no draw is accepted: classifiers.
      variance: "diagonal", that of dD/dx by a derivative for each coordinate; or "identity", in its place.

    Raises:
      ValueError: the choice is unknown, or the draws or an x_0 do not have the shape of x.
    """
    check.choice("accepted: variance", variance, ("diagonal", "identity"))

    def diagonal(denoiser: Denoiser, x: Sample, t: Time) -> tuple[Sample, Sample]:
        """D(x) and the diagonal of dD/dx."""
        flat = lambda v: denoise("accepted", denoiser, v.reshape(x.shape), t).ravel()
        if variance == "identity":
            return denoise("accepted", denoiser, x, t), jnp.ones_like(x)
        x0, push = jax.linearize(flat, x.ravel())
        units = jnp.eye(x.size, dtype=x.dtype)
        slopes = jax.lax.map(lambda unit: jnp.vdot(unit, push(unit)), units)
        return x0.reshape(x.shape), slopes.reshape(x.shape)

    def guidance(denoiser: Denoiser) -> Denoiser:
        steered = otherwise(denoiser)

        def good_mean(x: Sample, t: Time) -> Sample:
            check.shape("accepted: a draw", draws.points[0], jnp.shape(x))
            x0, slope = diagonal(denoiser, x, t)
            std = process.sigma(t) * jnp.sqrt(jnp.maximum(slope, 0.0) / process.alpha(t))
            candidates = x0[None] + std[None] * draws.points
            weights = draws.weights * jnp.asarray(oracle(candidates), jnp.float32)
            total = jnp.sum(weights)
            mean = jnp.tensordot(weights / jnp.where(total > 0, total, 1.0), candidates, 1)
            return jnp.where(total > 0, mean, denoise("accepted: otherwise", steered, x, t)).astype(x0.dtype)

        def guided(x: Sample, t: Time) -> Sample:
            outside = lambda: denoise("accepted: otherwise", steered, x, t)
            return jax.lax.cond(within(t), lambda: good_mean(x, t), outside)

        return guided

    return guidance
