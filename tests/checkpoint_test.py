"""Checkpoints come back as they were, or not at all."""

import contextlib
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from gendiff import distributed, training
from gendiff.checkpoint import Archive, CheckpointError, Checkpoints, load, save
from gendiff.training import Host, Settings, Task


class Pair(NamedTuple):
    """A result with two fields."""

    left: np.ndarray
    right: dict


def same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (np.asarray(x).dtype, np.asarray(x).shape) == (np.asarray(y).dtype, np.asarray(y).shape)
        np.testing.assert_array_equal(x, y)


def test_every_kind_of_array_comes_back(tmp_path: Path) -> None:
    tree = {
        "float": np.linspace(0, 1, 7, dtype=np.float32),
        "nested": {"count": np.int64(12), "flag": np.array([True, False]), "scalar": np.float64(0.5)},
        "empty": np.zeros((0, 2), np.float32),
        "not_finite": np.array([np.nan, np.inf]),
    }
    save(tmp_path / "one", tree, seconds=1.5)
    loaded, notes = load(tmp_path / "one")
    same(loaded, jax.tree.map(np.asarray, tree))
    assert notes == {"seconds": 1.5}


def test_a_phase_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> Pair:
        calls.append(1)
        return Pair(np.arange(3), {"x": jnp.ones(2)})

    first = Archive(tmp_path).once("a/b", compute, Pair)
    again = Archive(tmp_path)
    second = again.once("a/b", compute, Pair)
    assert len(calls) == 1
    assert isinstance(second, Pair)
    same(first, second)
    assert again.seconds["a/b"] > 0
    assert Archive(None).once("a/b", compute, Pair).left.tolist() == [0, 1, 2]
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "one"
    save(folder, {"a": np.arange(1000.0)})
    for path in [path for path in folder.rglob("*") if path.is_file() and "/d/" in str(path)]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        if damage != "remove":
            path.write_bytes(bytes(content if damage == "flip" else content[:-5]))
    with pytest.raises(CheckpointError, match=f"checkpoint {folder}: must "):
        load(folder)


def test_a_write_that_fails_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "blocked" / "one", {"a": np.ones(3)})
    archive = Archive(tmp_path)
    (tmp_path / "phase").mkdir()
    (tmp_path / "phase" / "result.orbax-checkpoint-tmp").mkdir()  # as a killed save leaves it
    assert archive.once("phase", lambda: {"a": np.ones(1)})["a"] == 1


def test_training_checkpoints_keep_keys_types_and_the_newest_two(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "steps")
    state = {"key": jax.random.key(3), "params": Pair(jnp.arange(4.0), {"b": jnp.zeros((), jnp.int32)})}
    assert checkpoints.restore(state) is state  # without checkpoints
    for step in (10, 20, 30):
        left = state["params"].left + step
        checkpoints.save(step, state | {"params": state["params"]._replace(left=left)})
    restored = checkpoints.restore(state)
    assert isinstance(restored["params"], Pair)
    np.testing.assert_array_equal(restored["params"].left, np.arange(4.0) + 30)
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state["key"]))
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["20", "30"]


def test_a_place_where_no_folder_can_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (
        lambda: save(tmp_path / "file" / "result", {"a": np.zeros(2)}),
        lambda: Checkpoints(tmp_path / "file").save(1, {"a": np.zeros(2)}),
    ):
        with pytest.raises(CheckpointError, match="could not be written"):
            write()
    save(tmp_path / "place" / "result", {"a": np.zeros(2)})
    assert [entry.name for entry in (tmp_path / "place").iterdir()] == ["result"]


# Restoring into another state.

