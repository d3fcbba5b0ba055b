"""Twisted sequential Monte Carlo: a population of particles that is exact where guidance is approximate.

The twisted diffusion sampler of Wu et al. (2306.17775): the guided kernel proposes, importance weights correct it,
and the oracle has the last word, so that no sample that it rejects is ever returned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gendiff.denoiser import Denoiser
from gendiff.potential import Potential
from gendiff.process import Process
from gendiff.sampling import ancestral_moments
from gendiff.types import PRNGKey, Sample, Samples, Scalar


class Population(NamedTuple):
    """Particles at t = 0, not yet judged."""

    particles: Samples
    log_weights: Float[Array, " n"]
    """As samples of the model p(x_0), before any condition; not normalised, their mean has expectation 1."""
    resampled: Scalar
    """How many of the steps resampled."""


class Judged(NamedTuple):
    """Samples of p(x_0 | O(x_0) = 1)."""

    samples: Samples
    effective: Scalar
    """Effective number of samples by their weights: at most so many are independent, for what has one ancestor counts
    apart."""
    log_alpha: Scalar
    """Estimate of log P_p[O = 1]; its exponential is unbiased."""


def log_normal(x: Sample, mean: Sample, std: Scalar) -> Scalar:
    """log N(x; mean, std^2 I)."""
    return -0.5 * jnp.sum(((x - mean) / std) ** 2) - x.size * (jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi))


@jax.jit
def systematic(key: PRNGKey, log_weights: Float[Array, " n"]) -> Array:
    """Indices (n,) of a systematic resampling: one uniform offset, each particle about n w_i times."""
    n = len(log_weights)
    weights = jax.nn.softmax(log_weights)
    edges = jnp.cumsum(weights)
    places = (jnp.arange(n) + jax.random.uniform(key)) / n
    index = jnp.minimum(jnp.searchsorted(edges, places * edges[-1], side="right"), n - 1)
    # Sums in float32 may step at a particle without weight: take the last one before it that has some, or the first.
    there = weights > 0
    before = jax.lax.cummax(jnp.where(there, jnp.arange(n), -1))
    return jnp.where(before[index] < 0, jnp.argmax(there), before[index])


@jax.jit
def effective_size(log_weights: Float[Array, " n"]) -> Scalar:
    """1 / sum w_i^2 of the normalised weights, between 1 and n."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))


def twisted(
    process: Process,
    denoiser: Denoiser,
    guided: Denoiser,
    twist: Potential,
    grid: Float[Array, " steps+1"],
    key: PRNGKey,
    shape: tuple[int, ...],
    particles: int,
    threshold: float = 0.5,
) -> Population:
    """Runs ancestral steps of the guided model and weights them to p(x_{t-1} | x_t) psi(x_{t-1}) / psi(x_t).

    Args:
      denoiser, guided: the model p and the proposal r; they share the variance of the ancestral step.
      twist: log psi(x, t), an approximation of log p(y = 1 | x_t).
      grid: ends at 0.  The last step has no noise, so it is the model's own mean, not guided, and its weight is 1 /
      psi. threshold: resample where the effective size falls below this share of the particles.
    """
    steps = len(grid) - 1
    start_key, run_key = jax.random.split(key)
    x = process.sigma(grid[0]) * jax.random.normal(start_key, (particles, *shape))
    log_psi = jax.vmap(twist, (0, None))(x, grid[0])

    def resample(key: PRNGKey, x: Samples, log_psi: Array, log_w: Array) -> tuple:
        index = systematic(key, log_w)
        level = jax.nn.logsumexp(log_w) - jnp.log(particles)
        return x[index], log_psi[index], jnp.full(particles, level), jnp.ones(())

    def step(state: tuple, move: tuple) -> tuple[tuple, None]:
        x, log_psi, log_w, resampled = state
        i, t, s = move
        noise_key, index_key = jax.random.split(jax.random.fold_in(run_key, i))

        def propose(x: Sample, key: PRNGKey) -> tuple[Sample, Scalar]:
            mean, std = ancestral_moments(process, denoiser, x, t, s)
            shifted, _ = ancestral_moments(process, guided, x, t, s)
            new = shifted + std * jax.random.normal(key, x.shape)
            return new, log_normal(new, mean, std) - log_normal(new, shifted, std)

        x, ratio = jax.vmap(propose)(x, jax.random.split(noise_key, particles))
        new_psi = jax.vmap(twist, (0, None))(x, s)
        log_w = log_w + ratio + new_psi - log_psi
        short = effective_size(log_w) < threshold * particles
        x, new_psi, log_w, hit = jax.lax.cond(
            short, resample, lambda key, x, p, w: (x, p, w, jnp.zeros(())), index_key, x, new_psi, log_w
        )
        return (x, new_psi, log_w, resampled + hit), None

    moves = (jnp.arange(steps - 1), grid[:-2], grid[1:-1])
    (x, log_psi, log_w, resampled), _ = jax.lax.scan(step, (x, log_psi, log_psi, jnp.zeros(())), moves)
    last = lambda x: ancestral_moments(process, denoiser, x, grid[-2], grid[-1])[0]
    return Population(jax.vmap(last)(x), log_w - log_psi, resampled)


def judge(population: Population, good: Bool[Array, " n"], key: PRNGKey) -> Judged:
    """Conditions on the oracle's verdict and resamples: as many samples as particles, all good.

    Particles of several populations may be concatenated.

    Raises:
      ValueError: no particle is good.
    """
    good = jnp.asarray(good)
    if good.shape != population.log_weights.shape or good.dtype != bool:
        wanted = population.log_weights.shape
        raise ValueError(f"smc: good: expected one Boolean a particle, {wanted}, given {good.dtype} {good.shape}")
    if not bool(jnp.any(good)):
        raise ValueError(f"smc: expected at least one good particle, given 0 of {len(good)}")
    log_w = jnp.where(good, population.log_weights, -jnp.inf)
    index = systematic(key, log_w)
    log_alpha = jax.nn.logsumexp(log_w) - jnp.log(len(log_w))
    return Judged(population.particles[index], effective_size(log_w), log_alpha)
