"""Process: the forward noising x_t = alpha(t) x_0 + sigma(t) eps; t = 0 is data.

All code reads a process through `alpha` and `sigma`, so one formula serves EDM (t is the noise level, alpha = 1), DDPM
(t = 0, 1 .. T) and flows (t in [0, 1]), on any grid of times.  At alpha = 0 a sample says nothing about its x_0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from gendiff import check
from gendiff.static import by_value
from gendiff.types import PRNGKey, Sample, Scalar, Time

ROUNDING = 1e-6
"""A level that a formula gives at its end may miss 0 by so much, such as cos(pi / 2)."""


class Process(NamedTuple):
    """The functions that define a forward noising process; equal if they are equal (`gendiff.static`)."""

    alpha: Callable[[Time], Scalar]
    """t -> signal level."""
    sigma: Callable[[Time], Scalar]
    """t -> noise level (standard deviation)."""
    sample_time: Callable[[PRNGKey], Time]
    """Draws a training time.  Swap it with `process._replace(sample_time=...)`."""
    grid: Callable[[int], Array]
    """n -> the n + 1 times of an n-step sampler, from noise down to data."""
    steps: int | None = None
    """T of a discrete chain; None for a process in continuous time."""


def edm(
    sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, mean: float = -1.2, std: float = 1.2
) -> Process:
    """Variance-exploding process; t is the noise level (Karras et al. 2022, Table 1 and eq. 5).

    Args:
      sigma_min, sigma_max: the grid falls from sigma_max to sigma_min, then to 0; 0 < sigma_min < sigma_max.
      rho: curvature of the grid, > 0; a larger one puts more steps near the data.
      mean, std: training draws ln sigma ~ N(mean, std^2); std >= 0.

    Raises:
      ValueError: an argument is out of range; from `grid`, n < 1.
    """
    check.number("edm: sigma_min", sigma_min, above=0)
    check.number("edm: sigma_max", sigma_max, above=sigma_min)
    check.number("edm: rho", rho, above=0)
    check.number("edm: mean", mean)
    check.number("edm: std", std, at_least=0)
    return Process(_unit, _identity, _lognormal(mean, std), _falling_powers(sigma_min, sigma_max, rho))


def _unit(t: Time) -> Scalar:
    return jnp.ones_like(t, dtype=jnp.float32)


def _identity(t: Time) -> Scalar:
    return t


@by_value
def _lognormal(mean: float, std: float) -> Callable[[PRNGKey], Time]:
    return lambda key: jnp.exp(mean + std * jax.random.normal(key))


@by_value
def _falling_powers(low: float, high: float, rho: float) -> Callable[[int], Array]:
    def grid(n: int) -> Array:  # Karras et al. (2022), eq. 5
        check.number("edm: grid: n", n, at_least=1, whole=True)
        return jnp.append(jnp.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho, 0.0)

    return grid


@by_value
def classifier_time(
    mean: float = -3.0, std: float = 1.5, share: float = 0.8, low: float = 0.002, high: float = 80.0
) -> Callable[[PRNGKey], Time]:
    """Training times for classifiers under EDM: ln sigma ~ N(mean, std^2) for a `share`, else uniform.

    A classifier decides at low noise, where a denoiser has little left to learn.  On the checkerboard (one seed) this
    mean left 0.72 % infractions after one round; a mean of -1.2 with std 1.6 left 1.20 %.

    Args:
      std: > 0.
      share: in (0, 1).
      low, high: range of sigma in the uniform part, 0 < low < high.
    """
    check.number("classifier_time: mean", mean)
    check.number("classifier_time: std", std, above=0)
    check.number("classifier_time: share", share, above=0, below=1)
    check.number("classifier_time: low", low, above=0)
    check.number("classifier_time: high", high, above=low)

    def sample(key: PRNGKey) -> Time:
        u = jax.random.uniform(key)  # chooses the part and, by its inverse distribution function, the time
        normal = mean + std * jax.scipy.special.ndtri(jnp.clip(u / share, 1e-6, 1 - 1e-6))
        wide = jnp.log(low) + jnp.log(high / low) * (u - share) / (1 - share)
        return jnp.exp(jnp.where(u < share, normal, wide))

    return sample


def ddpm(betas: ArrayLike, power: float = 1.0) -> Process:
    """Discrete variance-preserving chain, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) (Ho et al. 2020).

    t = T is noise.  The levels at a time outside 0..T are NaN.

    Args:
      betas: (T,) in (0, 1), T >= 1; `betas[t - 1]` is beta_t.  The last one may be 1: alpha_T = 0 (`zero_terminal`).
      power: a grid of n steps has the times T (i / n)^power, power > 0.  1 is even; 2 (Song et al. 2021, appendix D.2)
        puts more steps near the data.

    Raises:
      ValueError: an argument is out of range; from `grid`, n is not in 1..T.
    """
    betas = check.shape("ddpm: betas", np.asarray(betas, np.float64), (None,))
    check.number("ddpm: betas", betas[:-1], above=0, below=1)
    check.number("ddpm: betas", betas[-1:], above=0, at_most=1)
    check.number("ddpm: power", power, above=0)
    steps = check.number("ddpm: number of betas", len(betas), at_least=1, whole=True)
    # In float64 on the host, because a product of 1,000 factors near 1 loses digits in float32.
    with np.errstate(divide="ignore"):  # log 0 of a last beta of 1
        log_alpha_bar = np.concatenate([np.zeros(1), np.cumsum(np.log1p(-betas))])
    alpha = np.exp(0.5 * log_alpha_bar).astype(np.float32)
    sigma = np.sqrt(-np.expm1(log_alpha_bar)).astype(np.float32)
    return Process(_looked_up(alpha), _looked_up(sigma), _any_step(steps), _respaced(steps, power), steps)


@by_value
def _looked_up(levels: Float[np.ndarray, " T+1"]) -> Callable[[Time], Scalar]:
    # `take` gives NaN beyond the end, but counts a negative time from the end.
    return lambda t: jnp.take(jnp.asarray(levels), jnp.where(jnp.asarray(t) < 0, len(levels), t))


@by_value
def _any_step(steps: int) -> Callable[[PRNGKey], Time]:
    return lambda key: jax.random.randint(key, (), 1, steps + 1)


@by_value
def _respaced(steps: int, power: float) -> Callable[[int], Array]:
    def grid(n: int) -> Array:
        check.number("ddpm: grid: n", n, at_least=1, at_most=steps, whole=True)
        times = np.round(steps * np.linspace(0, 1, n + 1) ** power)
        # No time comes twice: the first line raises times that round to their lower neighbour, the second leaves
        # a step for every time above.
        times = np.maximum.accumulate(times - np.arange(n + 1)) + np.arange(n + 1)
        return jnp.asarray(np.minimum(times, steps - n + np.arange(n + 1))[::-1].astype(int))

    return grid


@by_value
def power_times(last: int, power: float = 2.0) -> Callable[[PRNGKey], Time]:
    """Training times of a chain that are dense near the data: t = ceil(last u^power) with u uniform, 1 .. last.

    Power 2 spends half of the draws below last / 4; `ddpm(.., power)` has grids to match.
    """
    check.number("power_times: last", last, at_least=1, whole=True)
    check.number("power_times: power", power, above=0)
    return lambda key: jnp.ceil(last * jax.random.uniform(key, minval=1e-6) ** power).astype(int)


@by_value
def mixed_times(
    first: Callable[[PRNGKey], Time], second: Callable[[PRNGKey], Time], share: float
) -> Callable[[PRNGKey], Time]:
    """Training times of two distributions, a `share` in [0, 1] of the first."""
    check.number("mixed_times: share", share, at_least=0, at_most=1)

    def sample(key: PRNGKey) -> Time:
        which_key, key = jax.random.split(key)
        which = jax.random.bernoulli(which_key, share)
        return jnp.where(which, first(key), second(jax.random.clone(key)))

    return sample


@by_value
def one_time(time: np.generic) -> Callable[[PRNGKey], Time]:
    """The same training time for all keys."""
    return lambda key: jnp.asarray(time)


def flow(shift: float = 1.0, mean: float = 0.0, std: float = 1.0) -> Process:
    """Rectified flow, x_t = (1 - t) x_0 + t eps with t in [0, 1] (Liu et al. 2023; Esser et al. 2024).

    Args:
      shift: a grid of n steps has the times s u / (1 + (s - 1) u) with u = i / n (Esser et al. 2024, eq. 23), > 0; SD3
        has shift 3.  FLUX has exp(mu), where mu rises with the number of tokens.
      mean, std: training draws logit t ~ N(mean, std^2) (their section 3.1), std > 0, then shifted.

    Raises:
      ValueError: an argument is out of range; from `grid`, n < 1.
    """
    check.number("flow: shift", shift, above=0)
    check.number("flow: mean", mean)
    check.number("flow: std", std, above=0)
    return Process(_complement, _identity, _logit_normal(mean, std, shift), _shifted(shift))


def _complement(t: Time) -> Scalar:
    return 1.0 - t


@by_value
def _logit_normal(mean: float, std: float, shift: float) -> Callable[[PRNGKey], Time]:
    return lambda key: _shift(jax.nn.sigmoid(mean + std * jax.random.normal(key)), shift)


def _shift(t: Time, shift: float) -> Time:
    return shift * t / (1 + (shift - 1) * t)


@by_value
def _shifted(shift: float) -> Callable[[int], Array]:
    def grid(n: int) -> Array:
        check.number("flow: grid: n", n, at_least=1, whole=True)
        return _shift(jnp.linspace(1.0, 0.0, n + 1), shift)

    return grid


def continuous(
    alpha: Callable[[Time], Scalar], sigma: Callable[[Time], Scalar], low: float = 0.0, high: float = 1.0
) -> Process:
    """Process of any signal and noise level, with even grids from `high`, noise, to `low`, data, and uniform times.

    Args:
      alpha, sigma: functions of a scalar t.  sigma is 0 at `low` or very small; alpha may be 0 at `high`.
      low, high: 0 <= low < high.

    Raises:
      ValueError: the times are out of range, a level is not finite or negative at an end, or sigma is 0 at `high`.
    """
    check.number("continuous: low", low, at_least=0)
    check.number("continuous: high", high, above=low)
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        for end in (low, high):
            check.number(f"continuous: {name}({end:g})", np.asarray(level(jnp.asarray(end))), at_least=-ROUNDING)
    check.number(f"continuous: sigma({high:g})", np.asarray(sigma(jnp.asarray(high))), above=0)
    return Process(alpha, sigma, _uniform_time(low, high), _even(low, high))


@by_value
def _uniform_time(low: float, high: float) -> Callable[[PRNGKey], Time]:
    return lambda key: jax.random.uniform(key, minval=low, maxval=high)


@by_value
def _even(low: float, high: float) -> Callable[[int], Array]:
    def grid(n: int) -> Array:
        check.number("continuous: grid: n", n, at_least=1, whole=True)
        return jnp.linspace(high, low, n + 1)

    return grid


def c_noise(process: Process, t: Time) -> Scalar:
    """ln(sigma / alpha) / 4, how networks with EDM's inputs are told the noise."""
    return 0.25 * jnp.log(process.sigma(t) / process.alpha(t))


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Float[np.ndarray, " T"]:
    """Ho et al. (2020): beta_t linear in t.  The ends are those of 1,000 steps, rescaled to `steps`."""
    check.number("linear_betas: steps", steps, at_least=1, whole=True)
    check.number("linear_betas: first", first, above=0)
    check.number("linear_betas: last", last, above=0)
    scale = 1000 / steps
    return np.linspace(scale * first, scale * last, steps)


