"""Whether Grain keeps up: how long training steps wait for batches that are read from files.

Two data sets of random values are written as TFDS's, in ArrayRecord files: images of MNIST's size (PNG, decoded and
scaled as they are read) and sequences of 256 frames of 263 numbers, HumanML3D's features of motion.  A U-Net is trained
on each by `training.train`, in turns from `gendiff.data.stream` and from one batch that is there already.  The figures
mean something on a quiet machine only.
"""

import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from experiments.censoring import mnist
from experiments.lab.command import main
from experiments.lab.config import Between, Config
from experiments.lab.folder import Folder
from experiments.lab.progress import Progress
from experiments.lab.table import Column, Results, Row
from experiments.speed import table
from gendiff import losses, nets, process, training
from gendiff.data import mnist as digits
from gendiff.metrics import rates
from gendiff.nets.temporal import TemporalUnet
from gendiff.training import Host, Settings, Task
from gendiff.types import Params


@dataclasses.dataclass(frozen=True)
class InputConfig(Config):
    """How much is read, and how long is measured."""

    images: Annotated[int, Between(100, 1_000_000)] = 60_000
    """Of the data set of images, 28 x 28 pixels."""
    motions: Annotated[int, Between(100, 100_000)] = 1000
    """Of the data set of motions, 269 kB each."""
    repetitions: Annotated[int, Between(2, 1000)] = 11
    """Timed trainings of each kind."""
    seconds: Annotated[float, Between(0.001, 600.0)] = 5.0
    """Of one of them, about; it has as many steps as fit, at least two."""


PRESETS = {
    "smoke": InputConfig(preset="smoke", images=200, motions=100, repetitions=2, seconds=0.001),
    "default": InputConfig(),
    "paper": InputConfig(preset="paper", motions=14_616),
}
COLUMNS = (
    Column("streamed_seconds", "s a step", digits=4),
    Column("resident_seconds", "without reading, s", digits=4),
    Column("slower", "slower by %", percent=True, digits=2),
    Column("waited", "waited %", percent=True, digits=3),
    Column("longest_wait", "longest wait %", percent=True, digits=2),
    Column("examples_per_second", "examples / s", digits=0),
    Column("megabytes_per_second", "MB / s", digits=1),
    Column("steps", "steps", digits=0),
)
NOTES = """\
Batches of {batches}. waited: time in the iterator's `next` by that of the steps; the devices work on the step before
meanwhile, so that they wait for no longer. longest wait: of any one step, by the mean step. slower by: geometric
mean of the trainings' own ratios less 1, 95 % interval (Student's, of the logarithm); the two kinds go first in turns.
Seconds: median [smallest, largest] of {repetitions} trainings. examples / s, MB / s: what Grain reads where nothing is
trained, as the network gets it: a device whose steps take batches faster waits."""


class Fed(NamedTuple):
    """A training that reads its batches."""

    source: Any
    change: Callable[[Any], np.ndarray]
    """Of one element of the source, on the host."""
    task: Callable[[Any], Task]
    params: Params
    batch: int


class Timed:
    """An iterator, with the seconds that each `next` took."""

    def __init__(self, batches: Iterator) -> None:
        self.batches, self.seconds = batches, list[float]()

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> Any:
        begun = time.perf_counter()
        batch = next(self.batches)
        self.seconds.append(time.perf_counter() - begun)
        return batch


def _png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    file.seek(0)
    return file


def stored(folder: str, name: str, count: int) -> Any:
    """A data set of TFDS, `digits` or `motions`, as a random-access source."""
    rng = np.random.default_rng(0)
    image = lambda: _png(rng.integers(0, 256, (28, 28), np.uint8))
    motion = lambda: rng.normal(size=(256, 263)).astype(np.float32)
    made, feature = {
        "digits": (image, tfds.features.Image(shape=(28, 28, 1))),
        "motions": (motion, tfds.features.Tensor(shape=(256, 263), dtype=np.float32, encoding="bytes")),
    }[name]

    with tfds.core.registered.skip_registration():

        class Random(tfds.core.ShardBasedBuilder):
            """Random values."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"x": feature})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
                return {"train": [lambda: ((i, {"x": made()}) for i in range(count))]}

    builder = Random(data_dir=f"{folder}/{name}", file_format="array_record")
    builder.download_and_prepare()
    return builder.as_data_source(split="train")


def of_digits(config: InputConfig, folder: str) -> Fed:
    """MNIST's base model, on 32 x 32 pixels."""
    smoke = config.preset == "smoke"
    images = dataclasses.replace(mnist.PRESETS["smoke" if smoke else "default"], size=32)
    setup = mnist.problem(images)
    loss = losses.denoising(setup.process, setup.model, losses.epsilon_weight(setup.process))
    theta = mnist.initialised(mnist.unet_of(images), images, jax.random.key(0))
    scaled = lambda element: digits.scaled(element["x"][None, :, :, 0])[0]
    return Fed(stored(folder, "digits", config.images), scaled, lambda _: Task(loss), theta, images.training.batch)


