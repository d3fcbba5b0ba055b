"""The state of a training, one step that moves it, and the choice of the best parameters so far.

All functions here are pure and of one run.  `training.train` compiles them and runs them from the host.
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
"""key -> batch, a pytree with one leading axis, made on the device inside the compiled step."""
Validate: TypeAlias = Callable[[Params], Scalar]
"""Parameters -> loss on held-out data, smaller is better; deterministic."""
Metrics: TypeAlias = dict[str, Any]
METRICS = ("loss", "gradient_norm")
"""Of a step."""


class State(NamedTuple):
    """Everything a run needs to go on: saved and restored, it gives the same numbers bit for bit."""

    step: Any
    last: Params
    """The parameters after the last step."""
    averaged: Params
    """Their exponential moving average."""
    optimiser: Any
    key: PRNGKey
    best: Params
    """The average with the least validation loss so far; without validation, the newest."""
    best_loss: Any
    best_step: Any


class Task(NamedTuple):
    """What is trained."""

    loss: Loss
    """Of one example."""
    draw: Draw | None = None
    """Makes a batch on the device; None where batches come from the host."""
    validate: Validate | None = None


class Settings(NamedTuple):
    """How a run is trained."""

    steps: int
    rate: float = 1e-3
    """>= 0."""
    decay: float = 0.999
    """Of the EMA, in [0, 1]."""
    every: int = 500
    """Steps between validations, checkpoints and reports, >= 1."""
    warmup: int = 0
    """Steps in which the rate rises from 0; where they are more than `steps`, the rate never gets to its height."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls to 0 by the last step, after the warm-up; or that it stays."""
    clip: float | None = 1.0
    """Largest norm of a gradient, > 0; None for no limit."""
    weight_decay: float = 0.0
    """Decoupled (AdamW), relative to the rate, >= 0."""
    patience: int | None = None
    """Stop when the validation loss has not improved for so many steps; None or 0: never."""


def adam(settings: Settings) -> optax.GradientTransformation:
    """Adam (AdamW where there is weight decay) with clipped gradients and a schedule for the rate.

    Raises:
      ValueError: a setting is out of its range.
    """
    check_settings(settings)
    rate, warmup, steps = settings.rate, settings.warmup, settings.steps
    first = 0.0 if warmup else rate
    if settings.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(first, rate, warmup, max(steps, warmup + 1))
    elif settings.schedule == "linear":
        rise, fall = (
            optax.linear_schedule(first, rate, warmup),
            optax.linear_schedule(rate, 0.0, max(steps - warmup, 1)),
        )
        schedule = optax.join_schedules([rise, fall], [warmup])
    else:
        schedule = optax.warmup_constant_schedule(first, rate, warmup)
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=settings.weight_decay))


