"""One process of a run: everything that is done over devices, at a small size, into one file of arrays.

    python tests/processes/worker.py FOLDER MODE

MODE is `everything`, or a long training with checkpoints in FOLDER: `train`, `sharded` for a fully sharded one, or
`streamed` for one on batches that Grain reads.
"""

import os
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import start
from experiments.lab.command import guarded
from gendiff import (
    checkpoint,
    distributed,
    guidance,
    likelihood,
    losses,
    process,
    programs,
    runs,
    sampling,
    smc,
    training,
)
from gendiff.checkpoint import Archive, Checkpoints
from gendiff.data import stream
from gendiff.devices import Placement
from gendiff.methods import censoring, genneg, relative_reward
from gendiff.training import Host, Settings, Task

DATA = np.random.default_rng(0).normal(0.5, 1.0, (64, 4)).astype(np.float32)
WIDE = {
    "w": np.sin(np.arange(2**15, dtype=np.float32)).reshape(128, 256) / 8,
    "v": np.cos(np.arange(256, dtype=np.float32)),
}
"""Large enough to be split over devices."""
START = {"w": np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8), "v": np.ones(8, np.float32)}
EDM, DDPM = process.edm(), process.ddpm(process.linear_betas(100))
SETTINGS = Settings(12, 0.01, every=4)


def loss(params, key, example):
    noise = 0.1 * jax.random.normal(key, example.shape)
    return (jnp.tanh((example + noise) @ params["w"]) @ params["v"] - jnp.sum(example)) ** 2


def drawn(data):
    validate = lambda params: jnp.mean(jax.vmap(lambda x: loss(params, jax.random.key(0), x))(data))
    return Task(loss, lambda key: training.minibatch(key, data, 16), validate)


def given(data):
    return Task(loss)


def uneven(data):
    return Task(loss, lambda key: training.minibatch(key, data, 18))


def wide_loss(params, key, example):
    noisy = jnp.tile(example + 0.1 * jax.random.normal(key, example.shape), 32)
    return jnp.mean((jnp.tanh(noisy @ params["w"]) * params["v"] - jnp.sum(example)) ** 2)


def wide(data):
    return Task(wide_loss, lambda key: training.minibatch(key, data, 16))


def of_run(context):
    data, own = context
    moved = lambda params, key, example: loss(params, key, example + own["shift"])
    return Task(moved, lambda key: training.minibatch(key, data, 8))


def gaussian(chain):
    """The denoiser of N(0.4, 0.6^2) in two dimensions."""

    def denoiser(theta, x, t):
        alpha, sigma = chain.alpha(t), chain.sigma(t)
        return theta + alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * (x - alpha * theta)

    return denoiser


def classifier(phi, x, t):
    return phi * jnp.sum(x) + 0.0 * jnp.asarray(t, jnp.float32)


@cache
def problem():
    return genneg.OracleProblem(
        EDM, gaussian(EDM), classifier, lambda x: np.asarray(x).sum(-1) > 0, (2,), sampling.heun, 8,
        losses.edm_weight(1.0), process.classifier_time(), chunk=4,
    )  # fmt: skip


@cache
def censored():
    return censoring.LabelProblem(DDPM, gaussian(DDPM), classifier, (2,), steps=10, chunk=4, low=-9.0, high=9.0)


def reward(phi, x, t):
    return jnp.sum(jnp.tanh(x @ phi["w"])) + phi["b"] * jnp.sum(x) * jnp.asarray(t, jnp.float32) / 100


