"""Censored sampling on MNIST's sevens: no crossed ones, from minutes of labels (2307.02770, section 5.1).

A diffusion model learns sevens of which some are crossed. Ten crossed and ten plain samples are marked, by an oracle or
by a person at the labelling page, and the same model stops making crossed ones. A second model, which makes mostly
crossed sevens, is censored in rounds of imitation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.censoring import labelling, rows
from experiments.censoring import programs as plan
from experiments.censoring.config import COLUMNS, Active, CensoringConfig, Guidance, Labels, ResNetSize, UNetSize
from experiments.censoring.trials import BASE, CLEAN, SECOND, Reward, Study
from experiments.lab.config import Between, Training, options
from experiments.lab.experiment import Experiment, Paper
from experiments.lab.phases import Lab, Run
from experiments.lab.programs import KEY, Program, abstract, of
from experiments.lab.table import Row
from gendiff import denoiser, distributed, losses, nets, process, static, training
from gendiff.convert import resnet as convert
from gendiff.convert import state_dict
from gendiff.data import drawn_sevens, files, mnist
from gendiff.methods import censoring
from gendiff.metrics import diversity, rates
from gendiff.metrics.rates import Estimate
from gendiff.nets import resnet
from gendiff.nets.resnet import ResNet
from gendiff.nets.unet import HalfUNet, UNet
from gendiff.oracles import crossed_seven
from gendiff.types import Params, PRNGKey, Sample, Samples

KEPT = Path(__file__).with_name("mnist_16.npz")
"""The base model of the default preset, made by `--base train` and `--keep`."""


@dataclasses.dataclass(frozen=True)
class MnistConfig(CensoringConfig):
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

    unet: UNetSize = UNetSize()
    """Of the base models."""
    base: Literal["kept", "train"] = "kept"
    """Take the first base model that is kept beside this file (for its configuration only), or train it."""
    keep: bool = False
    """Keep the trained first base model beside this file."""
    training: Training = Training(6000, rate=2e-3)
    """Of the first base model; batch and rate of the second one too."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How their rate falls."""
    decay: Annotated[float, Between(0.0, 0.99999)] = 0.995
    """Decay of the averaged weights that are sampled from."""
    fully_sharded: bool = False
    """Train base models with only a part of the state on each device (FSDP), for networks too large for one."""
    second_steps: Annotated[int, Between(1, 10_000_000)] = 700
    """Training steps of the second base model, which goes on from the first."""


PRESETS = {
    "smoke": MnistConfig(
        preset="smoke", digits="drawn", share=0.4, base="train", unet=UNetSize(8, (1,), attention=()),
        training=Training(100, batch=32, rate=2e-3), second_steps=100, labels=Labels(2, copies=2), members=2,
        reward_network=UNetSize(8, (1,), attention=()), reward=Training(6, batch=32), resnet=ResNetSize((8,), (1,)),
        sampler_steps=6, guidance=Guidance(sweep=(1.0,), universal_recurrence=2, backward=1),
        active=Active((3, 4), 40), trials=2, few_trials=1, samples=20,
    ),
    "default": MnistConfig(),
    "paper": MnistConfig(
        preset="paper", size=32, unet=UNetSize(128, (1, 2, 2, 2), 3, (16, 8)), base="train",
        training=Training(100_000, batch=256, rate=1e-4), schedule="constant", decay=0.9999, second_steps=20_000,
        reward_network=UNetSize(128, (1, 2, 2, 2), 2, (16, 8, 4)), reward=Training(1001, batch=128, rate=3e-4),
        resnet=ResNetSize((64, 128, 256, 512), (2, 2, 2, 2)), sampler_steps=1000,
        guidance=Guidance(
            universal_scale=2.0, sweep=(0.25, 0.5, 1.0, 2.0, 4.0), recurrence=4, backward=5, backward_rate=2e-4
        ),
        active=Active(pool=2000), few_trials=5, samples=1000,
    ),
}  # fmt: skip

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


# The models and their networks.


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


def unet_of(config: MnistConfig) -> UNet:
    """The base model's network; 52,538,369 parameters in the preset `paper`."""
    return UNet(*dataclasses.astuple(config.unet), head_channels=None)


