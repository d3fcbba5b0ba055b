"""The programs of censored sampling, for `tpu.plan`: the base model, the rewards and the censored sampler."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from experiments.censoring.trials import Reward, reward_training, rewards_training
from experiments.lab.programs import KEY, NUMBER, WHOLE, Program, abstract, sampler, trained
from gendiff import training
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Sets


def censored(config: Any, reward: Reward, of_config: Callable[[Any], training.Training]) -> dict[str, Program]:
    """Return the programs of a configuration.

    Args:
      reward: of noisy samples.
      of_config: configuration -> the training of its base model, of shapes.
    """
    setup, labels = reward.problem, 2 * config.labels.per_class
    images = np.zeros((config.members, labels, *setup.shape), np.float32)
    sets = Sets(images, np.tile([0.0, 1.0], (config.members, labels // 2)))
    settings = reward_training(config, config.weights.ensemble, config.reward.steps)

    def base(batch: int, fully_sharded: bool = False) -> training.Training:
        group = dataclasses.replace(config.training, batch=batch)
        return of_config(dataclasses.replace(config, training=group, fully_sharded=fully_sharded))

    def rewards(batch: int) -> training.Training:
        return abstract(partial(rewards_training, reward, sets, settings._replace(batch=batch)), KEY)

    # As in `censoring.draw_all`, scale and recurrence are arguments.
    batch, reward_batch = config.training.batch, config.reward.batch
    arrays = (base(batch).params, rewards(reward_batch).params, KEY, NUMBER, WHOLE)
    call = lambda n: ((setup, Censoring(scale=0.0), n), arrays)
    what, n = f"{config.members} rewards", config.samples // 2
    return {
        "base": trained("base model", "images", batch, base),
        "base-sharded": trained("base model, fully sharded", "images", batch, partial(base, fully_sharded=True)),
        "reward": trained(what, "images", reward_batch, rewards),
        "sampler": sampler(f"ancestral, guided by {what}", n, setup.steps, setup.chunk, censoring.drawn, call),
    }
