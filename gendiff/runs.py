"""Several runs at once: calls and trainings that agree are computed as one program, over the mesh's axis `replica`.

A run (a seed, a configuration) is an element of a list.  Runs agree if their functions, settings, shapes and types are
equal; those that do not agree go one after the other.  A run gives the numbers that it gives alone.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gendiff import devices, distributed, potential, training
from gendiff.training import Host, Metrics, State, Training


def call(program: Any, static: tuple, mesh: jax.sharding.Mesh | None, arguments: Sequence[tuple]) -> list[Any]:
    """Call `program(*static, mesh, *arguments[k])` for each run k: a jitted function whose first arguments are static.

    Runs that agree share one program, each on a device of its own, unless that leaves accelerators idle.
    """
    results: list[Any] = [None] * len(arguments)
    for group in _groups([shapes(of_run) for of_run in arguments]):
        over = devices.runs_mesh(None, len(group), jax.device_count())
        if len(group) == 1 or over.shape["data"] > 1:  # together they would leave devices idle that one alone can use
            for k in group:
                results[k] = program(*static, mesh, *distributed.place(mesh, arguments[k]))
            continue
        spread = devices.spread(over, devices.stack([arguments[k] for k in group]))
        found = distributed.gather(_side_by_side(program.__wrapped__, static, over, spread))
        for row, k in enumerate(group):
            results[k] = jax.tree.map(lambda a: a[row], found)  # noqa: B023 (used at once)
    return results


@partial(jax.jit, static_argnums=(0, 1, 2))
def _side_by_side(function: Callable[..., Any], static: tuple, mesh: jax.sharding.Mesh, arguments: tuple) -> Any:
    here = partial(potential.over_members, lambda of_run: function(*static, None, *of_run))
    axis = jax.P("replica")
    return jax.shard_map(here, mesh=mesh, in_specs=axis, out_specs=axis, check_vma=False)(arguments)


def train(trainings: Sequence[Training]) -> list[State]:
    """Train every run, those that differ in keys, parameters, contexts and hosts alone in one program.

    Raises:
      ValueError: only some of the runs have checkpoints; see also `training.train`.
      training.NotFinite: a loss of one of them.
    """
    results: list[Any] = [None] * len(trainings)
    for group in _groups([_likeness(asked) for asked in trainings]):
        members = [trainings[k] for k in group]
        states = [training.train(*members[0])] if len(members) == 1 else _train(members)
        for k, state in zip(group, states, strict=True):
            results[k] = state
    return results


def _likeness(asked: Training) -> Hashable:
    if asked.data is not None or asked.host.fully_sharded or np.ndim(asked.key) > 0:
        return object()
    stands = int(asked.params.step) if isinstance(asked.params, State) else 0  # runs go on from one step
    return asked.task, asked.settings, stands, shapes((asked.params, asked.context))


def _groups(likenesses: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal elements, in the order of their first ones."""
    groups: dict[Hashable, list[int]] = {}
    for k, likeness in enumerate(likenesses):
        groups.setdefault(likeness, []).append(k)
    return list(groups.values())


def shapes(tree: Any) -> Hashable:
    """Structure, shapes and types of a tree, to compare."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)


def _train(members: Sequence[Training]) -> list[State]:
    hosts = [member.host for member in members]
    kept = [host.checkpoints for host in hosts]
    if None in kept and any(checkpoints is not None for checkpoints in kept):
        raise ValueError("runs: checkpoints must be of all runs or of none, got some")

    def report(step: int, metrics: list[Metrics | None]) -> None:
        for host, of_run in zip(hosts, metrics, strict=True):
            if of_run is not None:
                host.report(step, of_run)

    keys, params, contexts = devices.stack([(member.key, member.params, member.context) for member in members])
    host = Host(checkpoints=None if None in kept else _Several(kept), report_runs=report)
    state = training.train(keys, params, members[0].task, contexts, members[0].settings, host, own=True)
    return [_of_run(state, k) for k in range(len(members))]


def _of_run(state: State, k: int) -> State:
    """The state of run k.  Copy the keys, because the caller reuses them."""
    return jax.tree.map(lambda a: a[k], state._replace(key=jax.random.clone(state.key)))


class _Several:
    """The checkpoints of several runs, each in its own folder."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = kept

    def save(self, step: int, state: State, data: None = None) -> None:
        for k, (checkpoints, stands) in enumerate(zip(self.kept, distributed.gather(state.step), strict=True)):
            if stands == step:  # else the run has ended, and is stored
                checkpoints.save(step, _of_run(state, k))

    def restore(self, state: State, data: None = None) -> State:
        return devices.stack([checkpoints.restore(_of_run(state, k)) for k, checkpoints in enumerate(self.kept)])

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for checkpoints in self.kept:
                stack.enter_context(checkpoints.written())
            yield
