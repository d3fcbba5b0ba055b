import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gendiff.data import drawn_sevens, episodes, maze2d, mazes, mnist, traffic
from gendiff.data.episodes import Episodes

tfds = pytest.importorskip("tensorflow_datasets")
from gendiff.data import builders  # noqa: E402


def read(builder):
    """What was written, through the files alone: rows by split."""
    builder.download_and_prepare()
    found = tfds.builder_from_directory(builder.data_dir)
    assert type(found).__module__.startswith("tensorflow_datasets")
    sources = {split: found.as_data_source(split=split) for split in found.info.splits}
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


def assert_rows(found, expected):
    """Rows are a tree of arrays of the same types, whose rows stand in the same order."""
    assert len(found) == len(next(iter(expected.values()))) > 0
    assert found[0].keys() == expected.keys()
    for name, arrays in expected.items():
        for row, array in zip(found, arrays, strict=True):
            assert np.asarray(row[name]).dtype == np.asarray(array).dtype
            np.testing.assert_array_equal(row[name], array)


def test_checkerboard(tmp_path):
    board = builders.Board(name="tiny", points={"train": 50, "test": 20}, cells=2, half_width=3.0)
    found = read(builders.Checkerboard(data_dir=tmp_path, config=board))
    train, test = (np.stack([row["point"] for row in found[split]]) for split in ("train", "test"))
    assert (train.shape, test.shape, train.dtype) == ((50, 2), (20, 2), np.float32)
    assert (np.sign(train).prod(1) == 1).all()  # two cells are filled
    assert np.abs(train).max() > 1
    assert not np.isin(train, test).any()
    again = read(builders.Checkerboard(data_dir=tmp_path / "again", config=board))
    assert_rows(found["train"], {"point": [row["point"] for row in again["train"]]})


def test_drawn_sevens(tmp_path):
    found = read(builders.DrawnSevens(data_dir=tmp_path))
    assert_rows(found["train"], {"image": drawn_sevens.draw(1000, 1)})
    assert_rows(found["test"], {"image": drawn_sevens.draw(400, 2)})


@pytest.mark.parametrize("name", ["own", "mix"])
def test_sevens(name, tmp_path):
    arrays = {}
    for split, seed in (("train", 1), ("test", 2)):
        arrays |= {f"x_{split}": drawn_sevens.draw(30, seed), f"y_{split}": np.where(np.arange(30) % 3, 7, 1)}
    np.savez(tmp_path / "mnist.npz", **arrays)
    found = read(builders.Sevens(data_dir=tmp_path, config=name, place=tmp_path))
    for split in ("train", "test"):
        sevens = mnist.read(7, split, tmp_path)
        mix = mnist.mix(sevens, 0.12 if name == "mix" else 0.0, 0)
        assert mix.crossed.sum() == (2 if name == "mix" else 0)
        assert_rows(found[split], {"image": mix.images, "crossed": mix.crossed, "source": mix.source})


def test_sevens_that_are_missing_are_told_and_leave_no_data_set(tmp_path):
    with pytest.raises(mnist.DataError, match="must hold MNIST's files, got"):
        builders.Sevens(data_dir=tmp_path, config="own", place=tmp_path).download_and_prepare()
    assert not list(tmp_path.rglob("*.array_record*"))


def test_maze2d(tmp_path):
    pytest.importorskip("mujoco")
    drive = builders.Drive(name="tiny", maze="umaze", transitions=300, goal=(1, 1))
    found = read(builders.Maze2d(data_dir=tmp_path, config=drive))["train"]
    source = episodes.Source(maze2d.generate("umaze", 300, 0, (1, 1)))
    assert_rows(found, {name: [source[i][name] for i in range(len(source))] for name in source[0]})
    names = builders.Maze2d.builder_configs
    assert names["umaze"].goal is None
    assert names["large-goal-3"].goal == mazes.MAZES["large"].goals[2]
    assert len(names) == 36


def test_episodes_of_a_file(tmp_path):
    i = np.arange(12, dtype=np.float32)
    given = Episodes(np.stack([i, -i, i], 1), i[:, None], np.array([3, 1, 8]))
    found = read(builders.ControlEpisodes(episodes=given, data_dir=tmp_path))["train"]
    source = episodes.Source(given)
    assert_rows(found, {name: [source[i][name] for i in range(3)] for name in source[0]})


def test_embedded_traffic(tmp_path):
    found = read(builders.EmbeddedTraffic(data_dir=tmp_path))
    assert list(found) == ["train", "validation", "test"]
    for split, rows in found.items():
        assert_rows(rows, traffic.embedded(split)._asdict())


def test_recorded_traffic(tmp_path, monkeypatch):
    scenes = traffic.take(traffic.embedded(), slice(5))
    monkeypatch.setattr(builders.commonroad, "scenes", lambda files, cut: scenes)
    builder = builders.RecordedTraffic(files="recorded", cut=traffic.Cut(cells=64), data_dir=tmp_path)
    assert_rows(read(builder)["train"], scenes._asdict())


WRITE = """
import sys
from gendiff.data import builders
builders.DrawnSevens(data_dir=sys.argv[1]).download_and_prepare()
"""
READ = """
import sys
import tensorflow_datasets as tfds
source = tfds.data_source("drawn_sevens", split="test", data_dir=sys.argv[1])
assert len(source) == 400 and source[3]["image"].shape == (28, 28)
assert "gendiff" not in sys.modules  # the files are enough
"""


def test_writing_and_reading_import_no_tensorflow(tmp_path):
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos._exit(77)")
    path = os.pathsep.join([str(tmp_path), str(Path(traffic.__file__).parents[2])])
    for program in (WRITE, READ):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "data")],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_grain_reads_what_tfds_wrote(tmp_path):
    grain = pytest.importorskip("grain")
    builder = builders.DrawnSevens(data_dir=tmp_path)
    builder.download_and_prepare()
    batches = grain.MapDataset.source(builder.as_data_source("test")).seed(0).shuffle().batch(100)
    assert [batch["image"].shape for batch in batches] == [(100, 28, 28)] * 4
