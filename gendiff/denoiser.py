"""Denoiser: (x, t) -> E[x_0 | x_t = x], the currency of the library.

Networks predict eps, v, the score or EDM's F.  Each is turned into a denoiser once, at the edge, and everything else
speaks of denoisers: they stay bounded where scores diverge, and guidance needs no division by sigma.

The converters below pass any leading arguments through, so that they serve a closed function `(x, t)` and a network
with its parameters `(params, x, t)` alike.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

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
    """x_0 of a denoiser, in the type of x: everything that uses a denoiser asks it by this function.

    An x_0 of another shape would broadcast to a plausible sample.  A network may compute in a narrower or wider type.

    Args:
      caller: begins the message of an error.

    Raises:
      ValueError: x_0 does not have the shape of x.
    """
    x0 = check.shape(f"{caller}: x_0 of the denoiser", denoiser(x, t), jnp.shape(x))
    return jnp.asarray(x0, jnp.result_type(x, 0.0))


def _prediction(caller: str, predict: Predictor, args: tuple) -> Sample:
    """The same for a network in another parameterisation, whose type the conversion widens."""
    return check.shape(f"{caller}: prediction of the network", predict(*args), jnp.shape(args[-2]))


@by_value
def from_epsilon(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts the noise: x_0 = (x - sigma eps) / alpha."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        return (x - process.sigma(t) * _prediction("from_epsilon", predict, args)) / process.alpha(t)

    return denoiser


@by_value
def from_v(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a network that predicts v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D)."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha * x - sigma * _prediction("from_v", predict, args)) / (alpha**2 + sigma**2)

    return denoiser


@by_value
def from_score(process: Process, predict: Predictor) -> Predictor:
    """Denoiser of a score, by Tweedie's formula: x_0 = (x + sigma^2 score) / alpha."""

    def denoiser(*args: Any) -> Sample:
        x, t = args[-2:]
        return (x + process.sigma(t) ** 2 * _prediction("from_score", predict, args)) / process.alpha(t)

    return denoiser


@by_value
def from_edm(network: Predictor, data_std: float = 0.5) -> Predictor:
    """Denoiser of a network F with EDM's preconditioning (Karras et al. 2022, eq. 7 and Table 1); alpha = 1, t = sigma.

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    Args:
      network: F, `(..., x, c_noise) -> array` of the shape of x.
      data_std: standard deviation of the data, in the units of x; > 0.
    """
    check.number("from_edm: data_std", data_std, above=0)

    def denoiser(*args: Any) -> Sample:
        *leading, x, t = args
        variance = t**2 + data_std**2
        prediction = _prediction("from_edm", network, (*leading, x / jnp.sqrt(variance), 0.25 * jnp.log(t)))
        return data_std**2 / variance * x + t * data_std / jnp.sqrt(variance) * prediction

    return denoiser


@by_value
def told_noise(process: Process, network: Predictor) -> Predictor:
    """A network that is told ln(sigma / alpha) / 4, as EDM's F is, as a function of t."""
    return lambda *args: network(*args[:-1], c_noise(process, args[-1]))


@by_value
def zero_based(network: Predictor) -> Predictor:
    """A network that counts the steps of a chain from 0, as public checkpoints do, as a function of t = 1 .. T."""
    return lambda *args: jnp.asarray(network(*args[:-1], args[-1] - 1))


@by_value
def to_epsilon(process: Process, denoiser: Denoiser) -> Denoiser:
    """The noise that a denoiser implies: eps = (x - alpha x_0) / sigma."""
    return lambda x, t: (x - process.alpha(t) * denoise("to_epsilon", denoiser, x, t)) / process.sigma(t)


@by_value
def to_v(process: Process, denoiser: Denoiser) -> Denoiser:
    """The velocity that a denoiser implies: v = alpha eps - sigma x_0."""
    epsilon = to_epsilon(process, denoiser)
    return lambda x, t: process.alpha(t) * epsilon(x, t) - process.sigma(t) * denoise("to_v", denoiser, x, t)


@by_value
def to_score(process: Process, denoiser: Denoiser) -> Denoiser:
    """Tweedie: grad log p_t(x) = (alpha x_0 - x) / sigma^2."""
    return lambda x, t: (process.alpha(t) * denoise("to_score", denoiser, x, t) - x) / process.sigma(t) ** 2
