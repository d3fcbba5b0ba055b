"""Gen-neG on scenes of traffic (2307.16463, section 6.2, Table 1 and Figure 1).

Twelve vehicles are placed jointly on a map, no two overlapping, none off the road. A diffusion model learns scenes of a
traffic simulator, an oracle tells what is wrong with each of its samples, and classifiers steer it away from that: by
scene, by vehicle, or by pair of vehicles.
"""

import dataclasses
import os
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from experiments import figures, runtime
from experiments.contract import (
    Between,
    Column,
    Config,
    ConfigError,
    Folder,
    Progress,
    Results,
    Row,
    main,
    markdown,
)
from experiments.lab.experiment import Experiment, Paper
from gendiff import denoiser, distributed, likelihood, losses, nets, potential, process, sampling, smc, static, training
from gendiff.checkpoint import Archive
from gendiff.data import commonroad
from gendiff.data import traffic as data
from gendiff.data.sumo import SumoError
from gendiff.data.traffic import Scenes
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, Synthetic
from gendiff.metrics import rates
from gendiff.metrics import traffic as realism
from gendiff.nets.scene_transformer import Head, Place, SceneNetwork, Units
from gendiff.oracles import traffic as oracle
from gendiff.process import Process
from gendiff.types import Params, Sample, Time

UNITS = Units((0.0, 0.0, 4.8, 1.9, 0.0, 0.0, 5.0), (25.0, 25.0, 1.2, 0.25, 1.0, 1.0, 5.0), data.HALF)
DATA_STD = 1.0
"""EDM's sigma_data, in those units."""


