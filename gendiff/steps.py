"""The state of a training, one step, and the choice of the best parameters: pure functions of one run.

`gendiff.programs` compiles them, and `training.train` runs them from the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from gendiff import check, distributed, losses
from gendiff.devices import Placement
from gendiff.losses import Loss
from gendiff.types import Params, PRNGKey, Scalar

Draw: TypeAlias = Callable[[PRNGKey], Any]
"""key -> batch, a pytree with one leading axis, drawn on the device inside the compiled step."""
Validate: TypeAlias = Callable[[Params], Scalar]
"""Parameters -> loss on held-out data; deterministic."""
Metrics: TypeAlias = dict[str, Any]
METRICS = ("loss", "gradient_norm")
"""Metrics of a step."""


class State(NamedTuple):
    """The state of a run; saved and restored, it gives the same numbers bit for bit."""

    step: Any
    last: Params
    """Parameters after the last step."""
    averaged: Params
    """Their exponential moving average (EMA)."""
    optimiser: Any
    key: PRNGKey
    best: Params
    """The average with the least validation loss; without validation, the newest."""
    best_loss: Any
    best_step: Any


class Task(NamedTuple):
    """The loss of one example, and the batches, of a training."""

    loss: Loss
    draw: Draw | None = None
    """None: batches come from the host."""
    validate: Validate | None = None


class Settings(NamedTuple):
    """The optimiser of a run, its length and its blocks."""

    steps: int
    """>= 0."""
    rate: float = 1e-3
    """Learning rate, >= 0."""
    decay: float = 0.999
    """Decay of the EMA, in [0, 1]."""
    every: int = 500
    """Steps of a block, after which the run validates, saves and reports, >= 1."""
    warmup: int = 0
    """Steps in which the rate rises from 0; if more than `steps`, it never reaches `rate`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The rate after the warm-up: it falls to 0 by the last step, or stays."""
    clip: float | None = 1.0
    """Largest norm of a gradient, > 0; None: no limit."""
    weight_decay: float = 0.0
    """Decoupled (AdamW), relative to the rate, >= 0."""
    patience: int | None = None
    """Stop if the validation loss does not improve for so many steps; None or 0: never."""


def adam(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipped gradients and a schedule; raises ValueError if a setting is out of range."""
    check_settings(settings)
    rate, warmup, steps = settings.rate, settings.warmup, settings.steps
    first = 0.0 if warmup else rate
    if settings.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(first, rate, warmup, max(steps, warmup + 1))
    elif settings.schedule == "linear":
        rise, fall = ((first, rate, warmup), (rate, 0.0, max(steps - warmup, 1)))
        schedule = optax.join_schedules([optax.linear_schedule(*rise), optax.linear_schedule(*fall)], [warmup])
    else:
        schedule = optax.warmup_constant_schedule(first, rate, warmup)
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=settings.weight_decay))


def check_settings(settings: Settings) -> None:
    """Raise ValueError if a setting is out of the range that `Settings` states."""
    check.number("training: steps", settings.steps, at_least=0, whole=True)
    check.number("training: rate", settings.rate, at_least=0)
    check.number("training: decay", settings.decay, at_least=0, at_most=1)
    check.number("training: every", settings.every, at_least=1, whole=True)
    check.number("training: warmup", settings.warmup, at_least=0, whole=True)
    check.choice("training: schedule", settings.schedule, ("cosine", "linear", "constant"))
    check.number("training: weight_decay", settings.weight_decay, at_least=0)
    if settings.clip is not None:
        check.number("training: clip", settings.clip, above=0, infinite=True)
    if settings.patience is not None:
        check.number("training: patience", settings.patience, at_least=0, whole=True)


def init(key: PRNGKey, params: Params, optimiser: optax.GradientTransformation) -> State:
    """The state before the first step.  It holds copies, because a buffer cannot be donated twice."""
    copy = partial(jax.tree.map, jnp.copy)
    zero = jnp.zeros((), jnp.int32)
    best_loss, best_step = jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
    return State(zero, copy(params), copy(params), optimiser.init(params), key, copy(params), best_loss, best_step)


