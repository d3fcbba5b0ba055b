"""What a mesh costs where there is one device: training steps as `training.train` makes them, beside a plain `jit`.

Both are the same step of the same task, with the same numbers; one has its arrays and its program on a mesh of one
device, the other knows of none. The two are timed in turns, in one process. The figures mean something on a quiet
machine only.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.censoring import mnist
from experiments.genneg import checkerboard_problem, traffic_problem
from experiments.lab.command import main
from experiments.lab.config import Between, Config
from experiments.lab.folder import Folder
from experiments.lab.progress import Progress
from experiments.lab.table import Column, Results, Row
from experiments.speed import table
from gendiff import distributed, nets, programs, steps, training
from gendiff.data import scenes, traffic
from gendiff.devices import Placement
from gendiff.methods import genneg
from gendiff.metrics import rates
from gendiff.training import Metrics, Settings, State
from gendiff.types import Params


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """How long is measured."""

    repetitions: Annotated[int, Between(2, 10_000)] = 21
    """Timed calls of each program."""
    seconds: Annotated[float, Between(0.001, 60.0)] = 1.0
    """Of a call, about; it has as many steps as fit, at least one."""


PRESETS = {
    "smoke": MeshConfig(preset="smoke", repetitions=2, seconds=0.001),
    "default": MeshConfig(),
    "paper": MeshConfig(preset="paper", repetitions=51),
}
COLUMNS = (
    Column("plain_seconds", "plain s a step", digits=5),
    Column("mesh_seconds", "mesh s a step", digits=5),
    Column("overhead", "overhead %", percent=True, digits=2),
    Column("steps", "steps a call", digits=0),
)
NOTES = """\
Seconds: median [smallest, largest] of {repetitions} calls. overhead: geometric mean of the calls' own ratios
less 1, 95 % interval (Student's, of the logarithm); the two programs go first in turns."""


class Trained(NamedTuple):
    """A training of an experiment."""

    task: Callable[[Any], training.Task]
    params: Params
    context: Any
    settings: Settings


def on_checkerboard(size: str) -> Trained:
    """The checkerboard's baseline."""
    board, keys = checkerboard_problem.PRESETS[size], jax.random.split(jax.random.key(0))
    points = jnp.zeros((board.points, 2))
    theta = checkerboard_problem.initialised(checkerboard_problem.denoiser_network(board), keys[0])
    context = points, points, jax.random.split(keys[1], len(points))
    return Trained(checkerboard_problem.base_task(board), theta, context, Settings(board.baseline.steps))


def on_mnist(size: str) -> Trained:
    """That of MNIST."""
    images = mnist.PRESETS[size]
    return Trained(
        mnist.base_task(mnist.problem(images), images.training.batch),
        mnist.initialised(mnist.unet_of(images), images, jax.random.key(0)),
        jnp.zeros((256, images.size, images.size, 1)),
        Settings(images.training.steps),
    )


def on_traffic(size: str) -> Trained:
    """That of traffic scenes."""
    roads, keys, data = traffic_problem.PRESETS[size], jax.random.split(jax.random.key(0)), traffic.embedded("train")
    places = jax.tree.map(jnp.asarray, scenes.place(data))
    examples = (places, jnp.asarray(scenes.normalised(data)))
    theta = nets.fresh(traffic_problem.denoiser_network(roads), keys[0], traffic.take(places, 0))
    change = scenes.changed(roads.fewer)
    task = genneg.base_task(traffic_problem.problem(roads), roads.baseline.batch, change)
    context = (examples, examples, jax.random.split(keys[1], len(data.world)))
    return Trained(task, theta, context, Settings(roads.baseline.steps))


TRAININGS: dict[str, Callable[[str], Trained]] = {
    "checkerboard": on_checkerboard,
    "mnist": on_mnist,
    "traffic": on_traffic,
}
"""By the experiment's name: the preset, "smoke" or "default" -> its training."""


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def plain_steps(
    task: Callable[[Any], training.Task], settings: Settings, state: State, context: Any, count: Int[Array, ""]
) -> tuple[State, Metrics]:
    """`programs.steps_at_once` without a mesh."""
    loss, draw, _ = task(context)
    assert draw is not None
    step = steps.make_step(loss, steps.adam(settings), settings.decay)
    return steps.repeated(steps.make_drawn_step(step, draw), state, count)


def sides(given: Trained) -> dict[str, Callable[[int], float]]:
    """Both programs, each from the same state: a number of steps -> the loss, summed."""
    mesh = distributed.make_mesh(jax.devices()[:1])
    begun = programs.begin(given.settings, jax.random.key(1), given.params)
    states = {"plain": jax.tree.map(jnp.copy, begun), "mesh": distributed.replicate(mesh, begun)}
    contexts = {"plain": given.context, "mesh": distributed.replicate(mesh, given.context)}
    calls = {
        "plain": partial(plain_steps, given.task, given.settings),
        "mesh": partial(programs.steps_at_once, given.task, given.settings, Placement(mesh)),
    }

    def go_on(name: str, count: int) -> float:
        states[name], metrics = jax.block_until_ready(calls[name](states[name], contexts[name], jnp.int32(count)))
        return float(metrics["loss"])

    return {name: partial(go_on, name) for name in calls}


def measure(config: MeshConfig, name: str, given: Trained, progress: Progress) -> dict[str, rates.Estimate]:
    """The metrics of a row."""
    both = sides(given)
    first = {side: go_on(1) for side, go_on in both.items()}  # compiles
    np.testing.assert_allclose(first["mesh"], first["plain"], rtol=1e-4, err_msg=f"the loss of {name}")
    begun = time.perf_counter()
    both["plain"](1)
    steps = max(1, round(config.seconds / (time.perf_counter() - begun)))
    seconds: dict[str, list[float]] = {side: [] for side in both}
    for i in range(config.repetitions + 1):
        for side in sorted(both, reverse=bool(i % 2)):
            begun = time.perf_counter()
            both[side](steps)
            seconds[side].append((time.perf_counter() - begun) / steps)
        progress(name, i, config.repetitions, {})
    plain, mesh = (np.array(seconds[side][1:]) for side in ("plain", "mesh"))
    return {
        "plain_seconds": table.spread(plain),
        "mesh_seconds": table.spread(mesh),
        "overhead": rates.change(mesh, plain),
        "steps": rates.exact(steps),
    }


def run(config: MeshConfig) -> Results:
    """Measures every training, and writes the table."""
    folder = Folder("speed.mesh", config)
    progress = Progress(folder)
    size = "smoke" if config.preset == "smoke" else "default"
    rows = [Row(name, measure(config, name, of(size), progress)) for name, of in TRAININGS.items()]
    return folder.finish(rows, COLUMNS, NOTES.format(repetitions=config.repetitions))


if __name__ == "__main__":
    main(MeshConfig, PRESETS, run)
