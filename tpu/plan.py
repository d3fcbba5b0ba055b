"""The pod-scale plan: every `paper` preset compiled for slices of TPUs, without a TPU.

    python -m tpu.plan --output tpu/plan.md

compiles the main programs of each experiment ahead of time for real TPU topologies, which libtpu does on any x86 Linux
machine (`pip install -e '.[tpu]'`).  Memory, FLOPs, bytes, collectives and errors are the compiler's word.  Times are
predicted from them by a roofline that the plan states; nothing is executed and nothing is allocated.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from experiments.censoring import mnist
from experiments.genneg import checkerboard_problem, traffic_problem
from experiments.relative_reward import maze2d, trajectories
from gendiff import devices, distributed, programs, training
from gendiff.data import scenes, traffic
from gendiff.data.windows import Windows
from gendiff.devices import Placement
from gendiff.losses import Aligned
from gendiff.methods import censoring, genneg, relative_reward
from gendiff.nets.scene_transformer import Place

# Chips and slices.


class Chip(NamedTuple):
    """Figures of one chip; see SOURCES."""

    flops: float
    """A second, bfloat16, at peak."""
    memory: float
    """Bytes of HBM."""
    bandwidth: float
    """Of it, bytes a second."""
    links: float
    """Bytes a second over all of its ICI links, both directions together, as Google states it."""


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 400e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9),
}
SOURCES = {
    "v5e": "https://docs.cloud.google.com/tpu/docs/v5e",
    "v5p": "https://docs.cloud.google.com/tpu/docs/v5p",
}


class Slice(NamedTuple):
    """A slice of TPUs, as `jax.experimental.topologies` wants it."""

    chip: str
    chips: int
    topology: str
    options: dict[str, Any]


MEGACORE = {"chip_config_name": "megacore"}
SLICES = {
    "v5e-1": Slice("v5e", 1, "v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    "v5e-8": Slice("v5e", 8, "v5e:2x4", {}),
    "v5e-256": Slice("v5e", 256, "v5e:16x16", {}),
    "v5p-128": Slice("v5p", 64, "v5p:4x4x4", MEGACORE | {"chips_per_host_bounds": (2, 2, 1)}),
}
"""By their names at Google, which count chips of v5e but TensorCores of v5p, two a chip."""


ONE_CHIP = "v5e-1"
"""What efficiencies are relative to: its program with the figures of the chip in question."""


class NoCompiler(Exception):
    """There is no libtpu."""


def devices_of(name: str) -> list[jax.Device]:
    """The devices of a slice, for the compiler.

    Raises:
      NoCompiler: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler("libtpu: expected TPU's compiler, given none: pip install -e '.[tpu]' (on x86 Linux)")
    # Otherwise libtpu asks Google's metadata server, for minutes, which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # One process at a time may have the TPUs; nobody here wants them.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    given = SLICES[name]
    return list(topologies.get_topology_desc(given.topology, "tpu", **given.options).devices)


# The programs.


class Program(NamedTuple):
    """One compiled program of an experiment."""

    kind: Literal["training", "sharded", "replicas", "sampling"]
    """Decides which collectives it may have."""
    what: str
    batch: int
    """Examples, runs or samples of one call, which the devices share."""
    unit: str
    steps: int
    """Of the loop whose body the compiler's costs are of: training steps, or the sampler's."""
    lower: Callable[[jax.sharding.Mesh, int], Any]
    """(mesh, batch) -> `jax.stages.Lowered`."""
    divides: bool = True
    """Whether it is the devices that divide the batch which share it, as in trainings; samplers and replicas pad."""
    chunk: int | None = None
    """Samples at a time and device, of samplers."""
    setup: Callable[[jax.sharding.Mesh, int], Any] | None = None
    """What a sampler does before its loop, where that costs; lowered in the same way."""
    costs: Callable[[jax.sharding.Mesh, int], Any] | None = None
    """One step of a training on a given batch, lowered in the same way, whose costs are taken for those of the
    training: XLA counts the whole pool as read of which a step draws some rows."""
    mesh: Callable[[list[jax.Device], int], jax.sharding.Mesh] | None = None
    """(devices, batch) -> the mesh that the experiment has on them; default: `distributed.training_mesh`."""

    def on(self, devices: list[jax.Device], batch: int) -> jax.sharding.Mesh:
        """The mesh."""
        if self.mesh is not None:
            return self.mesh(devices, batch)
        return distributed.training_mesh(batch if self.divides else None, devices)


Tree = Any


def shaped(tree: Tree, sharding: Any) -> Tree:
    """Shapes with a sharding, in place of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """A shape."""
    return jax.ShapeDtypeStruct(shape, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
NUMBER, WHOLE = of(()), of((), jnp.int32)


def many(tree: Tree, n: int) -> Tree:
    """n of a tree of shapes, stacked on axis 0."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), tree)


