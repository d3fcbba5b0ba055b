"""Twisted sequential Monte Carlo: a population of particles that is exact where guidance is approximate.

In the twisted diffusion sampler of Wu et al. (2306.17775) the guided kernel proposes and importance weights correct it.
The oracle decides last: no sample that it rejects is returned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gendiff import check
from gendiff.denoiser import Denoiser
from gendiff.potential import Potential, scalar
from gendiff.process import Process, falling
from gendiff.sampling import ancestral_moments
from gendiff.types import PRNGKey, Sample, Samples, Scalar, Time, wide


class Population(NamedTuple):
    """Particles at t = 0, before the oracle's verdict."""

    particles: Samples
    log_weights: Float[Array, " n"]
    """For the unconditional p(x_0), not normalised: the mean weight has expectation 1.  -inf marks a lost particle."""
    resampled: Scalar
    """Number of steps that resampled."""
    lost: Scalar | int = 0
    """Number of losses in all steps: a weight that became NaN, infinite or 0 (a twist of 0, or an underflow)."""


class Judged(NamedTuple):
    """Samples of p(x_0 | O(x_0) = 1)."""

    samples: Samples
    effective: Scalar
    """Effective sample size by the weights, an upper bound, because descendants of one ancestor are dependent."""
    log_alpha: Scalar
    """Estimate of log P_p[O = 1]; its exponential is unbiased, unless particles were lost."""
    lost: Scalar | int = 0
    """Number of valid particles without a finite log-weight; they have weight 0."""


def log_normal(x: Sample, mean: Sample, std: Scalar) -> Scalar:
    """log N(x; mean, std^2 I)."""
    return -0.5 * jnp.sum(((x - mean) / std) ** 2) - x.size * (jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi))


