"""Options and columns of the experiments on censored sampling (2307.02770)."""

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
    """Channels of the levels, in units of the width."""
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
    """File of torchvision's ImageNet weights (.pth or .safetensors) to start from, for the sizes of ResNet-18: widths
    64 128 256 512, blocks 2 2 2 2. Default: random values."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a reward."""

    per_class: Annotated[int, Between(1, 10_000)] = 10
    """Labels per class of a reward, or of a round of imitation."""
    rater: Literal["oracle", "person"] = "oracle"
    """The oracle labels, or you do, at a page in your browser."""
    budget: Annotated[int, Between(20, 10_000_000)] = 4000
    """The most samples that the rater looks at in a trial or round."""
    copies: Annotated[int, Between(0, 1000)] = 10
    """Randomly changed copies of a labelled image, such as rotated ones."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """alpha, the weight of the benign term in the loss of a reward."""

    ensemble: Annotated[float, Between(1e-4, 1.0)] = 0.02
    """alpha of the ensemble."""
    union: Annotated[float, Between(1e-4, 1.0)] = 0.005
    """alpha of the union."""
    imitation: Annotated[float, Between(1e-4, 1.0)] = 0.1
    """alpha of imitation."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Strengths of the guidance."""

    scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 1.0
    """omega of the ensemble; a single reward and the union take `members` times it. 0 chooses omega by the sweep, whose
    labels and noise no row uses. The sweep of MNIST's seed 0 chose 1, so report other seeds."""
    sweep: Annotated[tuple[float, ...], Between(1e-6, 1000.0), Distinct()] = (0.5, 1.0, 2.0, 4.0)
    """The omegas of the trade-off curves."""
    universal_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """omega of the time-independent ensemble. 0 chooses it by a sweep of its own, in ten minutes. On the labels and
    noise of MNIST's sweep, 1 was better than 4."""
    imitation_scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 5.0
    """omega of the single reward of imitation."""
    recurrence: Annotated[int, Between(1, 100)] = 2
    """R of the rows with recurrence."""
    universal_recurrence: Annotated[int, Between(1, 100)] = 4
    """R of universal guidance."""
    backward: Annotated[int, Between(0, 1000)] = 3
    """B of the rows with backward guidance."""
    backward_rate: Annotated[float, Between(0.0, 1.0)] = 0.01
    """Learning rate of backward guidance."""


@dataclasses.dataclass(frozen=True)
class Active:
    """Active against random choice of samples to label."""

    labels: Annotated[tuple[int, ...], Between(2, 1_000_000)] = (5, 10, 20, 50)
    """Numbers of labels, of both classes together, of the rows."""
    pool: Annotated[int, Between(10, 1_000_000)] = 400
    """Samples to choose from."""


@dataclasses.dataclass(frozen=True)
class CensoringConfig(Config):
    """The labels, the rewards, the guidance and the evaluation."""

    labels: Labels = Labels()
    """Labels of a reward."""
    members: Annotated[int, Between(1, 100)] = 5
    """Rewards of an ensemble."""
    reward_network: UNetSize = UNetSize(16, (1, 2, 2))
    """Network of a reward."""
    reward: Training = Training(150, batch=32)
    """Training of a reward, whose rate falls linearly to 0. The union, and all rounds of imitation together, take three
    times the steps."""
    weights: Weights = Weights()
    """alpha, the weight of the benign term in the loss."""
    resnet: ResNetSize = ResNetSize()
    """Network of a time-independent reward."""

    sampler_steps: Annotated[int, Between(2, 1000)] = 40
    """Steps of ancestral sampling, equally spaced in the model's 1,000."""
    guidance: Guidance = Guidance()
    """Strengths of the guidance."""
    active: Active = Active()
    """Active against random choice of samples to label."""

    trials: Annotated[int, Between(1, 1000)] = 5
    """Trials of the rows single, union and ensemble; a trial has its own labels, rewards and noise."""
    few_trials: Annotated[int, Between(1, 1000)] = 2
    """Trials of the other rows."""
    samples: Annotated[int, Between(20, 1_000_000)] = 200
    """Samples of a trial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        labels, pool = self.active.labels, self.active.pool
        if list(labels) != sorted(set(labels)) or labels[-1] > pool:
            raise ConfigError(f"--active.labels must rise, up to --active.pool {pool}, got {labels}")


COLUMNS = (
    Column("malign_rate", "malign %", percent=True, digits=2),
    Column("precision", "precision"),
    Column("recall", "recall"),
    Column("evaluations_per_sample", "evaluations per sample", digits=0),
    Column("seconds_per_sample", "seconds per sample"),
    Column("labels", "labels", digits=0),
    Column("labelling_seconds", "labelling seconds", digits=0),
)
