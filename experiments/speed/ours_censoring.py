"""gendiff's side of the second speed table: the public functions as the experiment with MNIST's sevens calls them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.censoring import mnist
from experiments.censoring.mnist import MnistConfig
from experiments.lab import start
from experiments.speed import ours
from gendiff import distributed, losses, potential, process
from gendiff.convert import guided_diffusion
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, LabelProblem
from gendiff.nets.unet import HalfUNet, UNet
from gendiff.training import Settings
from gendiff.types import Params

PARITY = 4
"""Images that both sides are compared on."""
SCALE = 1.0
"""omega."""
LABELLED = 220
"""Images of a reward's training set: ten labels of each class with ten copies each."""


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs, and the networks with their answers for the rival to compare.

    Args:
      setup: "networks", for each name the "preset" of the experiment, "samples" and "steps" in a call, and "members",
        the numbers of rewards; "batch", "train_steps", "reward_batch", "reward_steps" and "ensemble" of the training
        steps, with the networks "small"; "matmul", the size of the large product; "seed".

    Returns:
      The programs, and what `rival_censoring.prepare` needs, its "answers" apart.
    """
    start.start()
    programs: dict[str, Callable[[], Any]] = {"matmul/gendiff": ours.matmul(setup["matmul"], setup["matmul"], 1)}
    told: dict[str, Any] = {"nets": {}, "answers": {}, "scale": SCALE, "labelled": LABELLED}
    chain = process.ddpm(process.linear_betas(1000))
    every = jnp.arange(1001)
    told["alpha"], told["sigma"] = np.asarray(chain.alpha(every)), np.asarray(chain.sigma(every))
    for name, given in setup["networks"].items():
        config = settings_of(given)
        problem, key = mnist.problem(config), jax.random.key(setup["seed"])
        count = max([*given["members"], setup["ensemble"] if name == "small" else 0])
        theta, rewards = networks(config, count, setup["seed"])
        for members in given["members"]:
            chosen = potential.stacked(*rewards[:members]) if members else None
            programs[f"step-{name}-k{members}/gendiff"] = sample(problem, theta, chosen, given["samples"], key)
        inputs, answers = questions(problem, theta, potential.stacked(*rewards) if rewards else None, key)
        if name == "small":
            programs["train-small/gendiff"] = train(config, theta, setup["batch"], setup["train_steps"], key)
            programs[f"reward-small-k{setup['ensemble']}/gendiff"] = train_rewards(
                config, rewards[: setup["ensemble"]], setup["reward_batch"], setup["reward_steps"], key
            )
            for more, of in zip((inputs, answers), trained(problem, theta, rewards, key), strict=True):
                more |= of
            inputs["noise"], answers["samples"] = short(problem, theta, potential.stacked(*rewards), key)
            told["training"] = {
                "base_rate": config.training.rate,
                "base_decay": config.decay,
                "reward_rate": config.reward.rate,
                "benign_weight": config.weights.ensemble,
            }
        told["nets"][name] = {
            "fields": {"unet": fields(mnist.unet_of(config)), "reward": fields(mnist.reward_of(config))},
            "size": config.size,
            "unet": state_dict(theta),
            "rewards": [state_dict(reward) for reward in rewards],
            "inputs": jax.tree.map(np.asarray, inputs),
            "times": np.asarray(problem.process.grid(problem.steps)),
        }
        told["answers"] |= {f"{name}/{question}": np.asarray(answer) for question, answer in answers.items()}
    return programs, told


def settings_of(given: Mapping[str, Any]) -> MnistConfig:
    """The experiment's configuration, with the steps of one call."""
    return dataclasses.replace(mnist.PRESETS[given["preset"]], sampler_steps=given["steps"])


def fields(net: UNet | HalfUNet) -> dict[str, Any]:
    """What the rival needs of a network's fields."""
    names = ("width", "multipliers", "blocks", "attention", "head_channels", "heads", "resample_blocks", "least")
    return {name: getattr(net, name) for name in names}


def shapes(net: UNet | HalfUNet, size: int) -> Params:
    """The shapes of a network's parameters."""
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((size, size, 1)), jnp.zeros(()))


def networks(config: MnistConfig, count: int, seed: int) -> tuple[Params, list[Params]]:
    """theta and `count` rewards.

    Speed does not depend on their values, but the comparison does: drawn here, no bias and no last layer is 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        scale = {"kernel": math.prod(leaf.shape[:-1]) ** -0.5, "positions": leaf.shape[-1] ** -0.5}.get(kind, 0.1)
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32) + (kind == "scale"))

    start = lambda net: jax.tree.map_with_path(draw, shapes(net, config.size))
    return start(mnist.unet_of(config)), [start(mnist.reward_of(config)) for _ in range(count)]


def state_dict(params: Params) -> dict[str, np.ndarray]:
    """The parameters by the names and in the order of PyTorch's checkpoints; windows of 1 are left out."""
    leaves = jax.tree.leaves_with_path(params)
    order = lambda a: a.transpose(a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)) if a.ndim > 1 else a
    return {
        guided_diffusion.name(tuple(part.key for part in path)): np.ascontiguousarray(order(np.asarray(leaf)))
        for path, leaf in leaves
    }


def sample(problem: LabelProblem, theta: Params, rewards: Params, n: int, key: Array) -> Callable[[], Any]:
    """Draws n censored samples on all devices; the parameters are there already, as in a long run."""
    mesh = distributed.make_mesh()
    theta, rewards = distributed.place(mesh, (theta, rewards))
    return lambda: censoring.draw(problem, theta, rewards, Censoring(SCALE), key, n, mesh)


