"""The programs of Gen-neG, for `tpu.plan`: a classifier and the guided sampler of any problem."""

from collections.abc import Callable
from typing import Any

from experiments.lab.programs import KEY, NUMBER, Lower, Program, abstract, many, sampler, trained
from gendiff import training
from gendiff.methods import genneg
from gendiff.methods.genneg import ClassifierTraining, Fit, Guided, OracleProblem, Request, Synthetic
from gendiff.types import Params, PRNGKey


def classifier(
    what: str, unit: str, problem: OracleProblem, settings: ClassifierTraining, new: Callable[[PRNGKey], Params],
    samples: Any, conditions: Any = None,
) -> Program:  # fmt: skip
    """Describe the training of a classifier.

    Args:
      new: key -> fresh parameters.
      samples: of one class, on the host (see `Synthetic`).
      conditions: shapes of the conditions, of which a sample has a row.
    """
    pool = Synthetic(samples, samples, 1, 1)

    def job(batch: int) -> training.Training:
        sized = settings._replace(half=batch // 2)
        fit = lambda key, conditions: Fit(pool, pool, new(key), key, conditions=conditions)
        make = lambda key, conditions: genneg.classifier_training(problem, fit(key, conditions), sized)
        return abstract(make, KEY, conditions)

    return trained(what, unit, 2 * settings.half, job, pool=True)


def stack(theta: Params, phi: Params, classifiers: int) -> Guided:
    """The shapes of a model with a number of classifiers."""
    return Guided(theta, many({"net": phi, "shift": NUMBER}, classifiers))


def guided(
    what: str, problem: OracleProblem, n: int, model: Guided, conditions: Callable[[int], Any] = lambda n: None,
    setup: Lower | None = None,
) -> Program:  # fmt: skip
    """Describe the sampler of a guided model; `conditions`: number of samples -> shapes of their conditions."""
    call = lambda n: ((problem, n), Request(model, KEY, NUMBER, conditions(n)))
    return sampler(what, n, problem.steps, problem.chunk, genneg.drawn, call, setup)