def finite(log_weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Replace NaN and +inf by -inf, the weight 0, because +inf would take the weight of all other particles."""
    log_weights = wide(log_weights)
    return jnp.where(log_weights < jnp.inf, log_weights, -jnp.inf)


def systematic(key: PRNGKey, log_weights: Float[Array, " n"]) -> Array:
    """Indices (n,) of a systematic resampling: particle i comes about n w_i times.

    A log-weight that is NaN or infinite is the weight 0.

    Raises:
      ValueError: no weight is above 0.  In traced code the indices are then 0 .. n - 1: all particles stay.
    """
    _some_weight("systematic", log_weights)
    return _systematic(key, log_weights)


def _some_weight(caller: str, log_weights: Float[Array, " n"]) -> None:
    """Raise ValueError if no particle has a weight; of traced weights, if the shape is wrong."""
    check.shape(f"{caller}: log_weights", log_weights, (None,))
    check.number(f"{caller}: number of log_weights", len(log_weights), at_least=1, whole=True)
    if not isinstance(log_weights, jax.core.Tracer):
        count = int(np.isfinite(np.asarray(log_weights)).sum())
        check.number(f"{caller}: particles with a finite log-weight, of {len(log_weights)},", count, at_least=1)


@jax.jit
def _systematic(key: PRNGKey, log_weights: Float[Array, " n"]) -> Array:
    n = len(log_weights)
    log_weights = finite(log_weights)
    weights = jax.nn.softmax(log_weights)
    edges = jnp.cumsum(weights)
    places = (jnp.arange(n) + jax.random.uniform(key)) / n
    index = jnp.minimum(jnp.searchsorted(edges, places * edges[-1], side="right"), n - 1)
    # A float32 sum may rise at a particle of weight 0: take the last particle before it with a weight, or the first.
    weighted = weights > 0
    before = jax.lax.cummax(jnp.where(weighted, jnp.arange(n), -1))
    chosen = jnp.where(before[index] < 0, jnp.argmax(weighted), before[index])
    return jnp.where(jnp.any(log_weights > -jnp.inf), chosen, jnp.arange(n))


@jax.jit
def effective_size(log_weights: Float[Array, " n"]) -> Scalar:
    """1 / sum w_i^2 of the normalised weights, in [1, n], or 0 if no particle has a weight.

    A log-weight that is NaN or infinite is the weight 0.
    """
    log_weights = finite(log_weights)
    # Relative to the largest, because differences of large log-weights lose digits.
    log_weights = log_weights - jnp.maximum(jnp.max(log_weights), jnp.finfo(log_weights.dtype).min)
    size = jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))
    return jnp.where(jnp.any(log_weights > -jnp.inf), size, 0.0)


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
    """Run ancestral steps of the guided model, weighted to p(x_{t-1} | x_t) psi(x_{t-1}) / psi(x_t).

    Args:
      denoiser, guided: the model p and the proposal r; they share the variance of the ancestral step.
      twist: log psi(x, t), an approximation of log p(y = 1 | x_t).  psi must be > 0 wherever y = 1 is possible, because
        a particle with psi = 0 keeps the weight 0.
      grid: ends at 0.  The last step is the model's unguided mean, because it adds no noise; its weight is 1 / psi.
      particles: >= 1.
      threshold: resample if the effective size falls below this share of the particles, >= 0.

    Raises:
      ValueError: a number is out of range, the grid does not fall to 0, or a denoiser or the twist returns another
        shape.
    """
    check.number("twisted: particles", particles, at_least=1, whole=True)
    check.number("twisted: threshold", threshold, at_least=0)
    falling("twisted: grid", grid)
    check.number("twisted: last time of the grid", grid[-1], at_most=0)
    steps = len(grid) - 1
    start_key, run_key = jax.random.split(key)
    x = process.sigma(grid[0]) * jax.random.normal(start_key, (particles, *shape))

    def log_twist(x: Samples, t: Time) -> Array:
        values = wide(jax.vmap(scalar("twisted", twist), (0, None))(x, t))
        return values.astype(jnp.promote_types(values.dtype, x.dtype))

    def weighed(before: Array, after: Array) -> tuple[Array, Array]:
        """Log-weights, in which a lost particle stays lost, and the number of new losses."""
        after = jnp.where(before > -jnp.inf, finite(after), -jnp.inf)
        return after, jnp.sum((before > -jnp.inf) & (after == -jnp.inf))

    log_psi = log_twist(x, grid[0])
    log_w, lost = weighed(jnp.zeros_like(log_psi), log_psi)

    def resample(key: PRNGKey, x: Samples, log_psi: Array, log_w: Array) -> tuple:
        index = systematic(key, log_w)
        level = jax.nn.logsumexp(log_w) - jnp.log(particles)
        return x[index], log_psi[index], jnp.full(particles, level), jnp.ones(())

    def step(state: tuple, move: tuple) -> tuple[tuple, None]:
        x, log_psi, log_w, resampled, lost = state
        i, t, s = move
        noise_key, index_key = jax.random.split(jax.random.fold_in(run_key, i))

        def propose(x: Sample, key: PRNGKey) -> tuple[Sample, Scalar]:
            mean, std = ancestral_moments(process, denoiser, x, t, s)
            shifted, _ = ancestral_moments(process, guided, x, t, s)
            new = shifted + std * jax.random.normal(key, x.shape)
            return new, log_normal(new, mean, std) - log_normal(new, shifted, std)

        x, ratio = jax.vmap(propose)(x, jax.random.split(noise_key, particles))
        new_psi = log_twist(x, s)
        log_w, losses = weighed(log_w, log_w + ratio + new_psi - log_psi)
        few = effective_size(log_w) < threshold * particles
        keep = lambda key, x, log_psi, log_w: (x, log_psi, log_w, jnp.zeros(()))
        x, new_psi, log_w, count = jax.lax.cond(few, resample, keep, index_key, x, new_psi, log_w)
        return (x, new_psi, log_w, resampled + count, lost + losses), None

    moves = (jnp.arange(steps - 1), grid[:-2], grid[1:-1])
    start = (x, log_psi, log_w, jnp.zeros(()), lost)
    (x, log_psi, log_w, resampled, lost), _ = jax.lax.scan(step, start, moves)
    last = lambda x: ancestral_moments(process, denoiser, x, grid[-2], grid[-1])[0]
    x0 = jax.vmap(last)(x)
    finite_x0 = jnp.all(jnp.isfinite(x0.reshape(particles, -1)), 1)
    log_w, losses = weighed(log_w, jnp.where(finite_x0, log_w - log_psi, -jnp.inf))
    return Population(x0, log_w, resampled, lost + losses)


def judge(population: Population, good: Bool[Array, " n"], key: PRNGKey) -> Judged:
    """Condition on the oracle's verdict and resample: n particles become n valid samples.

    Particles of several populations may be concatenated.  A log-weight that is NaN or infinite is the weight 0.

    Raises:
      ValueError: no valid particle has a weight; or the particles, weights and verdicts differ in number.
    """
    good = jnp.asarray(good)
    if good.shape != population.log_weights.shape or good.dtype != bool:
        wanted = population.log_weights.shape
        raise ValueError(f"judge: good must be one Boolean a particle, {wanted}, got {good.dtype} {good.shape}")
    check.rows("judge: particles and log_weights", population[:2])
    if not bool(jnp.any(good)):
        raise ValueError(f"judge: good must be True for a particle, got 0 of {len(good)}. Take more particles.")
    log_w = jnp.where(good, finite(population.log_weights), -jnp.inf)
    _some_weight("judge: good", log_w)
    index = systematic(key, log_w)
    log_alpha = jax.nn.logsumexp(log_w) - jnp.log(len(log_w))
    lost = jnp.sum(good & (log_w == -jnp.inf))
    return Judged(population.particles[index], effective_size(log_w), log_alpha, lost)
