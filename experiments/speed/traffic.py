"""Speed of the traffic experiment: the oracle, a training step and a guided evaluation, gendiff beside PyTorch.

The networks are those of `experiments.genneg.traffic`, by default of its preset `default`. As in the other speed
tables, both frameworks run in processes of their own, interleaved, and nothing is timed before both give the same
answers. The rival is PyTorch eager; `--rivals all` adds `torch.compile`, which takes minutes.

    oracle         all oracles on scenes of twelve vehicles, each with a map of its own: overlaps of all pairs, and
                   which vehicles leave the road
    train-step     a training step of the denoiser, the map's encoder included: Adam and an average of the weights
    sample-step    a step of DDIM guided by one classifier of vehicles: denoiser, gradient of log C; the maps' keys and
                   values are there already

Work is counted in multiply-adds, 2 FLOPs each, of the convolutions and matrix products in the networks' traced
programs, as in `experiments.speed.censoring`; the oracle has none. One noise level, so one embedding of it, serves a
whole step of a sampler. `peak` is the fastest product of two large square matrices that either did in the same run, and
`roofline` the time of the work at that rate. The figures mean something on a quiet machine only; `pip install -e
.[speed]` installs PyTorch.
"""

import dataclasses
from functools import cache
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from experiments.genneg import traffic
from experiments.genneg.traffic import TrafficConfig
from experiments.lab.command import main
from experiments.lab.config import Between, ConfigError
from experiments.lab.folder import Folder
from experiments.lab.table import Results
from experiments.speed import ours_traffic as ours
from experiments.speed import table
from experiments.speed.table import Sides, TimedConfig, Work, flops
from gendiff import losses
from gendiff.data import traffic as data

OURS, RIVAL = "experiments.speed.ours_traffic", "experiments.speed.rival_traffic"
TOLERANCE = {"gradient": 3e-4, "guidance": 3e-4, "guided": 3e-4, "samples": 1e-3}
"""Largest difference between the sides over the largest answer; at low noise gaps and edges are seen sharply."""


@dataclasses.dataclass(frozen=True)
class SpeedConfig(TimedConfig):
    """The sizes; by default those of the experiment on two cores."""

    rivals: Literal["all", "eager", "none"] = "eager"
    """What to measure beside gendiff; all: `torch.compile` too, which takes most of the time of a run."""
    networks: Literal["smoke", "default", "paper"] = "default"
    """Preset of `experiments.genneg.traffic` with the networks."""
    cells: Annotated[int, Between(16, 1024)] = data.CELLS
    """Cells of a map along each side, a multiple of 16."""
    oracle_scenes: Annotated[int, Between(1, 1_000_000)] = 4096
    """Scenes that the oracle is asked about at a time."""
    oracle_steps: Annotated[int, Between(1, 100_000)] = 4
    """Times it is, in a call."""
    batch: Annotated[int, Between(1, 100_000)] = TrafficConfig.base_batch
    """Scenes of a training step."""
    train_steps: Annotated[int, Between(1, 100_000)] = 32
    """Steps timed together: as many as `training.train` makes between two looks at the clock."""
    samples: Annotated[int, Between(1, 100_000)] = 256
    """Scenes drawn at a time."""
    sample_steps: Annotated[int, Between(1, 1000)] = 4
    """Steps of sampling timed together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells % 16:
            raise ConfigError(f"--cells must be a multiple of 16, got {self.cells}")


PRESETS = {
    "smoke": SpeedConfig(
        preset="smoke", networks="smoke", cells=64, oracle_scenes=16, oracle_steps=2, batch=4, train_steps=2, samples=4,
        sample_steps=2, repetitions=2, matmul=128,
    ),
    "default": SpeedConfig(),
    "paper": SpeedConfig(
        preset="paper", networks="paper", oracle_scenes=16_384, batch=traffic.PRESETS["paper"].base_batch,
        repetitions=7,
    ),
}  # fmt: skip

COLUMNS = (*table.SPEED, *table.COMPILED)
NOTES = """\
Median [smallest, largest] of {repetitions} interleaved calls; ratios are of calls of the same repetition. samples: the
oracle's are vehicles, twelve in each of {oracle_scenes} scenes with maps of {cells} x {cells} cells; on two cores it is
to check 1,000,000 of them a second. `train-step`: one step on {batch} scenes, Adam with clipped gradients and an
average of the weights; it is to be 1.3 times as fast as PyTorch eager. `sample-step`: one of {sample_steps} steps of
{samples} scenes, guided by one classifier of vehicles. `matmul`: a product of two {matmul} x {matmul} matrices, by JAX
and by PyTorch; peak: {peak:.1f} GF/s. compile: the first call less the median, of gendiff with an empty compile cache
and in a second process with the first one's, and of `torch.compile` with empty caches."""


def run(config: SpeedConfig) -> Results:
    """Compares the sides, times them, and writes the table; nothing is kept from an earlier run."""
    folder = Folder("speed.traffic", config)
    rows = rows_of(config)
    measured = table.measure(config, sides(config), rows, folder)
    return table.finish(folder, rows, measured, COLUMNS, NOTES)


def sides(config: SpeedConfig) -> Sides:
    """The workers and what they are told."""
    same = ("seed", "matmul", "cells", "oracle_scenes", "oracle_steps", "batch", "train_steps", "samples")
    setup = {name: getattr(config, name) for name in (*same, "sample_steps")} | {"preset": config.networks}
    return Sides(OURS, RIVAL, setup, {"compile": config.rivals == "all"}, TOLERANCE)


def rows_of(config: SpeedConfig) -> dict[str, Work]:
    """The rows of the table."""
    rivals = table.rivals(config)
    trained, guided = evaluations(config.networks, config.cells, config.batch, config.samples)
    return {
        "oracle": Work(0.0, config.oracle_scenes * data.VEHICLES, config.oracle_steps, rivals),
        "train-step": Work(trained, config.batch, config.train_steps, rivals),
        "sample-step": Work(guided, config.samples, config.sample_steps, rivals),
        "matmul": table.product(config),
    }


@cache
def evaluations(preset: str, cells: int, batch: int, samples: int) -> tuple[float, float]:
    """FLOPs of the gradient of a batch's loss, and of the guided denoiser on samples at one noise level."""
    config = traffic.PRESETS[preset]
    problem = traffic.problem(config)
    loss = losses.mean(ours.denoising(problem))
    theta, classifier = ours.shapes(traffic.denoiser_network(config)), ours.shapes(ours.classifier_of(config))
    x, places = ours.shaped((batch, data.VEHICLES, 7)), ours.place_shapes(cells, batch)
    trained = flops(jax.grad(loss), theta, jax.random.key(0), (places, x))
    x, places = ours.shaped((samples, data.VEHICLES, 7)), ours.place_shapes(cells, samples)
    total = lambda bound, x, t: jnp.sum(jax.nn.log_sigmoid(problem.network(bound, x, t)))
    guided = 0.0
    for function, bind, net in (
        (problem.model, problem.bind, theta),
        (jax.value_and_grad(total, 1), problem.bind_network, classifier),
    ):
        assert bind is not None
        bound = jax.eval_shape(jax.vmap(bind, (None, 0), ours.BOUND), net, places)
        guided += flops(jax.vmap(function, (ours.BOUND, 0, None)), bound, x, jnp.int32(1))  # type: ignore[arg-type]
    return trained, guided


if __name__ == "__main__":
    main(SpeedConfig, PRESETS, run)
