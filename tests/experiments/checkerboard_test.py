"""The checkerboard experiment: its command, its folder, and `kill -9` at any time."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.genneg import checkerboard, checkerboard_problem, measures
from experiments.lab.phases import Lab, Run
from gendiff.checkpoint import Archive
from gendiff.methods import genneg

TINY = [
    "--preset", "smoke",
    "--network.width", "16",
    "--network.depth", "1",
    "--classifier-network.depth", "1",
    "--rounds", "2",
    "--baseline.steps", "200",
    "--classifier.steps", "40",
    "--student.steps", "40",
    "--samples", "400",
    "--draws.budget", "800",
    "--draws.per-class", "100",
    "--elbo-points", "50",
    "--elbo-levels", "4",
    "--stored", "256",
    "--smc.particles", "32",
    "--smc.steps", "6",
    "--sampler-steps", "8",
]  # fmt: skip
NAMES = ["data", "baseline", "round-1-unweighted", "round-1", "distilled-1", "round-2", "distilled-2", "rejection",
         "refit", "replay", "accepted", "smc"]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen:
    """The experiment in a process of its own, with two virtual devices."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-m", "experiments.genneg.checkerboard", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def rows(folder: Path) -> list[dict]:
    """The rows of a folder without what a clock says."""
    document = json.loads((folder / "results.json").read_text())
    for row in document["rows"]:
        row["metrics"].pop("seconds", None)
    return document["rows"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = finish(*TINY, "--output", str(folder))
    assert code == 0, err
    assert "smc" in out
    return folder


def test_every_row_figure_and_file_is_there(whole: Path) -> None:
    assert [row["name"] for row in rows(whole)] == NAMES
    for name in ("config.json", "metrics.jsonl", "table.md", "samples.png", "rounds.png", "calibration.png"):
        assert (whole / name).stat().st_size > 0, name
    wanted = {"infraction_rate", "elbo", "elbo_gain", "outer_density", "evaluations_per_accepted", "oracle_calls"}
    for row in rows(whole)[1:]:
        assert set(row["metrics"]) == wanted, row["name"]
    smc = next(row for row in rows(whole) if row["name"] == "smc")
    assert smc["metrics"]["infraction_rate"]["value"] == 0  # by construction


def test_kill_in_any_phase_then_the_same_command_gives_the_same_table(whole: Path, tmp_path: Path) -> None:
    # One folder, killed again and again: in training, in drawing, in evaluation, in SMC.
    for phase in ("baseline", "round-1 draws", "round-1/classifier", "evaluate distilled-1", "replay", "smc"):
        process = start(*TINY, "--output", str(tmp_path))
        log, killed = tmp_path / "metrics.jsonl", False
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and any(f'"phase": "{phase}"' in line for line in log.read_text().splitlines()):
                process.send_signal(signal.SIGKILL)
                killed = True
                break
            time.sleep(0.01)
        process.communicate()
        assert killed, f"the run ended before {phase}"
    code, _, err = finish(*TINY, "--output", str(tmp_path))
    assert code == 0, err
    assert rows(tmp_path) == rows(whole)


def test_a_second_run_reads_everything_and_says_the_same(whole: Path) -> None:
    before = rows(whole)
    code, _, err = finish(*TINY, "--output", str(whole))
    assert code == 0, err
    assert rows(whole) == before


def test_guidance_scaled_by_two_is_that_of_two_equal_classifiers() -> None:
    config = replace(checkerboard.PRESETS["smoke"], samples=200, elbo_points=50)
    key = jax.random.key(5)
    theta = checkerboard.initialised(checkerboard_problem.denoiser_network(config), key)
    net = checkerboard.initialised(checkerboard.classifier_network(config), jax.random.clone(key))
    classifier = {"net": jax.tree.map(lambda a: a + 0.1, net), "shift": np.float32(0.3)}
    none = genneg.Guided(theta)
    one = genneg.append(none, classifier)
    two = genneg.append(one, classifier)

    def evaluation(guided: genneg.Guided, scale: float) -> checkerboard.Evaluation:
        at = replace(config, guidance_scale=scale)
        run = Run(at, 0, None, Archive(None), lambda *_: None)
        subject = measures.Subject(Lab([run]), [run], "it", checkerboard.problem(at), lambda run: guided)
        return checkerboard.evaluations(subject)[0]

    once, twice, both = evaluation(one, 1.0), evaluation(one, 2.0), evaluation(two, 1.0)
    np.testing.assert_allclose(evaluation(one, 0.0).elbo, evaluation(none, 1.0).elbo, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(twice.elbo, both.elbo, rtol=1e-3, atol=1e-4)
    assert abs(twice.elbo - once.elbo).max() > 0.01
    # A chain that sums in another order send to the other side of an edge ends elsewhere; few meet one.
    moved = lambda other: np.mean(np.abs(twice.points - other.points) > 1e-3)
    assert moved(both) <= 0.02
    assert moved(once) >= 0.1


@pytest.mark.slow
def test_two_seeds_side_by_side_are_two_runs(whole: Path, tmp_path: Path) -> None:
    code, _, err = finish(*TINY, "--seeds", "2", "--output", str(tmp_path))
    assert code == 0, err
    assert [row["name"] for row in rows(tmp_path)] == NAMES

    def archived(folder: Path, phase: str) -> checkerboard.Evaluation:
        never = lambda: pytest.fail(f"{phase} is not kept")
        return Archive(folder / "checkpoints" / "seed-0").once(phase, never, checkerboard.Evaluation)

    for phase in ("evaluate/baseline", "evaluate/round-1", "evaluate/distilled-2", "evaluate/replay"):
        alone, beside = archived(whole, phase), archived(tmp_path, phase)
        np.testing.assert_allclose(beside.elbo, alone.elbo, rtol=1e-3, atol=1e-3, err_msg=phase)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "--preset must be one of smoke, default, paper, got huge"),
        (["--preset", "smoke", "--rounds", "0"], "--rounds must be 1 to 20, got 0"),
        (["--preset", "smoke", "--cells", "1"], "--cells must be 2 to 32, got 1"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, _, err = finish(*arguments, "--output", str(tmp_path / "none"))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "none").exists()


def test_torn_checkpoint_is_named_and_nothing_is_lost(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, folder], check=True)
    torn = folder / "checkpoints" / "seed-0" / "round-1" / "classifier" / "result"
    for path in torn.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[:-7])
    code, _, err = finish(*TINY, "--output", str(folder))
    assert code == 2
    assert str(torn) in err
    assert "Delete this folder" in err
    subprocess.run(["rm", "-r", torn], check=True)
    code, _, err = finish(*TINY, "--output", str(folder))
    assert code == 0, err
    assert rows(folder) == rows(whole)