def pieces() -> dict[str, Any]:
    """The trainings of the three methods."""
    mesh, key = distributed.make_mesh(), jax.random.key(4)
    theta, settings = np.float32([0.4, 0.4]), Settings(8, 0.01, every=4)
    guided = genneg.Guided(theta, {"net": np.float32([0.7, 0.3]), "shift": np.zeros(2, np.float32)})
    synthetic = genneg.collect(problem(), guided, key, 20, 80, 29, mesh=mesh)
    how = genneg.ClassifierTraining(settings, half=4, validation=8)
    train, held_out = genneg.split(synthetic, how, key)
    images, labels = np.resize(DATA[:, :2], (3, 16, 2)), np.resize(np.float32([0, 1, 1]), (3, 16))
    labelled = censoring.RewardTraining(settings, 8)
    thetas = np.float32([[0.1, 0.2], [0.5, -0.2]])
    path = lambda theta, x, t: gaussian(DDPM)(theta, x, t)
    switches = relative_reward.PRINCIPLED
    request = relative_reward.PoolRequest(theta, thetas, None, key, DATA[:45, :2])
    pool = relative_reward.pools(relative_reward.Models(DDPM, path, switches), [request], 29, mesh)[0]
    start = {"w": np.ones((4, 2, 3), np.float32), "b": np.float32([0.1, 0.2, 0.3, 0.4])}
    rewards = relative_reward.PairProblem(DDPM, reward, 8)
    goals = np.int32([0, 1, 0, 1])
    return {
        "classifier": genneg.fit_classifier(problem(), genneg.Fit(train, held_out, np.float32(0.5), key), how)["net"],
        "student": genneg.distill(
            problem(),
            genneg.Lesson(guided, genneg.Points(DATA[:45, :2]), np.float32([0.3, 0.2]), key),
            genneg.StudentTraining(settings, 8),
            mesh=mesh,
        ),
        "censoring": censoring.fit(
            censored(), censoring.Sets(images, labels), np.float32([0.1, 0.2, 0.3]), labelled, key
        ).last,
        "pool": pool.target,
        "rewards": training.train(*relative_reward.reward_training(rewards, pool, goals, start, settings, key)).last,
    }


def trainings() -> dict[str, Any]:
    mesh = distributed.make_mesh()
    key = jax.random.key(2)
    reports: list[float] = []
    host = Host(mesh, None, lambda step, metrics: reports.append(metrics["loss"]) if metrics else None)
    # The rows of a global batch that this process brings.
    each = 16 // jax.process_count()
    mine = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
    batches = [np.roll(DATA, -i, axis=0)[:16][mine] for i in range(12)]
    own = {"shift": np.arange(5, dtype=np.float32)}
    start = jax.tree.map(lambda a: np.stack([a] * 5), START)
    k_runs = lambda host: training.train(
        training.keys(key, 5), start, of_run, (DATA, own), SETTINGS, host, own=(False, True)
    )
    several = [training.Training(jax.random.key(seed), START, drawn, DATA, SETTINGS) for seed in range(3)]
    found = {
        "drawn": training.train(key, START, drawn, DATA, SETTINGS, host).best,
        "sharded": training.train(key, WIDE, wide, DATA, SETTINGS, Host(mesh, fully_sharded=True)).best,
        "default": training.train(key, START, drawn, DATA, SETTINGS).best,
        "copies": training.train(key, START, uneven, DATA, SETTINGS).best,
        "streamed": training.train(key, START, given, (), SETTINGS, Host(mesh), stream.batches(DATA, 16, 7)).last,
        "patient": training.train(
            key, START, drawn, DATA, Settings(400, 0.5, every=4, patience=8, schedule="constant")
        ),
        "batches": training.train(key, START, given, (), SETTINGS, host, batches).last,
        "replicas": k_runs(Host()).last,
        "shared": k_runs(Host(distributed.make_mesh(None, 2))).last,
        "together": [state.last for state in runs.train(several)],
    }
    ended = found.pop("patient")
    assert 8 < ended.step < 400, ended.step
    places = Placement(mesh, fully_sharded=True).of_state(programs.begin(SETTINGS, key, WIDE))
    assert places.last["w"].spec == jax.P(None, "data"), "the test is of a state that is split"
    found |= {"ended": ended.step, "patient": ended.best}
    return distributed.gather(found) | {"losses": np.asarray(reports)}


