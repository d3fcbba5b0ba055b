"""Checkpoints come back as they were, or not at all."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.checkpoint import Archive, CheckpointError, Checkpoints, load, save


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
    with pytest.raises(CheckpointError, match=f"checkpoint {folder}: expected"):
        load(folder)


def test_a_write_that_fails_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "blocked" / "one", {"a": np.ones(3)})
    archive = Archive(tmp_path)
    (tmp_path / "phase").mkdir()
    (tmp_path / "phase" / "result.orbax-checkpoint-tmp").mkdir()  # what a killed save leaves
    assert archive.once("phase", lambda: {"a": np.ones(1)})["a"] == 1


def test_training_checkpoints_keep_keys_types_and_the_newest_two(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "steps")
    state = {"key": jax.random.key(3), "params": Pair(jnp.arange(4.0), {"b": jnp.zeros((), jnp.int32)})}
    assert checkpoints.restore(state) is state  # nothing there yet
    for step in (10, 20, 30):
        left = state["params"].left + step
        checkpoints.save(step, state | {"params": state["params"]._replace(left=left)})
    restored = checkpoints.restore(state)
    assert isinstance(restored["params"], Pair)
    np.testing.assert_array_equal(restored["params"].left, np.arange(4.0) + 30)
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state["key"]))
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["20", "30"]


def test_a_checkpoint_of_other_shapes_is_an_error(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, {"a": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match="expected a complete checkpoint of this run"):
        kept.restore({"a": jnp.zeros(3), "b": jnp.zeros(2)})


def test_a_place_where_no_folder_can_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (
        lambda: save(tmp_path / "file" / "result", {"a": np.zeros(2)}),
        lambda: Checkpoints(tmp_path / "file").save(1, {"a": np.zeros(2)}),
    ):
        with pytest.raises(CheckpointError, match="could not be written"):
            write()
    save(tmp_path / "place" / "result", {"a": np.zeros(2)})
    assert [each.name for each in (tmp_path / "place").iterdir()] == ["result"]