def sqrt_linear_betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Float[np.ndarray, " T"]:
    """Rombach et al. (2022), Stable Diffusion: sqrt(beta_t) linear in t; ends as in `linear_betas`."""
    check.number("sqrt_linear_betas: steps", steps, at_least=1, whole=True)
    check.number("sqrt_linear_betas: first", first, above=0)
    check.number("sqrt_linear_betas: last", last, above=0)
    return 1000 / steps * np.linspace(first**0.5, last**0.5, steps) ** 2


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Float[np.ndarray, " T"]:
    """Nichol and Dhariwal (2021), eq. 17: alpha_bar(t) = cos^2((t/T + s) / (1 + s) pi / 2)."""
    check.number("cosine_betas: steps", steps, at_least=1, whole=True)
    check.number("cosine_betas: offset", offset, at_least=0)
    check.number("cosine_betas: largest", largest, above=0, below=1)
    angle = (np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2
    alpha_bar = np.cos(angle) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], largest)


def zero_terminal(betas: ArrayLike) -> Float[np.ndarray, " T"]:
    """Betas of the chain whose last step has no signal, alpha_T = 0 (Lin et al. 2305.08891, Algorithm 1).

    sqrt(alpha_bar) is shifted and scaled, so that its first value stays and its last one is 0.  The network must
    predict v or x_0, because eps says nothing about x_0 at alpha = 0.
    """
    betas = check.shape("zero_terminal: betas", np.asarray(betas, np.float64), (None,))
    check.number("zero_terminal: betas", betas, above=0, below=1)
    check.number("zero_terminal: number of betas", len(betas), at_least=2, whole=True)
    root = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / np.concatenate([np.ones(1), alpha_bar[:-1]])


