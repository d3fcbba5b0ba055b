"""gendiff's side of the third speed table: the public functions as the experiment in Maze2D calls them."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.lab import start
from experiments.relative_reward import maze2d, trajectories
from experiments.relative_reward.maze2d import MazeConfig
from experiments.relative_reward.rows import Rewards
from experiments.speed import memory, ours
from gendiff import distributed, losses, potential, process, sampling, training
from gendiff.convert import diffuser
from gendiff.losses import Aligned
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward import PUBLISHED
from gendiff.nets.temporal import TemporalUnet
from gendiff.nets.window_mlp import WindowMLP
from gendiff.training import Host, Settings, Task
from gendiff.types import Params, PRNGKey, Samples

PARITY = 4
"""Paths that both sides are compared on."""
PATHS = 1000
"""Paths of the data that the training steps draw from."""


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs, and the networks with their answers for the rival to compare.

    Args:
      setup: "preset" of the experiment, whose networks are used; "batch", "steps", "cached_steps", "goals" and "pool"
        of the rewards' training, "train_batch" and "train_steps" of the diffusion model's, "samples" and
        "sample_steps"; "matmul", the size of the large product; "seed"; "peak", true to measure memory, not time.

    Returns:
      The programs, and what `rival_relative_reward.prepare` needs, its "answers" and "peak" (bytes) apart.
    """
    start.start()
    config, key = maze2d.PRESETS[setup["preset"]], jax.random.key(setup["seed"])
    base, expert, reward = networks(config, setup["seed"])
    inputs, answers = questions(config, base, expert, reward, key)
    told = {
        "betas": process.cosine_betas(config.diffusion_steps),
        "fields": fields(config),
        "base": state_dict(base, diffuser.name),
        "expert": state_dict(expert, diffuser.name),
        "reward": state_dict(reward, reward_name),
        "known": known(config),
        "training": {"rate": config.models.rate, "decay": config.decay, "reward_rate": config.rewards.rate},
        "inputs": jax.tree.map(np.asarray, inputs),
        "answers": jax.tree.map(np.asarray, answers),
    }
    if setup["peak"]:
        return {}, told | {"peak": memory.peak(alignment(config, reward, setup["batch"], key))}
    paths = jax.random.uniform(key, (PATHS, *shape(config)), minval=-1.0)
    size, rewards = setup["matmul"], potential.stacked(*[reward] * setup["goals"])
    programs = {
        "matmul": ours.matmul(size, size, 1),
        "reward-step": train_reward(config, (base, expert, paths), reward, setup["batch"], setup["steps"], key),
        "reward-step-cached": train_cached(config, rewards, setup["pool"], setup["batch"], setup["cached_steps"], key),
        "diffuser-train": train(config, base, paths, setup["train_batch"], setup["train_steps"], key),
        "diffuser-denoise": denoise(config, base, paths[: setup["samples"]], setup["sample_steps"], key),
    }
    return {f"{name}/gendiff": program for name, program in programs.items()}, told


def shape(config: MazeConfig) -> tuple[int, int]:
    """Of a path."""
    return config.horizon, len(maze2d.COORDINATES)


def known(config: MazeConfig) -> np.ndarray:
    """(horizon, d), True where the diffusion models are given the state: at both ends."""
    return maze2d.families("umaze")[0].known(config)


def published(config: MazeConfig) -> Rewards:
    """The rewards of the row `published`."""
    return maze2d.families("umaze")[0].rewards(config)


def reward_of(config: MazeConfig) -> WindowMLP:
    """The rewards' network, as published."""
    return published(config).network


def fields(config: MazeConfig) -> dict[str, dict[str, Any]]:
    """What the rival needs of the networks' fields."""
    both = {"unet": trajectories.unet_of(config), "reward": reward_of(config)}
    names = ("width", "multipliers", "window", "widths", "strided", "activation")
    return {key: {name: getattr(net, name) for name in names if hasattr(net, name)} for key, net in both.items()}


