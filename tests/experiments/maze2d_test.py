"""The relative-reward experiment: its parts, and its command line at the smallest size that has every row."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab.config import ConfigError, parse
from experiments.lab.phases import Run
from experiments.relative_reward import maze2d, rows, trajectories

ROOT = Path(__file__).parents[2]
SMOKE = maze2d.PRESETS["smoke"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One run of the smoke preset, stopped by kill -9 in the middle and started again."""
    place = tmp_path_factory.mktemp("maze2d") / "run"
    command = [sys.executable, "-m", "experiments.relative_reward.maze2d", "--preset", "smoke", "--output", str(place)]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (place / "checkpoints" / "seed-0" / "umaze" / "diffusers" / "result").exists():
        try:
            first.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    first.kill()
    first.wait()
    assert not (place / "results.json").exists()
    subprocess.run(command, cwd=ROOT, env=os.environ, check=True, timeout=900)
    return place


@pytest.mark.slow
def test_every_row_and_file(folder):
    document = json.loads((folder / "results.json").read_text())
    assert document["experiment"] == "relative_reward.maze2d"
    rows = {row["name"]: row["metrics"] for row in document["rows"]}
    assert list(rows) == maze2d.row_names(SMOKE)
    for name in ("published", "principled", "published-best-per-goal", "discriminator", "small-data"):
        for metric in ("goal_recovery", "discriminability", "discriminability_in_sample"):
            estimate = rows[name][metric]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            assert 0 <= estimate["value"] <= 1
        assert ("gradient_r2" in rows[name]) == (name != "discriminator")
    for name in ("unsteered", "steered", "expert"):
        assert 0 <= rows[name]["goal_rate"]["value"] <= 1
        assert rows[name]["goal_rate"]["n"] == 8 * SMOKE.plans
    for figure in (
        "heat-umaze-published",
        "heat-umaze-principled",
        "histograms-umaze",
        "plans-umaze",
        "denoising-umaze",
    ):
        assert (folder / f"{figure}.png").stat().st_size > 10_000


def test_parameter_counts_of_the_paper():
    count = lambda network, horizon: sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((horizon, 6)), jnp.zeros(()))
        )
    )
    paper = maze2d.PRESETS["paper"]
    assert count(trajectories.unet_of(paper), 256) == 3_682_118
    assert count(maze2d.families("umaze")[0].rewards(paper).network, 256) == 26_019


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "5"], "--window and --grid must divide --horizon 32, got 5"),
        (["--horizon", "34"], "must divide --horizon 34, got 4"),
    ],
)
def test_windows_must_divide_the_horizon(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(maze2d.MazeConfig, maze2d.PRESETS, ["--preset", "smoke", *arguments])


def test_options_out_of_range():
    with pytest.raises(ConfigError, match="--held-out"):
        dataclasses.replace(SMOKE, held_out=0.9)


def test_the_paper_is_beside_the_same_mazes():
    config = dataclasses.replace(SMOKE, mazes=("open", "umaze"))
    values = {"goal_recovery": [np.True_, np.False_]}

    def table(config):
        run = Run(config, 0, None, None, None)
        run.results = {f"{maze}/{row}": values for maze in config.mazes for row in (*maze2d.LEARNT, *maze2d.DRAWN)}
        maze2d.add_rows(run)
        assert [row.name for row in run.rows] == maze2d.row_names(config)
        return {row.name: row for row in run.rows}

    rows = table(config)
    assert rows["published-best-per-goal"].paper == {"goal_recovery": 0.7875}
    assert rows["published-best-per-goal/open"].paper == {}
    assert rows["published"].metrics["goal_recovery"].n == 4
    assert table(SMOKE)["published-best-per-goal"].paper == {}


def test_intervals_are_over_goals_not_seeds():
    values = [0.9, 0.9, 0.9, 0.5, 0.5, 0.5]  # two goals of three seeds that agree
    found = rows.measured([{"discriminability": values, "pairs": []}], 3, maze2d.COLUMNS)
    assert list(found) == ["discriminability"]
    assert found["discriminability"].n == 2
    np.testing.assert_allclose(found["discriminability"].value, 0.7)
