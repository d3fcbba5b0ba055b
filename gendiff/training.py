"""One training loop.

`step` moves a state by one batch, `block` by many batches in one `lax.scan` and one validation.  `fit` scans blocks:
it is a pure function, so `vmap` it over keys to train whole ensembles in one program.  `train` runs the same blocks
from the host, with progress, checkpoints and resume.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from gendiff import check, distributed, losses, together
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
    """Everything a run needs to go on: save it, restore it, and the numbers are the same bit for bit."""

    step: Any
    params: Params
    ema: Params
    optimiser: Any
    key: PRNGKey
    best: Params
    """The EMA with the least validation loss so far."""
    best_loss: Any
    best_step: Any


class NotFinite(FloatingPointError):
    """A loss became NaN or infinite; the newest checkpoint is from before that."""


def adam(settings: "Settings") -> optax.GradientTransformation:
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


def check_settings(settings: "Settings") -> None:
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
    """The state before the first step.  The EMA is a copy: a donated buffer must not be held twice."""
    copy = partial(jax.tree.map, jnp.copy)
    zero = jnp.zeros((), jnp.int32)
    best_loss, best_step = jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
    return State(zero, copy(params), copy(params), optimiser.init(params), key, copy(params), best_loss, best_step)


def make_step(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    decay: float = 0.999,
    mesh: jax.sharding.Mesh | None = None,
    *,
    fully_sharded: bool = False,
    parts: int = 1,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """One optimiser step on a batch.

    Args:
      loss: of one example.
      decay: of the EMA; the first steps use (1 + step) / (10 + step) where that is less.
      mesh: each device on its axis `data` takes the gradient of its part of the batch, and one all-reduce makes the
        mean.  Where the loss of an example depends on the others of its batch, the compiler decides.
      fully_sharded: the devices hold parts of the parameters, as `distributed.fully_sharded` says.  Each array is
        gathered before it is used, once a step, and its gradient is reduced to the parts.
      parts: in place of a mesh, where `shard_map` is around the step already: length of its axis `data`, which divides
        the batch.

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
        shared = parts if mesh is None else mesh.shape["data"]
        if shared == 1 or losses.looks_at_batch(loss, params, key, batch):
            return jax.value_and_grad(batch_loss)(params, key, batch)
        keys = jax.random.split(key, check.rows("training: batch", batch))
        if mesh is None:
            each = len(keys) // parts
            mine = lambda a: jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("data") * each, each)
            return here(params, mine(keys), jax.tree.map(mine, batch), "data")
        split, places = jax.P("data"), jax.P()
        # Over copies of a part too, so that they stay the same where sums have no fixed order.
        of_part = partial(here, over=distributed.EVERY_DEVICE)
        if fully_sharded:
            places = jax.tree.map(lambda sharding: sharding.spec, distributed.fully_sharded(mesh, params))
            of_part = partial(of_parts, places=places)
        parted = jax.shard_map(
            of_part, mesh=mesh, in_specs=(places, split, split), out_specs=(jax.P(), places), check_vma=False
        )
        return parted(params, keys, batch)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        check.number("training: rows of the batch", check.rows("training: batch", batch), at_least=1, whole=True)
        key = jax.random.fold_in(state.key, state.step)
        value, gradient = value_and_gradient(state.params, key, batch)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = 1 - jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, rate)
        moved = state._replace(step=state.step + 1, params=params, ema=ema, optimiser=optimiser_state)
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
    """Keeps the EMA as `best` if it validates better than the best so far; without `validate`, always."""
    if validate is None:
        return state._replace(best=state.ema, best_step=state.step), {}
    value = jnp.asarray(validate(state.ema), jnp.float32)  # also under x64: a state keeps its types
    better = value < state.best_loss
    best = jax.tree.map(partial(jnp.where, better), state.ema, state.best)
    best_step = jnp.where(better, state.step, state.best_step)
    best_loss = jnp.where(better, value, state.best_loss)
    return state._replace(best=best, best_loss=best_loss, best_step=best_step), {"validation_loss": value}