def samples() -> dict[str, Any]:
    mesh, theta, key = distributed.make_mesh(), np.float32([0.4, 0.4]), jax.random.key(3)
    phi = np.float32([0.7, 0.3])

    def draw(kernel, chain, steps, n):
        one = lambda key: sampling.sample(chain, kernel, chain.grid(steps), key, (2,))
        keys = distributed.place(mesh, jax.random.split(key, n))
        return distributed.gather(jax.jit(lambda keys: distributed.chunked(one, keys, 4, mesh))(keys))

    steered = guidance.guide(EDM, lambda x, t: -jnp.sum(x**2))(lambda x, t: gaussian(EDM)(theta, x, t))
    plain = lambda x, t: gaussian(DDPM)(theta, x, t)
    guided = genneg.Guided(theta, {"net": phi, "shift": np.zeros(2, np.float32)})
    elbo = lambda given: likelihood.elbo(lambda x, t: gaussian(EDM)(theta, x, t), given[0], given[1], 8)
    over = lambda given: distributed.chunked(elbo, given, 4, mesh)
    points = distributed.place(mesh, (jax.random.split(key, 24), DATA[:24, :2]))
    synthetic = genneg.collect(problem(), guided, key, 20, 80, 29, mesh=mesh)
    return {
        "heun": draw(sampling.heun(EDM, steered), EDM, 8, 32),
        "uneven": draw(sampling.heun(EDM, steered), EDM, 8, 29),
        "ddim": draw(sampling.ddim(DDPM, plain), DDPM, 10, 32),
        "ancestral": draw(sampling.ancestral(DDPM, plain), DDPM, 10, 32),
        "recurrent": draw(sampling.recurrent(DDPM, sampling.ancestral(DDPM, plain), 2), DDPM, 10, 16),
        "genneg": genneg.draw(problem(), guided, key, 29, mesh),
        "collected": synthetic.positives,
        "counts": np.asarray([synthetic.good, synthetic.bad]),
        "censored": censoring.draw(censored(), theta, phi, censoring.Censoring(recurrence=2), key, 32, mesh),
        "elbo": distributed.gather(jax.jit(over)(points)),
        "smc": population(theta, phi, key, mesh),
    }


def population(theta, phi, key, mesh):
    plain = lambda x, t: gaussian(DDPM)(theta, x, t)
    twist = lambda x, t: jax.nn.log_sigmoid(classifier(phi[0], x, t))
    steered = guidance.guide(DDPM, twist)(plain)
    one = lambda key: smc.twisted(DDPM, plain, steered, twist, DDPM.grid(10), key, (2,), 8).particles
    keys = distributed.place(mesh, jax.random.split(key, 8))
    return distributed.gather(jax.jit(lambda keys: distributed.chunked(one, keys, 1, mesh))(keys))


def agreement(folder: Path) -> dict[str, Any]:
    """What is not arrays: one process speaks for all, and errors reach all of them."""
    index = jax.process_index()
    assert distributed.first(lambda: {"from": index}) == {"from": 0}
    distributed.agree("the number", "1")
    problems = []
    for call in (
        lambda: distributed.agree("the number", str(index == 1)),
        lambda: distributed.first(lambda: 1 // 0),
        lambda: distributed.everywhere(lambda: 1 // (1 - index)),
    ):
        try:
            call()
        except (ZeroDivisionError, distributed.Disagreement, distributed.Elsewhere) as error:
            problems.append(f"{type(error).__name__}: {error}")
    archive = Archive(folder / "archive")
    seen = [archive.once("phase", lambda: {"index": np.asarray(index)})["index"] for _ in range(2)]
    assert seen == [0, 0] or index == 0, seen
    return {"problems": np.asarray(problems)} if index == min(1, jax.process_count() - 1) else {}


def train(folder: Path, mode: str) -> dict[str, Any]:
    """A training that takes a while, so that it can be stopped."""
    pause = float(os.environ.get("PAUSE", "0"))

    def report(step, metrics):
        if distributed.is_first() and metrics:
            print(f"step {step}", flush=True)
        time.sleep(pause)

    host = Host(distributed.make_mesh(), Checkpoints(folder / "steps"), report, mode == "sharded")
    settings = Settings(60, 0.01, every=4)
    start, task = {"train": (START, drawn), "sharded": (WIDE, wide), "streamed": (START, given)}[mode]
    data = stream.batches(DATA, 16, 7) if mode == "streamed" else None
    state = training.train(jax.random.key(5), start, task, DATA, settings, host, data)
    return distributed.gather({"last": state.last, "best": state.best, "step": state.step})


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]

    def work() -> dict[str, Any]:
        start.start()
        if os.environ.get("FULL") == str(jax.process_index()):  # as the disk of one host
            checkpoint.shutil.disk_usage = lambda folder: SimpleNamespace(free=0)
        if mode != "everything":
            return train(folder, mode)
        return agreement(folder) | trainings() | distributed.gather(pieces()) | samples()

    found = guarded(work)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    np.savez(
        folder / f"{mode}-{jax.process_index()}.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    )


if __name__ == "__main__":
    main()
