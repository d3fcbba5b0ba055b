"""Losses of one example, (params, key, example) -> scalar; `mean` turns one into the loss of a batch."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from gendiff import check, potential
from gendiff.denoiser import Denoiser, Model, denoise
from gendiff.potential import Logit, scalar
from gendiff.process import Process, perturb
from gendiff.static import by_value
from gendiff.types import BATCH, Params, PRNGKey, Sample, Scalar, Time, wide

Loss: TypeAlias = Callable[[Params, PRNGKey, Any], Scalar]
"""`(params, key, example) -> loss` of one example."""
Weight: TypeAlias = Callable[[Time], Scalar]
"""t -> weight of the squared error."""
Bind: TypeAlias = Callable[[Params, Any], Params]
"""(params, condition) -> params.  A network's work on the condition alone belongs here, because it runs once a sample
and not at every step."""


def noised(process: Process, key: PRNGKey, x0: Sample) -> tuple[Sample, Time]:
    """Draw a training time t, and x_t from x_0; returns (x_t, t)."""
    time_key, noise_key = jax.random.split(key)
    t = process.sample_time(time_key)
    return perturb(process, noise_key, x0, t)[0], t


@by_value
def edm_weight(data_std: float = 0.5) -> Weight:
    """(sigma^2 + sd^2) / (sigma sd)^2 of Karras et al. (2022), unit weight on EDM's F; data_std > 0."""
    check.number("edm_weight: data_std", data_std, above=0)
    return lambda t: 1.0 / t**2 + 1.0 / data_std**2


@by_value
def epsilon_weight(process: Process) -> Weight:
    """alpha^2 / sigma^2, which turns the squared error of x_0 into that of eps (Ho et al. 2020, eq. 14)."""
    return lambda t: (process.alpha(t) / process.sigma(t)) ** 2


@by_value
def denoising(process: Process, model: Model, weight: Weight, known: Bool[Array, "*shape"] | None = None) -> Loss:
    """Denoising score matching, weight(t) || D(x_t, t) - x_0 ||^2; an example is x_0.

    Args:
      known: coordinates that stay clean in x_t and count no error (Janner et al. 2022: the ends of a plan).

    Raises (the loss):
      ValueError: the model's x_0 does not have the shape of x_0, or `known` does not broadcast to it.
    """

    def loss(params: Params, key: PRNGKey, x0: Sample) -> Scalar:
        x, t = noised(process, key, x0)
        of_params = partial(model, params)
        if known is None:
            return weight(t) * jnp.sum((denoise("denoising", of_params, x, t) - x0) ** 2)
        check.broadcasts("denoising: known", known, jnp.shape(x0))
        error = denoise("denoising", of_params, jnp.where(known, x0, x), t) - x0
        return weight(t) * jnp.sum(jnp.where(known, 0.0, error) ** 2)

    return loss


@by_value
def cross_entropy(process: Process, logit: Logit) -> Loss:
    """Importance-weighted cross-entropy of Gen-neG, eq. 12; an example is (x_0, label in [0, 1], weight).

    The loss of several logits, with as many labels, is their sum.
    """

    def loss(params: Params, key: PRNGKey, example: tuple[Sample, Scalar, Scalar]) -> Scalar:
        x0, label, weight = example
        x, t = noised(process, key, x0)
        value = wide(logit(params, x, t))
        check.shape("cross_entropy: labels, one a logit,", label, jnp.shape(value))
        check.shape("cross_entropy: weight", weight, ())
        return weight * jnp.sum(jax.nn.softplus(value) - label * value)

    return loss


@by_value
def conditional(loss: Loss, bind: Bind) -> Loss:
    """A loss under a condition: an example is (condition, example of `loss`)."""
    return lambda params, key, example: loss(bind(params, example[0]), key, example[1])


@by_value
def distillation(process: Process, model: Model, teacher: Denoiser, weight: Weight) -> Loss:
    """weight(t) || D(x_t, t) - teacher(x_t, t) ||^2, Gen-neG eq. 13, with a fixed teacher; an example is x_0."""

    def loss(params: Params, key: PRNGKey, x0: Sample) -> Scalar:
        x, t = noised(process, key, x0)
        target = jax.lax.stop_gradient(denoise("distillation: teacher", teacher, x, t))
        return weight(t) * jnp.sum((denoise("distillation", partial(model, params), x, t) - target) ** 2)

    return loss


@by_value
def regression(model: Model, weight: Weight) -> Loss:
    """weight(t) || D(x_t, t) - target ||^2 on stored targets; an example is (x_t, t, target)."""

    def loss(params: Params, key: PRNGKey, example: tuple[Sample, Time, Sample]) -> Scalar:
        x, t, target = example
        check.shape("regression: target", target, jnp.shape(x))
        return weight(t) * jnp.sum((denoise("regression", partial(model, params), x, t) - target) ** 2)

    return loss


class Aligned(NamedTuple):
    """An example of gradient alignment."""

    x: Sample
    t: Time
    target: Sample
    """Gradient in x that the potential should have at (x, t)."""
    weight: Sample | Scalar
    """Weight of the squared error, broadcast to x; 0 leaves a coordinate out."""


