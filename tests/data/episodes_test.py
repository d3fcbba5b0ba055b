import contextlib
import json
import os

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff.data import DataError, episodes
from gendiff.data.episodes import Episodes


def numbered(lengths: list[int]) -> Episodes:
    """Episodes whose row i has the observation (i, -i) and the action (100 + i, 3)."""
    i = np.arange(sum(lengths), dtype=np.float32)
    return Episodes(np.stack([i, -i], 1), np.stack([100 + i, 0 * i + 3], 1), np.array(lengths))


def stream(first: int = 0):
    """Attempt i is discarded if 3 divides i, else has 2 + i % 5 rows of the number i."""
    while True:
        rows = 2 + first % 5
        yield None if first % 3 == 0 else (np.full((rows, 4), first), np.full((rows, 2), -first))
        first += 1


# Making and storing.


def test_the_last_episode_is_whole_and_attempts_are_counted():
    taken, tried = episodes.take(stream(), 20)
    assert tried == 9  # 1, 2, 4, 5, 7 and 8 are kept: 3 + 4 + 6 + 2 + 4 = 19 rows, and 5 more
    np.testing.assert_array_equal(taken.lengths, [3, 4, 6, 2, 4, 5])
    np.testing.assert_array_equal(taken.observations[:, 0], np.repeat([1, 2, 4, 5, 7, 8], taken.lengths))
    np.testing.assert_array_equal(taken.actions[:, 0], -taken.observations[:, 0])
    assert taken.actions.dtype == taken.observations.dtype == np.float32


def test_attempts_that_all_fail_are_an_error():
    with pytest.raises(ValueError, match="must be kept, got 2000 discarded ones in a row"):
        episodes.take((None for _ in iter(int, 1)), 1)


@pytest.mark.parametrize("transitions", [0, -1, 1.5, np.nan])
def test_taking_nothing_is_an_error(transitions):
    with pytest.raises(ValueError, match="transitions must be >= 1 and whole"):
        episodes.take(stream(), transitions)


ATTEMPT = np.ones((3, 4)), np.ones((3, 2))


@pytest.mark.parametrize(
    ("attempts", "message"),
    [
        ([], "attempts must go on to 9 rows, got 0 of 0"),
        ([ATTEMPT, None], "attempts must go on to 9 rows, got 3 of 2"),
        ([ATTEMPT, (np.ones((0, 4)), np.ones((0, 2)))], "attempt 2 must have a row or more, got none"),
        ([ATTEMPT] * 2 + [(np.full((3, 4), np.nan), np.ones((3, 2)))], "observations must be .* got nan"),
        ([ATTEMPT] * 2 + [(np.ones((3, 4)), np.ones((2, 2)))], "episode 2 must have as many .* got 3 and 2"),
        ([(np.ones((5, 4)), np.ones((4, 2))), (np.ones((4, 4)), np.ones((5, 2)))], "episode 0 must have .* 5 and 4"),
        ([ATTEMPT] * 2 + [(np.ones((3, 5)), np.ones((3, 2)))], "episodes must have numbers of one width"),
    ],
)
def test_attempts_that_are_damaged_or_end_are_named(attempts, message):
    with pytest.raises(ValueError, match=message):
        episodes.take(iter(attempts), 9)


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(transitions=st.integers(1, 120), shard=st.integers(1, 60), stop=st.integers(0, 120))
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(transitions, shard, stop, tmp_path_factory):
    whole, stopped = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("stopped")
    holds = episodes.write(whole, {"seed": (1, 2)}, stream, transitions, shard)

    def interrupt(rows):
        if rows >= stop:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        episodes.write(stopped, {"seed": (1, 2)}, stream, transitions, shard, interrupt)
    heard = []
    assert episodes.write(stopped, {"seed": (1, 2)}, stream, transitions, shard, heard.append) == holds
    assert content(stopped) == content(whole)
    assert heard == sorted(heard)
    assert heard[-1] == holds.transitions
    direct, tried = episodes.take(stream(), transitions)
    jax.tree.map(np.testing.assert_array_equal, episodes.read(whole), direct)
    assert holds == (len(list(whole.glob("*.npz"))), len(direct.lengths), len(direct.actions), tried)


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    episodes.write(tmp_path, {}, stream, 30, 10)
    before = content(tmp_path)
    episodes.write(tmp_path, {}, lambda first: (_ for _ in ()), 30, 10)  # no attempt is asked for
    assert content(tmp_path) == before


