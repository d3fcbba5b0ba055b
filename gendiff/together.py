"""Runs side by side: each is written as if it were alone, and what they compute alike becomes one program.

A run is a thread, and one thread is at work at a time, so that nothing depends on chance.  At a call that is made for
it (a training, a sampler) a run waits until the others have come to one too, or have ended.  Calls that agree in
function, settings and shapes are then made as one, over the axis `replica` of a mesh; the others one after the other.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gendiff import devices, distributed, potential, training
from gendiff.training import Host, Metrics, State, Training

T = TypeVar("T")
_here = threading.local()


class Call(NamedTuple):
    """What a run asks for."""

    like: Hashable
    """Calls that are equal in this can be made as one."""
    given: Any
    alone: Callable[[Any], Any]
    """given -> result."""
    several: Callable[[list[Any]], list[Any]]
    """What several runs gave -> their results."""


class Outcome(NamedTuple, Generic[T]):
    """How a run ended: with a value, or with an error."""

    value: T | None
    error: BaseException | None


class _Member(threading.Thread):
    """A run, which works between `advance` and its next call."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.outcome = work, Outcome[Any](None, None)
        self.going, self.back = threading.Event(), threading.Event()
        self.call: Call | None = None
        self.answer = Outcome[Any](None, None)

    def run(self) -> None:
        _here.member = self
        training.instead.set(_train)
        self._pause()
        try:
            self.outcome = Outcome(self.work(), None)
        except BaseException as error:
            self.outcome = Outcome(None, error)
        self.call = None
        self.back.set()

    def _pause(self) -> None:
        self.going.wait()
        self.going.clear()

    def ask(self, call: Call) -> Any:
        self.call = call
        self.back.set()
        self._pause()
        if self.answer.error is not None:
            raise self.answer.error
        return self.answer.value

    def advance(self) -> bool:
        """Works until the next call, and says whether there is one."""
        self.going.set()
        self.back.wait()
        self.back.clear()
        return self.call is not None


def runs(works: Sequence[Callable[[], T]], note: Callable[[int, int], None] = lambda calls, as_one: None) -> list:
    """Does all works, side by side, and returns an `Outcome` for each.

    Args:
      note: called for each call that was made, with the number of runs that it was made for: (calls so far, runs).
    """
    members = [_Member(work) for work in works]
    for member in members:
        member.start()
    calls = 0
    waiting = members
    while waiting := [member for member in waiting if member.advance()]:
        groups: dict[Hashable, list[_Member]] = {}
        for member in waiting:
            assert member.call is not None
            groups.setdefault(member.call.like, []).append(member)
        for group in groups.values():
            calls += 1
            note(calls, len(group))
            _answer(group)
    return [member.outcome for member in members]


def _answer(group: list[_Member]) -> None:
    wanted = [member.call for member in group if member.call is not None]
    if len(group) > 1:
        try:
            values = wanted[0].several([call.given for call in wanted])
        except (ArithmeticError, ValueError):
            pass  # of one of them: each alone, so that the others have their results
        except BaseException as error:  # of all: a notice, a full disk
            for member in group:
                member.answer = Outcome(None, error)
            return
        else:
            for member, value in zip(group, values, strict=True):
                member.answer = Outcome(value, None)
            return
    for member, call in zip(group, wanted, strict=True):
        try:
            member.answer = Outcome(call.alone(call.given), None)
        except BaseException as error:
            member.answer = Outcome(None, error)


def meet(like: Hashable, given: Any, alone: Callable[[Any], T], several: Callable[[list[Any]], list[T]]) -> T:
    """`alone(given)`; in a run among others, made together with theirs where `like` is equal."""
    member = getattr(_here, "member", None)
    return alone(given) if member is None else member.ask(Call(like, given, alone, several))


def call(program: Any, static: tuple, mesh: jax.sharding.Mesh | None, given: tuple) -> Any:
    """`program(*static, mesh, *given)`, a jitted function whose arguments before `given` are static.

    Runs side by side get theirs from one program, each on a device of its own, where that leaves no accelerator idle.
    """

    def alone(given: tuple) -> Any:
        return program(*static, mesh, *distributed.place(mesh, given))

    def several(many: list[tuple]) -> list[Any]:
        over = devices.runs_mesh(None, len(many), jax.device_count())
        if over.shape["data"] > 1:  # they would leave devices idle, and each of them alone can use all
            return [alone(each) for each in many]
        found = distributed.gather(
            _side_by_side(program.__wrapped__, static, over, devices.spread(over, devices.stack(many)))
        )
        return [jax.tree.map(lambda a, k=k: a[k], found) for k in range(len(many))]

    return meet(("call", program, static, shapes(given)), given, alone, several)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _side_by_side(function: Callable[..., Any], static: tuple, mesh: jax.sharding.Mesh, given: tuple) -> Any:
    one = lambda given: function(*static, None, *given)
    each = jax.P("replica")
    here = partial(potential.over_members, one)
    return jax.shard_map(here, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)(given)


def shapes(tree: Any) -> Hashable:
    """Structure, shapes and types of a tree, to compare."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)


# Trainings.


def _train(asked: Training) -> State:
    """A training that a run asks for, made together with those that differ in keys, parameters, contexts and hosts
    alone."""
    by_itself = (
        isinstance(asked.params, State) or asked.data is not None or asked.host.fully_sharded or np.ndim(asked.key) > 0
    )
    like = object() if by_itself else ("train", asked.task, asked.settings, shapes((asked.params, asked.context)))
    return meet(like, asked, lambda asked: training.train(*asked), _train_all)


def _train_all(asked: list[Training]) -> list[State]:
    first, hosts = asked[0], [of_run.host for of_run in asked]
    kept = [host.checkpoints for host in hosts]
    if None in kept and any(checkpoints is not None for checkpoints in kept):
        raise ValueError("together: checkpoints must be of all runs or of none, got some")
    several = None if None in kept else _Several(kept)

    def report(step: int, metrics: list[Metrics | None]) -> None:
        for host, of_run in zip(hosts, metrics, strict=True):
            if of_run is not None:
                host.report(step, of_run)

    keys, params, contexts = devices.stack([(of_run.key, of_run.params, of_run.context) for of_run in asked])
    host = Host(checkpoints=several, report_runs=report)
    state = training.train(keys, params, first.task, contexts, first.settings, host, own=True)
    return [_of_run(state, k) for k in range(len(asked))]


def _of_run(state: State, k: int) -> State:
    """The state of run k.  Copy the keys, because the caller reuses them."""
    return jax.tree.map(lambda a: a[k], state._replace(key=jax.random.clone(state.key)))


class _Several:
    """Checkpoints of runs side by side, each in the place of its own."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = kept

    def save(self, step: int, state: State, data: None = None) -> None:
        for k, (checkpoints, stands) in enumerate(zip(self.kept, distributed.gather(state.step), strict=True)):
            if stands == step:  # else it has ended, and is stored
                checkpoints.save(step, _of_run(state, k))

    def restore(self, state: State, data: None = None) -> State:
        return devices.stack([checkpoints.restore(_of_run(state, k)) for k, checkpoints in enumerate(self.kept)])

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for checkpoints in self.kept:
                stack.enter_context(checkpoints.written())
            yield
