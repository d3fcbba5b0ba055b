"""The censoring experiment from its command line, at the smallest size that has every row."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.censoring import mnist, rows, trials
from experiments.censoring.config import Active, Guidance, UNetSize
from experiments.lab import phases
from experiments.lab.config import ConfigError, parse
from experiments.lab.phases import Lab
from gendiff.convert import resnet as convert
from gendiff.data import drawn_sevens
from gendiff.feedback.consensus import Classes

ROOT = Path(__file__).parents[2]
NAMES = [
    "uncensored", "single", "union", "ensemble", "ensemble-recurrence", "ensemble-backward",
    "ensemble-recurrence-backward", "universal", "rejection", "omega-1", "random-3", "random-4", "active-3", "active-4",
    "uncensored-malign-dominant", "non-imitation", "imitation-1", "imitation-2", "imitation-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One run of the smoke preset, stopped by kill -9 in the middle and started again."""
    place = tmp_path_factory.mktemp("mnist") / "run"
    command = [sys.executable, "-m", "experiments.censoring.mnist", "--preset", "smoke", "--output", str(place)]
    environment = os.environ | {"GENDIFF_TRACEBACK": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (place / "checkpoints" / "seed-0" / "single").exists():
        try:
            first.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    first.kill()
    first.wait()
    assert (place / "checkpoints" / "seed-0" / "base" / "result").exists()
    assert not (place / "results.json").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    return place


@pytest.mark.slow
def test_every_row_and_file(folder):
    document = json.loads((folder / "results.json").read_text())
    assert document["experiment"] == "censoring.mnist"
    assert mnist.EXPERIMENT.rows(mnist.PRESETS["smoke"]) == NAMES
    assert [row["name"] for row in document["rows"] if row["name"] != "rejection"] == [
        n for n in NAMES if n != "rejection"
    ]
    for row in document["rows"]:
        wanted = {"malign_rate", "precision", "recall", "evaluations_per_sample", "seconds_per_sample", "labels"}
        assert wanted <= set(row["metrics"])
        rate = row["metrics"]["malign_rate"]
        assert 0 <= rate["value"] <= 1
    for name in ("samples.png", "trade-off.png", "labels.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_numbers_of_labels_and_evaluations(folder):
    table = {row["name"]: row["metrics"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    value = lambda name, metric: table[name][metric]["value"]
    config = mnist.PRESETS["smoke"]
    steps, k = config.sampler_steps, config.members
    assert value("uncensored", "evaluations_per_sample") == steps
    assert value("single", "evaluations_per_sample") == steps * 4
    assert value("ensemble", "evaluations_per_sample") == steps * (1 + 3 * k)
    assert value("ensemble-recurrence-backward", "evaluations_per_sample") == steps * 2 * (1 + 3 * k * 2)
    assert value("universal", "evaluations_per_sample") == steps * config.guidance.universal_recurrence * (3 + 3 * k)
    assert [value(f"imitation-{i}", "labels") for i in (1, 2, 3)] == [4, 8, 12]
    assert value("non-imitation", "labels") == 12
    assert value("single", "labels") == 4
    assert 4 <= value("union", "labels") <= 2 + 2 * k


def test_parameter_counts_of_the_paper():
    shapes = lambda network, config: jax.eval_shape(lambda: mnist.initialised(network, config, jax.random.key(0)))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    paper = mnist.PRESETS["paper"]
    assert count(shapes(mnist.unet_of(paper), paper)) == 52_538_369
    assert count(shapes(mnist.reward_of(paper), paper)) == 17_835_521
    assert count(jax.eval_shape(lambda: mnist.new_resnet(paper, jax.random.key(0)))["params"]) == 11_177_025
    default = mnist.MnistConfig()
    assert 1e6 < count(shapes(mnist.unet_of(default), default)) < 3e6


def test_kept_base_model_is_small_and_fits_the_default():
    assert mnist.KEPT.stat().st_size < 5e6
    default = mnist.MnistConfig()
    like = jax.eval_shape(lambda: mnist.initialised(mnist.unet_of(default), default, jax.random.key(0)))
    theta = mnist.kept(like, default)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theta))
    with pytest.raises(ValueError, match=r"--base kept: mnist_16\.npz must hold this network, got other shapes"):
        mnist.kept({"other": np.zeros(3)}, default)


def test_chosen_scale_keeps_recall():
    point = lambda malign, recall: {"malign_rate": mnist.rates.exact(malign), "recall": mnist.rates.exact(recall)}
    curve = {0.0: point(0.12, 0.8), 1.0: point(0.05, 0.8), 2.0: point(0.02, 0.75), 4.0: point(0.0, 0.3)}
    assert rows.chosen(curve) == 2.0
    assert rows.chosen({0.0: point(0.1, 0.8), 1.0: point(0.05, 0.2), 2.0: point(0.01, 0.1)}) == 1.0


def with_resnet(**changes):
    smoke = mnist.PRESETS["smoke"]
    return dataclasses.replace(smoke, resnet=dataclasses.replace(smoke.resnet, **changes))


@pytest.mark.torch
def test_imagenet_weights_are_read_but_for_the_last_layer(tmp_path):
    import torch

    small = with_resnet(weights=tmp_path / "resnet.pth")
    shapes = jax.eval_shape(mnist.resnet_of(small).clone(outputs=1000).init, jax.random.key(0), np.zeros((16, 16, 3)))
    rng, name = np.random.default_rng(0), lambda path: convert.name(tuple(part.key for part in path))
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
    names = {name(path): draw(leaf) for path, leaf in jax.tree.leaves_with_path(shapes)}
    order = lambda a: np.ascontiguousarray(a.transpose(a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)) if a.ndim > 1 else a)
    torch.save({name: torch.tensor(order(value)) for name, value in names.items()}, small.resnet.weights)
    loaded, start = (mnist.new_resnet(config, jax.random.key(1)) for config in (small, mnist.PRESETS["smoke"]))
    for path, leaf in jax.tree.leaves_with_path(loaded):
        fresh = path[1].key == "fc"
        expected = start["params"]["fc"][path[2].key] if fresh else names[name(path)]
        np.testing.assert_array_equal(leaf, expected)
    other = with_resnet(weights=tmp_path / "resnet.pth", widths=(4,))
    with pytest.raises(ValueError, match=r"conv1.weight: must have shape \(7, 7, 3, 4\), got \(7, 7, 3, 8\)"):
        mnist.new_resnet(other, jax.random.key(1))


def opened(folder: Path, **changes) -> trials.Study:
    """The smoke preset in a folder, with a base model that is never drawn from."""
    config = dataclasses.replace(mnist.PRESETS["smoke"], output=folder / "run", **changes)
    lab = Lab(phases.opened("censoring.mnist", config))
    lab.runs[0].results["base"] = {}
    return mnist.study_of(lab, "base")


def test_a_person_labels_each_batch_in_a_folder_of_its_own(tmp_path, monkeypatch):
    smoke = mnist.PRESETS["smoke"]
    study = opened(tmp_path, labels=dataclasses.replace(smoke.labels, rater="person"))
    places = []

    def ask(place, malign, benign, options):
        places.append(place)
        return Classes(np.array([0]), np.array([1, 2]))

    monkeypatch.setattr(trials.batches.ask, "ask", ask)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 4, 16, 16, 1))
    rate = study.rater(study.lab.runs[0], "trial-0", 1)
    for batch in images[[0, 1, 0]]:
        np.testing.assert_array_equal(rate(batch), [0, 1, 1, np.nan])
    assert places[0] == places[2] != places[1]
    with np.load(places[1] / "samples.npz") as stored:
        assert stored["arr_0"].shape == (4, 16, 16, 1)