@by_value
def gradient_alignment(potential: Logit, mode: Literal["reverse", "directional"] = "reverse") -> Loss:
    """Mean over the coordinates of weight (grad_x rho(x, t) - target)^2; an example is `Aligned`.

    Nuti, Franzmeyer and Henriques (2023), eq. 14: theta is fitted through the gradient in x.

    Args:
      mode: both have the same value and gradient.  "reverse" is reverse mode over reverse mode; on a CPU it is faster
        for multilayer perceptrons.  "directional", faster for convolutional encoders, is reverse mode over forward
        mode: the gradient in theta is that of <v, grad_x rho>, with v = 2 weight (grad_x rho - target) / n fixed.
    """
    check.choice("gradient_alignment: mode", mode, ("reverse", "directional"))
    potential = scalar("gradient_alignment", potential)
    gradient = jax.grad(potential, 1)

    def error(params: Params, example: Aligned) -> tuple[Sample, Scalar]:
        shape = jnp.shape(example.x)
        check.shape("gradient_alignment: target", example.target, shape)
        spread = jnp.broadcast_shapes(jnp.shape(example.weight), shape)
        check.shape("gradient_alignment: weight, broadcast to x,", jax.ShapeDtypeStruct(spread, jnp.float32), shape)
        residual = gradient(params, example.x, example.t) - example.target
        pull = example.weight * residual
        return pull, jnp.mean(pull * residual)

    def reverse(params: Params, key: PRNGKey, example: Aligned) -> Scalar:
        return error(params, example)[1]

    def directional(params: Params, key: PRNGKey, example: Aligned) -> Scalar:
        pull, value = jax.lax.stop_gradient(error(params, example))
        along = lambda x: potential(params, x, example.t)
        change = jax.jvp(along, (example.x,), (2 / pull.size * pull,))[1]
        return value + change - jax.lax.stop_gradient(change)

    return reverse if mode == "reverse" else directional


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Sum of a loss over K members; parameters and an example are stacked on axis 0, one row a member.

    One run trains all members, if the optimiser works element by element and does not clip the common gradient norm.
    """

    member: Loss

    def __call__(self, params: Params, key: PRNGKey, examples: Any) -> Scalar:
        """The sum over the members, with an example a member."""
        return _sum_over_members(self.member, params, jax.random.split(key, potential.leading_size(params)), examples)


def _sum_over_members(loss: Loss, params: Params, keys: PRNGKey, examples: Any) -> Scalar:
    """The gradient of a member is computed beside its value, as in `potential.stack`."""
    numbers = jax.random.key_data(keys)  # because the gradient of a loop cannot pass typed keys

    def of_member(params: Params, rest: tuple[Array, Any]) -> Scalar:
        return loss(params, jax.random.wrap_key_data(rest[0]), rest[1])

    @jax.custom_jvp
    def value(params: Params) -> Scalar:
        return jnp.sum(wide(potential.over_members(lambda member: of_member(*member), (params, (numbers, examples)))))

    @value.defjvp
    def value_and_change(primals: tuple[Params], tangents: tuple[Params]) -> tuple[Scalar, Scalar]:
        both = lambda member: jax.value_and_grad(of_member)(*member)
        values, gradients = potential.over_members(both, (*primals, (numbers, examples)))
        total = jnp.sum(wide(values))
        along = jax.tree.map(lambda slope, change: jnp.vdot(wide(slope), wide(change)), gradients, tangents[0])
        return total, sum(jax.tree.leaves(along), jnp.zeros(())).astype(total.dtype)

    return value(params)


def mean(loss: Loss) -> Loss:
    """Mean of a loss over a batch, a pytree with one leading axis; every example has its own key.

    The axis has the name BATCH: in a loss, `jax.lax.pmean(value, BATCH)` is the mean over the batch.
    """
    of_keys = with_keys(loss)
    return lambda params, key, batch: of_keys(params, jax.random.split(key, check.rows("loss: batch", batch)), batch)


def with_keys(loss: Loss) -> Callable[[Params, PRNGKey, Any], Scalar]:
    """As `mean`, with the keys of the examples, (n,), in place of one key."""

    def of_batch(loss: Loss, params: Params, keys: PRNGKey, batch: Any) -> Scalar:
        return jnp.mean(jax.vmap(scalar("loss", loss), (None, 0, 0), axis_name=BATCH)(params, keys, batch))

    if not isinstance(loss, Ensemble):
        return partial(of_batch, loss)
    member = partial(of_batch, loss.member)

    def of_ensemble(params: Params, keys: PRNGKey, batch: Any) -> Scalar:
        keys = jax.vmap(lambda key: jax.random.split(key, potential.leading_size(params)))(keys)
        by_member = lambda tree: jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)
        return _sum_over_members(member, params, by_member(keys), by_member(batch))

    return of_ensemble


def looks_at_batch(loss: Loss, params: Params, key: PRNGKey, batch: Any) -> bool:
    """Return True if the loss of an example uses the axis BATCH, and so depends on the other examples."""
    try:
        jax.eval_shape(lambda: loss(params, key, jax.tree.map(lambda a: a[0], batch)))
    except NameError:  # JAX raises it for an axis without a name
        return True
    return False
