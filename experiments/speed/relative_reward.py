"""Speed and memory of relative rewards in Maze2D: gendiff beside the same networks in PyTorch.

The networks are those of `experiments.relative_reward.maze2d`, by default of its preset `paper`: Diffuser's U-Net with
3,682,118 parameters and rewards with 26,019. As in the other speed tables, both frameworks run in processes of their
own, interleaved, and nothing is timed before both give the same answers. The rival is PyTorch eager, without the
anomaly detection that the published code leaves on; `--rivals all` adds `torch.compile` where it can (it has no second
derivatives), which takes minutes.

    reward-step         a training step of a reward, its targets computed by two diffusion models as in the published
                        code
    reward-step-cached  the same with targets that were computed before, for the rewards of several goals: per reward
    diffuser-train      a training step of a diffusion model
    diffuser-denoise    a step of ancestral sampling

Work is counted in multiply-adds, 2 FLOPs each, of the convolutions and matrix products in the networks' traced
programs, as in `experiments.speed.censoring`. `peak` is the fastest product of two large square matrices that either
did in the same run, and `roofline` the time of the work at that rate. The figures mean something on a quiet machine
only; `pip install -e .[speed]` installs PyTorch.
"""

import dataclasses
import importlib.util
from functools import cache
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from experiments.lab.command import main
from experiments.lab.config import Between
from experiments.lab.folder import Folder
from experiments.lab.table import Column, Results
from experiments.relative_reward import maze2d, trajectories
from experiments.speed import ours_relative_reward as ours
from experiments.speed import table
from experiments.speed.table import Sides, TimedConfig, Work, flops
from experiments.speed.worker import Worker
from gendiff import losses
from gendiff.losses import Aligned
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate

OURS, RIVAL = "experiments.speed.ours_relative_reward", "experiments.speed.rival_relative_reward"


@dataclasses.dataclass(frozen=True)
class SpeedConfig(TimedConfig):
    """The sizes; by default those of the paper."""

    rivals: Literal["all", "eager", "none"] = "eager"
    """What to measure beside gendiff; all: `torch.compile` too, which takes most of the time of a run."""
    networks: Literal["smoke", "default", "paper"] = "paper"
    """Preset of `experiments.relative_reward.maze2d` with the networks and the length of the paths."""
    batch: Annotated[int, Between(1, 100_000)] = 256
    """Paths of a training step of a reward."""
    steps: Annotated[int, Between(1, 100_000)] = 2
    """Steps timed together, with the targets computed anew."""
    cached_steps: Annotated[int, Between(1, 100_000)] = 20
    """Steps of each reward timed together, with cached targets."""
    goals: Annotated[int, Between(1, 64)] = 8
    """Rewards that are trained on one pool of targets."""
    pool: Annotated[int, Between(1, 1_000_000)] = 512
    """Examples of the pool."""
    train_batch: Annotated[int, Between(1, 100_000)] = 32
    """Paths of a training step of a diffusion model."""
    train_steps: Annotated[int, Between(1, 100_000)] = 5
    """Steps timed together."""
    samples: Annotated[int, Between(1, ours.PATHS)] = 64
    """Paths drawn at a time."""
    sample_steps: Annotated[int, Between(2, 1000)] = 5
    """Steps of sampling timed together."""


PRESETS = {
    "smoke": SpeedConfig(
        preset="smoke", networks="smoke", batch=8, cached_steps=2, goals=2, pool=16, train_batch=4, train_steps=2,
        samples=4, sample_steps=2, repetitions=2, matmul=128,
    ),
    "default": SpeedConfig(),
    "paper": SpeedConfig(preset="paper", steps=10, cached_steps=100, pool=4096, train_batch=128, repetitions=7),
}  # fmt: skip

