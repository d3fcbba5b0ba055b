"""The third speed table: the sides compute the same thing, work and memory are counted right.  Speed is no test."""

import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

from experiments.lab.config import ConfigError, parse
from experiments.lab.folder import Folder
from experiments.relative_reward import maze2d, trajectories
from experiments.speed import memory, ours_relative_reward, relative_reward, table
from experiments.speed.worker import Worker

SMALL = relative_reward.PRESETS["smoke"]


@pytest.fixture(scope="module")
def ours():
    with Worker(relative_reward.OURS, relative_reward.sides(SMALL).setup, {"JAX_PLATFORMS": "cpu"}) as worker:
        yield worker


def compared(ours, answers):
    sides = relative_reward.sides(SMALL)
    with Worker(relative_reward.RIVAL, sides.setup | answers | sides.extra, {}) as rival:
        return table.compare(ours.answers["answers"], rival.answers, sides.tolerance)


@pytest.mark.torch
def test_rival_gives_the_same_answers(ours):
    errors = compared(ours, ours.answers)
    asked = {"denoised", "mean", "target", "reward", "slope", "samples"}
    assert set(errors) == asked | {"loss", "gradient_norm", "train_loss", "train_gradient_norm"}
    # The comparison means something: no answer is a constant, and the samples are finite.
    answers = ours.answers["answers"]
    assert all(np.abs(answer).max() > 1e-4 for answer in answers.values())
    assert all(answers[name].std() > 1e-2 * np.abs(answers[name]).max() for name in asked)
    assert np.isfinite(answers["samples"]).all()


@pytest.mark.torch
def test_comparison_notices_one_wrong_parameter(ours):
    wrong = jax.tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, ours.answers)
    wrong["expert"]["ups.0.0.time_mlp.1.bias"][3] += 0.5
    with pytest.raises(ValueError, match=r"speed: (target|gradient_norm|loss)"):
        compared(ours, wrong)


@pytest.mark.torch
def test_work_of_the_diffusion_model_is_what_pytorch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.speed import rival_relative_reward

    config = maze2d.PRESETS["smoke"]
    unet = rival_relative_reward.TemporalUnet(config.width, config.multipliers, 6)
    x, t = torch.randn(1, config.horizon, 6), torch.zeros(1)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    counts = [count(lambda: torch.no_grad()(unet)(x, t)), count(lambda: unet(x, t).sum().backward())]
    np.testing.assert_allclose(relative_reward.evaluations("smoke")[:2], counts, rtol=0.03)


def test_work_of_the_published_networks():
    # Specified: 514.1 and 1541.7 MFLOP. The alignment of a piecewise linear MLP is four products with every kernel:
    # the masks, the gradient in x, that gradient moved along its error, and what both give for the kernel.
    unet, trained, aligned = relative_reward.evaluations("paper")
    np.testing.assert_allclose([unet, trained], [514.1e6, 1541.7e6], rtol=1e-4)
    np.testing.assert_allclose(aligned, 4 * 64 * 2 * (24 * 128 + 128 * 64 + 64 * 32 + 32), rtol=0.02)


def test_rows():
    rows = relative_reward.rows_of(SMALL)
    assert list(rows) == ["reward-step", "reward-step-cached", "diffuser-train", "diffuser-denoise", "matmul"]
    unet, trained, aligned = relative_reward.evaluations("smoke")
    assert rows["reward-step"].flops == SMALL.batch * (2 * unet + aligned)
    assert rows["reward-step-cached"][:3] == (SMALL.batch * aligned, SMALL.batch, SMALL.goals * SMALL.cached_steps)
    assert rows["diffuser-train"].flops == SMALL.train_batch * trained
    assert rows["diffuser-denoise"][:3] == (SMALL.samples * unet, SMALL.samples, SMALL.sample_steps)
    every = relative_reward.rows_of(dataclasses.replace(SMALL, rivals="all"))
    assert "compiled" in every["reward-step"].rivals
    assert every["reward-step-cached"].rivals == ("eager",)
    none = relative_reward.rows_of(dataclasses.replace(SMALL, rivals="none"))
    assert not any(work.rivals for work in none.values())


def test_defaults_are_the_paper():
    config = maze2d.PRESETS[relative_reward.SpeedConfig().networks]
    sizes = lambda net: sum(leaf.size for leaf in jax.tree.leaves(ours_relative_reward.shapes(net, config)))
    assert sizes(trajectories.unet_of(config)) == 3_682_118
    assert sizes(ours_relative_reward.reward_of(config)) == 26_019


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux counts it")
def test_peak_is_what_a_call_needs():
    size = 2**26
    needed = memory.peak(lambda: np.ones(size // 8).sum() + np.ones(size // 16).sum())
    assert needed is None or abs(needed / size - 1) < 0.1


def test_table_from_times(tmp_path):
    config = dataclasses.replace(SMALL, output=tmp_path)
    rows, seconds = relative_reward.rows_of(config), {}
    for name, work in rows.items():
        seconds[f"{name}/gendiff"] = np.array([2.0, 2.0])
        seconds |= {f"{name}/{variant}": np.array([3.0, 5.0]) for variant in work.rivals}
    measured = table.Measured(seconds, dict.fromkeys(seconds, 10.0), dict.fromkeys(rows, 7.0), {"loss": 1e-6}, [])
    more = {"reward-step-cached": {"peak_megabytes": table.rates.exact(50.0)}}
    folder = Folder("speed.relative_reward", config)
    results = table.finish(folder, rows, measured, relative_reward.COLUMNS, relative_reward.NOTES, more)
    stored = {row["name"]: row["metrics"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert stored["reward-step-cached"]["seconds"]["value"] == 2.0 / (config.goals * config.cached_steps)
    assert stored["reward-step-cached"]["peak_megabytes"]["value"] == 50.0
    assert stored["diffuser-denoise"]["samples_per_second"]["value"] == config.samples * config.sample_steps / 2.0
    assert stored["reward-step"]["eager_ratio"]["value"] == 2.0
    assert "loss 1e-06" in results.table


def test_command_line():
    arguments = ["--preset", "smoke", "--networks", "default", "--goals", "3"]
    config = parse(relative_reward.SpeedConfig, relative_reward.PRESETS, arguments)
    assert (config.networks, config.goals, config.rivals) == ("default", 3, "eager")
    with pytest.raises(ConfigError, match="--pool"):
        dataclasses.replace(config, pool=0)


@pytest.mark.slow
def test_smoke_run(tmp_path):
    results = relative_reward.run(dataclasses.replace(SMALL, output=tmp_path))
    for row in results.rows:
        assert 0 < row.metrics["seconds"].low <= row.metrics["seconds"].value
        assert ("eager_ratio" in row.metrics) == (importlib.util.find_spec("torch") is not None)
