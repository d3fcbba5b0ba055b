import contextlib
import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import checkpoint, devices, distributed, losses, programs, training
from gendiff.devices import Placement
from gendiff.training import Host, Settings, Task, Training
from tpu import hlo

SETTINGS = Settings(steps=60, rate=0.05, every=20)


def regression(context):
    """Fits a line through a third of the points, of a slope of its own."""
    points, own = context
    loss = lambda params, key, x: (params["a"] * x + params["b"] - own["slope"] * x) ** 2 + 0 * jax.random.normal(key)
    return Task(loss, lambda key: training.minibatch(key, points, 8))


POINTS = jnp.linspace(-1, 1, 30)
START = {"a": jnp.array([0.0, 0.3, -0.2, 1.0, 2.0]), "b": jnp.array([0.5, 0.0, -0.5, 0.1, 0.2])}
OWN = {"slope": jnp.array([1.0, -1.0, 2.0, 0.5, 0.0])}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a GPU."""

    id: int
    platform: str = "gpu"
    device_kind: str = "H200"
    process_index: int = 0


def trained(host, settings=SETTINGS, runs=5, own=OWN):
    cut = lambda tree: jax.tree.map(lambda a: a[:runs], tree)
    keys = training.keys(jax.random.key(3), runs)
    return training.train(keys, cut(START), regression, (POINTS, cut(own)), settings, host, own=(False, True))


def alone(k, task=regression, settings=SETTINGS):
    """Run k as one run without an axis."""
    cut = lambda tree: jax.tree.map(lambda a: a[k], tree)
    return training.train(jax.random.fold_in(jax.random.key(3), k), cut(START), task, (POINTS, cut(OWN)), settings)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_runs_equal_the_same_runs_alone(count):
    state = trained(Host(devices.runs_mesh(jax.devices()[:count])))
    for k in range(5):
        single = alone(k)
        for found, expected in zip(
            *(jax.tree.leaves((end.last, end.averaged, end.best)) for end in (state, single)), strict=True
        ):
            np.testing.assert_allclose(found[k], expected, rtol=1e-6, atol=1e-7)
    assert np.all(np.asarray(state.step) == 60)


def test_one_run_with_an_axis_is_the_run_without_it():
    state, single = trained(Host(), runs=1), alone(0)
    raw = lambda state: jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    for found, expected in zip(raw(state), raw(single), strict=True):
        np.testing.assert_array_equal(found[0], expected, strict=True)


def test_all_runs_and_blocks_share_one_program():
    # The task is traced once for the steps, in any number, once for the validation, and once a training for its batch.
    task = chex.assert_max_traces(regression, n=4)
    context, settings = (POINTS, OWN), SETTINGS._replace(every=7)
    compiled = []
    listen = lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    keys = training.keys(jax.random.key(0), 5)
    run = lambda keys: training.train(keys, START, task, context, settings, own=(False, True))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(jax.random.clone(keys))
        assert compiled, "the listener hears compilations"
        compiled.clear()
        run(training.keys(jax.random.key(1), 5))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == [], "other keys compile nothing new"


def test_a_vmap_over_runs_gives_the_numbers_of_a_loop(monkeypatch):
    """As on accelerators."""
    settings = SETTINGS._replace(patience=40, decay=0.5, steps=200)
    looped = trained(Host(), settings)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    mapped = trained(Host(), settings)
    jax.clear_caches()
    for name in ("last", "averaged", "best", "step"):
        for found, expected in zip(
            *(jax.tree.leaves(getattr(states, name)) for states in (mapped, looped)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_runs_go_on_from_their_states():
    # As one run does: moments, keys and steps are carried over.
    constant = SETTINGS._replace(schedule="constant")
    context = (POINTS, OWN)
    run = lambda start, steps: training.train(
        training.keys(jax.random.key(3), 5), start, regression, context, constant._replace(steps=steps),
        own=(False, True),
    )  # fmt: skip
    half = run(START, 40)
    np.testing.assert_array_equal(run(half, 60).last["a"], run(START, 60).last["a"])


@pytest.mark.parametrize("host", [Host(), Host(fully_sharded=True)])
def test_runs_draw_their_batches_and_are_whole(host):
    data = None if host.fully_sharded else [POINTS] * 60
    with pytest.raises(ValueError, match=r"must be of one run, got 5 runs: train them one by one"):
        training.train(
            training.keys(jax.random.key(3), 5), START, regression, (POINTS, OWN), SETTINGS, host, data, (False, True)
        )


def test_a_notice_within_a_block_stores_all_runs(monkeypatch, tmp_path):
    reference, calls = trained(Host()), []
    monkeypatch.setattr(distributed, "preempted", lambda: calls.append(None) or len(calls) == 11)
    with pytest.raises(distributed.Preempted, match="step 32 is stored"):
        trained(Host(checkpoints=checkpoint.Checkpoints(tmp_path)))
    seen = []
    report = lambda step, metrics: seen.append(step)
    resumed = trained(Host(checkpoints=checkpoint.Checkpoints(tmp_path), report=report))
    assert seen == [32, 40, 60]
    for found, expected in zip(jax.tree.leaves(resumed.best), jax.tree.leaves(reference.best), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("replica", "data"), [(2, 4), (1, 8), (4, 2)])
def test_devices_that_runs_leave_idle_share_their_batches(replica, data):
    mesh = distributed.make_mesh(jax.devices()[: replica * data], replica)
    state, apart = trained(Host(mesh)), trained(Host(devices.runs_mesh(jax.devices()[:1])))
    for found, expected in zip(
        jax.tree.leaves((state.last, state.best)), jax.tree.leaves((apart.last, apart.best)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_batches_that_cannot_be_shared_are_an_error():
    three = distributed.make_mesh(jax.devices()[:3])
    with pytest.raises(
        ValueError, match="training: 3 devices on the axis `data` must be able to share a batch, got 8 examples"
    ):
        trained(Host(three))


def test_a_loss_that_looks_at_its_batch_is_of_one_device():
    def contrast(context):
        points, _ = context
        loss = lambda params, key, x: (x - jax.lax.pmean(x, losses.BATCH)) ** 2 * params["a"]
        return Task(loss, lambda key: training.minibatch(key, points, 8))

    def mesh(task):
        arguments = Training(
            training.keys(jax.random.key(3), 5), START, task, (POINTS, OWN), SETTINGS, own=(False, True)
        )
        return devices.runs_mesh([Chip(i) for i in range(8)], 5, training.shareable(arguments))

    assert mesh(regression).devices.shape == (1, 8)
    assert mesh(contrast).devices.shape == (8, 1)
    shared = Host(distributed.make_mesh(jax.devices()[:2]))
    with pytest.raises(ValueError, match="got a loss that looks at its whole batch"):
        training.train(
            training.keys(jax.random.key(3), 5), START, contrast, (POINTS, OWN), SETTINGS, shared, own=(False, True)
        )


@pytest.mark.parametrize(
    ("runs", "batch", "count", "shape"),
    [
        (8, 256, 8, (8, 1)),
        (20, 256, 8, (4, 2)),
        (5, 256, 16, (1, 16)),
        (5, 250, 16, (8, 2)),
        (6, 256, 4, (2, 2)),
        (16, 256, 16, (16, 1)),
        (17, 1, 4, (4, 1)),
    ],
)
def test_accelerators_that_runs_leave_idle_go_to_their_batches(runs, batch, count, shape):
    chips = [Chip(i) for i in range(count)]
    assert devices.runs_mesh(chips, runs, batch).devices.shape == shape
    assert devices.runs_mesh(chips).devices.shape == (count, 1)
    assert devices.runs_mesh(jax.devices(), runs, batch).devices.shape == (8, 1), "cores do not share a batch"


@pytest.mark.parametrize(("replica", "data"), [(4, 1), (2, 4)])
def test_the_program_has_no_collective_between_replicas(replica, data):
    mesh = distributed.make_mesh(jax.devices()[: replica * data], replica)
    keys, cut = training.keys(jax.random.key(0), 4), lambda tree: jax.tree.map(lambda a: a[:4], tree)
    placement = Placement(mesh, True, (False, True))
    state, counts = devices.spread(mesh, (programs.begin(SETTINGS, keys, cut(START)), np.full(4, 5, np.int32)))
    context = placement.put_context((POINTS, cut(OWN)))
    lowered = programs.steps_at_once.lower(regression, SETTINGS, placement, state, context, counts)
    text = lowered.compile().as_text()
    assert ("all-reduce" in text) == (data > 1)
    within = [hlo.groups(line) for line in text.splitlines() if "replica_groups=" in line]
    assert all(groups == [[0, 1, 2, 3], [4, 5, 6, 7]] for groups in within), "only devices of one run"
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.parametrize("count", [1, 8])
def test_runs_end_by_themselves_as_alone(count):
    """The distance to 0.5 grows sooner in some runs than in others: they end, and the others go on."""

    def task(context):
        loss, draw, _ = regression(context)
        return Task(loss, draw, lambda params: (params["a"] - 0.5) ** 2)

    settings = SETTINGS._replace(steps=200, patience=40, decay=0.5)
    keys, reports = training.keys(jax.random.key(3), 5), []
    note = lambda step, metrics: reports.append([of_run is not None for of_run in metrics])
    host = Host(devices.runs_mesh(jax.devices()[:count]), report_runs=note)
    state = training.train(keys, START, task, (POINTS, OWN), settings, host, own=(False, True))
    for k in range(5):
        single = alone(k, task, settings)
        for name in ("step", "best_step", "best_loss", "last", "best"):
            for found, expected in zip(*(jax.tree.leaves(getattr(end, name)) for end in (state, single)), strict=True):
                np.testing.assert_allclose(found[k], expected, rtol=1e-5, atol=1e-6, err_msg=f"{name} of run {k}")
    assert len(set(np.asarray(state.step).tolist())) > 1
    assert [sum(report) for report in reports] == sorted([sum(report) for report in reports], reverse=True)
    assert sum(reports[-1]) < 5


def test_a_run_does_not_depend_on_how_many_there_are():
    few, many = trained(Host(), runs=3), trained(Host())
    np.testing.assert_allclose(few.last["a"], many.last["a"][:3], rtol=1e-5)


def test_stopped_runs_go_on_to_the_same_numbers(tmp_path):
    host = Host(devices.runs_mesh(jax.devices()[:2]))
    reference = trained(host)

    class Stop(Exception):
        pass

    def stop(step, metrics):
        if step == 40:
            raise Stop

    kept = checkpoint.Checkpoints(tmp_path / "steps")
    with pytest.raises(Stop):
        trained(host._replace(checkpoints=kept, report=stop))
    seen = []
    kept = checkpoint.Checkpoints(tmp_path / "steps")  # another object, which does not know the first one's writes
    resumed = trained(host._replace(checkpoints=kept, report=lambda step, metrics: seen.append(step)))
    assert seen[0] == 40
    for a, b in zip(jax.tree.leaves(reference.last), jax.tree.leaves(resumed.last), strict=True):
        np.testing.assert_array_equal(a, b)
    # On another number of devices, up to the order of sums.
    shutil.rmtree(tmp_path / "steps" / "60")
    elsewhere = trained(Host(devices.runs_mesh(jax.devices()[:8]), kept, lambda step, metrics: seen.append(step)))
    assert seen[-2] == 40
    for a, b in zip(jax.tree.leaves(reference.last), jax.tree.leaves(elsewhere.last), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patience", [None, 1000])
def test_runs_that_ended_before_stay_and_do_not_tell_where_the_others_stand(patience):
    saved = {}

    class Kept:
        """One run has ended, the others stand at step 20."""

        def save(self, step, state, data=None):
            saved[step] = jax.tree.map(jnp.copy, state._replace(key=jax.random.key_data(state.key)))

        def restore(self, state, data=None):
            if not saved:
                return state
            pick = lambda last, first: jnp.concatenate([last[:1], first[1:]])
            mixed = jax.tree.map(pick, saved[60], saved[20])
            return mixed._replace(key=jax.random.wrap_key_data(mixed.key))

        def written(self):
            return contextlib.nullcontext()

    settings, seen = SETTINGS._replace(patience=patience), []
    reference = trained(Host(checkpoints=Kept()), settings)
    resumed = trained(Host(checkpoints=Kept(), report=lambda step, metrics: seen.append(step)), settings)
    assert seen == [20, 40, 60]
    np.testing.assert_array_equal(resumed.step, 60)
    np.testing.assert_allclose(resumed.last["a"], reference.last["a"], rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(training.NotFinite, match="training: loss must be finite, got nan by step 20 in runs 2"):
        trained(Host(), own={"slope": OWN["slope"].at[2].set(jnp.nan)})
    with pytest.raises(ValueError, match="training: every must be >= 1 and whole, got 0"):
        trained(Host(), SETTINGS._replace(every=0))
    four = training.keys(jax.random.key(0), 4)
    with pytest.raises(
        ValueError, match="training: keys, parameters and own context must be arrays with one number of rows"
    ):
        training.train(four, START, regression, (POINTS, OWN), SETTINGS, own=(False, True))
