"""Options and columns that the experiments of censored sampling (2307.02770) share."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from experiments.lab.config import Between, Config, ConfigError, Distinct, SameProgram, Training
from experiments.lab.table import Column


@dataclasses.dataclass(frozen=True)
class UNetSize:
    """A U-Net, or its first half."""

    width: Annotated[int, Between(4, 512)] = 24
    """Channels of the first level."""
    multipliers: Annotated[tuple[int, ...], Between(1, 64)] = (1, 2, 4)
    """Channels of the levels in units of the width."""
    blocks: Annotated[int, Between(1, 8)] = 1
    """Residual blocks of a level."""
    attention: Annotated[tuple[int, ...], Between(1, 512, least=0)] = (4,)
    """Heights of the feature maps with attention."""


@dataclasses.dataclass(frozen=True)
class ResNetSize:
    """A ResNet of clean images."""

    widths: Annotated[tuple[int, ...], Between(1, 4096)] = (16, 32)
    """Channels of the levels."""
    blocks: Annotated[tuple[int, ...], Between(1, 64)] = (1, 1)
    """Residual blocks of the levels."""
    weights: Path | None = None
    """File of torchvision's ImageNet weights (.pth or .safetensors) to begin from, where the sizes are those of
    ResNet-18: widths 64 128 256 512, blocks 2 2 2 2. Default: random values."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a reward."""

    per_class: Annotated[int, Between(1, 10_000)] = 10
    """Labels of each class for a reward (and for each round of imitation)."""
    rater: Literal["oracle", "person"] = "oracle"
    """Who labels: the oracle, or you, at a page in your browser."""
    budget: Annotated[int, Between(20, 10_000_000)] = 4000
    """The most samples that are looked at for the labels of one trial or round."""
    copies: Annotated[int, Between(0, 1000)] = 10
    """Randomly changed copies of each labelled image, such as turned ones."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """alpha, the weight of the benign term in the loss of a reward."""

    ensemble: Annotated[float, Between(1e-4, 1.0)] = 0.02
    """Of the ensemble."""
    union: Annotated[float, Between(1e-4, 1.0)] = 0.005
    """Of the union."""
    imitation: Annotated[float, Between(1e-4, 1.0)] = 0.1
    """Of imitation."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How rewards guide."""

    scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 1.0
    """omega of the ensemble; single rewards and the union take `members` times as much. 0 chooses it by the sweep, on
    labels and noise of its own; 1 is what the sweep of MNIST's seed 0 chose (so report other seeds)."""
    sweep: Annotated[tuple[float, ...], Between(1e-6, 1000.0), Distinct()] = (0.5, 1.0, 2.0, 4.0)
    """The omegas of the trade-off curves."""
    universal_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """omega of the time-independent ensemble. 0 chooses it as the other's, in some ten minutes; 1 was the better of 1
    and 4 on the labels and noise that MNIST's sweep has."""
    imitation_scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 5.0
    """omega of imitation's single reward."""
    recurrence: Annotated[int, Between(1, 100)] = 2
    """R of the rows with recurrence."""
    universal_recurrence: Annotated[int, Between(1, 100)] = 4
    """R of universal guidance."""
    backward: Annotated[int, Between(0, 1000)] = 3
    """B of the rows with backward guidance."""
    backward_rate: Annotated[float, Between(0.0, 1.0)] = 0.01
    """Their rate."""


@dataclasses.dataclass(frozen=True)
class Active:
    """Active choice of labels against random choice."""

    labels: Annotated[tuple[int, ...], Between(2, 1_000_000)] = (5, 10, 20, 50)
    """Numbers of labels, of both classes, at which they are compared."""
    pool: Annotated[int, Between(10, 1_000_000)] = 400
    """Samples that they choose from."""


@dataclasses.dataclass(frozen=True)
class CensoringConfig(Config):
    """The labels, the rewards, the guidance and the evaluation."""

    labels: Labels = Labels()
    """Of a reward."""
    members: Annotated[int, Between(1, 100)] = 5
    """Rewards of an ensemble."""
    reward_network: UNetSize = UNetSize(16, (1, 2, 2))
    """Of a reward."""
    reward: Training = Training(150, batch=32)
    """Of a reward, with three times the steps for the union and for all rounds of imitation; the rate falls linearly
    to 0."""
    weights: Weights = Weights()
    """alpha."""
    resnet: ResNetSize = ResNetSize()
    """Of the time-independent rewards."""

    sampler_steps: Annotated[int, Between(2, 1000)] = 40
    """Steps of ancestral sampling, at equal distances in the 1,000 of the model."""
    guidance: Guidance = Guidance()
    """How rewards guide."""
    active: Active = Active()
    """Active choice of labels."""

    trials: Annotated[int, Between(1, 1000)] = 5
    """Trials (labels, rewards and noise anew) of the rows single, union and ensemble."""
    few_trials: Annotated[int, Between(1, 1000)] = 2
    """Trials of the other rows."""
    samples: Annotated[int, Between(20, 1_000_000)] = 200
    """Samples of a trial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n, pool = self.active.labels, self.active.pool
        if list(n) != sorted(set(n)) or n[-1] > pool:
            raise ConfigError(f"--active.labels must rise, up to --active.pool {pool}, got {n}")


COLUMNS = (
    Column("malign_rate", "malign %", percent=True, digits=2),
    Column("precision", "precision"),
    Column("recall", "recall"),
    Column("evaluations_per_sample", "evaluations per sample", digits=0),
    Column("seconds_per_sample", "seconds per sample"),
    Column("labels", "labels", digits=0),
    Column("labelling_seconds", "labelling seconds", digits=0),
)