def test_labels_and_members_are_drawn_with_different_keys(tmp_path, monkeypatch):
    study = opened(tmp_path)
    keys = []
    none = np.zeros((0, 16, 16, 1), np.float32)
    marked = mnist.censoring.Labelled(none, none, 0)
    mark_all = lambda *arguments: keys.append(jax.random.key_data(arguments[-1][0])) or [marked]
    bootstrap = lambda *arguments: keys.append(jax.random.key_data(arguments[-1])) or []
    monkeypatch.setattr(trials.censoring, "mark_all", mark_all)
    monkeypatch.setattr(trials.censoring, "bootstrap", bootstrap)
    key = lambda run: trials.fold(run, trials.LABELS, 3)
    study.mark("trial-3/labels", "trial-3-labels", 2, key, 3)
    study.pairs(study.lab.runs[0], 3)
    assert not np.array_equal(*keys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "smoke", "--guidance.recurrence", "0"], "--guidance.recurrence must be 1 to 100, got 0"),
        (["--preset", "smoke", "--guidance.backward", "-1"], "--guidance.backward must be 0 to 1000, got -1"),
        (["--preset", "smoke", "--labels.per-class", "0"], "--labels.per-class must be 1 to 10000, got 0"),
    ],
)
def test_options_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(mnist.MnistConfig, mnist.PRESETS, arguments)


def test_drawn_sevens_differ_and_are_reproducible():
    first, again, other = drawn_sevens.draw(20, 1), drawn_sevens.draw(20, 1), drawn_sevens.draw(20, 2)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (20, 28, 28)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, other)
    assert len(np.unique(first.reshape(20, -1), axis=0)) == 20
    # Ink is a bar above and one stem below: most of it in the upper half, and nothing at the border.
    assert (first[:, :2] == 0).all()
    assert (first.max((1, 2)) > 250).all()


def test_distance_to_a_segment():
    # From (3, 5) to (9, 5): perpendicular beside it, to the nearer end beyond it.
    d = drawn_sevens.to_segment(np.array([[3.0, 5.0]]), np.array([[9.0, 5.0]]))[0]
    np.testing.assert_allclose([d[5, 6], d[9, 6], d[5, 0], d[9, 12]], [0, 4, 3, 5])


@pytest.mark.parametrize(
    "change", [{"share": 0.3}, {"data_seed": 5}, {"digits": "drawn"}, {"size": 32}, {"unet": UNetSize(16)}]
)
def test_the_kept_model_is_of_the_default_preset_alone(change):
    config = dataclasses.replace(mnist.PRESETS["default"], **change)
    with pytest.raises(ValueError, match=rf"got another {next(iter(change))}(\.width)?: use --base train"):
        mnist.kept({}, config)
    with pytest.raises(ValueError, match="--keep must have the default preset's base model, got another"):
        mnist.keep({}, config)


def test_lists_out_of_range_are_named():
    for labels in ((20, 5), (5, 500)):
        with pytest.raises(ConfigError, match=r"--active\.labels must rise, up to --active\.pool 400, got \("):
            dataclasses.replace(mnist.PRESETS["default"], active=Active(labels))
    with pytest.raises(ConfigError, match=r"--active\.labels must have 1 or more numbers, got 0"):
        dataclasses.replace(mnist.PRESETS["default"], active=Active(()))
    with pytest.raises(ConfigError, match=r"--guidance\.sweep must be 1e-06 to 1000\.0, got 0\.0"):
        dataclasses.replace(mnist.PRESETS["default"], guidance=Guidance(sweep=(0.0, 1.0)))
