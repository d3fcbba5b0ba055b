"""Speed of censored sampling and of both training steps: gendiff beside the same networks in PyTorch.

The networks are those of `experiments.censoring.mnist`: `small` of its preset `default`, `paper` of its preset `paper`.
As in the first speed table, both frameworks run in processes of their own, interleaved, and nothing is timed before
both give the same answers. The rival is PyTorch eager, with images laid out channels first and channels last; `--rivals
all` adds `torch.compile`, which takes minutes. Its rewards are a loop in Python.

    step-NET-kK    a step of ancestral sampling guided by K rewards: U-Net, sum_k grad log r_k, noise
    train-small    a training step of the U-Net
    reward-small-kK    a training step of K rewards, in one program

Work is counted in multiply-adds, 2 FLOPs each, of the convolutions and matrix products in the networks' traced programs
before they are lowered: what the plain convolution does, zeros of the padding included, although gendiff's takes fewer
multiplications on a CPU (Winograd). A gradient is counted with the products it needs, not as a multiple.

`peak` is the fastest product of two large square matrices that JAX or PyTorch did in the same run, and `roofline` the
time of the work at that rate. The figures mean something on a quiet machine only; `pip install -e .[speed]` installs
PyTorch.
"""

import dataclasses
from functools import cache
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from experiments.censoring import mnist
from experiments.censoring.mnist import MnistConfig
from experiments.lab.command import main
from experiments.lab.config import Between, Distinct
from experiments.lab.folder import Folder
from experiments.lab.table import Column, Results
from experiments.speed import ours_censoring, table
from experiments.speed.table import Measured, Sides, TimedConfig, Work, flops
from gendiff.metrics.rates import Estimate

OURS, RIVAL = "experiments.speed.ours_censoring", "experiments.speed.rival_censoring"
TOLERANCE = {"small/samples": 1e-3}
"""Largest difference between the sides over the largest answer; early steps divide rounding errors by alpha."""
EAGER = ("eager", "channels_last")


@dataclasses.dataclass(frozen=True)
class SpeedConfig(TimedConfig):
    """The sizes; by default those of the experiment with MNIST's sevens."""

    rivals: Literal["all", "eager", "none"] = "eager"
    """What to measure beside gendiff; all: `torch.compile` too, which takes most of the time of a run."""
    small: Literal["smoke", "default"] = "default"
    """Preset of `experiments.censoring.mnist` with the networks of the rows `small`."""
    samples: Annotated[int, Between(1, 1_000_000)] = 100
    """Samples of them drawn at a time."""
    steps: Annotated[int, Between(2, 1000)] = 4
    """Steps of sampling timed together."""
    members: Annotated[tuple[int, ...], Between(0, 64), Distinct()] = (0, 1, 5)
    """Numbers K of rewards, a row each."""
    ensemble: Annotated[int, Between(1, 64)] = 5
    """Rewards of the rows `paper` and `reward`."""
    large: Literal["smoke", "default", "paper", "none"] = "paper"
    """Preset with the networks of the row `paper`; none: without the row."""
    large_samples: Annotated[int, Between(1, 1_000_000)] = 16
    """Samples of them drawn at a time."""
    large_steps: Annotated[int, Between(2, 1000)] = 2
    """Steps of sampling timed together."""
    batch: Annotated[int, Between(1, 100_000)] = MnistConfig.training.batch
    """Batch of a training step of the U-Net."""
    train_steps: Annotated[int, Between(1, 100_000)] = 5
    """Steps timed together."""
    reward_batch: Annotated[int, Between(1, 100_000)] = MnistConfig.reward.batch
    """Batch of a training step of each reward."""
    reward_steps: Annotated[int, Between(1, 100_000)] = 5
    """Steps timed together."""


PRESETS = {
    "smoke": SpeedConfig(
        preset="smoke", small="smoke", samples=4, steps=2, members=(1, 2), ensemble=2, large="none", batch=4,
        train_steps=2, reward_batch=4, reward_steps=2, repetitions=2, matmul=128,
    ),
    "default": SpeedConfig(),
    "paper": SpeedConfig(preset="paper", samples=1000, steps=10, large_samples=32, large_steps=10, repetitions=7),
}  # fmt: skip

