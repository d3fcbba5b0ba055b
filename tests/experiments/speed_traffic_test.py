"""The fourth speed table: the sides compute the same thing, work is counted right.  Speed is no test."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from experiments.genneg import traffic as experiment
from experiments.genneg import traffic_problem
from experiments.lab.config import ConfigError, parse
from experiments.speed import ours_traffic, table, traffic
from experiments.speed.worker import Worker
from gendiff.nets.scene_transformer import Place

SMALL = traffic.PRESETS["smoke"]
VERDICTS = {"pairs", "collides", "off_road", "degenerate"}


@pytest.fixture(scope="module")
def ours():
    with Worker(traffic.OURS, traffic.sides(SMALL).setup, {"JAX_PLATFORMS": "cpu"}) as worker:
        yield worker


def replies(answers):
    sides = traffic.sides(SMALL)
    with Worker(traffic.RIVAL, sides.setup | answers | sides.extra, {}) as rival:
        return rival.answers


@pytest.mark.torch
def test_rival_gives_the_same_answers(ours):
    answers, given = ours.answers["answers"], replies(ours.answers)
    errors = table.compare(answers, given, traffic.TOLERANCE)
    asked = {"velocity", "log_good", "guidance", "guided", "samples"}
    assert set(errors) == asked | {"loss", "gradient"} | VERDICTS
    assert all(errors[name] == 0 for name in VERDICTS)
    # The comparison means something: no answer is a constant, samples are finite, scenes are good and bad.
    assert all(answers[name].std() > 1e-2 for name in asked)
    assert np.isfinite(answers["samples"]).all()
    assert all(0.1 < answers[name].mean() < 0.9 for name in VERDICTS - {"pairs"})
    # No parameter's gradient is lost in that of the others.
    sizes = np.cumsum([leaf.size for leaf in ours.answers["denoiser"].values()])
    for name, mine, other in zip(
        ours.answers["denoiser"], *(np.split(each["gradient"], sizes[:-1]) for each in (answers, given)), strict=True
    ):
        assert np.abs(mine).max() > 1e-6, name
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-3 * np.abs(mine).max(), err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize("part", ["denoiser", "classifier"])
def test_comparison_notices_one_wrong_parameter(ours, part):
    wrong = jax.tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, ours.answers)
    wrong[part]["scene.relation.bias"][3] += 0.5
    with pytest.raises(ValueError, match=r"speed: (gradient|guidance|guided)"):
        table.compare(wrong["answers"], replies(wrong), traffic.TOLERANCE)


@pytest.mark.torch
def test_work_is_what_pytorch_counts():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.speed import rival_traffic as rival

    config, n = experiment.PRESETS["smoke"], 4
    units = rival.Units(torch.zeros(7), torch.ones(7), 50.0)
    nets = traffic_problem.denoiser_network(config), ours_traffic.classifier_of(config)
    denoiser, classifier = (rival.SceneNetwork(units, **ours_traffic.fields(net)) for net in nets)
    x, places = torch.randn(n, 12, 7), rival.Places(torch.randn(n, 64, 64), torch.ones(n, 12, dtype=torch.bool))
    memories = [net.map(places.distance) for net in (denoiser, classifier.requires_grad_(False))]
    chain = rival.Chain(np.full(11, 0.8, np.float32), np.full(11, 0.6, np.float32))

    def count(function):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function()
        return counter.get_total_flops()

    trained = count(lambda: chain.loss(denoiser, x, x, torch.arange(n), places).backward())
    t, (memory, other) = torch.tensor([3]), memories
    guided = count(lambda: torch.no_grad()(chain.denoised)(denoiser, x, t, places, memory))
    guided += count(lambda: chain.log_good(classifier, x.requires_grad_(), t, places, other).sum().backward())
    np.testing.assert_allclose(traffic.evaluations("smoke", 64, n, n), (trained, guided), rtol=0.03)


def test_rows():
    rows = traffic.rows_of(SMALL)
    assert list(rows) == ["oracle", "train-step", "sample-step", "matmul"]
    trained, guided = traffic.evaluations("smoke", SMALL.cells, SMALL.batch, SMALL.samples)
    assert rows["oracle"][:3] == (0, 12 * SMALL.oracle_scenes, SMALL.oracle_steps)
    assert rows["train-step"][:3] == (trained, SMALL.batch, SMALL.train_steps)
    assert rows["sample-step"][:3] == (guided, SMALL.samples, SMALL.sample_steps)
    assert "compiled" in traffic.rows_of(dataclasses.replace(SMALL, rivals="all"))["train-step"].rivals
    assert not any(work.rivals for work in traffic.rows_of(dataclasses.replace(SMALL, rivals="none")).values())
    assert traffic.NOTES.format(**dataclasses.asdict(SMALL), peak=1.0)


def test_chunks_and_devices_change_no_verdict():
    vehicles, places = ours_traffic.scenes(ours_traffic.CHUNK + 3, 16, 0)
    every = ours_traffic.check(None, vehicles, places)
    few = ours_traffic.check(None, vehicles[-5:], Place(*(each[-5:] for each in places)))
    for all_of_them, these in zip(every, few, strict=True):
        np.testing.assert_array_equal(all_of_them[-5:], these)


def test_command_line():
    config = parse(
        traffic.SpeedConfig, traffic.PRESETS, ["--preset", "smoke", "--networks", "default", "--cells", "32"]
    )
    assert (config.networks, config.cells, config.rivals) == ("default", 32, "eager")
    with pytest.raises(ConfigError, match="--cells must be"):
        dataclasses.replace(config, cells=40)
    with pytest.raises(ConfigError, match="--oracle-scenes"):
        dataclasses.replace(config, oracle_scenes=0)


@pytest.mark.slow
def test_smoke_run(tmp_path):
    results = traffic.run(dataclasses.replace(SMALL, output=tmp_path))
    for row in results.rows:
        assert 0 < row.metrics["seconds"].low <= row.metrics["seconds"].value
        assert ("eager_ratio" in row.metrics) == (importlib.util.find_spec("torch") is not None)