def of_motions(config: InputConfig, folder: str) -> Fed:
    """Diffuser's network for sequences, x_0 from 256 frames of 263 features."""
    smoke = config.preset == "smoke"
    net, chain = TemporalUnet(8, (1, 2)) if smoke else TemporalUnet(), process.ddpm(process.cosine_betas(1000))
    model = lambda theta, x, t: jnp.asarray(net.apply(theta, x, t - 1))
    loss = losses.denoising(chain, model, lambda t: jnp.float32(1 / (256 * 263)))
    theta = nets.fresh(net, jax.random.key(0), jnp.zeros((256, 263)), jnp.zeros(()))
    return Fed(stored(folder, "motions", config.motions), lambda element: element["x"], lambda _: Task(loss), theta, 32)


STREAMS: dict[str, Callable[[InputConfig, str], Fed]] = {"digits": of_digits, "motions": of_motions}
"""Name of a row -> what is trained."""


def trained(fed: Fed, batches: Iterator, steps: int) -> tuple[float, float]:
    """Seconds of a step, and loss, of the second of two blocks of so many steps: the first fills Grain's buffers."""
    seen: list[tuple[float, float]] = []
    settings = Settings(2 * steps, 1e-4, every=steps)
    report = lambda step, metrics: seen.append((time.perf_counter(), metrics.get("loss", 0.0)))
    training.train(jax.random.key(1), fed.params, fed.task, (), settings, Host(report=report), batches)
    return (seen[2][0] - seen[1][0]) / steps, seen[2][1]


def measure(config: InputConfig, name: str, fed: Fed, progress: Progress) -> dict[str, rates.Estimate]:
    """The metrics of a row."""
    from gendiff.data import stream  # an extra, which `stored` has asked for

    read = lambda seed: stream.batches(fed.source, fed.batch, seed, fed.change)
    first = next(read(0))
    trained(fed, repeat(first), 2)  # compiles
    steps = max(2, round(config.seconds / trained(fed, repeat(first), 2)[0] / 2))
    streamed, resident, waits = [], [], []
    for i in range(config.repetitions):
        timed = Timed(read(i + 1))
        kinds = {
            "streamed": partial(trained, fed, timed, steps),
            "resident": partial(trained, fed, repeat(first), steps),
        }
        each = {kind: kinds[kind]()[0] for kind in sorted(kinds, reverse=bool(i % 2))}
        streamed.append(each["streamed"])
        resident.append(each["resident"])
        waits.append(np.array(timed.seconds[steps : 2 * steps]) / each["streamed"])
        progress(name, i + 1, config.repetitions, {})
    alone, count = read(0), 0
    next(alone)
    begun = time.perf_counter()
    while (took := time.perf_counter() - begun) < config.seconds or not count:
        count += len(next(alone))
    return {
        "streamed_seconds": table.spread(np.array(streamed)),
        "resident_seconds": table.spread(np.array(resident)),
        "slower": rates.change(streamed, resident),
        "waited": rates.mean([each.mean() for each in waits]),
        "longest_wait": rates.exact(max(each.max() for each in waits), sum(map(len, waits))),
        "examples_per_second": rates.exact(count / took, count),
        "megabytes_per_second": rates.exact(count * first[0].nbytes / took / 1e6, count),
        "steps": rates.exact(steps * config.repetitions),
    }


def run(config: InputConfig) -> Results:
    """Writes the data, measures every training, and writes the table."""
    folder = Folder("speed.input", config)
    progress = Progress(folder)
    rows, batches = [], []
    with tempfile.TemporaryDirectory() as place:
        for name, of in STREAMS.items():
            fed = of(config, place)
            rows.append(Row(name, measure(config, name, fed, progress)))
            batches.append(f"{fed.batch} {name}")
    progress.close()
    notes = NOTES.format(batches=" and of ".join(batches), repetitions=config.repetitions)
    return folder.finish(rows, COLUMNS, notes)


if __name__ == "__main__":
    main(InputConfig, PRESETS, run)