def make_drawn_step(
    step: Callable[[State, Any], tuple[State, Metrics]], draw: Draw, mesh: jax.sharding.Mesh | None = None
) -> Callable[[State, None], tuple[State, Metrics]]:
    """A step on a batch drawn on the device, as `lax.scan` wants it."""

    def one(state: State, _: None) -> tuple[State, Metrics]:
        # Not below the step's own key: `split(key, n)[i]` of its examples is `fold_in(key, i)`.
        batch = draw(jax.random.fold_in(jax.random.fold_in(state.key, np.uint32(2**32 - 1)), state.step))
        if mesh is not None:
            batch = distributed.split_batch(mesh, batch)
        return step(state, batch)

    return one


def make_block(
    step: Callable[[State, Any], tuple[State, Metrics]],
    draw: Draw,
    size: int,
    validate: Validate | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[State], tuple[State, Metrics]]:
    """`size` steps on batches drawn on the device, in one scan, then `select`; the metrics are means over the block."""
    check.number("make_block: size", size, at_least=1, whole=True)

    def block(state: State) -> tuple[State, Metrics]:
        state, metrics = jax.lax.scan(make_drawn_step(step, draw, mesh), state, length=size)
        state, validation = select(state, validate)
        return state, jax.tree.map(jnp.mean, metrics) | validation

    return block


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


class Host(NamedTuple):
    """Where a run happens and what is kept of it."""

    mesh: jax.sharding.Mesh | None = None
    """Default: `distributed.training_mesh` of the batch."""
    checkpoints: Any = None
    """A `gendiff.checkpoint.Checkpoints`, or None."""
    report: Callable[[int, Metrics], None] = lambda step, metrics: None
    """Called with the step at the start, and after every block with the block's metrics as floats."""
    fully_sharded: bool = False
    """Leave each device only a part of the state (FSDP), for models that are too large for one."""


