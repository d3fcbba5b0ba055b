from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import checkpoint, devices, distributed, together, training
from gendiff.training import Host, Settings, Task

DATA = np.random.default_rng(0).normal(0.5, 1.0, (64, 3)).astype(np.float32)
START = {"w": np.linspace(-1, 1, 3, dtype=np.float32)}
NOWHERE = Host()


def task(data):
    loss = lambda params, key, x: (x @ params["w"] - 1 + 0.1 * jax.random.normal(key)) ** 2
    return Task(loss, lambda key: training.minibatch(key, data, 8), lambda params: jnp.sum(params["w"] ** 2))


@partial(jax.jit, static_argnums=(0, 1))
def doubled(power, mesh, x, key):
    return {"y": x**power + jax.random.normal(key, x.shape)}


def run(seed, steps=12, power=2, host=NOWHERE, size=4):
    key = jax.random.key(seed)
    state = training.train(key, START, task, DATA * (1 + seed), Settings(steps, 0.05, every=4), host)
    drawn = together.call(doubled, (power,), None, (np.arange(size, dtype=np.float32), jax.random.fold_in(key, 1)))
    return {"last": state.last, "best": state.best, "step": state.step, "drawn": drawn["y"]}


def side_by_side(works):
    seen = []
    outcomes = together.runs(works, lambda calls, as_one: seen.append(as_one))
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes], seen


def close(given, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), given, expected)


@pytest.mark.parametrize("count", [1, 3, 11])  # fewer and more than the eight devices
def test_runs_side_by_side_equal_runs_alone_and_share_programs(count):
    together_, seen = side_by_side([partial(run, seed) for seed in range(count)])
    assert seen == [count, count]
    for seed, each in enumerate(together_):
        close(each, run(seed))


def test_what_does_not_agree_is_made_apart():
    works = [partial(run, 0), partial(run, 1, steps=8), partial(run, 2, power=3), partial(run, 3, size=5)]
    given, seen = side_by_side(works)
    assert sorted(seen) == [1, 1, 1, 2, 3]
    for each, work in zip(given, works, strict=True):
        close(each, work())


@pytest.mark.parametrize("replica", [1, 2])
def test_runs_that_would_leave_devices_idle_equal_runs_alone(replica, monkeypatch):
    """As on accelerators, which share the batches of their runs."""
    few = lambda devices=None, runs=None, batch=None: distributed.make_mesh(jax.devices(), replica)
    monkeypatch.setattr(devices, "runs_mesh", few)
    given, _ = side_by_side([partial(run, seed) for seed in range(3)])
    for seed, each in enumerate(given):
        close(each, run(seed))


def test_runs_of_other_lengths_do_not_wait_for_each_other_for_ever():
    longer = lambda: (run(0), run(1))[1]
    given, _ = side_by_side([longer, partial(run, 2), lambda: 5])
    close(given[0], run(1))
    assert given[2] == 5


def test_a_run_that_fails_leaves_the_others():
    def broken():
        run(1)
        raise OSError("no room")

    outcomes = together.runs([partial(run, 0), broken, partial(run, 2)])
    assert str(outcomes[1].error) == "no room"
    close(outcomes[0].value, run(0))
    close(outcomes[2].value, run(2))


def test_a_loss_that_is_not_finite_is_of_its_run_alone():
    def diverging():
        training.train(jax.random.key(9), START, task, DATA * np.nan, Settings(12, 0.05, every=4))

    def well():
        return training.train(jax.random.key(0), START, task, DATA, Settings(12, 0.05, every=4)).last

    outcomes = together.runs([well, diverging])
    assert isinstance(outcomes[1].error, training.NotFinite)
    close(outcomes[0].value, well())


def test_a_stopped_training_goes_on_side_by_side(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, metrics):
        if step == 8:
            raise Stopped

    host = lambda seed, report=lambda step, metrics: None: Host(
        None, checkpoint.Checkpoints(tmp_path / str(seed)), report
    )
    first = together.runs([partial(run, seed, host=host(seed, stop)) for seed in range(3)])
    assert all(isinstance(outcome.error, Stopped) for outcome in first)
    began: list[int] = []
    record = lambda step, metrics: None if metrics else began.append(step)
    given, seen = side_by_side([partial(run, seed, host=host(seed, record)) for seed in range(3)])
    assert seen == [3, 3]
    assert set(began) <= {4, 8}
    for seed, each in enumerate(given):
        close(each, run(seed))


def test_runs_that_end_by_themselves_are_made_together_and_resumed(tmp_path):
    """Data of another scale need another number of steps; the validation is the size of the weights."""
    settings = Settings(40, 0.05, every=4, patience=8, decay=0.5)

    def patient(seed, report=lambda step, metrics: None, folder=None):
        kept = None if folder is None else checkpoint.Checkpoints(tmp_path / folder / str(seed))
        scale = DATA * (0.2 + seed)
        state = training.train(jax.random.key(seed), START, task, scale, settings, Host(None, kept, report))
        return {"best": state.best, "step": state.step, "best_step": state.best_step}

    expected = [patient(seed) for seed in range(3)]
    steps = [int(each["step"]) for each in expected]
    assert len(set(steps)) > 1
    given, seen = side_by_side([partial(patient, seed, folder="whole") for seed in range(3)])
    assert seen == [3]
    jax.tree.map(close, given, expected)

    def stop(step, metrics):
        if step > min(steps):
            raise KeyError

    together.runs([partial(patient, seed, stop, "parts") for seed in range(3)])
    given, seen = side_by_side([partial(patient, seed, folder="parts") for seed in range(3)])
    assert seen == [3]
    jax.tree.map(close, given, expected)


def test_a_notice_stops_all(monkeypatch):
    monkeypatch.setattr(distributed, "preempted", lambda: True)
    outcomes = together.runs([partial(run, seed) for seed in range(2)])
    assert all(isinstance(outcome.error, distributed.Preempted) for outcome in outcomes)
