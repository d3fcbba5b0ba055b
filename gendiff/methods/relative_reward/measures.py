"""How well a reward is fitted, and whether the difference of two models is a gradient at all."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gendiff import check, distributed, potential
from gendiff.denoiser import Denoiser, denoise
from gendiff.losses import Aligned
from gendiff.methods.relative_reward.targets import factor
from gendiff.potential import Logit
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Sample, Scalar, Time


class Fit(NamedTuple):
    """How much of the squared difference a reward's gradient explains."""

    times: np.ndarray
    """(B + 1,) bounds of t."""
    r2: np.ndarray
    """(B,) 1 - |grad rho - y|^2 / |y|^2, summed over the examples of a bin and the coordinates that count: 1 is
    perfect, 0 is no reward at all.  NaN where there is no difference to explain."""
    overall: float
    """The same over all examples."""


def quality(network: Logit, rewards: Params, goals: Array, examples: Aligned, bounds: np.ndarray) -> list[Fit]:
    """The fit of K rewards, on held-out examples, by noise level; ValueError where the bounds of t do not rise."""
    check.number("quality: change from a bound to the next", np.diff(bounds), above=0)
    rest, size = map(np.asarray, _squares(network, rewards, jnp.asarray(goals, jnp.int32), examples))
    where = np.digitize(np.asarray(examples.t), bounds) - 1
    bins, everywhere = [where == b for b in range(len(bounds) - 1)], np.ones(len(where), bool)
    share = lambda k, inside: (
        float(1 - np.sum(rest[k][inside]) / np.sum(size[k][inside])) if size[k][inside].any() else np.nan
    )
    r2 = lambda k: np.array([share(k, inside) for inside in bins])
    return [Fit(np.asarray(bounds), r2(k), share(k, everywhere)) for k in range(len(rest))]


@partial(jax.jit, static_argnums=0)
def _squares(network: Logit, rewards: Params, goals: Array, examples: Aligned) -> tuple[Array, Array]:
    """(K, n) squared error and squared target, over the coordinates that count."""

    def of_reward(run: tuple[Params, Array]) -> tuple[Array, Array]:
        phi, goal = run

        def of_example(example: Aligned) -> tuple[Scalar, Scalar]:
            y = example.target[goal]
            error = jax.grad(network, 1)(phi, example.x, example.t) - y
            return jnp.sum(example.weight * error**2), jnp.sum(example.weight * y**2)

        return distributed.chunked(of_example, examples, 256)

    return potential.over_members(of_reward, (rewards, goals))


def difference(process: Process, base: Denoiser, expert: Denoiser, target: str) -> Denoiser:
    """The field that a reward is fitted to: (x, t) -> factor(t) (expert - base)."""
    unit = factor(process, target)
    of = lambda model, x, t: denoise("difference", model, x, t)
    return lambda x, t: unit(t) * (of(expert, x, t) - of(base, x, t))


def asymmetry(field: Denoiser, x: Sample, t: Time, key: PRNGKey, probes: int = 8) -> tuple[Scalar, Scalar]:
    """Estimates of ||J - J^T||^2 and ||J||^2 (Frobenius) of a field's Jacobian at x, by Hutchinson's random signs.

    sqrt(sum of the first / sum of the second) / 2 is 0 for the gradient of a potential and 1 for a pure rotation.  A
    reward can explain no more than the symmetric part.
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
    """The reward of `end` over `start`, int_0^1 <field(start + u (end - start), t), end - start> du (eq. 10).

    By Gauss and Legendre's rule with `nodes` evaluations.  For a conservative field it does not depend on the path,
    and a fitted rho must give the same difference: a check in low dimension.
    """
    check.number("line_integral: nodes", nodes, at_least=1, whole=True)
    check.shape("line_integral: end", end, jnp.shape(start))
    places, weights = np.polynomial.legendre.leggauss(nodes)
    direction = end - start
    along = lambda u: jnp.sum(denoise("line_integral", field, start + u * direction, t) * direction)
    values = jax.vmap(along)(jnp.asarray((places + 1) / 2, jnp.float32))
    return jnp.sum(jnp.asarray(weights / 2, jnp.float32) * values)
