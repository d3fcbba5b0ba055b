"""The compiled programs of a training, shared by equal tasks (`gendiff.static`), settings and placements."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gendiff import distributed
from gendiff.devices import Placement
from gendiff.steps import Metrics, Settings, State, Task, adam, init, make_drawn_step, make_step, repeated, select
from gendiff.types import Params, PRNGKey


@partial(jax.jit, static_argnums=0)
def begin(settings: Settings, key: PRNGKey, params: Params) -> State:
    """The state of one run, or K runs, before the first step."""
    of_run = lambda key, params: init(key, params, adam(settings))
    return jax.vmap(of_run)(key, params) if key.ndim else of_run(key, params)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def steps_at_once(
    task: Callable[[Any], Task],
    settings: Settings,
    placement: Placement,
    state: State,
    context: Any,
    count: Int[Array, "*runs"],
) -> tuple[State, Metrics]:
    """`count` steps of a task that draws its batches, one program for all counts; the metrics are sums.

    Donates the state.  A count of 0 leaves a run unchanged.
    """

    def of_run(state: State, context: Any, count: Int[Array, ""]) -> tuple[State, Metrics]:
        loss, draw, *_ = task(context)
        if draw is None:
            raise ValueError("training: data must be batches from the host where the task draws none, got None")
        step = make_step(loss, adam(settings), settings.decay, placement)
        return repeated(_staying(placement, make_drawn_step(step, draw, placement)), state, count)

    return _over_runs(placement, of_run, state, context, count)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def step_on_batch(
    task: Callable[[Any], Task], settings: Settings, placement: Placement, state: State, context: Any, batch: Any
) -> tuple[State, Metrics]:
    """One step on a batch, or on K batches stacked on axis 0.  Donates the state."""

    def of_run(state: State, context: Any, batch: Any) -> tuple[State, Metrics]:
        step = make_step(task(context).loss, adam(settings), settings.decay, placement)
        return _staying(placement, lambda state: step(state, batch))(state)

    return _over_runs(placement, of_run, state, context, batch)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def validated(
    task: Callable[[Any], Task], placement: Placement, state: State, context: Any, going: Bool[Array, "*runs"]
) -> tuple[State, Metrics]:
    """Choose the best parameters of runs that are `going`; returns the state and the validation loss."""

    def of_run(state: State, context: Any, going: Bool[Array, ""]) -> tuple[State, Metrics]:
        validate = task(context).validate
        if not placement.runs:
            return select(state, validate)

        def choose() -> tuple[Any, Metrics]:
            chosen, metrics = select(state, validate)
            return (chosen.best, chosen.best_loss, chosen.best_step), metrics

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(choose)[1])
        before = state.best, state.best_loss, state.best_step
        (best, best_loss, best_step), metrics = jax.lax.cond(going, choose, lambda: (before, zeros))
        return state._replace(best=best, best_loss=best_loss, best_step=best_step), metrics

    return _over_runs(placement, of_run, state, context, going)


def _staying(placement: Placement, step: Callable[[State], tuple[State, Metrics]]) -> Callable:
    """Constrain the result of a step to the sharding of its state."""
    if placement.runs:
        return step

    def placed(state: State) -> tuple[State, Metrics]:
        moved, metrics = step(state)
        return jax.lax.with_sharding_constraint(moved, placement.of_state(state)), metrics

    return placed


def _over_runs(placement: Placement, of_run: Callable, state: State, context: Any, rows: Any) -> Any:
    """`of_run(state, context, rows)`, over all runs."""
    if not placement.runs:
        return of_run(state, context, rows)
    return placement.over_runs(lambda run, context: of_run(run[0], context, run[1]), (state, rows), context)


@partial(jax.jit, static_argnums=(0, 1))
def without_padding(placement: Placement, runs: int, state: State) -> State:
    """Drop the padding runs and replicate.  Copy the keys, because the caller reuses them.

    One program for all arrays, because concurrent programs of several processes would block each other.
    """
    first = jax.tree.map(lambda a: a[:runs], state._replace(key=jax.random.clone(state.key)))
    return jax.lax.with_sharding_constraint(first, distributed.replicated(placement.mesh))