def test_a_folder_of_other_episodes_is_refused(tmp_path):
    episodes.write(tmp_path, {"seed": 0}, stream, 30)
    with pytest.raises(ValueError, match=r"must be a folder of {'seed': 1}, got one of {'seed': 0}"):
        episodes.write(tmp_path, {"seed": 1}, stream, 30)
    with pytest.raises(ValueError, match=r"'transitions': 31.*'transitions': 30"):
        episodes.write(tmp_path, {"seed": 0}, stream, 31)
    (tmp_path / "info.json").unlink()
    with pytest.raises(ValueError, match=r"must have an info\.json of episodes, got .*must be a file, got none"):
        episodes.write(tmp_path, {"seed": 0}, stream, 30)


def test_files_that_are_damaged_or_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"must have an info\.json"):
        episodes.read(tmp_path)
    with pytest.raises(ValueError, match="transitions must be >= 1 and whole, got 0"):
        episodes.write(tmp_path, {}, stream, 0)
    episodes.write(tmp_path, {}, stream, 30, 10)
    shard = tmp_path / "shard-00001.npz"
    stored = shard.read_bytes()
    for damaged in (b"", stored[:-40], stored[:200] + b"\1" + stored[201:]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-00001\.npz must hold a whole shard"):
            episodes.read(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"must be \['shard-00000.npz', 'shard-00001.npz'"):
        episodes.read(tmp_path)
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match="got 0 shards of an unfinished one"):
        episodes.read(tmp_path)
    (tmp_path / "info.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"must have an info\.json of episodes, got TypeError"):
        episodes.read(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.npz", "info.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_told_at_once(kind, name, tmp_path):
    episodes.write(tmp_path, {}, stream, 30, 10)
    path = tmp_path / name
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}[kind](path)
    for call in (lambda: episodes.read(tmp_path), lambda: episodes.write(tmp_path, {}, stream, 30, 10)):
        with pytest.raises(DataError, match=f"{name} must be a file, got (a named pipe|a folder|none)"):
            call()


def test_shards_whose_rows_do_not_fit_are_named(tmp_path):
    episodes.write(tmp_path, {}, stream, 30, 10)
    with np.load(tmp_path / "shard-00001.npz") as stored:
        right = dict(stored)
    for name, array, message in (
        ("lengths", right["lengths"] + 1, "lengths must be >= 1 with sum"),
        ("actions", right["actions"][:-1], ".* must have one n"),
        ("observations", np.full_like(right["observations"], np.nan), "observations must be a finite number, got nan"),
    ):
        np.savez(tmp_path / "shard-00001.npz", **right | {name: array})
        with pytest.raises(DataError, match=rf"shard-00001\.npz: {message}"):
            episodes.read(tmp_path)


def test_episodes_are_a_source():
    given = numbered([3, 1, 4])
    source = episodes.Source(given)
    assert len(source) == 3
    for i in range(3):
        rows = slice(int(given.lengths[:i].sum()), int(given.lengths[: i + 1].sum()))
        for each in (source[i], source[i - 3]):
            np.testing.assert_array_equal(each["observations"], given.observations[rows])
            np.testing.assert_array_equal(each["actions"], given.actions[rows])
    assert [len(each["actions"]) for each in source] == [3, 1, 4]
    with pytest.raises(IndexError, match="index must be below 3, got 3"):
        source[3]


def test_grain_reads_the_source():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(episodes.Source(numbered([3, 1, 4]))).shuffle(seed=0)
    assert sorted(len(each["actions"]) for each in dataset) == [1, 3, 4]


# Files of others.


@pytest.fixture
def hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")

    def write(arrays: dict[str, np.ndarray]):
        path = tmp_path / "file.hdf5"
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip")
        return path

    return write


ENDS = {
    "terminals": {"terminals": [0, 0, 1, 0, 1, 0, 0], "timeouts": [0] * 7},
    "timeouts": {"terminals": [0] * 7, "timeouts": [0, 0, 1, 0, 1, 0, 0]},
    "both": {"terminals": [0, 0, 1, 0, 0, 0, 0], "timeouts": [0, 0, 1, 0, 1, 0, 0]},
    "the paper's": {"terminals": [0, 0, 1, 0, 1, 0, 0], "infos/goal": [[1, 1]] * 7},
    "goals alone": {"terminals": [0] * 7, "infos/goal": [[1, 1]] * 3 + [[1, 2]] * 2 + [[1, 1]] * 2},
}


@pytest.mark.parametrize("ends", ENDS)
def test_d4rl_episodes_end_where_the_file_says(ends, hdf5):
    rows = numbered([7])
    flags = {k: np.array(v, np.float32 if k == "infos/goal" else bool) for k, v in ENDS[ends].items()}
    path = hdf5({"observations": rows.observations, "actions": rows.actions, "rewards": np.zeros(7), **flags})
    read = episodes.d4rl(path)
    np.testing.assert_array_equal(read.lengths, [3, 2])
    np.testing.assert_array_equal(read.observations, rows.observations[:5])
    np.testing.assert_array_equal(read.actions, rows.actions[:5])


def test_what_is_no_d4rl_file_is_named(hdf5, tmp_path):
    rows = numbered([4])._asdict()
    with pytest.raises(ValueError, match=r"must have an array terminals, got \['actions', 'lengths', 'observations'\]"):
        episodes.d4rl(hdf5(rows))
    with pytest.raises(ValueError, match="episodes must end, got no end in 4 rows"):
        episodes.d4rl(hdf5({**rows, "terminals": np.zeros(4, bool)}))
    with pytest.raises(ValueError, match=r"arrays must have one length, got .*'terminals': 3"):
        episodes.d4rl(hdf5({**rows, "terminals": np.zeros(3, bool)}))
    (tmp_path / "text").write_text("text")
    with pytest.raises(DataError, match="text must be an HDF5 file"):
        episodes.d4rl(tmp_path / "text")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("none", "none"), ("loop", "none"), ("pipe", "a named pipe"), ("", "a folder")):
        for read in (episodes.d4rl, episodes.minari) if name else (episodes.d4rl,):
            with pytest.raises(DataError, match=f"must be a file, got {what}"):
                read(tmp_path / name)


