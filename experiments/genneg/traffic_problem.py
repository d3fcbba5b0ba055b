"""Gen-neG on scenes of traffic (2307.16463, section 6.2, Table 1 and Figure 1).

A sample places twelve vehicles on a map, no two overlapping, none off the road.  A diffusion model learns scenes of a
traffic simulator, and an oracle says which constraints its samples break.  Classifiers steer it away from them, by
scene, by vehicle, or by pair of vehicles.  This file has the options, scenes and networks; `traffic` has the rows.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.genneg.measures import Bound, Smc
from experiments.genneg.rows import Draws
from experiments.lab import start
from experiments.lab.config import Between, Config, ConfigError, SameProgram, Training, Validated
from gendiff import denoiser, likelihood, losses, potential, process, sampling, static
from gendiff.data import scenes
from gendiff.data import traffic as data
from gendiff.data.scenes import UNITS, Sets
from gendiff.data.sumo import SumoError
from gendiff.denoiser import Denoiser, Model
from gendiff.losses import Weight
from gendiff.methods import genneg
from gendiff.nets.scene_network import SceneNetwork
from gendiff.nets.scene_transformer import Head, SceneTransformer
from gendiff.oracles import traffic as oracle
from gendiff.process import Process
from gendiff.types import PRNGKey, Sample, Scalar

DATA_STD = 1.0
"""EDM's sigma_data, in the network's coordinates."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A transformer over vehicles."""

    width: Annotated[int, Between(16, 4096)] = 128
    """Width."""
    layers: Annotated[int, Between(1, 64)] = 4
    """Pairs of self-attention and attention to the map."""
    heads: Annotated[int, Between(1, 64)] = 4
    """Heads of attention."""
    expansion: Annotated[int, Between(1, 8)] = 2
    """Width of the feed-forward layers in units of the width."""