@dataclasses.dataclass(frozen=True)
class TrafficConfig(Config):
    """The scenes, the model, the rounds and the evaluation."""

    source: Literal["simulated", "embedded", "tfds"] = "simulated"
    """Scenes that SUMO simulates (`pip install 'gendiff[traffic]'`), the 240 that come with the package, or the data
    set of TFDS, of the preset's name, that `python -m gendiff.data.traffic_tfds FOLDER` made."""
    data: Path | None = None
    """Folder of simulated scenes, made if it is not there (`python -m gendiff.data.traffic`); default: one for each
    data seed in $XDG_CACHE_HOME/gendiff. With --source tfds TFDS's folder; default: ~/tensorflow_datasets."""
    stream: bool = False
    """Feed the baseline's training from the host, batch by batch, through Grain, in
    place of scenes that lie on every device."""
    scenes: Annotated[int, Between(1000, 10_000_000)] = 8000
    """Scenes in all; of ten maps eight are for training, one for validation and one for tests."""
    of_map: Annotated[int, Between(1, 1000)] = 16
    """Scenes of one map at most: those of one are alike."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the simulated maps and their traffic. Defaults were chosen on those of seeds 0 to 2: report others."""
    vehicles: Annotated[int, Between(1, 12)] = 12
    """Vehicles of a scene at most, the nearest to its centre."""
    recorded: Path | None = None
    """Folder of recorded scenes in CommonRoad's XML, on whose maps three models are evaluated too; default: the folder
    `commonroad` in $GENDIFF_DATA, if there is one."""

    chain: Literal["ddpm", "edm"] = "ddpm"
    """The process: the paper's, or EDM with Heun's steps."""
    steps: Annotated[int, Between(25, 100_000)] = 1000
    """T of the DDPM, linear schedule."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = 64
    """Steps of the sampler, for synthetic data and evaluation alike: DDIM on T (i / n)^2, Heun for EDM."""
    eta: Annotated[float | None, Between(0.0, 1.0)] = None
    """DDIM's, with --chain ddpm: 0 is deterministic, 1, the default, ancestral."""
    width: Annotated[int, Between(16, 4096)] = 128
    """Width of the denoiser."""
    layers: Annotated[int, Between(1, 64)] = 4
    """Its pairs of self-attention and attention to the map."""
    heads: Annotated[int, Between(1, 64)] = 4
    """Its heads of attention."""
    expansion: Annotated[int, Between(1, 8)] = 2
    """Width of its feed-forward layers in units of the width."""
    base_steps: Annotated[int, Between(10, 100_000_000)] = 6000
    """Most training steps of the baseline."""
    base_batch: Annotated[int, Between(1, 1_000_000)] = 64
    """Scenes of one."""
    base_rate: Annotated[float, Between(1e-6, 1.0)] = 3e-3
    """Its rate of learning."""
    time_power: Annotated[float, Between(0.5, 5.0)] = 2.0
    """Training draws t = T u^power, with u uniform: 1 is the paper's; 2 spends half of the batch below T / 4, where
    infractions are decided (EDM has its own)."""
    fewer: Annotated[float, Between(0.0, 1.0)] = 0.1
    """Share of training scenes of which only some vehicles, one to all, are kept, for scenes with fewer than twelve."""
    quarters: bool = False
    """Turn each training scene of the baseline by a random number of quarter turns, with its map."""
    patience: Annotated[int, Between(10, 100_000_000)] = 2000
    """Stop the baseline when the held-out loss has not improved for so many steps."""

    per_class: Annotated[int, Between(10, 100_000_000)] = 6000
    """Scenes of each class that a round wants."""
    draw_budget: Annotated[int, Between(100, 1_000_000_000)] = 16_384
    """The most scenes that a round draws for them."""
    draw_batch: Annotated[int, Between(16, 1_000_000)] = 512
    """Scenes drawn at a time."""
    classifier_width: Annotated[int, Between(16, 4096)] = 128
    """Width of a classifier."""
    classifier_layers: Annotated[int, Between(1, 64)] = 2
    """Layers of a classifier."""
    classifier_heads: Annotated[int, Between(1, 64)] = 4
    """Heads of a classifier."""
    from_denoiser: bool = True
    """Begin a classifier with the map encoder and the first layers of the baseline, where width and heads agree."""
    classifier_steps: Annotated[int, Between(10, 10_000_000)] = 1000
    """Training steps of a classifier."""
    classifier_rate: Annotated[float, Between(1e-6, 1.0)] = 1e-3
    """Its rate of learning."""
    classifier_batch: Annotated[int, Between(2, 1_000_000)] = 64
    """Batch of a classifier's step, half of it positives."""
    least_signal: Annotated[float, Between(0.0, 1.0)] = 0.95
    """alpha / sqrt(alpha^2 + sigma^2) below which classifiers do not guide; 0: at all noise levels, as in the paper."""
    guidance_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """Factor on the classifiers' guidance where a model is evaluated; 1 in what later models learn, and for `smc`."""
    stronger: Annotated[float, Between(0.0, 100.0)] = 2.0
    """Another such factor, of the row `by-pair-stronger` alone."""
    student_steps: Annotated[int, Between(10, 10_000_000)] = 4000
    """Training steps of a distilled or refitted model."""
    student_batch: Annotated[int, Between(1, 1_000_000)] = 64
    """Scenes of one."""
    stored: Annotated[int, Between(1, 1_000_000_000)] = 2**16
    """Answers of the teacher that a student learns from."""

    samples: Annotated[int, Between(16, 1_000_000_000)] = 2048
    """Scenes on test maps that each model's rates are measured on."""
    elbo_scenes: Annotated[int, Between(16, 10_000_000)] = 512
    """Test scenes that the r-ELBO is averaged over."""
    elbo_levels: Annotated[int, Between(1, 1000)] = 16
    """Stratified noise levels a scene."""
    smc_particles: Annotated[int, Between(2, 100_000)] = 8
    """Particles of a population of SMC: one population, and one scene, for each map."""
    smc_populations: Annotated[int, Between(4, 1_000_000)] = 256
    """Populations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("", "classifier_"):
            width, heads = getattr(self, f"{name}width"), getattr(self, f"{name}heads")
            if width % heads:
                option = f"--{name}heads".replace("_", "-")
                raise ConfigError(f"{option}: expected a divisor of the width {width}, given {heads}")
        if self.chain == "ddpm":
            for name in ("sampler_steps", "elbo_levels"):
                if getattr(self, name) > self.steps:
                    option = "--" + name.replace("_", "-")
                    raise ConfigError(f"{option}: expected at most --steps {self.steps}, given {getattr(self, name)}")
        elif self.eta is not None:
            raise ConfigError(f"--eta: expected none with --chain edm, given {self.eta}")
        if self.source == "embedded" and self.data is not None:
            raise ConfigError(f"--data: expected none with --source embedded, given {self.data}")


PRESETS = {
    "smoke": TrafficConfig(
        preset="smoke", source="embedded", vehicles=2, width=32, layers=1, heads=2, base_steps=400, base_batch=32,
        patience=400, sampler_steps=8, per_class=40, draw_budget=512, draw_batch=256, classifier_width=32,
        classifier_layers=1, classifier_heads=2, classifier_steps=30, classifier_batch=32, student_steps=20,
        student_batch=32, stored=256, samples=64, elbo_scenes=16, elbo_levels=4, smc_particles=4, smc_populations=8,
    ),
    "default": TrafficConfig(),
    "paper": TrafficConfig(
        preset="paper", scenes=100_000, width=256, layers=6, heads=8, expansion=3, sampler_steps=1000,
        base_steps=250_000, base_batch=256, base_rate=2e-4, time_power=1.0, fewer=0.0, patience=50_000,
        per_class=50_000, draw_budget=1_000_000, draw_batch=8192, classifier_width=256, classifier_layers=6,
        classifier_heads=8, classifier_steps=50_000, classifier_rate=2e-4, classifier_batch=512,
        least_signal=0.0, student_steps=50_000, student_batch=256, stored=2**20, samples=10_000, elbo_scenes=4096,
        elbo_levels=128, smc_particles=16, smc_populations=1024,
    ),
}  # fmt: skip

COLUMNS = (
    Column("collision_rate", "collision %", percent=True, digits=1),
    Column("offroad_rate", "off-road %", percent=True, digits=1),
    Column("infraction_rate", "infraction %", percent=True, digits=1),
    Column("infraction_gain", "fewer %", percent=True, digits=1),
    Column("r_elbo", "r-ELBO", digits=0),
    Column("r_elbo_gain", "r-ELBO gain", digits=1),
    Column("r_elbo_per_dim_step", "per dim and step", digits=4),
    Column("evaluations_per_valid", "evaluations per valid", digits=1),
    Column("seconds_per_valid", "seconds per valid", digits=4),
    Column("speed_distance", "speed (m/s)", digits=2),
    Column("heading_distance", "heading (deg)", digits=1),
    Column("gap_distance", "gap (m)", digits=2),
    Column("degenerate_rate", "degenerate %", percent=True, digits=2),
)
PAPER = {
    name: dict(zip(("collision_rate", "offroad_rate", "infraction_rate", "r_elbo_gain"), values, strict=True))
    for name, values in {
        "baseline": (0.283, 0.013, 0.293, 0),
        "by-scene-unweighted": (0.205, 0.009, 0.219, -20),
        "by-scene": (0.233, 0.010, 0.241, -10),
        "by-agent-unweighted": (0.146, 0.008, 0.152, -50),
        "by-agent": (0.164, 0.009, 0.172, -20),
        "by-agent-stacked": (0.116, 0.006, 0.122, -50),
        "distilled-1": (0.122, 0.008, 0.129, 70),
        "distilled-2": (0.051, 0.005, 0.056, 50),
        "time-independent": (0.207, 0.009, 0.214, -21650),
    }.items()
}
"""r-ELBOs of other models on other data are not comparable: their differences to the paper's baseline, -2750."""
NOTES = """\
The paper's scenes are private; ours are SUMO's, so that levels cannot be compared, only what changes them.
collision, off-road, infraction: share of scenes with an overlap, a vehicle more than 0.3 m off the drivable area, or
either, on maps that no model was trained on. fewer: the baseline's infractions less these, paired (same maps and start
noise). 95 % intervals: the bootstrap over maps.
r-ELBO: -sum_t E || eps - eps_hat ||^2 over T steps on test scenes (for EDM, minus the training loss), Student's
intervals over scenes; its gain to the baseline is paired (same scenes, noise levels and noise). It is not known for
models that are conditioned by rejection. Training draws low noise more often than this sum (--time-power).
evaluations per valid: of a network the size of the denoiser, without maps, which are encoded once a scene; a
classifier counts three times (its gradient) the share of the denoiser's parameters that it has, in the steps that it
guides. seconds: of sampling alone, without compilation and without the oracle, on this device, shared or not.
speed, heading, gap: Wasserstein's distance of the marginal to that of test scenes: speed; angle to the nearest edge of
the road; road to the next vehicle ahead. `data` are the test scenes, their distances those of validation scenes, which
are of other maps. degenerate: vehicles without positive extents or a heading, which are mended.
`time-independent` learned from scenes with the sampler's least noise alone, and its gradient is taken at noisy ones (by
agent); the others are told the noise. Classifiers guide where the signal is at least --least-signal. `distilled-1`
learned from `by-agent`, `distilled-2` from `by-agent-stacked`, both at the scenes drawn for round 2, three quarters of
them good, and three quarters of the times those of classifiers (all, for EDM). `rejection` has the baseline's good
scenes, `refit` was trained on those of round 1. `by-pair-stronger` is `by-pair` with its guidance scaled (--stronger):
`by-agent` counts a collision twice, once for each vehicle. `smc` has `by-pair` for its twist, ancestral steps, and the
oracle at the end; its rates and distances are of one scene of each population that has a good one, its cost is by
effective number of good particles. `recorded-*`: on maps of recorded scenes (CommonRoad), with as many vehicles as were
there, 4 to 12. scenes.png: on the last two maps the baseline has an infraction, and they were chosen for that."""

PAIRED = "Differences between rows, paired (same maps and start noise, same scenes and noise), 95 % intervals as above:"
COMPARED = (
    ("by-scene", "baseline"),
    ("by-agent", "by-scene"),
    ("by-agent-stacked", "by-agent"),
    ("by-scene-unweighted", "by-scene"),
    ("by-agent-unweighted", "by-agent"),
    ("distilled-1", "by-agent"),
    ("distilled-2", "by-agent-stacked"),
    ("by-pair-stronger", "by-agent"),
)
"""What the paper's claims are about."""


