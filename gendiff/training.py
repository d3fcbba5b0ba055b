"""One way to train: K >= 1 runs in one program, from the host.

`train` places the state on the devices once (`gendiff.devices`) and calls compiled steps (`gendiff.programs`).  Between
them it validates, reports, saves checkpoints and checks for preemption.

K runs (seeds, goals, members, configurations) are independent: the program spreads them over the devices without a
collective.  Idle devices share the batches of a run, with one all-reduce a step.  A device runs its share as one
`vmap`; a CPU runs a loop, because the arrays of one run fit the cache.  Run k gives its own numbers, up to the order of
sums.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gendiff import check, devices, distributed, losses, programs
from gendiff.devices import Placement
from gendiff.steps import METRICS, Metrics, Settings, State, Task, check_settings, finished
from gendiff.types import Params, PRNGKey


class NotFinite(FloatingPointError):
    """A loss is NaN or infinite; the newest checkpoint is from the block before."""


class Host(NamedTuple):
    """The devices of a training, its checkpoints and its reports."""

    mesh: jax.sharding.Mesh | None = None
    """None: `distributed.training_mesh` of the batch; for K runs `devices.runs_mesh`."""
    checkpoints: Any = None
    """A `gendiff.checkpoint.Checkpoints`, or None."""
    report: Callable[[int, Metrics], None] = lambda step, metrics: None
    """(step, metrics), called at the start and after every block.  Metrics are floats, means over the active runs."""
    fully_sharded: bool = False
    """Split the state over the devices (FSDP), for models that are too large for one device."""
    report_runs: Callable[[int, list[Metrics | None]], None] = lambda step, metrics: None
    """As `report`, with the metrics of every run; None for a run that has ended."""


class Training(NamedTuple):
    """The arguments of `train`; `gendiff.runs.train` takes several as one program."""

    key: PRNGKey
    params: Params | State
    task: Callable[[Any], Task]
    context: Any
    settings: Settings
    host: Host = Host()
    data: Sequence | Iterator | None = None
    own: Any = False


def train(
    key: PRNGKey,
    params: Params | State,
    task: Callable[[Any], Task],
    context: Any,
    settings: Settings,
    host: Host = Host(),  # noqa: B008 (immutable)
    data: Sequence | Iterator | None = None,
    own: Any = False,
) -> State:
    """Train one run, or K runs in one program, and resume from the newest checkpoint.

    Args:
      key: () for one run, (K,) for K runs (see `keys`).
      params: parameters, or a `State` to continue, whose steps `settings.steps` includes; stacked on axis 0 for K runs.
      task: context -> Task of one run.  It is called inside `jit`, so that arrays in the context (data, teachers) are
        arguments of the program, not constants.  Equal functions (`gendiff.static`) share the program.
      context: a pytree of arrays.
      settings: of every run; `patience` ends runs one by one.
      host: K runs cannot be `fully_sharded`.
      data: batches from the host, for one run whose task draws none.  A sequence, whose element i is the batch of step
        i, resumes exactly; an iterator does if it has `get_state` and `set_state`, as Grain's.
      own: parts of the context with a leading axis K: True, False or a tree of both, a prefix of the context, as the
        axes of `jax.vmap`.

    Returns:
      The last state, replicated on every process, or on the host if fully sharded; stacked on axis 0 for K runs.  Its
      parameters are `last`, `averaged`, and `best` in validation.

    Raises:
      ValueError: a setting is out of range, a batch has no rows or arrays of different lengths, arrays are not of K
        runs, or K runs do not support an option.
      NotFinite: a loss is NaN or infinite.  The newest checkpoint has the state before that block.
      distributed.Preempted: after a notice; the newest checkpoint has the state.
    """
    check_settings(settings)
    arguments = Training(key, params, task, context, settings, host, data, own)
    placement = place(arguments)
    runs = len(arguments.key) if placement.runs else 1
    with contextlib.nullcontext() if host.checkpoints is None else host.checkpoints.written():
        state, first = _initial(arguments, placement)
        going, done = _progress(state, settings, runs)
        context = placement.put_context(arguments.context)
        # An iterator continues from its own position, which `restore` has set.
        batches = data if data is None or isinstance(data, Iterator) else (data[i] for i in range(done, len(data)))
        host.report(done, {})
        host.report_runs(done, [{}] * runs)
        while going.any():
            end = min(settings.steps, done + settings.every - (done - first) % settings.every)
            state, values = _block(arguments, placement, state, context, batches, going, done, end)
            done = end
            _check_finite(values, going, done)
            _save(host, done, placement, runs, state, data)
            host.report(done, {name: float(value[going].mean()) for name, value in values.items()})
            of_run = lambda k: {name: float(value[k]) for name, value in values.items()}  # noqa: B023 (used at once)
            host.report_runs(done, [of_run(k) if going[k] else None for k in range(runs)])
            going, _ = _progress(state, settings, runs)
            if distributed.preempted() and going.any():
                _stop(host, done)
    if placement.runs:  # replicated, because on a CPU concurrent programs that read a split state block each other
        state = programs.without_padding(placement, runs, state)
    if not placement.fully_sharded:
        return distributed.local(state)
    arrays = jax.tree.map(lambda leaf: leaf if distributed.is_key(leaf) else distributed.gather(leaf), state)
    return arrays._replace(key=distributed.local(state.key))


def _block(
    arguments: Training,
    placement: Placement,
    state: State,
    context: Any,
    batches: Iterator | None,
    going: np.ndarray,
    begun: int,
    end: int,
) -> tuple[State, dict[str, np.ndarray]]:
    """Steps `begun` to `end` and a validation; the metrics, (runs,), are means over the steps."""
    task, settings, runs, done = arguments.task, arguments.settings, len(going), begun
    # Check for preemption eight times per block.
    piece = -(-settings.every // 8) if batches is None else 1
    parts: list[Metrics] = []
    while done < end:
        size = min(piece, end - done)
        if batches is None:
            count = _for_runs(placement, np.where(going, size, 0).astype(np.int32))
            state, part = programs.steps_at_once(task, settings, placement, state, context, count)
        else:
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"training: data must have {settings.steps} batches, got {done}")
            rows = distributed.shard(placement.mesh, batch)
            state, part = programs.step_on_batch(task, settings, placement, state, context, rows)
        done += size
        jax.block_until_ready(parts[-1:])  # queue at most one piece ahead of the devices
        parts.append(part)
        if done < end and distributed.preempted():
            _save(arguments.host, done, placement, runs, state, arguments.data)
            _stop(arguments.host, done)
    state, validation = programs.validated(task, placement, state, context, _for_runs(placement, going))
    values = {name: sum(_of_runs(part[name], runs) for part in parts) / (done - begun) for name in METRICS}
    return state, values | {name: _of_runs(value, runs) for name, value in validation.items()}


# Before the first step.


def place(arguments: Training) -> Placement:
    """Choose the placement of a training's arrays; raises the ValueErrors of `train` about runs."""
    key, params, task, context, _, host, data, own = arguments
    if not jnp.ndim(key):
        mesh = host.mesh
        if mesh is None:
            mesh = distributed.training_mesh(None if data is not None else drawn(task, key, context))
        return Placement(mesh, fully_sharded=host.fully_sharded)
    check.number("training: runs", len(key), at_least=1, whole=True)
    for name, used in (("data", data is not None), ("host.fully_sharded", host.fully_sharded)):
        if used:
            raise ValueError(f"training: {name} must be of one run, got {len(key)} runs: train them one by one")
    flags = tuple(jax.tree.leaves(jax.tree.broadcast(own, context)))
    stacked = [leaf for leaf, flag in zip(jax.tree.leaves(context), flags, strict=True) if flag]
    check.rows("training: keys, parameters and own context", (key, params, stacked))
    examples = shareable(arguments)
    mesh = devices.runs_mesh(None, len(key), examples) if host.mesh is None else host.mesh
    placement = Placement(mesh, True, flags)
    if placement.sharers > 1 and (examples is None or examples % placement.sharers):
        raise ValueError(
            f"training: {placement.sharers} devices on the axis `data` must be able to share a batch, got "
            + ("a loss that looks at its whole batch" if examples is None else f"{examples} examples")
            + ": choose a mesh with fewer"
        )
    return placement


