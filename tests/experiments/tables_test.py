"""The page of all results: joining, escaping, what is missing, and what reproduces a row."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments import tables
from experiments.censoring import mnist
from experiments.genneg import checkerboard, traffic
from experiments.lab import page, reproduce, results
from experiments.lab.config import Config, parse
from experiments.lab.experiment import find
from experiments.lab.folder import FORMAT, Folder, fields, flat
from experiments.lab.table import Row
from experiments.relative_reward import maze2d
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate

ROOT = Path(__file__).parents[2]
MODULES = {
    "genneg.checkerboard": checkerboard, "genneg.traffic": traffic, "censoring.mnist": mnist,
    "relative_reward.maze2d": maze2d,
}  # fmt: skip
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645"
    "400000000049454e44ae426082"
)


def make(root: Path, name: str = "run", experiment: str = "genneg.checkerboard", **changes: Any) -> Path:
    """A small run of the smoke preset with a row `round-1`; `changes` are of the configuration or of the results."""
    folder = root / name
    folder.mkdir(parents=True)
    document = {
        "experiment": experiment,
        "format": FORMAT,
        "commit": changes.pop("commit", "a" * 40),
        "device": changes.pop("device", "a processor, 2 cores"),
        "rows": changes.pop("rows", [row("round-1", changes.pop("value", 0.01))]),
    }
    preset = MODULES[experiment].PRESETS[changes.pop("preset", "smoke")]
    config = json.loads(json.dumps(fields(preset) | {"output": str(folder)} | changes, default=str))
    (folder / "config.json").write_text(
        json.dumps(config | {"experiment": experiment, "format": FORMAT, "output": None})
    )
    (folder / "results.json").write_text(json.dumps(document | {"config": config}))
    lines = [{"time": 1.7e9 + 60 * i, "phase": "baseline", "done": i, "of": 2} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def row(name: str, value: float | None, paper: dict[str, float] | None = None, **others: Any) -> dict[str, Any]:
    metric = {"value": value, "low": 0.0, "high": 0.1, "n": 100}
    return {"name": name, "metrics": {"infraction_rate": metric} | others, "paper": paper or {}}


def read(*roots: Path) -> tuple[list[results.Run], list[str]]:
    warnings: list[str] = []
    return results.collect(roots, warnings.append), warnings


def written(*roots: Path) -> str:
    return page.page(*read(*roots), roots[0])


# Joining.


def test_seeds_are_joined_by_student_s_interval(tmp_path: Path) -> None:
    values = [0.011, 0.014, 0.02]
    for seed, value in enumerate(values):
        make(tmp_path, f"seed-{seed}", seed=seed, value=value)
    runs, _ = read(tmp_path)
    (table,) = results.joined_runs(runs)
    (measured, count) = results.joined_rows(table)["round-1"]
    got = measured.metrics["infraction_rate"]
    interval = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(got[:3], [np.mean(values), *interval], rtol=1e-12)
    assert (got.n, count, table.seeds) == (300, 3, [0, 1, 2])
    assert "3 seeds: 0, 1, 2" in written(tmp_path)


def test_one_seed_keeps_its_own_interval(tmp_path: Path) -> None:
    make(tmp_path)
    (table,) = results.joined_runs(read(tmp_path)[0])
    assert results.joined_rows(table)["round-1"][0].metrics["infraction_rate"] == Estimate(0.01, 0.0, 0.1, 100)


def test_seeds_that_agree_have_no_interval_of_width_zero() -> None:
    joined = results.joined([rates.rate(0, 100), rates.rate(0, 100)])
    assert joined.low == 0.0
    assert joined.high == pytest.approx(rates.rate(0, 100).high)
    assert results.joined([rates.exact(7), rates.exact(7)]) == rates.exact(7, 2)  # a count stays exact


def test_shares_stay_shares_and_differences_do_not(tmp_path: Path) -> None:
    gain = lambda value: {"infraction_gain": {"value": value, "low": value, "high": value, "n": 1}}
    for seed, value in enumerate((0.01, 0.9)):
        make(tmp_path, f"{seed}", experiment="genneg.traffic", seed=seed, rows=[row("by-agent", value, **gain(value))])
    (table,) = results.joined_runs(read(tmp_path)[0])
    metrics = results.joined_rows(table)["by-agent"][0].metrics
    assert metrics["infraction_rate"][1:3] == (0.0, 1.0)
    np.testing.assert_allclose(metrics["infraction_gain"][:3], rates.mean([0.01, 0.9])[:3])
    assert metrics["infraction_gain"].low < 0


def test_a_value_that_is_not_finite_is_not_averaged_away(tmp_path: Path) -> None:
    make(tmp_path, "a", rows=[row("round-1", None)])
    make(tmp_path, "b", seed=1)
    (table,) = results.joined_runs(read(tmp_path)[0])
    assert math.isnan(results.joined_rows(table)["round-1"][0].metrics["infraction_rate"].value)
    assert "? [?, ?]" in written(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"rounds": 2}, {"width": 64}, {"commit": "b" * 40}, {"device": "8 x TPU"}], ids=str
)
def test_what_differs_by_more_than_the_seed_is_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b", seed=1, **changes)
    runs, _ = read(tmp_path)
    assert len(results.joined_runs(runs)) == 2
    of_code = {"commit", "device"} & set(changes)
    assert len(results.joined_runs(runs, join_commits=True)) == (1 if of_code else 2)


def test_a_seed_counts_once(tmp_path: Path) -> None:
    """Two runs of a seed are one, also where a run has several seeds."""
    make(tmp_path, "a", seeds=3)
    make(tmp_path, "b", seed=2, seeds=3)
    make(tmp_path, "c", seed=3, seeds=3)
    (table,) = results.joined_runs(read(tmp_path)[0])
    assert table.seeds == [0, 1, 2, 3, 4, 5]
    assert [run.folder.name for run in table.repeated] == ["b"]
    assert "which no number above includes" in written(tmp_path)


def test_a_run_is_read_once(tmp_path: Path) -> None:
    make(tmp_path)
    assert len(read(tmp_path, tmp_path / "run", tmp_path / "." / "run")[0]) == 1


# The page.


def test_ours_stand_beside_the_paper_s(tmp_path: Path) -> None:
    folder = make(tmp_path, rows=[row("round-1-unweighted", 0.0033, {"infraction_rate": 0.0003})])
    (folder / "samples 1.png").write_bytes(PIXEL)
    (folder / "table.md").write_text("# title\n\n| row |\n|:--|\n| a |\n\nWhat the columns mean.\n")
    markdown = written(tmp_path)
    plain = re.sub(" +", " ", markdown)
    assert "| row | infraction % | the paper's |\n" in plain
    assert "| `round-1-unweighted` | 0.330 [0.000, 10.000] | 0.030 |\n" in plain
    assert "](run/samples%201.png)" in markdown
    for text in ("2307.16463", "Figures 2 and 3", "a" * 40, "a processor, 2 cores", "    What the columns mean."):
        assert text in markdown
    assert "preset smoke; seed 0" in markdown
    assert "| 120 " in markdown  # seconds, from the first to the last report
    assert "    python -m experiments.genneg.checkerboard --preset smoke --seed 0\n" in markdown


def test_configurations_are_told_by_what_differs_from_the_preset(tmp_path: Path) -> None:
    make(tmp_path, rounds=2, width=48)
    assert "preset smoke with rounds = 2, width = 48; seed 0" in written(tmp_path)


def test_papers_sizes_are_for_five_seeds() -> None:
    boards, scenes = find("genneg.checkerboard"), find("genneg.traffic")
    assert page.of_preset(scenes, "paper") == "python -m experiments.sweep genneg.traffic --preset paper --seeds 0:5"
    assert page.of_preset(boards, "paper") == "python -m experiments.genneg.checkerboard --preset paper"
    assert boards.presets["paper"].seeds == 5
    assert page.of_preset(scenes, "smoke") == "python -m experiments.genneg.traffic --preset smoke"


def test_missing_rows_presets_and_experiments_are_named(tmp_path: Path) -> None:
    make(tmp_path, rows=[row(name, 0.1) for name in ("data", "baseline", "round-1", "rejection", "refit", "smc")])
    markdown = written(tmp_path)
    lacking = "round-1-unweighted, distilled-1, replay, accepted"
    assert f"rows missing of genneg.checkerboard: `{lacking}`" in markdown
    plain = re.sub(" +", " ", markdown)
    assert "| row | infraction % | the paper's | ELBO (nats) | the paper's |\n" in plain
    assert "| round-1-unweighted (missing) | - | 0.030 | - | -1.420 |\n" in plain
    assert "preset paper never finished. `python -m experiments.genneg.checkerboard --preset paper`" in markdown
    assert "`genneg.traffic` (section 6.2, Table 1 and Figure 1): no results." in markdown
    assert "-21,650.0" in markdown  # the paper's numbers are there without ours


def test_a_row_that_some_seeds_lack_says_so(tmp_path: Path) -> None:
    make(tmp_path, "a", rows=[row("round-1", 0.1), row("smc", 0.1)])
    make(tmp_path, "b", seed=1)
    assert "smc (1 of 2 runs)" in written(tmp_path)


@pytest.mark.parametrize("experiment", MODULES)
def test_expected_rows_are_those_of_the_experiment(experiment: str) -> None:
    what = find(experiment)
    for preset in what.presets.values():
        names = what.rows(preset)
        assert len(set(names)) == len(names) >= 8
    module = Path(MODULES[experiment].__file__)
    source = "".join(path.read_text() for path in (module, module.with_name("rows.py")) if path.exists())
    stems = {name.split("/")[0] for name in names if not any(letter.isdigit() for letter in name)}
    assert not [stem for stem in stems if f'"{stem}"' not in source and stem.rsplit("-", 1)[0] not in source]
    paper = {name.split("/")[0] for name in (what.paper.rows if what.paper else ())}
    assert paper <= {name.split("/")[0] for name in names}


def test_expected_rows_follow_the_configuration() -> None:
    smoke = checkerboard.PRESETS["smoke"]
    assert "distilled-1" in checkerboard.row_names(smoke)
    assert "round-5" in checkerboard.row_names(checkerboard.PRESETS["paper"])
    assert "omega-0.25" in mnist.EXPERIMENT.rows(mnist.PRESETS["paper"])
    assert "active-50" in mnist.EXPERIMENT.rows(mnist.PRESETS["default"])
    assert "principled/umaze" in maze2d.row_names(maze2d.PRESETS["default"])
    assert "principled/umaze" not in maze2d.row_names(maze2d.PRESETS["smoke"])


def test_unfinished_runs_say_how_far_they_came(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "results.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1700000500.0, "phase": "round-1 dr')  # cut off
    markdown = written(tmp_path)
    assert "is unfinished: last report baseline, 2 of 2, at 2023-11-14 22:15 UTC" in markdown
    (folder / "metrics.jsonl").unlink()
    assert "is unfinished: no report yet" in written(tmp_path)


def test_a_folder_written_by_the_contract_is_read(tmp_path: Path) -> None:
    config = checkerboard.CheckerboardConfig(preset="smoke", output=tmp_path / "run")
    folder = Folder("genneg.checkerboard", config)
    (run,) = read(tmp_path)[0]
    assert run.rows is None
    folder.finish([Row("round-1", {"infraction_rate": rates.rate(1, 8)})], checkerboard.COLUMNS, "Notes.")
    (run,) = read(tmp_path)[0]
    assert run.rows is not None
    assert run.rows["round-1"].metrics["infraction_rate"] == rates.rate(1, 8)
    assert run.experiment == "genneg.checkerboard"


def test_results_of_another_format_are_shown_without_today_s_presets(tmp_path: Path) -> None:
    """Their options have other names, so no row is missing and today's code has no command for them."""
    folder = make(tmp_path)
    document = json.loads((folder / "results.json").read_text())
    del document["format"]
    (folder / "results.json").write_text(json.dumps(document))
    markdown = written(tmp_path)
    assert "### preset smoke with options of format 1; seed 0" in markdown
    assert "round-1" in markdown
    assert "rows missing" not in markdown
    assert "--seed 0" not in markdown
    assert "--elbo-levels 8" in reproduce.reproduce(read(tmp_path)[0], "genneg.checkerboard", "round-1")


