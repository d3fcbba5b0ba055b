"""Guidance: Denoiser -> Denoiser.  Steering, inpainting and clipping are all of this one type and compose with
`chain`."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from gendiff.denoiser import Denoiser
from gendiff.potential import Potential
from gendiff.process import Process
from gendiff.types import Sample, Scalar, Time

Guidance: TypeAlias = Callable[[Denoiser], Denoiser]


def chain(*guidances: Guidance) -> Guidance:
    """Applies guidances from first to last: `chain(a, b)(denoiser)` is `b(a(denoiser))`; `chain()` changes nothing."""

    def guidance(denoiser: Denoiser) -> Denoiser:
        for each in guidances:
            denoiser = each(denoiser)
        return denoiser

    return guidance


def guide(process: Process, potential: Potential, scale: Scalar | float = 1.0) -> Guidance:
    """Steers with the score form, x_0 + scale sigma^2 / alpha grad log r.

    By Tweedie's formula this is score + scale grad log r: the denoiser of p_t(x) r(x, t)^scale (Gen-neG, eq. 8).  The
    gradient is taken at the noisy x, not through the denoiser.  A Bayes classifier needs scale 1.
    """
    gradient = jax.grad(potential)

    def guidance(denoiser: Denoiser) -> Denoiser:
        def guided(x: Sample, t: Time) -> Sample:
            strength = scale * process.sigma(t) ** 2 / process.alpha(t)
            return denoiser(x, t) + strength * gradient(x, t)

        return guided

    return guidance


def guide_mean(
    process: Process,
    potential: Potential,
    next_time: Callable[[Time], Time],
    scale: Scalar | float = 1.0,
    variance: str = "posterior",
) -> Guidance:
    """Steers with the mean form, mu + scale Sigma grad log r, of Dhariwal and Nichol (2021), Algorithm 1.

    Stated as a denoiser: with mu = c_x x + c_0 x_0 the shift is x_0 + scale Sigma / c_0 grad log r, which is
    sigma_s^2 / alpha_s for the posterior variance and sigma_t^2 / alpha_s for beta_t.  With the posterior variance the
    last step (s = 0) is not guided at all, where infractions are decided: prefer `guide`.

    Args:
      next_time: t -> s, the sampler's next time (`lambda t: t - 1` on the full chain of a DDPM).
      variance: "posterior" or "beta", the Sigma of the sampler.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"guide_mean: variance: expected 'posterior' or 'beta', given {variance!r}")
    gradient = jax.grad(potential)

    def guidance(denoiser: Denoiser) -> Denoiser:
        def guided(x: Sample, t: Time) -> Sample:
            s = next_time(t)
            noise = process.sigma(s if variance == "posterior" else t)
            return denoiser(x, t) + scale * noise**2 / process.alpha(s) * gradient(x, t)

        return guided

    return guidance


def clip(low: float | Array, high: float | Array) -> Guidance:
    """Clips x_0 to [low, high], in data units (static thresholding)."""
    return lambda denoiser: lambda x, t: jnp.clip(denoiser(x, t), low, high)


def inpaint(known: Sample, mask: Bool[Array, "*shape"]) -> Guidance:
    """Replaces x_0 by `known` where `mask` is true."""
    return lambda denoiser: lambda x, t: jnp.where(mask, known, denoiser(x, t))
