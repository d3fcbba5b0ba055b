"""Independent runs side by side: K trainings of one shape (seeds, goals, configurations) in one compiled program.

The runs are spread over the devices of the mesh and know nothing of each other: the program has no collective between
them.  Devices that they would leave idle share the batches of a run, with one all-reduce a step.  Within a device they
are one `vmap`, and on a CPU one run after the other for a block of steps, so that what a run needs stays in the cache.
Run k gives the numbers that `training.fit` gives it alone, up to the order of sums.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gendiff import check, distributed, losses, potential, together, training
from gendiff.static import by_value
from gendiff.training import Host, Metrics, NotFinite, Settings, State, Task
from gendiff.types import Params, PRNGKey


def train(
    keys: PRNGKey,
    params: Params,
    task: Callable[[Any, Any], Task],
    context: Any,
    own: Any,
    settings: Settings,
    host: Host = Host(),  # noqa: B008 (immutable)
    report_each: Callable[[int, list[Metrics | None]], None] = lambda step, metrics: None,
) -> State:
    """Trains K runs from the host, with reports and checkpoints for all of them together.

    Args:
      keys: (K,), one a run.
      params: K trees of parameters stacked on axis 0.
      task: (context, own of one run) -> Task, which draws its batches on the device.  Runs of `train` that share the
        function (or an equal one, see `gendiff.static`) share the compiled program.
      context: a pytree of arrays that all runs read, such as a pool of examples.
      own: a pytree of arrays with leading axis K: what each run has for itself.
      settings: of every run; with `patience` each ends by itself, and the others go on.
      host: its mesh is `together.over_runs` unless given; devices on the axis `data` share the batches of their runs.
      report_each: as `host.report`, with the metrics of each run, None for those that have ended.

    Returns:
      The last state of every run, stacked on axis 0, on every device; `best` is the result.

    Raises:
      ValueError: a setting is out of range, or keys, params and own are not of K runs.
      NotFinite: a loss is NaN or infinite, with the numbers of the runs.  The newest checkpoint is from before.
    """
    training.check_settings(settings)
    runs = check.number("replicas: runs", len(keys), at_least=1, whole=True)
    check.rows("replicas: keys, params and own", (keys, params, own))
    examples = shareable(keys, params, task, context, own)
    mesh = together.over_runs(None, runs, examples) if host.mesh is None else host.mesh
    parts = mesh.shape["data"]
    if parts > 1 and (examples is None or examples % parts):
        raise ValueError(f"replicas: expected batches that {parts} devices on the axis `data` can share, given others")
    state = _begin(settings, keys, params)
    if host.checkpoints is not None:  # of the runs alone: it serves any number of devices
        state = host.checkpoints.restore(state)
    going = _going(state, settings)
    steps = distributed.gather(state.step)
    # Runs that have ended may stand further on than those that have not.
    stands = set(steps[going].tolist()) or {int(steps.max())}
    if len(stands) > 1:
        raise ValueError(f"replicas: expected runs that stand at one step, given {sorted(stands)}")
    (done,) = stands
    some_end = bool(settings.patience) or not going.all()
    state, own = together.spread(mesh, (state, own))
    context = distributed.replicate(mesh, context)
    host.report(done, {})
    report_each(done, [{}] * runs)
    with training.written(host):
        while going.any():
            size = min(settings.every, settings.steps - done)
            state, metrics = _block(task, settings, size, some_end, mesh, state, context, own)
            done += size
            values = {name: distributed.gather(each)[:runs] for name, each in metrics.items()}
            for name, each in values.items():
                if not np.isfinite(each[going]).all():
                    which = ", ".join(map(str, np.flatnonzero(going & ~np.isfinite(each))))
                    raise NotFinite(
                        f"replicas: {name}: expected finite numbers by step {done}, given none in runs {which}"
                    )
            stop = distributed.preempted()
            if host.checkpoints is not None:
                host.checkpoints.save(done, _first(mesh, runs, state))
            host.report(done, {name: float(each[going].mean()) for name, each in values.items()})
            of_run = lambda k: {name: float(each[k]) for name, each in values.items()}  # noqa: B023 (used at once)
            report_each(done, [of_run(k) if going[k] else None for k in range(runs)])
            going = _going(state, settings)[:runs]
            if stop and going.any():
                distributed.stop("every phase that was finished" if host.checkpoints is None else f"step {done}")
    # On every device: programs with a collective, such as those that read a state split over the devices, must not be
    # under way at the same time, and on a CPU can block each other.
    return distributed.local(_first(mesh, runs, state))


def shareable(keys: PRNGKey, params: Params, task: Callable[[Any, Any], Task], context: Any, own: Any) -> int | None:
    """Examples in a batch of a run of `train`, whose arguments these are, or their shapes; None where devices cannot
    share them, since the loss of an example depends on the others."""
    found: list[int | None] = []

    def look(keys: PRNGKey, params: Params, context: Any, own: Any) -> None:
        key, start, mine = jax.tree.map(lambda a: a[0], (keys, params, own))
        loss, draw, *_ = task(context, mine)
        batch = None if draw is None else draw(key)
        apart = batch is not None and not losses.looks_at_batch(loss, start, jax.random.clone(key), batch)
        found.append(check.rows("replicas: batch", batch) if apart else None)

    jax.eval_shape(look, keys, params, context, own)
    return found[0]


def _going(state: State, settings: Settings) -> np.ndarray:
    """Which runs have not ended."""
    step, best_step = distributed.gather((state.step, state.best_step))
    return ~training.finished(step, best_step, settings)


@partial(jax.jit, static_argnums=(0, 1))
def _first(mesh: jax.sharding.Mesh, runs: int, state: State) -> State:
    """Without the copies that fill up the devices, on every device; a copy: the state's keys are still to be used.

    One program: of several processes, one for each array would be under way together and block each other.
    """
    first = jax.tree.map(lambda a: a[:runs], state._replace(key=jax.random.clone(state.key)))
    return jax.lax.with_sharding_constraint(first, distributed.replicated(mesh))


@partial(jax.jit, static_argnums=0)
def _begin(settings: Settings, keys: PRNGKey, params: Params) -> State:
    return jax.vmap(lambda key, params: training.init(key, params, training.adam(settings)))(keys, params)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=5)
def _block(
    task: Callable[[Any, Any], Task],
    settings: Settings,
    size: int,
    some_end: bool,
    mesh: jax.sharding.Mesh,
    state: State,
    context: Any,
    own: Any,
) -> tuple[State, Metrics]:
    def one(run: tuple[State, Any], context: Any) -> tuple[State, Metrics]:
        loss, draw, validate, *_ = task(context, run[1])
        if draw is None:
            raise ValueError("replicas: task.draw: expected a function of a key, given None")
        step = training.make_step(loss, training.adam(settings), settings.decay, parts=mesh.shape["data"])
        block = training.make_block(step, draw, size, validate)
        if not some_end:
            return block(run[0])
        # What has ended stays as it is.
        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(block, run[0])[1])
        ended = training.finished(run[0].step, run[0].best_step, settings)
        return jax.lax.cond(ended, lambda state: (state, none), block, run[0])

    local = lambda state, context, own: potential.over_members(partial(one, context=context), (state, own))
    each, all_of_it = jax.P("replica"), jax.P()
    spread = jax.shard_map(local, mesh=mesh, in_specs=(each, all_of_it, each), out_specs=(each, each), check_vma=False)
    return spread(state, context, own)


def keys(key: PRNGKey, runs: int) -> PRNGKey:
    """(runs,) keys; that of run k depends on k alone, not on how many there are."""
    check.number("replicas.keys: runs", runs, at_least=1, whole=True)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(runs))


class Asked(NamedTuple):
    """A training that one of several runs side by side asks for (`training.train`)."""

    key: PRNGKey
    params: Params
    task: Callable[[Any], Task]
    context: Any
    settings: Settings
    host: Host


def train_all(asked: list[Asked]) -> list[State]:
    """Trainings that differ in keys, parameters, contexts and hosts alone, as one."""
    first, hosts = asked[0], [each.host for each in asked]
    kept = [host.checkpoints for host in hosts]
    if None in kept and any(each is not None for each in kept):
        raise ValueError("replicas: expected checkpoints of all runs or of none, given some")
    several = None if None in kept else _Several(kept)

    def report(step: int, metrics: list[Metrics | None]) -> None:
        for host, each in zip(hosts, metrics, strict=True):
            if each is not None:
                host.report(step, each)

    stacked = together.stack([(each.key, each.params, each.context) for each in asked])
    keys, params, contexts = stacked
    own_task = _of_own(first.task)
    state = train(keys, params, own_task, None, contexts, first.settings, Host(None, several), report)
    return [_of_run(state, k) for k in range(len(asked))]


def _of_run(state: State, k: int) -> State:
    """Of run k, as a copy: the keys of the whole are still to be used."""
    return jax.tree.map(lambda a: a[k], state._replace(key=jax.random.clone(state.key)))


@by_value
def _of_own(task: Callable[[Any], Task]) -> Callable[[Any, Any], Task]:
    return lambda context, own: task(own)


class _Several:
    """Checkpoints of runs side by side, each in the place of its own."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = kept

    def save(self, step: int, state: State) -> None:
        for k, (each, stands) in enumerate(zip(self.kept, distributed.gather(state.step), strict=True)):
            if stands == step:  # else it has ended, and is stored
                each.save(step, _of_run(state, k))

    def restore(self, state: State) -> State:
        return together.stack([each.restore(_of_run(state, k)) for k, each in enumerate(self.kept)])

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in self.kept:
                stack.enter_context(each.written())
            yield
