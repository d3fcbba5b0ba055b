"""One process of a run: everything that is done over devices, at a small size, into one file of arrays.

    python tests/processes/worker.py FOLDER MODE

MODE is `everything`, or `train` for one long training with checkpoints in FOLDER.
"""

import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runtime
from experiments.contract import guarded
from gendiff import distributed, guidance, likelihood, losses, process, replicas, sampling, smc, training
from gendiff.checkpoint import Archive, Checkpoints
from gendiff.methods import censoring, genneg
from gendiff.training import Host, Settings, Task

DATA = np.random.default_rng(0).normal(0.5, 1.0, (64, 4)).astype(np.float32)
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


def of_run(data, own):
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
    return genneg.Problem(
        EDM, gaussian(EDM), classifier, lambda x: np.asarray(x).sum(-1) > 0, (2,), sampling.heun, 8,
        losses.edm_weight(1.0), process.classifier_time(), chunk=4,
    )  # fmt: skip


@cache
def censored():
    return censoring.Problem(DDPM, gaussian(DDPM), classifier, (2,), steps=10, chunk=4, low=-9.0, high=9.0)


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
    found = {
        "drawn": training.train(key, START, drawn, DATA, SETTINGS, host).best,
        "sharded": training.train(key, START, drawn, DATA, SETTINGS, host._replace(fully_sharded=True)).best,
        "default": training.train(key, START, drawn, DATA, SETTINGS).best,
        "batches": training.train(key, START, given, (), SETTINGS, host, batches).params,
        "replicas": replicas.train(replicas.keys(key, 5), start, of_run, DATA, own, SETTINGS).params,
    }
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


def train(folder: Path) -> dict[str, Any]:
    """A training that takes a while, so that it can be stopped."""
    pause = float(os.environ.get("PAUSE", "0"))

    def report(step, metrics):
        if distributed.is_first() and metrics:
            print(f"step {step}", flush=True)
        time.sleep(pause)

    kept = Checkpoints(folder / "steps")
    state = training.train(
        jax.random.key(5), START, drawn, DATA, Settings(60, 0.01, every=4), Host(distributed.make_mesh(), kept, report)
    )
    return distributed.gather({"params": state.params, "best": state.best, "step": state.step})


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]

    def work() -> dict[str, Any]:
        runtime.start()
        return train(folder) if mode == "train" else agreement(folder) | trainings() | samples()

    found = guarded(work)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    np.savez(
        folder / f"{mode}-{jax.process_index()}.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    )


if __name__ == "__main__":
    main()
