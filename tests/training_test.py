from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gendiff import distributed, losses, steps, training, types
from gendiff.checkpoint import Checkpoints
from gendiff.training import Host, Settings, Task
from gendiff.types import BATCH

FALSE_ALARM = 1e-4


def run_steps(settings: Settings, loss, batches) -> tuple[list, list]:
    """Parameters and EMAs after every step from 0, with a scalar parameter."""
    optimiser = steps.adam(settings)
    step = jax.jit(steps.make_step(loss, optimiser, settings.decay))
    state = steps.init(jax.random.key(0), jnp.float32(0.0), optimiser)
    path, ema = [], []
    for batch in batches:
        state, _ = step(state, batch)
        path.append(float(state.last))
        ema.append(float(state.averaged))
    return path, ema


def trained(key, params, task, settings) -> tuple:
    """The last state of a task without a context, and the metrics of its blocks."""
    blocks = []
    host = Host(report=lambda step, metrics: blocks.append(metrics) if metrics else None)
    state = training.train(key, params, lambda context: task, (), settings, host)
    return state, {name: np.array([block[name] for block in blocks]) for name in blocks[0]}


def slope(params, key, example):
    """A loss with the gradient `example`: Adam moves by minus the rate, whatever its size."""
    return params * example


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rate_follows_its_schedule(warmup, schedule):
    length, rate = 12, 0.1
    path, _ = run_steps(Settings(length, rate, warmup=warmup, schedule=schedule), slope, [jnp.ones(3)] * length)
    k = np.arange(length)
    done = (k - warmup) / (length - warmup)
    fall = {"constant": np.ones(length), "linear": 1 - done, "cosine": 0.5 * (1 + np.cos(np.pi * done))}[schedule]
    rates = np.where(k < warmup, rate * k / max(warmup, 1), rate * fall)
    np.testing.assert_allclose(path, -np.cumsum(rates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_ema_is_a_moving_average_with_a_quick_start(decay):
    path, ema = run_steps(Settings(20, 0.1, decay=decay, schedule="constant"), slope, [jnp.ones(2)] * 20)
    expected, average = [], 0.0
    for k, params in enumerate(path):
        d = min(decay, (1 + k) / (10 + k))
        average = d * average + (1 - d) * params
        expected.append(average)
    np.testing.assert_allclose(ema, expected, rtol=1e-5)


def test_weight_decay_is_decoupled():
    # Loshchilov and Hutter 2019: with a loss that is constant only the decay is left, w (1 - rate decay)^n.
    settings = Settings(5, 0.1, schedule="constant", weight_decay=0.5, clip=None)
    optimiser = steps.adam(settings)
    step = steps.make_step(lambda params, key, example: 0 * params * example, optimiser)
    state = steps.init(jax.random.key(0), jnp.float32(2.0), optimiser)
    for _ in range(5):
        state, _ = step(state, jnp.ones(2))
    np.testing.assert_allclose(state.last, 2.0 * (1 - 0.1 * 0.5) ** 5, rtol=1e-6)


def test_run_goes_on_from_a_state():
    # 8 steps, then on to 20, are 20 steps: moments, key and step are carried over.
    run = lambda start, steps: training.train(
        jax.random.key(1), start, drawn, jnp.asarray(DATA), Settings(steps, 0.1, schedule="constant", every=4)
    )
    half = run(START, 8)
    np.testing.assert_array_equal(run(half, 20).last["w"], run(START, 20).last["w"])
    assert not half.last["w"].is_deleted()


def test_blocks_have_a_step():
    with pytest.raises(ValueError, match="training: every must be >= 1 and whole, got 0"):
        training.train(jax.random.key(1), START, drawn, jnp.asarray(DATA), Settings(4, 0.1, every=0))


def test_packed_state_is_the_state():
    settings = Settings(8, 0.1, every=4)
    state = training.train(jax.random.key(1), START, drawn, jnp.asarray(DATA), settings)
    again = steps.unpacked(jax.tree.map(np.asarray, steps.packed(state)), START, settings)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), again, state)
    assert all(jax.tree.leaves(same))


