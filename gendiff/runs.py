"""Several runs (seeds, configurations) at once: runs that agree share a program, over the mesh's axis `replica`.

Runs agree if their functions, settings, shapes and types are equal; other runs go one after the other.  A run gives the
numbers that it gives alone.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gendiff import devices, distributed, potential, training
from gendiff.devices import Placement
from gendiff.training import Host, Metrics, State, Training


def call(program: Any, static: tuple, mesh: jax.sharding.Mesh | None, arguments: Sequence[tuple]) -> list[Any]:
    """Call `program(*static, mesh, *arguments[k])`, a jitted function, for every run k.

    Runs that agree go side by side on their own devices, unless that leaves accelerators idle.
    """
    results: list[Any] = [None] * len(arguments)
    for group in _groups([shapes(of_run) for of_run in arguments]):
        over = devices.runs_mesh(None, len(group), jax.device_count())
        if len(group) == 1 or over.shape["data"] > 1:  # a run alone uses devices that a group would leave idle
            for k in group:
                results[k] = program(*static, mesh, *distributed.place(mesh, arguments[k]))
            continue
        joined, own = _joined([(np.int32(k), arguments[k]) for k in group])  # a number, if runs share the rest
        placement = Placement(over, True, own)
        placed = placement.put_context(joined)
        outputs = distributed.gather(_side_by_side(program.__wrapped__, static, placement, placed))
        for row, k in enumerate(group):
            results[k] = jax.tree.map(lambda a: a[row], outputs)  # noqa: B023 (used at once)
    return results


@partial(jax.jit, static_argnums=(0, 1, 2))
def _side_by_side(function: Callable[..., Any], static: tuple, placement: Placement, arguments: tuple) -> Any:
    return placement.over_runs(lambda _, arguments: function(*static, None, *arguments[1]), (), arguments)


def _joined(trees: Sequence[Any]) -> tuple[Any, tuple[bool, ...]]:
    """Stack the trees of several runs, and flag the leaves that have a row a run.

    An array that is one object in all runs, such as a data set, stays single.
    """
    leaves, structure = jax.tree.flatten(trees[0])
    columns = list(zip(leaves, *(jax.tree.leaves(tree) for tree in trees[1:]), strict=True))
    own = tuple(not np.ndim(column[0]) or any(leaf is not column[0] for leaf in column) for column in columns)
    joined = [potential.stacked(*column) if mine else column[0] for column, mine in zip(columns, own, strict=True)]
    return jax.tree.unflatten(structure, joined), own


def train(trainings: Sequence[Training]) -> list[State]:
    """Train all runs; runs that differ only in keys, parameters, contexts and hosts share a program.

    Raises:
      ValueError: only some of the runs have checkpoints; see also `training.train`.
      training.NotFinite: a loss of a run is NaN or infinite.
    """
    results: list[Any] = [None] * len(trainings)
    for group in _groups([_likeness(member) for member in trainings]):
        members = [trainings[k] for k in group]
        states = [training.train(*members[0])] if len(members) == 1 else _train(members)
        for k, state in zip(group, states, strict=True):
            results[k] = state
    return results


def _likeness(member: Training) -> Hashable:
    """A value that is equal for trainings that can share a program."""
    if member.data is not None or member.host.fully_sharded or np.ndim(member.key) > 0:
        return object()
    stands = int(member.params.step) if isinstance(member.params, State) else 0  # runs go on from one step
    return member.task, member.settings, stands, shapes((member.params, member.context))


def _groups(likenesses: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal elements, in the order of their first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for k, likeness in enumerate(likenesses):
        groups.setdefault(likeness, []).append(k)
    return list(groups.values())


def shapes(tree: Any) -> Hashable:
    """Structure, shapes and types of a tree, for comparison."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)


def _train(members: Sequence[Training]) -> list[State]:
    hosts = [member.host for member in members]
    checkpoints = [host.checkpoints for host in hosts]
    none = all(kept is None for kept in checkpoints)
    if None in checkpoints and not none:
        raise ValueError("runs: checkpoints must be of all runs or of none, got some")

    def report(step: int, metrics: list[Metrics | None]) -> None:
        for host, of_run in zip(hosts, metrics, strict=True):
            if of_run is not None:
                host.report(step, of_run)

    keys, params = potential.stacked(*((member.key, member.params) for member in members))
    context, flags = _joined([member.context for member in members])
    own = jax.tree.unflatten(jax.tree.structure(context), flags)
    host = Host(checkpoints=None if none else _Several(checkpoints), report_runs=report)
    state = training.train(keys, params, members[0].task, context, members[0].settings, host, own=own)
    return [_of_run(state, k) for k in range(len(members))]


def _of_run(state: State, k: int) -> State:
    """The state of run k.  Copy the keys, because the caller reuses them."""
    return jax.tree.map(lambda a: a[k], state._replace(key=jax.random.clone(state.key)))


class _Several:
    """The checkpoints of several runs, one folder a run."""

    def __init__(self, of_runs: list[Any]) -> None:
        self.of_runs = of_runs

    def save(self, step: int, state: State, data: None = None) -> None:
        for k, (checkpoints, run_step) in enumerate(zip(self.of_runs, distributed.gather(state.step), strict=True)):
            if run_step == step:  # else the run has ended, and its last state is saved
                checkpoints.save(step, _of_run(state, k))

    def restore(self, state: State, data: None = None) -> State:
        return potential.stacked(*(kept.restore(_of_run(state, k)) for k, kept in enumerate(self.of_runs)))

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for checkpoints in self.of_runs:
                stack.enter_context(checkpoints.written())
            yield
