"""The second speed table: the sides compute the same thing, work is counted right.  Speed is no test."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from experiments.censoring import mnist
from experiments.lab.config import ConfigError, parse
from experiments.lab.folder import Folder
from experiments.speed import censoring, ours_censoring, table
from experiments.speed.worker import Worker

SMALL = dataclasses.replace(censoring.PRESETS["smoke"], members=(2,))


@pytest.fixture(scope="module")
def ours():
    with Worker(censoring.OURS, censoring.sides(SMALL).setup, {"JAX_PLATFORMS": "cpu"}) as worker:
        yield worker


def compared(ours, answers):
    sides = censoring.sides(SMALL)
    with Worker(censoring.RIVAL, sides.setup | answers | sides.extra, {}) as rival:
        return table.compare(ours.answers["answers"], rival.answers, sides.tolerance)


@pytest.mark.torch
def test_rival_gives_the_same_answers(ours):
    errors = compared(ours, ours.answers)
    asked = {"epsilon", "log_reward", "guidance", "samples"}
    asked |= {"loss", "gradient_norm", "reward_loss", "reward_gradient_norm"}
    assert set(errors) == {f"small/{name}" for name in asked}
    # The comparison means something: no answer is a constant, and the samples are finite.
    answers = ours.answers["answers"]
    assert all(np.abs(answer).max() > 1e-4 for answer in answers.values())
    assert np.isfinite(answers["small/samples"]).all()
    assert answers["small/samples"].std() > 1e-2
    assert answers["small/epsilon"].std() > 1e-2


@pytest.mark.torch
def test_comparison_notices_one_wrong_parameter(ours):
    wrong = jax.tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, ours.answers)
    wrong["nets"]["small"]["rewards"][1]["middle_block.1.qkv.weight"][3] += 0.5
    with pytest.raises(ValueError, match=r"small/(guidance|log_reward)"):
        compared(ours, wrong)


@pytest.mark.torch
def test_work_is_what_pytorch_counts():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.speed import rival_censoring

    config = mnist.PRESETS["smoke"]
    x, t = torch.randn(1, 1, config.size, config.size), torch.zeros(1)
    unet = rival_censoring.UNet(config.size, ours_censoring.fields(mnist.unet_of(config)))
    half = rival_censoring.HalfUNet(config.size, ours_censoring.fields(mnist.reward_of(config)))

    def count(function):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function()
        return counter.get_total_flops()

    counts = [count(lambda: torch.no_grad()(unet)(x, t))]
    half.requires_grad_(False)
    counts.append(count(lambda: half(x.clone().requires_grad_(), t).sum().backward()))
    half.requires_grad_(True)
    counts += [count(lambda net=net: net(x, t).sum().backward()) for net in (unet, half)]
    np.testing.assert_allclose(censoring.evaluations("smoke"), counts, rtol=0.03)


def test_rows():
    config = dataclasses.replace(SMALL, members=(0, 1, 5), ensemble=5, large="smoke")
    rows = censoring.rows_of(config)
    steps = ["step-small-k0", "step-small-k1", "step-small-k5", "step-paper-k5"]
    assert list(rows) == [*steps, "train-small", "reward-small-k5", "matmul"]
    unet, reward, unet_gradient, reward_gradient = censoring.evaluations("smoke")
    assert rows["step-small-k5"].flops == config.samples * (unet + 5 * reward)
    assert rows["train-small"].flops == config.batch * unet_gradient
    assert rows["reward-small-k5"].flops == 5 * config.reward_batch * reward_gradient
    assert rows["step-paper-k5"][1:3] == (config.large_samples, config.large_steps)
    assert rows["train-small"].rivals == ("eager", "channels_last")
    assert "compiled" in censoring.rows_of(dataclasses.replace(SMALL, rivals="all"))["train-small"].rivals
    assert not any(work.rivals for work in censoring.rows_of(dataclasses.replace(SMALL, rivals="none")).values())


def test_defaults_are_the_networks_of_the_experiment():
    given = censoring.networks(censoring.SpeedConfig())
    assert {name: each["preset"] for name, each in given.items()} == {"small": "default", "paper": "paper"}
    paper = mnist.unet_of(ours_censoring.settings_of(given["paper"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours_censoring.shapes(paper, 32))) == 52_538_369


def test_table_from_times(tmp_path):
    config = dataclasses.replace(SMALL, members=(0, 1, 5), output=tmp_path)
    rows, seconds = censoring.rows_of(config), {}
    for name, work in rows.items():
        times = {"step-small-k1": 2.0, "step-small-k5": 6.0}.get(name, 1.0)
        seconds[f"{name}/gendiff"] = np.array([times, times])
        seconds |= {f"{name}/{variant}": np.array([3.0, 5.0]) * times for variant in work.rivals}
    measured = table.Measured(seconds, dict.fromkeys(seconds, 10.0), dict.fromkeys(rows, 7.0), {"small/loss": 1e-6}, [])
    more = censoring.one_member(rows, measured)
    results = table.finish(Folder("speed.censoring", config), rows, measured, censoring.COLUMNS, censoring.NOTES, more)
    stored = {row["name"]: row["metrics"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert stored["step-small-k5"]["one_member_ratio"]["value"] == 3.0
    assert stored["step-small-k0"]["one_member_ratio"]["value"] == 0.5
    assert "one_member_ratio" not in stored["step-small-k1"]
    assert stored["step-small-k5"]["eager_ratio"]["value"] == 4.0
    assert stored["step-small-k5"]["channels_last_ratio"]["high"] == 5.0
    assert stored["step-small-k5"]["seconds"]["value"] == 6.0 / config.steps
    assert stored["step-small-k5"]["samples_per_second"]["value"] == config.samples * config.steps / 6.0
    assert "small/loss 1e-06" in results.table
    assert censoring.one_member({"step-small-k5": rows["step-small-k5"]}, measured) == {}


def test_command_line():
    config = parse(
        censoring.SpeedConfig, censoring.PRESETS, ["--preset", "smoke", "--members", "0", "3", "--large", "paper"]
    )
    assert (config.members, config.large, config.rivals) == ((0, 3), "paper", "eager")
    for members in ((), (-1,), (65,)):
        with pytest.raises(ConfigError, match="--members must"):
            dataclasses.replace(config, members=members)
    with pytest.raises(ConfigError, match="--ensemble"):
        dataclasses.replace(config, ensemble=0)


@pytest.mark.slow
def test_smoke_run(tmp_path):
    results = censoring.run(dataclasses.replace(SMALL, output=tmp_path))
    assert [row.name for row in results.rows] == ["step-small-k2", "train-small", "reward-small-k2", "matmul"]
    for row in results.rows:
        assert 0 < row.metrics["seconds"].low <= row.metrics["seconds"].value
        assert ("eager_ratio" in row.metrics) == (importlib.util.find_spec("torch") is not None)