def reward_of(config: MnistConfig) -> HalfUNet:
    """The reward's network; 17,835,521 parameters in the preset `paper`."""
    return HalfUNet(*dataclasses.astuple(config.reward_network), head_channels=64)


def resnet_of(config: MnistConfig) -> ResNet:
    """The time-independent reward's network; 11,177,025 parameters in the preset `paper`."""
    return ResNet(widths=config.resnet.widths, blocks=config.resnet.blocks)


def initialised(network: Any, config: MnistConfig, key: Array) -> Params:
    """Fresh parameters of a network of images."""
    return nets.fresh(network, key, jnp.zeros((config.size, config.size, 1)), jnp.zeros(()))


def new_resnet(config: MnistConfig, key: Array) -> Params:
    """A fresh time-independent reward; with `resnet.weights` only its last layer is."""
    net, weights, image = resnet_of(config), config.resnet.weights, jnp.zeros((config.size, config.size, 3))
    start = nets.fresh(net, key, image)
    if weights is None:
        return start
    like = jax.eval_shape(net.clone(outputs=1000).init, key, image)
    return convert.with_head_of(convert.resnet(state_dict.read(weights), like), start)


# The base models.


@static.by_value
def base_task(setup: censoring.LabelProblem, batch: int) -> Callable[[Array], training.Task]:
    """Images -> the task of a base model, Ho et al.'s simple loss on eps."""
    loss = losses.denoising(setup.process, setup.model, losses.epsilon_weight(setup.process))
    return lambda images: training.Task(loss, lambda key: training.minibatch(key, images, batch))


def sevens(config: MnistConfig, split: Literal["train", "test"]) -> np.ndarray:
    """The sevens, (n, 28, 28) in 0..255."""
    if config.digits == "drawn":
        return drawn_sevens.draw(*{"train": (1000, 1), "test": (400, 2)}[split])
    return distributed.everywhere(lambda: mnist.read(7, split, config.data))


def mixed(config: MnistConfig, share: float) -> Samples:
    """Training images with this share of crossed sevens."""
    return mnist.scaled(mnist.mix(sevens(config, "train"), share, config.data_seed).images, config.size)


def base_training(config: MnistConfig, start: Params, images: Samples, steps: int, purpose: int) -> training.Training:
    """The training of a base model on images."""
    group = dataclasses.replace(config.training, steps=steps)
    settings = group.settings(config.decay, 100, 100, schedule=config.schedule)
    key = jax.random.fold_in(jax.random.key(config.data_seed), 100 + purpose)
    host = training.Host(fully_sharded=config.fully_sharded)
    task = base_task(problem(config), config.training.batch)
    return training.Training(key, start, task, jnp.asarray(images), settings, host)


def train_base(lab: Lab, phase: str, start: Params, share: float, *how: int) -> None:
    """Train a base model, the same for all runs."""
    mesh = distributed.training_mesh(lab.config.training.batch, every_core=True)
    asked = lambda run: base_training(run.config, start, mixed(run.config, share), *how)
    lab.train(phase, asked, mesh=mesh, shared=True)


def base_models(lab: Lab) -> None:
    """The first base model, `base`, mostly benign; the second one, `second-base`, mostly malign, goes on from it."""
    config = lab.config
    start = initialised(unet_of(config), config, jax.random.fold_in(jax.random.key(config.data_seed), BASE))
    if config.base == "kept":
        lab.once("base", lambda run: kept(start, config))
    else:
        train_base(lab, "base", start, config.share, config.training.steps, BASE)
        if config.keep:
            keep(lab.runs[0]["base"], config)
    train_base(lab, "second-base", lab.runs[0]["base"], config.malign_share, config.second_steps, SECOND)


def unlike(config: MnistConfig) -> list[str]:
    """What a configuration has otherwise than the default preset, of all that its base model depends on."""
    names = "digits", "size", "share", "data_seed", "unet", "training", "schedule", "decay"
    values = lambda config: {name: value for name, _, value in options(config) if name.split(".")[0] in names}
    default = values(PRESETS["default"])
    return [name for name, value in values(config).items() if value != default[name]]


