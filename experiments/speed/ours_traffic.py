"""gendiff's side of the fourth speed table: the public functions as the traffic experiment calls them."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.genneg import traffic_problem
from experiments.genneg.traffic_problem import TrafficConfig
from experiments.lab import start
from experiments.speed import ours
from gendiff import distributed, losses, potential, sampling
from gendiff.data import traffic as data
from gendiff.data.scenes import UNITS, changed
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, OracleProblem
from gendiff.nets.scene_network import SceneNetwork
from gendiff.nets.scene_transformer import Place
from gendiff.oracles import traffic as oracle
from gendiff.types import Params, PRNGKey, Samples

PARITY = 4
"""Scenes on which the networks are compared."""
SHORT = (100, 50, 0)
"""Times of a sampler whose samples are: at high noise, networks that know nothing blow up rounding errors."""
JUDGED = 256
"""Scenes on which the oracles are."""
SCENES = 1000
"""Scenes of the data that the training steps draw from."""
CHUNK = 16
"""Scenes at a time and device that the oracle checks, with their maps in the cache."""
BOUND = {"scene": None, "place": 0, "memory": 0}
"""Axes of a network's parameters that are bound to places: the vehicles' part is the same for all."""


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs, and the networks with their answers for the rival to compare.

    Args:
      setup: "preset" of the experiment, whose networks are used; "cells" of a map's side; "oracle_scenes" and
        "oracle_steps"; "batch" and "train_steps"; "samples" and "sample_steps"; "matmul", the size of the large
        product; "seed".

    Returns:
      The programs, and what `rival_traffic.prepare` needs, its "answers" apart.
    """
    start.start()
    config, key = settings_of(setup), jax.random.key(setup["seed"])
    problem, guided = traffic_problem.problem(config), networks(config, setup["seed"])
    vehicles, places = scenes(JUDGED, setup["cells"], setup["seed"])
    few = Place(*(each[:PARITY] for each in places))
    inputs, answers = questions(problem, guided, vehicles[:PARITY], few, key)
    verdict = check(None, vehicles, places)
    names = ("pairs", "collides", "off_road", "degenerate")
    answers |= {name: jnp.float32(getattr(verdict, name)) for name in names}
    chain = problem.process
    every = jnp.arange((chain.steps or 0) + 1)
    told = {
        "fields": {
            "denoiser": fields(traffic_problem.denoiser_network(config)),
            "classifier": fields(classifier_of(config)),
        },
        "units": tuple(UNITS),
        "alpha": chain.alpha(every),
        "sigma": chain.sigma(every),
        "denoiser": state_dict(guided.theta),
        "classifier": state_dict(jax.tree.map(lambda a: a[0], guided.classifiers["net"])),
        "times": chain.grid(config.sampler_steps),
        "rate": config.baseline.rate,
        "inputs": inputs | {"vehicles": vehicles, "present": places.present, "distance": places.distance},
        "answers": answers,
    }
    size, seed = setup["matmul"], setup["seed"]
    programs = {
        "matmul": ours.matmul(size, size, 1),
        "oracle": judge(*scenes(setup["oracle_scenes"], setup["cells"], seed), setup["oracle_steps"]),
        "train-step": train(config, guided.theta, setup["cells"], setup["batch"], setup["train_steps"], key),
        "sample-step": sample(problem, guided, setup["cells"], setup["samples"], key),
    }
    told = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, told)
    return {f"{name}/gendiff": program for name, program in programs.items()}, told


def settings_of(setup: Mapping[str, Any]) -> TrafficConfig:
    """The experiment's configuration: steps of one call, a sampler without noise, guidance in all of them."""
    return dataclasses.replace(
        traffic_problem.PRESETS[setup["preset"]], sampler_steps=setup["sample_steps"], eta=0.0, least_signal=0.0
    )


def classifier_of(config: TrafficConfig) -> SceneNetwork:
    """The network of a classifier of vehicles."""
    return traffic_problem.classifier_network(config, "agent")


def fields(net: SceneNetwork) -> dict[str, Any]:
    """What the rival needs of a network's fields."""
    names = ("head", "width", "layers", "heads", "expansion", "hidden")
    return {name: getattr(net.trunk, name) for name in names}