# Files of any content.


def test_hostile_texts_are_texts(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>|`x`[a](javascript:b)\n\x1b[31m# c'
    folder = make(tmp_path, rows=[row(evil, 0.1, **{"<img src=x>": {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}})],
                  commit=evil, device=evil, mode=evil)  # fmt: skip
    (folder / '"><b>\n.png').write_bytes(PIXEL)
    (folder / "table.md").write_text(f"| row |\n|:--|\n\n```\n</pre>{evil}")
    markdown = written(tmp_path)
    assert '&lt;script&gt;alert("1")&lt;/script&gt;\\|\\`x\\`[a\\](javascript:b)' in markdown
    assert markdown.count("![") == 1
    # The verbatim notes are indented: there Markdown takes nothing for HTML.
    read_as_markdown = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert not [tag for tag in ("<script>", "<b>", "<img", "[a](javascript:") if tag in read_as_markdown]
    assert "\x1b" not in markdown
    said = reproduce.reproduce(read(tmp_path)[0], "genneg.checkerboard", results.cleaned(evil))
    assert "\x1b" not in said
    lines = [line for line in said.splitlines() if not line.startswith("#")]
    assert len(lines) == 2  # to install and to run: nothing is checked out by such a name
    assert results.cleaned(evil) in shlex.split(lines[-1])  # one word of the command, not a command


@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize(
    "content", [b"", b'{"rows": [', b"[1]", b"\xff\xfe", b"null", b'{"model_type": "bert"}', b"[" * 100_000], ids=repr
)
def test_damaged_and_foreign_files_are_named_and_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    make(tmp_path, "whole")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / name).write_bytes(content)
    runs, warnings = read(tmp_path)
    assert [run.folder.name for run in runs] == ["whole"]
    assert len(warnings) == 1
    assert str(broken / name) in warnings[0]
    assert name in page.page(runs, warnings, tmp_path)


@pytest.mark.parametrize(
    "rows", [None, 3, [3], [{}], [{"name": "a", "metrics": {"m": {"value": "x"}}}], [{"name": "a", "metrics": [1]}]],
    ids=repr,
)  # fmt: skip
def test_rows_of_another_shape_are_refused(tmp_path: Path, rows: Any) -> None:
    folder = make(tmp_path, rows=rows)
    runs, warnings = read(tmp_path)
    assert not runs
    assert len(warnings) == 1
    assert str(folder / "results.json") in warnings[0]


def test_options_that_do_not_exist_today_do_not_hide_a_run(tmp_path: Path) -> None:
    make(tmp_path, "older", bygone="yes", rounds="many")
    assert "bygone = yes" in written(tmp_path)


def test_the_name_of_a_folder_is_no_command(tmp_path: Path) -> None:
    make(tmp_path, "a\nrm -r x\udcff<b>")
    markdown = written(tmp_path)
    assert "\nrm" not in markdown + reproduce.reproduce(read(tmp_path)[0], "genneg.checkerboard", "round-1")
    markdown.encode()


def test_an_experiment_of_no_paper_is_shown_and_never_imported(tmp_path: Path) -> None:
    folder = make(tmp_path)
    text = (folder / "results.json").read_text().replace("genneg.checkerboard", "os.path")
    (folder / "results.json").write_text(text)
    markdown = written(tmp_path)
    assert "## os.path" in markdown
    assert "Of no paper." in markdown


# The documentation.


def test_the_docs_show_the_committed_results() -> None:
    folder = ROOT / "docs" / "results"
    runs, warnings = read(folder)
    pages = page.documents(folder, runs)
    assert not warnings
    assert {*pages, folder / "index.md"} == set(folder.glob("*.md"))
    for path, text in pages.items():
        assert path.read_text() == text, "run: python -m experiments.tables --docs docs/results"
        assert sum(file.stat().st_size for file in path.with_suffix("").iterdir()) <= 1e6


def test_a_page_of_the_docs(tmp_path: Path, monkeypatch, capsys) -> None:
    """It has the table, its figures and its findings, and does not depend on where it is written."""
    folder = make(
        tmp_path, "genneg.checkerboard", rows=[row("round-1-unweighted", 0.0033, {"infraction_rate": 0.0003})]
    )
    (folder / "samples.png").write_bytes(PIXEL)
    (folder / "findings.md").write_text("# A title\n\nA finding.\n")
    assert call(monkeypatch, "--docs", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'genneg.checkerboard.md'}\n"
    text = (tmp_path / "genneg.checkerboard.md").read_text()
    assert text.startswith("# A title\n")
    assert "A finding." not in text
    assert "```{include} genneg.checkerboard/findings.md\n:start-line: 1\n```" in text
    assert "![samples.png](genneg.checkerboard/samples.png)" in text
    assert re.search(r"`round-1-unweighted` +\| 0.330 \[0.000, 10.000\] +\| 0.030", text)
    for part in ("2307.16463", "a" * 40, "a processor, 2 cores", "2023-11-14 22:15 UTC"):
        assert part in text
    assert str(tmp_path) not in text
    (folder / "results.json").write_text("{")
    assert call(monkeypatch, "--docs", tmp_path) == 2
    assert "--docs must be a folder whose results can be read" in capsys.readouterr().err
    assert (tmp_path / "genneg.checkerboard.md").read_text() == text


# What reproduces a row.


def parsed(command: list[str], experiment: str) -> Any:
    """The configuration of a command line."""
    flag, name, *words = command
    assert (flag, name) == ("-m", f"experiments.{experiment}")
    what = find(experiment)
    return parse(what.config, what.presets, words)


@pytest.mark.parametrize("preset", ["smoke", "default", "paper"])
@pytest.mark.parametrize("experiment", MODULES)
def test_the_command_has_the_configuration(tmp_path: Path, experiment, preset) -> None:
    """Every preset, with some options changed: by every option, and by those that differ from today's preset."""
    changes: dict[str, dict[str, Any]] = {
        "genneg.checkerboard": {"mode": "distill", "half_width": 2.5},
        "genneg.traffic": {"recorded": "/a folder/of scenes", "fewer": 0.5},
        "censoring.mnist": {"keep": True, "share": 0.3, "data_seed": 5},
        "relative_reward.maze2d": {"mazes": ["large", "umaze"], "radius": 0.25},
    }
    make(tmp_path, experiment=experiment, preset=preset, seed=3, **changes[experiment])
    (run,) = read(tmp_path)[0]
    for words in (reproduce.command(run), reproduce.today(run)):
        config = flat(fields(parsed(words, experiment)))
        assert config == run.config | {"output": None}
        assert ("--" + next(iter(changes[experiment])).replace("_", "-")) in words
    assert len(reproduce.today(run)) < 20 < len(reproduce.command(run))
    assert reproduce.commands(run)[-1] == shlex.join([".venv/bin/python", *reproduce.command(run)])


@dataclasses.dataclass(frozen=True)
class Group:
    """Options of a group."""

    steps: int = 3
    fast: bool = True


@dataclasses.dataclass(frozen=True)
class Grouped(Config):
    """A configuration with a group."""

    training: Group = Group()


def test_options_of_a_group(tmp_path: Path, monkeypatch) -> None:
    """A nested configuration is told as `group.option`, and its command line is read back."""
    what = find("genneg.checkerboard")._replace(presets={"smoke": Grouped("smoke")})
    monkeypatch.setattr(results, "known", lambda name: what)
    config = {"preset": "smoke", "seed": 1, "training": {"steps": 5, "fast": False}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"experiment": what.name, "format": FORMAT}))
    (run,) = read(tmp_path)[0]
    changed = Grouped("smoke", training=Group(5, False))
    assert results.difference(run) == (changed, {"training.steps": 5, "training.fast": False})
    words = reproduce.today(run)[2:]
    assert parse(Grouped, what.presets, words) == dataclasses.replace(changed, seed=1)