class Trained(NamedTuple):
    """A training: the arguments of `training.train`, as shapes."""

    task: Callable[[Any], training.Task]
    params: Tree
    context: Tree
    settings: training.Settings

    def lower(self, mesh: jax.sharding.Mesh, fsdp: bool = False) -> Any:
        """The steps, as `training.train` calls them: a loop of a number that it is told, over one step."""
        state = jax.eval_shape(partial(programs.begin, self.settings), KEY, self.params)
        placement = Placement(mesh, fully_sharded=fsdp)
        places = placement.of_state(state)
        state = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state, places)
        context, count = shaped((self.context, WHOLE), distributed.replicated(mesh))
        return programs.steps_at_once.lower(self.task, self.settings, placement, state, context, count)

    def step(self, mesh: jax.sharding.Mesh) -> Any:
        """One step on a given batch, as `training.train` calls it where batches come from the host."""
        whole = distributed.replicated(mesh)
        state = shaped(jax.eval_shape(partial(programs.begin, self.settings), KEY, self.params), whole)
        batch = shaped(jax.eval_shape(lambda key, context: drawn(self.task(context), key), KEY, self.context), None)
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=distributed.split(mesh)), batch)
        context, place = shaped(self.context, whole), Placement(mesh)
        return programs.step_on_batch.lower(self.task, self.settings, place, state, context, batch)


def drawn(task: training.Task, key: Any) -> Any:
    """A batch of a task that draws its own."""
    assert task.draw is not None
    return task.draw(key)


def trainings(make: Callable[[int], Trained], pool: bool, fsdp: bool = False) -> dict[str, Any]:
    """Two fields of a program, of batch -> training; `pool`: it draws from much more than a batch."""
    return {
        "lower": lambda mesh, batch: make(batch).lower(mesh, fsdp),
        "costs": (lambda mesh, batch: make(batch).step(mesh)) if pool else None,
    }


class SideBySide(NamedTuple):
    """Trainings side by side: the arguments of `training.train`, those of one run where runs have their own."""

    task: Callable[[Any], training.Task]
    params: Tree
    context: Tree
    own: Any
    settings: training.Settings

    def lower(self, mesh: jax.sharding.Mesh, runs: int) -> Any:
        """The steps."""
        placement, state, context, count = self.shapes(mesh, runs)
        return programs.steps_at_once.lower(self.task, self.settings, placement, state, context, count)

    def step(self, mesh: jax.sharding.Mesh, runs: int) -> Any:
        """One step of all runs on given batches."""
        placement, state, context, count = self.shapes(mesh, runs)
        batch = jax.eval_shape(lambda key, context: drawn(self.task(context), key), KEY, self.context)
        batch = shaped(many(batch, count.shape[0]), devices.over_replicas(mesh))
        return programs.step_on_batch.lower(self.task, self.settings, placement, state, context, batch)

    def shapes(self, mesh: jax.sharding.Mesh, runs: int) -> tuple[Placement, Tree, Tree, jax.ShapeDtypeStruct]:
        """The placement; state, context and counts of all runs, with those that fill up the mesh."""
        padded, context = devices.padded_runs(mesh, runs), self.all_runs(runs)
        flags = tuple(jax.tree.leaves(jax.tree.broadcast(self.own, context)))
        placement, each = Placement(mesh, True, flags), devices.over_replicas(mesh)
        state = jax.eval_shape(partial(programs.begin, self.settings), many(KEY, padded), many(self.params, padded))
        own, shared = placement.divide(self.context)
        context = placement.join(
            jax.tree.structure(context), shaped(many(own, padded), each), shaped(shared, distributed.replicated(mesh))
        )
        return placement, shaped(state, each), context, shaped(many(WHOLE, padded), each)

    def mesh(self, places: list[jax.Device], runs: int) -> jax.sharding.Mesh:
        """That of `training.train`."""
        keys, params = many(KEY, runs), many(self.params, runs)
        asked = training.Training(keys, params, self.task, self.all_runs(runs), self.settings, own=self.own)
        return devices.runs_mesh(places, runs, training.shareable(asked))

    def all_runs(self, runs: int) -> Tree:
        """The context of all runs."""
        flags = jax.tree.broadcast(self.own, self.context)
        return jax.tree.map(lambda own, a: many(a, runs) if own else a, flags, self.context)


PAPER = "paper"