def fit(key: PRNGKey, params: Params, task: Task, settings: Settings) -> tuple[State, Metrics]:
    """A whole run as a pure function: `vmap` it over keys and parameters for ensembles, seeds and configurations.

    Returns:
      The last state (`best` is the result), and the metrics of each block of `settings.every` steps, on axis 0.
    """
    if task.draw is None:
        raise ValueError("fit: task.draw: expected a function of a key, given None")
    optimiser = adam(settings)
    check.number("fit: steps", settings.steps, at_least=1, whole=True)
    size = min(settings.every, settings.steps)
    if settings.steps % size:
        raise ValueError(f"fit: every must divide steps = {settings.steps}, got {settings.every}")
    block = make_block(make_step(task.loss, optimiser, settings.decay), task.draw, size, task.validate)
    return jax.lax.scan(lambda state, _: block(state), init(key, params, optimiser), length=settings.steps // size)


def train(
    key: PRNGKey,
    params: Params | State,
    task: Callable[[Any], Task],
    context: Any,
    settings: Settings,
    host: Host = Host(),  # noqa: B008 (immutable)
    data: Sequence | Iterator | None = None,
) -> State:
    """The same run from the host: jitted with donated state, sharded over a mesh, reported, and resumed where it
    stopped.

    Args:
      params: to begin from; or a `State` to go on from, with its moments, key and step (so `settings.steps` counts the
        steps of both runs).
      task: context -> Task, called inside `jit`, so that arrays in `context` (data, teachers) are arguments of the
        compiled program and not constants in it.  Runs with equal functions (see `gendiff.static`) share the
        program.
      context: a pytree of arrays.
      data: batches from the host, where the task draws none: a sequence whose element i is the batch of step i (exact
        resume for free), or an iterator, with `get_state` and `set_state` (Grain's) if it is to resume exactly.

    Returns:
      The last state, whole on every process; fully sharded, on the host.

    Raises:
      ValueError: a setting is out of range, or a batch has no rows, or arrays of several lengths.
      NotFinite: a loss is NaN or infinite.  The state before that block is in the newest checkpoint.
      distributed.Preempted: after a notice; the state is in the newest checkpoint.
    """
    check_settings(settings)

    def alone(_: Any) -> State:
        with written(host):
            return _train(key, params, task, context, settings, host, data)

    from gendiff import replicas  # which trains by what is in this file

    by_itself = isinstance(params, State) or data is not None or host.fully_sharded
    asked = replicas.Asked(key, params, task, context, settings, host)
    like = object() if by_itself else ("train", task, settings, together.shapes((params, context)))
    return together.meet(like, asked, alone, replicas.train_all)


def _train(
    key: PRNGKey,
    params: Params | State,
    task: Callable[[Any], Task],
    context: Any,
    settings: Settings,
    host: Host,
    data: Sequence | Iterator | None,
) -> State:
    mesh = host.mesh
    if mesh is None:
        mesh = distributed.training_mesh(None if data is not None else drawn(task, key, context))
    state = _placed(key, params, settings, mesh, host.fully_sharded)
    first = int(state.step)
    context = distributed.replicate(mesh, context)
    if host.checkpoints is not None:
        state = host.checkpoints.restore(state, data)
    done = int(state.step)
    host.report(done, {})
    batches = None if data is None else _batches(data, done)
    # The steps between two looks at the clock: a notice of preemption is heeded within an eighth of a block.
    piece = -(-settings.every // 8) if batches is None else 1
    while not finished(int(state.step), int(state.best_step), settings):
        end = min(settings.steps, done + settings.every - (done - first) % settings.every)
        begun_at = done
        parts: list[Metrics] = []
        while done < end:
            size = min(piece, end - done)
            if batches is None:
                state, part = steps_at_once(task, settings, mesh, host.fully_sharded, state, context, jnp.int32(size))
            else:
                batch = next(batches, None)
                if batch is None:
                    raise ValueError(f"training: data: expected {settings.steps} batches, given {done}")
                given = distributed.shard(mesh, batch)
                state, part = _step(task, settings, mesh, host.fully_sharded, state, context, given)
            done += size
            jax.block_until_ready(parts[-1:])  # no further ahead of the devices than one piece
            parts.append(part)
            if done < end and distributed.preempted():
                _stop(host, done, state, data)
        state, validation = _select(task, state, context)
        values = {name: sum(float(part[name]) for part in parts) / (done - begun_at) for name in METRICS}
        values |= {name: float(value) for name, value in validation.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"training: {name}: expected a finite number, given {value} by step {done}")
        if host.checkpoints is not None:
            host.checkpoints.save(done, state, data)
        host.report(done, values)
        if distributed.preempted():
            _stop(host, done, state, data)
    if not host.fully_sharded:
        return distributed.local(state)
    arrays = jax.tree.map(lambda leaf: leaf if distributed.is_key(leaf) else distributed.gather(leaf), state)
    return arrays._replace(key=distributed.local(state.key))


def _placed(
    key: PRNGKey, params: Params | State, settings: Settings, mesh: jax.sharding.Mesh, fully_sharded: bool
) -> State:
    """The state that a run begins from, on the devices; fully sharded, no device ever holds it whole."""
    if fully_sharded and not isinstance(params, State):
        places = shardings(mesh, True, jax.eval_shape(partial(begin, settings), key, params))
        given = distributed.put(jax.random.clone(key), places.key), distributed.put(params, places.params)
        return jax.jit(partial(begin, settings), out_shardings=places)(*given)
    begun = params if isinstance(params, State) else begin(settings, key, params)
    copy = lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)
    return distributed.put(jax.tree.map(copy, begun), shardings(mesh, fully_sharded, begun))


def drawn(task: Callable[[Any], Task], key: PRNGKey, context: Any) -> int | None:
    """Examples in a batch that a task draws; None if it draws none."""

    def batch(key: PRNGKey, context: Any) -> Any:
        draw = task(context).draw
        return None if draw is None else draw(key)

    shapes = jax.eval_shape(batch, key, context)
    return None if shapes is None else check.rows("training: batch", shapes)


def written(host: Host) -> contextlib.AbstractContextManager[None]:
    """What was begun to be stored in it is written at its end, also when something fails."""
    return contextlib.nullcontext() if host.checkpoints is None else host.checkpoints.written()


def _stop(host: Host, step: int, state: State, data: Any) -> NoReturn:
    if host.checkpoints is None:
        distributed.stop("every phase that was finished")
    host.checkpoints.save(step, state, data)
    distributed.stop(f"step {step}")


def shardings(mesh: jax.sharding.Mesh, fully_sharded: bool, state: State) -> Any:
    """Where the parts of a state lie: whole on every device, or split over all of them."""
    if fully_sharded:
        return distributed.fully_sharded(mesh, state)
    return jax.tree.map(lambda _: distributed.replicated(mesh), state)


def packed(state: State) -> dict[str, Any]:
    """The arrays of a state as a flat dict, to store it as the result of a phase; `unpacked` gives the state back."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}


def unpacked(arrays: dict[str, Any], params: Params, settings: Settings) -> State:
    """The state that was `packed`; `params` and `settings` say of what structure."""
    key = jax.random.key(0)
    like = jax.eval_shape(partial(begin, settings), key, params)._replace(key=jax.random.key_data(key))
    state = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in sorted(arrays)])
    return state._replace(key=jax.random.wrap_key_data(state.key))


# Equal tasks (`gendiff.static`) with equal settings run the same compiled program.


@partial(jax.jit, static_argnums=0)
def begin(settings: Settings, key: PRNGKey, params: Params) -> State:
    """The state before the first step of a run."""
    return init(key, params, adam(settings))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def steps_at_once(
    task: Callable[[Any], Task],
    settings: Settings,
    mesh: jax.sharding.Mesh,
    fully_sharded: bool,
    state: State,
    context: Any,
    count: Int[Array, ""],
) -> tuple[State, Metrics]:
    """`count` steps of a task that draws its batches, one program for all counts; the metrics are sums.

    The state is donated.
    """
    loss, draw, _ = task(context)
    if draw is None:
        raise ValueError("training: data: expected batches from the host, since the task draws none; given None")
    step = make_step(loss, adam(settings), settings.decay, mesh, fully_sharded=fully_sharded)
    one = make_drawn_step(step, draw, mesh)
    places = shardings(mesh, fully_sharded, state)

    def placed(state: State) -> tuple[State, Metrics]:
        moved, metrics = one(state, None)
        return jax.lax.with_sharding_constraint(moved, places), metrics

    return repeated(placed, state, count)


def repeated(
    one: Callable[[State], tuple[State, Metrics]], state: State, count: Int[Array, ""]
) -> tuple[State, Metrics]:
    """`count` steps from `state`; the metrics are sums."""

    def body(_: Any, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
        moved, metrics = one(carry[0])
        return moved, jax.tree.map(jnp.add, carry[1], metrics)

    none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, state)[1])
    return jax.lax.fori_loop(0, count, body, (state, none))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _step(
    task: Callable[[Any], Task],
    settings: Settings,
    mesh: jax.sharding.Mesh,
    fully_sharded: bool,
    state: State,
    context: Any,
    batch: Any,
) -> tuple[State, Metrics]:
    step = make_step(task(context).loss, adam(settings), settings.decay, mesh, fully_sharded=fully_sharded)
    moved, metrics = step(state, batch)
    return jax.lax.with_sharding_constraint(moved, shardings(mesh, fully_sharded, state)), metrics


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _select(task: Callable[[Any], Task], state: State, context: Any) -> tuple[State, Metrics]:
    return select(state, task(context).validate)


def finished(step: Any, best_step: Any, settings: Settings) -> Any:
    """Whether a run ends at this step: numbers, or arrays of them."""
    if not settings.patience:
        return step >= settings.steps
    return (step >= settings.steps) | (step - best_step >= settings.patience)


def _batches(data: Sequence | Iterator, start: int) -> Iterator:
    """Batches from step `start` on of a sequence; an iterator stands where it stands."""
    if isinstance(data, Iterator):
        return data
    return (data[i] for i in range(start, len(data)))


def minibatch(key: PRNGKey, examples: Any, size: int, count: Int[Array, ""] | int | None = None) -> Any:
    """`size` rows, with replacement, of a pytree of arrays with a common leading axis.

    Args:
      count: rows that count, the first ones, where the others are padding (`padded`); default: all.

    Raises:
      ValueError: size < 1, the arrays have no rows, or not as many, or count is not in 1 .. their number.
    """
    check.number("minibatch: size", size, at_least=1, whole=True)
    n = check.number("minibatch: rows", check.rows("minibatch: examples", examples), at_least=1, whole=True)
    count = n if count is None else check.number("minibatch: count", count, at_least=1, at_most=n, whole=True)
    rows = jax.random.randint(key, (size,), 0, count)
    return jax.tree.map(lambda a: a[rows], examples)


def capacity(rows: int, least: int = 8192) -> int:
    """The next power of two, from `least` (itself one) on: arrays padded to it share compiled programs."""
    check.number("capacity: rows", rows, at_least=0, whole=True)
    return 1 << max(rows - 1, least - 1).bit_length()


def padded(array: Any, rows: int) -> np.ndarray:
    """`array` with zeros appended on axis 0 up to `rows`, at least as many as it has."""
    check.number("padded: rows", rows, at_least=len(array), whole=True)
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
