"""The model that Gen-neG steers: a denoiser and K classifiers, and how it draws."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gendiff import check, distributed, guidance, losses, potential, runs, sampling
from gendiff.denoiser import Denoiser, Model
from gendiff.oracles.oracle import Oracle
from gendiff.potential import Logit, Potential
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Sample, Samples, Time


class OracleProblem(NamedTuple):
    """What is steered, and by whom.  Static: two equal problems share their compiled programs."""

    process: Process
    model: Model
    """(theta, x, t) -> x_0."""
    network: Logit
    """(phi, x, t) -> scalar, the classifier's logit without its shift."""
    oracle: Oracle | Callable[[Samples, Any], Samples]
    """Samples (n, *shape) -> Boolean (n,), True is good."""
    shape: tuple[int, ...]
    """Of one sample."""
    kernel: Callable[[Process, Denoiser], sampling.Kernel]
    """The sampler, the same for synthetic data and for evaluation: another one has another alpha."""
    steps: int
    weight: losses.Weight
    """Of the denoising loss, for distillation and refitting."""
    classifier_time: Callable[[PRNGKey], Time]
    """Draws the noise levels that classifiers train on."""
    chunk: int = 1024
    """Samples at a time and device."""
    bind: losses.Bind | None = None
    """Where samples have conditions (maps, texts): binds theta to one.  The oracle is then asked (samples, conditions)
    and may answer with several labels a sample, (n, m); a sample is good if all of them are True."""
    bind_network: losses.Bind | None = None
    """The same for phi; the network may then give m logits."""
    within: potential.Interval | None = None
    """Where classifiers guide; None: at all noise levels."""
    last_steps: Callable[[guidance.Guidance], guidance.Guidance] | None = None
    """The classifiers' guidance -> the guidance in its place, such as `static.partial(guidance.accepted, ..)`."""


class Guided(NamedTuple):
    """The current model: a denoiser's parameters and K >= 0 classifiers, stacked on axis 0 (None for K = 0)."""

    theta: Params
    classifiers: Params = None

    @property
    def members(self) -> int:
        """K, the number of classifiers."""
        return 0 if self.classifiers is None else potential.leading_size(self.classifiers)


def bound(problem: OracleProblem, guided: Guided, condition: Any) -> Guided:
    """The model for one condition; for None, the model itself."""
    bind, bind_network = problem.bind, problem.bind_network
    if condition is None:
        return guided
    if bind is None or bind_network is None:
        raise ValueError("genneg: conditions: expected a problem with bind and bind_network, given None for them")
    if guided.classifiers is None:
        return Guided(bind(guided.theta, condition))
    each = lambda classifier: classifier | {"net": bind_network(classifier["net"], condition)}
    return Guided(bind(guided.theta, condition), potential.over_members(each, guided.classifiers))


def logit(problem: OracleProblem) -> Logit:
    """The logit of a classifier {"net": phi, "shift": scalar}, shift the prior's log-odds or 0."""
    return lambda classifier, x, t: problem.network(classifier["net"], x, t) + classifier["shift"]


def denoiser(problem: OracleProblem, guided: Guided, scale: float = 1.0) -> Denoiser:
    """The guided denoiser, D + sigma^2 / alpha sum_k grad log C_k (eq. 8)."""
    plain = partial(problem.model, guided.theta)
    if guided.classifiers is None:
        return plain
    log_c = potential.stack(potential.log_probability(logit(problem)), guided.classifiers)
    steering = guidance.guide(problem.process, log_c, scale, problem.within)
    return (steering if problem.last_steps is None else problem.last_steps(steering))(plain)


def twist(problem: OracleProblem, guided: Guided) -> Potential:
    """sum_k log C_k(x, t) where classifiers guide, 0 elsewhere: for `gendiff.smc`."""
    log_c = potential.stack(potential.log_probability(logit(problem)), guided.classifiers)
    return log_c if problem.within is None else potential.limited(log_c, problem.within)


def guided_share(problem: OracleProblem) -> float:
    """The share of the sampler's steps that classifiers guide."""
    if problem.within is None:
        return 1.0
    return float(np.mean(jax.vmap(problem.within)(problem.process.grid(problem.steps)[:-1])))


def append(guided: Guided, classifier: Params) -> Guided:
    """The model with one more classifier."""
    if guided.classifiers is None:
        return guided._replace(classifiers=potential.stacked(classifier))
    return guided._replace(classifiers=_joined(guided.classifiers, classifier))


@jax.jit
def _joined(classifiers: Params, classifier: Params) -> Params:
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new[None]]), classifiers, classifier)


class Request(NamedTuple):
    """The samples that one run asks for."""

    guided: Guided
    key: PRNGKey
    scale: Any = 1.0
    """Factor on the guidance."""
    conditions: Any = None
    """A pytree of arrays with a row for each sample; of `collect`, rows to choose from."""


def draw(
    problem: OracleProblem,
    guided: Guided,
    key: PRNGKey,
    n: int,
    mesh: jax.sharding.Mesh | None = None,
    scale: float = 1.0,
    conditions: Any = None,
) -> np.ndarray:
    """n samples of a model, whole on every process; `conditions`, a pytree with n rows, one for each.

    Raises:
      ValueError: n < 1, `problem.steps` or `problem.chunk` is out of range, the scale is not finite, there are not n
        conditions, or the model gives another shape than that of a sample.
    """
    return draw_all(problem, [Request(guided, key, scale, conditions)], n, mesh)[0]


def draw_all(
    problem: OracleProblem, requests: Sequence[Request], n: int, mesh: jax.sharding.Mesh | None = None
) -> list[np.ndarray]:
    """`draw` for each of several runs; those whose models agree in shape share a program."""
    check.number("genneg.draw: n", n, at_least=1, whole=True)
    for request in requests:
        check.number("genneg.draw: scale", request.scale)
        if request.conditions is not None:
            rows = check.rows("genneg.draw: conditions", request.conditions)
            check.number("genneg.draw: rows of the conditions", rows, at_least=n, at_most=n, whole=True)
    samples = runs.call(drawn, (problem, n), mesh, requests)
    return [distributed.gather(of_run, n) for of_run in samples]


@partial(jax.jit, static_argnums=(0, 1, 2))
def drawn(
    problem: OracleProblem, n: int, mesh: Any, guided: Guided, key: PRNGKey, scale: float, conditions: Any
) -> Samples:
    """The compiled program of `draw`."""
    grid = problem.process.grid(problem.steps)

    def one(given: tuple[PRNGKey, Any]) -> Sample:
        key, condition = given
        kernel = problem.kernel(problem.process, denoiser(problem, bound(problem, guided, condition), scale))
        return sampling.sample(problem.process, kernel, grid, key, problem.shape)

    return distributed.chunked(one, (jax.random.split(key, n), conditions), problem.chunk, mesh, cut=False)
