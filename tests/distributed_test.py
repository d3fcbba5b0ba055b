import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import distributed, guidance, process, sampling, training
from gendiff.training import Host, Settings, Task

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
MESHES = pytest.mark.parametrize("devices", [1, 2, 8])


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return distributed.make_mesh(jax.devices()[:devices])


def test_there_are_eight_virtual_devices():
    assert len(jax.devices()) == 8
    assert distributed.make_mesh().size == 8


@MESHES
def test_mesh_has_two_automatic_axes(devices):
    mesh = mesh_of(devices)
    assert dict(mesh.shape) == {"replica": 1, "data": devices}
    assert dict(distributed.make_mesh(jax.devices()[:devices], devices).shape) == {"replica": devices, "data": 1}
    # With explicit axes a table could not be read at sharded places.
    table, places = jnp.arange(10.0), distributed.shard(mesh, np.arange(8))
    np.testing.assert_array_equal(jax.jit(lambda table, places: table[places])(table, places), np.arange(8))


@MESHES
def test_shard_and_replicate(devices):
    mesh, rows = mesh_of(devices), np.arange(16.0, dtype=np.float32).reshape(8, 2)
    batch = distributed.shard(mesh, {"x": rows, "y": rows[:, 0]})
    np.testing.assert_array_equal(batch["x"], rows)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(8 // devices, 2)}
    assert len(batch["y"].sharding.device_set) == devices
    copies = distributed.replicate(mesh, {"x": jnp.asarray(rows)})
    assert [shard.data.shape for shard in copies["x"].addressable_shards] == [(8, 2)] * devices


@MESHES
def test_replicas_may_be_donated(devices):
    original = {"x": jnp.arange(3.0), "key": jax.random.key(0)}
    copy = distributed.replicate(mesh_of(devices), original)
    jax.jit(lambda tree: (tree["x"] + 1, jax.random.fold_in(tree["key"], 1)), donate_argnums=0)(copy)
    assert not any(leaf.is_deleted() for leaf in original.values())


@MESHES
@pytest.mark.parametrize(("n", "chunk"), [(1, 4), (24, 4), (29, 4), (29, 1000)])
def test_chunked_is_vmap(n, chunk, devices):
    inputs = {"a": jnp.arange(2.0 * n).reshape(n, 2), "key": jax.random.split(jax.random.key(0), n)}
    function = lambda example: {
        "sum": jnp.sum(example["a"]) + jax.random.uniform(example["key"]),
        "twice": 2 * example["a"],
    }
    run = lambda mesh: jax.jit(lambda inputs: distributed.chunked(function, inputs, chunk, mesh))(inputs)
    expected = jax.vmap(function)(inputs | {"key": jax.random.clone(inputs["key"])})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(mesh_of(devices)), expected)
    again = inputs | {"key": jax.random.clone(inputs["key"])}
    uncut = jax.jit(partial(distributed.chunked, function, chunk=chunk, mesh=mesh_of(devices), cut=False))(again)
    assert len(uncut["sum"]) % devices == 0
    cut = distributed.gather(uncut, n)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), cut, expected)


