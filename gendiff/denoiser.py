"""Denoiser: (x, t) -> E[x_0 | x_t = x], the currency of the library.

Networks predict eps, v, the score or EDM's F.  Each is turned into a denoiser once, at the edge, and everything else
speaks of denoisers: they stay bounded where scores diverge, and guidance needs no division by sigma.

The converters below pass any leading arguments through, so that they serve a closed function `(x, t)` and a network
with its parameters `(params, x, t)` alike.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from gendiff.process import Process
from gendiff.types import Params, Sample, Time

Denoiser: TypeAlias = Callable[[Sample, Time], Sample]
Model: TypeAlias = Callable[[Params, Sample, Time], Sample]
"""A denoiser with its parameters first."""
Predictor: TypeAlias = Callable[..., Any]
"""`(..., x, t) -> prediction`, of the shape of x."""


def from_epsilon(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts the noise: x_0 = (x - sigma eps) / alpha."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        return (x - process.sigma(t) * predict(*args)) / process.alpha(t)

    return denoiser


def from_v(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D)."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha * x - sigma * predict(*args)) / (alpha**2 + sigma**2)

    return denoiser


def from_score(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a score, by Tweedie's formula: x_0 = (x + sigma^2 score) / alpha."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        return (x + process.sigma(t) ** 2 * predict(*args)) / process.alpha(t)

    return denoiser


def from_edm(network: Predictor, data_std: float = 0.5) -> Predictor:
    """Denoiser of a network F with EDM's preconditioning (Karras et al. 2022, eq. 7 and Table 1); alpha = 1, t = sigma.

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    Args:
      network: F, `(..., x, c_noise) -> array` of the shape of x.
      data_std: standard deviation of the data, in the units of x.
    """

    def denoiser(*args: Any) -> Sample:
        *leading, x, t = args
        variance = t**2 + data_std**2
        prediction = network(*leading, x / jnp.sqrt(variance), 0.25 * jnp.log(t))
        return data_std**2 / variance * x + t * data_std / jnp.sqrt(variance) * prediction

    return denoiser


def to_epsilon(process: Process, denoiser: Denoiser) -> Denoiser:
    """The noise that a denoiser implies: eps = (x - alpha x_0) / sigma."""
    return lambda x, t: (x - process.alpha(t) * denoiser(x, t)) / process.sigma(t)


def to_v(process: Process, denoiser: Denoiser) -> Denoiser:
    """The velocity that a denoiser implies: v = alpha eps - sigma x_0."""
    epsilon = to_epsilon(process, denoiser)
    return lambda x, t: process.alpha(t) * epsilon(x, t) - process.sigma(t) * denoiser(x, t)


def to_score(process: Process, denoiser: Denoiser) -> Denoiser:
    """Tweedie: grad log p_t(x) = (alpha x_0 - x) / sigma^2."""
    return lambda x, t: (process.alpha(t) * denoiser(x, t) - x) / process.sigma(t) ** 2