def test_gradients_are_clipped_and_reported_before():
    # After a gradient of 1000 Adam would hardly move for a gradient of 1; clipped to 1, both move by the rate.
    settings = Settings(2, 0.1, schedule="constant", clip=1.0)
    path, _ = run_steps(settings, slope, [jnp.array([1000.0]), jnp.array([1.0])])
    np.testing.assert_allclose(path, [-0.1, -0.2], rtol=1e-5)
    step = steps.make_step(slope, steps.adam(settings))
    state = steps.init(jax.random.key(0), jnp.float32(2.0), steps.adam(settings))
    _, metrics = step(state, jnp.array([1000.0, 0.0]))
    np.testing.assert_allclose([metrics["loss"], metrics["gradient_norm"]], [1000.0, 500.0])


def test_key_of_a_batch_is_no_key_of_an_example():
    # A batch must not be drawn from the bits that noise one of its examples.  Here a batch is made of the key it is
    # drawn with, and the loss says whether an example's key is that one.
    draw = lambda key: jnp.broadcast_to(jax.random.key_data(key), (8, 2))
    loss = lambda params, key, example: 0 * params + jnp.all(jax.random.key_data(key) == example).astype(float)
    _, metrics = trained(jax.random.key(1), jnp.float32(0.0), Task(loss, draw), Settings(steps=4, every=1))
    np.testing.assert_array_equal(metrics["loss"], np.zeros(4))


def test_a_loss_can_take_means_over_its_batch():
    # Squared distances from the batch's mean: the loss is w^2 var(batch), its gradient 2 w var(batch).
    loss = lambda w, key, example: (w * example - jax.lax.pmean(w * example, types.BATCH)) ** 2
    task = lambda context: Task(loss)
    batch, settings = np.float32([1.0, 4.0, -2.0, 7.0]), Settings(1, 0.0, every=1)
    seen = {}
    host = Host(report=lambda step, metrics: seen.update(metrics))
    training.train(jax.random.key(0), jnp.float32(3.0), task, (), settings, host, [batch])
    np.testing.assert_allclose(seen["loss"], 9 * batch.var(), rtol=1e-5)
    np.testing.assert_allclose(seen["gradient_norm"], 6 * batch.var(), rtol=1e-5)


def test_every_step_and_example_has_its_own_key():
    number = lambda key: jax.random.uniform(key)
    draw = lambda key: jnp.broadcast_to(number(key), (3,))
    seen = []

    def loss(params, key, example):
        jax.debug.callback(lambda *pair: seen.append(pair), number(key), example)
        return 0 * params

    jax.block_until_ready(trained(jax.random.key(2), jnp.float32(0.0), Task(loss, draw), Settings(5, every=5)))
    jax.effects_barrier()
    assert len({float(noise) for noise, _ in seen}) == 15
    assert len({float(batch) for _, batch in seen}) == 5


DATA = np.random.default_rng(0).normal(1.5, 1.0, (64, 3)).astype(np.float32)


def noisy(params, key, example):
    """Least at the mean of the data; uses its key."""
    return jnp.sum((params["w"] - example) ** 2) + 0.1 * jnp.dot(params["w"], jax.random.normal(key, (3,)))


def drawn(data) -> Task:
    return Task(noisy, lambda key: training.minibatch(key, data, 8), lambda params: jnp.sum((params["w"] - 1.5) ** 2))


START = {"w": np.zeros(3, np.float32)}


def same(first, second) -> None:
    """Bit for bit, typed keys included."""
    raw = lambda leaf: np.asarray(jax.random.key_data(leaf)) if is_key(leaf) else np.asarray(leaf)
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b), strict=True), first, second)


def test_training_finds_the_optimum():
    task = Task(lambda params, key, example: jnp.sum((params["w"] - example) ** 2), lambda key: jnp.asarray(DATA))
    state, metrics = trained(jax.random.key(0), START, task, Settings(400, 0.03, decay=0.9, every=100))
    np.testing.assert_allclose(state.best["w"], DATA.mean(0), atol=0.01)
    assert metrics["loss"].shape == (4,)
    assert int(state.step) == 400