def falling(name: str, grid: Float[Array, " steps+1"]) -> None:
    """Check a grid of two times or more, all >= 0, that falls; of a traced grid, only the shape.

    Raises:
      ValueError: the grid is another.
    """
    check.shape(name, grid, (None,))
    check.number(f"{name}: number of times", len(grid), at_least=2, whole=True)
    if not isinstance(grid, jax.core.Tracer):
        times = np.asarray(grid, np.float64)
        check.number(name, times, at_least=0)
        check.number(f"{name}: change from a time to the next", np.diff(times), below=0)


def perturb(process: Process, key: PRNGKey, x0: Sample, t: Time) -> tuple[Sample, Sample]:
    """Draw x_t from x_0; returns (x_t, eps)."""
    eps = jax.random.normal(key, x0.shape)
    return process.alpha(t) * x0 + process.sigma(t) * eps, eps


def transition(process: Process, t: Time, s: Time) -> tuple[Scalar, Scalar]:
    """(a, v) of q(x_t | x_s) = N(a x_s, v) for s < t; for s = t - 1 of a chain, v = beta_t."""
    ratio = process.alpha(t) / process.alpha(s)
    return ratio, process.sigma(t) ** 2 - ratio**2 * process.sigma(s) ** 2


def posterior(process: Process, x: Sample, x0: Sample, t: Time, s: Time) -> tuple[Sample, Scalar]:
    """Mean and variance of q(x_s | x_t = x, x_0) for any s < t (Ho et al. 2020, eq. 7).

    Raises:
      ValueError: x and x0 have different shapes.
    """
    check.shape("posterior: x0", x0, jnp.shape(x))
    ratio, variance = transition(process, t, s)
    var_t, var_s = process.sigma(t) ** 2, process.sigma(s) ** 2
    mean = ratio * var_s / var_t * x + process.alpha(s) * variance / var_t * x0
    return mean, variance * var_s / var_t
