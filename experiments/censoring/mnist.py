"""Censored sampling of MNIST's sevens: minutes of labels remove the crossed ones (2307.02770, section 5.1).

A diffusion model learns sevens, some of them crossed. An oracle, or a person at the labelling page, marks ten crossed
and ten plain samples, and the same model stops drawing crossed sevens. Rounds of imitation censor a second model, which
draws mostly crossed sevens.
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
from gendiff.types import Params, Sample, Samples

KEPT = Path(__file__).with_name("mnist_16.npz")
"""The base model of the default preset, which `--base train --keep` writes."""


@dataclasses.dataclass(frozen=True)
class MnistConfig(CensoringConfig):
    """The data, the models, the labels, the guidance and the evaluation."""

    digits: Literal["mnist", "drawn"] = "mnist"
    """MNIST's sevens, or synthetic ones (preset smoke), which need no download."""
    data: Path | None = None
    """Folder with MNIST's files; default: the folder `mnist` in $GENDIFF_DATA, or else TFDS."""
    size: Literal[16, 32] = 16
    """Pixels along a side."""
    share: Annotated[float, Between(0.01, 0.5)] = 0.12
    """Share of crossed sevens in the training images of the first base model."""
    malign_share: Annotated[float, Between(0.3, 0.95)] = 0.7
    """Share of crossed sevens in those of the second, malign-dominant one."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the training images and of the base models, which all runs share."""

    unet: UNetSize = UNetSize()
    """Network of the base models."""
    base: Literal["kept", "train"] = "kept"
    """Read the first base model from the file beside this one (default options only), or train it."""
    keep: bool = False
    """Write the trained first base model to the file beside this one."""
    training: Training = Training(6000, rate=2e-3)
    """Training of the first base model; the second one has its batch and rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of their learning rate."""
    decay: Annotated[float, Between(0.0, 0.99999)] = 0.995
    """Decay of their averaged weights, which draw the samples."""
    fully_sharded: bool = False
    """Shard the state of the base models' training over the devices (FSDP), because a large network may not fit one."""
    second_steps: Annotated[int, Between(1, 10_000_000)] = 700
    """Training steps of the second base model, which starts from the first."""


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
Intervals are 95 %: Student's over five or more trials, else the mean of the trials' own (Wilson's). malign: share of
crossed sevens among the samples, by the oracle (`gendiff.oracles.crossed_seven`). precision, recall: Kynkäänniemi's
estimates (k = 3) of a trial's samples against plain test sevens, in the oracle's features. They depend on both numbers
of images, so compare rows, not papers. evaluations: of any network; a gradient counts as two more, and `rejection`
divides by the share that it keeps. seconds: of a warm batch of half a trial. labels: marked samples that all members of
a reward train on; the rater saw more. labelling seconds: the mean time of a person at a page.
`random-N`, `active-N`: N labels in all, drawn at random or where the ensemble so far disagrees most; `universal`:
time-independent ResNets, R = {recurrence}; `omega-X`, `universal-omega-X`: the trade-off. The scale of all ensembles is
{scale:g}{chosen}, that of `universal` {universal:g}{universal_chosen}."""


# The models and their networks.


def problem(config: MnistConfig) -> censoring.LabelProblem:
    """Return DDPM with 1,000 linear steps; its networks count them from 0, as public checkpoints do."""
    chain = process.ddpm(process.linear_betas(1000))
    return censoring.LabelProblem(
        process=chain,
        model=denoiser.from_epsilon(chain, denoiser.zero_based(unet_of(config).apply)),
        network=denoiser.zero_based(reward_of(config).apply),
        shape=(config.size, config.size, 1),
        steps=config.sampler_steps,
    )


def clean_problem(config: MnistConfig) -> censoring.LabelProblem:
    """Return the problem with time-independent rewards, whose images keep their range, as in the reference."""
    net = resnet_of(config)
    return problem(config)._replace(clean=coloured(ResNet.apply, net), in_batch=coloured(resnet.in_batch, net))


@static.by_value
def coloured(function: Callable, net: ResNet) -> Callable[[Params, Sample], Any]:
    """Return (phi, x_0) -> function(net, phi, x_0), with the grey x_0 on three channels."""
    return lambda phi, x0: function(net, phi, jnp.broadcast_to(x0, (*x0.shape[:-1], 3)))


def unet_of(config: MnistConfig) -> UNet:
    """Return the base model's network; 52,538,369 parameters in the preset `paper`."""
    return UNet(*dataclasses.astuple(config.unet), head_channels=None)


def reward_of(config: MnistConfig) -> HalfUNet:
    """Return the reward's network; 17,835,521 parameters in the preset `paper`."""
    return HalfUNet(*dataclasses.astuple(config.reward_network), head_channels=64)


def resnet_of(config: MnistConfig) -> ResNet:
    """Return the time-independent reward's network; 11,177,025 parameters in the preset `paper`."""
    return ResNet(widths=config.resnet.widths, blocks=config.resnet.blocks)


def initialised(network: Any, config: MnistConfig, key: Array) -> Params:
    """Return initial parameters of a network of images."""
    return nets.fresh(network, key, jnp.zeros((config.size, config.size, 1)), jnp.zeros(()))


def new_resnet(config: MnistConfig, key: Array) -> Params:
    """Initialise a time-independent reward; all but its last layer come from `resnet.weights`, if set."""
    net, weights, image = resnet_of(config), config.resnet.weights, jnp.zeros((config.size, config.size, 3))
    start = nets.fresh(net, key, image)
    if weights is None:
        return start
    like = jax.eval_shape(net.clone(outputs=1000).init, key, image)
    return convert.with_head_of(convert.resnet(state_dict.read(weights), like), start)


# The base models.


@static.by_value
def base_task(setup: censoring.LabelProblem, batch: int) -> Callable[[Array], training.Task]:
    """Return images -> the task of a base model, Ho et al.'s simple loss on eps."""
    loss = losses.denoising(setup.process, setup.model, losses.epsilon_weight(setup.process))
    return lambda images: training.Task(loss, lambda key: training.minibatch(key, images, batch))


def sevens(config: MnistConfig, split: Literal["train", "test"]) -> np.ndarray:
    """Read or draw sevens, (n, 28, 28) in 0..255."""
    if config.digits == "drawn":
        return drawn_sevens.draw(*{"train": (1000, 1), "test": (400, 2)}[split])
    return distributed.everywhere(lambda: mnist.read(7, split, config.data))


def base_training(config: MnistConfig, start: Params, images: Samples, steps: int, purpose: int) -> training.Training:
    """Return the training of a base model on images."""
    group = dataclasses.replace(config.training, steps=steps)
    settings = group.settings(config.decay, 100, 100, schedule=config.schedule)
    key = jax.random.fold_in(jax.random.key(config.data_seed), 100 + purpose)
    host = training.Host(fully_sharded=config.fully_sharded)
    task = base_task(problem(config), config.training.batch)
    return training.Training(key, start, task, jnp.asarray(images), settings, host)


def base_models(lab: Lab) -> None:
    """Train the mostly benign model `base`, and from it the mostly malign `second-base`, the same for all runs."""
    config = lab.config
    mesh = distributed.training_mesh(config.training.batch, every_core=True)

    def train(phase: str, start: Params, share: float, steps: int, purpose: int) -> None:
        def job(run: Run) -> training.Training:
            mix = mnist.mix(sevens(config, "train"), share, config.data_seed)
            return base_training(config, start, mnist.scaled(mix.images, config.size), steps, purpose)

        lab.train(phase, job, mesh=mesh, shared=True)

    start = initialised(unet_of(config), config, jax.random.fold_in(jax.random.key(config.data_seed), BASE))
    if config.base == "kept":
        lab.once("base", lambda run: kept(start, config))
    else:
        train("base", start, config.share, config.training.steps, BASE)
        if config.keep:
            keep(lab.runs[0]["base"], config)
    train("second-base", lab.runs[0]["base"], config.malign_share, config.second_steps, SECOND)


def check_default(option: str, config: MnistConfig, advice: str) -> None:
    """Raise ValueError if an option of the first base model differs from the default preset."""
    names = "digits", "size", "share", "data_seed", "unet", "training", "schedule", "decay"
    values = lambda config: {name: value for name, _, value in options(config) if name.split(".")[0] in names}
    default = values(PRESETS["default"])
    if changed := ", ".join(name for name, value in values(config).items() if value != default[name]):
        raise ValueError(f"{option} must have the default preset's base model, got another {changed}: {advice}")


def kept(like: Params, config: MnistConfig) -> Params:
    """Read the kept base model in the structure of `like`."""
    check_default("--base kept", config, "use --base train")
    leaves, structure = jax.tree.flatten(like)
    try:
        stored = files.load(KEPT, "the default preset's base model", *(f"{i:04d}" for i in range(len(leaves))))
    except ValueError as error:
        raise ValueError(f"--base kept: {error}; use --base train") from None
    if [a.shape for a in stored] != [a.shape for a in leaves]:
        raise ValueError(f"--base kept: {KEPT.name} must hold this network, got other shapes: use --base train")
    return jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in stored])


