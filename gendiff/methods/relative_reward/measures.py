"""Measures of a reward: its fit, its discriminability, and whether the difference of two models is a gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check, distributed, losses, potential
from gendiff.denoiser import Denoiser, denoise
from gendiff.losses import Aligned
from gendiff.methods.relative_reward.targets import factor
from gendiff.potential import Logit
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, Time


class Fit(NamedTuple):
    """How much of the squared difference a reward's gradient explains."""

    times: np.ndarray
    """(B + 1,) bounds of t."""
    r2: np.ndarray
    """(B,) 1 - |grad rho - y|^2 / |y|^2, summed over a bin's examples and the coordinates that count: 1 is a perfect
    reward, 0 is no reward.  NaN in a bin without a difference."""
    overall: float
    """R^2 of all examples."""


def quality(network: Logit, rewards: Params, goals: Array, examples: Aligned, bounds: np.ndarray) -> list[Fit]:
    """Measure the fit of K rewards on held-out examples, by noise level; ValueError if the bounds of t do not rise."""
    check.number("quality: change from a bound to the next", np.diff(bounds), above=0)
    errors, sizes = map(np.asarray, _squares(network, rewards, jnp.asarray(goals, jnp.int32), examples))
    bins = np.digitize(np.asarray(examples.t), bounds) - 1

    def r2(error: np.ndarray, size: np.ndarray) -> float:
        return float(1 - np.sum(error) / np.sum(size)) if size.any() else np.nan

    by_bin = lambda *arrays: np.array([r2(*(a[bins == b] for a in arrays)) for b in range(len(bounds) - 1)])
    return [Fit(np.asarray(bounds), by_bin(*pair), r2(*pair)) for pair in zip(errors, sizes, strict=True)]


@partial(jax.jit, static_argnums=0)
def _squares(network: Logit, rewards: Params, goals: Array, examples: Aligned) -> tuple[Array, Array]:
    """Return the squared errors (K, n) and the squared targets (K, n), over the coordinates that count."""

    def of_reward(run: tuple[Params, Array]) -> tuple[Array, Array]:
        phi, goal = run

        def of_example(example: Aligned) -> tuple[Scalar, Scalar]:
            y = example.target[goal]
            error = jax.grad(network, 1)(phi, example.x, example.t) - y
            return jnp.sum(example.weight * error**2), jnp.sum(example.weight * y**2)

        return distributed.chunked(of_example, examples, 256)

    return potential.over_members(of_reward, (rewards, goals))


def tenths(process: Process) -> np.ndarray:
    """Return the bounds of t that cut the steps of a discrete chain into tenths, for `quality`."""
    steps = check.number("tenths: steps", process.steps or 0, at_least=1, whole=True)
    return np.unique(np.concatenate([[1], np.linspace(0, steps, 11)[1:].astype(int) + 1]))


