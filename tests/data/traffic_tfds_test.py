import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.data import traffic
from gendiff.data.traffic import QUANTUM, Cut, Recipe, Scenes, Split
from gendiff.oracles import drivable

pytest.importorskip("tensorflow_datasets")
from gendiff.data import traffic_tfds
from gendiff.data.traffic_tfds import Config, Traffic

RECIPE = Recipe(cut=Cut(cells=32))
TINY = Config(name="tiny", scenes=88, most=5, recipe=RECIPE)
SPLITS = get_args(Split)


def fake(recipe, number, scratch=None):
    """0, 4 or 9 scenes of vehicles in a row, on random maps that are drivable where the vehicles are."""
    n, cells = (0, 4, 9)[number % 3], recipe.cut.cells
    rng = np.random.default_rng((recipe.seed, number))
    vehicles = np.tile(np.float32([0, 0, 4, 2, 1, 0, 3]), (n, 12, 1))
    vehicles[..., 0] = 6 * np.arange(12) - 33 + rng.uniform(-0.5, 0.5, (n, 12))
    vehicles[..., 1] = rng.uniform(-3, 3, (n, 1))
    distance = rng.uniform(-traffic.REACH, traffic.REACH, (n, cells, cells))
    middle = slice(cells // 4, -cells // 4)
    distance[:, middle] = -np.abs(distance[:, middle])
    present = rng.random((n, 12)) < 0.9
    window = rng.uniform(-3, 3, (n, 3)).astype(np.float32)
    return Scenes(vehicles, present, distance.astype(np.float16), window, np.full(n, number))


def without_sumo(patch):
    patch.setattr(traffic, "of_map", fake)
    patch.setattr(traffic, "ProcessPoolExecutor", lambda workers, context, **worker: ThreadPoolExecutor(workers))
    patch.setattr(traffic_tfds, "MAPS", 5)


@pytest.fixture
def no_sumo(monkeypatch):
    without_sumo(monkeypatch)


def prepare(folder, config=TINY, **given):
    builder = Traffic(data_dir=folder, config=config, workers=2, **given)
    builder.download_and_prepare()
    return builder


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        without_sumo(patch)
        prepare(folder)
    # The simulator is ahead of what is needed.
    for path in (folder / "downloads" / "traffic_maps").glob("map-*.npz"):
        if int(path.stem[4:]) >= 30:
            path.unlink()
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def dataset(folder, config="tiny"):
    return folder / "traffic" / config / str(Traffic.VERSION)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_come_back_as_they_were_made(made, split):
    given = traffic_tfds.scenes(made, "tiny", split)
    cut = lambda number: traffic.spread(fake(RECIPE, number), 5)
    expected = traffic.take(traffic.joined([cut(number) for number in range(30)]), slice(88))
    expected = traffic.of_split(expected, split)
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    assert [part.dtype for part in given] == [part.dtype for part in expected]
    kept = traffic.read(made / "downloads" / "traffic_maps", split, 88, 5)
    jax.tree.map(np.testing.assert_array_equal, given, kept)


def test_maps_are_in_one_split_and_all_scenes_in_some(made):
    worlds = {split: traffic_tfds.scenes(made, "tiny", split).world for split in SPLITS}
    assert all(traffic.split_of(int(number)) == split for split in SPLITS for number in worlds[split])
    assert all(len(world) for world in worlds.values())
    assert sum(map(len, worlds.values())) == 88
    assert max(np.unique_counts(np.concatenate(list(worlds.values()))).counts) == 5
    assert len(list(dataset(made).glob("traffic-train.array_record-*-of-00004"))) == 4


READ = """
import pathlib, sys
import tensorflow_datasets as tfds
source = tfds.data_source("traffic/tiny", split="validation", data_dir=sys.argv[1])
assert "gendiff" not in sys.modules  # the files are enough
rows = [source[i] for i in range(len(source))]
from gendiff.data import traffic_tfds
scenes = traffic_tfds.scenes(pathlib.Path(sys.argv[1]), "tiny", "validation")
assert len(rows) == len(scenes.world) > 0
for name, part in scenes._asdict().items():
    assert all((row[name] == each).all() for row, each in zip(rows, part, strict=True)), name
print(traffic_tfds.Traffic(data_dir=sys.argv[1], config="smoke").info.full_name)
"""


def test_reading_imports_no_tensorflow(made, tmp_path):
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos._exit(77)")
    path = os.pathsep.join([str(tmp_path), str(Path(traffic.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", READ, str(made)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "traffic/smoke/1.0.0\n"


def test_after_a_kill_the_same_call_gives_the_same_files(made, copy, no_sumo):
    shutil.rmtree(copy / "traffic")
    maps = sorted((copy / "downloads" / "traffic_maps").glob("map-*.npz"))
    for path in [*maps[3:7], *maps[20:]]:
        path.unlink()
    builder = prepare(copy)
    again, before = files(copy), files(made)
    assert again == again | before  # and maybe maps ahead
    assert {path for path in again.keys() - before.keys() if "map-" not in path.name} == set()
    assert builder.info.splits["test"].num_examples == len(traffic_tfds.scenes(made, "tiny", "test").world)


KILLED = """
import os, sys
from gendiff.data.traffic_tfds import Config, Traffic
from gendiff.data.traffic import Cut, Recipe
config = Config(name="tiny", scenes=88, most=5, recipe=Recipe(cut=Cut(cells=32)))
stop = lambda what, scenes: os._exit(9) if what == "packed" and scenes > 40 else None
Traffic(data_dir=sys.argv[1], config=config, report=stop).download_and_prepare()
"""


def test_a_kill_while_packing_leaves_no_data_set(made, copy, no_sumo):
    shutil.rmtree(copy / "traffic")
    done = subprocess.run([sys.executable, "-c", KILLED, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    with pytest.raises(ValueError, match=r"must be a data set, got no such folder: .*--config tiny"):
        traffic_tfds.scenes(copy, "tiny")
    prepare(copy)
    again, before = files(dataset(copy)), files(dataset(made))
    assert again == before


def test_a_complete_folder_is_not_simulated_again(copy, monkeypatch):
    monkeypatch.setattr(traffic, "ProcessPoolExecutor", None)
    prepare(copy)  # not even packed
    monkeypatch.undo()
    shutil.rmtree(copy / "traffic")
    seen = []
    monkeypatch.setattr(traffic, "_make", None)
    prepare(copy, report=lambda *what: seen.append(what))
    assert [have for what, have in seen if what == "simulated"][-1] >= 88
    assert seen[-1] == ("packed", 88)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty", "missing", "of another split", "of another length"])
def test_a_damaged_shard_is_named(copy, damage):
    folder = dataset(copy)
    path = folder / "traffic-train.array_record-00001-of-00004"
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:-1000],
            "overwritten": content[:half] + b"\x55" * half,
            "empty": b"",
            "missing": b"",
            "of another split": (folder / "traffic-test.array_record-00000-of-00001").read_bytes(),
            "of another length": (folder / "traffic-train.array_record-00003-of-00004").read_bytes(),
        }[damage]
    )
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} must"):
        traffic_tfds.scenes(copy, "tiny")
    assert len(traffic_tfds.scenes(copy, "tiny", "test").world)


def test_what_is_not_there_is_one_error(copy, no_sumo, tmp_path):
    with pytest.raises(ValueError, match="split must be train or validation or test, got 'val'"):
        traffic_tfds.scenes(copy, "tiny", "val")
    with pytest.raises(ValueError, match=r"paper/1\.0\.0 must be a data set, got no such folder"):
        traffic_tfds.scenes(copy, "paper")
    (dataset(copy) / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"tiny/1\.0\.0 must be a data set"):
        traffic_tfds.scenes(copy, "tiny")
    with pytest.raises(ValueError, match="validation must have scenes, got 10 scenes of 8 maps"):
        prepare(tmp_path, Config(name="few", scenes=10, recipe=RECIPE, most=2))
    assert not dataset(tmp_path, "few").exists()
    with pytest.raises(ValueError, match=r"got .*: name another folder"):
        prepare(tmp_path, Config(name="other", scenes=10, recipe=RECIPE._replace(seed=1)))


def test_the_command_makes_a_data_set(tmp_path, no_sumo, monkeypatch, capsys):
    command = lambda *given: monkeypatch.setattr(sys, "argv", ["traffic_tfds", str(tmp_path), *given])
    command("--config", "smoke")
    traffic_tfds.main()
    sizes = [len(traffic_tfds.scenes(tmp_path, "smoke", split).world) for split in SPLITS]
    assert sum(sizes) == traffic.SMOKE
    told = f"{dataset(tmp_path, 'smoke')}: " + ", ".join(map("{} {}".format, sizes, SPLITS))
    assert capsys.readouterr().out.splitlines()[-1] == told
    monkeypatch.setattr(traffic, "of_map", lambda recipe, number, scratch: (_ for _ in ()).throw(ValueError("of map")))
    shutil.rmtree(tmp_path / "downloads")
    command()
    with pytest.raises(SystemExit):
        traffic_tfds.main()
    assert "error: of map" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 5, 12, 13, 100])
def test_of_many_scenes_some_are_taken_evenly(n):
    given = traffic.empty()
    given = Scenes(*(np.zeros((n, *part.shape[1:]), part.dtype) for part in given))._replace(world=np.arange(n))
    taken = traffic.spread(given, 12).world
    assert len(taken) == min(n, 12)
    steps = np.diff(taken)
    assert n <= 12 or set(steps) <= {n // 12, n // 12 + 1}


# The embedded data set.


def test_embedded_scenes_are_valid():
    scenes = traffic.embedded()
    assert scenes.vehicles.shape == (len(scenes.world), 12, 7)
    assert scenes.distance.shape == (len(scenes.world), 64, 64)
    assert scenes.present.all()
    assert traffic.valid(scenes, Cut(cells=64)).all()
    assert np.abs(scenes.distance).max() <= traffic.REACH
    np.testing.assert_allclose(np.linalg.norm(scenes.vehicles[..., 4:6], axis=-1), 1, atol=1e-5)
    assert [part.dtype for part in scenes] == [part.dtype for part in traffic.empty()]


def test_embedded_scenes_are_few_and_of_many_maps():
    scenes = traffic.embedded()
    numbers, counts = np.unique(scenes.world, return_counts=True)
    assert 200 <= len(scenes.world) <= 240
    assert len(numbers) >= 20
    assert counts.max() <= 12
    assert traffic.EMBEDDED.stat().st_size < 500_000
    parts = [traffic.embedded(split) for split in SPLITS]
    assert sum(len(part.world) for part in parts) == len(scenes.world)
    for split, part in zip(SPLITS, parts, strict=True):
        assert len(np.unique(part.world)) >= 2
        assert {traffic.split_of(int(number)) for number in part.world} == {split}
    with pytest.raises(ValueError, match="split must be 'train' or 'validation' or 'test', got 'val'"):
        traffic.embedded("val")


def test_halved_maps_are_what_the_oracle_reads_between_cells():
    rng = np.random.default_rng(0)
    fine = rng.uniform(-20, 20, (1, 16, 16)).astype(np.float16)
    place = (np.arange(8) + 0.5) / 8 * 100 - 50
    points = np.stack(np.meshgrid(place, place), -1)  # x along the columns
    expected = drivable.distance_at(jnp.asarray(fine[0], jnp.float32), jnp.asarray(points), 50.0)
    np.testing.assert_allclose(traffic.halved(fine)[0], expected, atol=1e-4)


def test_embedding_rounds_distances_and_leaves_invalid_scenes_out(tmp_path, no_sumo, monkeypatch):
    off = lambda scenes: scenes._replace(vehicles=scenes.vehicles + np.float32([0, 100, 0, 0, 0, 0, 0])[None, None])
    broken = lambda recipe, number, scratch: off(fake(recipe, number)) if number == 4 else fake(recipe, number)
    monkeypatch.setattr(traffic, "of_map", broken)
    monkeypatch.setattr(metadata, "version", lambda name: "0")
    path = tmp_path / "small.npz"
    n = traffic.embed(tmp_path / "maps", path, workers=2)
    monkeypatch.setattr(traffic, "EMBEDDED", path)
    given = traffic.embedded()
    every = traffic.read(tmp_path / "maps", scenes=traffic.SMOKE, most=traffic.SMOKE_MOST)
    expected = traffic.take(every, every.world != 4)
    assert n == len(given.world) == len(expected.world) == traffic.SMOKE - 4
    error = np.abs(given.distance.astype(np.float32) - traffic.halved(expected.distance))
    assert error.max() <= QUANTUM / 2 + 2**-7  # and the rounding to 16 bits
    given, expected = (each._replace(distance=np.zeros(0)) for each in (given, expected))
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_the_embedded_scenes_are_simulated_again_the_same():
    for name in ("libsumo", "sumolib", "sumo", "shapely"):
        pytest.importorskip(name)
    with np.load(traffic.EMBEDDED) as stored:
        version = str(stored["sumo"])
    if metadata.version("libsumo") != version:
        pytest.skip(f"made by SUMO {version}")
    given = traffic.take(traffic.embedded(), traffic.embedded().world == 0)
    again = traffic.spread(traffic.of_map(traffic.LONG, 0), traffic.SMOKE_MOST)
    rows = [np.flatnonzero((again.vehicles == each).all((1, 2))) for each in given.vehicles]
    assert all(len(row) == 1 for row in rows)
    again = traffic.take(again, np.concatenate(rows))
    error = np.abs(given.distance.astype(np.float32) - traffic.halved(again.distance))
    assert error.max() <= QUANTUM / 2 + 2**-7
    np.testing.assert_array_equal(given.window, again.window)