def drawn(task: Callable[[Any], Task], key: PRNGKey, context: Any) -> int | None:
    """Examples in a batch that a task of one run draws; None if batches come from the host."""

    def batch(key: PRNGKey, context: Any) -> Any:
        draw = task(context).draw
        return None if draw is None else draw(key)

    shapes = jax.eval_shape(batch, key, context)
    return None if shapes is None else check.rows("training: batch", shapes)


def shareable(arguments: Training) -> int | None:
    """Examples in a batch of one of K runs; None if devices cannot share it, because its examples depend on each other.

    The arguments may be shapes.
    """
    sizes: list[int | None] = []

    def look(key: PRNGKey, params: Params, context: Any) -> None:
        key, params = key[0], jax.tree.map(lambda a: a[0], params)
        flags = jax.tree.broadcast(arguments.own, context)
        loss, draw, *_ = arguments.task(jax.tree.map(lambda flag, a: a[0] if flag else a, flags, context))
        batch = None if draw is None else draw(key)
        apart = batch is not None and not losses.looks_at_batch(loss, params, jax.random.clone(key), batch)
        sizes.append(check.rows("training: batch", batch) if apart else None)

    params = arguments.params.last if isinstance(arguments.params, State) else arguments.params
    jax.eval_shape(look, arguments.key, params, arguments.context)
    return sizes[0]