@MESHES
def test_batches_are_split(devices):
    mesh, batch = mesh_of(devices), {"x": jnp.zeros((16, 2)), "scalar": jnp.zeros(())}
    parts = jax.jit(lambda batch: distributed.split_batch(mesh, batch))(batch)
    assert {shard.data.shape for shard in parts["x"].addressable_shards} == {(16 // devices, 2)}
    jax.tree.map(np.testing.assert_array_equal, parts, batch)


def test_a_batch_that_the_mesh_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="rows must be a multiple of the 8 devices, got 9"):
        jax.jit(lambda batch: distributed.split_batch(mesh_of(8), batch))(jnp.zeros(9))
    with pytest.raises(ValueError, match="rows must be a multiple of the 8 devices, got 9"):
        distributed.shard(mesh_of(8), np.zeros(9))


@pytest.mark.parametrize(
    "batch", [{"x": np.zeros((5, 2)), "y": np.zeros(4)}, {"x": np.zeros(5), "y": np.zeros(())}, {}]
)
def test_arrays_without_a_common_leading_axis_are_an_error(batch):
    same = lambda batch: batch
    for mapping in (lambda: distributed.chunked(same, batch, 2), lambda: distributed.by_process(same, batch)):
        with pytest.raises(ValueError, match="inputs must "):
            mapping()


def test_cpu_trains_on_one_device():
    assert distributed.training_mesh().size == 1


@pytest.mark.parametrize(("batch", "devices"), [(16, 8), (9, 1), (None, 1)])
def test_cores_share_a_batch_that_they_divide(batch, devices):
    assert distributed.training_mesh(batch, every_core=True).size == devices
    assert distributed.training_mesh(batch).size == 1


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a chip of a TPU."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices: int, per_slice: int = 4) -> list[Device]:
    """Chips of slices of 2 x (per_slice / 2)."""
    return [
        Device(place * per_slice + i, place, place, (i % 2, i // 2, 0))  # process: a host a slice
        for place, i in itertools.product(range(slices), range(per_slice))
    ]


@pytest.mark.parametrize(("batch", "shape"), [(None, (1, 8)), (16, (1, 8)), (1000, (1, 8)), (12, (2, 4)), (9, (8, 1))])
def test_a_batch_is_shared_by_as_many_accelerators_as_divide_it(batch, shape):
    mesh = distributed.training_mesh(batch, chips(1, 8))
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(chips(1, 8))


@pytest.mark.parametrize(
    ("kind", "sides", "replica"),
    [("TPU v5", (4, 4, 4), 8), ("TPU v5", (4, 4, 4), 2), ("TPU v4", (4, 4, 4), 8), ("TPU v6 lite", (4, 4, 1), 8)],
)
def test_a_torus_may_be_cut_in_any_way(kind, sides, replica):
    # Along the axes of the torus alone 64 devices would be 4 x 16 and 16 x 4.
    places = list(itertools.product(*map(range, sides)))
    devices = [Device(i, 0, i // 4, place, device_kind=kind) for i, place in enumerate(places)]
    mesh = distributed.make_mesh(devices, replica)
    assert mesh.devices.shape == (replica, len(devices) // replica)
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize("replica", [1, 2, 4, 8])
def test_slices_are_neighbours_on_data(replica):
    mesh = distributed.make_mesh(chips(2), replica)
    assert dict(mesh.shape) == {"replica": replica, "data": 8 // replica}
    assert set(mesh.devices.flat) == set(chips(2))
    slices = np.vectorize(lambda chip: chip.slice_index, otypes=[int])(mesh.devices)
    # Along `data` the slice changes as seldom as it can: within one row only where one row is of both.
    assert (np.diff(slices, axis=1) != 0).sum() == (replica == 1)


def test_a_mesh_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="mesh: devices must be one or more, got none"):
        distributed.make_mesh([])


def test_slices_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"slices must have one size, got \[1, 4\] devices"):
        distributed.make_mesh(chips(2)[:5])


def test_chunked_splits_the_work():
    # The count of operations counts the loop's body once, and that has `chunk` examples a device on any number of
    # devices.  Without a split every device would work on 8 chunks.
    def flops(devices):
        function = lambda inputs: distributed.chunked(lambda x: x @ x.T, inputs, 4, mesh_of(devices))
        return jax.jit(function).lower(jnp.zeros((64, 16, 16))).compile().cost_analysis()["flops"]

    assert flops(8) < 1.5 * flops(1)


def test_samples_do_not_depend_on_devices_or_chunks(gaussian):
    p = process.ddpm(process.linear_betas())
    keys = jax.random.split(jax.random.key(1), 48)

    def draw(devices, chunk):
        @jax.jit
        def run(keys):
            model = guidance.guide(p, lambda x, t: -jnp.sum(x**2))(gaussian.denoiser(p))
            draw_one = lambda key: sampling.sample(p, sampling.ancestral(p, model), p.grid(12), key, (1,))
            return distributed.chunked(draw_one, keys, chunk, None if devices is None else mesh_of(devices))

        return np.asarray(run(keys))

    expected = draw(None, 48)
    for devices, chunk in ((1, 48), (2, 5), (8, 4)):
        np.testing.assert_allclose(draw(devices, chunk), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("drawn", "others"), [(True, (2, 8)), (False, (8,))], ids=["drawn", "sequence"])
def test_training_does_not_depend_on_devices(drawn, others):
    data = np.random.default_rng(0).normal(0.5, 1.0, (64, 3)).astype(np.float32)
    start = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "v": np.ones(4, np.float32)}

    def loss(params, key, example):
        noise = 0.1 * jax.random.normal(key, example.shape)
        return (jnp.tanh((example + noise) @ params["w"]) @ params["v"] - jnp.sum(example)) ** 2

    def task(data):
        draw = (lambda key: training.minibatch(key, data, 16)) if drawn else None
        validate = lambda params: jnp.mean(jax.vmap(lambda x: loss(params, jax.random.key(0), x))(data))
        return Task(loss, draw, validate)

    def run(devices):
        batches = None if drawn else [np.roll(data, -i, axis=0)[:16] for i in range(12)]
        settings = Settings(12, 0.03, every=6)
        return training.train(
            jax.random.key(2), start, task, jnp.asarray(data), settings, Host(mesh_of(devices)), batches
        )

    expected = run(1)
    for devices in others:
        state = run(devices)
        assert len(state.last["w"].sharding.device_set) == devices
        # Sums in another order: float error, which Adam's division by small gradients magnifies a little.
        for name in start:
            np.testing.assert_allclose(state.last[name], expected.last[name], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.best[name], expected.best[name], rtol=1e-4, atol=1e-5)


def test_no_examples_are_an_error():
    with pytest.raises(ValueError, match="chunked: examples must be >= 1 and whole, got 0"):
        distributed.chunked(lambda x: x, jnp.zeros((0, 2)))


@pytest.mark.parametrize("chunk", [0, -4, 2.5])
def test_a_chunk_has_an_example(chunk):
    with pytest.raises(ValueError, match=f"chunked: chunk must be >= 1 and whole, got {chunk}"):
        distributed.chunked(lambda x: x, jnp.zeros((4, 2)), chunk)


def test_a_batch_of_the_host_has_one_number_of_rows():
    with pytest.raises(ValueError, match=r"batch must be arrays with one number of rows, got shapes \(16, 2\), \(8,\)"):
        distributed.shard(mesh_of(8), {"x": np.zeros((16, 2)), "y": np.zeros(8)})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID must be set beside JAX_COORD"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS must be set beside JAX_NUM_PROC"),
        (ADDRESS | {"JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID must be < JAX_NUM_PROCESSES \(2\), got 2"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES must be a whole number from 1 to 1000000, got '0'"),
        (
            ADDRESS | {"GENDIFF_HEARTBEAT_SECONDS": "1"},
            "HEARTBEAT_SECONDS must be a whole number from 5 to 1000000",
        ),
        (ADDRESS | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be a whole number from 0 to 1000000, got 'one'"),
        (ADDRESS | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a whole number from 0 to 1000000, got '-1'"),
        (
            ADDRESS | {"GENDIFF_START_SECONDS": "1.5"},
            "START_SECONDS must be a whole number from 1 to 1000000",
        ),
        (ADDRESS | {"GENDIFF_START_SECONDS": "9" * 20}, "START_SECONDS must be a whole number from 1 to 1000000, got"),
        *(
            (ADDRESS | {"JAX_COORDINATOR_ADDRESS": text}, f"JAX_COORDINATOR_ADDRESS must be host:port .*, got '{text}'")
            for text in ("nonsense", "host:", ":80", "host:http", "host:0", "host:65536")
        ),
        (
            ADDRESS | {"GENDIFF_HEARTBEAT_SECONDS": "-1"},
            "HEARTBEAT_SECONDS must be a whole number from 5 to 1000000, got '-1'",
        ),
    ],
)
def test_what_is_told_of_other_processes_is_checked(variables, message):
    with pytest.raises(distributed.StartError, match=message):
        distributed.start(variables)


def test_one_process_needs_no_other():
    distributed.start(ADDRESS | {"JAX_NUM_PROCESSES": "1"})
    assert not distributed.joined()
