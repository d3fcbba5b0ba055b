"""The oracle's training and its table, on drawn sevens in place of MNIST."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.censoring import oracle
from experiments.lab.config import ConfigError, Training
from gendiff.data import mnist, natural_sevens
from gendiff.feedback import consensus, labels
from gendiff.feedback.samples import content_hash
from gendiff.oracles import crossed_seven


def sevens(n: int, seed: int) -> np.ndarray:
    """Sevens (n, 28, 28) of two lines each, in 0..255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28].astype(float)
    slant, thickness = rng.uniform(0.0, 0.3, (n, 1, 1)), rng.uniform(1.8, 3.2, (n, 1, 1))
    bar = np.hypot(y - 5, x - np.clip(x, 8, 19))
    stem = np.hypot(x - 19 + slant * np.clip(y - 5, 0, 18), y - np.clip(y, 5, 23))
    return np.rint(255 * np.clip(thickness / 2 + 0.5 - np.minimum(bar, stem), 0, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    train, test = sevens(200, 0), sevens(40, 1)
    labelled = {"y_train": np.full(200, 7), "y_test": np.full(40, 7)}
    np.savez(folder / "mnist.npz", x_train=train, x_test=test, **labelled)
    return folder


@pytest.fixture
def hand(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labels of the stand-in's test sevens: all benign, but one undecided, and another where a second rater differs."""
    file, page = tmp_path / "hand.jsonl", tmp_path / "page.jsonl"
    test = mnist.read(7, "test", data)
    names = [f"{'random' if i < 30 else 'doubtful'}/{i:04d}" for i in range(40)]
    said = ["undecided" if i == 4 else "benign" for i in range(40)]
    marks = [labels.mark(n, content_hash(a), s, "test") for n, a, s in zip(names, test, said, strict=True)]
    labels.append(file, marks)
    other = [mark._replace(rater="page", id=f"page-{i}") for i, mark in enumerate(marks)]
    other[5] = other[5]._replace(label="malign")
    labels.append(page, other)
    monkeypatch.setattr(natural_sevens, "HAND", file)
    monkeypatch.setattr(natural_sevens, "PAGE", page)
    return file


def test_the_table_is_there_and_learned_something(data: Path, hand: Path, tmp_path: Path) -> None:
    config = oracle.OracleConfig(
        preset="smoke", training=Training(80, batch=32, rate=2e-3), data=data, output=tmp_path / "out"
    )
    results = oracle.run(config)
    found = {row.name: row.metrics for row in results.rows}
    assert set(found) == {"held-out pairs", "held-out pairs, perturbed", *oracle.SUBSETS.values(), oracle.RATERS}
    assert found["held-out pairs"]["accuracy"].value > 0.9
    assert found["held-out pairs"]["accuracy"].n == 80
    assert found["held-out pairs"]["crossed"].value == 0.5
    assert found["hand labels, random"]["n"].value == 28
    assert found[oracle.RATERS]["accuracy"].value == 39 / 40
    assert "missed" not in found["hand labels, random"]
    assert "accuracy" not in found["hand labels, highest scores"]
    for name in ("table.md", "results.json", "errors-held-out-pairs.png", "crossed_seven_16.npz"):
        assert (results.folder / name).stat().st_size > 0
    # The second run reads the training and says the same.
    before = json.loads((results.folder / "results.json").read_text())["rows"]
    oracle.run(config)
    assert json.loads((results.folder / "results.json").read_text())["rows"] == before
    # What was measured is what is kept.
    kept = crossed_seven.read(results.folder / "crossed_seven_16.npz")
    assert oracle.measured(oracle.judged(config, kept)["held-out pairs"]) == found["held-out pairs"]


def test_bad_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--training\.steps must be 1 to 100000000, got 0"):
        oracle.OracleConfig(training=Training(0))
    with pytest.raises(mnist.DataError, match="/nowhere must hold MNIST's files"):
        natural_sevens.pools(Path("/nowhere"), 0)


def test_the_kept_hand_labels_can_be_read() -> None:
    marks = labels.read(natural_sevens.HAND)
    subsets = [mark.sample.partition("/")[0] for mark in marks]
    assert set(subsets) == set(oracle.SUBSETS)
    assert subsets.count("random") >= 250
    assert len({mark.hash for mark in marks}) == len(marks) >= 300
    random = [mark.label for mark in marks if mark.sample.startswith("random/")]
    assert 0.1 < random.count("malign") / len(random) < 0.2
    page = labels.read(natural_sevens.PAGE)
    assert {mark.hash for mark in page} == {mark.hash for mark in marks}
    assert labels.seconds(page)["vision-model-at-page"] > 0
    (pair,) = consensus.agreement(marks + page).pairs.values()
    assert (pair.n, pair.kappa > 0.9) == (len(marks), True)


@pytest.mark.skipif(not os.environ.get(mnist.FOLDER), reason=f"{mnist.FOLDER} names no folder with MNIST's files")
@pytest.mark.parametrize("size", crossed_seven.SIZES)
def test_the_kept_oracle_agrees_with_the_hand_labels(size: int) -> None:
    config = oracle.OracleConfig(size=size)
    params = crossed_seven.load(size)
    judged = oracle.judged(config, params)
    assert oracle.measured(judged[oracle.PAIRS])["accuracy"].low > 0.99
    assert oracle.measured(judged[oracle.SUBSETS["random"]])["accuracy"].value > 0.98
