"""Likelihood of one example under a (guided) denoiser, in nats: bounds for both processes, and the exact ODE density.

The bounds hold for the reverse diffusion with a denoiser, the ODE likelihood for the deterministic sampler.  Do not mix
them in one table, because they agree only for an exact model.  To compare models, use the same keys for the same points
(common random numbers): the difference has about a tenth of the error.
"""

import jax
import jax.numpy as jnp

from gendiff import check
from gendiff.denoiser import Denoiser, denoise, to_epsilon
from gendiff.process import Process, perturb, posterior, transition
from gendiff.types import PRNGKey, Sample, Scalar


def elbo(denoiser: Denoiser, key: PRNGKey, x0: Sample, levels: int, low: float = 0.002, high: float = 80.0) -> Scalar:
    """Bound on log p(x_0) for EDM in continuous time (Kingma et al. 2021, eq. 11 onwards, in ln sigma).

    -L_prior - L_diff - L_rec with
      L_diff  = int E || x_0 - D(x_0 + sigma eps, sigma) ||^2 / sigma^2  d ln sigma  over [ln low, ln high]
      L_prior = || x_0 ||^2 / (2 high^2)
      L_rec   = d / 2 ln(2 pi e low^2)

    Args:
      x0: one example of any shape, d numbers.
      levels: number of stratified draws of ln sigma, >= 1.
      low, high: noise levels, 0 < low < high; all models that are compared need the same.

    Raises:
      ValueError: a number is out of range, or the denoiser's x_0 does not have the shape of x0.
    """
    check.number("elbo: levels", levels, at_least=1, whole=True)
    _levels("elbo", low, high)
    d = x0.size
    offset_key, noise_key = jax.random.split(key)
    # One scan over the strata.  Every point has its own offset, so that the average over points is smooth in ln sigma.
    span = jnp.log(high / low)
    offset = jax.random.uniform(offset_key)

    def error(i: jax.Array) -> Scalar:
        sigma = low * jnp.exp(span * (i + offset) / levels)
        eps = jax.random.normal(jax.random.fold_in(noise_key, i), x0.shape)
        return jnp.sum((x0 - denoise("elbo", denoiser, x0 + sigma * eps, sigma)) ** 2) / sigma**2

    diffusion = span * jnp.mean(jax.lax.map(error, jnp.arange(levels)))
    prior = jnp.sum(x0**2) / (2 * high**2)
    reconstruction = 0.5 * d * jnp.log(2 * jnp.pi * jnp.e * low**2)
    return -(diffusion + prior + reconstruction)


def _levels(caller: str, low: float, high: float) -> None:
    """Raise ValueError unless 0 < low < high."""
    check.number(f"{caller}: low", low, above=0)
    check.number(f"{caller}: high", high, above=0)
    if not any(isinstance(level, jax.core.Tracer) for level in (low, high)):
        check.number(f"{caller}: high", high, above=float(low))


def _chain(caller: str, process: Process) -> int:
    """T of a discrete chain; ValueError in continuous time."""
    if process.steps is None:
        raise ValueError(f"{caller}: process must be a discrete chain, got one in continuous time: use ddpm")
    return process.steps


