"""The oracle of the censored-sampling experiment, which recognises crossed sevens.

A network learns from MNIST's training sevens, with and without drawn strokes, and from naturally crossed ones. The test
sevens measure it: with drawn strokes, and with 400 hand labels of the original images. --keep replaces the package's
parameters (about two minutes per size on two CPU cores):

    python -m experiments.censoring.oracle --size 16 --keep     held-out pairs 99.89 %, random hand labels 249 of 249
    python -m experiments.censoring.oracle --size 32 --keep     held-out pairs 99.94 %, random hand labels 249 of 249

MNIST comes from TFDS, or from the folder that GENDIFF_DATA names.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.lab import figures
from experiments.lab.config import Config, Training
from experiments.lab.experiment import Experiment
from experiments.lab.phases import Lab, Run
from experiments.lab.table import Column, Row
from gendiff import distributed, training
from gendiff.data import mnist, natural_sevens
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.oracles import crossed_seven
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Samples

SUBSETS: dict[Literal["random", "highest", "doubtful"], str] = {
    "random": "hand labels, random",
    "highest": "hand labels, highest scores",
    "doubtful": "hand labels, least certain",
}
PAIRS, PERTURBED_PAIRS, RATERS = "held-out pairs", "held-out pairs, perturbed", "hand labels, two raters"


@dataclasses.dataclass(frozen=True)
class OracleConfig(Config):
    """The images, the training of the network, and MNIST's folder."""

    size: Literal[16, 32] = 16
    """Pixels along a side."""
    training: Training = Training(1200, batch=128, rate=2e-3)
    """Training of the network; half of a batch are crossed sevens, and the rate falls to 0 along a cosine."""
    data: Path | None = None
    """Folder with MNIST's files; default: the folder that GENDIFF_DATA names, or else TFDS."""
    keep: bool = False
    """Replace the package's parameters."""


PRESETS = {
    "smoke": OracleConfig(preset="smoke", training=Training(60, batch=32, rate=2e-3)),
    "default": OracleConfig(),
    "paper": OracleConfig(preset="paper", training=Training(6000, batch=256, rate=2e-3)),
}

COLUMNS = (
    Column("accuracy", "agreement %", percent=True, digits=2),
    Column("missed", "crossed, called uncrossed %", percent=True, digits=2),
    Column("rejected", "uncrossed, called crossed %", percent=True, digits=2),
    Column("crossed", "crossed %", percent=True, digits=1),
    Column("n", "images", digits=0),
)
NOTES = """\
Intervals are 95 %, Wilson's. held-out pairs: the uncrossed test sevens, without and with a drawn stroke; perturbed: the
pairs, moved, rotated, stretched, blurred, and with noise. The network sees no test seven in training.
hand labels: original test sevens, which a vision model, not a person, labelled by eye twice: from contact sheets and at
the labelling page. Sevens with two different labels, or an "undecided" one, are left out. `random` is a random subset,
so its share of crossed sevens is MNIST's; `highest` had the highest scores of a first classifier, and `least certain`
the smallest |logit| of a second one. two raters: equal labels, of all three subsets."""
TRAIN, START, HELD_OUT, PERTURBED = range(4)
"""Purposes of random keys."""


@by_value
def task(size: int, batch: int) -> Callable[[natural_sevens.Pools], training.Task]:
    """Return pools -> the training task."""

    def example(key: PRNGKey, pools: natural_sevens.Pools) -> tuple[Array, Array]:
        *keys, perturb_key = jax.random.split(key, 5)
        image, crossed = natural_sevens.example(keys, pools, size)
        return crossed_seven.perturbed(perturb_key, image), crossed.astype(jnp.float32)

    def loss(params: Params, key: PRNGKey, example: tuple[Array, Array]) -> Array:
        image, crossed = example
        logit = crossed_seven.network(params, image).logit
        return jax.nn.softplus(logit) - crossed * logit

    def of(pools: natural_sevens.Pools) -> training.Task:
        draw = lambda key: jax.vmap(example, (0, None))(jax.random.split(key, batch), pools)
        return training.Task(loss, draw)

    return of


