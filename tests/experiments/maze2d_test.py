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
from experiments.relative_reward import maze2d
from gendiff.data.episodes import Episodes, Windows
from gendiff.methods.relative_reward import PUBLISHED

ROOT = Path(__file__).parents[2]
SMOKE = maze2d.PRESETS["smoke"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One run of the smoke preset, stopped by kill -9 in the middle and started again."""
    place = tmp_path_factory.mktemp("maze2d") / "run"
    command = [sys.executable, "-m", "experiments.relative_reward.maze2d", "--preset", "smoke", "--output", str(place)]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (place / "checkpoints" / "umaze" / "diffusers" / "result").exists():
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
    assert tuple(rows) == maze2d.NAMES
    for name in ("published", "principled", "published-best-per-goal", "discriminator", "small-data"):
        for metric in ("goal_recovery", "discriminability", "discriminability_in_sample"):
            each = rows[name][metric]
            assert each["low"] <= each["value"] <= each["high"]
            assert 0 <= each["value"] <= 1
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
    assert count(maze2d.unet_of(paper), 256) == 3_682_118
    assert count(maze2d.reward_of(paper, PUBLISHED, paper.window), 256) == 26_019


def test_last_episodes_are_held_out():
    lengths = np.array([3, 2, 4, 1])
    rows = np.arange(10.0)[:, None]
    train, rest = maze2d.cut(Episodes(rows.repeat(4, 1), rows.repeat(2, 1), lengths), 0.3)
    np.testing.assert_array_equal(train.lengths, [3, 2, 4])
    np.testing.assert_array_equal(rest.lengths, [1])
    np.testing.assert_array_equal(train.observations[:, 0], np.arange(9))
    np.testing.assert_array_equal(rest.actions[:, 0], [9])
    with pytest.raises(ValueError, match="expected more than one complete episode, given 1"):
        maze2d.cut(Episodes(rows.repeat(4, 1), rows.repeat(2, 1), np.array([10])), 0.3)


def test_sets_of_windows_are_padded_not_mixed():
    make = lambda n, value: Windows(
        np.full((n, 6), value, np.float32),
        np.arange(n - 1, dtype=np.int32),
        np.full(n - 1, n - 1, np.int32),
        np.zeros(2),
    )
    stacked = maze2d.alike([make(5, 1.0), make(9, 2.0)])
    assert stacked.rows.shape == (2, 9, 6)
    first = jax.tree.map(lambda a: jnp.asarray(a[0]), stacked)
    batch = maze2d.minibatch(jax.random.key(0), first, jnp.int32(4), 200, 3)
    assert set(np.unique(batch)) <= {0.0, 1.0}  # its own rows, and still actions; nothing of the padding's rows
    np.testing.assert_array_equal(batch[:, :, 2:], 1.0)


def test_bounds_cover_every_time_once():
    for steps in (20, 100):
        bounds = maze2d.bounds(maze2d.chain(steps))
        assert bounds[0] == 1
        assert bounds[-1] == steps + 1
        assert np.all(np.diff(bounds) > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "5"], "--window, --grid: expected divisors of the horizon 32, given 5"),
        (["--horizon", "34"], "expected divisors of the horizon 34, given 4"),
    ],
)
def test_windows_must_divide_the_horizon(arguments, message, tmp_path):
    config = parse(
        maze2d.MazeConfig, maze2d.PRESETS, ["--preset", "smoke", "--output", str(tmp_path / "x"), *arguments]
    )
    with pytest.raises(ConfigError, match=message):
        maze2d.run(config)
    assert not (tmp_path / "x").exists()


def test_options_out_of_range():
    with pytest.raises(ConfigError, match="--held-out"):
        dataclasses.replace(SMOKE, held_out=0.9)


def test_the_paper_is_beside_the_same_mazes():
    class One:
        name, config, rows = "open", SMOKE, {n: {"goal_recovery": [True, False]} for n in maze2d.NAMES}

    class Other(One):
        name = "umaze"

    rows = {row.name: row for row in maze2d.table([One, Other])}
    assert rows["published-best-per-goal"].paper == {"goal_recovery": 0.7875}
    assert rows["published-best-per-goal/open"].paper == {}
    assert rows["published"].metrics["goal_recovery"].n == 4
    alone = {row.name: row for row in maze2d.table([One])}
    assert alone["published-best-per-goal"].paper == {}


def test_intervals_are_over_goals_not_seeds():
    values = [0.9, 0.9, 0.9, 0.5, 0.5, 0.5]  # two goals of three seeds that agree
    each = maze2d.measured([{"discriminability": values}], 3)["discriminability"]
    assert each.n == 2
    np.testing.assert_allclose(each.value, 0.7)


def test_means_and_deviations_by_time():
    values = np.array([[1.0, 3.0, 10.0], [2.0, 2.0, -1.0]])
    mean, spread = maze2d.by_time(values, np.array([1, 1, 3]), 3)
    np.testing.assert_array_equal(mean, [[0, 2, 0, 0], [0, 2, 0, 0]])
    np.testing.assert_allclose(spread, [[1, 1, 1, 1], [1, 1e-12, 1, 1]])