def networks(config: MazeConfig, seed: int) -> tuple[Params, Params, Params]:
    """The base model, the expert and a reward.

    Speed does not depend on their values, but the comparison does: drawn here, no bias is 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.1
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32) + (kind == "scale"))

    start = lambda net: jax.tree.map_with_path(draw, shapes(net, config))
    return start(trajectories.unet_of(config)), start(trajectories.unet_of(config)), start(reward_of(config))


def shapes(net: TemporalUnet | WindowMLP, config: MazeConfig) -> Params:
    """The shapes of a network's parameters."""
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape(config)), jnp.zeros(()))


def state_dict(params: Params, name: Callable[[tuple[str, ...]], str]) -> dict[str, np.ndarray]:
    """The parameters by names and in the order of PyTorch's; windows of 1 are left out."""
    order = lambda a: a.transpose(a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)) if a.ndim > 1 else a
    return {
        name(tuple(part.key for part in path)): np.ascontiguousarray(order(np.asarray(leaf)))
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def reward_name(path: tuple[str, ...]) -> str:
    """The key of a leaf of `WindowMLP`: params/layers_0/kernel -> layers.0.weight."""
    if path[1] == "time_mlp":
        return diffuser.name(path)
    return f"{path[1].replace('_', '.')}.{diffuser.LEAVES[path[2]]}"


def logit(config: MazeConfig) -> potential.Logit:
    """The rewards' network in steps from 1."""
    return published(config).problem.network


def train_reward(
    config: MazeConfig, frozen: tuple[Params, Params, Samples], reward: Params, batch: int, steps: int, key: PRNGKey
) -> Callable[[], Any]:
    """Goes on training a reward, with targets computed in every step as in the published code."""
    mesh, model = distributed.make_mesh(), trajectories.model(config)

    def task(frozen: tuple[Params, Params, Samples]) -> Task:
        base, expert, paths = frozen
        experts = lambda x, t: model(expert, x, t)[None]
        example = relative_reward.examples(
            trajectories.chain(config.diffusion_steps), partial(model, base), experts, PUBLISHED
        )

        def draw(key: PRNGKey) -> Aligned:
            x0 = paths[jax.random.randint(key, (batch,), 0, len(paths))]
            keys = jax.vmap(partial(jax.random.fold_in, key))(1 + jnp.arange(batch))
            made = distributed.chunked(lambda pair: example(*pair), (keys, x0), 64, mesh)
            return made._replace(target=made.target[:, 0])

        return Task(losses.gradient_alignment(logit(config)), draw)

    return ours.train(task, reward, frozen, settings(config, steps), steps, key, mesh)


def settings(config: MazeConfig, steps: int) -> Settings:
    """Of a reward's training: Adam, nothing else."""
    return Settings(steps, config.rewards.rate, 0.0, every=steps, schedule="constant", clip=None)


def train_cached(
    config: MazeConfig, rewards: Params, pool: int, batch: int, steps: int, key: PRNGKey
) -> Callable[[], Any]:
    """Trains the rewards of all goals on one pool of examples."""
    goals = potential.leading_size(rewards)
    problem = published(config).problem._replace(batch=batch)
    draw = lambda i, *more: jax.random.normal(jax.random.fold_in(key, i), (pool, *more, *shape(config)))
    times = 1 + jnp.arange(pool) % config.diffusion_steps
    examples = Aligned(draw(0), times, draw(1, goals), jnp.ones((pool, *shape(config))))
    arguments = (problem, examples, jnp.arange(goals), rewards, settings(config, steps), key)
    host = Host(distributed.make_mesh())
    asked = lambda: relative_reward.reward_training(*arguments)._replace(host=host)
    return lambda: jax.block_until_ready(training.train(*asked()).last)


def train(config: MazeConfig, theta: Params, paths: Samples, batch: int, steps: int, key: PRNGKey) -> Callable[[], Any]:
    """Goes on training a diffusion model."""

    def task(paths: Samples) -> Task:
        return Task(denoising(config), lambda key: paths[jax.random.randint(key, (batch,), 0, len(paths))])

    how = Settings(steps, config.models.rate, config.decay, schedule="constant", clip=None)
    return ours.train(task, theta, paths, how, steps, key, distributed.training_mesh())


def denoising(config: MazeConfig) -> losses.Loss:
    """The loss of a diffusion model: the mean over the coordinates, where none is known."""
    weight = lambda t: jnp.float32(1 / math.prod(shape(config)))
    return losses.denoising(
        trajectories.chain(config.diffusion_steps), trajectories.model(config), weight, jnp.asarray(known(config))
    )


def denoise(config: MazeConfig, theta: Params, paths: Samples, steps: int, key: PRNGKey) -> Callable[[], Any]:
    """Draws a path for each of the given ones, with the same states at both ends, on all devices."""
    mesh = distributed.make_mesh()
    given = distributed.place(mesh, (theta, paths, jax.random.split(key, len(paths))))
    return lambda: jax.block_until_ready(sample(config, steps, mesh, *given))


@partial(jax.jit, static_argnums=(0, 1, 2))
def sample(
    config: MazeConfig, steps: int, mesh: jax.sharding.Mesh | None, theta: Params, paths: Samples, keys: PRNGKey
) -> Samples:
    """The same, compiled."""
    chain = trajectories.chain(config.diffusion_steps)
    kernel = sampling.ancestral(chain, partial(trajectories.model(config), theta))

    def one(given: tuple[PRNGKey, Array]) -> Array:
        pinned = sampling.pinned(kernel, given[1], jnp.asarray(known(config)))
        return sampling.sample(chain, pinned, chain.grid(steps), given[0], shape(config))

    return distributed.chunked(one, (keys, paths), 64, mesh)


def alignment(config: MazeConfig, reward: Params, batch: int, key: PRNGKey) -> Callable[[], Any]:
    """The loss of a batch with given targets, and its gradient."""
    x, y = jax.random.normal(key, (2, batch, *shape(config)))
    examples = Aligned(x, 1 + jnp.arange(batch) % config.diffusion_steps, y, jnp.ones(batch))
    both = jax.jit(jax.value_and_grad(losses.mean(losses.gradient_alignment(logit(config)))))
    return lambda: jax.block_until_ready(both(reward, key, examples))


@partial(jax.jit, static_argnums=0)
def questions(
    config: MazeConfig, base: Params, expert: Params, reward: Params, key: PRNGKey
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both sides are asked of their networks, and gendiff's answers.

    Returns:
      Inputs: "x0" (n, horizon, d) and "x", noisy at the times "t" (n,) from 1; "noise" (3, n, horizon, d) and "times"
      (3,) of a sampler of two steps.
      Answers: "denoised", "mean", "target" and "slope" (n, horizon, d); "reward" (n,); "samples"; "loss" and
      "gradient_norm" of the alignment, "train_loss" and "train_gradient_norm" of the base model, ().
    """
    chain, model = trajectories.chain(config.diffusion_steps), trajectories.model(config)
    keys = jax.random.split(jax.random.fold_in(key, 1), PARITY)
    x0 = jax.random.uniform(jax.random.fold_in(key, 2), (PARITY, *shape(config)), minval=-1.0)
    x, t = jax.vmap(partial(losses.noised, chain))(keys, x0)
    aligned = partial(relative_reward.aligned, chain, partial(model, base), lambda x, t: model(expert, x, t)[None])
    examples = jax.vmap(partial(aligned, PUBLISHED))(x, t)
    examples = examples._replace(target=examples.target[:, 0])
    values, slopes = jax.vmap(jax.value_and_grad(logit(config), 1), (None, 0, 0))(reward, examples.x, t)
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    loss = losses.mean(losses.gradient_alignment(logit(config)))
    align, gradient = jax.value_and_grad(loss)(reward, key, examples)
    # The key whose halves are `keys`, so that the noise is that of x.
    train_loss, train_gradient = jax.value_and_grad(losses.mean(denoising(config)))(
        base, jax.random.fold_in(key, 1), x0
    )
    # As `sampling.sample` draws it: x_T, then the noise of both steps.
    draw = lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape(config)))(keys)
    inputs = {"x0": x0, "x": x, "t": t, "noise": jnp.stack([draw(i) for i in (2, 0, 1)]), "times": chain.grid(2)}
    return inputs, {
        "denoised": jax.vmap(model, (None, 0, 0))(base, x, t),
        "mean": examples.x,
        "target": examples.target,
        "reward": values,
        "slope": slopes,
        "loss": align,
        "gradient_norm": norm(gradient),
        "train_loss": train_loss,
        "train_gradient_norm": norm(train_gradient),
        "samples": sample(config, 2, None, base, x0, keys),
    }