# The model.


def denoiser_network(config: TrafficConfig) -> SceneNetwork:
    """The baseline's, and every student's."""
    return SceneNetwork(UNITS, "denoise", config.width, config.layers, config.heads, config.expansion)


def classifier_network(config: TrafficConfig, head: Head) -> SceneNetwork:
    """The network of a classifier."""
    return SceneNetwork(
        UNITS, head, config.classifier_width, config.classifier_layers, config.classifier_heads, config.expansion
    )


def chain(config: TrafficConfig) -> Process:
    """The process of a configuration."""
    if config.chain == "edm":
        return process.edm()
    every = process.ddpm(process.linear_betas(config.steps), power=2.0)
    return every._replace(sample_time=static.partial(times_of, config.steps, config.time_power))


def times_of(steps: int | Array, power: float, key: Array) -> Time:
    """ceil(steps u^power) with u uniform."""
    return jnp.ceil(steps * jax.random.uniform(key, minval=1e-6) ** power).astype(int)


def last_guided(config: TrafficConfig) -> int:
    """The largest of a DDPM's times at which classifiers guide, at least 1."""
    every = jnp.arange(config.steps + 1)
    return max(1, int(np.flatnonzero(clear(chain(config), config.least_signal, every))[-1]))


def teaching(config: TrafficConfig) -> genneg.Problem:
    """The problem of distillation: a quarter of the times are of all noise levels, where students shall stay as good.

    The others are the classifiers', where teachers differ from the baseline.
    """
    setup = problem(config)
    if config.chain == "edm":
        return setup
    return setup._replace(classifier_time=static.partial(mixed_times, config.steps, last_guided(config)))


def mixed_times(steps: int, last: int, key: Array) -> Time:
    """A quarter of the times up to `steps`, the others up to `last`."""
    which_key, key = jax.random.split(key)
    limit = jnp.where(jax.random.bernoulli(which_key, 0.25), steps, last)
    return times_of(limit, 2.0, key)


def noise_level(chain: Process, t: Time) -> Array:
    """ln(sigma / alpha) / 4, how networks are told the noise."""
    return 0.25 * jnp.log(chain.sigma(t) / chain.alpha(t))


def from_v(chain: Process, network: SceneNetwork) -> denoiser.Model:
    """A network that predicts v, for DDPM: eps leaves x_0 undetermined at high noise, and x_0 eps at low."""
    return denoiser.from_v(chain, told_noise(chain, network))


@static.by_value
def told_noise(chain: Process, network: SceneNetwork) -> denoiser.Model:
    """The network as a function of the time."""
    return lambda bound, x, t: network.apply(bound, x, noise_level(chain, t))


@static.by_value
def present_alone(model: denoiser.Model) -> denoiser.Model:
    """The model with zeros for vehicles that are absent."""
    return lambda bound, x, t: jnp.where(bound["place"].present[:, None], model(bound, x, t), 0.0)


@static.by_value
def classifier_logit(chain: Process, network: SceneNetwork, least: np.generic | None) -> potential.Logit:
    """The logits of a classifier's network, which is told the noise at t, or at the time `least`."""

    def logit(bound: Params, x: Sample, t: Time) -> Array:
        size = jnp.sqrt(chain.alpha(t) ** 2 + chain.sigma(t) ** 2)
        return jnp.asarray(network.apply(bound, x / size, noise_level(chain, t if least is None else least)))

    return logit


def always(time: np.generic, key: Array) -> Time:
    """The same time for all keys."""
    return jnp.asarray(time)


def problem(config: TrafficConfig, head: Head = "agent", timeless: bool = False) -> genneg.Problem:
    """Scenes, with networks, sampler and oracle.

    Args:
      head: of the classifiers.
      timeless: they are trained at the sampler's least noise and told that this is all there is.
    """
    steps, net, classifier = chain(config), denoiser_network(config), classifier_network(config, head)
    edm = config.chain == "edm"
    least = np.asarray(steps.grid(config.sampler_steps))[-2]
    # Where good and bad scenes look alike the slope of a trained network is a random push: it mends nothing, and costs
    # likelihood.
    within = static.partial(clear, steps, config.least_signal) if config.least_signal else None
    times: Callable[[Array], Time]
    if timeless:
        times = static.partial(always, least)
    elif edm:
        times = process.classifier_time()
    else:  # as the sampler's grid: a uniform choice would hardly see where infractions are decided
        times = static.partial(times_of, last_guided(config), 2.0)
    kernel = sampling.heun if edm else static.partial(sampling.ddim, eta=1.0 if config.eta is None else config.eta)
    return genneg.Problem(
        process=steps,
        model=present_alone(denoiser.from_edm(net.apply, DATA_STD) if edm else from_v(steps, net)),
        network=classifier_logit(steps, classifier, least if timeless else None),
        oracle=judged,
        shape=(data.VEHICLES, 7),
        kernel=kernel,
        steps=config.sampler_steps,
        weight=losses.edm_weight(DATA_STD) if edm else losses.epsilon_weight(steps),
        classifier_time=times,
        chunk=64 if jax.default_backend() == "cpu" else 1024,
        bind=static.partial(net.bind),
        bind_network=static.partial(classifier.bind),
        within=within,
    )


def clear(chain: Process, least: float, t: Time) -> Array:
    """Whether the signal is at least so much of the standard deviation of x_t."""
    return chain.alpha(t) >= least * jnp.sqrt(chain.alpha(t) ** 2 + chain.sigma(t) ** 2)


def judged(samples: Any, places: Place) -> np.ndarray:
    """The oracle: which constraints each scene keeps, (n, 78)."""
    return np.asarray(oracle.constraints(found(samples, places)))


@jax.jit
def found(samples: Array, places: Place) -> oracle.Infractions:
    """What is wrong with each scene."""

    def one(given: tuple[Array, Place]) -> oracle.Infractions:
        u, place = given
        return oracle.infractions(UNITS.metres(u), place.present, place.distance.astype(jnp.float32), data.HALF)

    return distributed.chunked(one, (jnp.asarray(samples), places), 256)


# The scenes.