def told_apart(
    process: Process,
    network: Logit,
    rewards: Params,
    goals: Array,
    data: Sequence[Samples],
    key: Callable[[int], PRNGKey],
    latest: int,
    centred: bool,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the values (n,) of K rewards on the base model's data and on their expert's, noised to times 1 .. latest.

    Args:
      rewards: stacked on axis 0.
      goals: (K,), the expert of each reward; not falling.
      data: (n, *shape) of the base model, then of every expert in `goals`.
      key: index into `data` -> key of its noise.
      centred: subtract the base's mean at the value's time and divide by its standard deviation there, both from the
        base's samples 0, 2, ..  A reward is known up to a constant of t, and its unit depends on t.
    """
    noisy = [_early(process, latest, key(i), jnp.asarray(x0)) for i, x0 in enumerate(data)]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for i, goal in enumerate(np.unique(goals), 1):
        own = jax.tree.map(lambda a: a[np.flatnonzero(goals == goal)], rewards)  # noqa: B023 (used at once)
        base, expert = (np.asarray(_values(network, own, *noisy[k])) for k in (0, i))
        if centred:
            times, theirs = (np.asarray(noisy[k][1]) for k in (0, i))
            mean, std = by_time(base[:, ::2], times[::2], latest)
            base, expert = (base - mean[:, times]) / std[:, times], (expert - mean[:, theirs]) / std[:, theirs]
        pairs.extend(zip(base, expert, strict=True))
    return pairs


@partial(jax.jit, static_argnums=(0, 1))
def _early(process: Process, latest: int, key: PRNGKey, x0: Array) -> tuple[Array, Array]:
    early = process._replace(sample_time=lambda key: jax.random.randint(key, (), 1, latest + 1))
    return jax.vmap(partial(losses.noised, early))(jax.random.split(key, len(x0)), x0)


@partial(jax.jit, static_argnums=0)
def _values(network: Logit, rewards: Params, x: Array, t: Array) -> Array:
    """(K, n)."""
    return potential.over_members(lambda phi: jax.vmap(partial(network, phi))(x, t), rewards)


def by_time(values: np.ndarray, times: np.ndarray, latest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations (K, latest + 1) of values (K, n), time by time; 0 and 1 below two values."""
    mean, std = np.zeros((len(values), latest + 1)), np.ones((len(values), latest + 1))
    for t in range(latest + 1):
        at_t = values[:, times == t]
        if at_t.shape[1] > 1:
            mean[:, t], std[:, t] = at_t.mean(1), np.maximum(at_t.std(1), 1e-12)
    return mean, std


def difference(process: Process, base: Denoiser, expert: Denoiser, target: str) -> Denoiser:
    """Return the field that a reward is fitted to: (x, t) -> factor(t) (expert - base)."""
    unit, x0 = factor(process, target), partial(denoise, "difference")
    return lambda x, t: unit(t) * (x0(expert, x, t) - x0(base, x, t))


def asymmetry(field: Denoiser, x: Sample, t: Time, key: PRNGKey, probes: int = 8) -> tuple[Scalar, Scalar]:
    """Estimate ||J - J^T||^2 and ||J||^2 (Frobenius) of a field's Jacobian J at x, by Hutchinson's random signs.

    sqrt(sum of the first / sum of the second) / 2 is 0 for the gradient of a potential and 1 for a pure rotation.  A
    reward explains at most the symmetric part.
    """
    check.number("asymmetry: probes", probes, at_least=1, whole=True)
    at = lambda x: denoise("asymmetry", field, x, t)

    def probe(key: PRNGKey) -> tuple[Scalar, Scalar]:
        v = jax.random.rademacher(key, x.shape, x.dtype)
        along = jax.jvp(at, (x,), (v,))[1]
        across = jax.vjp(at, x)[1](v)[0]
        return jnp.sum((along - across) ** 2), 0.5 * jnp.sum(along**2 + across**2)

    first, second = jax.vmap(probe)(jax.random.split(key, probes))
    return jnp.mean(first), jnp.mean(second)


def line_integral(field: Denoiser, start: Sample, end: Sample, t: Time, nodes: int = 16) -> Scalar:
    """Integrate a field from `start` to `end`: int_0^1 <field(start + u (end - start), t), end - start> du (eq. 10).

    Gauss-Legendre quadrature with `nodes` evaluations.  The integral over a gradient does not depend on the path and
    equals rho(end) - rho(start), so in low dimension it checks a fitted rho.
    """
    check.number("line_integral: nodes", nodes, at_least=1, whole=True)
    check.shape("line_integral: end", end, jnp.shape(start))
    places, weights = np.polynomial.legendre.leggauss(nodes)
    direction = end - start
    along = lambda u: jnp.sum(denoise("line_integral", field, start + u * direction, t) * direction)
    return jnp.sum(jnp.asarray(weights / 2, jnp.float32) * jax.vmap(along)(jnp.asarray((places + 1) / 2, jnp.float32)))