COLUMNS = (
    *table.SPEED,
    Column("peak_megabytes", "gendiff peak MB", digits=0),
    Column("eager_peak_megabytes", "eager peak MB", digits=0),
    *table.COMPILED,
)
NOTES = """\
Median [smallest, largest] of {repetitions} interleaved calls; ratios are of calls of the same repetition.
`reward-step`: one step on {batch} paths, Adam. `reward-step-cached`: one step of one of {goals} rewards on {batch}
examples of a pool of {pool}; peak MB: by how much a process grows, at most, for the loss of such a batch and its
gradient. `diffuser-train`: one step on {train_batch} paths, Adam and an average of the weights. `diffuser-denoise`: one
of {sample_steps} steps of {samples} paths. `matmul`: a product of two {matmul} x {matmul} matrices, by JAX and by
PyTorch; peak: {peak:.1f} GF/s. compile: the first call less the median, of gendiff with an empty compile cache and in a
second process with the first one's, and of `torch.compile` with empty caches."""


def run(config: SpeedConfig) -> Results:
    """Compares the sides, times them, and writes the table; nothing is kept from an earlier run."""
    folder = Folder("speed.relative_reward", config)
    rows = rows_of(config)
    measured = table.measure(config, sides(config), rows, folder)
    return table.finish(folder, rows, measured, COLUMNS, NOTES, {"reward-step-cached": peaks(config)})


def sides(config: SpeedConfig) -> Sides:
    """The workers and what they are told."""
    same = ["seed", "matmul", "batch", "steps", "cached_steps", "goals", "pool"]
    same += ["train_batch", "train_steps", "samples", "sample_steps"]
    setup = {"preset": config.networks, "peak": False, **{name: getattr(config, name) for name in same}}
    return Sides(OURS, RIVAL, setup, {"compile": config.rivals == "all"})


def rows_of(config: SpeedConfig) -> dict[str, Work]:
    """The rows of the table."""
    rivals, eager = table.rivals(config), table.rivals(config, compiled=False)
    unet, trained, aligned = evaluations(config.networks)
    batch, train_batch, samples = config.batch, config.train_batch, config.samples
    return {
        "reward-step": Work(batch * (2 * unet + aligned), batch, config.steps, rivals),
        "reward-step-cached": Work(batch * aligned, batch, config.goals * config.cached_steps, eager),
        "diffuser-train": Work(train_batch * trained, train_batch, config.train_steps, rivals),
        "diffuser-denoise": Work(samples * unet, samples, config.sample_steps, rivals),
        "matmul": table.product(config),
    }


@cache
def evaluations(preset: str) -> tuple[float, float, float]:
    """FLOPs for one path: of the U-Net, of its loss's gradient, and of the gradient of a reward's alignment."""
    config = maze2d.PRESETS[preset]
    unet, reward = trajectories.unet_of(config), ours.reward_of(config)
    theta, phi = ours.shapes(unet, config), ours.shapes(reward, config)
    x, t = jax.ShapeDtypeStruct(ours.shape(config), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    total = lambda theta, x, t: jnp.sum(jnp.asarray(unet.apply(theta, x, t)))
    loss = losses.gradient_alignment(reward.apply)  # type: ignore[arg-type]
    align = lambda phi, x, t: loss(phi, jax.random.key(0), Aligned(x, t, x, jnp.ones(())))
    return flops(unet.apply, theta, x, t), flops(jax.grad(total), theta, x, t), flops(jax.grad(align), phi, x, t)


def peaks(config: SpeedConfig) -> dict[str, Estimate]:
    """The memory of a reward's step on both sides, in processes of their own."""
    # With one arena, glibc can give back all that is free before it is measured what a call needs.
    given, environment = sides(config), {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
    setup: dict[str, Any] = given.setup | {"peak": True}
    found = {}
    with Worker(OURS, setup, environment) as worker:
        told = worker.answers
        found["peak_megabytes"] = told["peak"]
    if config.rivals != "none" and importlib.util.find_spec("torch") is not None:
        with Worker(RIVAL, setup | told | {"compile": False, "peak": True}, environment) as worker:
            found["eager_peak_megabytes"] = worker.answers["peak"]
    return {name: rates.exact(size / 2**20) for name, size in found.items() if size is not None}


if __name__ == "__main__":
    main(SpeedConfig, PRESETS, run)
