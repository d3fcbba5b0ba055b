"""Options, folders, errors and files of every experiment."""

import dataclasses
import importlib
import json
import os
import resource
import shutil
import stat
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import pytest

from experiments.lab import command, config, lock, origin
from experiments.lab.config import Between, Config, ConfigError
from experiments.lab.folder import Folder, write
from experiments.lab.table import Column, Row
from gendiff.metrics import rates


@dataclasses.dataclass(frozen=True)
class TinyConfig(Config):
    """A configuration for these tests."""

    size: Annotated[int, Between(1, 10)] = 3
    """Some size, in units."""


PRESETS = {"smoke": TinyConfig(preset="smoke", size=1), "default": TinyConfig()}


def test_options_override_the_preset() -> None:
    parsed = config.parse(TinyConfig, PRESETS, ["--preset", "smoke", "--seed", "4"])
    assert (parsed.preset, parsed.size, parsed.seed) == ("smoke", 1, 4)
    assert config.parse(TinyConfig, PRESETS, ["--size", "7"]).size == 7


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match="--preset must be one of smoke, default, got big"):
        config.parse(TinyConfig, PRESETS, ["--preset", "big"])


@pytest.mark.parametrize("size", ["0", "11"])
def test_option_out_of_range_is_named(size: str) -> None:
    with pytest.raises(ConfigError, match=f"--size must be 1 to 10, got {size}"):
        config.parse(TinyConfig, PRESETS, ["--size", size])


def test_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Folder("tiny", TinyConfig(output=tmp_path))
    Folder("tiny", TinyConfig(output=tmp_path))  # the same one goes on
    with pytest.raises(ConfigError, match="size must be 3, got 4"):
        Folder("tiny", TinyConfig(output=tmp_path, size=4))


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="must be an empty folder or one of this experiment"):
        Folder("tiny", TinyConfig(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_results_have_one_shape(tmp_path: Path) -> None:
    folder = Folder("tiny", TinyConfig(output=tmp_path))
    rows = [Row("baseline", {"infraction_rate": rates.rate(1, 8)}, {"infraction_rate": 0.0003})]
    results = folder.finish(rows, [Column("infraction_rate", "infraction %", percent=True)])
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document) == {"experiment", "format", "commit", "device", "versions", "processes", "config", "rows"}
    row = document["rows"][0]
    assert (row["name"], row["paper"]) == ("baseline", {"infraction_rate": 0.0003})
    assert set(row["metrics"]["infraction_rate"]) == {"value", "low", "high", "n"}
    assert row["metrics"]["infraction_rate"]["value"] == 0.125  # a fraction in the file, per cent in the table
    assert "12.500 [" in results.table
    assert "0.030" in results.table


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    Folder("tiny", TinyConfig(output=tmp_path))
    with pytest.raises(ConfigError, match="holds another configuration \\(experiment must be tiny, got other\\)"):
        Folder("other", TinyConfig(output=tmp_path))


def test_code_is_the_commit_and_its_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc\n", "status": " M a.py\n", "diff": "+1"}
    monkeypatch.setattr(origin, "_git", lambda *words: answers[words[0]])
    one = origin.code()
    answers["diff"] = "+2"
    assert origin.commit() == "abc+changes"
    assert one.startswith("abc+changes")
    assert one != origin.code()


@pytest.mark.parametrize(
    ("message", "status"),
    [("RESOURCE_EXHAUSTED: Out of memory", 2), ("UNAVAILABLE: Connection reset by peer", 70)],
)
def test_an_error_of_jax_is_ours_or_means_that_another_process_was_lost(
    message: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(jax.errors.JaxRuntimeError):  # of one process: as it is
        command.guarded(work)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit) as left:
        command.guarded(work)
    assert left.value.code == status
    said = capsys.readouterr().err
    assert message in said
    assert ("was lost" in said) == (status == 70)


def test_numbers_that_are_not_finite_are_null_in_the_files(tmp_path: Path) -> None:
    folder = Folder("tiny", TinyConfig(output=tmp_path))
    folder.finish([Row("baseline", {"elbo": rates.mean([1.0])})], [Column("elbo", "ELBO")])
    document = json.loads((tmp_path / "results.json").read_text())  # strict JSON: no NaN, no Infinity
    assert document["rows"][0]["metrics"]["elbo"] == {"value": 1.0, "low": None, "high": None, "n": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_failed_write_leaves_the_old_file_and_no_half_new_one(tmp_path: Path) -> None:
    folder = Folder("tiny", TinyConfig(output=tmp_path))
    folder.write("table.md", "old")
    pid = os.fork()
    if pid == 0:  # a child, whose files may not grow past 1 KiB: writing fails as on a full disk
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
            folder.write("table.md", "new" * 10_000)
        except OSError as error:
            code = 0 if "could not be written" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "table.md").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "config.json", "table.md"]


