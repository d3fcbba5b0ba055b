"""Gen-neG on scenes of traffic: the measurements of a model."""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.genneg import measures, rows
from experiments.genneg.traffic_problem import Purpose, r_elbo
from experiments.lab.phases import Run
from gendiff import distributed
from gendiff.data import scenes
from gendiff.data import traffic as data
from gendiff.metrics import rates
from gendiff.metrics import traffic as realism
from gendiff.metrics.rates import Estimate
from gendiff.oracles import traffic as oracle


class Evaluation(NamedTuple):
    """The measurements of one model: n scenes, and test scenes."""

    vehicles: np.ndarray
    """(n, 12, 7), in metres."""
    holds: np.ndarray
    """(n, 78): the constraints that a scene keeps."""
    degenerate: np.ndarray
    """(n, 12): vehicles without positive extents or a heading, which are mended."""
    elbo: np.ndarray
    """r-ELBO of every test scene; empty on recorded maps."""
    seconds: np.ndarray
    """Of one sample, without compilation."""


def evaluations(subject: measures.Subject, on: str = "test") -> list[Evaluation]:
    """Samples and their verdicts, and the r-ELBO of test scenes with the same noise for every model."""
    config, data_of, places = subject.lab.config, subject.lab.data, subject.lab.data.places[on]
    n, count = config.samples, len(places.present)
    conditions = data.take(places, scenes.evenly(n, count))
    key = rows.key(Purpose.SAMPLES if on == "test" else Purpose.RECORDED)
    size = measures.equal_parts(n, config.draws.batch)
    drawn = measures.samples(subject, key, n, size, partial(data.take, conditions), again=True)
    elbos = [np.zeros(0)] * len(drawn)
    if on == "test":
        which = scenes.evenly(min(config.elbo_scenes, count), count)
        points, elbo_places = jnp.asarray(data_of.x[on][which]), data.take(places, which)
        elbos = measures.bounds(subject, r_elbo(config), points, rows.key(Purpose.ELBO), elbo_places)
    results = []
    for (samples, seconds), elbo in zip(drawn, elbos, strict=True):
        verdict = distributed.by_process(scenes.infractions, samples, conditions)
        vehicles, holds = scenes.metres(samples), np.asarray(oracle.constraints(verdict))
        results.append(Evaluation(vehicles, holds, np.asarray(verdict.degenerate), elbo, np.asarray(seconds)))
    return results


def numbers(run: Run, n: int, on: str = "test") -> np.ndarray:
    """The scenes of a split on whose maps n samples are."""
    return scenes.evenly(n, len(run.data.scenes[on].world))


def infractions(run: Run, name: str, on: str = "test") -> dict[str, Estimate]:
    """A row's rates of infractions, on maps of a split."""
    holds = run[f"evaluate/{name}"].holds
    return realism.infraction_rates(holds, run.data.scenes[on].world[numbers(run, len(holds), on)])


def metrics(run: Run, name: str, cost: float) -> dict[str, Estimate]:
    """The metrics of a row; `cost` is in evaluations of the denoiser's network for one sample."""
    evaluation, baseline, test = run[f"evaluate/{name}"], run["evaluate/baseline"], run.data.scenes["test"]
    which = numbers(run, len(evaluation.holds))
    estimates = infractions(run, name)
    if name != "baseline":
        broken = ~evaluation.holds.all(1)
        estimates["infraction_gain"] = rates.paired(~baseline.holds.all(1), broken, test.world[which])
    if trials := rates.per_success(estimates["infraction_rate"]):
        estimates["evaluations_per_valid"] = rates.scaled(trials, cost)
        estimates["seconds_per_valid"] = rates.scaled(trials, float(evaluation.seconds))
    bound, steps = rates.mean(evaluation.elbo), run.config.steps if run.config.chain == "ddpm" else 1
    dimensions = 7 * float(test.present[numbers(run, len(evaluation.elbo))].sum(1).mean())
    mended = evaluation.degenerate.sum(1) / test.present[which].sum(1)
    return estimates | {
        "r_elbo": bound,
        "r_elbo_gain": rates.mean(evaluation.elbo - baseline.elbo),
        "r_elbo_per_dim_step": rates.scaled(bound, 1 / (steps * dimensions)),
        "degenerate_rate": rates.clustered(mended, test.world[which]),
    } | distances(run, evaluation.vehicles, which)  # fmt: skip


def distances(run: Run, vehicles: np.ndarray, which: Any, on: str = "test") -> dict[str, Estimate]:
    """Distances of the marginals from those of test scenes; `which` are the scenes on whose maps the vehicles are."""
    test, (_, present, distance, *_) = run.data.scenes["test"], data.take(run.data.scenes[on], which)
    real = realism.marginals(test.vehicles, test.present, test.distance, data.HALF)
    return realism.distances(vehicles, present, distance, data.HALF, real)