def ddpm_elbo(process: Process, denoiser: Denoiser, key: PRNGKey, x0: Sample, variance: str = "beta") -> Scalar:
    """Bound on log p(x_0) for a DDPM, the sum of all T terms (Ho et al. 2020, eq. 5).

    Args:
      variance: "beta" or "posterior", the fixed variance of p(x_{t-1} | x_t); in the decoder p(x_0 | x_1) always
        beta_1.  "beta" is the tighter bound by far, also for samplers with "posterior".
    """
    steps = _chain("ddpm_elbo", process)
    check.choice("ddpm_elbo: variance", variance, ("beta", "posterior"))
    d = x0.size

    def term(t: jax.Array) -> Scalar:
        x, _ = perturb(process, jax.random.fold_in(key, t), x0, t)
        _, beta = transition(process, t, t - 1)
        mean, small = posterior(process, x, x0, t, t - 1)
        guess, _ = posterior(process, x, denoise("ddpm_elbo", denoiser, x, t), t, t - 1)
        first = t == 1
        model_variance = jnp.where(first | (variance == "beta"), beta, small)
        error = jnp.sum((mean - guess) ** 2) / (2 * model_variance)
        ratio = jnp.where(first, 1.0, small / model_variance)
        divergence = error + 0.5 * d * (ratio - 1 - jnp.log(ratio))
        # At t = 1 the posterior is x_0 itself, and the term is the decoder's log-density.
        return jnp.where(first, error + 0.5 * d * jnp.log(2 * jnp.pi * beta), divergence)

    last = jnp.array(steps)
    alpha, sigma = process.alpha(last), process.sigma(last)
    prior = 0.5 * jnp.sum((alpha * x0) ** 2) + 0.5 * d * (sigma**2 - 1 - 2 * jnp.log(sigma))
    return -(prior + jnp.sum(jax.lax.map(term, jnp.arange(1, steps + 1))))


def reweighted_elbo(process: Process, denoiser: Denoiser, key: PRNGKey, x0: Sample, levels: int) -> Scalar:
    """r-ELBO of Gen-neG, -sum_{t=1..T} E || eps - eps_hat(x_t, t) ||^2: a negative loss, not a bound.

    Args:
      levels: number of stratified draws of t, in 1..T; the sum over t is T times their mean.
    """
    steps = _chain("reweighted_elbo", process)
    check.number("reweighted_elbo: levels", levels, at_least=1, at_most=steps, whole=True)
    epsilon = to_epsilon(process, denoiser)
    time_key, noise_key = jax.random.split(key)

    def error(i: jax.Array) -> Scalar:
        u = jax.random.uniform(jax.random.fold_in(time_key, i))
        t = 1 + jnp.minimum(jnp.floor(steps * (i + u) / levels), steps - 1).astype(int)
        x, eps = perturb(process, jax.random.fold_in(noise_key, i), x0, t)
        return jnp.sum((eps - epsilon(x, t)) ** 2)

    return -steps * jnp.mean(jax.lax.map(error, jnp.arange(levels)))


def ode_log_density(
    denoiser: Denoiser, x0: Sample, steps: int, low: float = 0.002, high: float = 80.0, data_std: float = 0.5
) -> Scalar:
    """Exact log-density of the EDM probability-flow ODE at x_0 (Song et al. 2021, eq. 39), a check on `elbo`.

    log p(x_0) = log N(x_high; 0, high^2 + data_std^2) + int div[(x - D) / sigma] d sigma, by Heun steps up in ln sigma.
    For few dimensions only, because the divergence takes a derivative for every dimension.

    Raises:
      ValueError: steps >= 1, 0 < low < high or data_std >= 0 does not hold, or the denoiser's x_0 has another shape.
    """
    check.number("ode_log_density: steps", steps, at_least=1, whole=True)
    _levels("ode_log_density", low, high)
    check.number("ode_log_density: data_std", data_std, at_least=0)
    flat, shape = x0.ravel(), x0.shape

    def drift(x: Sample, log_sigma: Scalar) -> tuple[Sample, Scalar]:
        sigma = jnp.exp(log_sigma)
        f = lambda v: v - denoise("ode_log_density", denoiser, v.reshape(shape), sigma).ravel()
        return f(x), jnp.trace(jax.jacfwd(f)(x))

    def step(state: tuple, log_sigma: Scalar) -> tuple[tuple, None]:
        x, integral = state
        dx, div = drift(x, log_sigma)
        dx_next, div_next = drift(x + width * dx, log_sigma + width)
        return (x + 0.5 * width * (dx + dx_next), integral + 0.5 * width * (div + div_next)), None

    width = jnp.log(high / low) / steps
    (x, integral), _ = jax.lax.scan(step, (flat, jnp.zeros(())), jnp.log(low) + width * jnp.arange(steps))
    variance = high**2 + data_std**2
    return integral - 0.5 * jnp.sum(x**2) / variance - 0.5 * x.size * jnp.log(2 * jnp.pi * variance)