def train(config: MnistConfig, theta: Params, batch: int, steps: int, key: Array) -> Callable[[], Any]:
    """Goes on training the base model."""
    images = jax.random.uniform(key, (1000, config.size, config.size, 1), minval=-1.0)
    settings = Settings(config.training.steps, config.training.rate, config.decay, schedule=config.schedule)
    task = mnist.base_task(mnist.problem(config), batch)
    return ours.train(task, theta, images, settings, steps, key, distributed.make_mesh())


def train_rewards(config: MnistConfig, rewards: list[Params], batch: int, steps: int, key: Array) -> Callable[[], Any]:
    """Goes on training all rewards in one program."""
    shape = (len(rewards), LABELLED, config.size, config.size, 1)
    labels = jnp.tile(jnp.array([0.0, 1.0]), (len(rewards), LABELLED // 2))
    images = jax.random.uniform(key, shape, minval=-1.0)
    context = (images, labels, jnp.int32(LABELLED), jnp.float32(config.weights.ensemble))
    settings = Settings(
        config.reward.steps, config.reward.rate, decay=0.0, schedule="linear", clip=None, weight_decay=0.05
    )
    task = censoring.reward_task(mnist.problem(config), batch)
    mesh = distributed.training_mesh()
    return ours.train(task, potential.stacked(*rewards), context, settings, steps, key, mesh)


@partial(jax.jit, static_argnums=0)
def questions(
    problem: LabelProblem, theta: Params, rewards: Params, key: Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both sides are asked of their networks, and gendiff's answers.

    Returns:
      Inputs: "x" (n, h, w, 1), noisy images at the times "t" (n,).
      Answers: "epsilon" (n, h, w, 1) and, where there are rewards, "log_reward" (n,), the sum, with its gradient
      "guidance" (n, h, w, 1).
    """
    chain = problem.process
    t = jnp.round(jnp.linspace(1, 1000, PARITY)).astype(int)
    keys = jax.random.split(jax.random.fold_in(key, 1), PARITY)
    x0 = jax.random.uniform(jax.random.fold_in(key, 2), (PARITY, *problem.shape), minval=-1.0)
    x = jax.vmap(lambda key, x0, t: process.perturb(chain, key, x0, t)[0])(keys, x0, t)
    epsilon = lambda x, t: (x - chain.alpha(t) * problem.model(theta, x, t)) / chain.sigma(t)
    answers = {"epsilon": jax.vmap(epsilon)(x, t)}
    if rewards is not None:
        total = potential.stack(censoring.log_reward(problem), rewards)
        answers["log_reward"], answers["guidance"] = jax.vmap(jax.value_and_grad(total))(x, t)
    return {"x": x, "t": t}, answers


@partial(jax.jit, static_argnums=0)
def trained(
    problem: LabelProblem, theta: Params, rewards: list[Params], key: Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for the losses.

    Returns:
      Inputs: "x0" (n, h, w, 1) with "noisy" at the times "noisy_t" (n,), for the base model; with "labels" and
      "weights" (n, K) and "reward_noisy" (n, K, h, w, 1) at "reward_t" (n, K) for the rewards.
      Answers: "loss", "gradient_norm", "reward_loss" and "reward_gradient_norm" ().
    """
    chain, members, image_key = problem.process, len(rewards), jax.random.fold_in(key, 3)
    key = jax.random.fold_in(key, 4)
    keys = jax.random.split(key, PARITY)
    noised = partial(losses.noised, chain)
    x0 = jax.random.uniform(image_key, (PARITY, *problem.shape), minval=-1.0)
    noisy, t = jax.vmap(noised)(keys, x0)
    # As `losses.Ensemble` splits the key of an example.
    of_members = jax.vmap(lambda key, x0: jax.vmap(noised, (0, None))(jax.random.split(key, members), x0))
    reward_noisy, reward_t = of_members(keys, x0)
    labels = (jnp.arange(PARITY * members).reshape(PARITY, members) % 2).astype(jnp.float32)
    weights = jnp.where(labels == 1, 0.02, 1.0)
    inputs = {"x0": x0, "noisy": noisy, "noisy_t": t, "labels": labels, "weights": weights}
    inputs |= {"reward_noisy": reward_noisy, "reward_t": reward_t}

    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    base = losses.mean(losses.denoising(chain, problem.model, losses.epsilon_weight(chain)))
    loss, gradient = jax.value_and_grad(base)(theta, key, x0)
    repeated = jnp.broadcast_to(x0[:, None], reward_noisy.shape)
    every = losses.mean(losses.Ensemble(losses.cross_entropy(chain, problem.network)))
    stacked = potential.stacked(*rewards)
    reward_loss, reward_gradient = jax.value_and_grad(every)(stacked, key, (repeated, labels, weights))
    answers = {"loss": loss, "gradient_norm": norm(gradient)}
    return inputs, answers | {"reward_loss": reward_loss, "reward_gradient_norm": norm(reward_gradient)}


def short(problem: LabelProblem, theta: Params, rewards: Params, key: Array) -> tuple[Array, Array]:
    """The noise (steps + 1, n, h, w, 1) that `sampling.refine` draws, the first of x_T, and the censored samples."""
    keys = jax.random.split(key, PARITY)
    draw = lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), problem.shape))(keys)
    noise = jnp.stack([draw(i) for i in (problem.steps, *range(problem.steps))])
    return noise, jnp.asarray(censoring.draw(problem, theta, rewards, Censoring(SCALE), key, PARITY))
