"""The oracle of the censored-sampling experiment: which sevens are crossed.

A network learns from MNIST's training sevens, with and without drawn strokes, and from those that their writers
crossed. It is measured on the test sevens: on drawn strokes, and on hand labels of 400 sevens as they are.
With --keep its parameters become those that the package keeps (about two minutes on two CPU cores for each size):

    python -m experiments.censoring.oracle --size 16 --keep     held-out pairs 99.89 %, random hand labels 249 of 249
    python -m experiments.censoring.oracle --size 32 --keep     held-out pairs 99.94 %, random hand labels 249 of 249

MNIST comes from TFDS, or from the folder that GENDIFF_DATA names.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments import figures
from experiments.contract import Between, Column, Config, Folder, Progress, Results, Row, main
from gendiff import training
from gendiff.data import files, mnist
from gendiff.feedback import consensus, labels
from gendiff.feedback.samples import content_hash
from gendiff.metrics import rates
from gendiff.oracles import crossed_seven
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Samples

HAND = Path(__file__).with_name("natural_sevens.jsonl")
"""Labels of test sevens by eye, from contact sheets; a sample is called <subset>/<row of the test sevens>."""
PAGE = Path(__file__).with_name("natural_sevens_page.jsonl")
"""Labels of the same sevens given at the labelling page, by a vision model as well, not by a person."""
SUBSETS = {
    "random": "hand labels, random",
    "highest": "hand labels, highest scores",
    "doubtful": "hand labels, least certain",
}
RATERS = "hand labels, two raters"


@dataclasses.dataclass(frozen=True)
class OracleConfig(Config):
    """The network's images, its training and where MNIST lies."""

    size: Literal[16, 32] = 16
    """Pixels along a side."""
    steps: Annotated[int, Between(1, 1_000_000)] = 1200
    """Training steps."""
    batch: Annotated[int, Between(2, 65_536)] = 128
    """Images a step; half of them are crossed."""
    rate: Annotated[float, Between(1e-6, 1.0)] = 2e-3
    """Adam's rate at the start; it falls to 0 along a cosine."""
    data: Path | None = None
    """Folder with MNIST's files. Default: the one that GENDIFF_DATA names, or else TFDS."""
    keep: bool = False
    """Replace the parameters that the package keeps."""


PRESETS = {
    "smoke": OracleConfig(preset="smoke", steps=60, batch=32),
    "default": OracleConfig(),
    "paper": OracleConfig(preset="paper", steps=6000, batch=256),
}

COLUMNS = (
    Column("accuracy", "agreement %", percent=True, digits=2),
    Column("missed", "crossed, called uncrossed %", percent=True, digits=2),
    Column("rejected", "uncrossed, called crossed %", percent=True, digits=2),
    Column("crossed", "crossed %", percent=True, digits=1),
    Column("n", "images", digits=0),
)
NOTES = """\
Intervals are 95 %, Wilson's. held-out pairs: each test seven that its writer did not cross, without and with a drawn
stroke; perturbed: the same moved, turned, stretched, blurred, and with noise. The network sees no test seven.
hand labels: test sevens as they are, labelled by eye twice, by a vision model each time and not by a person: from
contact sheets and at the labelling page; those on which the two differ, or are "undecided", are left out. `random` is a
random subset, so its share of crossed sevens is that of MNIST; `highest` had the highest scores of a first classifier,
and `least certain` the smallest |logit| of a second one.  two raters: equal labels, of all three."""
TRAIN, START, HELD_OUT, PERTURBED = range(4)
"""What the keys are for."""


class Pools(NamedTuple):
    """Training sevens as they are stored, (n, 28, 28) in 0..255."""

    uncrossed: np.ndarray
    natural: np.ndarray
    """Crossed by their writers."""


def pools(config: OracleConfig) -> Pools:
    """The training sevens; without natural crossed ones (data that are not MNIST), drawn ones stand for them."""
    sevens = mnist.read(7, "train", config.data)
    crossed = mnist.naturally_crossed(sevens)
    uncrossed = sevens[~crossed]
    return Pools(uncrossed, sevens[crossed] if crossed.any() else mnist.crossed(uncrossed, config.seed))


NATURAL = 0.25
"""Share of a batch's crossed images that their writers crossed; the others are uncrossed ones with a new stroke."""


@by_value
def task(size: int, batch: int) -> Callable[[Pools], training.Task]:
    """Pools -> the training task."""
    resize = mnist.triangle(mnist.SIDE, size)

    def one(key: PRNGKey, pools: Pools) -> tuple[Array, Array]:
        kind_key, image_key, natural_key, stroke_key, perturb_key = jax.random.split(key, 5)
        kind = jax.random.uniform(kind_key)
        crossed, natural = kind < 0.5, kind < 0.5 * NATURAL
        pick = lambda key, pool: jnp.asarray(pool)[jax.random.randint(key, (), 0, len(pool))] / 255.0
        ink = pick(image_key, pools.uncrossed)
        ink = jnp.where(crossed, mnist.cross(stroke_key, ink), ink)
        ink = jnp.where(natural, pick(natural_key, pools.natural), ink)
        image = 2 * (resize @ ink @ resize.T)[..., None] - 1
        return crossed_seven.perturbed(perturb_key, image), crossed.astype(jnp.float32)

    def loss(params: Params, key: PRNGKey, example: tuple[Array, Array]) -> Array:
        image, crossed = example
        logit = crossed_seven.network(params, image).logit
        return jax.nn.softplus(logit) - crossed * logit

    def of(pools: Pools) -> training.Task:
        draw = lambda key: jax.vmap(one, (0, None))(jax.random.split(key, batch), pools)
        return training.Task(loss, draw)

    return of