def test_a_row_is_told_with_all_that_it_takes(tmp_path: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    make(tmp_path, experiment="genneg.traffic", commit=f"{commit}+changes", device="8 x TPU v5 lite",
         rows=[row("by-agent", 0.1, {"infraction_rate": 0.172})])  # fmt: skip
    make(tmp_path, "other", experiment="genneg.traffic", seed=1)
    said = reproduce.reproduce(read(tmp_path)[0], "genneg.traffic", "by-agent")
    assert f"git checkout {commit}\n" in said
    assert "# warning: the code had changes that are in no commit" in said
    assert "pip install -q -e '.[traffic,tpu]'" in said
    assert "infraction %: 10.0 [0.0, 10.0] (the paper: 17.2)" in said
    assert "on 8 x TPU v5 lite, the whole run in 120 s" in said
    assert "--seed 0" in said
    assert "--seed 1" not in said


def test_a_row_that_nobody_measured(tmp_path: Path) -> None:
    make(tmp_path)
    runs, _ = read(tmp_path)
    with pytest.raises(ValueError, match=r"--row must name .* results \(genneg.checkerboard\), got genneg.traffic"):
        reproduce.reproduce(runs, "genneg.traffic", "by-agent")
    with pytest.raises(ValueError, match=r"--row must name a row of genneg.checkerboard \(round-1\), got round-9"):
        reproduce.reproduce(runs, "genneg.checkerboard", "round-9")


# The command line.


def call(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["tables", *map(str, arguments)])
    try:
        tables.main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_the_page_is_written(tmp_path: Path, monkeypatch, capsys) -> None:
    make(tmp_path / "results")
    for output, name in (("new/page", "new/page.md"), ("results", "results/index.md"), ("a.b.md", "a.b.md")):
        assert call(monkeypatch, tmp_path / "results", "--output", tmp_path / output) == 0
        assert "round-1" in (tmp_path / name).read_text()
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
    assert call(monkeypatch, tmp_path / "results", "--row", "genneg.checkerboard", "round-1") == 0
    assert "-m experiments.genneg.checkerboard --preset smoke" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_an_empty_root_says_what_to_run(tmp_path: Path, monkeypatch, capsys, there: bool) -> None:
    root = tmp_path / "results"
    if there:
        root.mkdir()
    assert call(monkeypatch, root, "--output", tmp_path / "page") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: no run of an experiment in {root}: run one first, python -m experiments.")
    assert not list(tmp_path.glob("page*"))


def test_no_accelerator_is_started(tmp_path: Path) -> None:
    """A running experiment may hold it."""
    make(tmp_path)
    words = [sys.executable, "-m", "experiments.tables", str(tmp_path), "--output", str(tmp_path / "page.md")]
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    assert subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "page.md").exists()