def load(config: TrafficConfig) -> dict[str, Scenes]:
    """The scenes of each split; simulated first where they are not there yet.

    Raises:
      ConfigError: SUMO is missing, the folder holds other scenes, or a split has too few.
    """
    splits = get_args(data.Split)
    if config.source == "embedded":
        scenes = {name: data.embedded(name) for name in splits}
    elif config.source == "tfds":
        try:
            folder = config.data or Path.home() / "tensorflow_datasets"
        except RuntimeError as error:
            raise ConfigError(f"--data: {error}: name a folder") from None
        try:
            from gendiff.data import traffic_tfds  # an extra

            read = lambda: {name: traffic_tfds.scenes(folder, config.preset, name) for name in splits}
            scenes = distributed.everywhere(read)
        except ImportError as error:
            raise ConfigError(f"--source: {error}") from None
        except ValueError as error:
            raise ConfigError(f"--data: {error}") from None
    else:
        recipe, wanted = data.Recipe(config.data_seed), config.scenes
        # A folder of more scenes serves.
        folder = config.data or _cache() / f"{config.data_seed}-{recipe.seconds:g}"
        try:
            if config.data is not None:
                recipe = (data.recipe_of(folder) or recipe)._replace(seed=config.data_seed)
            with tqdm(total=wanted, desc="scenes", unit=" scenes", disable=not distributed.is_first()) as bar:

                def report(have: int) -> None:
                    distributed.stop_if_noticed("every map that was finished")
                    bar.update(min(have, wanted) - bar.n)

                distributed.first(lambda: data.write(folder, wanted, recipe, report=report, most=config.of_map))
            # Of several hosts all must see the folder, which the first wrote to.
            every = distributed.everywhere(lambda: data.read(folder, scenes=wanted, most=config.of_map))
        except SumoError as error:
            raise ConfigError(f"--source: {error}; or `--source embedded`") from None
        except ValueError as error:
            raise ConfigError(f"--data: {error}") from None
        scenes = {name: data.of_split(every, name) for name in splits}
    for name, part in scenes.items():
        if len(part.world) < 8:
            raise ConfigError(f"--scenes: expected 8 or more for {name}, given {len(part.world)}: take more scenes")
    return {name: nearest(part, config.vehicles) for name, part in scenes.items()}


def _cache() -> Path:
    try:
        return runtime.cache_home() / "gendiff" / "traffic"
    except OSError as error:
        raise ConfigError(f"--data: {error}, or name a folder") from None


def nearest(scenes: Scenes, most: int) -> Scenes:
    """The same scenes with the vehicles that are nearest to their centres, which come first."""
    present = scenes.present & (np.arange(data.VEHICLES) < most)[None]
    return scenes._replace(
        present=present, vehicles=np.where(present[..., None], scenes.vehicles, 0).astype(np.float32)
    )


def recorded(config: TrafficConfig, cells: int) -> Scenes | None:
    """Recorded scenes, if there are any, with maps of so many cells as those of training.

    Raises:
      ConfigError: the folder holds none, or they cannot be read.
    """
    folder = config.recorded
    if folder is None and os.environ.get("GENDIFF_DATA"):
        default = Path(os.environ["GENDIFF_DATA"]) / "commonroad"
        folder = default if default.is_dir() else None
    if folder is None:
        return None
    try:
        return nearest(commonroad.scenes(folder, data.Cut(least=4, cells=cells)), config.vehicles)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--recorded: {error}") from None


def fingerprint(scenes: dict[str, Scenes]) -> dict[str, np.ndarray]:
    """A checksum of each split."""
    checksum = lambda part: zlib.crc32(part.distance.tobytes(), zlib.crc32(part.vehicles.tobytes()))
    return {name: np.asarray(checksum(part)) for name, part in scenes.items()}