def checkerboard_programs() -> dict[str, Program]:
    """Points of a checkerboard."""
    config = checkerboard_problem.PRESETS[PAPER]
    setup = checkerboard_problem.problem(config)
    at = jnp.zeros(2), jnp.zeros(())
    theta = jax.eval_shape(checkerboard_problem.denoiser_network(config).init, KEY, *at)
    phi = jax.eval_shape(checkerboard_problem.classifier_network(config).init, KEY, *at)
    most = 4096

    def task(points: Any) -> training.Task:
        # As the baseline's, which draws all points in every step.
        return training.Task(genneg.denoising_loss(setup), lambda key: points)

    def base(batch: int) -> Trained:
        settings = training.Settings(config.baseline.steps, decay=0.998, schedule="constant", every=500)
        return Trained(task, theta, of((batch, 2)), settings)

    rows = training.capacity(config.draws.budget // 5)

    def classifier(batch: int) -> Trained:
        settings = training.Settings(config.classifier.steps, 5e-3, 0.998, 500, warmup=200)
        context = classifier_context(lambda n: of((n, 2)), rows, most, None)
        return Trained(genneg.classifier_task(setup, batch // 2, most), phi, context, settings)

    def sampler(mesh: jax.sharding.Mesh, n: int) -> Any:
        guided = genneg.Guided(theta, many({"net": phi, "shift": NUMBER}, config.rounds))
        given = shaped((guided, KEY, NUMBER, None), distributed.replicated(mesh))
        return genneg.drawn.lower(setup, n, mesh, *given)

    return {
        "base": Program(
            "training", "baseline", config.points, "points", config.baseline.steps, **trainings(base, True)
        ),
        "classifier": Program(
            "training", "a classifier", config.classifier.batch, "points", config.classifier.steps,
            **trainings(classifier, True),
        ),
        "sampler": Program(
            "sampling", f"Heun, guided by {config.rounds} classifiers", config.draws.batch, "samples",
            config.sampler_steps, sampler, False, setup.chunk,
        ),
    }  # fmt: skip


def classifier_context(pool: Callable[[int], Tree], rows: int, most: int, conditions: Tree) -> dict[str, Tree]:
    """What `genneg.fit_classifier` gives its task; `pool` are so many samples."""
    return {
        "pool": pool(2 * rows),
        "edges": (of((rows,)),) * 2,
        "held_out": pool(2 * most),
        "counts": (NUMBER,) * 2,
        "weights": (NUMBER,) * 2,
        "shift": NUMBER,
        "key": KEY,
        "conditions": conditions,
    }


def traffic_programs() -> dict[str, Program]:
    """Scenes of traffic."""
    config = traffic_problem.PRESETS[PAPER]
    setup = traffic_problem.problem(config, "agent")
    vehicles, cells = traffic.VEHICLES, traffic.CELLS
    place: Any = Place(of((cells, cells), jnp.float16), of((vehicles,), bool))  # type: ignore[arg-type]
    theta = jax.eval_shape(traffic_problem.denoiser_network(config).init, KEY, place)
    phi = jax.eval_shape(traffic_problem.classifier_network(config, "agent").init, KEY, place)
    count, held = config.scenes * 8 // 10, 512  # of ten maps eight are for training
    scene = of((vehicles, 7))

    def base(batch: int) -> Trained:
        settings = config.baseline.settings(0.999, 250, 500)
        context = ((many(place, count), many(scene, count)), (many(place, held), many(scene, held)), many(KEY, held))
        return Trained(genneg.base_task(setup, batch, scenes.changed(config.fewer)), theta, context, settings)

    most, rows = 256, training.capacity(3 * config.draws.per_class)
    pool = lambda n: {"x": of((n, vehicles, 7)), "row": of((n,), jnp.int32), "labels": of((n, vehicles))}

    def classifier(batch: int) -> Trained:
        settings = config.classifier.settings(0.998, 250, 100)
        context = classifier_context(pool, rows, most, many(place, count))
        return Trained(genneg.classifier_task(setup, batch // 2, most), phi, context, settings)

    guided = genneg.Guided(theta, many({"net": phi, "shift": NUMBER}, 2))

    def sampler(mesh: jax.sharding.Mesh, n: int) -> Any:
        given = shaped((guided, KEY, NUMBER, many(place, n)), distributed.replicated(mesh))
        return genneg.drawn.lower(setup, n, mesh, *given)

    def maps(mesh: jax.sharding.Mesh, n: int) -> Any:
        def encoded(guided: genneg.Guided, places: Place) -> Any:
            def one(each: Place) -> Any:
                bound = genneg.bound(setup, guided, each)
                return bound.theta["memory"], bound.classifiers["net"]["memory"]

            return distributed.chunked(one, places, setup.chunk, mesh, cut=False)

        return jax.jit(encoded).lower(*shaped((guided, many(place, n)), distributed.replicated(mesh)))

    return {
        "base": Program(
            "training", "baseline", config.baseline.batch, "scenes", config.baseline.steps, **trainings(base, True)
        ),
        "classifier": Program(
            "training", "a classifier by vehicle", config.classifier.batch, "scenes", config.classifier.steps,
            **trainings(classifier, True),
        ),
        "sampler": Program(
            "sampling", "ancestral, guided by 2 classifiers", config.draws.batch, "samples", config.sampler_steps,
            sampler, False, setup.chunk, maps,
        ),
    }  # fmt: skip


def mnist_programs() -> dict[str, Program]:
    """Crossed sevens."""
    config = mnist.PRESETS[PAPER]
    setup = mnist.problem(config)
    image = of((config.size, config.size, 1))
    theta = jax.eval_shape(mnist.unet_of(config).init, KEY, image, NUMBER)
    phi = jax.eval_shape(mnist.reward_of(config).init, KEY, image, NUMBER)
    images, sets = 5500, 1024  # MNIST's sevens without the crossed ones; `censoring.fit` pads labels to 1024

    def base(batch: int) -> Trained:
        settings = training.Settings(
            config.training.steps, config.training.rate, config.decay, 100, 100, config.schedule
        )
        return Trained(mnist.base_task(setup, batch), theta, many(image, images), settings)

    def reward(batch: int) -> Trained:
        k, steps = config.members, config.reward.steps
        settings = training.Settings(
            steps, config.reward.rate, 0.0, 50, schedule="linear", clip=None, weight_decay=0.05
        )
        context = (many(image, sets), of((sets,)))
        return Trained(censoring.reward_task(setup, batch), many(phi, k), (*many(context, k), WHOLE, NUMBER), settings)

    def sampler(mesh: jax.sharding.Mesh, n: int) -> Any:
        given = shaped((theta, many(phi, config.members), KEY, NUMBER, WHOLE), distributed.replicated(mesh))
        settings = censoring.Censoring(scale=0.0)  # as `censoring.draw`: the scale is an argument
        return censoring.drawn.lower(setup, settings, n, mesh, *given)

    return {
        "base": Program(
            "training", "base model", config.training.batch, "images", config.training.steps, **trainings(base, False)
        ),
        "base-sharded": Program(
            "sharded", "base model, fully sharded", config.training.batch, "images", config.training.steps,
            **trainings(base, False, True),
        ),
        "reward": Program(
            "training", f"{config.members} rewards", config.reward.batch, "images", config.reward.steps,
            **trainings(reward, False),
        ),
        "sampler": Program(
            "sampling", f"ancestral, guided by {config.members} rewards", config.samples // 2, "samples",
            config.sampler_steps, sampler, False, setup.chunk,
        ),
    }  # fmt: skip


def maze_programs() -> dict[str, Program]:
    """Relative rewards in mazes."""
    config = maze2d.PRESETS[PAPER]
    families = maze2d.families("umaze")
    given, asked, size = families[1].models(config), families[1].rewards(config), len(maze2d.COORDINATES)
    path = of((config.horizon, size))
    theta = jax.eval_shape(trajectories.unet_of(config).init, KEY, path, NUMBER)
    phi = jax.eval_shape(asked.network.init, KEY, path, NUMBER)

    n = config.transitions
    windows: Any = Windows(of((n, size)), of((n,), jnp.int32), of((n,), jnp.int32), of((2,)))  # type: ignore[arg-type]
    own = {"windows": windows, "count": WHOLE, "known": of((config.horizon, size), bool)}
    settings = config.models.settings(config.decay, warmup=100, clip=None)
    models = SideBySide(trajectories.diffuser_task(config), theta, own, True, settings)

    pool = config.pool
    shapes: Any = (
        of((pool, *path.shape)),
        of((pool,), jnp.int32),
        of((pool, maze2d.GOALS, *path.shape)),
        of((pool, *path.shape)),
    )
    examples = Aligned(*shapes)
    settings = config.rewards.settings(0.0, clip=None)
    task = relative_reward.reward_task(asked.problem)
    rewards = SideBySide(task, phi, (examples, {"goal": WHOLE}), (False, True), settings)

    def sampler(mesh: jax.sharding.Mesh, n: int) -> Any:
        known = of((config.horizon, size), bool)
        arguments = shaped((theta, phi, NUMBER, known, many(path, n), KEY), distributed.replicated(mesh))
        static = (given.process, given.model, asked.problem.network, given.switches)
        return relative_reward.steered.lower(*static, mesh, *arguments)

    return {
        "models": Program(
            "replicas", "diffusion models side by side", len(families) * (maze2d.GOALS + 1), "runs",
            config.models.steps, models.lower, False, costs=models.step, mesh=models.mesh,
        ),
        "rewards": Program(
            "replicas", "rewards side by side", maze2d.GOALS * config.seeds, "runs", config.rewards.steps,
            rewards.lower, False, costs=rewards.step, mesh=rewards.mesh,
        ),
        "sampler": Program(
            "sampling", "ancestral, steered by a reward", config.plans, "samples", config.diffusion_steps, sampler,
            False, 64,
        ),
    }  # fmt: skip


@contextlib.contextmanager
def as_on_tpus() -> Iterator[None]:
    """Where the library asks which backend it is on, it is told TPU, as it will be there."""
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        yield


EXPERIMENTS: dict[str, Callable[[], dict[str, Program]]] = {
    "genneg.checkerboard": cache(as_on_tpus()(checkerboard_programs)),
    "genneg.traffic": cache(as_on_tpus()(traffic_programs)),
    "censoring.mnist": cache(as_on_tpus()(mnist_programs)),
    "relative_reward.maze2d": cache(as_on_tpus()(maze_programs)),
}


# What the compiler says.

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip
INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = ([^=]*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
SHAPE = re.compile(r"\b(pred|token|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,<=]*)\]")


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str
    size: int
    """Bytes of the whole array: what an all-reduce reduces, an all-gather gathers, a reduce-scatter starts from; of a
    permutation, what one device sends."""
    looped: bool = False
    """Whether it is in a loop, and so in every step."""
    group: int | None = None
    """How many devices take part in it together; None for all."""


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program, in HLO's text; one in a loop is one."""
    found, computation = [], ""
    looped, uses, chains = set[str](), dict[str, set[str]](), set[str]()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := COMPUTATION.match(line):
            computation = header[1]
        looped.update(re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", line))
        uses.setdefault(computation, set()).update(re.findall(r"%([\w.\-]+)", line))
        if match := INSTRUCTION.match(line):
            # TPU's compiler cuts a collective into a chain of steps that it fuses with other work.
            if chain := re.search(r'chain_id="\w+"', line):
                if chain[0] in chains:
                    continue
                chains.add(chain[0])
            members = groups(line)
            group = None if members is None else len(members[0])
            each = _collective(match[2], match[1], bool(match[3]), computation, group or devices)
            found.append((computation, each._replace(group=group)))
    names, new = set(uses), looped
    while new := {used for name in new for used in uses.get(name, ()) if used in names} - looped:
        looped |= new
    return [each._replace(looped=where in looped) for where, each in found]


def _collective(kind: str, shapes: str, start: bool, computation: str, devices: int) -> Collective:
    """Of an instruction in a computation; `start` if it is the first half of two."""
    sizes = [_size(*shape) for shape in SHAPE.findall(shapes)]
    if start and kind != "all-reduce":
        # (operands, results, and words for the hardware, which are scalars)
        sizes = sizes[: len(sizes) - len(re.findall(r"\b[us]32\[\]", shapes))]
        sizes = sizes[len(sizes) // 2 :]
    if kind == "reduce-scatter":
        sizes = [each * devices for each in sizes]
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # TPU's compiler fuses it from an all-reduce and a slice
    return Collective(kind, sum(sizes))


def groups(line: str) -> list[list[int]] | None:
    """The groups of devices of a collective, as places in the mesh; None where all devices are one group.

    XLA has three spellings: {{0,1},{2,3}}, an iota such as [2,2]<=[4] or [4,2]<=[2,4]T(1,0), and, of JAX 0.12 on, the
    axes of a mesh, mesh['replica'=2,'data'=4] {'data'}.
    """
    if match := re.search(r"replica_groups=\{(\{[0-9,{}]+\})\}", line):
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line):
        shape, sizes = ([int(n) for n in text.split(",")] for text in match.groups()[:2])
        order = [int(n) for n in match[3].split(",")] if match[3] else range(len(sizes))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape).tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]+)\] *\{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=([0-9]+)", match[1])}
        inside = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[2])]
        devices = np.arange(math.prod(axes.values())).reshape([*axes.values()])
        last = np.moveaxis(devices, inside, range(-len(inside), 0))
        return last.reshape(-1, math.prod(last.shape[devices.ndim - len(inside) :])).tolist()
    return None


def _size(dtype: str, dimensions: str) -> int:
    """Bytes of an array of HLO."""
    if dtype == "token":
        return 0
    bits = 8 if dtype == "pred" else int(re.findall(r"[0-9]+", dtype)[0])
    elements = math.prod(int(d.lstrip("<=")) for d in dimensions.split(",") if d)
    return -(-elements * bits // 8)


class Measured(NamedTuple):
    """What the compiler says about one program on one slice; costs and memory are one device's."""

    arguments: float
    temporaries: float
    outputs: float
    """Without those that take the place of arguments."""
    flops: float
    """Of one pass through the loop, and what is before and after it."""
    accessed: float
    """Bytes, likewise."""
    collectives: tuple[Collective, ...]
    seconds: float
    """That compiling took."""
    setup_flops: float = 0.0
    setup_accessed: float = 0.0
    data: int | None = None
    """Length of the mesh's axis `data`, where that is not all devices."""

    @property
    def memory(self) -> float:
        """Bytes on one device, all at once."""
        return self.arguments + self.temporaries + self.outputs


class Failed(NamedTuple):
    """A program that there is not, and why."""

    reason: str


def measured(
    compiled: Any, mesh: jax.sharding.Mesh, seconds: float = 0.0, setup: Any = None, costs: Any = None
) -> Measured:
    """Reads a compiled program; `setup` and `costs` are the program's, where it has them."""
    memory = compiled.memory_analysis()
    cost = (costs or compiled).cost_analysis()
    before = {} if setup is None else setup.cost_analysis()
    return Measured(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        tuple(collectives(compiled.as_text(), mesh.size)),
        seconds,
        before.get("flops", 0.0),
        before.get("bytes accessed", 0.0),
        mesh.shape["data"],
    )


def compile_one(experiment: str, program: str, where: str, batch: int) -> Measured | Failed:
    """Compiles a program for a slice; what goes wrong is the compiler's message."""
    given = EXPERIMENTS[experiment]()[program]
    with as_on_tpus():
        try:
            mesh = given.on(devices_of(where), batch)
            begun = time.perf_counter()
            compiled = given.lower(mesh, batch).compile()
            took = time.perf_counter() - begun
            setup, costs = (each and each(mesh, batch).compile() for each in (given.setup, given.costs))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            return Failed(reason(str(error)))
    return measured(compiled, mesh, took, setup, costs)


def reason(message: str) -> str:
    """The first line of an error, and where memory is too small, by how much."""
    if used := re.search(r"Used ([0-9.]+[KMGT]) of ([0-9.]+[KMGT]) hbm", message):
        return f"out of memory: {used[1]}iB of {used[2]}iB"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


# The roofline.


class Predicted(NamedTuple):
    """Seconds of one step."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        """Arithmetic and memory overlap; collectives wait for both, so that this is the worst case of them."""
        return max(self.compute, self.memory) + self.links

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def link_seconds(given: tuple[Collective, ...], devices: int, chip: Chip) -> float:
    """Seconds of collectives, as rings over all links of a chip, one direction of each at a time (half of `links`)."""
    seconds = 0.0
    for each in given:
        n = each.group or devices
        passes = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        seconds += each.size * passes.get(each.kind, (n - 1) / n) / (chip.links / 2)
    return seconds


def predict(given: Measured, chip: Chip, devices: int) -> Predicted:
    """The time of one step of the program's loop."""
    flops, accessed = given.flops - given.setup_flops, given.accessed - given.setup_accessed
    return Predicted(
        max(flops, 0.0) / chip.flops,
        max(accessed, 0.0) / chip.bandwidth,
        link_seconds(tuple(each for each in given.collectives if each.looped), devices, chip),
    )


def whole(program: Program, given: Measured, chip: Chip, devices: int, batch: int) -> float:
    """Seconds of all steps: of a training, or of one call of a sampler with all of its chunks."""
    before = max(given.setup_flops / chip.flops, given.setup_accessed / chip.bandwidth)
    once = link_seconds(tuple(each for each in given.collectives if not each.looped), devices, chip)
    chunks = 1 if program.chunk is None else -(-batch // (devices * program.chunk))
    return chunks * (program.steps * predict(given, chip, devices).step + before) + once


def efficiency(alone: float, together: float, devices: int) -> float:
    """Of the same work: time on one chip over n times that on n chips."""
    return alone / (devices * together)


# The plan.


@dataclasses.dataclass(frozen=True)
class Entry:
    """One program on one slice, with one batch."""

    experiment: str
    program: str
    where: str
    batch: int
    result: Measured | Failed


def batches(program: Program, devices: int) -> list[int]:
    """The preset's batch, and where the devices do not divide it, the next multiple too."""
    if program.divides and program.batch % devices:
        return [program.batch, -(-program.batch // devices) * devices]
    return [program.batch]


def findings(entries: list[Entry]) -> list[str]:
    """What is not as it should be: each program's collectives, its memory, and whether it compiles."""
    found = []
    for entry in entries:
        program, slice_ = EXPERIMENTS[entry.experiment]()[entry.program], SLICES[entry.where]
        name = f"{entry.experiment} {entry.program} on {entry.where}, {entry.batch:,} {program.unit}"
        if isinstance(entry.result, Failed):
            found.append(f"{name}: {entry.result.reason}")
            continue
        if wrong := unexpected(program.kind, entry.result.collectives, slice_.chips, entry.result.data):
            found.append(f"{name}: {wrong}")
        if entry.result.memory > CHIPS[slice_.chip].memory:
            found.append(f"{name}: {quantity(entry.result.memory)}B do not fit")
    return found


JOINED = 120 * 2**20
"""Bytes up to which libtpu joins all-reduces (seen: of 300 arrays of 1 MiB 120, 120 and 60): a larger gradient is
reduced in pieces of at most so many.  With its option xla_jf_crs_combiner_threshold_in_bytes it is one."""


MANY = 64
"""Chips from which on TPU's compiler makes all-reduces of reduce-scatters and of all-gathers, on v5p of any size."""


def unexpected(kind: str, given: tuple[Collective, ...], devices: int, data: int | None = None) -> str:
    """What is wrong with a program's collectives; empty if nothing is.

    Args:
      data: length of the mesh's axis `data`; all devices unless given.
    """
    if kind in ("training", "replicas"):  # the loss, summed over steps, may be reduced once after them
        given = tuple(each for each in given if each.looped or each[:2] != ("all-reduce", 4))
    kinds = [each.kind for each in given]
    alone = kind == "replicas" and (data or 1) == 1  # a device a run; else devices share the batches of their runs
    if devices == 1 or kind == "sampling" or alone:
        return f"expected no collective, given {counted(given)}" if kinds else ""
    allowed = {devices, data or devices} if kind == "training" else {data or devices}  # over copies too
    if across := [each for each in given if (each.group or devices) not in allowed]:
        return f"expected collectives of {data} devices each, given {counted(tuple(across))} of others"
    if kind in ("training", "replicas"):
        smallest = sorted(each.size for each in given)[:2]
        pieces = set(kinds) == {"all-reduce"} and (len(kinds) == 1 or sum(smallest) > JOINED)
        return "" if pieces else f"expected one all-reduce, given {counted(given)}"
    both = {"all-gather", "reduce-scatter"} if devices < MANY else set[str]()
    if kinds and both <= set(kinds) <= {"all-reduce", "all-gather", "reduce-scatter"}:
        return ""
    return f"expected reduce-scatter and all-gather, given {counted(given)}"


def counted(given: tuple[Collective, ...]) -> str:
    """Collectives by kind: how many and of how many bytes."""
    parts = []
    for kind in dict.fromkeys(each.kind for each in given):
        sizes = [each.size for each in given if each.kind == kind]
        parts.append(f"{len(sizes)} {kind} ({quantity(sum(sizes))}B)")
    return ", ".join(parts) or "none"


def quantity(value: float) -> str:
    """A number with three digits and a decimal prefix."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds in a unit that one reads."""
    for least, size, unit in ((86400, 86400, "d"), (3600, 3600, "h"), (60, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms")):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


HEAD = (
    "program", "slice", "batch", "memory a device (arguments + temporaries + outputs)", "fits", "FLOP", "bytes",
    "collectives", "step", "bound by", "efficiency", "whole",
)  # fmt: skip


def table(entries: list[Entry]) -> str:
    """The rows of one experiment."""
    body = []
    for entry in entries:
        program, slice_ = EXPERIMENTS[entry.experiment]()[entry.program], SLICES[entry.where]
        chip, result = CHIPS[slice_.chip], entry.result
        how = " (rounded up)" if entry.batch != program.batch else ""
        if isinstance(result, Measured) and result.data and result.data < slice_.chips:
            how += f", {slice_.chips // result.data} x {result.data} chips"
        first = [entry.program, entry.where, f"{entry.batch:,} {program.unit}{how}"]
        if isinstance(result, Failed):
            body.append([*first, result.reason, *[""] * 8])
            continue
        fits = "yes" if result.memory <= chip.memory else "**no**"
        parts = " + ".join(f"{quantity(each)}B" for each in result[:3])
        predicted, took = predict(result, chip, slice_.chips), whole(program, result, chip, slice_.chips, entry.batch)
        alone = reference(entry, entries)
        body.append([
            *first,
            f"{quantity(result.memory)}B ({parts})",
            fits,
            quantity(result.flops - result.setup_flops),
            f"{quantity(result.accessed - result.setup_accessed)}B",
            counted(result.collectives),
            duration(predicted.step),
            predicted.bound,
            "-" if alone is None else f"{100 * efficiency(alone, took, slice_.chips):.3g} %",
            duration(took),
        ])  # fmt: skip
    return tabulate(body, HEAD, tablefmt="github", disable_numparse=True)


def reference(entry: Entry, entries: list[Entry]) -> float | None:
    """Seconds of the same work on one chip, if it compiles there: for a rounded batch, in proportion."""
    for other in entries:
        same = (other.experiment, other.program, other.where) == (entry.experiment, entry.program, ONE_CHIP)
        if same and isinstance(other.result, Measured):
            program = EXPERIMENTS[entry.experiment]()[entry.program]
            alone = whole(program, other.result, CHIPS[SLICES[entry.where].chip], 1, other.batch)
            return alone * entry.batch / other.batch
    return None


def page(entries: list[Entry], versions: str) -> str:
    """The plan in Markdown."""
    chips = tabulate(
        [
            [name, f"{quantity(c.flops)}FLOP/s", f"{quantity(c.memory)}B", f"{quantity(c.bandwidth)}B/s",
             f"{quantity(c.links)}B/s", SOURCES[name]]
            for name, c in CHIPS.items()
        ],
        ("chip", "peak, bfloat16", "HBM", "its bandwidth", "ICI, both directions", "source"),
        tablefmt="github",
    )  # fmt: skip
    slices = "; ".join(
        f"{name}: {each.chips} chip{'s' * (each.chips > 1)}, {each.topology}" for name, each in SLICES.items()
    )
    sections = []
    for experiment, named_programs in EXPERIMENTS.items():
        rows = [entry for entry in entries if entry.experiment == experiment]
        if rows:
            named = named_programs().items()
            what = "; ".join(f"`{name}`: {each.what}, {each.steps:,} steps" for name, each in named)
            sections.append(f"## {experiment}\n\n{what}.\n\n{table(rows)}")
        if out := left_out(experiment, rows):
            sections.append(f"Not compiled yet, of {experiment}: {out}.")
    wrong = findings(entries)
    told = "\n".join(f"- {each}" for each in wrong) or "None."
    good = sum(not findings([entry]) for entry in entries)
    return INTRODUCTION.format(
        chips=chips, slices=slices, versions=versions, findings=told, good=good, count=len(entries),
        sections="\n\n".join(sections),
    )  # fmt: skip


def left_out(experiment: str, entries: list[Entry]) -> str:
    """The programs of an experiment of which the plan says nothing, with their slices."""
    there = {(entry.program, entry.where) for entry in entries}
    missing = {name: [where for where in SLICES if (name, where) not in there] for name in EXPERIMENTS[experiment]()}
    return "; ".join(f"`{name}` on {', '.join(slices)}" for name, slices in missing.items() if slices)


INTRODUCTION = """\
# The pod-scale plan

The main programs of each experiment's `paper` preset, compiled ahead of time for slices of TPUs, on a CPU machine
without a TPU. **Nothing was executed**: memory, FLOP, bytes and collectives are the compiler's word
({versions}), times are predicted from them. Made by `python -m tpu.plan --output tpu/plan.md`, which needs
`pip install -e '.[tpu]'`; with `--results tpu/plan.json` programs that were compiled at an earlier commit are kept.

## Chips

{chips}

Slices, by their names at Google, which count chips of v5e but TensorCores of v5p, two a chip: {slices}.

## How times are predicted

step = max(FLOP / peak, bytes / HBM bandwidth) + sum over collectives of f x size / (half the ICI bandwidth),
f = 2 (n - 1) / n for an all-reduce of n chips, (n - 1) / n for a reduce-scatter, an all-gather or an all-to-all, 1 for
a permutation.

- FLOP, bytes and collectives are of one device and one step: XLA counts the body of a loop once. What a sampler does
  before its loop (the maps of traffic) is compiled alone, subtracted, and added once; so are collectives that are not
  in the loop. FLOP and bytes of a
  training step are those of a step on a given batch where it draws from a pool: XLA counts the whole pool as read.
- Float32 programs multiply matrices on a TPU in one bfloat16 pass (JAX's default precision), so the peak is bfloat16's.
- XLA counts as bytes also what stays in the chip's own memory between operations: programs that are small enough for
  that are faster than their bytes say.
- Arithmetic and memory overlap perfectly, collectives with nothing: for large collectives the worst case.
- The links carry a ring over all of a chip's links at full speed. v5e slices below 16 x 16 are no torus: up to half as
  fast. Latency (of the order of 1 us a hop) and the launch of each operation (likewise) are left out.
  **Steps of less than about 100 us are therefore no forecasts**, nor are their efficiencies.
- efficiency: time on one chip over n times that on n chips, for the same work (strong scaling); one chip's program is
  v5e's, for v5p with the figures of v5p; `-` where it does not compile. A batch that the chips do not divide is shared
  by as many as do, and the others compute copies of these parts; what it would take rounded up stands beside it, with
  one chip's time in proportion.
- whole: all steps of one training, or of one call of a sampler; without compilation, validation, checkpoints and input.
- Sizes of data that only a run knows: traffic's pools 262,144 scenes of a class, the checkerboard's 1,048,576 points,
  5,500 images of sevens.

## Findings

{good} of {count} programs compile, fit, and have the collectives that they should have: in training one all-reduce of
the gradient (reduce-scatter and all-gather where the state is sharded), in sampling and between replicas none (chips
that they would leave idle share the batches of a run, with one all-reduce among themselves). libtpu reduces gradients
of more than 120 MiB in pieces, as few as that allows, unless it is given a higher
`xla_jf_crs_combiner_threshold_in_bytes`. On 64 and 256 chips it makes all-reduces of reduce-scatters and of most
all-gathers, which move up to twice as many bytes. The others:

{findings}

{sections}
"""


# The command line.


def measure(experiment: str, program: str, where: str, batch: int, limit: float) -> Measured | Failed:
    """`compile_one` in a process of its own: compilers crash, run out of memory and take for ever."""
    command = [sys.executable, "-m", "tpu.plan", "--one", experiment, program, where, str(batch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1], check=False
        )
    except subprocess.TimeoutExpired:
        return Failed(f"did not compile within {limit:g} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Failed(f"the compiler ended with {done.returncode}: {last[:160]}")
    return decoded(json.loads(lines[-1]))


def decoded(given: dict[str, Any]) -> Measured | Failed:
    """A result from JSON."""
    if "reason" in given:
        return Failed(**given)
    return Measured(**given | {"collectives": tuple(Collective(*each) for each in given["collectives"])})


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tpu.plan", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="file for the plan; default: print it")
    parser.add_argument("--topology", action="append", choices=SLICES, help="this slice only; may be repeated")
    parser.add_argument("--experiment", action="append", choices=EXPERIMENTS, help="this one only; may be repeated")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that one program may compile (3600)")
    parser.add_argument("--results", type=Path, help="file of results so far: what it holds is not compiled again")
    parser.add_argument("--held", action="store_true", help="of what --results holds alone; nothing is compiled")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Compiles what is asked for, one program after the other, and writes the plan after each."""
    given = arguments().parse_args()
    jax.config.update("jax_platforms", "cpu")
    if given.one:
        experiment, program, where, batch = given.one
        print(json.dumps(compile_one(experiment, program, where, int(batch))._asdict()))
        return
    try:
        devices_of("v5e-1")
    except NoCompiler as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    versions = f"jax {jax.__version__}, libtpu {_version('libtpu')}"
    held: dict[str, Any] = {}
    if given.results and given.results.exists():
        held = json.loads(given.results.read_text())
    entries: list[Entry] = []
    for experiment in given.experiment or EXPERIMENTS:
        for name, program in EXPERIMENTS[experiment]().items():
            for where in given.topology or SLICES:
                for batch in batches(program, SLICES[where].chips):
                    place = f"{experiment} {name} {where} {batch}"
                    if place not in held:
                        if given.held:
                            continue
                        held[place] = measure(experiment, name, where, batch, given.limit)._asdict()
                    entry = Entry(experiment, name, where, batch, decoded(held[place]))
                    entries.append(entry)
                    print(place, summary(entry.result), file=sys.stderr, flush=True)
                    if given.results:
                        given.results.write_text(json.dumps(held))
                    if given.output:
                        given.output.write_text(page(entries, versions))
    if not given.output:
        print(page(entries, versions))
    if wrong := [each for each in findings(entries) if ": expected" in each]:
        print("\n".join(["error: not the collectives that there should be:", *wrong]), file=sys.stderr)
        raise SystemExit(1)


def summary(result: Measured | Failed) -> str:
    """A result in a few words."""
    if isinstance(result, Failed):
        return result.reason
    return f"{quantity(result.memory)}B, {counted(result.collectives)}, compiled in {result.seconds:.0f} s"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
