"""The programs of censored sampling, for `tpu.plan`: the base model, the rewards and the censored sampler."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.censoring.trials import Reward, reward_training, rewards_training
from experiments.lab.programs import KEY, NUMBER, WHOLE, Program, abstract, sampler, trained
from gendiff import training
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Sets


def censored(config: Any, reward: Reward, of_config: Callable[[Any], training.Training]) -> dict[str, Program]:
    """The programs of a configuration.

    Args:
      reward: of noisy samples.
      of_config: configuration -> the training of its base model, of shapes.
    """

    def base(batch: int, fully_sharded: bool) -> training.Training:
        group = dataclasses.replace(config.training, batch=batch)
        return of_config(dataclasses.replace(config, training=group, fully_sharded=fully_sharded))

    setup, labels = reward.problem, 2 * config.labels.per_class
    images = np.zeros((config.members, labels, *setup.shape), np.float32)
    sets = Sets(images, np.tile([0.0, 1.0], (config.members, labels // 2)))

    def rewards(batch: int) -> training.Training:
        sized = dataclasses.replace(config, reward=dataclasses.replace(config.reward, batch=batch))
        how = reward_training(sized, config.weights.ensemble, config.reward.steps)
        return abstract(lambda key: rewards_training(reward, sets, how, key), KEY)

    # As in `censoring.draw_all`, scale and recurrence are arguments.
    of_images, of_labels = config.training.batch, config.reward.batch
    arrays = (base(of_images, False).params, rewards(of_labels).params, KEY, NUMBER, WHOLE)
    call = lambda n: ((setup, Censoring(scale=0.0), n), arrays)
    what, n = f"{config.members} rewards", config.samples // 2
    return {
        "base": trained("base model", "images", of_images, lambda batch: base(batch, False)),
        "base-sharded": trained("base model, fully sharded", "images", of_images, lambda batch: base(batch, True)),
        "reward": trained(what, "images", of_labels, rewards),
        "sampler": sampler(f"ancestral, guided by {what}", n, setup.steps, setup.chunk, censoring.drawn, call),
    }