def keep(theta: Params, config: MnistConfig) -> None:
    """Write the base model beside this file, in float16."""
    check_default("--keep", config, "leave it out")
    arrays = {f"{i:04d}": np.asarray(leaf, np.float16) for i, leaf in enumerate(jax.tree.leaves(theta))}
    files.store(KEPT, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


# The table.


def benign(images: Samples) -> np.ndarray:
    """Return the oracle's verdict (n,), True if no stroke crosses the stem."""
    return distributed.by_process(crossed_seven.judge, np.asarray(images)).logit < 0


def measured(real: np.ndarray, images: Samples) -> dict[str, Estimate]:
    """Measure the malign rate, and precision and recall against the oracle's features of real sevens."""
    answer = distributed.by_process(crossed_seven.judge, np.asarray(images))
    spread = diversity.precision_recall(real, np.asarray(answer.features))
    malign = rates.rate(int(np.sum(np.asarray(answer.logit) >= 0)), len(images))
    return {"malign_rate": malign, "precision": spread.precision, "recall": spread.recall}


def plain_features(config: MnistConfig) -> np.ndarray:
    """Return the oracle's features of plain test sevens."""
    pixels = sevens(config, "test")
    answer = crossed_seven.judge(mnist.scaled(pixels[~mnist.naturally_crossed(pixels)], config.size))
    return np.asarray(answer.features)[np.asarray(answer.logit) < 0]


def noisy(config: MnistConfig) -> Reward:
    """Return the reward of noisy images."""
    return Reward(problem(config), partial(initialised, reward_of(config), config))


def study_of(lab: Lab, model: str) -> Study:
    """Return a base model with its rewards and the oracle."""
    config = lab.config
    return Study(
        lab, model, noisy(config), Reward(clean_problem(config), partial(new_resnet, config), CLEAN),
        judge=benign, measure=partial(measured, plain_features(config)), change=censoring.rotation(20.0),
        meaning="a stroke crosses the stem of the seven",
    )  # fmt: skip


def programs(config: MnistConfig) -> dict[str, Program]:
    """Return the programs that take the time."""
    images = of((5500, config.size, config.size, 1))  # MNIST's training images are 5,440

    def base(config: MnistConfig) -> training.Training:
        start = partial(initialised, unet_of(config), config)
        job = lambda key, images: base_training(config, start(key), images, config.training.steps, BASE)
        return abstract(job, KEY, images)

    return plan.censored(config, noisy(config), base)


def table(lab: Lab) -> None:
    """Add the rows of the table, in their order."""
    base_models(lab)
    study = study_of(lab, "base")
    rows.choose_scales(study)
    rows.guidance_rows(study)
    rows.sweep_rows(study)
    labelling.active_rows(study)
    labelling.imitation_rows(dataclasses.replace(study, model="second-base"))


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """Return the text below the table."""
    first, guidance = members[0], members[0].config.guidance
    by_sweep = lambda scale: "" if scale else " (chosen by its sweep)"
    text = NOTES.format(
        recurrence=guidance.universal_recurrence, scale=first["scale"], chosen=by_sweep(guidance.scale),
        universal=first["universal-scale"], universal_chosen=by_sweep(guidance.universal_scale),
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
