"""Potential: (x, t) -> scalar log r, whose gradient steers.

The potential of a classifier is log C, never the log-odds log C / (1 - C), because Gen-neG conditions a model on valid
samples and compares no densities (2307.16463, eq. 8).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from gendiff import check
from gendiff.process import Process, c_noise
from gendiff.static import by_value
from gendiff.types import Params, Sample, Scalar, Time, wide

Potential: TypeAlias = Callable[[Sample, Time], Scalar]
"""`(x, t) -> log r`."""
Logit: TypeAlias = Callable[[Params, Sample, Time], Scalar]
"""`(params, x, t) -> l` with C = sigmoid(l); any potential with parameters has this type."""
Interval: TypeAlias = Callable[[Time], Bool[Array, ""]]
"""t -> True where guidance acts."""


@by_value
def scalar(caller: str, potential: Callable[..., Scalar]) -> Callable[..., Scalar]:
    """Wrap a function so that it raises ValueError for a value that is no scalar; a sum would hide an array."""
    return lambda *args: check.shape(f"{caller}: the scalar value", potential(*args), ())


@by_value
def log_probability(logit: Logit) -> Logit:
    """log C = -softplus(-l), exact also where sigmoid(l) rounds to 0 or 1.  Its gradient is (1 - C) grad l.

    Several logits (of agents, of constraints) count as independent: the result is the sum of their log C.
    """
    return lambda params, x, t: jnp.sum(jax.nn.log_sigmoid(wide(logit(params, x, t))))


@by_value
def from_edm(process: Process, network: Logit, data_std: float = 1.0, at: np.generic | None = None) -> Logit:
    """Logit of a classifier with EDM's inputs, x_t / sqrt(alpha^2 data_std^2 + sigma^2) and ln(sigma / alpha) / 4.

    Args:
      network: `(params, x, c_noise) -> logits`.
      data_std: standard deviation of the data, > 0.
      at: the time that the network is told in place of t, for a classifier without noise levels.
    """
    check.number("from_edm: data_std", data_std, above=0)

    def logit(params: Params, x: Sample, t: Time) -> Array:
        size = jnp.sqrt(process.alpha(t) ** 2 * data_std**2 + process.sigma(t) ** 2)
        return jnp.asarray(network(params, x / size, c_noise(process, t if at is None else jnp.asarray(at))))

    return logit


@by_value
def clear(process: Process, least: float) -> Interval:
    """The times at which the signal is at least `least` of the standard deviation of x_t, in units of the data's."""
    return lambda t: process.alpha(t) >= least * jnp.sqrt(process.alpha(t) ** 2 + process.sigma(t) ** 2)


@by_value
def limited(potential: Potential, within: Interval) -> Potential:
    """log r where `within(t)` holds, else 0.  If all samples share t, log r is not evaluated outside."""
    log_r = scalar("limited", potential)

    def value(x: Sample, t: Time) -> Scalar:
        inside = lambda: log_r(x, t)
        return jax.lax.cond(within(t), inside, lambda: jnp.zeros((), jax.eval_shape(inside).dtype))

    return value


def stack(potential: Logit, params: Params) -> Potential:
    """sum_k potential(params_k, x, t), of several classifiers or of an ensemble.

    The sum has derivatives of all orders in x, none in t or the parameters.  The gradient of a member is computed
    beside its value, because reverse mode through the sum would keep the activations of all K members.

    Args:
      potential: usually `log_probability(logit)`.
      params: K trees of parameters stacked on axis 0 (`stacked`).  K = 0 gives the constant 0.

    Returns:
      The sum in the widest type of the members' values, x and float32.
    """
    leading_size(params)
    of_member = scalar("stack", potential)

    def summed(values: Array, x: Sample) -> Scalar:
        return jnp.sum(jnp.asarray(values, jnp.promote_types(wide(values).dtype, jnp.result_type(x))))

    def potential_of_all(x: Sample, t: Time) -> Scalar:
        @jax.custom_jvp
        def value(x: Sample) -> Scalar:
            return summed(over_members(lambda member: of_member(member, x, t), params), x)

        @value.defjvp
        def value_and_change(primals: tuple[Sample], tangents: tuple[Sample]) -> tuple[Scalar, Scalar]:
            both = lambda member: jax.value_and_grad(of_member, 1)(member, *primals, t)
            values, gradients = over_members(both, params)
            total = summed(values, primals[0])
            return total, jnp.sum(jnp.sum(wide(gradients), 0) * tangents[0]).astype(total.dtype)

        return value(x)

    return potential_of_all


def over_members(function: Callable[[Params], Any], members: Params) -> Any:
    """`vmap(function)(members)`; on a CPU a loop, because the arrays of one member fit the cache."""
    return jax.lax.map(function, members) if jax.default_backend() == "cpu" else jax.vmap(function)(members)


def leading_size(params: Params) -> int:
    """K of a tree of K stacked members; raises ValueError if the leaves disagree."""
    return check.rows("stacked parameters", params)


@jax.jit
def stacked(*members: Params) -> Params:
    """Stack trees of equal structure and shapes on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


@by_value
def total(*potentials: Potential) -> Potential:
    """The sum of potentials, log of the product of their r."""
    parts = [scalar("total", potential) for potential in potentials]
    return lambda x, t: sum((part(x, t) for part in parts), jnp.zeros(()))


def scaled(potential: Potential, scale: Scalar | float) -> Potential:
    """scale * potential."""
    log_r, scale = scalar("scaled", potential), check.number("scaled: scale", scale)
    return lambda x, t: scale * log_r(x, t)
