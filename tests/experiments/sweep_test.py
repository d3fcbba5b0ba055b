import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import sweep
from experiments.censoring import mnist
from experiments.genneg import checkerboard, traffic
from experiments.lab.config import Config, ConfigError, of_program
from experiments.lab.experiment import Experiment, find
from experiments.lab.table import Column
from gendiff.metrics import rates
from gendiff.training import Settings, Task, Training


@dataclasses.dataclass(frozen=True)
class ToyConfig(Config):
    """A parameter that follows a mean."""

    rate: float = 0.05
    steps: int = 8
    fail: int = -1


def follow(mean):
    return Task(lambda w, key, x: (w - x) ** 2, lambda key: mean + jax.random.normal(key, (8,)))


def toy_table(lab):
    def fail(run):
        if run.seed == run.config.fail:
            raise ValueError("the toy fails")

    def asked(run):
        settings = Settings(run.config.steps, run.config.rate, every=4)
        return Training(jax.random.key(run.seed), np.float32(0.0), follow, jnp.float32(1), settings)

    lab.each(fail)
    lab.train("fit", asked, lambda run, state: {"w": state.best})
    lab.each(lambda run: run.add("w", {"value": rates.exact(float(run["fit"]["w"]))}))


TOY = Experiment("toy", ToyConfig, {"default": ToyConfig()}, toy_table, (Column("value", "value"),))


@dataclasses.dataclass(frozen=True)
class PathConfig(Config):
    """A path."""

    data: Path = Path("a")
    """Some data."""


PATHS = Experiment("paths", PathConfig, {"default": PathConfig()}, toy_table)


def many(count):
    return ",".join(str(i) for i in range(1, count + 1))


def planned(folder, *grid, seeds="0:3", others=()):
    return sweep.plan(TOY, sweep.Options("toy", seeds, grid), others, folder)


def test_the_table_is_the_mean_of_runs_alone(tmp_path):
    every = planned(tmp_path / "sweep", "rate=0.05,0.1")
    assert len(every) == 6
    assert sweep.sweep(TOY, every, tmp_path / "sweep", 8) == {}
    sweep.report(tmp_path / "sweep", every)
    document = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert sorted(each["config"]["rate"] for each in document) == [0.05, 0.1]
    for each in document:
        config = ToyConfig(rate=each["config"]["rate"])
        alone = [
            TOY.run(dataclasses.replace(config, seed=seed, output=tmp_path / f"{config.rate}-{seed}")).rows[0]
            for seed in range(3)
        ]
        values = [row.metrics["value"].value for row in alone]
        found = each["rows"]["w"]["value"]
        np.testing.assert_allclose(found["value"], np.mean(values), rtol=1e-5)
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        np.testing.assert_allclose([found["low"], found["high"]], [low, high], rtol=1e-4)
        assert each["seeds"] == [0, 1, 2]


def test_runs_of_one_program_go_side_by_side(tmp_path):
    """Seeds and options marked as arguments of programs do not part runs; others do."""
    every = planned(tmp_path, "rate=0.05,0.1", seeds="0:5")
    found = sweep.parts(every, 3)
    assert [len(part) for part in found] == [3, 2, 3, 2]
    assert all(len({run.config.rate for run in part}) == 1 for part in found)
    what = find("genneg.checkerboard")
    scales = sweep.plan(what, sweep.Options(what.name, "0:2", ("guidance_scale=0.5,1,2",)), (), tmp_path)
    assert [len(part) for part in sweep.parts(scales, 8)] == [6]


def test_what_is_done_is_not_done_again_and_what_fails_leaves_the_rest(tmp_path):
    every = planned(tmp_path, "fail=1")
    failed = sweep.sweep(TOY, every, tmp_path, 8)
    assert {name: str(error) for name, error in failed.items()} == {"fail-1_seed-1": "the toy fails"}
    times = {each.name: (tmp_path / each.name / "results.json").stat().st_mtime_ns for each in every[::2]}
    assert list(sweep.sweep(TOY, every, tmp_path, 2)) == ["fail-1_seed-1"]
    for name, time in times.items():
        assert (tmp_path / name / "results.json").stat().st_mtime_ns == time
    text = sweep.report(tmp_path, every)
    assert text.count("| w ") == 1
    assert "| 2 " in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}'])
def test_damaged_results_are_made_again(tmp_path, text):
    every = planned(tmp_path, seeds="0:2")
    sweep.sweep(TOY, every, tmp_path, 8)
    path = tmp_path / "seed-1" / "results.json"
    before = path.read_text()
    path.write_text(text)
    assert sweep.sweep(TOY, every, tmp_path, 8) == {}
    assert path.read_text() == before


def test_results_that_are_removed_during_the_sweep_are_told(tmp_path):
    every = planned(tmp_path, seeds="0:2")

    def table(lab):
        if lab.runs[0].seed == 1:
            shutil.rmtree(tmp_path / "seed-0")
        toy_table(lab)

    failed = sweep.sweep(TOY._replace(table=table), every, tmp_path, 1)
    assert {name: str(error) for name, error in failed.items()} == {
        "seed-0": f"{tmp_path / 'seed-0'} must have its results, but they are gone: run the same command again"
    }
    assert sweep.sweep(TOY, every, tmp_path, 1) == {}