@pytest.mark.parametrize("every", [5, 20])
def test_validation_and_reports_change_no_step(every):
    settings, reports, others = Settings(20, 0.1, every=10), [], []
    run = lambda every, seen: training.train(
        jax.random.key(0), START, drawn, jnp.asarray(DATA), settings._replace(every=every),
        Host(report=lambda step, values: seen.append((step, values)) if values else None),
    )  # fmt: skip
    state, other = run(10, reports), run(every, others)
    for name in ("last", "averaged"):
        np.testing.assert_array_equal(getattr(state, name)["w"], getattr(other, name)["w"])
    assert [step for step, _ in reports] == [10, 20]
    assert [step for step, _ in others] == list(range(every, 21, every))
    # The metrics are means over the steps of a block.
    losses_of = lambda seen: np.mean([values["loss"] for _, values in seen])
    np.testing.assert_allclose(losses_of(reports), losses_of(others), rtol=1e-6)
    assert reports[-1][1]["validation_loss"] == others[-1][1]["validation_loss"]


def test_the_state_names_its_parameters():
    # The last ones, their average, and the average that validates best.
    settings, seen = Settings(6, 0.1, decay=0.5, every=2, schedule="constant"), {}
    task = Task(slope, lambda key: jnp.ones(2), lambda params: (params + 0.13) ** 2)
    host = Host(report=lambda step, metrics: seen.update({step: metrics.get("validation_loss")}))
    state = training.train(jax.random.key(0), jnp.float32(0.0), lambda context: task, (), settings, host)
    path, averages = run_steps(settings, slope, [jnp.ones(2)] * 6)
    np.testing.assert_allclose(state.last, path[-1], rtol=1e-6)
    np.testing.assert_allclose(state.averaged, averages[-1], rtol=1e-6)
    best = min((2, 4, 6), key=lambda step: (averages[step - 1] + 0.13) ** 2)
    assert 0 < best < 6, "best is neither the first nor the last"
    np.testing.assert_allclose(state.best, averages[best - 1], rtol=1e-6)
    assert (int(state.best_step), float(state.best_loss)) == (best, seen[best])


def test_a_task_draws_its_batches_or_gets_them():
    with pytest.raises(ValueError, match="training: data must be batches from the host"):
        trained(jax.random.key(0), START, Task(noisy), Settings(4))