def make_step(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    decay: float = 0.999,
    placement: Placement | None = None,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """One optimiser step on a batch.

    The devices on the axis `data` share the batch: a device takes the gradient of its part, and one all-reduce takes
    the mean.  If examples depend on each other (`losses.looks_at_batch`), the compiler splits the work.  A fully
    sharded array is gathered once a step, and its gradient is reduced to the parts.  Call the step of K runs inside
    `shard_map` over the mesh.

    Args:
      decay: of the EMA, in [0, 1]; the first steps use (1 + step) / (10 + step) if that is less.

    Raises:
      ValueError: decay is out of range; from the step, the arrays of the batch have no rows or differ in number.
    """
    check.number("training: decay", decay, at_least=0, at_most=1)
    batch_loss = losses.mean(loss)

    def replicated(params: Params, keys: PRNGKey, batch: Any, over: Any) -> tuple[Scalar, Params]:
        return jax.lax.pmean(jax.value_and_grad(losses.with_keys(loss))(params, keys, batch), over)

    def sharded(params: Params, keys: PRNGKey, batch: Any, places: Any) -> tuple[Scalar, Params]:
        # Gather once a step: `jax.checkpoint`, which gathers again in the backward pass, needs more memory.
        of_whole = lambda params: losses.with_keys(loss)(jax.tree.map(_gathered, params, places), keys, batch)
        value, gradient = jax.value_and_grad(of_whole)(params)
        return jax.lax.pmean(value, distributed.EVERY_DEVICE), jax.tree.map(_mean, gradient, places)

    def value_and_gradient(params: Params, key: PRNGKey, batch: Any) -> tuple[Scalar, Params]:
        if placement is None or placement.sharers == 1 or losses.looks_at_batch(loss, params, key, batch):
            return jax.value_and_grad(batch_loss)(params, key, batch)
        keys = jax.random.split(key, check.rows("training: batch", batch))
        mesh = placement.mesh
        if placement.runs:
            size = len(keys) // placement.sharers
            part = lambda a: jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("data") * size, size)
            return replicated(params, part(keys), jax.tree.map(part, batch), "data")
        split, places = jax.P("data"), jax.P()
        # The mean is over replicas of a part too, so that they stay equal if a sum has no fixed order.
        of_part = partial(replicated, over=distributed.EVERY_DEVICE)
        if placement.fully_sharded:
            places = jax.tree.map(lambda sharding: sharding.spec, placement.of_state(params))
            of_part = partial(sharded, places=places)
        parted = jax.shard_map(
            of_part, mesh=mesh, in_specs=(places, split, split), out_specs=(jax.P(), places), check_vma=False
        )
        return parted(params, keys, batch)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        check.number("training: rows of the batch", check.rows("training: batch", batch), at_least=1, whole=True)
        key = jax.random.fold_in(state.key, state.step)
        value, gradient = value_and_gradient(state.last, key, batch)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.last)
        last = optax.apply_updates(state.last, updates)
        rate = 1 - jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        averaged = optax.incremental_update(last, state.averaged, rate)
        moved = state._replace(step=state.step + 1, last=last, averaged=averaged, optimiser=optimiser_state)
        # Loops and checkpoints need a state that keeps its types; JAX's own error does not name the array.
        chex.assert_trees_all_equal_shapes_and_dtypes(state, moved)
        return moved, dict(zip(METRICS, (value, optax.tree.norm(gradient)), strict=True))

    return step


def _gathered(part: Array, place: jax.P) -> Array:
    """Inside `shard_map`, gather an array from its parts; the transpose is `psum_scatter`."""
    if "data" not in place:
        return part
    return jax.lax.all_gather(part, "data", axis=tuple(place).index("data"), tiled=True)


def _mean(gradient: Array, place: jax.P) -> Array:
    """Inside `shard_map`, the mean of a gradient over the devices; `_gathered`'s transpose has summed over `data`."""
    if "data" not in place:
        return jax.lax.pmean(gradient, distributed.EVERY_DEVICE)
    mean = gradient / jax.lax.axis_size("data")
    return jax.lax.pmean(mean, "replica") if jax.lax.axis_size("replica") > 1 else mean


def select(state: State, validate: Validate | None) -> tuple[State, Metrics]:
    """Keep the average as `best` if its validation loss is the least so far; without `validate`, always."""
    if validate is None:
        return state._replace(best=state.averaged, best_step=state.step), {}
    value = jnp.asarray(validate(state.averaged), jnp.float32)  # also under x64, because a state keeps its types
    better = value < state.best_loss
    best = jax.tree.map(partial(jnp.where, better), state.averaged, state.best)
    best_step = jnp.where(better, state.step, state.best_step)
    best_loss = jnp.where(better, value, state.best_loss)
    return state._replace(best=best, best_loss=best_loss, best_step=best_step), {"validation_loss": value}


def make_drawn_step(
    step: Callable[[State, Any], tuple[State, Metrics]], draw: Draw, placement: Placement | None = None
) -> Callable[[State], tuple[State, Metrics]]:
    """A step that draws its batch on the device."""

    def drawn_step(state: State) -> tuple[State, Metrics]:
        # A key apart from the step's, because `split(key, n)[i]` of its examples is `fold_in(key, i)`.
        batch = draw(jax.random.fold_in(jax.random.fold_in(state.key, np.uint32(2**32 - 1)), state.step))
        if placement is not None and not placement.runs:
            batch = distributed.split_batch(placement.mesh, batch)
        return step(state, batch)

    return drawn_step


def repeated(
    drawn_step: Callable[[State], tuple[State, Metrics]], state: State, count: Int[Array, ""]
) -> tuple[State, Metrics]:
    """`count` steps in a loop, one program for all counts; the metrics are sums."""

    def body(_: Any, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
        moved, metrics = drawn_step(carry[0])
        return moved, jax.tree.map(jnp.add, carry[1], metrics)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(drawn_step, state)[1])
    return jax.lax.fori_loop(0, count, body, (state, zeros))


def finished(step: Any, best_step: Any, settings: Settings) -> Any:
    """True if a run ends at this step; elementwise over runs."""
    if not settings.patience:
        return step >= settings.steps
    return (step >= settings.steps) | (step - best_step >= settings.patience)


def packed(state: State) -> dict[str, Any]:
    """The arrays of a state as a flat dict, to store as a phase's result; `unpacked` is the inverse."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}


def unpacked(arrays: dict[str, Any], params: Params, settings: Settings) -> State:
    """The state that was `packed`; `params` and `settings` give its structure."""
    key = jax.random.key(0)
    start = lambda key, params: init(key, params, adam(settings))
    like = jax.eval_shape(start, key, params)._replace(key=jax.random.key_data(key))
    state = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in sorted(arrays)])
    return state._replace(key=jax.random.wrap_key_data(state.key))
