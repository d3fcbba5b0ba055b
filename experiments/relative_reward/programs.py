"""The programs of relative rewards of paths, for `tpu.plan`: models, rewards and the steered sampler."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from experiments.lab.programs import KEY, NUMBER, Program, abstract, first, many, of, sampler, side_by_side
from experiments.relative_reward import trajectories
from experiments.relative_reward.rows import Steered
from experiments.relative_reward.trajectories import Family, PathsConfig
from gendiff.data.windows import Windows
from gendiff.losses import Aligned
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward.steering import CHUNK


def of_paths(
    config: PathsConfig, families: Sequence[Family], steered: Family, size: int, samples: int
) -> dict[str, Program]:
    """Return the programs of a place's families, with `size` rows per data set and `samples` steered paths."""
    place, models, rewards = steered.place, steered.models(config), steered.rewards(config)
    runs, d = len(families) * (place.experts + 1), place.coordinates
    sets: Any = Windows(*many((of((size, d)), *(of((size,), jnp.int32),) * 2, of((place.actions,))), runs))
    known = of((config.horizon, d), bool)
    arrays: Any = sets, of((runs,), jnp.int32), many(known, runs), KEY, KEY
    diffusers = abstract(partial(trajectories.diffuser_training, config, place), *arrays)

    path = of((config.horizon, d))
    targets = many(many(path, place.experts), config.pool)
    examples: Any = many(path, config.pool), of((config.pool,), jnp.int32), targets, many(path, config.pool)
    begin = partial(trajectories.begin, config, place, rewards)
    job = lambda pool, start, key: relative_reward.reward_training(rewards.problem, pool, *begin(start), key)
    of_rewards = abstract(job, Aligned(*examples), KEY, KEY)

    def call(n: int) -> tuple[tuple, tuple]:
        arrays: Any = (first(diffusers.params), first(of_rewards.params), NUMBER, known, many(path, n), KEY)
        return (models, rewards.problem.network), Steered(*arrays)

    what = "ancestral, steered by a reward"
    return {
        "models": side_by_side("diffusion models side by side", diffusers),
        "rewards": side_by_side("rewards side by side", of_rewards),
        "sampler": sampler(what, samples, config.diffusion_steps, CHUNK, relative_reward.steered, call),
    }