class Batches(Iterator):
    """Batches without end, with a position, as Grain's iterators have."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self):
        batch = np.roll(DATA, -5 * self.position, axis=0)[:8]
        self.position += 1
        return batch

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Stopped(Exception):
    pass


class Interrupted(Batches):
    """Stops in the middle of a block."""

    def __next__(self):
        if self.position == 6:
            raise Stopped
        return super().__next__()


def stop(step, metrics):
    if step == 8:
        raise Stopped


SETTINGS = Settings(16, 0.1, every=4, warmup=2)
SEQUENCE = [np.roll(DATA, -5 * i, axis=0)[:8] for i in range(16)]


@pytest.mark.parametrize(
    ("data", "stopped", "report"),
    [
        (lambda: None, lambda: None, stop),
        (lambda: SEQUENCE, lambda: SEQUENCE, stop),
        (Batches, Batches, stop),
        (Batches, Interrupted, lambda step, metrics: None),
    ],
    ids=["drawn", "sequence", "iterator", "iterator, within a block"],
)
def test_resume_is_no_interruption(data, stopped, report, tmp_path):
    # Bit for bit on one device: parameters, EMA, optimiser, key and the best so far.
    def train(data, **host):
        return training.train(jax.random.key(3), START, drawn, jnp.asarray(DATA), SETTINGS, Host(**host), data)

    reference = train(data())
    with pytest.raises(Stopped):
        train(stopped(), checkpoints=Checkpoints(tmp_path), report=report)
    done = []
    record = lambda step, metrics: done.append(step) if metrics else None
    same(train(data(), checkpoints=Checkpoints(tmp_path), report=record), reference)
    assert done in ([12, 16], [8, 12, 16]), "it went on, and did not begin again"
    # A finished run is read, not run.
    done.clear()
    same(train(data(), checkpoints=Checkpoints(tmp_path), report=record), reference)
    assert not done


def test_resume_needs_the_position(tmp_path):
    # The test above can fail: an iterator that cannot be set back gives other batches.
    def train(**host):
        data = (batch for batch in Batches())
        return training.train(jax.random.key(3), START, drawn, jnp.asarray(DATA), SETTINGS, Host(**host), data)

    with pytest.raises(Stopped):
        train(checkpoints=Checkpoints(tmp_path), report=stop)
    assert not np.array_equal(train(checkpoints=Checkpoints(tmp_path)).last["w"], train().last["w"])


def test_not_finite_stops_after_the_last_good_checkpoint(tmp_path):
    loss = lambda params, key, example: jnp.sum(params["w"] * example)
    sequence = [np.ones((2, 3), np.float32)] * 6 + [np.full((2, 3), np.nan, np.float32)] * 6
    task = lambda context: Task(loss)
    settings = Settings(12, 0.1, every=2)
    with pytest.raises(training.NotFinite, match="training: loss must be finite, got nan by step 8"):
        training.train(jax.random.key(0), START, task, (), settings, Host(None, Checkpoints(tmp_path)), sequence)
    last = Checkpoints(tmp_path).restore(
        steps.init(jax.random.key(0), jax.tree.map(jnp.asarray, START), steps.adam(settings))
    )
    assert int(last.step) == 6
    assert np.isfinite(last.last["w"]).all()


def test_best_is_kept_and_patience_ends_the_run():
    # Adam walks down by 0.1 a step; the validation loss is least where the EMA passes -0.32.
    settings = Settings(60, 0.1, decay=0.5, every=2, schedule="constant", patience=6)
    _, ema = run_steps(settings, slope, [jnp.ones(2)] * 60)
    validation = (np.array(ema) + 0.32) ** 2
    reports = {}
    task = lambda context: Task(slope, lambda key: jnp.ones(2), lambda params: (params + 0.32) ** 2)
    host = Host(report=lambda step, metrics: reports.update({step: metrics["validation_loss"]} if metrics else {}))
    state = training.train(jax.random.key(0), jnp.float32(0.0), task, (), settings, host)
    for step, value in reports.items():
        np.testing.assert_allclose(value, validation[step - 1], rtol=1e-4, atol=1e-7)
    best = min(reports, key=lambda step: validation[step - 1])
    assert int(state.best_step) == best
    assert int(state.step) == best + 6
    np.testing.assert_allclose(state.best, ema[best - 1], rtol=1e-5)
    np.testing.assert_allclose(state.best_loss, validation[best - 1], rtol=1e-4)


def test_without_validation_the_newest_is_the_best():
    state = steps.init(jax.random.key(0), jnp.float32(0.0), steps.adam(Settings(4)))
    moved, metrics = steps.select(state._replace(averaged=jnp.float32(3.0), step=jnp.int32(7)), None)
    assert float(moved.best) == 3.0
    assert int(moved.best_step) == 7
    assert metrics == {}
    # A validation loss of NaN is not better than anything.
    kept, _ = steps.select(moved._replace(averaged=jnp.float32(4.0)), lambda params: jnp.float32(jnp.nan))
    assert float(kept.best) == 3.0


@pytest.mark.parametrize("devices", [1, 2])
def test_an_empty_batch_is_an_error(devices):
    host = Host(distributed.make_mesh(jax.devices()[:devices]))
    task = lambda data: Task(noisy, lambda key: data[:0])
    with pytest.raises(ValueError, match="training: rows of the batch must be >= 1 and whole, got 0"):
        training.train(jax.random.key(0), START, task, jnp.asarray(DATA), SETTINGS, host)


def test_too_few_batches():
    with pytest.raises(ValueError, match="training: data must have 16 batches, got 5"):
        training.train(jax.random.key(0), START, drawn, jnp.asarray(DATA), SETTINGS, data=SEQUENCE[:5])


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize(("devices", "replica"), [(1, 1), (6, 3), (8, 2), (8, 8)])
def test_replicas_of_a_training_are_copies_that_do_not_change_it(devices, replica, fully_sharded):
    mesh = distributed.make_mesh(jax.devices()[:devices], replica)
    key, data, settings = jax.random.key(4), jnp.asarray(DATA), Settings(6, 0.1, every=3)
    expected = training.train(
        jax.random.clone(key), START, drawn, data, settings, Host(distributed.make_mesh(jax.devices()[:1]))
    )
    found = training.train(key, START, drawn, data, settings, Host(mesh, fully_sharded=fully_sharded))
    np.testing.assert_allclose(found.last["w"], expected.last["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_caller_keeps_its_arrays(devices):
    # Blocks donate the state, so it must not hold the caller's arrays.
    key, params, data = jax.random.key(4), {"w": jnp.zeros(3)}, jnp.asarray(DATA)
    mesh = distributed.make_mesh(jax.devices()[:devices])
    training.train(key, params, drawn, data, Settings(2, every=2), Host(mesh))
    assert not any(leaf.is_deleted() for leaf in (key, params["w"], data))


def test_blocks_share_one_program():
    # Every block after the first is a cache hit: the task is traced once for steps, in any number, once for the
    # validation, and once for the size of its batch.
    task = chex.assert_max_traces(drawn, n=3)
    training.train(jax.random.key(5), START, task, jnp.asarray(DATA), Settings(22, every=4))


def test_minibatch_takes_whole_rows():
    examples = {"a": jnp.arange(10), "b": jnp.arange(20).reshape(10, 2)}
    batch = jax.jit(lambda key: training.minibatch(key, examples, 2000))(jax.random.key(6))
    np.testing.assert_array_equal(batch["b"], np.stack([2 * batch["a"], 2 * batch["a"] + 1], -1))
    for bad, size, message in (
        (examples | {"a": jnp.arange(3)}, 4, r"one number of rows, got shapes \(3,\), \(10, 2\)"),
        ({"a": jnp.zeros(())}, 4, "one number of rows"),
        ({"a": jnp.zeros((0, 2))}, 4, "minibatch: rows must be >= 1 and whole, got 0"),
        (examples, 0, "minibatch: size must be >= 1 and whole, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            training.minibatch(jax.random.key(6), bad, size)
    # Chi-square: rows are uniform.
    assert stats.chisquare(np.bincount(batch["a"], minlength=10)).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("rows", "expected"), [(1, 8192), (8192, 8192), (8193, 16384), (100_000, 131_072)])
def test_capacity_is_a_power_of_two(rows, expected):
    assert training.capacity(rows) == expected
    padded = training.padded(np.ones((rows, 2), np.float32), expected)
    assert padded.dtype == np.float32
    np.testing.assert_array_equal(padded, np.repeat([[1.0, 1.0], [0.0, 0.0]], [rows, expected - rows], axis=0))


def test_a_state_keeps_its_types_under_x64():
    with jax.enable_x64(True):
        task = training.Task(
            lambda w, key, x: (w - x) ** 2, lambda key: jnp.ones(2, jnp.float32), lambda w: jnp.float64(w) ** 2
        )
        state, _ = trained(jax.random.key(0), jnp.float32(0.0), task, training.Settings(4, every=2))
    assert state.best_loss.dtype == jnp.float32


def test_settings_out_of_range_are_named():
    task = training.Task(lambda w, key, x: (w - x) ** 2, lambda key: jnp.ones(2))
    with pytest.raises(ValueError, match="schedule must be 'cosine' or 'linear' or 'constant', got 'Linear'"):
        trained(jax.random.key(0), jnp.float32(0.0), task, Settings(4, every=2, schedule="Linear"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -5}, "training: steps must be >= 0 and whole, got -5"),
        ({"steps": 2.5}, "training: steps must be >= 0 and whole, got 2.5"),
        ({"rate": -1}, "training: rate must be >= 0, got -1"),
        ({"rate": float("nan")}, "training: rate must be >= 0, got nan"),
        ({"decay": 2}, "training: decay must be >= 0 and <= 1, got 2"),
        ({"patience": -1}, "training: patience must be >= 0 and whole, got -1"),
        ({"warmup": -1}, "training: warmup must be >= 0 and whole, got -1"),
        ({"clip": 0}, "training: clip must be > 0, got 0"),
        ({"clip": -1.0}, "training: clip must be > 0, got -1.0"),
        ({"weight_decay": -0.1}, "training: weight_decay must be >= 0, got -0.1"),
        ({"every": -2}, "training: every must be >= 1 and whole, got -2"),
    ],
)
def test_every_training_checks_its_settings(changes, message):
    settings, key, data = Settings(**{"steps": 4, "every": 2} | changes), jax.random.key(0), jnp.asarray(DATA)
    state = steps.init(jax.random.clone(key), {"w": jnp.zeros(3)}, steps.adam(Settings(4)))
    stacked, many = {"w": jnp.zeros((2, 3))}, jax.random.split(key, 2)
    for run in (
        lambda: training.train(jax.random.clone(key), START, drawn, data, settings),
        lambda: training.train(jax.random.clone(key), state, drawn, data, settings),
        lambda: training.train(many, stacked, drawn, data, settings),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            run()


@pytest.mark.parametrize("batches", [None, [(np.zeros((10, 3), np.float32), np.zeros(3, np.float32))] * 4])
def test_a_batch_has_one_number_of_rows(batches):
    loss = lambda params, key, example: jnp.sum(params["w"] * example[0])
    task = lambda data: Task(loss, None if batches else lambda key: (jnp.zeros((10, 3)), jnp.zeros(3)))
    with pytest.raises(ValueError, match=r"one number of rows, got shapes \(10, 3\), \(3,\)"):
        training.train(jax.random.key(0), START, task, (), Settings(4, every=2), data=batches)


def test_a_training_of_narrower_parameters_keeps_their_type():
    task = Task(
        losses.Ensemble(lambda w, key, x: jnp.sum((w - x.astype(w.dtype)) ** 2)),
        lambda key: jax.random.normal(key, (8, 2, 3)),
        lambda w: jnp.sum(w**2),
    )
    start = jnp.ones((2, 3), jnp.bfloat16)
    state, metrics = trained(jax.random.key(0), start, task, Settings(4, 0.1, every=2))
    assert {state.last.dtype, state.averaged.dtype, state.best.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(metrics["loss"]).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_loss_that_looks_at_its_batch_sees_all_of_it_on_any_devices(devices):
    # The mean over the batch's axis is that of the whole batch, not of a device's part.
    def loss(params, key, x):
        return (jnp.sum(x * params["w"]) - jax.lax.pmean(jnp.sum(x), BATCH)) ** 2

    task = lambda data: Task(loss, lambda key: training.minibatch(key, data, 16))
    mesh = distributed.make_mesh(jax.devices()[:devices])
    settings = Settings(6, 0.1, every=3, schedule="constant", clip=None)
    found = training.train(jax.random.key(3), START, task, jnp.asarray(DATA), settings, Host(mesh)).last["w"]
    # By hand, with the same batches.
    state = steps.init(jax.random.key(3), jax.tree.map(jnp.asarray, START), steps.adam(settings))
    drawn_step = steps.make_drawn_step(steps.make_step(loss, steps.adam(settings)), task(jnp.asarray(DATA)).draw)
    for _ in range(6):
        state, _metrics = drawn_step(state)
    np.testing.assert_allclose(found, state.last["w"], rtol=1e-4, atol=1e-5)
    assert losses.looks_at_batch(loss, START, jax.random.key(0), DATA)
    assert not losses.looks_at_batch(lambda params, key, x: jnp.sum(x), START, jax.random.key(0), DATA)


@pytest.mark.parametrize("changes", [{"warmup": 20}, {"clip": float("inf")}, {"clip": None}])
def test_a_long_warm_up_and_no_limit_of_the_gradient_are_settings(changes):
    state = training.train(jax.random.key(0), START, drawn, jnp.asarray(DATA), Settings(4, every=2)._replace(**changes))
    assert int(state.step) == 4
    assert np.isfinite(state.last["w"]).all()
