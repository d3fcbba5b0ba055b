"""Runs side by side: each is written as if it were alone, and what they compute alike becomes one program.

A run is a thread, and one thread is at work at a time, so that nothing depends on chance.  At a call that is made for
it (a training, a sampler) a run waits until the others have come to one too, or have ended.  Calls that agree in
function, settings and shapes are then made as one, over the axis `replica` of a mesh; the others one after the other.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gendiff import check, distributed, potential

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
        over = over_runs(None, len(many), jax.device_count())
        if over.shape["data"] > 1:  # they would leave devices idle, and each of them alone can use all
            return [alone(each) for each in many]
        found = distributed.gather(_side_by_side(program.__wrapped__, static, over, spread(over, stack(many))))
        return [jax.tree.map(lambda a, k=k: a[k], found) for k in range(len(many))]

    return meet(("call", program, static, shapes(given)), given, alone, several)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _side_by_side(function: Callable[..., Any], static: tuple, mesh: jax.sharding.Mesh, given: tuple) -> Any:
    one = lambda given: function(*static, None, *given)
    each = jax.P("replica")
    here = partial(potential.over_members, one)
    return jax.shard_map(here, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)(given)


def over_runs(
    devices: list[jax.Device] | None = None, runs: int | None = None, batch: int | None = None
) -> jax.sharding.Mesh:
    """A mesh with all devices, or the given ones, on the axis `replica`.

    Args:
      runs: how many there are.  Accelerators that they would leave idle go to the axis `data`: 5 runs on 16 devices are
        all on each of them, with a 16th of their batches, 6 runs on 4 devices half of them on two each.
      batch: examples of a step of a run, which `data` must divide.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if runs is None or batch is None or devices[0].platform == "cpu":
        return distributed.make_mesh(devices, count)
    able = [each for each in range(1, count + 1) if count % each == 0 and batch % (count // each) == 0]
    # What a device computes, in examples of the batch: the least, and then with the fewest all-reduces.
    return distributed.make_mesh(devices, min(able, key=lambda each: (-(-runs // each) * each, -each)))


def spread(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Arrays with a row for each run, split over `replica`; the last run again where they do not come out even."""
    runs, places = check.rows("together: runs", tree), mesh.shape["replica"]
    rows = np.minimum(np.arange(-(-runs // places) * places), runs - 1)
    return distributed.put(jax.tree.map(lambda a: a[rows], tree), jax.NamedSharding(mesh, jax.P("replica")))


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal structure and shapes on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def shapes(tree: Any) -> Hashable:
    """Structure, shapes and types of a tree, to compare."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)
