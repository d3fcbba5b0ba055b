from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import checkpoint, devices, distributed, runs, training
from gendiff.training import Host, Settings, Task, Training

DATA = np.random.default_rng(0).normal(0.5, 1.0, (64, 3)).astype(np.float32)
START = {"w": np.linspace(-1, 1, 3, dtype=np.float32)}


def task(data):
    loss = lambda params, key, x: (x @ params["w"] - 1 + 0.1 * jax.random.normal(key)) ** 2
    return Task(loss, lambda key: training.minibatch(key, data, 8), lambda params: jnp.sum(params["w"] ** 2))


@partial(jax.jit, static_argnums=(0, 1))
def power_of(power, mesh, x, key):
    return {"y": x**power + jax.random.normal(key, x.shape)}


def of_seed(seed, steps=12, scale=1.0, host=Host()):  # noqa: B008 (immutable)
    return Training(jax.random.key(seed), START, task, scale * DATA * (1 + seed), Settings(steps, 0.05, every=4), host)


def arguments(seed, size=4):
    return np.arange(size, dtype=np.float32), jax.random.key(seed)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def parameters(state):
    return {"last": state.last, "best": state.best, "averaged": state.averaged, "step": state.step}


def compare(trainings):
    again = [member._replace(key=jax.random.clone(member.key)) for member in trainings]
    for state, alone in zip(runs.train(trainings), again, strict=True):
        close(parameters(state), parameters(training.train(*alone)))


@pytest.fixture
def programs(monkeypatch):
    """The numbers of runs of the called programs."""
    counts = []
    train, side_by_side = training.train, runs._side_by_side

    def counting_train(key, *others, **named):
        counts.append(len(key) if key.ndim else 1)
        return train(key, *others, **named)

    def counting_call(function, static, placement, inputs):
        counts.append(placement.mesh.shape["replica"])
        return side_by_side(function, static, placement, inputs)

    monkeypatch.setattr(training, "train", counting_train)
    monkeypatch.setattr(runs, "_side_by_side", counting_call)
    return counts


@pytest.mark.parametrize("count", [1, 3, 11])  # fewer and more than the eight devices
def test_runs_side_by_side_equal_runs_alone_and_share_programs(count, programs):
    runs.train([of_seed(seed) for seed in range(count)])
    assert programs == [count]
    compare([of_seed(seed) for seed in range(count)])
    found = runs.call(power_of, (2,), None, [arguments(seed) for seed in range(count)])
    for seed, drawn in enumerate(found):
        close(drawn, power_of(2, None, *arguments(seed)))


def test_arrays_that_all_runs_share_are_there_once(monkeypatch):
    sizes = []
    put = devices.Placement.put_context

    def counted(placement, context):
        sizes.append([np.shape(leaf) for leaf in jax.tree.leaves(context)])
        return put(placement, context)

    monkeypatch.setattr(devices.Placement, "put_context", counted)
    shared = lambda seed: of_seed(seed)._replace(context=DATA)
    compare([shared(seed) for seed in range(3)])
    x = np.arange(4, dtype=np.float32)
    for seed, drawn in enumerate(runs.call(power_of, (2,), None, [(x, jax.random.key(seed)) for seed in range(3)])):
        close(drawn, power_of(2, None, x, jax.random.key(seed)))
    assert sizes[0] == [DATA.shape]
    assert sizes[-1] == [(3,), x.shape, (3,)]


def test_runs_that_do_not_agree_are_computed_apart(programs):
    trainings = lambda: [of_seed(0), of_seed(1, steps=8), of_seed(2), of_seed(3)._replace(context=DATA[:8])]
    runs.train(trainings())
    assert sorted(programs) == [1, 1, 2]
    compare(trainings())
    inputs = lambda: [arguments(0), arguments(1, size=5), arguments(2)]
    for drawn, alone in zip(runs.call(power_of, (3,), None, inputs()), inputs(), strict=True):
        close(drawn, power_of(3, None, *alone))


