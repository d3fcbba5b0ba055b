"""The contract of every experiment: options, folders, errors, files."""

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import pytest

from experiments import contract
from experiments.contract import Between, Column, Config, ConfigError, Folder, Row
from gendiff.metrics import rates


@dataclasses.dataclass(frozen=True)
class TinyConfig(Config):
    """A configuration for these tests."""

    size: Annotated[int, Between(1, 10)] = 3
    """Some size, in units."""


PRESETS = {"smoke": TinyConfig(preset="smoke", size=1), "default": TinyConfig()}


def test_options_override_the_preset() -> None:
    parsed = contract.parse(TinyConfig, PRESETS, ["--preset", "smoke", "--seed", "4"])
    assert (parsed.preset, parsed.size, parsed.seed) == ("smoke", 1, 4)
    assert contract.parse(TinyConfig, PRESETS, ["--size", "7"]).size == 7


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match="--preset: expected one of smoke, default, given big"):
        contract.parse(TinyConfig, PRESETS, ["--preset", "big"])


@pytest.mark.parametrize("size", ["0", "11"])
def test_option_out_of_range_is_named(size: str) -> None:
    with pytest.raises(ConfigError, match=f"--size must be 1 to 10, got {size}"):
        contract.parse(TinyConfig, PRESETS, ["--size", size])


def test_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Folder("tiny", TinyConfig(output=tmp_path))
    Folder("tiny", TinyConfig(output=tmp_path))  # the same one goes on
    with pytest.raises(ConfigError, match="size: expected 3, given 4"):
        Folder("tiny", TinyConfig(output=tmp_path, size=4))


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="expected an empty folder"):
        Folder("tiny", TinyConfig(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_results_have_the_contract_s_shape(tmp_path: Path) -> None:
    folder = Folder("tiny", TinyConfig(output=tmp_path))
    rows = [Row("baseline", {"infraction_rate": rates.rate(1, 8)}, {"infraction_rate": 0.0003})]
    results = folder.finish(rows, [Column("infraction_rate", "infraction %", percent=True)])
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document) == {"experiment", "commit", "device", "processes", "config", "rows"}
    row = document["rows"][0]
    assert (row["name"], row["paper"]) == ("baseline", {"infraction_rate": 0.0003})
    assert set(row["metrics"]["infraction_rate"]) == {"value", "low", "high", "n"}
    assert row["metrics"]["infraction_rate"]["value"] == 0.125  # a fraction in the file, per cent in the table
    assert "12.500 [" in results.table
    assert "0.030" in results.table


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    Folder("tiny", TinyConfig(output=tmp_path))
    with pytest.raises(ConfigError, match="holds another configuration \\(experiment: expected tiny, given other\\)"):
        Folder("other", TinyConfig(output=tmp_path))


def test_code_is_the_commit_and_its_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc\n", "status": " M a.py\n", "diff": "+1"}
    monkeypatch.setattr(contract, "_git", lambda *words: answers[words[0]])
    one = contract.code()
    answers["diff"] = "+2"
    assert contract.commit() == "abc+changes"
    assert one.startswith("abc+changes")
    assert one != contract.code()


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
        contract.guarded(work)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit) as left:
        contract.guarded(work)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "table.md"]


def test_one_seed_keeps_its_interval_and_several_give_student_s() -> None:
    one = rates.rate(5, 100)
    assert rates.over_seeds([one]) == one
    three = rates.over_seeds([rates.exact(v, 10) for v in (1.0, 2.0, 3.0)])
    half = 4.302652729911275 * 1.0 / np.sqrt(3)  # t(0.975, 2) times the standard error
    np.testing.assert_allclose(three, (2.0, 2.0 - half, 2.0 + half, 30))


def test_damaged_folders_are_named(tmp_path):
    config = TinyConfig(output=tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.0123.tmp").write_text("{")  # killed while it was written
    folder = Folder("test", config)
    for text in ("", "[]"):
        (folder.path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"expected a configuration in .*config\.json, given a damaged file"):
            Folder("test", config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output: expected a folder, given .*file"):
        Folder("test", TinyConfig(output=tmp_path / "file"))


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path):
    folder = Folder("test", TinyConfig(output=tmp_path / "run"))
    folder.log(a=1)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "hal')
    folder.log(a=2)
    folder.log(a=3)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"a": 1}', '{"phase": "hal', '{"a": 2}', '{"a": 3}']