def shaped(shape: tuple[int, ...], kind: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array's shape."""
    return jax.ShapeDtypeStruct(shape, kind)


def place_shapes(cells: int, *leading: int) -> Place:
    """The shapes of a place, or of several; distances are stored in 16 bits."""
    present = shaped((*leading, data.VEHICLES), bool)
    return Place(shaped((*leading, cells, cells), jnp.float16), present)  # type: ignore[arg-type]


def shapes(net: SceneNetwork) -> Params:
    """The shapes of a network's parameters, which do not depend on the maps' size."""
    return jax.eval_shape(net.init, jax.random.key(0), place_shapes(data.CELLS))


def networks(config: TrafficConfig, seed: int) -> Guided:
    """The denoiser and one classifier.

    Speed does not depend on their values, but the comparison does: drawn here, no bias and no last layer is 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        inside = {"kernel": math.prod(leaf.shape[:-1]), "read": leaf.shape[-1]}.get(kind.split("_")[0], 100)
        return jnp.asarray(inside**-0.5 * rng.standard_normal(leaf.shape, np.float32) + (kind == "scale"))

    start = lambda net: jax.tree.map_with_path(draw, shapes(net))
    classifier = {"net": start(classifier_of(config)), "shift": jnp.zeros(())}
    return Guided(start(traffic_problem.denoiser_network(config)), potential.stacked(classifier))


def state_dict(params: Params) -> dict[str, np.ndarray]:
    """The parameters by names and in the order of PyTorch's, sorted by name."""
    order = lambda a: a.transpose(a.ndim - 1, a.ndim - 2, *range(a.ndim - 2))
    state = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        keys, value = [part.key for part in path if part.key != "params"], np.asarray(leaf)
        if keys[0] == "map" and keys[-1] == "kernel":
            value = window(keys[1], value)
        state[name(keys)] = np.ascontiguousarray(order(value) if keys[-1] == "kernel" else value)
    return dict(sorted(state.items()))


def window(layer: str, kernel: np.ndarray) -> np.ndarray:
    """The kernel (*window, i, o) of the convolution that a layer of the map's part is in PyTorch."""
    if layer == "squares":  # three functions of the distance, each in squares of 4
        return np.moveaxis(kernel.reshape(3, 4, 4, -1), 0, 2)
    return kernel[None, None] if layer == "mix" else kernel


LEAVES = {"kernel": "weight", "scale": "weight", "Dense_1": "0", "Dense_0": "2"}
"""The second matrix of a feed-forward layer is made first."""


def name(keys: list[str]) -> str:
    """The key of a leaf: scene, after_self1, Dense_0, kernel -> scene.layers.1.after_self.0.weight."""
    parts = [LEAVES.get(key, re.sub(r"^([a-z_]+)(\d+)$", r"layers.\2.\1", key)) for key in keys]
    return ".".join(parts)


def scenes(count: int, cells: int, seed: int) -> tuple[Array, Place]:
    """Vehicles in metres (n, 12, 7), on and off two winding roads, some of them on one another, and some absent."""
    rng = np.random.default_rng(seed)
    distinct = min(count, JUDGED)
    centres = ((np.arange(cells) + 0.5) / cells * 2 - 1) * data.HALF
    angle, shift, wave = (rng.uniform(-high, high, (2, distinct, 1, 1)) for high in (np.pi, 15, 8))
    along = np.cos(angle) * centres + np.sin(angle) * centres[:, None]
    across = np.cos(angle) * centres[:, None] - np.sin(angle) * centres
    distance = np.abs(across + shift + wave * np.sin(along / 15)).min(0) - 8
    place, yaw = rng.normal(0, 15, (distinct, data.VEHICLES, 2)), rng.uniform(0, 2 * np.pi, (distinct, data.VEHICLES))
    size, speed = np.array([4.8, 1.9]) * rng.uniform(0.8, 1.2, place.shape), rng.uniform(0, 15, yaw.shape)
    # Of samples no heading has norm 1, and some have no length.
    length = rng.uniform(0.4, 1.2, yaw.shape)
    size[rng.random(yaw.shape) < 0.01] *= -1
    heading = length * np.stack([np.cos(yaw), np.sin(yaw)])
    vehicles = np.concatenate([place, size, np.moveaxis(heading, 0, -1), speed[..., None]], -1).astype(np.float32)
    rows = np.arange(count) % distinct
    distance, present = np.clip(distance, -20, 20).astype(np.float16), rng.random(yaw.shape) < 0.95
    return jnp.asarray(vehicles[rows]), Place(jnp.asarray(distance[rows]), jnp.asarray(present[rows]))


def check(mesh: jax.sharding.Mesh | None, vehicles: Samples, places: Place) -> oracle.Infractions:
    """What is wrong with scenes in metres."""
    return oracle.of_scenes(vehicles, places.present, places.distance, data.HALF, chunk=CHUNK, mesh=mesh)


def judge(vehicles: Samples, places: Place, steps: int) -> Callable[[], Any]:
    """Asks the oracle about all scenes, `steps` times, on all devices; they are there already."""
    mesh = distributed.make_mesh()
    given = distributed.place(mesh, (vehicles, places))

    def ask() -> None:
        for _ in range(steps):
            jax.block_until_ready(check(mesh, *given))

    return ask


def denoising(problem: OracleProblem) -> losses.Loss:
    """The loss of the baseline; an example is (place, scene)."""
    assert problem.bind is not None
    return losses.conditional(genneg.denoising_loss(problem), problem.bind)


def train(config: TrafficConfig, theta: Params, cells: int, batch: int, steps: int, key: PRNGKey) -> Callable[[], Any]:
    """Goes on training the baseline."""
    vehicles, places = scenes(SCENES, cells, config.seed)
    every = (places, UNITS.normalised(vehicles, places.present))
    held = jax.tree.map(lambda a: a[:1], every)
    settings = config.baseline.settings(0.999, 250, 500)
    task = genneg.base_task(traffic_problem.problem(config), batch, changed(config.fewer))
    context = every, held, key[None]
    return ours.train(task, theta, context, settings, steps, key, distributed.training_mesh(batch, every_core=True))


def sample(problem: OracleProblem, guided: Guided, cells: int, n: int, key: PRNGKey) -> Callable[[], Any]:
    """Draws n scenes on all devices, with maps whose keys and values are there already."""
    mesh = distributed.make_mesh()
    _, places = scenes(n, cells, 0)
    bound = bind(problem, guided, places)
    grid, x = problem.process.grid(problem.steps), jax.random.normal(key, (n, *problem.shape))
    given = distributed.place(mesh, (bound, grid, x))
    return lambda: jax.block_until_ready(refine(problem, mesh, *given))


@partial(jax.jit, static_argnums=0)
def bind(problem: OracleProblem, guided: Guided, places: Place) -> Guided:
    """The model for each place."""
    axes: Any = Guided(BOUND, {"net": BOUND, "shift": None})
    return jax.vmap(lambda place: genneg.bound(problem, guided, place), out_axes=axes)(places)


@partial(jax.jit, static_argnums=(0, 1))
def refine(problem: OracleProblem, mesh: jax.sharding.Mesh | None, bound: Guided, grid: Array, x: Samples) -> Samples:
    """The sampler's steps down the grid from x, each scene with its own place."""
    shared = lambda tree: {"scene": tree["scene"]}
    own = lambda tree: {name: leaf for name, leaf in tree.items() if name != "scene"}
    theta, net = bound.theta, bound.classifiers["net"]

    def one(given: tuple[Array, Params, Params]) -> Array:
        x, mine, classifier = given
        here = {"net": shared(net) | classifier, "shift": bound.classifiers["shift"]}
        kernel = problem.kernel(problem.process, genneg.denoiser(problem, Guided(shared(theta) | mine, here)))
        return sampling.refine(kernel, grid, jax.random.key(0), x)

    return distributed.chunked(one, (x, own(theta), own(net)), problem.chunk, mesh)


def questions(
    problem: OracleProblem, guided: Guided, vehicles: Array, places: Place, key: PRNGKey
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both sides are asked of their networks, and gendiff's answers.

    Returns:
      Inputs: "x0" (n, 12, 7) and "x", noisy at the times "t" (n,); "start" (n, 12, 7) and "times" of the sampler.  The
      places are the first of those that the oracles are asked about.
      Answers: "velocity", "guidance" and "guided" (n, 12, 7), "log_good" (n, 12), "samples" (n, 12, 7), "loss" () and
      its "gradient", all parameters in the order of `state_dict`.
    """
    keys = jax.random.split(jax.random.fold_in(key, 1), len(vehicles))
    start = jax.random.normal(jax.random.fold_in(key, 2), vehicles.shape)
    x0 = UNITS.normalised(vehicles, places.present)
    x, t = jax.vmap(partial(losses.noised, problem.process))(keys, x0)
    bound = bind(problem, guided, places)
    # The key whose halves are `keys`, so that the noise is that of x.
    loss, gradient = jax.jit(jax.value_and_grad(losses.mean(denoising(problem))))(
        guided.theta, jax.random.fold_in(key, 1), (places, x0)
    )
    answers = evaluated(problem, bound, x, t) | {"loss": loss}
    answers["samples"] = refine(problem, None, bound, jnp.array(SHORT), start)
    answers["gradient"] = np.concatenate([leaf.ravel() for leaf in state_dict(gradient).values()])
    return {"x0": x0, "x": x, "t": t, "start": start, "times": jnp.array(SHORT)}, answers


@partial(jax.jit, static_argnums=0)
def evaluated(problem: OracleProblem, bound: Guided, x: Array, t: Array) -> dict[str, Array]:
    """The answers of single evaluations."""
    chain = problem.process

    def one(bound: Guided, x: Array, t: Array) -> dict[str, Array]:
        plain, logits = partial(problem.model, bound.theta), genneg.logit(problem)
        log_c = potential.stack(potential.log_probability(logits), bound.classifiers)
        classifier = jax.tree.map(lambda a: a[0], bound.classifiers)
        return {
            "velocity": (chain.alpha(t) * x - plain(x, t)) / chain.sigma(t),
            "log_good": jax.nn.log_sigmoid(logits(classifier, x, t)),
            "guidance": jax.grad(log_c)(x, t),
            "guided": genneg.denoiser(problem, bound)(x, t),
        }

    axes: Any = Guided(BOUND, {"net": BOUND, "shift": None})
    return jax.vmap(one, (axes, 0, 0))(bound, x, t)
