"""Speed of guided sampling and of a training step: gendiff beside the same networks in PyTorch.

Both frameworks run in processes of their own, one at a time and interleaved, repetition by repetition: PyTorch eager,
eager in chunks that fit the cache, and `torch.compile`. Before anything is timed, both must give the same answers. The
figures mean something on a quiet machine only; `pip install -e .[speed]` installs PyTorch.

Work is counted in matrix products, 2 a b FLOPs for a product of a row with an (a, b) matrix, and nothing else. A
network of width w, depth L and f Fourier frequencies, from d to o numbers, has per row and evaluation

    forward  2 (d f + (d + 2 f) w + 2 L w^2 + w o)

and its gradient in the input as much again. One noise level, so one time embedding, serves a whole step of a sampler:

    sampling, per sample   (2 steps - 1) (denoiser + 2 K classifier)
    training, per point    forward + products of all gradients, with a time embedding a point

`peak` is the fastest product of two large square matrices that JAX or PyTorch did in the same run, and `roofline` the
time of the work at that rate.
"""

import dataclasses
from typing import Annotated, Any

from experiments.genneg import checkerboard
from experiments.genneg.checkerboard import CheckerboardConfig
from experiments.lab.command import main
from experiments.lab.config import Between, Distinct
from experiments.lab.folder import Folder
from experiments.lab.table import Column, Results
from experiments.speed import table
from experiments.speed.table import Sides, TimedConfig, Work
from gendiff.nets.mlp import MLPClassifier, ResidualMLP

OURS, RIVAL = "experiments.speed.ours", "experiments.speed.rival"
TIME_FEATURES = 32
"""Of the noise level, in both networks."""
PRODUCTS = 20
"""Skinny products timed together."""
TOLERANCE = {"samples": 1e-3}
"""Largest difference between the sides over the largest answer; 18 steps amplify what one evaluation rounds."""


@dataclasses.dataclass(frozen=True)
class SpeedConfig(TimedConfig):
    """The sizes; by default those of the checkerboard experiment."""

    samples: Annotated[int, Between(1, 100_000_000)] = 10_000
    """Samples drawn at a time."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = CheckerboardConfig.sampler_steps
    """Heun steps."""
    classifiers: Annotated[tuple[int, ...], Between(0, 64), Distinct()] = (0, 1, 5)
    """Numbers K of classifiers, a row each."""
    points: Annotated[int, Between(1, 100_000_000)] = 1000
    """Batch of a training step."""
    train_steps: Annotated[int, Between(1, 100_000)] = 50
    """Training steps timed together."""

    width: Annotated[int, Between(8, 4096)] = CheckerboardConfig.width
    """Width of the denoiser."""
    depth: Annotated[int, Between(1, 64)] = CheckerboardConfig.depth
    """Residual blocks of the denoiser."""
    classifier_width: Annotated[int, Between(8, 4096)] = CheckerboardConfig.classifier_width
    """Width of a classifier."""
    classifier_depth: Annotated[int, Between(1, 64)] = CheckerboardConfig.classifier_depth
    """Residual blocks of a classifier."""

    chunk: Annotated[int, Between(1, 100_000_000)] = 2000
    """Samples at a time of the chunked PyTorch sampler."""


PRESETS = {
    "smoke": SpeedConfig(
        preset="smoke", samples=200, sampler_steps=4, classifiers=(0, 1), points=50, train_steps=3, width=16,
        depth=1, classifier_width=16, classifier_depth=1, repetitions=2, matmul=128, chunk=100, rivals="eager",
    ),
    "default": SpeedConfig(),
    "paper": SpeedConfig(preset="paper", samples=100_000, repetitions=7),
}  # fmt: skip

COLUMNS = (*table.SPEED, Column("chunked_ratio", "chunked / gendiff", digits=2), *table.COMPILED)
NOTES = """\
Median [smallest, largest] of {repetitions} interleaved calls; ratios are of calls of the same repetition. `matmul` is
a product of two {matmul} x {matmul} matrices, `skinny` of ({samples} x {width}) and ({width} x {width}), both by JAX
and by PyTorch eager; peak: {peak:.1f} GF/s. `train-step`: one step on {points} points, Adam with clipped gradients and
an average of the weights. chunked: PyTorch eager, {chunk} samples at a time. compile: the first call less the median,
of gendiff with an empty compile cache and in a second process with the first one's, and of `torch.compile` with empty
caches."""


def run(config: SpeedConfig) -> Results:
    """Compares the sides, times them, and writes the table; nothing is kept from an earlier run."""
    folder = Folder("speed.genneg", config)
    rows = rows_of(config)
    measured = table.measure(config, sides(config), rows, folder)
    return table.finish(folder, rows, measured, COLUMNS, NOTES)


def rows_of(config: SpeedConfig) -> dict[str, Work]:
    """The rows of the table."""
    sampling, training = table.rivals(config, ("eager", "chunked")), table.rivals(config)
    names = [f"sample-k{members}" for members in config.classifiers]
    return {
        **{name: Work(work(config, name), config.samples, 1, sampling) for name in names},
        "train-step": Work(work(config, "train-step"), config.points, config.train_steps, training),
        "matmul": table.product(config),
        "skinny": Work(2.0 * config.samples * config.width**2, config.samples, PRODUCTS, table.product(config).rivals),
    }


def sides(config: SpeedConfig) -> Sides:
    """The workers and what they are told."""
    return Sides(OURS, RIVAL, setup(config), {"chunk": config.chunk}, TOLERANCE)


def setup(config: SpeedConfig) -> dict[str, Any]:
    """What `ours.prepare` is given."""
    same = ("seed", "samples", "points", "train_steps", "matmul")
    return {
        "fields": network_fields(config),
        "members": config.classifiers,
        "products": PRODUCTS,
        **{name: getattr(config, name) for name in same},
    }


def network_fields(config: SpeedConfig) -> dict[str, Any]:
    """The fields that are the checkerboard experiment's too."""
    names = ("sampler_steps", "width", "depth", "classifier_width", "classifier_depth")
    return {name: getattr(config, name) for name in names}


def work(config: SpeedConfig, name: str) -> float:
    """FLOPs of a batch of samples or of a training step."""
    fields = CheckerboardConfig(**network_fields(config))
    denoiser, classifier = checkerboard.denoiser_network(fields), checkerboard.classifier_network(fields)
    if name == "train-step":
        return config.points * training_flops(denoiser)
    members = int(name.removeprefix("sample-k"))
    evaluation = forward_flops(denoiser, 2) + 2 * members * forward_flops(classifier, 1)
    return config.samples * (2 * config.sampler_steps - 1) * evaluation


def forward_flops(net: ResidualMLP | MLPClassifier, outputs: int) -> float:
    """FLOPs of an evaluation at one point of the plane, without the time embedding."""
    waves, width = net.fourier, net.width
    return 2.0 * (2 * waves + (2 + 2 * waves) * width + 2 * net.depth * width**2 + width * outputs)


def training_flops(net: ResidualMLP) -> float:
    """FLOPs of the loss and its gradient at one point: the frequencies and the inputs need no gradient."""
    waves, width, embedding = net.fourier, net.width, net.width // 2
    blocks = 2 * net.depth * width**2 + width * net.features + net.depth * embedding * width
    first = (2 + 2 * waves) * width + TIME_FEATURES * embedding
    return 2.0 * (2 * waves + 2 * first + 3 * blocks)


if __name__ == "__main__":
    main(SpeedConfig, PRESETS, run)
