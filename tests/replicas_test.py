import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import checkpoint, distributed, losses, replicas, together, training
from gendiff.training import Host, Settings, Task
from tpu import plan

SETTINGS = Settings(steps=60, rate=0.05, every=20)


def regression(points, own):
    """Fits a line through a third of the points, of a slope of its own."""
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
    keys = replicas.keys(jax.random.key(3), runs)
    return replicas.train(keys, cut(START), regression, POINTS, cut(own), settings, host)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_runs_equal_the_same_runs_alone(devices):
    host = Host(together.over_runs(jax.devices()[:devices]))
    state = trained(host)
    for k in range(5):
        alone, _ = training.fit(
            jax.random.fold_in(jax.random.key(3), k),
            jax.tree.map(lambda a, k=k: a[k], START),
            regression(POINTS, jax.tree.map(lambda a, k=k: a[k], OWN)),
            SETTINGS,
        )
        for mine, theirs in zip(
            jax.tree.leaves((state.params, state.best)), jax.tree.leaves((alone.params, alone.best)), strict=True
        ):
            np.testing.assert_allclose(mine[k], theirs, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(state.step) == 60)


@pytest.mark.parametrize(("replica", "data"), [(2, 4), (1, 8), (4, 2)])
def test_devices_that_runs_leave_idle_share_their_batches(replica, data):
    mesh = distributed.make_mesh(jax.devices()[: replica * data], replica)
    state, alone = trained(Host(mesh)), trained(Host(together.over_runs(jax.devices()[:1])))
    for mine, theirs in zip(
        jax.tree.leaves((state.params, state.best)), jax.tree.leaves((alone.params, alone.best)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_batches_that_cannot_be_shared_are_an_error():
    three = distributed.make_mesh(jax.devices()[:3])
    with pytest.raises(ValueError, match="expected batches that 3 devices on the axis `data` can share, given others"):
        trained(Host(three))


def test_a_loss_that_looks_at_its_batch_is_of_one_device():
    def contrast(points, own):
        loss = lambda params, key, x: (x - jax.lax.pmean(x, losses.BATCH)) ** 2 * params["a"]
        return Task(loss, lambda key: training.minibatch(key, points, 8))

    def mesh(task):
        examples = replicas.shareable(replicas.keys(jax.random.key(3), 5), START, task, POINTS, OWN)
        return together.over_runs([Chip(i) for i in range(8)], 5, examples)

    assert mesh(regression).devices.shape == (1, 8)
    assert mesh(contrast).devices.shape == (8, 1)


@pytest.mark.parametrize(
    ("runs", "batch", "devices", "shape"),
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
def test_accelerators_that_runs_leave_idle_go_to_their_batches(runs, batch, devices, shape):
    chips = [Chip(i) for i in range(devices)]
    assert together.over_runs(chips, runs, batch).devices.shape == shape
    assert together.over_runs(chips).devices.shape == (devices, 1)
    assert together.over_runs(jax.devices(), runs, batch).devices.shape == (8, 1), "cores do not share a batch"


@pytest.mark.parametrize(("replica", "data"), [(4, 1), (2, 4)])
def test_the_program_has_no_collective_between_replicas(replica, data):
    mesh = distributed.make_mesh(jax.devices()[: replica * data], replica)
    keys, cut = replicas.keys(jax.random.key(0), 4), lambda tree: jax.tree.map(lambda a: a[:4], tree)
    state = replicas._begin(SETTINGS, keys, cut(START))
    place = lambda tree: jax.device_put(tree, jax.NamedSharding(mesh, jax.P("replica")))
    text = (
        replicas._block.lower(regression, SETTINGS, 5, False, mesh, place(state), POINTS, place(cut(OWN)))
        .compile()
        .as_text()
    )
    assert ("all-reduce" in text) == (data > 1)
    within = [plan.groups(line) for line in text.splitlines() if "replica_groups=" in line]
    assert all(groups == [[0, 1, 2, 3], [4, 5, 6, 7]] for groups in within), "only devices of one run"
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.parametrize("devices", [1, 8])
def test_runs_end_by_themselves_as_alone(devices):
    """The distance to 0.5 grows sooner in some runs than in others: they end, and the others go on."""

    def task(points, own):
        loss, draw, _ = regression(points, own)
        return Task(loss, draw, lambda params: (params["a"] - 0.5) ** 2)

    settings = SETTINGS._replace(steps=200, patience=40, decay=0.5)
    keys, reports = replicas.keys(jax.random.key(3), 5), []
    host = Host(together.over_runs(jax.devices()[:devices]))
    note = lambda step, metrics: reports.append([each is not None for each in metrics])
    state = replicas.train(keys, START, task, POINTS, OWN, settings, host, note)
    for k in range(5):
        of_run = lambda tree, k=k: jax.tree.map(lambda a: a[k], tree)
        alone = training.train(
            jax.random.fold_in(jax.random.key(3), k), of_run(START), lambda own: task(POINTS, own), of_run(OWN),
            settings,
        )  # fmt: skip
        for name in ("step", "best_step", "best_loss", "params", "best"):
            for mine, theirs in zip(*(jax.tree.leaves(getattr(each, name)) for each in (state, alone)), strict=True):
                np.testing.assert_allclose(mine[k], theirs, rtol=1e-5, atol=1e-6, err_msg=f"{name} of run {k}")
    assert len(set(np.asarray(state.step).tolist())) > 1
    assert [sum(each) for each in reports] == sorted([sum(each) for each in reports], reverse=True)
    assert sum(reports[-1]) < 5


def test_a_run_does_not_depend_on_how_many_there_are():
    few, many = trained(Host(), runs=3), trained(Host())
    np.testing.assert_allclose(few.params["a"], many.params["a"][:3], rtol=1e-5)


def test_stopped_runs_go_on_to_the_same_numbers(tmp_path):
    host = Host(together.over_runs(jax.devices()[:2]))
    whole = trained(host)

    class Stop(Exception):
        pass

    def stop(step, metrics):
        if step == 40:
            raise Stop

    kept = checkpoint.Checkpoints(tmp_path / "steps")
    with pytest.raises(Stop):
        trained(host._replace(checkpoints=kept, report=stop))
    seen = []
    kept = checkpoint.Checkpoints(tmp_path / "steps")  # which knows nothing of what the first began to write
    resumed = trained(host._replace(checkpoints=kept, report=lambda step, metrics: seen.append(step)))
    assert seen[0] == 40
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    # On another number of devices, up to the order of sums.
    shutil.rmtree(tmp_path / "steps" / "60")
    elsewhere = trained(Host(together.over_runs(jax.devices()[:8]), kept, lambda step, metrics: seen.append(step)))
    assert seen[-2] == 40
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(elsewhere.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patience", [None, 1000])
def test_runs_that_ended_before_stay_and_do_not_tell_where_the_others_stand(patience):
    saved = {}

    class Kept:
        """One run has ended, the others stand at step 20."""

        def save(self, step, state):
            saved[step] = jax.tree.map(jnp.copy, state._replace(key=jax.random.key_data(state.key)))

        def restore(self, state):
            if not saved:
                return state
            pick = lambda last, first: jnp.concatenate([last[:1], first[1:]])
            mixed = jax.tree.map(pick, saved[60], saved[20])
            return mixed._replace(key=jax.random.wrap_key_data(mixed.key))

        def written(self):
            return contextlib.nullcontext()

    settings, seen = SETTINGS._replace(patience=patience), []
    whole = trained(Host(checkpoints=Kept()), settings)
    resumed = trained(Host(checkpoints=Kept(), report=lambda step, metrics: seen.append(step)), settings)
    assert seen == [20, 40, 60]
    np.testing.assert_array_equal(resumed.step, 60)
    np.testing.assert_allclose(resumed.params["a"], whole.params["a"], rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(training.NotFinite, match="none in runs 2"):
        trained(Host(), own={"slope": OWN["slope"].at[2].set(jnp.nan)})
    with pytest.raises(ValueError, match="training: every must be >= 1 and whole, got 0"):
        trained(Host(), SETTINGS._replace(every=0))
    with pytest.raises(ValueError, match="replicas: keys, params and own must be arrays with one number of rows"):
        replicas.train(replicas.keys(jax.random.key(0), 4), START, regression, POINTS, OWN, SETTINGS)