def _initial(arguments: Training, placement: Placement) -> tuple[State, int]:
    """The restored or new state, on the devices, and the step at which this training begins."""
    key, params, _, _, settings, host, data, _ = arguments
    restore = (lambda state: state) if host.checkpoints is None else partial(host.checkpoints.restore, data=data)
    if placement.fully_sharded and not isinstance(params, State):  # because no device can hold the complete state
        places = placement.of_state(jax.eval_shape(partial(programs.begin, settings), key, params))
        parts = distributed.put(jax.random.clone(key), places.key), distributed.put(params, places.last)
        return restore(jax.jit(partial(programs.begin, settings), out_shardings=places)(*parts)), 0
    start = params if isinstance(params, State) else programs.begin(settings, key, params)
    first = int(np.max(distributed.gather(start.step)))
    if placement.runs:  # checkpoints have no padding, so they serve any number of devices
        return devices.spread(placement.mesh, restore(start)), first
    copy = lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)
    return restore(distributed.put(jax.tree.map(copy, start), placement.of_state(start))), first


def _progress(state: State, settings: Settings, runs: int) -> tuple[np.ndarray, int]:
    """The runs that go on, (runs,) of bool, and their step; if all have ended, the largest step."""
    step, best_step = _of_runs(state.step, runs), _of_runs(state.best_step, runs)
    going = ~finished(step, best_step, settings)
    steps = set(step[going].tolist()) or {step.max()}  # a run that has ended may be further on
    if len(steps) > 1:
        raise ValueError(f"training: runs must stand at one step, got {sorted(steps)}: train them one by one")
    return going, int(steps.pop())


def _of_runs(array: Any, runs: int) -> np.ndarray:
    """(runs,) values on the host, from an array with a row a run, or () of one run."""
    rows = np.atleast_1d(distributed.gather(array))[:runs]
    return rows if rows.dtype.kind == "i" else rows.astype(np.float64)


def _for_runs(placement: Placement, values: np.ndarray) -> Any:
    """(runs,) values on the devices; () for one run."""
    return devices.spread(placement.mesh, values) if placement.runs else values[0]


# Between blocks.


def _check_finite(values: dict[str, np.ndarray], going: np.ndarray, done: int) -> None:
    for name, value in values.items():
        bad = np.flatnonzero(going & ~np.isfinite(value))
        if len(bad):
            which = "" if len(going) == 1 else f" in runs {', '.join(map(str, bad))}"
            raise NotFinite(f"training: {name} must be finite, got {value[bad[0]]} by step {done}{which}")


def _save(host: Host, done: int, placement: Placement, runs: int, state: State, data: Any) -> None:
    if host.checkpoints is not None:
        host.checkpoints.save(done, programs.without_padding(placement, runs, state) if placement.runs else state, data)


def _stop(host: Host, done: int) -> NoReturn:
    distributed.stop("every phase that was finished" if host.checkpoints is None else f"step {done}")


# Keys and batches.


def keys(key: PRNGKey, runs: int) -> PRNGKey:
    """(runs,) keys; key k does not depend on the number of runs."""
    check.number("training: runs", runs, at_least=1, whole=True)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(runs))


def minibatch(key: PRNGKey, examples: Any, size: int, count: Int[Array, ""] | int | None = None) -> Any:
    """Draw `size` rows, with replacement, of a pytree of arrays with a common leading axis.

    Args:
      count: draw from the first `count` rows, because the others are padding (`padded`); default: all.

    Raises:
      ValueError: size < 1, the arrays have no rows or differ in number, or count is not in 1 .. rows.
    """
    check.number("minibatch: size", size, at_least=1, whole=True)
    n = check.number("minibatch: rows", check.rows("minibatch: examples", examples), at_least=1, whole=True)
    count = n if count is None else check.number("minibatch: count", count, at_least=1, at_most=n, whole=True)
    rows = jax.random.randint(key, (size,), 0, count)
    return jax.tree.map(lambda a: a[rows], examples)


def capacity(rows: int, least: int = 8192) -> int:
    """The next power of two, at least `least` (a power of two): arrays padded to it share compiled programs."""
    check.number("capacity: rows", rows, at_least=0, whole=True)
    return 1 << max(rows - 1, least - 1).bit_length()


def padded(array: Any, rows: int) -> np.ndarray:
    """Append zeros on axis 0 up to `rows`; ValueError if the array has more."""
    check.number("padded: rows", rows, at_least=len(array), whole=True)
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