def test_one_seed_keeps_its_interval_and_several_give_student_s() -> None:
    one = rates.rate(5, 100)
    assert rates.over_seeds([one]) == one
    three = rates.over_seeds([rates.exact(v, 10) for v in (1.0, 2.0, 3.0)])
    half = 4.302652729911275 * 1.0 / np.sqrt(3)  # t(0.975, 2) times the standard error
    np.testing.assert_allclose(three, (2.0, 2.0 - half, 2.0 + half, 30))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output must be a folder, got .*file"):
        Folder("test", TinyConfig(output=tmp_path / "file"))


DAMAGES = [lambda path: path.unlink(), lambda path: path.write_text(""), lambda path: path.write_text("[]")]


@pytest.mark.parametrize("damage", [*DAMAGES, lambda path: path.write_bytes(path.read_bytes()[:20] + b"\xff")])
@pytest.mark.parametrize("names", [["config.json"], ["checkpoints/config.json"], "both, after the results are written"])
def test_a_lost_configuration_is_written_again(tmp_path, damage, names):
    tiny = TinyConfig(output=tmp_path / "run")
    folder = Folder("tiny", tiny)
    folder.archive.once("phase", lambda: {"a": np.ones(2)})
    before = (folder.path / "config.json").read_text()
    if isinstance(names, str):
        folder.finish([], [])
        names = ["config.json", "checkpoints/config.json"]
    for name in names:
        damage(folder.path / name)
    with pytest.raises(ConfigError, match=r"holds another configuration \(size must be 3, got 4\)"):
        Folder("tiny", dataclasses.replace(tiny, size=4))
    again = Folder("tiny", tiny)
    assert again.archive.once("phase", lambda: {"a": np.zeros(2)})["a"].tolist() == [1, 1]
    for name in ("config.json", "checkpoints/config.json"):
        assert (folder.path / name).read_text() == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_any_configuration_the_remedy_is_an_empty_folder(tmp_path, damage):
    tiny = TinyConfig(output=tmp_path / "run")
    folder = Folder("tiny", tiny)
    folder.log(a=1)
    folder.archive.once("phase", lambda: {"a": np.ones(2)})
    for name in ("config.json", "checkpoints/config.json"):
        damage(folder.path / name)
    with pytest.raises(ConfigError, match=r"neither config\.json nor its copy .* or empty this one"):
        Folder("tiny", tiny)
    shutil.rmtree(folder.path)
    folder.path.mkdir()
    Folder("tiny", tiny).finish([], [])


def test_what_a_killed_run_left_of_its_beginning_is_no_obstacle(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".lock").write_text("process 1 on a host")
    (tmp_path / "run" / ".config.json.0123.tmp").write_text("{")
    Folder("tiny", TinyConfig(output=tmp_path / "run")).log(a=1)


def test_the_configuration_beside_the_checkpoints_counts(tmp_path):
    """A flipped digit in config.json parts no run from its checkpoints."""
    tiny = TinyConfig(output=tmp_path / "run")
    folder = Folder("tiny", tiny)
    folder.archive.once("phase", lambda: {"a": np.ones(2)})
    before = (folder.path / "config.json").read_text()
    (folder.path / "config.json").write_text(before.replace('"seed": 0', '"seed": 1'))
    assert Folder("tiny", tiny).archive.once("phase", lambda: {"a": np.zeros(2)})["a"].tolist() == [1, 1]
    assert (folder.path / "config.json").read_text() == before


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_links_in_a_folder_are_not_followed(tmp_path, name):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    folder = Folder("tiny", TinyConfig(output=tmp_path / "run"))
    folder.log(a=1)
    lock.release(folder.path)
    (folder.path / name).unlink()
    for target in (thesis, tmp_path / "missing"):
        (folder.path / name).symlink_to(target)
        with pytest.raises(OSError, match=f"{name}.*(link|written)"):
            Folder("tiny", TinyConfig(output=tmp_path / "run")).log(a=1)
        lock.release(folder.path)
        (folder.path / name).unlink()
    assert thesis.read_text() == "years of work"
    assert not (tmp_path / "missing").exists()