ROWS = 6
RIGHT = {
    "observations": np.ones((ROWS, 4), np.float32),
    "actions": np.ones((ROWS, 2), np.float32),
    "terminals": np.arange(ROWS) % 3 == 2,
    "infos/goal": np.ones((ROWS, 2), np.float32),
}


def changed(array, value, row=3):
    array = array.astype(np.float32)
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": changed(RIGHT["observations"], np.nan)}, "observations must be .* got nan among 24 values"),
        ({"actions": changed(RIGHT["actions"], np.inf)}, "actions must be a finite number, got inf"),
        ({"terminals": changed(RIGHT["terminals"], np.nan)}, r"terminals must be .* got float32 \(6,\) with nan"),
        ({"terminals": RIGHT["terminals"] * 255}, r"terminals must be \(n,\) true or false, got .* with 255"),
        ({"terminals": np.zeros((ROWS, 2), bool)}, r"terminals must be \(n,\) true or false, got bool \(6, 2\)"),
        ({"timeouts": changed(RIGHT["terminals"], np.nan)}, "timeouts must be .* with nan"),
        (
            {"terminals": np.zeros(ROWS), "infos/goal": np.full((ROWS, 2), np.nan)},
            "infos/goal must be a finite number, got nan",
        ),
        ({"observations": np.ones(ROWS)}, r"must have one n, got \(6,\), \(6, 2\)"),
        ({"actions": np.array([b"left"] * ROWS)}, "episodes must have numbers of one width, got others"),
    ],
)
def test_damaged_d4rl_rows_are_named(change, message, hdf5):
    with pytest.raises(DataError, match=message):
        episodes.d4rl(hdf5(RIGHT | change))
    assert list(episodes.d4rl(hdf5(RIGHT)).lengths) == [3, 3]


