"""Which collectives the compiler puts into each experiment's programs on eight devices, from the programs' text."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.censoring import mnist
from experiments.genneg import checkerboard_problem, traffic_problem
from experiments.relative_reward import maze2d, trajectories
from gendiff import devices, distributed, losses, potential, programs, training
from gendiff.data import scenes, traffic
from gendiff.data.windows import Windows
from gendiff.devices import Placement
from gendiff.methods import censoring, genneg, relative_reward
from gendiff.training import Settings

NAMES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SETTINGS = Settings(16, 1e-3, every=8)
UNEVEN = 13
"""Samples, which the devices do not divide."""


def collectives(text: str) -> Counter:
    """Instructions of each kind in the text of a compiled program."""
    return Counter(re.findall(rf"= \S+(?: \S+)*? ({'|'.join(NAMES)})(?:-start)?\(", text))


def test_the_parse_sees_collectives():
    mesh = distributed.make_mesh()
    whole = jax.jit(lambda x: jnp.sum(x), in_shardings=distributed.split(mesh))
    assert collectives(whole.lower(jnp.zeros(64)).compile().as_text()) == {"all-reduce": 1}
    gathered = jax.jit(
        lambda x: x * 2, in_shardings=distributed.split(mesh), out_shardings=distributed.replicated(mesh)
    )
    assert collectives(gathered.lower(jnp.zeros(64)).compile().as_text()) == {"all-gather": 1}


def blank(function, *arguments):
    """Zeros of the shapes of the results: no text depends on numbers, and to compute them is a program more."""
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(function, *arguments))


def placed(tree):
    return distributed.place(distributed.make_mesh(), tree)


def steps_text(task, theta, context, fully_sharded=False):
    placement = Placement(distributed.make_mesh(), fully_sharded=fully_sharded)
    state = programs.begin(SETTINGS, jax.random.key(0), theta)
    state = distributed.put(state, placement.of_state(state))
    lowered = programs.steps_at_once.lower(task, SETTINGS, placement, state, placed(context), jnp.int32(1))
    return lowered.compile().as_text()


def classifier_text(setup, phi, synthetic, conditions):
    how = genneg.ClassifierTraining(SETTINGS, half=8, validation=8)
    fit = genneg.Fit(synthetic, synthetic, phi, jax.random.key(4), conditions=conditions)
    context = genneg.classifier_context(fit, how)
    return steps_text(genneg.classifier_task(setup, how.half, how.validation), phi, context)


def student_text(setup, guided, x0, conditions, rows):
    examples = blank(partial(genneg.teach, setup, None), guided, x0, jax.random.key(5), conditions, rows)
    task = genneg.student_task(losses.regression(setup.model, setup.weight), 8, setup.bind)
    return steps_text(task, guided.theta, (examples, rows, len(x0), conditions))


def samples_text(program, static, given):
    return program.lower(*static, distributed.make_mesh(), *placed(given)).compile().as_text()


def of_mnist():
    config = mnist.PRESETS["smoke"]
    setup = mnist.problem(config)
    theta = blank(lambda: mnist.initialised(mnist.unet_of(config), config, jax.random.key(0)))
    images = np.zeros((64, config.size, config.size, 1), np.float32)
    reward = blank(lambda: mnist.initialised(mnist.reward_of(config), config, jax.random.key(1)))
    rewards = jax.tree.map(lambda a: a[None], reward)
    how = censoring.Censoring(scale=0.0, recurrence=1)
    static, given = (setup, how, UNEVEN), (theta, rewards, jax.random.key(2), 1.0, 2)
    k = 3
    several = jax.tree.map(lambda a: jnp.concatenate([a] * k), rewards)
    labelled = (np.zeros((k, 32, *images.shape[1:]), np.float32), np.zeros((k, 32), np.float32), jnp.int32(32), 1.0)
    trainings = [
        partial(steps_text, mnist.base_task(setup, 16), theta, images),
        partial(steps_text, censoring.reward_task(setup, 16), several, labelled),
    ]
    return trainings, partial(samples_text, censoring.drawn, static, given)


def of_traffic():
    config = traffic_problem.PRESETS["smoke"]
    setup, held = traffic_problem.problem(config), traffic.take(traffic.embedded("test"), np.arange(16))
    given = jax.tree.map(jnp.asarray, scenes.place(held))
    place = traffic.take(given, 0)
    theta = blank(traffic_problem.denoiser_network(config).init, jax.random.key(0), place)
    phi = blank(traffic_problem.classifier_network(config, "agent").init, jax.random.key(1), place)
    guided = genneg.append(genneg.Guided(theta), {"net": phi, "shift": jnp.zeros(())})
    x = jnp.asarray(scenes.normalised(held))
    context = ((given, x), (given, x), jax.random.split(jax.random.key(2), 16))
    static, asked = (setup, UNEVEN), (guided, jax.random.key(3), 1.0, jax.tree.map(lambda a: a[:UNEVEN], given))
    pool = {"x": np.asarray(x), "row": np.arange(16), "labels": np.ones((16, 12), bool)}
    synthetic = genneg.Synthetic(pool, pool | {"labels": ~pool["labels"]}, 16, 16)
    trainings = [
        partial(steps_text, genneg.base_task(setup, 16, scenes.changed(0.1)), theta, context),
        partial(classifier_text, setup, phi, synthetic, given),
        partial(student_text, setup, guided, x, given, np.arange(16)),
    ]
    return trainings, partial(samples_text, genneg.drawn, static, asked)


def of_checkerboard():
    config = checkerboard_problem.PRESETS["smoke"]
    setup = checkerboard_problem.problem(config)
    fresh = lambda network, seed: blank(lambda: checkerboard_problem.initialised(network, jax.random.key(seed)))
    theta = fresh(checkerboard_problem.denoiser_network(config), 0)
    net = fresh(checkerboard_problem.classifier_network(config), 1)
    guided = genneg.append(genneg.Guided(theta), {"net": net, "shift": jnp.zeros(())})
    points = jnp.zeros((64, 2))
    context = (points, points, jax.random.split(jax.random.key(2), 64))
    static, asked = (setup, UNEVEN), (guided, jax.random.key(3), 1.0, None)
    drawn = np.zeros((16, 2), np.float32)
    trainings = [
        partial(steps_text, checkerboard_problem.base_task(config), theta, context),
        partial(classifier_text, setup, net, genneg.Synthetic(drawn, drawn, 16, 16), None),
        partial(student_text, setup, guided, points, None, None),
    ]
    return trainings, partial(samples_text, genneg.drawn, static, asked)


def runs_text(task, params, context, own):
    mesh, flags = devices.runs_mesh(), tuple(jax.tree.leaves(jax.tree.broadcast(own, context)))
    placement = Placement(mesh, True, flags)
    state = programs.begin(SETTINGS, training.keys(jax.random.key(0), 8), potential.stacked(*[params] * 8))
    state, counts = devices.spread(mesh, (state, np.full(8, 2, np.int32)))
    lowered = programs.steps_at_once.lower(task, SETTINGS, placement, state, placement.put_context(context), counts)
    return lowered.compile().as_text()


def of_maze():
    config = maze2d.PRESETS["smoke"]
    family = maze2d.families("umaze")[1]
    models, rewards = family.models(config), family.rewards(config)
    path = jnp.zeros((config.horizon, len(maze2d.COORDINATES)))
    theta = blank(trajectories.unet_of(config).init, jax.random.key(0), path, jnp.zeros(()))
    phi = blank(rewards.network.init, jax.random.key(1), path, jnp.zeros(()))
    x0, known = jnp.broadcast_to(path, (64, *path.shape)), jnp.zeros(path.shape, bool)
    targets = jnp.broadcast_to(path, (64, maze2d.GOALS, *path.shape))
    examples = losses.Aligned(x0, jnp.ones(64, jnp.int32), targets, x0)
    # One run each of 8 devices: rewards of one pool, and models of one data set.
    rows = np.zeros((8, 64, path.shape[1]), np.float32)
    begin = np.zeros((8, 16), np.int32)
    own = {
        "windows": Windows(rows, begin, begin + 63, np.zeros((8, 2), np.float32)),
        "count": np.full(8, 16, np.int32),
        "known": np.zeros((8, *path.shape), bool),
    }
    goals = {"goal": np.arange(8) % 4}
    runs = [
        partial(runs_text, relative_reward.reward_task(rewards.problem), phi, (examples, goals), (False, True)),
        partial(runs_text, trajectories.diffuser_task(config), theta, own, True),
    ]
    static = (models, rewards.problem.network)
    given = (theta, phi, jnp.float32(1.0), known, x0[:UNEVEN], jax.random.key(2))
    return runs, partial(samples_text, relative_reward.steered, static, given)


SLOW = pytest.param(of_mnist, marks=pytest.mark.slow)  # minutes of compilation
EXPERIMENTS = pytest.mark.parametrize("of", [of_checkerboard, of_traffic, SLOW], ids=lambda of: of.__name__[3:])


@EXPERIMENTS
def test_training_has_one_all_reduce_and_sampling_none(of):
    trainings, sampling_text = of()
    for training_text in trainings:
        assert collectives(training_text()) == {"all-reduce": 1}
    assert collectives(sampling_text()) == {}


def test_eight_rewards_on_eight_devices_have_no_collective_and_plans_have_none():
    runs, plans_text = of_maze()
    for text in runs:
        assert collectives(text()) == {}
    assert collectives(plans_text()) == {}


def test_a_fully_sharded_state_is_gathered_and_never_whole():
    # Each device holds an eighth of every large array, and the program gathers and reduces nothing but those.
    data = np.zeros((64, 128), np.float32)
    theta = {"w": jnp.ones((128, 256)), "v": jnp.ones((256, 128)), "b": jnp.ones(256)}
    loss = lambda params, key, x: jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - x) ** 2)
    task = lambda data: training.Task(loss, lambda key: training.minibatch(key, data, 16))
    mesh = distributed.make_mesh()
    state = programs.begin(SETTINGS, jax.random.key(0), theta)
    shardings = Placement(mesh, fully_sharded=True).of_state(state)
    held = [
        sharding.shard_shape(leaf.shape)
        for leaf, sharding in zip(*map(jax.tree.leaves, (state.last, shardings.last)), strict=True)
    ]
    assert held == [(256,), (32, 128), (128, 32)]
    found = collectives(steps_text(task, theta, data, fully_sharded=True))
    # One all-reduce of the loss, the small array's gradient and the norms.
    assert found == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}