def test_an_empty_value_of_the_command_line_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep", "genneg.checkerboard", "--output", ""])
    with pytest.raises(ConfigError, match="--output must have a value"):
        sweep.parsed()


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    sweep.sweep(TOY, planned(tmp_path, seeds="0:1"), tmp_path, 8)
    other = planned(tmp_path, seeds="0:1", others=["--steps", "4"])
    with pytest.raises(ConfigError, match="holds another configuration \\(steps must be 8, got 4\\)"):
        sweep.sweep(TOY, other, tmp_path, 8)


def test_a_run_of_several_seeds_is_a_run_of_one_in_a_sweep(tmp_path):
    what = find("genneg.checkerboard")
    every = sweep.plan(what, sweep.Options(what.name, "0:5"), ["--preset", "paper"], tmp_path)
    assert [(each.config.seed, each.config.seeds) for each in every] == [(seed, 1) for seed in range(5)]
    assert what.presets["paper"].seeds == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ToyConfig(output=Path("gs://bucket/a")), "--output must be a path of a file system, got gs:/"),
        (lambda: sweep.Options("toy", at_once=0), "--at-once must be 1 or more, got 0"),
        (
            lambda: sweep.Options("toy", output=Path("s3://bucket/a")),
            "--output must be a path of a file system, got s3",
        ),
        (lambda: sweep.seeds("0-5"), "--seeds must be such as 0:5 or 0,3,7, got 0-5"),
        (lambda: sweep.seeds("3:3"), "--seeds must name 1 to 1,000 seeds, got 3:3, which names 0"),
        (lambda: sweep.seeds("5:3"), "--seeds must name 1 to 1,000 seeds, got 5:3, which names 0"),
        (lambda: sweep.seeds("0:1000000000"), "got 0:1000000000, which names 1,000,000,000"),
        (lambda: sweep.seeds("0:" + 30 * "9"), "--seeds must name 1 to 1,000 seeds"),
        (lambda: sweep.seeds(",".join(map(str, range(1001)))), "which names 1,001"),
        (lambda: sweep.seeds("1,1"), "--seeds must name every value once, got 1 twice"),
        (lambda: sweep.seeds("1,01"), "--seeds must name every value once, got 1 twice"),
        (lambda: planned(Path("x"), seeds="-1:1"), "--seed must be 0 to 2147483647, got -1"),
        (lambda: planned(Path("x"), "rate=1,1"), "--grid rate must name every value once, got 1 twice"),
        (lambda: planned(Path("x"), "rate=1,1.0"), "different runs, got rate-1_seed-0 and rate-1.0_seed-0"),
        (lambda: planned(Path("x"), "rate=1e3,2,1000"), "different runs, got rate-1e3_seed-0 and rate-1000_seed-0"),
        (lambda: sweep.plan(PATHS, sweep.Options("p", "0:1", ("data=a/b,a-b",)), (), Path("x")), "different runs"),
        (
            lambda: planned(Path("x"), "steps=1,2", seeds="0:600"),
            "--seeds, --grid must give at most 1,000 runs, got 1,200",
        ),
        (
            lambda: planned(Path("x"), *(f"{n}={many(40)}" for n in ("rate", "steps"))),
            "at most 1,000 combinations, got 1,",
        ),
        (lambda: sweep.grid(["rate"], ["rate"]), "--grid must be FIELD=VALUE,VALUE.., got rate"),
        (lambda: sweep.grid(["seed=1"], ["rate", "seed"]), "these fields once at most .rate., got seed"),
        (lambda: sweep.grid(["rate=1", "rate=2"], ["rate"]), "these fields once at most .rate., got rate"),
        (lambda: find("os"), "experiment must be one of genneg.checkerboard, .*, got os"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "find", lambda name: TOY)
    monkeypatch.setattr("experiments.lab.start.start", lambda: None)
    arguments = ["toy", "--seeds", "0,2", "--grid", "rate=0.1", "steps=4,8", "--output", str(tmp_path), "--fail=7"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    sweep.main()
    assert capsys.readouterr().out.count("| w ") == 2
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir())[0] == "rate-0.1_steps-4_seed-0"
    held = json.loads((tmp_path / "rate-0.1_steps-4_seed-2" / "config.json").read_text())
    assert (held["fail"], held["steps"], held["seed"]) == (7, 4, 2)


@pytest.mark.parametrize("module", [checkerboard, traffic, mnist])
def test_problems_are_equal_where_programs_are(module):
    config = module.PRESETS["smoke"]
    again = dataclasses.replace(scaled(config, 3.0), seed=4, output=Path("elsewhere"))
    assert of_program(again) == of_program(config)
    assert module.problem(again) == module.problem(config)
    assert hash(module.problem(again)) == hash(module.problem(config))
    fewer = dataclasses.replace(config, sampler_steps=config.sampler_steps - 1)
    assert of_program(fewer) != of_program(config)
    assert module.problem(fewer) != module.problem(config)


def scaled(config, scale):
    """The configuration with another scale of guidance."""
    if isinstance(config, mnist.MnistConfig):
        return dataclasses.replace(config, guidance=dataclasses.replace(config.guidance, scale=scale))
    return dataclasses.replace(config, guidance_scale=scale)