def spread(n: int, of: int) -> np.ndarray:
    """n rows of `of`: each as often as the next, and the rest evenly from the first to the last."""
    rest = n % of
    return np.concatenate([np.arange(n - rest) % of, np.arange(rest) * of // max(rest, 1)])


def places(scenes: Scenes) -> Place:
    """What models are told of each scene."""
    told: Any = scenes.distance, scenes.present
    return Place(*told)


def rows_of(tree: Any, rows: Any) -> Any:
    """Some rows of a tree of arrays, or one."""
    return jax.tree.map(lambda a: a[rows], tree)


# One run.

START, BASELINE, DRAWS, CLASSIFIER, SAMPLES, ELBO, STUDENT, REFIT, SMC, VALIDATION, RECORDED = range(11)
"""What the keys are for."""


class Evaluation(NamedTuple):
    """What is measured of one model."""

    vehicles: np.ndarray
    """(n, 12, 7), in metres."""
    holds: np.ndarray
    """(n, 78): which constraints each scene keeps."""
    degenerate: np.ndarray
    """(n, 12): vehicles that had to be mended."""
    elbo: np.ndarray
    """r-ELBO of each test scene; none where it is not known."""
    seconds: np.ndarray
    """Of one sample, without compilation."""


class Run:
    """One run of the experiment: each method makes phases, evaluates what they made, and adds rows."""

    def __init__(self, config: TrafficConfig, archive: Archive, progress: Progress, scenes: dict[str, Scenes]) -> None:
        self.config, self.archive, self.progress = config, archive, progress
        self.key, self.mesh = jax.random.key(config.seed), distributed.make_mesh()
        self.problem = problem(config)
        self.scenes = scenes
        held = self.archive.once("data", lambda: fingerprint(scenes))
        for name, value in fingerprint(scenes).items():
            if name not in held or int(held[name]) != int(value):
                raise ConfigError(f"--output: expected the {name} scenes that it was begun with, given others")
        self.train_places = jax.tree.map(jnp.asarray, places(scenes["train"]))
        self.test_places = places(scenes["test"])
        test = scenes["test"]
        self.real = realism.marginals(test.vehicles, test.present, test.distance, data.HALF)
        self.rows: list[Row] = []
        self.evaluations: dict[str, Evaluation] = {}
        self.remarks: list[str] = []

    def all(self) -> None:
        """Every row of the table, in its order."""
        self.data()
        theta = self.baseline()
        draws = self.draws("round-1", Guided(theta))
        self.classified(theta, draws, "scene", "none")
        self.classified(theta, draws, "scene", "importance")
        self.classified(theta, draws, "agent", "none")
        agent = self.classified(theta, draws, "agent", "importance")
        first = genneg.append(Guided(theta), agent)
        second_draws = self.draws("round-2", first)
        stacked = genneg.append(first, self.fit("by-agent-stacked", theta, second_draws, "agent", "importance"))
        self.add("by-agent-stacked", stacked, self.problem)
        self.distilled("distilled-1", theta, first, second_draws)
        student = self.distilled("distilled-2", theta, stacked, second_draws)
        self.classified(theta, draws, "agent", "importance", timeless=True)
        pairs = self.classified(theta, draws, "pair", "importance")
        guided = genneg.append(Guided(theta), pairs)
        self.add("by-pair-stronger", guided, problem(self.config, "pair"), "pair", self.config.stronger)
        self.rejection()
        self.refit(theta, draws)
        self.smc(guided)
        self.on_recorded({"baseline": Guided(theta), "by-agent-stacked": stacked, "distilled-2": student})

    # Shared by the rows.

    def fold(self, purpose: int) -> Array:
        return jax.random.fold_in(self.key, purpose)

    def host(self, phase: str, steps: int, batch: int) -> training.Host:
        """Where a phase of training keeps its checkpoints, and on what it runs."""
        return genneg.host(self.archive, self.progress, phase, steps, distributed.training_mesh(batch, every_core=True))

    def normalised(self, scenes: Scenes) -> np.ndarray:
        return np.asarray(UNITS.normalised(jnp.asarray(scenes.vehicles), jnp.asarray(scenes.present)))

    def add(
        self, name: str, guided: Guided, setup: genneg.Problem, head: Head | None = "agent", scale: float = 1.0
    ) -> None:
        """Evaluates a model and adds its row."""
        evaluate = lambda: self.evaluate(name, guided, setup, self.test_places, self.fold(SAMPLES), True, scale)
        evaluation = self.archive.once(f"evaluate/{name}", evaluate, Evaluation)
        self.evaluations[name] = evaluation
        share = _size(self.config, head) / _size(self.config, "denoise") if guided.members and head else 0.0
        cost = evaluations(self.config) * (1 + 3 * share * guided.members * steered(self.config))
        self.rows.append(Row(name, self.measured(evaluation, cost), PAPER.get(name, {})))

    def measured(self, evaluation: Evaluation, cost: float) -> dict[str, rates.Estimate]:
        """The metrics of a row; `cost` is in evaluations of the denoiser's network for one sample."""
        rows, maps = self.test_rows(len(evaluation.holds)), self.test_maps(len(evaluation.holds))
        broken, before = (~each.holds.all(1) for each in (evaluation, self.evaluations["baseline"]))
        metrics = infraction_rates(evaluation, maps)
        if evaluation is not self.evaluations["baseline"]:
            metrics["infraction_gain"] = rates.paired(before, broken, maps)
        metrics |= per_valid(metrics["infraction_rate"], cost, float(evaluation.seconds))
        if len(evaluation.elbo):
            metrics |= self.likelihoods(evaluation)
        share = evaluation.degenerate.sum(1) / self.test_places.present[rows].sum(1)
        metrics["degenerate_rate"] = rates.clustered(share, maps)
        return metrics | self.realism(evaluation.vehicles, rows)

    def test_rows(self, n: int) -> np.ndarray:
        """The test scenes whose maps n samples are on."""
        return spread(n, len(self.test_places.present))

    def test_maps(self, n: int) -> np.ndarray:
        """The numbers of those maps: scenes of one map are of one group."""
        return self.scenes["test"].world[self.test_rows(n)]

    def likelihoods(self, evaluation: Evaluation) -> dict[str, rates.Estimate]:
        """r-ELBO, to the baseline, and by dimension and step."""
        bound = rates.mean(evaluation.elbo)
        steps = self.config.steps if self.config.chain == "ddpm" else 1
        numbers = 7 * float(self.test_places.present[self.test_rows(len(evaluation.elbo))].sum(1).mean())
        return {
            "r_elbo": bound,
            "r_elbo_gain": rates.mean(evaluation.elbo - self.evaluations["baseline"].elbo),
            "r_elbo_per_dim_step": rates.scaled(bound, 1 / (steps * numbers)),
        }

    def compared(self) -> str:
        """A table of differences between rows."""
        body = []
        for name, other in COMPARED:
            one, two = self.evaluations[name], self.evaluations[other]
            broken = [~each.holds.all(1) for each in (one, two)]
            rate = rates.scaled(rates.paired(broken[0], broken[1], self.test_maps(len(one.holds))), 100)
            body.append([f"`{name}` - `{other}`", *map(_signed, (rate, rates.mean(one.elbo - two.elbo)))])
        return markdown(["rows", "infraction, points", "r-ELBO"], body)

    def realism(self, vehicles: np.ndarray, rows: np.ndarray) -> dict[str, rates.Estimate]:
        """How far the marginals are from those of test scenes; `rows` are the scenes whose maps they are on."""
        rows, vehicles = (each[np.isfinite(vehicles).all((1, 2))] for each in (rows, vehicles))
        given = rows_of(self.test_places, rows)
        marginals = realism.marginals(vehicles, given.present, given.distance, data.HALF)
        away = realism.differences(marginals, self.real)
        return {f"{name}_distance": rates.exact(value, len(marginals[name])) for name, value in away.items()}

    def evaluate(
        self,
        name: str,
        guided: Guided,
        setup: genneg.Problem,
        given: Place,
        key: Array,
        likelihood: bool,
        scale: float = 1.0,
    ) -> Evaluation:
        """Samples, their verdicts, and the r-ELBO of test scenes with the same noise for every model."""
        config = self.config
        scale = scale * config.guidance_scale
        n = config.samples
        size = -(-n // -(-n // config.draw_batch))  # equal batches, the last a little shorter
        rows = spread(n, len(given.present))
        kept: list[np.ndarray] = []
        seconds: list[float] = []
        phase = f"evaluate {name}"
        self.progress(phase, 0, n, {})
        # Where one batch is all it is drawn again: the first compiles.
        for first in (*range(0, n, size), *((0,) if n <= size else ())):
            conditions = rows_of(given, rows[np.arange(first, first + size) % n])
            begun = time.perf_counter()
            draw_key = jax.random.fold_in(key, first)
            kept.append(genneg.draw(setup, guided, draw_key, size, self.mesh, scale, conditions))
            seconds.append(time.perf_counter() - begun)
            self.progress(phase, min(first + size, n), n, {})
        samples = np.concatenate(kept)[:n]
        # What is not finite is off the road.
        verdict = distributed.by_process(found, samples, jax.tree.map(np.asarray, rows_of(given, rows)))
        elbo = self.elbo(guided, setup, scale) if likelihood else np.zeros(0)
        each = float(np.median(seconds[1:])) / size
        holds, vehicles = np.asarray(oracle.constraints(verdict)), np.asarray(UNITS.metres(jnp.asarray(samples)))
        return Evaluation(vehicles, holds, np.asarray(verdict.degenerate), elbo, np.asarray(each))

    def elbo(self, guided: Guided, setup: genneg.Problem, scale: float) -> np.ndarray:
        rows = self.test_rows(min(self.config.elbo_scenes, len(self.test_places.present)))
        scenes = data.take(self.scenes["test"], rows)
        given = (guided, jnp.asarray(self.normalised(scenes)), places(scenes), self.fold(ELBO), scale)
        found = elbos(setup, self.config.elbo_levels, self.mesh, *distributed.place(self.mesh, given))
        return distributed.gather(found, len(rows))

    # The rows.

    def data(self) -> None:
        """The test scenes, which have no infractions, and how far other maps' marginals are from theirs."""
        other = self.scenes["validation"]
        marginals = realism.marginals(other.vehicles, other.present, other.distance, data.HALF)
        away = realism.differences(marginals, self.real)
        none = rates.exact(0.0, len(self.test_places.present))
        metrics = {f"{name}_rate": none for name in ("collision", "offroad", "infraction")}
        metrics |= {f"{name}_distance": rates.exact(value, len(marginals[name])) for name, value in away.items()}
        self.rows.append(Row("data", metrics))

    def baseline(self) -> Params:
        """theta: denoising score matching, stopped by the loss on validation maps."""
        found = self.archive.once("baseline", self.train_baseline)
        where = f"step {int(found['step'])} of {self.config.base_steps}"
        self.remarks.append(
            f"The baseline has its least loss on validation maps, {float(found['loss']):.2f}, at {where}."
        )
        self.add("baseline", Guided(found["theta"]), self.problem)
        return found["theta"]

    def train_baseline(self) -> dict[str, Any]:
        config = self.config
        settings = training.Settings(
            config.base_steps, config.base_rate, 0.999, min(250, config.base_steps),
            warmup=min(500, config.base_steps // 5), patience=config.patience,
        )  # fmt: skip
        validation = self.scenes["validation"]
        held = data.take(validation, spread(min(512, len(validation.world)), len(validation.world)))
        whole = lambda scenes: (places(scenes), self.normalised(scenes))
        keys = jax.random.split(self.fold(VALIDATION), len(held.world))
        start = nets.fresh(denoiser_network(config), self.fold(START), rows_of(self.test_places, 0))
        host = self.host("baseline", config.base_steps, config.base_batch)
        train = whole(self.scenes["train"])
        batches = streamed(train, config.base_batch, config.seed) if config.stream else None
        context = (None if config.stream else train, whole(held), keys)
        task = base_task(self.problem, config.base_batch, config.fewer, config.quarters)
        state = training.train(self.fold(BASELINE), start, task, context, settings, host, batches)
        return {"theta": state.best, "step": state.best_step, "loss": state.best_loss}

    def draws(self, phase: str, guided: Guided) -> Synthetic:
        """Scenes of a model on training maps, and their constraints."""
        config = self.config
        report = lambda done, of, metrics: self.progress(f"{phase} draws", done, of, metrics)
        drawn = self.archive.once(
            f"{phase}/draws",
            lambda: genneg.collect(
                self.problem, guided, jax.random.fold_in(self.fold(DRAWS), guided.members), config.per_class,
                config.draw_budget, config.draw_batch, mesh=self.mesh, report=report, conditions=self.train_places,
            ),
            Synthetic,
        )  # fmt: skip
        counts = f"{int(drawn.good)} of {int(drawn.good) + int(drawn.bad)} scenes on training maps"
        self.remarks.append(f"Draws for {phase}: {counts} were good, alpha = {drawn.alpha:.4f}.")
        return drawn

    def fit(
        self,
        name: str,
        theta: Params,
        draws: Synthetic,
        head: Head,
        weighting: Literal["importance", "none"],
        timeless: bool = False,
    ) -> Params:
        """A classifier of scenes, of vehicles or of pairs."""
        config, setup = self.config, problem(self.config, head, timeless)
        steps = config.classifier_steps
        settings = training.Settings(steps, config.classifier_rate, 0.998, min(250, steps), warmup=min(100, steps // 5))
        how = genneg.ClassifierTraining(settings, config.classifier_batch // 2, weighting, validation=256)
        start = nets.fresh(classifier_network(config, head), self.fold(CLASSIFIER), rows_of(self.test_places, 0))
        if config.from_denoiser:
            start = begun_from(theta, start)
        train, held_out = genneg.split(draws.relabelled(LABELS[head]), how, jax.random.fold_in(self.fold(DRAWS), 7))
        host = self.host(name, steps, 2 * (config.classifier_batch // 2))
        key = jax.random.fold_in(self.fold(CLASSIFIER), 1)
        fit = lambda: genneg.fit_classifier(setup, train, held_out, start, how, key, host, conditions=self.train_places)
        return self.archive.once(name, fit)

    def classified(
        self,
        theta: Params,
        draws: Synthetic,
        head: Head,
        weighting: Literal["importance", "none"],
        timeless: bool = False,
    ) -> Params:
        """The baseline with one classifier of its own samples."""
        name = f"by-{head}{'-unweighted' if weighting == 'none' else ''}"
        name = "time-independent" if timeless else name
        classifier = self.fit(name, theta, draws, head, weighting, timeless)
        self.add(name, genneg.append(Guided(theta), classifier), problem(self.config, head, timeless), head)
        return classifier

    def student_training(self) -> genneg.StudentTraining:
        steps, rate = self.config.student_steps, self.config.base_rate / 3
        settings = training.Settings(steps, rate, 0.998, min(250, steps), warmup=min(100, steps // 5))
        return genneg.StudentTraining(settings, self.config.student_batch)

    def distilled(self, name: str, theta: Params, teacher: Guided, draws: Synthetic) -> Guided:
        """One network in place of a stack."""
        config, settings, key = self.config, self.student_training(), self.fold(STUDENT)
        host = self.host(name, settings.training.steps, settings.batch)

        def teach() -> Params:
            pool = genneg.mixture(draws.positives, draws.negatives, config.stored, jax.random.fold_in(key, 1))
            points = genneg.Points(pool["x"], pool["row"], self.train_places)
            asked = jax.random.fold_in(key, 2)
            return genneg.distill(teaching(config), teacher, points, theta, settings, asked, host, self.mesh)

        student = Guided(self.archive.once(name, teach))
        self.add(name, student, self.problem)
        return student

    def rejection(self) -> None:
        """The baseline's good scenes: exact, at the price of the others."""
        evaluation = self.evaluations["baseline"]
        good = np.flatnonzero(evaluation.holds.all(1))
        base = self.measured(evaluation, evaluations(self.config))
        none = rates.exact(0.0, len(good))
        metrics = {f"{name}_rate": none for name in ("collision", "offroad", "infraction")}
        metrics |= {name: base[name] for name in ("evaluations_per_valid", "seconds_per_valid")}
        rows = self.test_rows(len(evaluation.holds))[good]
        self.rows.append(Row("rejection", metrics | self.realism(evaluation.vehicles[good], rows)))

    def refit(self, theta: Params, draws: Synthetic) -> None:
        """The baseline trained on with its own good scenes."""
        settings = self.student_training()
        host = self.host("refit", settings.training.steps, settings.batch)
        points = genneg.Points(draws.positives["x"], draws.positives["row"], self.train_places)
        fit = lambda: genneg.refit(self.problem, points, theta, settings, self.fold(REFIT), host)
        self.add("refit", Guided(self.archive.once("refit", fit)), self.problem)

    def smc(self, guided: Guided) -> None:
        """Twisted SMC, a population for each map, and the oracle at the end."""
        setup, config = problem(self.config, "pair"), self.config
        result = self.archive.once("smc", lambda: self.populations(setup, guided))
        rows, vehicles, n = result["rows"], result["vehicles"], config.smc_populations
        verdict = found(result["samples"], rows_of(self.test_places, rows)) if len(rows) else None
        metrics: dict[str, rates.Estimate] = {}
        if verdict is not None:
            holds = np.asarray(oracle.constraints(verdict))
            degenerate = np.asarray(verdict.degenerate)
            evaluation = Evaluation(vehicles, holds, degenerate, np.zeros(0), result["seconds"])
            # By the oracle's last word, none: exact, and seen to be.
            broken = infraction_rates(evaluation, self.scenes["test"].world[rows])
            metrics = {name: rates.exact(rate.value, len(rows)) for name, rate in broken.items()}
            metrics |= self.realism(vehicles, rows)
            # The gradient of the twist at x_t, and its value at x_s.
            share = _size(config, "pair") / _size(config, "denoise") * steered(config)
            cost = config.sampler_steps * config.smc_particles * (1 + 4 * share)
            effective = rates.mean(result["effective"]).value
            metrics["evaluations_per_valid"] = rates.exact(cost / effective, n)
            metrics["seconds_per_valid"] = rates.exact(float(result["seconds"]) / effective, n)
        self.remarks.append(f"Of {n} populations of SMC, {len(rows)} have a good particle of {config.smc_particles}.")
        self.rows.append(Row("smc", metrics))

    def populations(self, setup: genneg.Problem, guided: Guided) -> dict[str, Any]:
        """Good scenes, the rows of their maps, effective numbers of good particles, and the seconds of a population."""
        config, key = self.config, self.fold(SMC)
        n, size = config.smc_populations, config.smc_particles
        part = -(-n // -(-n // 64))
        every = self.test_rows(n)
        samples: list[np.ndarray] = []
        rows: list[int] = []
        effective = np.zeros(n)
        seconds: list[float] = []
        self.progress("smc", 0, n, {})
        for first in (*range(0, n, part), *((0,) if n <= part else ())):
            here = np.arange(first, first + part) % n
            given = rows_of(self.test_places, every[here])
            keys = jax.random.split(jax.random.fold_in(key, first), part)
            begun = time.perf_counter()
            placed = distributed.place(self.mesh, (guided, keys, given))
            drawn = distributed.gather(populate(setup, size, self.mesh, *placed), part)
            seconds.append(time.perf_counter() - begun)
            if len(seconds) * part > n + part - 1:  # drawn again for the time alone
                break
            repeated = jax.tree.map(lambda a: np.repeat(a, size, 0), given)
            good = judged(drawn.particles.reshape(-1, *setup.shape), repeated).all(1).reshape(part, size)
            for i in np.flatnonzero(good.any(1) & (np.arange(first, first + part) < n)):
                one = smc.judge(rows_of(drawn, i), good[i], jax.random.fold_in(key, n + first + i))
                samples.append(np.asarray(one.samples[0]))
                rows.append(int(every[first + i]))
                effective[first + i] = float(one.effective)
            self.progress("smc", min(first + part, n), n, {"good": len(rows)})
        chosen_ones = np.asarray(samples, np.float32).reshape(-1, *setup.shape)
        return {
            "samples": chosen_ones,
            "vehicles": np.asarray(UNITS.metres(jnp.asarray(chosen_ones))),
            "rows": np.asarray(rows, int),
            "effective": effective,
            "seconds": np.asarray(np.median(seconds[1:]) / part),
        }

    def on_recorded(self, models: dict[str, Guided]) -> None:
        """Three models on the maps of recorded scenes, which nobody simulated."""
        scenes = self.scenes.get("recorded")
        if scenes is None:
            return
        for name, guided in models.items():
            evaluate = lambda: self.evaluate(name, guided, self.problem, places(scenes), self.fold(RECORDED), False)  # noqa: B023
            evaluation = self.archive.once(f"evaluate/recorded-{name}", evaluate, Evaluation)
            self.evaluations[f"recorded-{name}"] = evaluation
            maps = scenes.world[spread(len(evaluation.holds), len(scenes.world))]
            self.rows.append(Row(f"recorded-{name}", infraction_rates(evaluation, maps)))


LABELS = {"scene": lambda holds: holds.all(-1), "agent": oracle.by_agent, "pair": lambda holds: holds}
"""Head -> what it is taught, of the constraints that a scene keeps."""


def infraction_rates(evaluation: Evaluation, maps: np.ndarray) -> dict[str, rates.Estimate]:
    """Of scenes, on maps of these numbers."""
    pairs = evaluation.holds.shape[1] - data.VEHICLES
    broken = ~np.asarray(evaluation.holds)
    return {
        "collision_rate": rates.clustered(broken[:, :pairs].any(1), maps),
        "offroad_rate": rates.clustered(broken[:, pairs:].any(1), maps),
        "infraction_rate": rates.clustered(broken.any(1), maps),
    }


def per_valid(infraction: rates.Estimate, cost: float, seconds: float) -> dict[str, rates.Estimate]:
    """What a valid scene costs, for what one costs; nothing where none is valid."""
    low, value, high = (1 / max(1 - each, 1e-12) for each in (infraction.low, infraction.value, infraction.high))
    if infraction.value == 1:
        return {}
    one = rates.Estimate(value, low, high, infraction.n)
    return {"evaluations_per_valid": rates.scaled(one, cost), "seconds_per_valid": rates.scaled(one, seconds)}


def evaluations(config: TrafficConfig) -> int:
    """Of the denoiser, for one sample."""
    return 2 * config.sampler_steps - 1 if config.chain == "edm" else config.sampler_steps


def steered(config: TrafficConfig) -> float:
    """The share of the sampler's steps that classifiers guide."""
    setup = problem(config)
    if setup.within is None:
        return 1.0
    return float(np.mean([bool(setup.within(t)) for t in setup.process.grid(config.sampler_steps)[:-1]]))


def begun_from(theta: Params, fresh: Params) -> Params:
    """A classifier's parameters with those of a denoiser where it has such: all but the head, of as many layers."""
    known = dict(jax.tree_util.tree_flatten_with_path(theta)[0])

    def one(path: Any, leaf: Array) -> Array:
        given, name = known.get(path), jax.tree_util.keystr(path)
        if given is None or "output" in name:
            return leaf
        # The relative encodings of all layers stand side by side in one matrix.
        cut = given[..., : leaf.shape[-1]] if "relat" in name else given
        return jnp.asarray(cut) if cut.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(one, fresh)


def _signed(estimate: rates.Estimate) -> str:
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _size(config: TrafficConfig, head: Head) -> int:
    """Parameters of the part of a network that is evaluated in every step."""
    network = denoiser_network(config) if head == "denoise" else classifier_network(config, head)
    place = Place(jnp.zeros((64, 64)), jnp.ones(data.VEHICLES, bool))
    shapes = jax.eval_shape(network.init, jax.random.key(0), place)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["scene"]))


APART = 2**31
"""A child of a key that `split` does not give."""


@static.by_value
def base_task(setup: genneg.Problem, batch: int, fewer: float, quarters: bool = False) -> Any:
    """The task of the baseline; its context is training scenes, validation scenes, and keys for these.

    Scenes are (places, vehicles).  Without training scenes batches come from the host.
    """
    loss = losses.conditional(genneg.denoising_loss(setup), setup.bind)  # type: ignore[arg-type]

    def task(context: Any) -> training.Task:
        train, held, keys = context

        def changed(key: Array, scene: tuple[Place, Array]) -> tuple[Place, Array]:
            place, x = scene
            if quarters:
                turns = jax.random.randint(jax.random.fold_in(key, APART), (), 0, 4)
                x, distance = turned(turns, x, place.distance)
                place = place._replace(distance=distance)
            present = thinned(key, place.present, fewer)
            return place._replace(present=present), jnp.where(present[:, None], x, 0.0)

        def draw(key: Array) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, 1), batch)
            return jax.vmap(changed)(keys, training.minibatch(key, train, batch))

        def validate(theta: Params) -> Array:
            # The same noise at every validation, on purpose.
            given = (jax.random.clone(keys), held)
            return jnp.mean(distributed.chunked(lambda g: loss(theta, *g), given, 64))

        if train is not None:
            return training.Task(loss, draw, validate)
        as_it_comes = lambda theta, key, scene: loss(theta, key, changed(jax.random.fold_in(key, APART), scene))
        return training.Task(as_it_comes, None, validate)

    return task


def streamed(scenes: tuple[Place, np.ndarray], batch: int, seed: int) -> Any:
    """Batches of scenes from the host, each process's rows of them, through Grain.

    Raises:
      ConfigError: Grain is not installed, or the processes do not divide the batch.
    """
    try:
        from gendiff.data import stream  # an extra

        return stream.batches(range(len(scenes[1])), batch, seed, change=partial(rows_of, scenes))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--stream: {error}") from None


def turned(quarters: Array, x: Sample, distance: Array) -> tuple[Sample, Array]:
    """A scene, in the network's coordinates, and its map, turned by 0 to 3 quarter turns from the x to the y axis."""

    def once(x: Array, distance: Array) -> tuple[Array, Array]:
        # (x, y) -> (-y, x): UNITS scale both alike, without a shift, and so the cosine and the sine of the heading.
        columns = x[:, 1] * -1, x[:, 0], x[:, 2], x[:, 3], x[:, 5] * -1, x[:, 4], x[:, 6]
        return jnp.stack(columns, -1), jnp.flip(distance, 0).T

    every = [(x, distance)]
    for _ in range(3):
        every.append(once(*every[-1]))
    return jax.lax.switch(quarters, [lambda each=each: each for each in every])


def thinned(key: Array, present: Array, share: float) -> Array:
    """With a probability of `share` some of the vehicles, one to all of them, chosen at random; else all."""
    choice_key, count_key, order_key = jax.random.split(key, 3)
    there = jnp.sum(present)
    count = jax.random.randint(count_key, (), 1, there + 1)
    count = jnp.where(jax.random.uniform(choice_key) < share, count, there)
    order = jnp.where(present, jax.random.uniform(order_key, present.shape), 2.0)
    return present & (jnp.argsort(jnp.argsort(order)) < count)


@partial(jax.jit, static_argnums=(0, 1, 2))
def elbos(
    setup: genneg.Problem,
    levels: int,
    mesh: Any,
    guided: Guided,
    scenes: Array,
    given: Place,
    key: Array,
    scale: float = 1.0,
) -> Array:
    """r-ELBO of each scene; the same key gives the same noise for every model."""

    def one(given: tuple[Array, Array, Place]) -> Array:
        key, x0, place = given
        model = genneg.denoiser(setup, genneg.bound(setup, guided, place), scale)
        if setup.process.steps is not None:
            return likelihood.reweighted_elbo(setup.process, model, key, x0, levels)
        loss = losses.denoising(setup.process, lambda _, x, t: model(x, t), setup.weight)
        return -jnp.mean(jax.lax.map(lambda key: loss(None, key, x0), jax.random.split(key, levels)))

    return distributed.chunked(one, (jax.random.split(key, len(scenes)), scenes, given), setup.chunk, mesh, cut=False)


@partial(jax.jit, static_argnums=(0, 1, 2))
def populate(
    setup: genneg.Problem, particles: int, mesh: Any, guided: Guided, keys: Array, given: Place
) -> smc.Population:
    """One population for each key and place."""
    grid = setup.process.grid(setup.steps)

    def one(each: tuple[Array, Place]) -> smc.Population:
        key, place = each
        here = genneg.bound(setup, guided, place)
        plain, guided_by = genneg.denoiser(setup, Guided(here.theta)), genneg.denoiser(setup, here)
        twist = genneg.twist(setup, here)
        return smc.twisted(setup.process, plain, guided_by, twist, grid, key, setup.shape, particles)

    return distributed.chunked(one, (keys, given), 8, mesh, cut=False)


def run(config: TrafficConfig) -> Results:
    """Runs what the folder does not hold yet, and writes the table and the figures."""
    if not steered(config):
        raise ConfigError(
            f"--sampler-steps: expected some at which the signal is at least --least-signal {config.least_signal:g}, "
            f"given none of {config.sampler_steps}"
        )
    scenes = load(config)
    others = recorded(config, scenes["train"].distance.shape[-1])
    folder = Folder("genneg.traffic", config)
    progress = Progress(folder)
    each = Run(config, folder.archive, progress, scenes | ({} if others is None else {"recorded": others}))
    each.all()
    progress.close()
    draw_figures(folder.path, each)
    remarks = " ".join(each.remarks)
    return folder.finish(each.rows, COLUMNS, f"{NOTES}\n\n{remarks}\n\n{PAIRED}\n\n{each.compared()}")


FIGURE_ROWS = ("baseline", "by-scene", "by-agent", "by-pair", "distilled-2")


def draw_figures(path: Path, done: Run) -> None:
    """Scenes as in Fig. 1 a-f, and where infractions happen as in Fig. 1 g-h."""
    test = done.scenes["test"]
    count = len(test.world)
    # Of the last two maps, two on which the baseline fails: its first sample of a map is row i.
    first = np.asarray(done.evaluations["baseline"].holds[:count].all(1))
    failed = np.flatnonzero(~first) if len(first) == count and not first.all() else np.arange(count)
    shown = np.array([0, count - 1, failed[len(failed) // 3], failed[2 * len(failed) // 3]])
    half = data.HALF
    broken = lambda holds: ~oracle.by_agent(holds)
    panels = {"held out": [(test.distance[i], test.vehicles[i], test.present[i], np.zeros(12, bool)) for i in shown]}
    for name in FIGURE_ROWS:
        each = done.evaluations[name]
        # The first sample on the map of each scene that is shown.
        of_map = [int(np.argmin(np.abs(done.test_rows(len(each.holds)) - i))) for i in shown]
        rows = done.test_rows(len(each.holds))[of_map]
        marked = broken(each.holds) & test.present[done.test_rows(len(each.holds))]
        panels[name] = [
            (test.distance[i], each.vehicles[n], test.present[i], marked[n]) for n, i in zip(of_map, rows, strict=True)
        ]
    figures.traffic_scenes(path / "scenes.png", panels, half)
    where = {}
    for name in ("baseline", "by-agent", "by-agent-stacked", "distilled-2"):
        each = done.evaluations[name]
        at = each.vehicles[broken(each.holds)][:, :2]
        where[name] = (at, len(each.holds))
    figures.infraction_maps(path / "infractions.png", where, half)


def row_names(config: TrafficConfig) -> list[str]:
    """Names of the rows of a run, in their order; those on recorded maps depend on the maps."""
    return [
        "data", "baseline", "by-scene-unweighted", "by-scene", "by-agent-unweighted", "by-agent", "by-agent-stacked",
        "distilled-1", "distilled-2", "time-independent", "by-pair", "by-pair-stronger",
        "rejection", "refit", "smc",
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "genneg.traffic", TrafficConfig, PRESETS, run, COLUMNS, row_names,
    Paper("Don't be so negative! Score-based generative modeling with oracle-assisted guidance", "2307.16463",
          "section 6.2, Table 1 and Figure 1", PAPER),
    extras=("traffic",),
)  # fmt: skip


if __name__ == "__main__":
    main(TrafficConfig, PRESETS, run)