def check_settings(settings: Settings) -> None:
    """Raises ValueError where a setting is out of the range that `Settings` states."""
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
    """The state before the first step.  It holds copies, because a donated buffer must not be held twice."""
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

    Args:
      loss: of one example.
      decay: of the EMA; the first steps use (1 + step) / (10 + step) where that is less.
      placement: of the training.  The devices on its axis `data` share the batch: each takes the gradient of a part,
        and one all-reduce makes the mean.  Where the loss of an example depends on the others of its batch, the
        compiler splits the work.  A fully sharded array is gathered before it is used, once a step, and its gradient
        is reduced to the parts.  The step of one of K runs is called inside `shard_map` over the mesh.

    Raises:
      ValueError: decay is not in [0, 1]; or, from the step, the arrays of the batch have no rows, or not as many.
    """
    check.number("training: decay", decay, at_least=0, at_most=1)
    batch_loss = losses.mean(loss)

    def here(params: Params, keys: PRNGKey, batch: Any, over: Any) -> tuple[Scalar, Params]:
        return jax.lax.pmean(jax.value_and_grad(losses.with_keys(loss))(params, keys, batch), over)

    def of_parts(params: Params, keys: PRNGKey, batch: Any, places: Any) -> tuple[Scalar, Params]:
        # Once a step: `jax.checkpoint`, to gather again in the backward pass, keeps more than it lets go.
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
            mine = lambda a: jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("data") * size, size)
            return here(params, mine(keys), jax.tree.map(mine, batch), "data")
        split, places = jax.P("data"), jax.P()
        # Over copies of a part too, so that they stay the same where sums have no fixed order.
        of_part = partial(here, over=distributed.EVERY_DEVICE)
        if placement.fully_sharded:
            places = jax.tree.map(lambda sharding: sharding.spec, placement.of_state(params))
            of_part = partial(of_parts, places=places)
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
        # Scans and checkpoints need a state that keeps its types; JAX's own error would not name the array.
        chex.assert_trees_all_equal_shapes_and_dtypes(state, moved)
        return moved, dict(zip(METRICS, (value, optax.tree.norm(gradient)), strict=True))

    return step


def _gathered(part: Array, place: jax.P) -> Array:
    """Inside `shard_map`, the whole of an array of which a device has a part; the transpose is `psum_scatter`."""
    if "data" not in place:
        return part
    return jax.lax.all_gather(part, "data", axis=tuple(place).index("data"), tiled=True)


def _mean(gradient: Array, place: jax.P) -> Array:
    """Inside `shard_map`, the mean over the devices of a gradient, of which the transpose of `_gathered` is the sum."""
    if "data" not in place:
        return jax.lax.pmean(gradient, distributed.EVERY_DEVICE)
    mean = gradient / jax.lax.axis_size("data")
    return jax.lax.pmean(mean, "replica") if jax.lax.axis_size("replica") > 1 else mean


def select(state: State, validate: Validate | None) -> tuple[State, Metrics]:
    """Keep the average as `best` if it validates better than the best so far; without `validate`, always."""
    if validate is None:
        return state._replace(best=state.averaged, best_step=state.step), {}
    value = jnp.asarray(validate(state.averaged), jnp.float32)  # also under x64: a state keeps its types
    better = value < state.best_loss
    best = jax.tree.map(partial(jnp.where, better), state.averaged, state.best)
    best_step = jnp.where(better, state.step, state.best_step)
    best_loss = jnp.where(better, value, state.best_loss)
    return state._replace(best=best, best_loss=best_loss, best_step=best_step), {"validation_loss": value}


def make_drawn_step(
    step: Callable[[State, Any], tuple[State, Metrics]], draw: Draw, placement: Placement | None = None
) -> Callable[[State], tuple[State, Metrics]]:
    """A step on a batch that is drawn on the device."""

    def drawn_step(state: State) -> tuple[State, Metrics]:
        # Not below the step's own key: `split(key, n)[i]` of its examples is `fold_in(key, i)`.
        batch = draw(jax.random.fold_in(jax.random.fold_in(state.key, np.uint32(2**32 - 1)), state.step))
        if placement is not None and not placement.runs:
            batch = distributed.split_batch(placement.mesh, batch)
        return step(state, batch)

    return drawn_step


def repeated(
    drawn_step: Callable[[State], tuple[State, Metrics]], state: State, count: Int[Array, ""]
) -> tuple[State, Metrics]:
    """`count` steps from `state`, in a loop that is one program for all counts; the metrics are sums."""

    def body(_: Any, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
        moved, metrics = drawn_step(carry[0])
        return moved, jax.tree.map(jnp.add, carry[1], metrics)

    none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(drawn_step, state)[1])
    return jax.lax.fori_loop(0, count, body, (state, none))


def finished(step: Any, best_step: Any, settings: Settings) -> Any:
    """Whether a run ends at this step; of several runs, arrays."""
    if not settings.patience:
        return step >= settings.steps
    return (step >= settings.steps) | (step - best_step >= settings.patience)


def packed(state: State) -> dict[str, Any]:
    """The arrays of a state as a flat dict, to store it as the result of a phase; `unpacked` gives the state back."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}


def unpacked(arrays: dict[str, Any], params: Params, settings: Settings) -> State:
    """The state that was `packed`; `params` and `settings` say of what structure."""
    key = jax.random.key(0)
    start = lambda key, params: init(key, params, adam(settings))
    like = jax.eval_shape(start, key, params)._replace(key=jax.random.key_data(key))
    state = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in sorted(arrays)])
    return state._replace(key=jax.random.wrap_key_data(state.key))
