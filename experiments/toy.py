"""Gen-neG on a checkerboard: a model learns the data, then a classifier learns where the model's samples are bad.

`python -m experiments.toy` prints, up to rounding, in 20 s on two CPU cores, most of it compilation:

    0 classifiers: 8.70% of the samples are bad
    1 classifiers: 3.05% of the samples are bad
"""

from functools import partial

import jax
import jax.numpy as jnp

from gendiff import denoiser, distributed, guidance, losses, nets, potential, process, sampling, training
from gendiff.data import checkerboard as data
from gendiff.nets.mlp import MLPClassifier, ResidualMLP
from gendiff.oracles.checkerboard import checkerboard

ROUNDS, edm, oracle = 1, process.edm(), checkerboard()
network, classifier = ResidualMLP(features=2, width=64, depth=1), MLPClassifier(width=32, depth=1)
model = denoiser.from_edm(network.apply)  # (theta, x, t) -> E[x_0 | x_t = x]
logit = lambda phi, x, t: classifier.apply(phi, x / jnp.sqrt(t**2 + 0.25), jnp.log(t) / 4)  # of good, given x_t = x
log_c = potential.log_probability(logit)


def learn(key, net, loss, rows, steps):
    """Parameters of a network, trained on batches of the rows: the average over the last steps."""
    task = lambda rows: training.Task(loss, lambda key: training.minibatch(key, rows, 512))
    start_key, train_key = jax.random.split(key)
    start = nets.fresh(net, start_key, jnp.zeros(2), jnp.zeros(()))
    return training.train(train_key, start, task, rows, training.Settings(steps, rate=3e-3)).averaged


@jax.jit
def draw(key, theta, classifiers):
    """8,192 samples of the model, guided by the sum of the classifiers' log C."""
    log_r = potential.total(*(partial(log_c, phi) for phi in classifiers))
    kernel = sampling.heun(edm, guidance.guide(edm, log_r)(partial(model, theta)))
    one = lambda key: sampling.sample(edm, kernel, edm.grid(18), key, shape=(2,))
    return distributed.chunked(one, jax.random.split(key, 8192))


def main(seed=0):
    """Algorithm 1: draw from the current model, ask the oracle, learn its answers, and guide by them."""
    key = partial(jax.random.fold_in, jax.random.key(seed))
    points = data.draw(key(0), 1000)
    theta = learn(key(1), network, losses.denoising(edm, model, losses.edm_weight()), points, 2000)
    classifiers = []
    for number in range(ROUNDS + 1):
        good = oracle(samples := draw(key(10 + number), theta, classifiers))
        print(f"{number} classifiers: {1 - good.mean():.2%} of the samples are bad")
        if number == ROUNDS:
            return
        examples = samples, good.astype(jnp.float32), jnp.ones(len(good))  # x_0, label, weight
        classifiers.append(learn(key(20 + number), classifier, losses.cross_entropy(edm, logit), examples, 1000))


if __name__ == "__main__":
    main()