WIDE = {"w": jnp.zeros((3, 16)), "b": jnp.zeros(3)}
NARROW = {"w": jnp.ones((3, 4)), "b": jnp.zeros(3)}


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (NARROW, WIDE, r"w must be float32 \(3, 16\), got float32 \(3, 4\)"),
        (WIDE, NARROW, r"w must be float32 \(3, 4\), got float32 \(3, 16\)"),
        (NARROW, {"w": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.zeros(3)}, r"w must be bfloat16 \(3, 4\), got float32"),
        (NARROW, {"w": jnp.ones((3, 4))}, r"b must be absent, got float32 \(3,\)"),
        (NARROW, NARROW | {"c": jnp.zeros(2)}, r"c must be float32 \(2,\), got none"),
        (NARROW, {"w": [jnp.ones((3, 4))], "b": jnp.zeros(3)}, r"w\.0 must be float32 \(3, 4\), got none"),
        (
            optax.sgd(0.1, 0.9).init(NARROW), optax.adam(0.1).init(NARROW),
            r"0\.count must be int32 \(\), got none; 0\.mu\.b must be .*; and 4 more",
        ),
        (
            {"key": jax.random.key(0, impl="rbg")}, {"key": jax.random.key(0, impl="unsafe_rbg")},
            r"key must be uint32 \(4,\) \(keys of unsafe_rbg\), got uint32 \(4,\) \(keys of rbg\)",
        ),
        ({"key": jnp.zeros(2, jnp.uint32)}, {"key": jax.random.key(0)}, r"\(keys of threefry2x32\), got uint32 \(2,\)"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_state_is_refused_and_kept(tmp_path: Path, saved, wanted, message: str) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, saved)
    with pytest.raises(CheckpointError, match=message) as raised:
        kept.restore(wanted)
    assert "name another folder" in str(raised.value)
    assert "damaged" not in str(raised.value)
    same(without_keys(kept.restore(saved)), without_keys(saved))


def without_keys(tree):
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if distributed.is_key(leaf) else leaf, tree)


def test_a_training_goes_on_from_its_own_width_alone(tmp_path: Path) -> None:
    def task(target: jax.Array) -> Task:
        return Task(lambda w, key, x: jnp.mean((w - x) ** 2), lambda key: target + jax.random.normal(key, (4, 1)))

    def train(width: int, steps: int) -> training.State:
        host = Host(checkpoints=Checkpoints(tmp_path))
        settings = Settings(steps, every=2)
        return training.train(jax.random.key(0), jnp.zeros(width), task, jnp.float32(1), settings, host)

    train(4, 2)
    with pytest.raises(
        CheckpointError, match=r"last must be float32 \(16,\), got float32 \(4,\); averaged must be .* more"
    ):
        train(16, 4)
    assert int(train(4, 4).step) == 4


