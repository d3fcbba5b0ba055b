"""The compiled programs of an experiment, described by shapes: what `tpu.plan` compiles for slices of TPUs.

`Experiment.programs(config)` names them.  Nothing is executed and nothing is allocated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gendiff import check, devices, distributed, programs, training
from gendiff.devices import Placement

Tree = Any
Lower = Callable[[jax.sharding.Mesh, int], Any]
"""(mesh, batch) -> `jax.stages.Lowered`."""


class Program(NamedTuple):
    """One compiled program of an experiment."""

    kind: Literal["training", "sharded", "replicas", "sampling"]
    """Decides which collectives it may have."""
    what: str
    batch: int
    """Examples, runs or samples of one call, which the devices share."""
    unit: str
    steps: int
    """Of the loop whose body the compiler's costs are of: training steps, or the sampler's."""
    lower: Lower
    divides: bool = True
    """Whether devices share the batch only if they divide it, as in trainings; samplers and replicas pad."""
    chunk: int | None = None
    """Samples at a time and device, of samplers."""
    setup: Lower | None = None
    """The work of a sampler before its loop."""
    costs: Lower | None = None
    """One step of a training on a given batch.  Its costs count for the training's, because XLA counts a whole pool as
    read of which a step draws some rows."""
    mesh: Callable[[list[jax.Device], int], jax.sharding.Mesh] | None = None
    """(devices, batch) -> the experiment's mesh; default: `distributed.training_mesh`."""

    def on(self, places: list[jax.Device], batch: int) -> jax.sharding.Mesh:
        """The mesh of these devices."""
        if self.mesh is not None:
            return self.mesh(places, batch)
        return distributed.training_mesh(batch if self.divides else None, places)


# Shapes.


def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """A shape."""
    return jax.ShapeDtypeStruct(shape, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
NUMBER, WHOLE = of(()), of((), jnp.int32)


def shapes(tree: Tree) -> Tree:
    """Shapes in place of arrays."""
    return jax.tree.map(lambda a: of(jnp.shape(a), jnp.result_type(a)), tree)


def placed(tree: Tree, sharding: Any) -> Tree:
    """Shapes with a sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def many(tree: Tree, n: int) -> Tree:
    """n of a tree of shapes, stacked on axis 0."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), tree)


def abstract(make: Callable[..., training.Training], *arguments: Tree) -> training.Training:
    """The training of `make(*arguments)` with shapes for its arrays; arguments may be shapes."""
    found: list[training.Training] = []

    def arrays(*arguments: Tree) -> tuple:
        found.append(make(*arguments))
        return found[0].key, found[0].params, found[0].context

    key, params, context = jax.eval_shape(arrays, *arguments)
    return found[0]._replace(key=key, params=params, context=context)


# Trainings, whose arrays are shapes.


def trained(
    kind: Literal["training", "sharded"], what: str, unit: str, batch: int, pool: bool,
    asked: Callable[[int], training.Training],
) -> Program:  # fmt: skip
    """A training of one run.

    Args:
      pool: its batches are drawn from much more than a batch.
      asked: batch -> the training.
    """
    lower = lambda mesh, batch: steps(asked(batch), Placement(mesh, fully_sharded=kind == "sharded"))
    costs = (lambda mesh, batch: step(asked(batch), Placement(mesh))) if pool else None
    return Program(kind, what, batch, unit, asked(batch).settings.steps, lower, costs=costs)


def side_by_side(what: str, runs: int, asked: Callable[[int], training.Training]) -> Program:
    """A training of K runs; `asked`: K -> the training, with its `own` context stacked."""

    def lower(mesh: jax.sharding.Mesh, runs: int) -> Any:
        return steps(padded(asked(runs), mesh), placement_of(asked(runs), mesh))

    def costs(mesh: jax.sharding.Mesh, runs: int) -> Any:
        return step(padded(asked(runs), mesh), placement_of(asked(runs), mesh))

    mesh = lambda places, runs: devices.runs_mesh(places, runs, training.shareable(asked(runs)))
    return Program(
        "replicas", what, runs, "runs", asked(runs).settings.steps, lower, False, costs=costs, mesh=mesh
    )  # fmt: skip


def placement_of(asked: training.Training, mesh: jax.sharding.Mesh) -> Placement:
    """The placement of K runs."""
    return Placement(mesh, True, tuple(jax.tree.leaves(jax.tree.broadcast(asked.own, asked.context))))


def padded(asked: training.Training, mesh: jax.sharding.Mesh) -> training.Training:
    """The training with the runs that fill up the mesh."""
    count = devices.padded_runs(mesh, check.rows("runs", asked.key))
    longer = lambda tree: jax.tree.map(lambda a: of((count, *a.shape[1:]), a.dtype), tree)
    flags = jax.tree.broadcast(asked.own, asked.context)
    context = jax.tree.map(lambda own, a: longer(a) if own else a, flags, asked.context)
    return asked._replace(key=longer(asked.key), params=longer(asked.params), context=context)


def steps(asked: training.Training, placement: Placement) -> Any:
    """Lower the steps as `training.train` calls them: a loop over one step."""
    state, context = _arguments(asked, placement)
    count = placed(many(WHOLE, asked.key.shape[0]) if placement.runs else WHOLE, _rows(placement))
    return programs.steps_at_once.lower(asked.task, asked.settings, placement, state, context, count)


def step(asked: training.Training, placement: Placement) -> Any:
    """Lower one step on a given batch, of K runs on one for each."""
    state, context = _arguments(asked, placement)
    draw = lambda key, context: _drawn(asked.task(context), key)
    if placement.runs:
        own, shared = placement.divide(asked.context)
        of_run = placement.join(jax.tree.structure(asked.context), [of(a.shape[1:], a.dtype) for a in own], shared)
        batch = many(jax.eval_shape(draw, KEY, of_run), asked.key.shape[0])
        batch = placed(batch, devices.over_replicas(placement.mesh))
    else:
        batch = placed(jax.eval_shape(draw, KEY, asked.context), distributed.split(placement.mesh))
    return programs.step_on_batch.lower(asked.task, asked.settings, placement, state, context, batch)


def _drawn(task: training.Task, key: Any) -> Any:
    assert task.draw is not None
    return task.draw(key)


def _rows(placement: Placement) -> jax.sharding.Sharding:
    mesh = placement.mesh
    return devices.over_replicas(mesh) if placement.runs else distributed.replicated(mesh)


def _arguments(asked: training.Training, placement: Placement) -> tuple[Tree, Tree]:
    """State and context on the devices."""
    state = jax.eval_shape(partial(programs.begin, asked.settings), asked.key, asked.params)
    places = placement.of_state(state)
    state = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state, places)
    own, shared = placement.divide(asked.context)
    own = placed(own, _rows(placement))
    shared = placed(shared, distributed.replicated(placement.mesh))
    return state, placement.join(jax.tree.structure(asked.context), own, shared)