def test_a_damaged_block_of_a_file_is_named(hdf5):
    path = hdf5(RIGHT | {"observations": np.random.default_rng(0).normal(size=(ROWS, 400))})
    content = bytearray(path.read_bytes())
    start = content.index(b"\x78\x5e") if b"\x78\x5e" in content else content.index(b"x\x9c")
    longest = max(range(start, len(content) - 400), key=lambda i: len(set(content[i : i + 400])))
    content[longest : longest + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(DataError, match="observations must be an intact array, got a damaged one"):
        episodes.d4rl(path)


@pytest.mark.parametrize("form", ["array", "dict"])
def test_minari_episodes_come_in_the_order_of_their_numbers(form, tmp_path):
    h5py = pytest.importorskip("h5py")
    lengths = [2, 3, 1, 2, 2, 2, 2, 2, 2, 2, 4]  # episode_10 comes after episode_9
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "main_data.hdf5", "w") as file:
        for i, length in enumerate(lengths):
            group = file.create_group(f"episode_{i}")
            group.attrs.update({"id": i, "total_steps": length})
            group["actions"] = np.full((length, 2), i, np.float32)
            group["terminations"] = group["truncations"] = group["rewards"] = np.zeros(length)
            seen = np.arange(4 * (length + 1), dtype=np.float64).reshape(-1, 4) + 100 * i
            if form == "array":
                group["observations"] = seen
            else:
                for name, part in (
                    ("observation", seen),
                    ("achieved_goal", seen[:, :2]),
                    ("desired_goal", seen[:, :2]),
                ):
                    group[f"observations/{name}"] = part
    read = episodes.minari(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read, episodes.minari(tmp_path / "data" / "main_data.hdf5"))
    np.testing.assert_array_equal(read.lengths, lengths)
    np.testing.assert_array_equal(read.actions[:, 0], np.repeat(np.arange(11), lengths))
    np.testing.assert_array_equal(read.observations[2:5, 3], [103, 107, 111])


def test_what_is_no_minari_data_set_is_named(hdf5, tmp_path):
    with pytest.raises(ValueError, match="must have groups episode_0, episode_1"):
        episodes.minari(hdf5({"other": np.zeros(3)}))
    with pytest.raises(ValueError, match="must have an array episode_0/actions"):
        episodes.minari(hdf5({"episode_0/observations": np.zeros((3, 4))}))
    with pytest.raises(ValueError, match="episode_0 must have 4 observations, got 3"):
        episodes.minari(hdf5({"episode_0/observations": np.zeros((3, 4)), "episode_0/actions": np.zeros((3, 2))}))
    nan = {"episode_0/observations": np.full((3, 4), np.nan), "episode_0/actions": np.zeros((2, 2))}
    with pytest.raises(DataError, match="observations must be a finite number, got nan"):
        episodes.minari(hdf5(nan))
    other = {"episode_1/observations": np.zeros((3, 5)), "episode_1/actions": np.zeros((2, 2))}
    with pytest.raises(DataError, match="episodes must have numbers of one width"):
        episodes.minari(hdf5(nan | other))
    with pytest.raises(DataError, match="lengths must be >= 1"):
        episodes.minari(hdf5({"episode_0/observations": np.zeros((1, 4)), "episode_0/actions": np.zeros((0, 2))}))
    with pytest.raises(DataError, match="must have an array episode_0/observations"):
        episodes.minari(hdf5({"episode_0": np.zeros((1, 4))}))