def test_a_stored_result_of_another_configuration_is_refused_and_kept(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    archive.once("fit", lambda: NARROW, like=NARROW)
    with pytest.raises(CheckpointError, match=r"w must be float32 \(3, 16\), got float32 \(3, 4\)"):
        archive.once("fit", lambda: WIDE, like=jax.eval_shape(lambda: WIDE))
    with pytest.raises(CheckpointError, match=r"must have the fields of Pair, got b, w .*'b'.*another version"):
        archive.once("fit", lambda: Pair(np.ones(1), {}), Pair)
    same(archive.once("fit", lambda: WIDE), NARROW)


# What could not be loaded is refused when it is saved.

A = np.arange(3.0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({0: A, 10: A}, r"keys of the tree must be text, got 0: use str\(key\)"),
        ({"a": {None: A}}, "keys of a must be text, got None"),
        ({"a": {("b", 1): A}}, r"keys of a must be text, got \('b', 1\)"),
        ({"a": A.astype(">f4")}, "a must be numbers .* byte order of this machine, got >f4: convert"),
        ({"a": A.astype(">i8")}, "a must be numbers .* got >i8"),
        (A.astype(">f8"), "the array must be numbers .* got >f8"),
        ({"a.b": A, "a": {"b": A + 1}}, r"different names, got 'a\.b' twice"),
        ({".a": A, "": {"a": A + 1}}, r"different names, got '\.a' twice"),
        ({"a": np.array([1, None])}, "a must be numbers .* got object"),
        ({"a": np.array(["x"])}, "a must be numbers .* got <U1"),
        ({"a": {"b": np.array([b"x"])}}, r"a\.b must be numbers .* got .S1"),
        ({"a": np.zeros(2, [("q", "f4")])}, "a must be numbers .* got .*'q'"),
        ({"a": np.array(["2020-01-01"], "M8[D]")}, "a must be numbers .* got datetime64"),
        ({"a": A.astype(np.longdouble)}, "a must be numbers .* got float128"),
        ({"a": A.astype(ml_dtypes.uint4)}, "a must be numbers .* got uint4"),
        ({"a": jax.random.key(0)}, r"a must be an array, got PRNG keys: save jax\.random\.key_data"),
        ({"a": (A, A)}, "a must be an array, a dict or a list, got tuple"),
        ({"a": [Pair(A, {})]}, r"a\.0 must be an array, a dict or a list, got Pair"),
        ({"a": "text"}, "a must be an array, a dict or a list, got str"),
        ({"a": {}}, "at least one array, got none"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, tree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "one", tree)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_and_nan_are_notes(tmp_path: Path) -> None:
    save(tmp_path / "one", {"a": A}, seconds=np.float64(1.5), loss=float("nan"))
    _, notes = load(tmp_path / "one")
    assert notes["seconds"] == 1.5


def test_notes_that_json_cannot_hold_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="notes must be values that JSON can hold"):
        save(tmp_path / "one", {"a": A}, at=b"bytes")
    for note in ({1: 2}, (1, 2), [{"a": (1,)}]):
        with pytest.raises(ValueError, match="notes must come back from JSON as they are"):
            save(tmp_path / "one", {"a": A}, at=note)
    with pytest.raises(ValueError, match=r"keys of the tree must be text, got '\\ud83d'"):
        save(tmp_path / "one", {"\ud83d": A})
    with pytest.raises(ValueError, match="a must be numbers"):
        Checkpoints(tmp_path / "steps").save(1, {"a": A.astype(">f4")})
    assert list(tmp_path.iterdir()) == []


def test_unusual_trees_come_back_as_they_were(tmp_path: Path) -> None:
    kinds = (np.float16, np.complex64, np.uint64, bool, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4)
    trees = {
        "keys": {"a/b": A, "a": {"/b": A + 1}, "": {"": A + 2}, "..": A, "%2F": A, "c.d": A, "é": A},
        "nothing": {"a": A, "b": {}, "c": None, "d": [], "e": np.zeros((0, 3), np.int8)},
        "lists": {"a": [A + i for i in range(11)], "b": [[A], {"c": A}]},
        "types": {np.dtype(kind).name: A.astype(kind) for kind in kinds},
        "layouts": {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.arange(6)[::2]},
    }
    for name, tree in trees.items():
        save(tmp_path / name, tree)
        same(load(tmp_path / name)[0], tree)


# Damage.


class Position:
    """Data that stand at a place."""

    def __init__(self, place: int) -> None:
        self.place = place

    def get_state(self) -> dict:
        return {"place": self.place}

    def set_state(self, state: dict) -> None:
        self.place = state["place"]


def test_a_flipped_bit_anywhere_is_an_error_or_does_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tree = {"a": rng.random((60, 60)), "b": {"c": np.int32(7), "e": np.zeros((0, 2)), "k": [np.array([True])]}}
    state = {"key": jax.random.key(1), "step": jnp.int32(20), "w": jnp.arange(3.0)}
    save(tmp_path / "one", tree, seconds=12.5, name="xy")
    steps = Checkpoints(tmp_path / "steps")
    steps.save(20, state, Position(17))
    steps.close()

    def read_one() -> None:
        loaded, notes = load(tmp_path / "one")
        same(loaded, jax.tree.map(np.asarray, tree))
        assert notes == {"seconds": 12.5, "name": "xy"}

    def read_steps() -> None:
        position = Position(0)
        same(without_keys(steps.restore(state, position)), without_keys(state))
        assert position.place == 17

    for folder, check in (("one", read_one), ("steps", read_steps)):
        files = [path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file() and path.stat().st_size]
        assert {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} < {path.name for path in files}
        for i in range(40):
            path = files[i % len(files)]
            content = path.read_bytes()
            bit = int(rng.integers(8 * len(content)))
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(damaged))
            with contextlib.suppress(CheckpointError):
                check()
            path.write_bytes(content)
        check()