@dataclasses.dataclass(frozen=True)
class TrafficConfig(Config):
    """The scenes, the model, the rounds and the evaluation."""

    source: Literal["simulated", "embedded", "tfds"] = "simulated"
    """Scenes that SUMO simulates (`pip install 'gendiff[traffic]'`), the 240 scenes of the package, or the data set of
    TFDS with the preset's name, which `python -m gendiff.data.traffic_tfds FOLDER` writes."""
    data: Path | None = None
    """Folder of simulated scenes, simulated if it is missing (`python -m gendiff.data.traffic`); default: one for each
    data seed in $XDG_CACHE_HOME/gendiff. With --source tfds TFDS's folder; default: ~/tensorflow_datasets."""
    stream: bool = False
    """Feed the baseline's training from the host, batch by batch, through Grain, in place of scenes on every device."""
    scenes: Annotated[int, Between(1000, 10_000_000)] = 8000
    """Number of scenes; of ten maps eight are for training, one for validation and one for tests."""
    of_map: Annotated[int, Between(1, 1000)] = 16
    """Scenes of one map at most, because scenes of a map are alike."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the simulated maps and their traffic. Report other seeds than 0 to 2, which chose the defaults."""
    vehicles: Annotated[int, Between(1, 12)] = 12
    """Vehicles of a scene at most, the nearest to its centre."""
    recorded: Path | None = None
    """Folder of recorded scenes in CommonRoad's XML: three models are evaluated on their maps too. Default: the folder
    `commonroad` in $GENDIFF_DATA, if it exists."""

    chain: Literal["ddpm", "edm"] = "ddpm"
    """The process: the paper's, or EDM with Heun's steps."""
    steps: Annotated[int, Between(25, 100_000)] = 1000
    """T of the DDPM, linear schedule."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = 64
    """Steps of the sampler, for synthetic data and evaluation alike: DDIM on T (i / n)^2, Heun for EDM."""
    eta: Annotated[float | None, Between(0.0, 1.0)] = None
    """DDIM's, with --chain ddpm: 0 is deterministic, 1, the default, ancestral."""
    network: Network = Network()
    """The denoiser's."""
    baseline: Validated = Validated(6000, rate=3e-3, patience=2000)
    """Of the baseline, until the loss on validation maps does not improve."""
    time_power: Annotated[float, Between(0.5, 5.0)] = 2.0
    """Training draws t = T u^power, with u uniform: 1 is the paper's; 2 draws half of the batch below T / 4, where
    infractions are decided (EDM has its own times)."""
    fewer: Annotated[float, Between(0.0, 1.0)] = 0.1
    """Share of training scenes that lose some of their vehicles, so that the model learns scenes with fewer."""
    quarters: bool = False
    """Turn each training scene of the baseline by a random number of quarter turns, with its map."""

    draws: Draws = Draws(6000, 16_384, 512)
    """Of a round."""
    classifier_network: Network = Network(layers=2)
    """A classifier's."""
    from_denoiser: bool = True
    """Start a classifier from the map encoder and first layers of the baseline, where width and heads agree."""
    classifier: Validated = Validated()
    """Of a classifier; half of a batch are positives."""
    least_signal: Annotated[float, Between(0.0, 1.0)] = 0.95
    """alpha / sqrt(alpha^2 + sigma^2) below which classifiers do not guide; 0: at all noise levels, as in the paper."""
    guidance_scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 1.0
    """Factor on the classifiers' guidance in evaluations; models that others learn from, and `smc`, have 1."""
    stronger: Annotated[float, Between(0.0, 100.0), SameProgram()] = 2.0
    """A further factor, of the row `by-pair-stronger` alone."""
    student: Training = Training(4000)
    """Of a distilled or refitted model."""
    stored: Annotated[int, Between(1, 1_000_000_000)] = 2**16
    """Answers of the teacher from which a student learns."""

    samples: Annotated[int, Between(16, 1_000_000_000)] = 2048
    """Scenes of a model on test maps, for its rates."""
    elbo_scenes: Annotated[int, Between(16, 10_000_000)] = 512
    """Test scenes that the r-ELBO is averaged over."""
    elbo_levels: Annotated[int, Between(1, 1000)] = 16
    """Stratified noise levels of a scene."""
    smc: Smc = Smc(particles=8, populations=256)
    """Of the row `smc`: one population, and one scene, for each map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, net in (("--network", self.network), ("--classifier-network", self.classifier_network)):
            if net.width % net.heads:
                raise ConfigError(f"{option}.heads must divide the width {net.width}, got {net.heads}")
        if self.chain == "ddpm":
            counts = {"sampler-steps": self.sampler_steps, "elbo-levels": self.elbo_levels, "smc.steps": self.smc.steps}
            for name, count in counts.items():
                if (count or 0) > self.steps:
                    raise ConfigError(f"--{name} must be at most --steps {self.steps}, got {count}")
        elif self.eta is not None:
            raise ConfigError(f"--eta must be left out with --chain edm, got {self.eta}")
        if self.source == "embedded" and self.data is not None:
            raise ConfigError(f"--data must be left out with --source embedded, got {self.data}")


PRESETS = {
    "smoke": TrafficConfig(
        preset="smoke", source="embedded", vehicles=2, sampler_steps=8, network=Network(32, 1, 2),
        baseline=Validated(400, 32, 3e-3, 400), draws=Draws(40, 512, 256), classifier_network=Network(32, 1, 2),
        classifier=Validated(30, 32), student=Training(20, 32), stored=256, samples=64, elbo_scenes=16, elbo_levels=4,
        smc=Smc(None, 4, 8),
    ),
    "default": TrafficConfig(),
    "paper": TrafficConfig(
        preset="paper", scenes=100_000, sampler_steps=1000, network=Network(256, 6, 8, 3),
        baseline=Validated(250_000, 256, 2e-4, 50_000), time_power=1.0, fewer=0.0, draws=Draws(50_000, 1_000_000, 8192),
        classifier_network=Network(256, 6, 8, 3), classifier=Validated(50_000, 512, 2e-4), least_signal=0.0,
        student=Training(50_000, 256, 2e-4 / 3), stored=2**20, samples=10_000, elbo_scenes=4096, elbo_levels=128,
        smc=Smc(None, 16, 1024),
    ),
}  # fmt: skip

# The scenes.


class Purpose:
    """Of random keys."""

    START, BASELINE, DRAWS, CLASSIFIER, SAMPLES, ELBO, STUDENT, REFIT, SMC, VALIDATION, RECORDED = range(11)


LABELS = {"scene": lambda holds: holds.all(-1), "agent": oracle.by_agent, "pair": lambda holds: holds}
"""Head -> its labels, from the constraints that a scene keeps."""


def load(config: TrafficConfig) -> Sets:
    """Read the scenes, or simulate missing ones.

    Raises:
      ConfigError: a source is missing, the folder holds other scenes, a split has too few, or no classifier guides.
    """
    if not genneg.guided_share(problem(config)):
        raise ConfigError(
            f"--sampler-steps must have some at which the signal is at least --least-signal {config.least_signal:g}, "
            f"got none of {config.sampler_steps}"
        )
    try:
        splits = splits_of(config)
    except (SumoError, ImportError) as error:
        raise ConfigError(f"--source: {error}; or `--source embedded`") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"--data: {error}") from None
    try:
        others = scenes.recorded(config.recorded, splits["train"].distance.shape[-1])
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--recorded: {error}") from None
    try:
        return scenes.sets(splits | ({} if others is None else {"recorded": others}), config.vehicles)
    except ValueError as error:
        raise ConfigError(f"--scenes: {error}") from None


def splits_of(config: TrafficConfig) -> dict[str, data.Scenes]:
    if config.source == "embedded":
        return scenes.embedded()
    if config.source == "tfds":
        return scenes.of_tfds(config.data, config.preset)
    default = f"{config.data_seed}-{data.Recipe().seconds:g}"
    folder = config.data or start.cache_home() / "gendiff" / "traffic" / default
    return scenes.simulated(folder, config.scenes, config.data_seed, config.of_map, own=config.data is not None)


# The model.


def denoiser_network(config: TrafficConfig) -> SceneNetwork:
    """The network of the baseline and of every student."""
    return SceneNetwork(SceneTransformer(UNITS, "denoise", **dataclasses.asdict(config.network)))


def classifier_network(config: TrafficConfig, head: Head) -> SceneNetwork:
    """The network of a classifier."""
    return SceneNetwork(SceneTransformer(UNITS, head, **dataclasses.asdict(config.classifier_network)))


def chain(config: TrafficConfig) -> Process:
    if config.chain == "edm":
        return process.edm()
    times = process.power_times(config.steps, config.time_power)
    return process.ddpm(process.linear_betas(config.steps), power=2.0)._replace(sample_time=times)


def last_guided(config: TrafficConfig) -> int:
    """The largest of a DDPM's times at which classifiers guide, at least 1."""
    guides = potential.clear(chain(config), config.least_signal)(jnp.arange(config.steps + 1))
    return max(1, int(np.flatnonzero(guides)[-1]))


