"""Censored sampling on MNIST's sevens: no crossed ones, from minutes of labels (2307.02770, section 5.1).

A diffusion model learns sevens of which some are crossed. Ten crossed and ten plain samples are marked, by an oracle or
by a person at the labelling page, and the same model stops making crossed ones. A second model, which makes mostly
crossed sevens, is censored in rounds of imitation.
"""

import dataclasses
import hashlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import figures
from experiments.contract import (
    Between,
    Column,
    Config,
    ConfigError,
    Distinct,
    Folder,
    Progress,
    Results,
    Row,
    main,
)
from experiments.lab.experiment import Experiment, Paper
from gendiff import denoiser, distributed, losses, nets, potential, process, static, training
from gendiff.checkpoint import Archive
from gendiff.convert import resnet as convert
from gendiff.convert import state_dict
from gendiff.data import drawn_sevens, files, mnist
from gendiff.feedback import ask, labels
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Labelled
from gendiff.metrics import diversity, rates
from gendiff.metrics.rates import Estimate
from gendiff.nets import resnet
from gendiff.nets.resnet import ResNet
from gendiff.nets.unet import HalfUNet, UNet
from gendiff.oracles import crossed_seven
from gendiff.types import Params, Sample, Samples

KEPT = Path(__file__).with_name("mnist_16.npz")
"""The base model of the default preset, made by `--base train` and `--keep`."""


