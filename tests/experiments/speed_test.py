"""The speed table: the sides compute the same thing, work is counted right, the command runs.  Speed is no test."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab.config import ConfigError, parse
from experiments.speed import genneg, table
from experiments.speed.worker import Worker

SMALL = dataclasses.replace(genneg.PRESETS["smoke"], repetitions=2)


@pytest.fixture(scope="module")
def ours():
    with Worker(genneg.OURS, genneg.setup(SMALL), {"JAX_PLATFORMS": "cpu"}) as worker:
        yield worker


@pytest.mark.torch
def test_rival_gives_the_same_answers(ours):
    setup = genneg.setup(SMALL) | ours.answers | {"chunk": SMALL.chunk}
    with Worker(genneg.RIVAL, setup, {}) as rival:
        errors = table.compare(ours.answers["answers"], rival.answers, genneg.TOLERANCE)
    assert set(errors) == {"denoised", "guided", "guidance", "samples", "loss", "gradient_norm"}
    answers = ours.answers["answers"]
    # The comparison means something: guidance moves points, and the samples are finite and spread.
    assert np.abs(answers["guided"] - answers["denoised"]).max() > 1e-2
    assert np.isfinite(answers["samples"]).all()
    assert answers["samples"].std() > 1e-2


@pytest.mark.torch
def test_comparison_notices_one_wrong_parameter(ours):
    wrong = jax.tree.map(np.array, ours.answers)
    wrong["classifiers"][0]["net"]["params"]["trunk"]["block0_time"]["kernel"][3] += 0.1
    setup = genneg.setup(SMALL) | wrong | {"chunk": SMALL.chunk}
    with Worker(genneg.RIVAL, setup, {}) as rival, pytest.raises(ValueError, match=r"guidance|guided"):
        table.compare(ours.answers["answers"], rival.answers, genneg.TOLERANCE)


@pytest.mark.parametrize("wrong", [np.nan, 1.01])
def test_compare_refuses(wrong):
    answers = {"loss": np.float32(1.0), "denoised": np.ones((3, 2), np.float32)}
    assert table.compare(answers, answers, {}) == {"loss": 0.0, "denoised": 0.0}
    with pytest.raises(ValueError, match="denoised"):
        table.compare(answers, answers | {"denoised": np.full((3, 2), wrong)}, {})


@pytest.mark.parametrize("row", ["sample-k0", "sample-k2", "train-step"])
def test_work_is_what_the_compiler_counts(row):
    # XLA's count holds elementwise work too, so it is larger, and at width 256 by a little only.
    config = dataclasses.replace(SMALL, network=genneg.Network(256, 2), classifier_network=genneg.Network(256, 2))
    fields = genneg.CheckerboardConfig(**genneg.network_fields(config))
    denoiser, classifier = (
        genneg.denoiser_network(fields),
        genneg.classifier_network(fields),
    )
    start = lambda net: net.init(jax.random.key(0), jnp.zeros(2), jnp.zeros(()))
    points, noise = jnp.ones((64, 2)), jnp.float32(0.1)

    def evaluation(theta, phi):
        answers = [jax.vmap(denoiser.apply, (None, 0, None))(theta, points, noise)]
        if row == "sample-k2":
            # Guidance needs the value too, for (1 - C) grad logit.
            log_c = lambda x: jax.nn.log_sigmoid(classifier.apply(phi, x, noise))
            answers.append(jax.vmap(jax.grad(log_c))(points))
        return answers

    def loss_gradient(theta, phi):
        noises = jnp.linspace(-1, 1, 64)
        loss = lambda theta: jnp.sum(jax.vmap(denoiser.apply, (None, 0, 0))(theta, points, noises) ** 2)
        return jax.grad(loss)(theta)

    function = loss_gradient if row == "train-step" else evaluation
    counted = jax.jit(function).lower(start(denoiser), start(classifier)).compile().cost_analysis()["flops"]
    if row == "train-step":
        expected = 64 * genneg.work(config, row) / config.points
    else:
        per_point = config.samples * (2 * config.sampler_steps - 1)
        # One classifier was evaluated, K = 2 were counted.
        plain = genneg.work(config, "sample-k0")
        expected = 64 * (plain + (genneg.work(config, row) - plain) / 2) / per_point
    assert expected < counted < 1.1 * expected


def test_smoke_run(tmp_path):
    config = dataclasses.replace(SMALL, classifiers=(1,), output=tmp_path / "table")
    results = genneg.run(config)
    stored = json.loads((results.folder / "results.json").read_text())["rows"]
    table = (results.folder / "table.md").read_text()
    assert [row["name"] for row in stored] == ["sample-k1", "train-step", "matmul", "skinny"]
    for row in stored:
        metrics = row["metrics"]
        assert row["name"] in table
        assert metrics["seconds"]["n"] == 2
        assert 0 < metrics["seconds"]["low"] <= metrics["seconds"]["value"] <= metrics["seconds"]["high"]
        assert metrics["compile_seconds"]["value"] >= 0
        assert ("eager_ratio" in metrics) == (importlib.util.find_spec("torch") is not None)


class Stub:
    """A worker whose calls take as long as the test says; `torch.compile` fails in it."""

    SECONDS = {"gendiff": 0.5, "eager": 1.0, "chunked": 0.75}  # noqa: RUF012

    def __init__(self, module, setup, environment):
        self.answers = {"answers": {}}
        self.process = type("Process", (), {"poll": lambda self: None})()
        self.calls = {}

    def seconds(self, program):
        variant = program.split("/")[1]
        if variant == "compiled":
            raise ChildProcessError("experiments.speed.rival: InvalidCxxCompiler: No working C++ compiler found")
        self.calls[program] = self.calls.get(program, 0) + 1
        return self.SECONDS[variant] + (2.0 if self.calls[program] == 1 else 0.0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def stubbed(monkeypatch, tmp_path, torch, **changes):
    monkeypatch.setattr(table, "Worker", Stub)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if torch else None)
    return genneg.run(dataclasses.replace(SMALL, output=tmp_path, **changes))


def test_table_from_times(monkeypatch, tmp_path):
    results = stubbed(monkeypatch, tmp_path, torch=True, rivals="all")
    rows = {row.name: row.metrics for row in results.rows}
    assert list(rows) == ["sample-k0", "sample-k1", "train-step", "matmul", "skinny"]
    sampling, training, matmul = rows["sample-k1"], rows["train-step"], rows["matmul"]
    assert sampling["seconds"] == (0.5, 0.5, 0.5, 2)
    assert sampling["samples_per_second"].value == SMALL.samples / 0.5
    assert sampling["eager_ratio"].value == 2.0
    assert sampling["chunked_ratio"].value == 1.5
    assert sampling["compile_seconds"].value == 2.0
    assert sampling["warm_compile_seconds"].value == 2.0
    assert training["seconds"].value == 0.5 / SMALL.train_steps
    assert training["samples_per_second"].value == SMALL.points / training["seconds"].value
    assert "chunked_ratio" not in training
    # The quicker of both large products is the peak.
    peak = 2 * SMALL.matmul**3 / 0.5
    assert matmul["peak_share"].value == 1.0
    work = genneg.work(SMALL, "sample-k1")
    np.testing.assert_allclose(sampling["peak_share"].value, work / 0.5 / peak)
    np.testing.assert_allclose(sampling["roofline_seconds"].value, work / peak)
    assert results.table.count("No working C++ compiler found") == 1
    assert "compiled_ratio" not in sampling


def test_without_torch_the_table_says_so(monkeypatch, tmp_path):
    results = stubbed(monkeypatch, tmp_path, torch=False)
    assert results.table.count("pip install -e .[speed]") == 1
    assert "eager_ratio" not in results.rows[0].metrics
    assert results.rows[0].metrics["samples_per_second"].value > 0


def test_failing_worker_says_why(ours):
    with pytest.raises(ChildProcessError, match="KeyError: 'no such program'"):
        ours.seconds("no such program")
    assert ours.seconds("matmul/gendiff") > 0, "it goes on"
    with pytest.raises(ChildProcessError, match="no_such_side"):
        Worker("no_such_side", {}, {})


def test_command_line():
    config = parse(
        genneg.SpeedConfig, genneg.PRESETS, ["--preset", "smoke", "--classifiers", "0", "3", "--rivals=none"]
    )
    assert config.classifiers == (0, 3)
    assert config.rivals == "none"
    with pytest.raises(ConfigError, match="--classifiers must be 0 to 64, got -1"):
        dataclasses.replace(config, classifiers=(-1,))