@jax.ensure_compile_time_eval()  # so that its numbers are concrete while a training is traced
def problem(config: TrafficConfig, head: Head = "agent", timeless: bool = False) -> genneg.OracleProblem:
    """Scenes, with networks, sampler and oracle.

    Args:
      head: of the classifiers.
      timeless: they are trained at the sampler's least noise, and are always told that noise.
    """
    steps, net, classifier = chain(config), denoiser_network(config), classifier_network(config, head)
    edm = config.chain == "edm"
    least = np.asarray(steps.grid(config.sampler_steps))[-2]
    if edm:
        model, kernel, weight = denoiser.from_edm(net.apply, DATA_STD), sampling.heun, losses.edm_weight(DATA_STD)
        times = process.classifier_time()
    else:
        # v, because eps leaves x_0 undetermined at high noise, and x_0 eps at low.
        model = denoiser.from_v(steps, denoiser.told_noise(steps, net.apply))
        kernel = static.partial(sampling.ddim, eta=1.0 if config.eta is None else config.eta)
        weight = losses.epsilon_weight(steps)
        # As the sampler's grid, because a uniform choice would hardly see where infractions are decided.
        times = process.power_times(last_guided(config))
    return genneg.OracleProblem(
        process=steps,
        model=present_alone(model),
        network=potential.from_edm(steps, classifier.apply, DATA_STD, least if timeless else None),
        oracle=scenes.constraints,
        shape=(data.VEHICLES, 7),
        kernel=kernel,
        steps=config.sampler_steps,
        weight=weight,
        classifier_time=process.one_time(least) if timeless else times,
        chunk=64 if jax.default_backend() == "cpu" else 1024,
        bind=static.partial(net.bind),
        bind_network=static.partial(classifier.bind),
        # At high noise the classifier's gradient is noise: it fixes nothing and lowers the likelihood.
        within=potential.clear(steps, config.least_signal) if config.least_signal else None,
    )


@static.by_value
def present_alone(model: Model) -> Model:
    """The model with zeros for absent vehicles."""
    return lambda bound, x, t: jnp.where(bound["place"].present[:, None], model(bound, x, t), 0.0)


def teaching(config: TrafficConfig) -> genneg.OracleProblem:
    """The problem of distillation: a quarter of its times cover all noise levels, so that students stay good there."""
    setup = problem(config)
    if config.chain == "edm":
        return setup
    # The others are the classifiers', where teachers differ from the baseline.
    times = process.mixed_times(process.power_times(config.steps), setup.classifier_time, 0.25)
    return setup._replace(classifier_time=times)


def r_elbo(config: TrafficConfig) -> Bound:
    """The r-ELBO of a scene; for EDM, minus the training loss."""
    setup, levels = problem(config), config.elbo_levels
    if config.chain == "ddpm":
        return static.partial(likelihood.reweighted_elbo, setup.process, levels=levels)
    return static.partial(minus_loss, setup.process, setup.weight, levels)


def minus_loss(steps: Process, weight: Weight, levels: int, model: Denoiser, key: PRNGKey, x0: Sample) -> Scalar:
    """Minus the training loss of a scene."""
    loss = losses.denoising(steps, lambda _, x, t: model(x, t), weight)
    return -jnp.mean(jax.lax.map(lambda key: loss(None, key, x0), jax.random.split(key, levels)))


def calls(config: TrafficConfig, classifiers: int, head: Head, steps: int | None = None) -> float:
    """Evaluations of a network of the denoiser's size for a sample; `classifiers` counts those of a guided step."""
    size = classifier_network(config, head).size / denoiser_network(config).size
    share = genneg.guided_share(problem(config)._replace(steps=steps or config.sampler_steps))
    own = steps or (2 * config.sampler_steps - 1 if config.chain == "edm" else config.sampler_steps)
    return own * (1 + classifiers * size * share)