def train(config: OracleConfig, folder: Folder, progress: Progress) -> Params:
    """Parameters, rounded to what is kept of them."""
    settings = training.Settings(config.steps, config.rate, every=min(200, config.steps))
    report = lambda step, metrics: progress("training", step, config.steps, metrics)
    host = training.Host(None, folder.archive.steps("training"), report)
    key = jax.random.key(config.seed)
    start = crossed_seven.initial(jax.random.fold_in(key, START))
    run = lambda: (
        training.train(
            jax.random.fold_in(key, TRAIN), start, task(config.size, config.batch), pools(config), settings, host
        ).best
    )
    params = folder.archive.once("training", run)
    file = crossed_seven.path(config.size) if config.keep else folder.path / crossed_seven.path(config.size).name
    crossed_seven.save(file, params)
    return crossed_seven.read(file)


class Judged(NamedTuple):
    """Images with what they are and what the network says of them."""

    images: Samples
    crossed: Bool[np.ndarray, " n"]
    logit: Float[Array | np.ndarray, " n"]


def held_out(config: OracleConfig, params: Params, perturb: bool) -> Judged:
    """Each test seven that its writer did not cross, without and with a drawn stroke."""
    sevens = mnist.read(7, "test", config.data)
    uncrossed = sevens[~mnist.naturally_crossed(sevens)]
    drawn = mnist.crossed(uncrossed, config.seed + HELD_OUT)
    images = mnist.scaled(np.concatenate([uncrossed, drawn]), config.size)
    if perturb:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), PERTURBED), len(images))
        images = np.asarray(jax.jit(jax.vmap(crossed_seven.perturbed))(keys, images))
    return Judged(images, np.arange(len(images)) >= len(uncrossed), crossed_seven.judge(images, params).logit)


def by_hand(config: OracleConfig, params: Params, subset: str) -> Judged:
    """The test sevens of a subset of the hand labels."""
    sevens = mnist.read(7, "test", config.data)
    said = consensus.merge(labels.read(HAND, PAGE))
    chosen = {mark.hash for mark in labels.read(HAND) if mark.sample.startswith(f"{subset}/")}
    hashes = [content_hash(image) for image in sevens]
    rows = [i for i, each in enumerate(hashes) if each in chosen and said[each] != "undecided"]
    images = mnist.scaled(sevens[rows], config.size)
    crossed = np.array([said[hashes[i]] == "malign" for i in rows], bool)
    return Judged(images, crossed, crossed_seven.judge(images, params).logit)


def raters() -> Row:
    """How often the two files of hand labels say the same."""
    (pair,) = consensus.agreement(labels.read(HAND, PAGE)).pairs.values()
    return Row(RATERS, {"accuracy": rates.rate(round(pair.share * pair.n), pair.n), "n": rates.exact(pair.n)})


def row(name: str, judged: Judged) -> Row:
    """Agreement, both errors, and the share of crossed sevens; a class without images has no error."""
    said, crossed = judged.logit > 0, judged.crossed
    events = {
        "accuracy": said == crossed,
        "missed": ~said[crossed],
        "rejected": said[~crossed],
        "crossed": crossed,
    }
    measured = {metric: rates.rate(int(each.sum()), len(each)) for metric, each in events.items() if len(each)}
    return Row(name, measured | {"n": rates.exact(len(crossed))})


def run(config: OracleConfig) -> Results:
    """Trains the network and measures it."""
    folder = Folder("censoring/oracle", config)
    progress = Progress(folder)
    params = train(config, folder, progress)
    judged = {
        "held-out pairs": held_out(config, params, perturb=False),
        "held-out pairs, perturbed": held_out(config, params, perturb=True),
    } | {name: by_hand(config, params, subset) for subset, name in SUBSETS.items()}
    for name, each in judged.items():
        errors(folder.path / f"errors-{name.replace(', ', '-').replace(' ', '-')}.png", each)
    return folder.finish([*(row(name, each) for name, each in judged.items()), raters()], COLUMNS, NOTES)


def errors(path: Path, judged: Judged, most: int = 60) -> None:
    """A sheet of the images that the network gets wrong, under white bars, and then of the least certain others."""
    wrong = (judged.logit > 0) != judged.crossed
    order = np.argsort(np.where(wrong, -1e6, 0) + abs(judged.logit))[:most]
    images = 0.5 * (np.clip(judged.images[order, ..., 0], -1, 1) + 1)
    tiles = np.pad(images, ((0, 0), (2, 2), (2, 2)), constant_values=0.4)
    tiles[wrong[order], :2] = 1.0  # a white bar above what is wrong
    tiles = np.concatenate([tiles, np.full((-len(tiles) % 15, *tiles.shape[1:]), 0.4)])
    if not len(tiles):
        return
    side = tiles.shape[1]
    sheet = tiles.reshape(-1, 15, side, side).transpose(0, 2, 1, 3).reshape(-1, 15 * side)
    shown = np.kron(sheet, np.ones((3, 3)))
    files.store(path, lambda file: figures.plt.imsave(file, shown, cmap="gray", vmin=0, vmax=1, format="png"))


if __name__ == "__main__":
    main(OracleConfig, PRESETS, run)