@dataclasses.dataclass(frozen=True)
class MnistConfig(Config):
    """The data, the models, the labels, the guidance and the evaluation."""

    digits: Literal["mnist", "drawn"] = "mnist"
    """The sevens: MNIST's, or ones drawn on the spot, which need no download (preset smoke)."""
    data: Path | None = None
    """Folder with MNIST's files; default: the folder `mnist` in $GENDIFF_DATA, and without it TFDS."""
    size: Literal[16, 32] = 16
    """Pixels along a side."""
    share: Annotated[float, Between(0.01, 0.5)] = 0.12
    """Crossed sevens among the training images of the first model."""
    malign_share: Annotated[float, Between(0.3, 0.95)] = 0.7
    """The same for the second, malign-dominant one."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the mixes and of the base models: the same for all runs."""

    width: Annotated[int, Between(4, 512)] = 24
    """Channels of the U-Net's first level."""
    multipliers: Annotated[tuple[int, ...], Between(1, 64)] = (1, 2, 4)
    """Channels of its levels in units of the width."""
    blocks: Annotated[int, Between(1, 8)] = 1
    """Residual blocks of a level."""
    attention: Annotated[tuple[int, ...], Between(1, 512, least=0)] = (4,)
    """Heights of the feature maps with attention."""
    base: Literal["kept", "train"] = "kept"
    """Take the first base model that is kept beside this file (for its configuration only), or train it."""
    keep: bool = False
    """Keep the trained first base model beside this file."""
    base_steps: Annotated[int, Between(1, 10_000_000)] = 6000
    """Training steps of the first base model."""
    base_batch: Annotated[int, Between(1, 100_000)] = 64
    """Batch of them."""
    base_rate: Annotated[float, Between(1e-7, 1.0)] = 2e-3
    """Their rate of learning."""
    base_schedule: Literal["cosine", "constant"] = "cosine"
    """How it falls."""
    base_decay: Annotated[float, Between(0.0, 0.99999)] = 0.995
    """Decay of the averaged weights that are sampled from."""
    fully_sharded: bool = False
    """Train base models with only a part of the state on each device (FSDP), for networks too large for one."""
    second_steps: Annotated[int, Between(1, 10_000_000)] = 700
    """Training steps of the second base model, which goes on from the first."""

    labels: Annotated[int, Between(1, 10_000)] = 10
    """Labels of each class for a reward (and for each round of imitation)."""
    rater: Literal["oracle", "person"] = "oracle"
    """Who labels: the oracle, or you, at a page in your browser."""
    members: Annotated[int, Between(1, 100)] = 5
    """Rewards of an ensemble."""
    reward_width: Annotated[int, Between(4, 512)] = 16
    """Channels of the reward's first level."""
    reward_multipliers: Annotated[tuple[int, ...], Between(1, 64)] = (1, 2, 2)
    """Channels of its levels in units of the width."""
    reward_blocks: Annotated[int, Between(1, 8)] = 1
    """Residual blocks of a level."""
    reward_attention: Annotated[tuple[int, ...], Between(1, 512, least=0)] = (4,)
    """Heights of the feature maps with attention."""
    reward_steps: Annotated[int, Between(1, 1_000_000)] = 150
    """Training steps of a reward; three times as many for the union and for all rounds of imitation."""
    reward_batch: Annotated[int, Between(1, 100_000)] = 32
    """Batch of them."""
    reward_rate: Annotated[float, Between(1e-7, 1.0)] = 1e-3
    """Their rate of learning; it falls linearly to 0."""
    benign_weight: Annotated[float, Between(1e-4, 1.0)] = 0.02
    """alpha, the weight of the benign term."""
    union_weight: Annotated[float, Between(1e-4, 1.0)] = 0.005
    """alpha of the union."""
    imitation_weight: Annotated[float, Between(1e-4, 1.0)] = 0.1
    """alpha of imitation."""
    copies: Annotated[int, Between(0, 1000)] = 10
    """Turned copies of each labelled image, by up to 20 degrees."""

    resnet_widths: Annotated[tuple[int, ...], Between(1, 4096)] = (16, 32)
    """Channels of the levels of the time-independent rewards, ResNets of clean images."""
    resnet_blocks: Annotated[tuple[int, ...], Between(1, 64)] = (1, 1)
    """Residual blocks of their levels."""
    resnet_weights: Path | None = None
    """File of torchvision's ImageNet weights (.pth or .safetensors) to begin from, where they are ResNet-18: widths 64
    128 256 512, blocks 2 2 2 2. Default: random values."""

    sampler_steps: Annotated[int, Between(2, 1000)] = 40
    """Steps of ancestral sampling, at equal distances in the 1,000 of the model."""
    guidance_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """omega of the ensemble; single rewards and the union take `members` times as much. 0 chooses it by the sweep, on
    labels and noise of its own, before all other rows; 1 is what the sweep of seed 0 chose (so report other seeds)."""
    sweep: Annotated[tuple[float, ...], Between(1e-6, 1000.0), Distinct()] = (0.5, 1.0, 2.0, 4.0)
    """The omegas of the trade-off curves."""
    universal_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """omega of the time-independent ensemble. 0 chooses it as the other's, in some ten minutes; 1 was the better of 1
    and 4 on the labels and noise that the sweep has."""
    imitation_scale: Annotated[float, Between(0.0, 1000.0)] = 5.0
    """omega of imitation's single reward."""
    recurrence: Annotated[int, Between(1, 100)] = 2
    """R of the rows with recurrence."""
    universal_recurrence: Annotated[int, Between(1, 100)] = 4
    """R of universal guidance."""
    backward: Annotated[int, Between(0, 1000)] = 3
    """B of the rows with backward guidance."""
    backward_rate: Annotated[float, Between(0.0, 1.0)] = 0.01
    """Their rate."""
    active_labels: Annotated[tuple[int, ...], Between(2, 1_000_000)] = (5, 10, 20, 50)
    """Numbers of labels, of both classes, at which active choice and random choice are compared."""
    active_pool: Annotated[int, Between(10, 1_000_000)] = 400
    """Samples that they choose from."""

    trials: Annotated[int, Between(1, 1000)] = 5
    """Trials (labels, rewards and noise anew) of the rows single, union and ensemble."""
    few_trials: Annotated[int, Between(1, 1000)] = 2
    """Trials of the other rows."""
    samples: Annotated[int, Between(20, 1_000_000)] = 200
    """Samples of a trial."""
    label_budget: Annotated[int, Between(20, 10_000_000)] = 4000
    """The most samples that are looked at for the labels of one trial or round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.active_labels
        if list(n) != sorted(set(n)) or n[-1] > self.active_pool:
            raise ConfigError(f"--active-labels must rise, up to --active-pool {self.active_pool}, got {n}")


PRESETS = {
    "smoke": MnistConfig(
        preset="smoke", digits="drawn", share=0.4, base="train", width=8, multipliers=(1, 2), attention=(8,),
        base_steps=300, base_batch=32, second_steps=20, labels=2, members=2, reward_width=8,
        reward_multipliers=(1, 2), reward_attention=(8,), reward_steps=6, copies=2, resnet_widths=(8,),
        resnet_blocks=(1,), sampler_steps=6, sweep=(1.0,), recurrence=2, universal_recurrence=2, backward=1,
        active_labels=(3, 4), active_pool=40, trials=2, few_trials=1, samples=20,
    ),
    "default": MnistConfig(),
    "paper": MnistConfig(
        preset="paper", size=32, width=128, multipliers=(1, 2, 2, 2), blocks=3, attention=(16, 8), base="train",
        base_steps=100_000, base_batch=256, base_rate=1e-4, base_schedule="constant", base_decay=0.9999,
        second_steps=20_000, reward_width=128, reward_multipliers=(1, 2, 2, 2), reward_blocks=2,
        reward_attention=(16, 8, 4), reward_steps=1001, reward_batch=128, reward_rate=3e-4,
        resnet_widths=(64, 128, 256, 512), resnet_blocks=(2, 2, 2, 2), sampler_steps=1000, guidance_scale=1.0,
        universal_scale=2.0, sweep=(0.25, 0.5, 1.0, 2.0, 4.0), recurrence=4, backward=5, backward_rate=2e-4,
        few_trials=5, samples=1000, active_pool=2000,
    ),
}  # fmt: skip

COLUMNS = (
    Column("malign_rate", "malign %", percent=True, digits=2),
    Column("precision", "precision"),
    Column("recall", "recall"),
    Column("evaluations_per_sample", "evaluations per sample", digits=0),
    Column("seconds_per_sample", "seconds per sample"),
    Column("labels", "labels", digits=0),
    Column("labelling_seconds", "labelling seconds", digits=0),
)
NOTES = """\
Intervals are 95 %: Student's over trials where there are five or more, else the mean of the trials' own (Wilson's).
malign: share of crossed sevens among the samples, by the oracle (`gendiff.oracles.crossed_seven`). precision, recall:
Kynkäänniemi's estimates (k = 3) in the oracle's features, of each trial's samples against plain test sevens; they
depend on both numbers, so compare rows, not papers. evaluations: of any network, a gradient counts as two more; for
`rejection` over the share that is kept. seconds: of a warm batch of half a trial. labels: marked samples that a reward
is trained on (all its members together); more were looked at. labelling seconds: the time at a page, on average, for
labels by a person.
`random-N`, `active-N`: N labels in all, drawn at random or where the ensemble so far disagrees most; `universal`:
time-independent ResNets, R = {recurrence}; `omega-X`, `universal-omega-X`: the trade-off. The scale of all ensembles is
{scale:g}{chosen}, that of `universal` {universal:g}{universal_chosen}."""
BASE, SECOND, LABELS, REWARDS, SAMPLES, BOOTSTRAP, ACTIVE, IMITATION, REJECTION, POOL, CLEAN = range(11)
"""What the keys are for."""
TUNING_TRIAL = 1_000_000


def problem(config: MnistConfig) -> censoring.LabelProblem:
    """DDPM with 1,000 linear steps; networks count them from 0, as public checkpoints do."""
    chain = process.ddpm(process.linear_betas(1000))
    return censoring.LabelProblem(
        process=chain,
        model=denoiser.from_epsilon(chain, denoiser.zero_based(unet_of(config).apply)),
        network=denoiser.zero_based(reward_of(config).apply),
        shape=(config.size, config.size, 1),
        steps=config.sampler_steps,
    )


def clean_problem(config: MnistConfig) -> censoring.LabelProblem:
    """The same with time-independent rewards, in the reference's range: without ImageNet's mean and deviation."""
    net = resnet_of(config)
    return problem(config)._replace(
        clean=static.partial(clean_logit, net), in_batch=static.partial(clean_logit_in_batch, net)
    )


def clean_logit(net: ResNet, phi: Params, x0: Sample) -> Array:
    """h of a clean grey image, on three channels."""
    return jnp.asarray(net.apply(phi, coloured(x0)))


def clean_logit_in_batch(net: ResNet, phi: Params, x0: Sample) -> tuple[Array, Params]:
    """The same, and phi with the moments of the batch."""
    return resnet.in_batch(net, phi, coloured(x0))


def coloured(x0: Sample) -> Array:
    """A grey image (h, w, 1) on three channels."""
    return jnp.broadcast_to(x0, (*x0.shape[:-1], 3))


@static.by_value
def base_task(setup: censoring.LabelProblem, batch: int) -> Callable[[Array], training.Task]:
    """Images -> the task of a base model, Ho et al.'s simple loss on eps."""
    loss = losses.denoising(setup.process, setup.model, losses.epsilon_weight(setup.process))
    return lambda images: training.Task(loss, lambda key: training.minibatch(key, images, batch))


def unet_of(config: MnistConfig) -> UNet:
    """The base model's network; 52,538,369 parameters in the preset `paper`."""
    return UNet(config.width, config.multipliers, config.blocks, config.attention, head_channels=None)


def reward_of(config: MnistConfig) -> HalfUNet:
    """The reward's network; 17,835,521 parameters in the preset `paper`."""
    return HalfUNet(
        config.reward_width, config.reward_multipliers, config.reward_blocks, config.reward_attention, head_channels=64
    )


def resnet_of(config: MnistConfig) -> ResNet:
    """The time-independent reward's network; 11,177,025 parameters in the preset `paper`."""
    return ResNet(widths=config.resnet_widths, blocks=config.resnet_blocks)


def new_resnet(config: MnistConfig, key: Array) -> Params:
    """A fresh time-independent reward; with `resnet_weights` only its last layer is."""
    net = resnet_of(config)
    image = jnp.zeros((config.size, config.size, 3))
    start = nets.fresh(net, key, image)
    if config.resnet_weights is None:
        return start
    like = jax.eval_shape(net.clone(outputs=1000).init, key, image)
    return convert.with_head_of(convert.resnet(state_dict.read(config.resnet_weights), like), start)


def initialised(network: Any, config: MnistConfig, key: Array) -> Params:
    """Fresh parameters of a network of images."""
    return nets.fresh(network, key, jnp.zeros((config.size, config.size, 1)), jnp.zeros(()))


class Run:
    """All rows of one seed."""

    def __init__(self, config: MnistConfig, folder: Folder, archive: Archive, progress: Progress) -> None:
        self.config, self.folder, self.archive, self.progress = config, folder, archive, progress
        self.problem, self.clean, self.key = problem(config), clean_problem(config), jax.random.key(config.seed)
        self.mesh = distributed.make_mesh()
        self.rows: list[Row] = []
        self.sheets: dict[str, Samples] = {}
        # As many as are drawn at a time for a row: one compiled program less.
        self.seen_at_once = config.samples // 2 if config.rater == "oracle" else min(config.label_budget, 400)
        self.scale, self.universal_scale = config.guidance_scale, config.universal_scale

    def all(self) -> None:
        """Every row of the table, in its order."""
        config = self.config
        theta = self.base()
        if first := not (self.scale and self.universal_scale):
            self.tune(theta)
        plain = Censoring()
        self.row("uncensored", theta, lambda trial: None, plain, config.trials, 0)
        ensemble = lambda trial: self.rewards(theta, trial)
        one = lambda trial: jax.tree.map(lambda a: a[:1], ensemble(trial))
        own, shared = Censoring(self.scale), Censoring(self.scale * config.members)
        per_class = config.labels
        every = per_class + self.benign_of_union(theta)
        self.row("single", theta, one, shared, config.trials, 2 * per_class)
        self.row("union", theta, lambda trial: self.union(theta, trial), shared, config.trials, every)
        self.row("ensemble", theta, ensemble, own, config.trials, every)
        few = config.few_trials
        again = own._replace(recurrence=config.recurrence)
        back = own._replace(backward=config.backward, backward_rate=config.backward_rate)
        both = again._replace(backward=config.backward, backward_rate=config.backward_rate)
        self.row("ensemble-recurrence", theta, ensemble, again, few, every)
        self.row("ensemble-backward", theta, ensemble, back, few, every)
        self.row("ensemble-recurrence-backward", theta, ensemble, both, few, every)
        universal = self.universal()._replace(scale=self.universal_scale)
        self.row("universal", theta, lambda trial: self.clean_rewards(theta, trial), universal, few, every)
        self.rejection(theta, ensemble, every)
        if not first:
            self.tune(theta)
        self.active(theta)
        second = self.second(theta)
        self.row("uncensored-malign-dominant", second, lambda trial: None, plain, few, 0)
        self.imitation(second, "non-imitation", (3 * config.labels,))
        self.imitation(second, "imitation", (config.labels,) * 3)

    # Data and models.

    def fold(self, purpose: int, trial: int = 0) -> Array:
        return jax.random.fold_in(jax.random.fold_in(self.key, purpose), trial)

    @cache  # noqa: B019 (a run lives as long as its process)
    def images(self, share: float) -> np.ndarray:
        """Training images of a mix."""
        mix = mnist.mix(self.sevens("train"), share, self.config.data_seed)
        return mnist.scaled(mix.images, self.config.size)

    def sevens(self, split: Literal["train", "test"]) -> np.ndarray:
        if self.config.digits == "drawn":
            return drawn_sevens.draw(*{"train": (1000, 1), "test": (400, 2)}[split])
        return distributed.everywhere(lambda: mnist.read(7, split, self.config.data))

    @cache  # noqa: B019
    def benign_features(self) -> np.ndarray:
        """The oracle's features of plain test sevens."""
        pixels = self.sevens("test")
        images = mnist.scaled(pixels[~mnist.naturally_crossed(pixels)], self.config.size)
        answer = crossed_seven.judge(images)
        return np.asarray(answer.features)[np.asarray(answer.logit) < 0]

    def base(self) -> Params:
        """The first base model, mostly benign."""
        config = self.config
        start = initialised(unet_of(config), config, jax.random.fold_in(jax.random.key(config.data_seed), BASE))
        if config.base == "kept":
            return self.archive.once("base", lambda: kept(start, config))
        theta = self.archive.once("base", lambda: self.train_base("base", start, config.share, config.base_steps, BASE))
        if config.keep:
            keep(theta, config)
        return theta

    def second(self, theta: Params) -> Params:
        """The second base model, mostly malign."""
        config = self.config
        train = lambda: self.train_base("second-base", theta, config.malign_share, config.second_steps, SECOND)
        return self.archive.once("second-base", train)

    def train_base(self, phase: str, start: Params, share: float, steps: int, purpose: int) -> Params:
        config = self.config
        every = min(100, steps)
        settings = training.Settings(
            steps, config.base_rate, config.base_decay, every, min(100, steps // 5), config.base_schedule
        )
        task = base_task(self.problem, config.base_batch)
        report = lambda step, metrics: self.progress(phase, step, steps, metrics)
        mesh = distributed.training_mesh(config.base_batch, every_core=True)
        host = training.Host(mesh, self.archive.steps(phase), report, config.fully_sharded)
        key = jax.random.fold_in(jax.random.key(config.data_seed), 100 + purpose)
        return training.train(key, start, task, jnp.asarray(self.images(share)), settings, host).best

    # Labels and rewards.

    def benign(self, images: Samples) -> np.ndarray:
        """The oracle's verdict, True where no stroke crosses the stem."""
        return distributed.by_process(crossed_seven.judge, np.asarray(images)).logit < 0

    def rater(self, phase: str, malign: int, benign: int) -> censoring.Rater:
        """The oracle, or a person at the labelling page, who marks 1 for benign, 0 for malign, and may leave out."""
        if self.config.rater == "oracle":
            return self.benign

        def marked(images: Samples) -> list[float]:
            pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
            # Labels are of their samples: each batch has a folder of its own.
            digest = hashlib.blake2b(pixels.tobytes(), digest_size=4).hexdigest()
            place = self.folder.path / "labels" / f"{phase}-{digest}"
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / "samples.npz", pixels)
            try:
                chosen = ask.ask(place, malign, benign, ask.Options(meaning="a stroke crosses the stem of the seven"))
            except ValueError:  # too few labels, because a signal closed the page
                distributed.stop_if_noticed("every label")
                raise
            marks = np.full(len(images), np.nan)
            marks[np.asarray(chosen.malign)], marks[np.asarray(chosen.benign)] = 0.0, 1.0
            return marks.tolist()

        return lambda images: np.asarray(distributed.first(lambda: marked(images)))  # the page is one process's

    def labelled(self, theta: Params, trial: int) -> Labelled:
        """The labels of a trial, from samples of its own."""
        config = self.config
        draw = lambda key: censoring.draw(self.problem, theta, None, Censoring(), key, self.seen_at_once, self.mesh)
        phase = f"trial-{trial}/labels"
        rater = self.rater(phase.replace("/", "-"), config.labels, config.labels)
        mark = partial(censoring.mark, draw, rater, config.labels, config.labels, config.label_budget)
        return self.archive.once(phase, lambda: mark(self.fold(LABELS, trial))._asdict(), Labelled)

    def pairs(self, theta: Params, trial: int) -> list[tuple[Samples, Samples]]:
        """What each member of a trial's ensemble learns from."""
        labelled = self.labelled(theta, trial)
        return censoring.bootstrap(labelled, self.config.members, self.config.labels, self.fold(BOOTSTRAP, trial))

    def benign_of_union(self, theta: Params) -> float:
        """How many benign labels the ensemble's members have together, on average over the trials."""
        each = [len(censoring.union(self.pairs(theta, trial))[1]) for trial in range(self.config.trials)]
        return float(np.mean(each))

    def rewards(self, theta: Params, trial: int) -> Params:
        """The ensemble of a trial."""
        return self.fit(f"trial-{trial}/ensemble", self.pairs(theta, trial), self.config.benign_weight, 1, trial)

    def clean_rewards(self, theta: Params, trial: int) -> Params:
        """The time-independent ensemble of a trial, with the same labels."""
        pairs = self.pairs(theta, trial)
        return self.fit(f"trial-{trial}/universal", pairs, self.config.benign_weight, 1, trial, clean=True)

    def union(self, theta: Params, trial: int) -> Params:
        """One reward with the labels of all members."""
        pairs = [censoring.union(self.pairs(theta, trial))]
        return self.fit(f"trial-{trial}/union", pairs, self.config.union_weight, 3, trial)

    def fit(
        self,
        phase: str,
        pairs: list[tuple[Samples, Samples]],
        weight: float,
        times: int,
        trial: int,
        clean: bool = False,
    ) -> Params:
        config, key = self.config, self.fold(CLEAN if clean else REWARDS, trial)
        setup, new = (self.clean, partial(new_resnet, config)) if clean else (self.problem, self.new_reward)
        settings = self.reward_training(weight, times * config.reward_steps)
        steps = settings.training.steps
        host = training.Host(None, self.archive.steps(phase), lambda step, m: self.progress(phase, step, steps, m))

        def train() -> Params:
            sets = self.prepare(pairs, jax.random.fold_in(key, 0))
            start = potential.stacked(*(new(jax.random.fold_in(key, 10 + k)) for k in range(len(pairs))))
            return censoring.fit(setup, sets, start, settings, jax.random.fold_in(key, 1), host).last

        return self.archive.once(phase, train)

    def prepare(self, pairs: list[tuple[Samples, Samples]], key: Array) -> censoring.Sets:
        return censoring.augmented(pairs, self.config.copies, key, turn)

    def new_reward(self, key: Array) -> Params:
        return initialised(reward_of(self.config), self.config, key)

    def reward_training(self, weight: float, steps: int) -> censoring.RewardTraining:
        config = self.config
        settings = training.Settings(
            steps, config.reward_rate, decay=0.0, every=min(50, steps), schedule="linear", clip=None, weight_decay=0.05
        )
        return censoring.RewardTraining(settings, config.reward_batch, weight)

    # Samples and rows.

    def draw(self, phase: str, theta: Params, rewards: Params, settings: Censoring, trial: int) -> dict[str, Any]:
        """The samples of a trial, in two halves; the second's time, without compilation, is that of a sample."""
        halves = []
        setup = self.clean if settings.universal else self.problem
        n = self.config.samples // 2
        self.progress(phase, 0, 2, {})
        for i in range(2):
            key = jax.random.fold_in(self.fold(SAMPLES, trial), i)

            def half(key: Array = key) -> dict[str, Any]:
                begun = time.perf_counter()
                drawn = censoring.draw(setup, theta, rewards, settings, key, n, self.mesh)
                return {"samples": drawn, "seconds": (time.perf_counter() - begun) / n}

            halves.append(self.archive.once(f"{phase}/{i}", half))
            self.progress(phase, i + 1, 2, {})
        drawn = np.concatenate([half["samples"] for half in halves])
        return {"samples": drawn, "seconds": float(halves[1]["seconds"])}

    def row(
        self,
        name: str,
        theta: Params,
        rewards: Callable[[int], Params],
        settings: Censoring,
        trials: int,
        labels_used: float,
    ) -> None:
        """Draws the samples of all trials and adds their row."""
        drawn = []
        for trial in range(trials):
            given = rewards(trial)
            drawn.append(self.draw(f"{name}/samples-{trial}", theta, given, settings, trial))
        members = 0 if given is None else potential.leading_size(given)
        cost = censoring.evaluations(self.problem, settings, members)
        self.add(name, [each["samples"] for each in drawn], cost, [each["seconds"] for each in drawn], labels_used)

    def add(self, name: str, trials: list[Samples], cost: float, seconds: Sequence[float], used: float) -> None:
        measured = self.measure(trials) | {
            "evaluations_per_sample": rates.exact(cost),
            "seconds_per_sample": rates.exact(float(np.median(seconds))),
            "labels": rates.exact(used),
        }
        files = sorted((self.folder.path / "labels").glob(f"*/{ask.FILE}"))
        if files and used:
            times = [sum(labels.seconds(labels.read(file)).values()) for file in files]
            measured["labelling_seconds"] = rates.exact(float(np.mean(times)))
        self.rows.append(Row(name, measured))
        self.sheets[name] = trials[0]

    def measure(self, trials: list[Samples]) -> dict[str, Estimate]:
        """Malign rate, precision and recall: over trials."""
        rows = []
        for drawn in trials:
            answer = distributed.by_process(crossed_seven.judge, np.asarray(drawn))
            spread = diversity.precision_recall(self.benign_features(), np.asarray(answer.features))
            malign = rates.rate(int(np.sum(np.asarray(answer.logit) >= 0)), len(drawn))
            rows.append({"malign_rate": malign, "precision": spread.precision, "recall": spread.recall})
        return {name: rates.over_trials([row[name] for row in rows]) for name in rows[0]}

    def universal(self) -> Censoring:
        """How the time-independent rewards guide."""
        return Censoring(recurrence=self.config.universal_recurrence, universal=True)

    def tune(self, theta: Params) -> None:
        """The trade-off curves, on labels and noise that no other row uses; choose the scales that are not given."""
        uncensored = self.draw("omega-0/samples", theta, None, Censoring(), TUNING_TRIAL)["samples"]
        self.curve = {0.0: self.measure([uncensored])}
        self.curve |= self.sweep("omega", theta, self.rewards(theta, TUNING_TRIAL), Censoring())
        self.scale = self.scale or chosen(self.curve)
        if not self.universal_scale:
            rewards = self.clean_rewards(theta, TUNING_TRIAL)
            curve = self.sweep("universal-omega", theta, rewards, self.universal())
            self.universal_scale = chosen({0.0: self.curve[0.0]} | curve)

    def sweep(self, name: str, theta: Params, rewards: Params, settings: Censoring) -> dict[float, dict[str, Estimate]]:
        """Scale -> malign rate, precision and recall, with a row for each."""
        curve = {}
        used = self.config.labels + len(censoring.union(self.pairs(theta, TUNING_TRIAL))[1])
        cost = censoring.evaluations(self.problem, settings, self.config.members)
        for scale in self.config.sweep:
            title = f"{name}-{scale:g}"
            drawn = self.draw(f"{title}/samples", theta, rewards, settings._replace(scale=scale), TUNING_TRIAL)
            curve[scale] = self.measure([drawn["samples"]])
            self.add(title, [drawn["samples"]], cost, [drawn["seconds"]], used)
        return curve

    def rejection(self, theta: Params, ensemble: Callable[[int], Params], used: float) -> None:
        """The uncensored samples, each kept with the probability of its reward."""
        kept, total, seconds = [], 0, []
        for trial in range(self.config.trials):
            drawn = self.draw(f"uncensored/samples-{trial}", theta, None, Censoring(), trial)
            key = self.fold(REJECTION, trial)
            keep = censoring.reject(self.problem, ensemble(trial), drawn["samples"], key, self.scale)
            kept.append(drawn["samples"][keep])
            total += len(keep)
            seconds.append(drawn["seconds"])
        few = min(map(len, kept))
        share = sum(map(len, kept)) / total
        if few <= 3:
            if distributed.is_first():
                print(f"rejection keeps {100 * share:.1f} % of the samples: too few for a row")
            return
        cost = (self.config.sampler_steps + self.config.members) / share
        self.add("rejection", kept, cost, [each / share for each in seconds], used)

    def active(self, theta: Params) -> None:
        """Labels where the ensemble disagrees, against labels at random: one of each class is given to both."""
        config, settings = self.config, Censoring(self.scale)
        drawn: dict[str, list[dict[str, Any]]] = {}
        for trial in range(config.few_trials):
            draw = lambda trial=trial: censoring.draw(
                self.problem, theta, None, Censoring(), self.fold(POOL, trial), config.active_pool, self.mesh
            )
            pool = self.archive.once(f"active/pool-{trial}", lambda draw=draw: {"samples": draw()})["samples"]
            for way in ("random", "active"):
                for n, rewards in self.asked(pool, way, trial):
                    phase = f"{way}-{n}/samples-{trial}"
                    drawn.setdefault(f"{way}-{n}", []).append(self.draw(phase, theta, rewards, settings, trial))
        cost = censoring.evaluations(self.problem, settings, config.members)
        for name, trials in drawn.items():
            seconds = [each["seconds"] for each in trials]
            self.add(name, [each["samples"] for each in trials], cost, seconds, int(name.split("-")[1]))

    def asked(self, pool: Samples, way: str, trial: int) -> Iterator[tuple[int, Params]]:
        """An ensemble for each number of labels, each time with more of the pool's."""
        config, verdict = self.config, self.benign(pool)
        if verdict.all() or not verdict.any():
            raise ValueError(f"--active-pool: expected samples of both classes, given one in all {len(pool)}")
        order = np.random.default_rng((config.seed, trial)).permutation(len(pool))
        rows, rewards = [int(order[np.flatnonzero(verdict[order] == value)[0]]) for value in (False, True)], None
        for n in config.active_labels:
            left = np.array([i for i in order if i not in set(rows)])
            if way == "active" and rewards is not None:
                left = left[np.argsort(-censoring.disagreement(self.problem, rewards, pool[left]), kind="stable")]
            rows += [int(i) for i in left[: n - len(rows)]]
            marked = Labelled(pool[rows][~verdict[rows]], pool[rows][verdict[rows]], len(rows))
            share = min(len(marked.benign), max(len(marked.malign), 1))
            number = trial * 1000 + n
            pairs = censoring.bootstrap(marked, config.members, share, self.fold(ACTIVE, number))
            # The first labels are the same either way.
            phase = f"trial-{trial}/{'random' if n == config.active_labels[0] else way}-{n}"
            rewards = self.fit(phase, pairs, config.benign_weight, 1, ACTIVE * 1_000_000 + number)
            yield n, rewards

    def imitation(self, theta: Params, name: str, per_round: tuple[int, ...]) -> None:
        """Rounds of labels among censored samples; with one round, as many labels of the model itself."""
        config = self.config
        settings = Censoring(config.imitation_scale)
        # 500, 1500, 3000 in the paper's proportion for three rounds, all at once for one.
        shares = (1 / 6, 1 / 2, 1.0) if len(per_round) == 3 else (1.0,)
        ends = tuple(max(1, round(3 * config.reward_steps * share)) for share in shares)
        prepare = lambda marked, key: self.prepare([marked[:2]], key)
        how = censoring.Imitation(
            ends, per_round[0], self.reward_training(config.imitation_weight, ends[-1]), settings, self.seen_at_once,
            config.label_budget,
        )  # fmt: skip
        trials: list[list[Samples]] = [[] for _ in per_round]
        costs: list[dict[str, Any]] = []
        for trial in range(config.few_trials):
            rounds = censoring.imitate(
                self.problem, theta, self.new_reward, self.rater(f"{name}-{trial}", per_round[0], per_round[0]),
                prepare, how, self.fold(IMITATION, trial), self.archive, self.mesh, self.progress,
                f"trial-{trial}/{name}",
            )  # fmt: skip
            for each in rounds:
                phase = f"{name}-{each.number}/samples-{trial}"
                drawn = self.draw(phase, theta, each.rewards, settings, trial)
                trials[each.number - 1].append(drawn["samples"])
                costs.append(drawn)
        cost = censoring.evaluations(self.problem, settings, 1)
        seconds = [each["seconds"] for each in costs]
        for number, drawn_trials in enumerate(trials, 1):
            title = name if len(per_round) == 1 else f"{name}-{number}"
            self.add(title, drawn_trials, cost, seconds, 2.0 * sum(per_round[:number]))


turn = censoring.rotation(20.0)


def chosen(curve: dict[float, dict[str, Estimate]], least: float = 0.85) -> float:
    """The scale with the fewest malign samples among those that keep `least` of the uncensored model's recall."""
    recall = least * curve[0.0]["recall"].value
    able = {
        scale: each["malign_rate"].value for scale, each in curve.items() if scale and each["recall"].value >= recall
    }
    return min(able, key=lambda scale: able[scale]) if able else min(scale for scale in curve if scale)


def unlike(config: MnistConfig) -> list[str]:
    """What a configuration has otherwise than the default preset, of all that its base model depends on."""
    names = (
        "digits", "size", "share", "data_seed", "width", "multipliers", "blocks", "attention", "base_steps",
        "base_batch", "base_rate", "base_schedule", "base_decay",
    )  # fmt: skip
    return [name for name in names if getattr(config, name) != getattr(PRESETS["default"], name)]


def kept(like: Params, config: MnistConfig) -> Params:
    """The kept base model in the structure of `like`."""
    if other := unlike(config):
        raise ValueError(
            f"--base kept: expected the default preset, whose base model is kept, given another {', '.join(other)}; "
            "use --base train"
        )
    leaves, structure = jax.tree.flatten(like)
    try:
        with np.load(KEPT, allow_pickle=False) as stored:
            arrays = [jnp.asarray(stored[f"{i:04d}"], jnp.float32) for i in range(len(stored.files))]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--base kept: {KEPT.name} cannot be read ({error!r}); use --base train") from None
    if [a.shape for a in arrays] != [a.shape for a in leaves]:
        raise ValueError(f"--base kept: {KEPT.name} holds another network than the default preset's; use --base train")
    return jax.tree.unflatten(structure, arrays)


def keep(theta: Params, config: MnistConfig) -> None:
    """Writes the base model beside this file, in float16."""
    if other := unlike(config):
        raise ValueError(f"--keep: expected the default preset, given another {', '.join(other)}")
    arrays = {f"{i:04d}": np.asarray(leaf, np.float16) for i, leaf in enumerate(jax.tree.leaves(theta))}
    files.store(KEPT, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def run(config: MnistConfig) -> Results:
    """Runs what the folder does not hold yet, and writes the table and the figures."""
    folder = Folder("censoring.mnist", config)
    progress = Progress(folder)
    each = Run(config, folder, Archive(folder.path / "checkpoints"), progress)
    each.all()
    progress.close()
    draw_figures(folder, each)
    how = lambda given: "" if given else " (chosen by its sweep)"
    scales = {"scale": each.scale, "chosen": how(config.guidance_scale)}
    scales |= {"universal": each.universal_scale, "universal_chosen": how(config.universal_scale)}
    return folder.finish(each.rows, COLUMNS, NOTES.format(**scales, recurrence=config.universal_recurrence))


def draw_figures(folder: Folder, run: Run) -> None:
    """Sample sheets, the trade-off curve, and labels against rate."""
    many = ("omega", "universal-omega", "random", "active")
    sheets = {
        name: (np.asarray(drawn), run.benign(drawn)) for name, drawn in run.sheets.items() if not name.startswith(many)
    }
    figures.image_sheets(folder.path / "samples.png", sheets)
    table = {row.name: row.metrics for row in run.rows}
    figures.trade_off(
        folder.path / "trade-off.png",
        {scale: (each["recall"], each["malign_rate"]) for scale, each in run.curve.items()},
        {name: (table[name]["recall"], table[name]["malign_rate"]) for name in ("single", "union", "ensemble")},
    )
    sizes = run.config.active_labels
    figures.by_labels(
        folder.path / "labels.png",
        {way: [(n, table[f"{way}-{n}"]["malign_rate"]) for n in sizes] for way in ("random", "active")},
    )


def row_names(config: MnistConfig) -> list[str]:
    """Names of the rows of a run, in their order."""
    sweeps = ["omega"] + ["universal-omega"] * (not config.universal_scale)
    return [
        "uncensored", "single", "union", "ensemble", "ensemble-recurrence", "ensemble-backward",
        "ensemble-recurrence-backward", "universal", "rejection",
        *(f"{sweep}-{scale:g}" for sweep in sweeps for scale in config.sweep),
        *(f"{way}-{n}" for way in ("random", "active") for n in config.active_labels),
        "uncensored-malign-dominant", "non-imitation", "imitation-1", "imitation-2", "imitation-3",
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "censoring.mnist", MnistConfig, PRESETS, run, COLUMNS, row_names,
    Paper("Censored sampling of diffusion models using 3 minutes of human feedback", "2307.02770", "section 5.1"),
    extras=("feedback",),
)  # fmt: skip


if __name__ == "__main__":
    main(MnistConfig, PRESETS, run)