def oracle_training(run: Run) -> training.Training:
    """Return the training of the network."""
    config, start = run.config, crossed_seven.initial(run.key(START))
    of_pools, pools = task(config.size, config.training.batch), natural_sevens.pools(config.data, config.seed)
    return training.Training(run.key(TRAIN), start, of_pools, pools, config.training.settings(0.999, 200, 0))


def kept(run: Run) -> Params:
    """Save the trained parameters, and return them with the file's precision."""
    package = crossed_seven.path(run.config.size)
    file = package if run.config.keep else run.folder.path / package.name
    distributed.first(lambda: crossed_seven.save(file, run["training"]))
    return crossed_seven.read(file)


class Judged(NamedTuple):
    """Images with their labels and the network's logits."""

    images: Samples
    crossed: Bool[np.ndarray, " n"]
    logit: Float[Array | np.ndarray, " n"]


def judged(config: OracleConfig, params: Params) -> dict[str, Judged]:
    """Judge the test sevens of every row: held-out pairs, and the subsets of the hand labels."""
    sevens = mnist.read(7, "test", config.data)
    pairs = natural_sevens.pairs(sevens, config.seed + HELD_OUT)
    labelled = {PAIRS: pairs, PERTURBED_PAIRS: pairs}
    labelled |= {name: natural_sevens.marked(sevens, subset) for subset, name in SUBSETS.items()}
    images = {name: mnist.scaled(sample.images, config.size) for name, sample in labelled.items()}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), PERTURBED), len(pairs.images))
    images[PERTURBED_PAIRS] = np.asarray(jax.jit(jax.vmap(crossed_seven.perturbed))(keys, images[PAIRS]))
    judge = lambda name: crossed_seven.judge(images[name], params).logit
    return {name: Judged(images[name], sample.crossed, judge(name)) for name, sample in labelled.items()}


def measured(judged: Judged) -> dict[str, Estimate]:
    """Measure agreement, both errors, and the share of crossed sevens; a class without images has no error."""
    said, crossed = judged.logit > 0, judged.crossed
    events = {"accuracy": said == crossed, "missed": ~said[crossed], "rejected": said[~crossed], "crossed": crossed}
    metrics = {metric: rates.rate(int(event.sum()), len(event)) for metric, event in events.items() if len(event)}
    return metrics | {"n": rates.exact(len(crossed))}


def table(lab: Lab) -> None:
    """Train the network and measure it."""
    lab.train("training", oracle_training)
    lab.each(add_rows)


def add_rows(run: Run) -> None:
    """Add rows of the held-out pairs and of the hand labels."""
    run.results["judged"] = judged(run.config, kept(run))
    for name, sample in run["judged"].items():
        run.add(name, measured(sample))
    pair = natural_sevens.agreement()
    run.add(RATERS, {"accuracy": rates.rate(round(pair.share * pair.n), pair.n), "n": rates.exact(pair.n)})


def draw_figures(folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Draw sheets of 60 images: the network's errors in red frames, then the least certain others."""
    for name, judged in members[0]["judged"].items():
        wrong = (judged.logit > 0) != judged.crossed
        order = np.argsort(np.where(wrong, -1e6, 0) + abs(judged.logit))[:60]
        path = folder / f"errors-{name.replace(', ', '-').replace(' ', '-')}.png"
        figures.error_sheet(path, judged.images[order], wrong[order])


EXPERIMENT = Experiment(
    "censoring.oracle", OracleConfig, PRESETS, table, COLUMNS,
    lambda config: [PAIRS, PERTURBED_PAIRS, *SUBSETS.values(), RATERS], extras=("data",),
    notes=lambda members, rows: NOTES, figures=draw_figures,
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