@pytest.mark.parametrize("replica", [1, 2])
def test_runs_that_would_leave_devices_idle_equal_runs_alone(replica, monkeypatch):
    """As on accelerators, which share the batches of their runs."""
    few = lambda devices=None, runs=None, batch=None: distributed.make_mesh(jax.devices(), replica)
    monkeypatch.setattr(devices, "runs_mesh", few)
    compare([of_seed(seed) for seed in range(3)])
    for seed, drawn in enumerate(runs.call(power_of, (2,), None, [arguments(seed) for seed in range(3)])):
        close(drawn, power_of(2, None, *arguments(seed)))


def test_a_loss_that_is_not_finite_names_its_run():
    with pytest.raises(training.NotFinite, match="in runs 1"):
        runs.train([of_seed(0), of_seed(1, scale=np.nan), of_seed(2)])


def test_a_stopped_training_goes_on_side_by_side(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, metrics):
        if step == 8:
            raise Stopped

    host = lambda seed, report: Host(None, checkpoint.Checkpoints(tmp_path / str(seed)), report)
    with pytest.raises(Stopped):
        runs.train([of_seed(seed, host=host(seed, stop)) for seed in range(3)])
    began: list[int] = []
    record = lambda step, metrics: None if metrics else began.append(step)
    states = runs.train([of_seed(seed, host=host(seed, record)) for seed in range(3)])
    assert set(began) <= {4, 8}
    for seed, state in enumerate(states):
        close(parameters(state), parameters(training.train(*of_seed(seed))))


def test_checkpoints_of_some_runs_alone_are_refused(tmp_path):
    kept = Host(None, checkpoint.Checkpoints(tmp_path / "0"))
    with pytest.raises(ValueError, match="checkpoints must be of all runs or of none, got some"):
        runs.train([of_seed(0, host=kept), of_seed(1)])


def test_runs_that_end_by_themselves_are_resumed_together(tmp_path, programs):
    """Data of another scale need another number of steps; the validation is the size of the weights."""
    settings = Settings(40, 0.05, every=4, patience=8, decay=0.5)

    def patient(seed, report=lambda step, metrics: None, folder=None):
        kept = None if folder is None else checkpoint.Checkpoints(tmp_path / folder / str(seed))
        return Training(
            jax.random.key(seed), START, task, DATA * (0.2 + seed), settings, Host(None, kept, report)
        )  # fmt: skip

    def ends(states):
        return [{"best": state.best, "step": state.step, "best_step": state.best_step} for state in states]

    expected = ends([training.train(*patient(seed)) for seed in range(3)])
    steps = [int(end["step"]) for end in expected]
    assert len(set(steps)) > 1
    programs.clear()
    jax.tree.map(close, ends(runs.train([patient(seed, folder="whole") for seed in range(3)])), expected)

    def stop(step, metrics):
        if step > min(steps):
            raise KeyError

    with pytest.raises(KeyError):
        runs.train([patient(seed, stop, "parts") for seed in range(3)])
    jax.tree.map(close, ends(runs.train([patient(seed, folder="parts") for seed in range(3)])), expected)
    assert programs == [3, 3, 3]


def test_runs_go_on_from_states_of_one_step_together(programs):
    """As rounds of imitation do; a state that stands elsewhere goes on alone."""
    longer = Settings(20, 0.05, every=4)

    def further(states):
        return [
            of_seed(seed)._replace(key=jax.random.key(9 + seed), params=state, settings=longer)
            for seed, state in enumerate(states)
        ]

    states = lambda: [training.train(*of_seed(seed, steps=8 if seed == 2 else 12)) for seed in range(3)]
    expected = [parameters(training.train(*alone)) for alone in further(states())]
    begun = states()
    programs.clear()
    close([parameters(state) for state in runs.train(further(begun))], expected)
    assert sorted(programs) == [1, 2]


def test_a_notice_stops_all(monkeypatch):
    monkeypatch.setattr(distributed, "preempted", lambda: True)
    with pytest.raises(distributed.Preempted):
        runs.train([of_seed(seed) for seed in range(2)])
