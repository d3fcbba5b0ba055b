"""gendiff's side of the first speed table: the public functions as the checkerboard experiment calls them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from experiments.genneg import checkerboard_problem
from experiments.genneg.checkerboard_problem import CheckerboardConfig, classifier_network, denoiser_network
from experiments.lab import start
from gendiff import distributed, losses, potential, programs
from gendiff.devices import Placement
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, OracleProblem
from gendiff.training import Settings, Task
from gendiff.types import Params

LEVELS = (0.01, 0.3, 10.0)
"""Noise levels at which both sides are compared."""
PARITY = 256
"""Points that they are compared on."""


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs, and the networks with their answers for the rival to compare.

    Args:
      setup: "fields" of a `CheckerboardConfig`; "members", the numbers of classifiers; "samples"; "points", the batch
        of a training step; "train_steps" and "products" in a call; "matmul", the size of the large product; "seed".

    Returns:
      The programs, and what `rival.prepare` needs, its "answers" apart.
    """
    start.start()
    config = CheckerboardConfig(**setup["fields"])
    problem, key = checkerboard_problem.problem(config), jax.random.key(setup["seed"])
    theta, classifiers = networks(config, max(setup["members"]), setup["seed"])
    draw = jax.jit(checkerboard_problem.data.draw, static_argnums=(1, 2, 3))
    points = draw(jax.random.fold_in(key, 1), setup["points"], config.cells, config.half_width)
    programs: dict[str, Callable[[], Any]] = {
        "matmul/gendiff": matmul(setup["matmul"], setup["matmul"], 1),
        "skinny/gendiff": matmul(setup["samples"], config.network.width, setup["products"]),
        "train-step/gendiff": train(
            lambda points: Task(losses.denoising(problem.process, problem.model, problem.weight), lambda key: points),
            theta,
            points,
            Settings(6000, decay=0.998, schedule="constant"),
            setup["train_steps"],
            jax.random.fold_in(key, 2),
            distributed.training_mesh(),
        ),
    }
    for members in setup["members"]:
        guided = stack(theta, classifiers[:members])
        programs[f"sample-k{members}/gendiff"] = sample(problem, guided, setup["samples"], jax.random.fold_in(key, 3))
    asked = jax.random.fold_in(key, 4)
    inputs, answers = questions(problem, theta, classifiers, asked)
    # Not below `questions`, which is compiled: samples are whole, as NumPy's.
    answers["samples"] = genneg.draw(problem, stack(theta, classifiers), jax.random.fold_in(asked, 0), PARITY)
    told = {"theta": theta, "classifiers": classifiers, "points": points, "inputs": inputs, "answers": answers}
    return programs, jax.tree.map(np.asarray, told) | {"shapes": shapes(config)}


def shapes(config: CheckerboardConfig) -> dict[str, dict[str, Any]]:
    """The fields of both networks, "denoiser" and "classifier"."""
    both = {
        "denoiser": denoiser_network(config),
        "classifier": classifier_network(config),
    }
    names = ("width", "depth", "fourier", "sharpness", "data_std")
    return {key: {name: getattr(net, name) for name in names if hasattr(net, name)} for key, net in both.items()}


def networks(config: CheckerboardConfig, count: int, seed: int) -> tuple[Params, list[Params]]:
    """theta and `count` classifiers.

    Speed does not depend on their values, but the comparison does: drawn here, no bias is 0 and no output small.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        scale = {"kernel": leaf.shape[0] ** -0.5, "bias": 0.1, "frequencies": 4.0}[path[-1].key]
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    def start(module: nn.Module) -> Params:
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(2), jnp.zeros(()))
        return jax.tree.map_with_path(draw, shapes)

    classifier = classifier_network(config)
    classifiers = [{"net": start(classifier), "shift": jnp.float32(0.1 * i)} for i in range(count)]
    return start(denoiser_network(config)), classifiers


def stack(theta: Params, classifiers: list[Params]) -> Guided:
    """The model with these classifiers."""
    return Guided(theta, potential.stacked(*classifiers) if classifiers else None)


def sample(problem: OracleProblem, guided: Guided, n: int, key: Array) -> Callable[[], Any]:
    """Draws n samples on all devices."""
    mesh = distributed.make_mesh()
    return lambda: jax.block_until_ready(genneg.draw(problem, guided, key, n, mesh))


def train(
    task: Callable[[Any], Task],
    params: Params,
    context: Any,
    settings: Settings,
    steps: int,
    key: Array,
    mesh: jax.sharding.Mesh,
) -> Callable[[], Any]:
    """Goes on training for `steps` steps, as `training.train` does between two validations."""
    placement = Placement(mesh)
    context = placement.put_context(context)
    state = distributed.replicate(mesh, programs.begin(settings, key, params))

    def go_on() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(
            programs.steps_at_once(task, settings, placement, state, context, jnp.int32(steps))
        )

    return go_on


def matmul(rows: int, width: int, repetitions: int) -> Callable[[], Any]:
    """`repetitions` products of (rows, width) and (width, width)."""
    left, right = jnp.ones((rows, width)), jnp.ones((width, width)) / width
    product = jax.jit(jnp.matmul)

    def multiply() -> None:
        for _ in range(repetitions):
            jax.block_until_ready(product(left, right))

    return multiply


@partial(jax.jit, static_argnums=0)
def questions(
    problem: OracleProblem, theta: Params, classifiers: list[Params], key: Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both sides are asked, and gendiff's answers.

    Returns:
      Inputs: "x" (levels, n, 2) noisy points at "levels"; "noise" (n, 2), the sampler's first noise; "times"; "x0",
      "noisy" and "sigma" of a training batch.
      Answers: "denoised", "guidance" and "guided" (levels, n, 2), "loss" and "gradient_norm" ().
    """
    guided = stack(theta, classifiers)
    plain, steered = partial(problem.model, theta), genneg.denoiser(problem, guided)
    levels, grid = jnp.array(LEVELS), problem.process.grid(problem.steps)
    keys = jax.random.split(jax.random.fold_in(key, 0), PARITY)
    batch_key = jax.random.fold_in(key, 1)
    # As `sampling.sample` draws it, to compare what `genneg.draw` returns.
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, problem.steps), problem.shape))(keys)
    x0 = 0.5 * jax.random.normal(jax.random.fold_in(key, 2), (PARITY, *problem.shape))
    x = x0 + levels[:, None, None] * noise[::-1]
    noisy, sigma = jax.vmap(partial(losses.noised, problem.process))(jax.random.split(batch_key, PARITY), x0)
    inputs = {"levels": levels, "x": x, "noise": noise, "times": grid, "x0": x0, "noisy": noisy, "sigma": sigma}

    answers: dict[str, Any] = {}
    at_levels = lambda function: jax.vmap(jax.vmap(function, (0, None)))(x, levels)
    answers["denoised"], answers["guided"] = at_levels(plain), at_levels(steered)
    if classifiers:
        log_c = potential.stack(potential.log_probability(genneg.logit(problem)), guided.classifiers)
        answers["guidance"] = at_levels(jax.grad(log_c))
    loss = losses.mean(losses.denoising(problem.process, problem.model, problem.weight))
    answers["loss"], gradient = jax.value_and_grad(loss)(theta, batch_key, x0)
    squares = jax.tree.map(lambda leaf: jnp.sum(leaf**2), gradient)
    answers["gradient_norm"] = jnp.sqrt(sum(jax.tree.leaves(squares)))
    return inputs, answers