def test_presets_are_what_they_are_called() -> None:
    assert set(checkerboard.PRESETS) == {"smoke", "default", "paper"}
    assert all(config.preset == name for name, config in checkerboard.PRESETS.items())
    assert (checkerboard.PRESETS["paper"].rounds, checkerboard.PRESETS["paper"].seeds) == (5, 5)


COUNTED = """
import dataclasses, sys
from pathlib import Path

import jax, tyro
from experiments.lab import start
from experiments.genneg import checkerboard, checkerboard_problem

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **more: compiled.append(more.get("fun_name")) if "backend_compile" in event else None
)
start.start()
first = tyro.cli(checkerboard.CheckerboardConfig, default=checkerboard.PRESETS["smoke"], args=sys.argv[2:])
for name, changes in {
    "first": {}, "values": {"seed": 3, "guidance_scale": 2.0}, "steps": {"sampler_steps": 7, "seed": 3}
}.items():
    before = len(compiled)
    checkerboard.run(dataclasses.replace(first, output=Path(sys.argv[1]) / name, **changes))
    print("compiled", name, len(compiled) - before, sorted(map(str, compiled[before:])) if name == "values" else "")
"""


def test_seed_output_and_scale_compile_nothing_and_steps_of_the_sampler_do(tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", COUNTED, str(tmp_path), *TINY, "--rounds", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = {
        words[1]: int(words[2]) for line in done.stdout.splitlines() if (words := line.split())[:1] == ["compiled"]
    }
    assert counts["values"] == 0, done.stdout
    assert 0 < counts["steps"] < counts["first"]
