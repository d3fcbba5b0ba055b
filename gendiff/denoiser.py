"""Denoiser: (x, t) -> E[x_0 | x_t = x], the currency of the library.

A network that predicts eps, v, a velocity, the score or EDM's F becomes a denoiser once, at the edge.  All other code
uses denoisers, because they stay bounded where scores diverge and guidance needs no division by sigma.

The converters pass leading arguments through: they serve functions `(x, t)` and networks `(params, x, t)`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gendiff import check
from gendiff.process import Process, c_noise
from gendiff.static import by_value
from gendiff.types import Params, Sample, Time

Denoiser: TypeAlias = Callable[[Sample, Time], Sample]
"""`(x, t) -> E[x_0 | x_t = x]`."""
Model: TypeAlias = Callable[[Params, Sample, Time], Sample]
"""A denoiser with its parameters first."""
Predictor: TypeAlias = Callable[..., Any]
"""`(..., x, t) -> prediction`, of the shape of x."""


def denoise(caller: str, denoiser: Denoiser, x: Sample, t: Time) -> Sample:
    """x_0 of a denoiser, cast to the type of x, because a network may compute in another one.

    All code calls denoisers through this function, because a wrong shape would broadcast to a plausible sample.

    Args:
      caller: begins the message of an error.

    Raises:
      ValueError: x_0 does not have the shape of x.
    """
    x0 = check.shape(f"{caller}: x_0 of the denoiser", denoiser(x, t), jnp.shape(x))
    return jnp.asarray(x0, jnp.result_type(x, 0.0))


def _denoiser(caller: str, predict: Predictor, formula: Callable[[Sample, Time, Sample], Sample]) -> Predictor:
    """Denoiser whose x_0 is `formula(x, t, prediction)`."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        return formula(x, t, check.shape(f"{caller}: prediction of the network", predict(*args), jnp.shape(x)))

    return denoiser


@by_value
def from_epsilon(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts the noise: x_0 = (x - sigma eps) / alpha."""
    formula = lambda x, t, eps: (x - process.sigma(t) * eps) / process.alpha(t)
    return _denoiser("from_epsilon", predict, formula)


@by_value
def from_v(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D)."""

    def formula(x: Sample, t: Time, v: Sample) -> Sample:
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha * x - sigma * v) / (alpha**2 + sigma**2)

    return _denoiser("from_v", predict, formula)


@by_value
def from_score(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a score, by Tweedie's formula: x_0 = (x + sigma^2 score) / alpha."""
    formula = lambda x, t, score: (x + process.sigma(t) ** 2 * score) / process.alpha(t)
    return _denoiser("from_score", predict, formula)


@by_value
def from_velocity(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts the velocity dx_t / dt = alpha' x_0 + sigma' eps (Lipman et al. 2023).

    For `flow` that is eps - x_0, and x_0 = x - t velocity, finite at t = 1 (SD3, FLUX).  For a network whose time runs
    from noise to data, whose velocity is x_0 - eps, give `from_data_time(predict)` (SiT).
    """

    def formula(x: Sample, t: Time, velocity: Sample) -> Sample:
        t = jnp.asarray(t, jnp.result_type(t, 0.0))
        (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(
            lambda t: (process.alpha(t), process.sigma(t)), (t,), (jnp.ones_like(t),)
        )
        return (d_sigma * x - sigma * velocity) / (alpha * d_sigma - sigma * d_alpha)

    return _denoiser("from_velocity", predict, formula)


@by_value
def from_data_time(predict: Predictor) -> Predictor:
    """The velocity of a network whose time is 1 - t, so that 1 is data (SiT, Ma et al. 2024); time and sign turn."""
    return lambda *args: -jnp.asarray(predict(*args[:-1], 1.0 - args[-1]))


@by_value
def from_edm(network: Predictor, data_std: float = 0.5) -> Predictor:
    """Denoiser of a network F with EDM's preconditioning (Karras et al. 2022, eq. 7 and Table 1); alpha = 1, t = sigma.

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    Args:
      network: F, `(..., x, c_noise) -> array` of the shape of x.
      data_std: standard deviation of the data, > 0.
    """
    check.number("from_edm: data_std", data_std, above=0)

    def denoiser(*args: Any) -> Sample:
        *leading, x, t = args
        variance = t**2 + data_std**2
        prediction = network(*leading, x / jnp.sqrt(variance), 0.25 * jnp.log(t))
        check.shape("from_edm: prediction of the network", prediction, jnp.shape(x))
        return data_std**2 / variance * x + t * data_std / jnp.sqrt(variance) * prediction

    return denoiser


@by_value
def told_noise(process: Process, network: Predictor) -> Predictor:
    """A network that is told ln(sigma / alpha) / 4, as EDM's F is, as a function of t."""
    return lambda *args: network(*args[:-1], c_noise(process, args[-1]))


@by_value
def zero_based(network: Predictor) -> Predictor:
    """Shift a network that counts steps from 0, as public checkpoints do, to t = 1 .. T."""
    return lambda *args: jnp.asarray(network(*args[:-1], args[-1] - 1))


@by_value
def to_epsilon(process: Process, denoiser: Denoiser) -> Denoiser:
    """Noise implied by a denoiser: eps = (x - alpha x_0) / sigma."""
    return lambda x, t: (x - process.alpha(t) * denoise("to_epsilon", denoiser, x, t)) / process.sigma(t)


@by_value
def to_v(process: Process, denoiser: Denoiser) -> Denoiser:
    """Velocity implied by a denoiser: v = alpha eps - sigma x_0."""
    epsilon = to_epsilon(process, denoiser)
    return lambda x, t: process.alpha(t) * epsilon(x, t) - process.sigma(t) * denoise("to_v", denoiser, x, t)


@by_value
def to_score(process: Process, denoiser: Denoiser) -> Denoiser:
    """Score implied by a denoiser (Tweedie): grad log p_t(x) = (alpha x_0 - x) / sigma^2."""
    return lambda x, t: (process.alpha(t) * denoise("to_score", denoiser, x, t) - x) / process.sigma(t) ** 2