@pytest.mark.parametrize("bad", [{"a": jax.random.key(0)}, {"a": (A,)}, {"a": {1: A}}])
def test_a_result_that_could_not_be_read_again_is_not_stored(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(ValueError, match="checkpoint: "):
        Archive(tmp_path).once("phase", lambda: bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("old", "new"), [("seconds", "qeconds"), ("12.5", "13.5"), ("float32", "float64")])
def test_damaged_notes_are_named_and_the_remedy_helps(tmp_path: Path, old: str, new: str) -> None:
    phase = tmp_path / "phase" / "result"
    save(phase, {"a": np.float32(1)}, seconds=12.5)
    path = phase / "_CHECKPOINT_METADATA"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    archive = Archive(tmp_path)
    with pytest.raises(CheckpointError, match=f"checkpoint {phase}: must have the checksums .* Delete this folder"):
        archive.once("phase", lambda: {"a": np.float32(2)})
    shutil.rmtree(phase)
    assert archive.once("phase", lambda: {"a": np.float32(2)})["a"] == 2


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace("place", "plaice"), lambda text: text[:-20], lambda _: ""]
)
def test_a_damaged_step_is_named_and_without_it_the_one_before_counts(tmp_path: Path, damage) -> None:
    steps, state = Checkpoints(tmp_path), {"w": jnp.arange(3.0)}
    for step in (10, 20):
        steps.save(step, {"w": state["w"] + step}, Position(step))
    steps.close()
    path = tmp_path / "20" / "_CHECKPOINT_METADATA"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path / '20'}: .* Delete this folder"):
        steps.restore(state)
    shutil.rmtree(tmp_path / "20")
    position = Position(0)
    np.testing.assert_array_equal(steps.restore(state, position)["w"], state["w"] + 10)
    assert position.place == 10


def test_format_1_is_read(tmp_path: Path) -> None:
    tree = {"a": np.arange(3.0), "b": {"e": np.zeros((0, 2))}}
    sums = [zlib.crc32(leaf.tobytes()) for leaf in (tree["a"], tree["b"]["e"])]
    notes = {"format": 1, "checksums": sums, "empty": {"['b']['e']": [0, 2]}, "seconds": 1.5}
    filled = {"a": tree["a"], "b": {"e": np.zeros(1)}}
    ocp.save(tmp_path / "result", filled, custom_metadata=notes)
    loaded, held = load(tmp_path / "result")
    same(loaded, tree)
    assert held == {"seconds": 1.5}
    ocp.save(tmp_path / "bad", filled, custom_metadata=notes | {"checksums": [1, 2]})
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "bad")
    # A state's checksums are in its own order, which is not that of the names.
    state = Pair(jnp.arange(2.0), {"z": jax.random.key(3)})
    moved = {"y": state, "b": jnp.zeros(2)}
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(without_keys(moved))]
    stored = {"format": 1, "checksums": [zlib.crc32(leaf.tobytes()) for leaf in leaves], "data": {"place": 4}}
    ocp.save(tmp_path / "steps" / "5", without_keys(moved), custom_metadata=stored)
    position = Position(0)
    same(without_keys(Checkpoints(tmp_path / "steps").restore(moved, position)), without_keys(moved))
    assert position.place == 4
    with pytest.raises(CheckpointError, match=r"b must be float32 \(3,\), got float32 \(2,\)"):
        Checkpoints(tmp_path / "steps").restore(moved | {"b": jnp.zeros(3)})