COLUMNS = (
    *table.SPEED,
    Column("channels_last_ratio", "channels last / gendiff", digits=2),
    Column("one_member_ratio", "k / k1", digits=2),
    *table.COMPILED,
)
NOTES = """\
Median [smallest, largest] of {repetitions} interleaved calls; ratios are of calls of the same repetition. `step`: one
of {steps} steps of {samples} samples ({large_steps} of {large_samples} with the networks `paper`). k / k1: gendiff's
time with K rewards over its time with one; on two cores K = 5 is to stay within 3.5. `train-small`: one step on {batch}
images, Adam with clipped gradients and an average of the weights; `reward-small`: one step on {reward_batch} images for
each reward, AdamW. `matmul`: a product of two {matmul} x {matmul} matrices, by JAX and by PyTorch; peak: {peak:.1f}
GF/s. GF/s: of the plain networks' multiply-adds, see `--help`. compile: the first call less the median, of gendiff with
an empty compile cache and in a second process with the first one's, and of `torch.compile` with empty caches."""


def run(config: SpeedConfig) -> Results:
    """Compares the sides, times them, and writes the table; nothing is kept from an earlier run."""
    folder = Folder("speed.censoring", config)
    rows = rows_of(config)
    measured = table.measure(config, sides(config), rows, folder)
    return table.finish(folder, rows, measured, COLUMNS, NOTES, one_member(rows, measured))


def networks(config: SpeedConfig) -> dict[str, dict[str, Any]]:
    """For each name of networks what `ours_censoring.prepare` is given."""
    small: dict[str, Any] = {
        "preset": config.small,
        "samples": config.samples,
        "steps": config.steps,
        "members": config.members,
    }
    large: dict[str, Any] = {"preset": config.large, "samples": config.large_samples, "steps": config.large_steps}
    every = {"small": small, "paper": large | {"members": (config.ensemble,)}}
    return {name: given for name, given in every.items() if given["preset"] != "none"}


def sides(config: SpeedConfig) -> Sides:
    """The workers and what they are told."""
    same = ("seed", "matmul", "batch", "train_steps", "reward_batch", "reward_steps", "ensemble")
    setup = {"networks": networks(config), **{name: getattr(config, name) for name in same}}
    return Sides(OURS, RIVAL, setup, {"compile": config.rivals == "all"}, TOLERANCE)


def rows_of(config: SpeedConfig) -> dict[str, Work]:
    """The rows of the table."""
    rivals = table.rivals(config, EAGER)
    rows = {}
    for name, given in networks(config).items():
        unet, reward, _, _ = evaluations(given["preset"])
        for members in given["members"]:
            flops = given["samples"] * (unet + members * reward)
            rows[f"step-{name}-k{members}"] = Work(flops, given["samples"], given["steps"], rivals)
    _, _, unet, reward = evaluations(config.small)
    images = config.ensemble * config.reward_batch
    rows["train-small"] = Work(config.batch * unet, config.batch, config.train_steps, rivals)
    rows[f"reward-small-k{config.ensemble}"] = Work(images * reward, images, config.reward_steps, rivals)
    return rows | {"matmul": table.product(config)}


def one_member(rows: dict[str, Work], measured: Measured) -> dict[str, dict[str, Estimate]]:
    """How many times as long a step takes as with one reward."""
    seconds = {name: measured.seconds[f"{name}/gendiff"] for name in rows if name.startswith("step-small-k")}
    one = seconds.pop("step-small-k1", None)
    if one is None:
        return {}
    return {name: {"one_member_ratio": table.spread(each / one)} for name, each in seconds.items()}


@cache
def evaluations(preset: str) -> tuple[float, float, float, float]:
    """FLOPs for one image: of the U-Net, of a reward with its gradient in x, and of both losses' gradients."""
    config = mnist.PRESETS[preset]
    unet, half = mnist.unet_of(config), mnist.reward_of(config)
    theta, phi = ours_censoring.shapes(unet, config.size), ours_censoring.shapes(half, config.size)
    x, t = jax.ShapeDtypeStruct((config.size, config.size, 1), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    total = lambda theta, x, t: jnp.sum(jnp.asarray(unet.apply(theta, x, t)))
    return (
        flops(unet.apply, theta, x, t),
        flops(jax.value_and_grad(half.apply, 1), phi, x, t),
        flops(jax.grad(total), theta, x, t),
        flops(jax.grad(half.apply), phi, x, t),
    )


if __name__ == "__main__":
    main(SpeedConfig, PRESETS, run)