def test_a_folder_that_another_run_made_again_is_not_written_to(tmp_path):
    tiny = TinyConfig(output=tmp_path / "run")
    folder = Folder("tiny", tiny)
    (tmp_path / "run").rename(tmp_path / "old")
    (tmp_path / "run").mkdir()
    for file in ("config.json", ".lock"):
        (tmp_path / "run" / file).write_bytes((tmp_path / "old" / file).read_bytes())
    with pytest.raises(OSError, match="was removed or replaced"):
        folder.log(a=1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("way", ["log", "write", "finish"])
def test_a_folder_that_is_removed_during_the_run_ends_it(tmp_path, way):
    tiny = TinyConfig(output=tmp_path / "run")
    folder = Folder("tiny", tiny)
    folder.archive.once("first", lambda: {"a": np.ones(2)})
    shutil.rmtree(folder.path)
    folder.archive.once("second", lambda: {"a": np.ones(2)})  # makes the folder again
    ways = {
        "log": lambda: folder.log(a=1),
        "write": lambda: folder.write("table.md", ""),
        "finish": lambda: folder.finish([], []),
    }
    with pytest.raises(OSError, match=r"run must stay as it is .* it was removed or replaced: empty the folder"):
        ways[way]()
    shutil.rmtree(folder.path)
    folder.path.mkdir()
    Folder("tiny", tiny).finish([], [])


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    kind = lambda number: "folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(kind(number)) or real_sync(number))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or real_replace(*names))
    write(tmp_path / "table.md", "text")
    assert calls == ["file", "replace", "folder"]


# Options.


@dataclasses.dataclass(frozen=True)
class ListConfig(Config):
    """Lists and paths."""

    mazes: Annotated[tuple[str, ...], config.Distinct()] = ("a",)
    """Some names."""
    scales: Annotated[tuple[float, ...], config.Distinct()] = (1.0,)
    """Some numbers."""
    data: Path | None = None
    """Some folder."""


LISTS = {"default": ListConfig()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mazes", "a", "b", "a"], "--mazes must name every value once, got a twice"),
        (["--scales", "1", "1.0"], "--scales must name every value once, got 1.0 twice"),
        (["--scales", "0", "2", "-0.0"], "--scales must name every value once, got -0.0 twice"),
        (["--data", "gs://bucket/x"], "--data must be a path of a file system, got gs:/bucket/x: mount it"),
        (["--output", "s3://bucket/x"], "--output must be a path of a file system, got s3:/bucket/x"),
        (["--data", "gs:/bucket"], "--data must be a path of a file system, got gs:/bucket"),
        (["--data", "file:///x"], "--data must be a path of a file system, got file:/x"),
        (["--data", "gs:"], "--data must be a path of a file system, got gs:"),
        (["--data", ""], "--data must have a value, got an empty value"),
        (["--output="], "--output must have a value, got an empty value"),
        (["--mazes", "a", ""], "--mazes must have a value, got an empty value"),
    ],
)
def test_lists_and_paths_are_checked(words, message):
    with pytest.raises(ConfigError, match=message):
        config.parse(ListConfig, LISTS, words)


@pytest.mark.parametrize("path", ["a:b", "x/gs:/x", "/data/x", "C:/x", "10:30/x"])
def test_paths_with_a_colon_are_paths(path):
    assert config.parse(ListConfig, LISTS, ["--data", path]).data == Path(path)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("relative_reward.maze2d", ["--mazes", "open", "open"]),
        ("relative_reward.maze2d", ["--grid", "4", "4"]),
        ("censoring.mnist", ["--guidance.sweep", "1", "2", "1"]),
        ("censoring.mnist", ["--active.labels", "5", "5"]),
        ("speed.censoring", ["--members", "1", "1"]),
        ("speed.genneg", ["--classifiers", "1", "1"]),
        ("genneg.traffic", ["--data", "gs://bucket/x"]),
        ("genneg.traffic", ["--recorded", "gs://bucket/x"]),
        ("censoring.mnist", ["--resnet.weights", "gs://bucket/x"]),
        ("censoring.oracle", ["--data", "gs://bucket/x"]),
        ("speed.mesh", ["--output", "gs://bucket/x"]),
    ],
)
def test_every_experiment_checks_its_lists_and_paths(module, words):
    found = importlib.import_module(f"experiments.{module}")
    with pytest.raises(ConfigError, match=f"{words[0]}(:| must)"):
        config.parse(type(found.PRESETS["default"]), found.PRESETS, words)


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path):
    folder = Folder("test", TinyConfig(output=tmp_path / "run"))
    folder.log(a=1)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "hal')
    folder.log(a=2)
    folder.log(a=3)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"a": 1}', '{"phase": "hal', '{"a": 2}', '{"a": 3}']
