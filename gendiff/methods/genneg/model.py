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
    """A model, its sampler and an oracle.  Static: two equal problems share their compiled programs."""

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
    """The sampler of synthetic data and of evaluation, because alpha depends on it."""
    steps: int
    weight: losses.Weight
    """Weight of the denoising loss, in distillation and refitting."""
    classifier_time: Callable[[PRNGKey], Time]
    """Draws the noise levels that classifiers train on."""
    chunk: int = 1024
    """Samples that a device draws at a time."""
    bind: losses.Bind | None = None
    """Binds theta to a sample's condition (map, text).  The oracle is then a function of (samples, conditions) and
    returns labels (n, m); a sample is good if all of its labels are True."""
    bind_network: losses.Bind | None = None
    """Binds phi to a condition; the network may then return m logits."""
    within: potential.Interval | None = None
    """Times at which classifiers guide; None: all."""
    last_steps: Callable[[guidance.Guidance], guidance.Guidance] | None = None
    """The classifiers' guidance -> the guidance in its place, such as `static.partial(guidance.accepted, ..)`."""


class Guided(NamedTuple):
    """A denoiser's parameters and K >= 0 classifiers, stacked on axis 0 (None for K = 0)."""

    theta: Params
    classifiers: Params = None

    @property
    def members(self) -> int:
        """K, the number of classifiers."""
        return 0 if self.classifiers is None else potential.leading_size(self.classifiers)


def bound(problem: OracleProblem, guided: Guided, condition: Any) -> Guided:
    """Bind a model to a condition; None changes nothing."""
    bind, bind_network = problem.bind, problem.bind_network
    if condition is None:
        return guided
    if bind is None or bind_network is None:
        raise ValueError("genneg: problem must have bind and bind_network for conditions, got None")
    if guided.classifiers is None:
        return Guided(bind(guided.theta, condition))
    member = lambda classifier: classifier | {"net": bind_network(classifier["net"], condition)}
    return Guided(bind(guided.theta, condition), potential.over_members(member, guided.classifiers))


def logit(problem: OracleProblem) -> Logit:
    """Return the logit of a classifier {"net": phi, "shift": the prior's log-odds, or 0}."""
    return lambda classifier, x, t: problem.network(classifier["net"], x, t) + classifier["shift"]


def denoiser(problem: OracleProblem, guided: Guided, scale: float = 1.0) -> Denoiser:
    """Return the guided denoiser, D + sigma^2 / alpha sum_k grad log C_k (eq. 8)."""
    plain = partial(problem.model, guided.theta)
    if guided.classifiers is None:
        return plain
    steering = guidance.guide(problem.process, _log_c(problem, guided), scale, problem.within)
    return (steering if problem.last_steps is None else problem.last_steps(steering))(plain)


def twist(problem: OracleProblem, guided: Guided) -> Potential:
    """Return sum_k log C_k(x, t) where classifiers guide, and 0 elsewhere, for `gendiff.smc`."""
    log_c = _log_c(problem, guided)
    return log_c if problem.within is None else potential.limited(log_c, problem.within)


def _log_c(problem: OracleProblem, guided: Guided) -> Potential:
    return potential.stack(potential.log_probability(logit(problem)), guided.classifiers)


def guided_share(problem: OracleProblem) -> float:
    """Return the share of the sampler's steps that classifiers guide."""
    if problem.within is None:
        return 1.0
    return float(np.mean(jax.vmap(problem.within)(problem.process.grid(problem.steps)[:-1])))


def append(guided: Guided, classifier: Params) -> Guided:
    """Add a classifier to a model."""
    if guided.classifiers is None:
        return guided._replace(classifiers=potential.stacked(classifier))
    return guided._replace(classifiers=_joined(guided.classifiers, classifier))


@jax.jit
def _joined(classifiers: Params, classifier: Params) -> Params:
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new[None]]), classifiers, classifier)


class Request(NamedTuple):
    """The arguments of `draw` that a run has for itself."""

    guided: Guided
    key: PRNGKey
    scale: Any = 1.0
    """Factor on the guidance."""
    conditions: Any = None
    """A pytree of arrays with a row a sample; in `collect`, with rows to choose from."""


def draw(
    problem: OracleProblem,
    guided: Guided,
    key: PRNGKey,
    n: int,
    mesh: jax.sharding.Mesh | None = None,
    scale: float = 1.0,
    conditions: Any = None,
) -> np.ndarray:
    """Draw n samples (n, *shape) of a model, on every process; `conditions` is a pytree with n rows.

    Raises:
      ValueError: n < 1, `problem.steps` or `problem.chunk` is out of range, the scale is not finite, the conditions do
        not have n rows, or the model returns another shape than a sample's.
    """
    return draw_all(problem, [Request(guided, key, scale, conditions)], n, mesh)[0]


def draw_all(
    problem: OracleProblem, requests: Sequence[Request], n: int, mesh: jax.sharding.Mesh | None = None
) -> list[np.ndarray]:
    """`draw` for several runs; runs whose models have equal shapes share a program."""
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
    """Compile `draw`."""
    grid = problem.process.grid(problem.steps)

    def sample(arguments: tuple[PRNGKey, Any]) -> Sample:
        key, condition = arguments
        kernel = problem.kernel(problem.process, denoiser(problem, bound(problem, guided, condition), scale))
        return sampling.sample(problem.process, kernel, grid, key, problem.shape)

    return distributed.chunked(sample, (jax.random.split(key, n), conditions), problem.chunk, mesh, cut=False)
