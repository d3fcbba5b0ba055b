"""The programs of an experiment, described by shapes, which `tpu.plan` compiles for slices of TPUs.

`Experiment.programs(config)` builds them from the experiment's own trainings and samplers.  Nothing is executed, and
the largest array is a pool on the host.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments.lab.phases import Run
from gendiff import devices, distributed, programs, training
from gendiff.devices import Placement

Tree = Any
Lower = Callable[[jax.sharding.Mesh, int], Any]
"""(mesh, batch) -> `jax.stages.Lowered`."""


class Program(NamedTuple):
    """One compiled program of an experiment."""

    kind: Literal["training", "sharded", "replicas", "sampling"]
    """Decides its permitted collectives."""
    what: str
    batch: int
    """Examples, runs or samples of a call, which the devices share."""
    unit: str
    steps: int
    """Iterations of the loop whose body the compiler's costs describe: training steps, or sampler steps."""
    lower: Lower
    divides: bool = True
    """Devices share the batch only if they divide it, as in trainings; samplers and replicas pad."""
    chunk: int | None = None
    """Of samplers: samples at a time on a device."""
    setup: Lower | None = None
    """The work of a sampler before its loop."""
    costs: Lower | None = None
    """One training step on a batch.  Its costs stand for the training's, because XLA counts the entire pool as read
    although a step draws only some rows."""
    mesh: Callable[[list[jax.Device]], jax.sharding.Mesh] | None = None
    """Devices -> the experiment's mesh; default: `distributed.training_mesh`."""

    def on(self, places: list[jax.Device], batch: int) -> jax.sharding.Mesh:
        if self.mesh is not None:
            return self.mesh(places)
        return distributed.training_mesh(batch if self.divides else None, places)


# Shapes.


def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
NUMBER, WHOLE = of(()), of((), jnp.int32)


def placed(tree: Tree, sharding: Any) -> Tree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def many(tree: Tree, n: int) -> Tree:
    """A tree of shapes, stacked n times on axis 0."""
    return jax.tree.map(lambda a: of((n, *a.shape), a.dtype), tree)


def first(tree: Tree) -> Tree:
    """A member of stacked shapes."""
    return jax.tree.map(lambda a: of(a.shape[1:], a.dtype), tree)


def abstract(make: Callable[..., training.Training], *arguments: Tree) -> training.Training:
    """The training of `make(*arguments)` with shapes for its arrays; arguments may be shapes."""
    trainings: list[training.Training] = []

    def arrays(*arguments: Tree) -> tuple:
        trainings.append(make(*arguments))
        return trainings[0].key, trainings[0].params, trainings[0].context

    key, params, context = jax.eval_shape(arrays, *arguments)
    return trainings[0]._replace(key=key, params=params, context=context)


def planned(config: Any, data: Any = None) -> Run:
    """A run without a folder, whose trainings `abstract` describes; its data may be shapes."""
    nowhere: Any = None
    run = Run(config, config.seed, nowhere, nowhere, nowhere)
    run.data = data
    return run


# Programs.


def trained(
    what: str, unit: str, batch: int, job: Callable[[int], training.Training], pool: bool = False
) -> Program:  # fmt: skip
    """Describe a training of one run.

    Args:
      job: batch -> the training, of shapes.
      pool: a step draws its batch from a much larger pool.
    """
    job = cache(job)
    settings, host = job(batch).settings, job(batch).host
    place = lambda mesh: Placement(mesh, fully_sharded=host.fully_sharded)
    return Program(
        "sharded" if host.fully_sharded else "training", what, batch, unit, settings.steps,
        lambda mesh, batch: steps(job(batch), place(mesh)),
        costs=(lambda mesh, batch: step(job(batch), place(mesh))) if pool else None,
    )  # fmt: skip


def side_by_side(what: str, job: training.Training) -> Program:
    """Describe a training of K runs, of shapes, on the mesh of `training.train`."""
    flags = tuple(jax.tree.leaves(jax.tree.broadcast(job.own, job.context)))
    place = lambda mesh: Placement(mesh, True, flags)
    runs = job.key.shape[0]
    return Program(
        "replicas", what, runs, "runs", job.settings.steps,
        lambda mesh, batch: steps(padded(job, mesh), place(mesh)), divides=False,
        costs=lambda mesh, batch: step(padded(job, mesh), place(mesh)),
        mesh=lambda places: devices.runs_mesh(places, runs, training.shareable(job)),
    )  # fmt: skip


def sampler(
    what: str, n: int, steps: int, chunk: int, program: Any, call: Callable[[int], tuple[tuple, tuple]],
    setup: Lower | None = None,
) -> Program:  # fmt: skip
    """Describe a sampler.

    Args:
      program: the jitted function of static arguments, a mesh, and arrays.
      call: number of samples -> the static arguments, and the shapes of the arrays.
    """

    def lower(mesh: jax.sharding.Mesh, n: int) -> Any:
        static, arrays = call(n)
        return program.lower(*static, mesh, *placed(tuple(arrays), distributed.replicated(mesh)))

    return Program("sampling", what, n, "samples", steps, lower, False, chunk, setup)


# Trainings, whose arrays are shapes.


def padded(job: training.Training, mesh: jax.sharding.Mesh) -> training.Training:
    """The training of K runs, padded to fill the mesh."""
    count = devices.padded_runs(mesh, job.key.shape[0])
    longer = lambda tree: jax.tree.map(lambda a: of((count, *a.shape[1:]), a.dtype), tree)
    flags = jax.tree.broadcast(job.own, job.context)
    context = jax.tree.map(lambda own, a: longer(a) if own else a, flags, job.context)
    return job._replace(key=longer(job.key), params=longer(job.params), context=context)


def steps(job: training.Training, placement: Placement) -> Any:
    """Lower the loop of steps that `training.train` calls."""
    state, context = _arguments(job, placement)
    count = placed(many(WHOLE, job.key.shape[0]) if placement.runs else WHOLE, _rows(placement))
    return programs.steps_at_once.lower(job.task, job.settings, placement, state, context, count)


def step(job: training.Training, placement: Placement) -> Any:
    """Lower one step on a batch; K runs have a batch for each run."""
    state, context = _arguments(job, placement)
    draw = lambda key, context: _drawn(job.task(context), key)
    if placement.runs:
        own, shared = placement.divide(job.context)
        of_run = placement.join(jax.tree.structure(job.context), first(own), shared)
        batch = many(jax.eval_shape(draw, KEY, of_run), job.key.shape[0])
        batch = placed(batch, devices.over_replicas(placement.mesh))
    else:
        batch = placed(jax.eval_shape(draw, KEY, job.context), distributed.split(placement.mesh))
    return programs.step_on_batch.lower(job.task, job.settings, placement, state, context, batch)


def _drawn(task: training.Task, key: Any) -> Any:
    assert task.draw is not None
    return task.draw(key)


def _rows(placement: Placement) -> jax.sharding.Sharding:
    mesh = placement.mesh
    return devices.over_replicas(mesh) if placement.runs else distributed.replicated(mesh)


def _arguments(job: training.Training, placement: Placement) -> tuple[Tree, Tree]:
    """State and context on the devices."""
    state = jax.eval_shape(partial(programs.begin, job.settings), job.key, job.params)
    places = placement.of_state(state)
    state = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state, places)
    own, shared = placement.divide(job.context)
    own = placed(own, _rows(placement))
    shared = placed(shared, distributed.replicated(placement.mesh))
    return state, placement.join(jax.tree.structure(job.context), own, shared)