def kept(like: Params, config: MnistConfig) -> Params:
    """The kept base model in the structure of `like`."""
    if other := unlike(config):
        raise ValueError(
            f"--base kept: expected the default preset, whose base model is kept, given another {', '.join(other)}; "
            "use --base train"
        )
    leaves, structure = jax.tree.flatten(like)
    try:
        stored = files.load(KEPT, "the default preset's base model", *(f"{i:04d}" for i in range(len(leaves))))
    except ValueError as error:
        raise ValueError(f"--base kept: {error}; use --base train") from None
    if [a.shape for a in stored] != [a.shape for a in leaves]:
        raise ValueError(f"--base kept: {KEPT.name} holds another network than the default preset's; use --base train")
    return jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in stored])


def keep(theta: Params, config: MnistConfig) -> None:
    """Write the base model beside this file, in float16."""
    if other := unlike(config):
        raise ValueError(f"--keep: expected the default preset, given another {', '.join(other)}")
    arrays = {f"{i:04d}": np.asarray(leaf, np.float16) for i, leaf in enumerate(jax.tree.leaves(theta))}
    files.store(KEPT, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


# The table.


def benign(images: Samples) -> np.ndarray:
    """The oracle's verdict, True where no stroke crosses the stem."""
    return distributed.by_process(crossed_seven.judge, np.asarray(images)).logit < 0


def measured(real: np.ndarray, images: Samples) -> dict[str, Estimate]:
    """Malign rate, and precision and recall against the oracle's features of real sevens."""
    answer = distributed.by_process(crossed_seven.judge, np.asarray(images))
    spread = diversity.precision_recall(real, np.asarray(answer.features))
    malign = rates.rate(int(np.sum(np.asarray(answer.logit) >= 0)), len(images))
    return {"malign_rate": malign, "precision": spread.precision, "recall": spread.recall}


def plain_features(config: MnistConfig) -> np.ndarray:
    """The oracle's features of plain test sevens."""
    pixels = sevens(config, "test")
    answer = crossed_seven.judge(mnist.scaled(pixels[~mnist.naturally_crossed(pixels)], config.size))
    return np.asarray(answer.features)[np.asarray(answer.logit) < 0]


turn = censoring.rotation(20.0)


def noisy(config: MnistConfig) -> Reward:
    """The reward of noisy images."""
    return Reward(problem(config), partial(initialised, reward_of(config), config))


def study_of(lab: Lab, model: str) -> Study:
    """A base model with its rewards and the oracle."""
    config = lab.config
    return Study(
        lab, model, noisy(config), Reward(clean_problem(config), partial(new_resnet, config), CLEAN),
        judge=benign, measure=partial(measured, plain_features(config)), change=turn,
        meaning="a stroke crosses the stem of the seven",
    )  # fmt: skip


def programs(config: MnistConfig) -> dict[str, Program]:
    """The programs that take the time."""
    images = of((5500, config.size, config.size, 1))  # MNIST's mixes have 5,440

    def base(config: MnistConfig, key: PRNGKey, images: Samples) -> training.Training:
        start = initialised(unet_of(config), config, key)
        return base_training(config, start, images, config.training.steps, BASE)

    return plan.censored(config, noisy(config), lambda config: abstract(partial(base, config), KEY, images))


def table(lab: Lab) -> None:
    """Every row of the table, in its order."""
    base_models(lab)
    study = study_of(lab, "base")
    rows.choose_scales(study)
    rows.guidance_rows(study)
    rows.sweep_rows(study)
    labelling.active_rows(study)
    labelling.imitation_rows(dataclasses.replace(study, model="second-base"))


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """The text below the table."""
    first, guidance = members[0], members[0].config.guidance
    how = lambda scale: "" if scale else " (chosen by its sweep)"
    text = NOTES.format(
        recurrence=guidance.universal_recurrence, scale=first["scale"], chosen=how(guidance.scale),
        universal=first["universal-scale"], universal_chosen=how(guidance.universal_scale),
    )  # fmt: skip
    return "\n".join([text, *first.remarks])


EXPERIMENT = Experiment(
    "censoring.mnist", MnistConfig, PRESETS, table, COLUMNS, rows.row_names,
    Paper("Censored sampling of diffusion models using 3 minutes of human feedback", "2307.02770", "section 5.1"),
    extras=("data", "feedback"), notes=notes, figures=partial(rows.draw_figures, benign), programs=programs,
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
