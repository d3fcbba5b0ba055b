"""Gen-neG on a checkerboard (2307.16463, section 6.1, Figures 2 and 3): the rows of the table.

`checkerboard_problem` has the options, the networks and the trainings.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.genneg import checkerboard_problem, measures, rows
from experiments.genneg.checkerboard_problem import (
    PRESETS,
    CheckerboardConfig,
    Purpose,
    base_training,
    board,
    classifier_network,
    classifier_training,
    initialised,
    problem,
    student_network,
    student_training,
)
from experiments.lab import figures
from experiments.lab.experiment import Experiment, Paper
from experiments.lab.phases import Lab, Run
from experiments.lab.table import Column, Row, markdown
from gendiff import likelihood, static
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, Lesson, Points
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.oracles import checkerboard as oracle
from gendiff.oracles.oracle import label
from gendiff.types import Samples

COLUMNS = (
    Column("infraction_rate", "infraction %", percent=True),
    Column("elbo", "ELBO (nats)"),
    Column("elbo_gain", "ELBO gain"),
    Column("outer_density", "outer density"),
    Column("evaluations_per_accepted", "evaluations per accepted", digits=1),
    Column("oracle_calls", "oracle calls", digits=0),
    Column("seconds", "seconds", digits=1),
)
PAPER = {"round-1-unweighted": {"infraction_rate": 0.0003, "elbo": -1.42}}
NOTES = """\
Intervals are 95 %: Wilson's for rates, Student's for means; with several seeds, Student's over the seeds.
infraction: share of samples off the filled cells. ELBO: of the reverse diffusion on fresh points of the board, in
nats a point; at best -ln(area), the row `data`. ELBO gain: to the baseline, paired (same points, noise levels and
noise); ideal after one round is -ln(alpha). `rejection` and `smc` sample p(x | good): their ELBO is the baseline's
minus ln(alpha), with alpha of the Heun sampler for one and estimated by SMC, for its ancestral chain, for the other.
outer density: density of the frame that takes the outer 5 % of a filled cell's width on each side, relative to uniform.
evaluations: of a network the size of the baseline, (1 + 3 K) a step's evaluation with K classifiers, over the share of
accepted samples; for `smc` over its effective number of samples. oracle calls and seconds: to make the model and all
that it builds on (training, synthetic data, compilation); for `rejection` and `smc` also to draw the samples. Seeds are
made side by side: their seconds are those of all. `-`: not reported."""


def table(lab: Lab) -> None:
    """Every row of the table, in its order."""
    config = lab.config
    setup, how, students = problem(config), classifier_training(config), student_training(config)
    levels = jnp.geomspace(0.002, 80.0, 9)
    calibrate = partial(measures.calibrate, lab, key=rows.key(Purpose.CALIBRATION), times=levels)
    lab.each(add_data)
    lab.train("baseline", base_training)
    evaluate(lab, "baseline", setup, rows.baseline, ("baseline",))

    settings = genneg.Rounds(
        config.rounds, config.draws.per_class, config.draws.budget, how, config.mode, students, config.stored,
        config.batch,
    )  # fmt: skip
    new_classifier = partial(initialised, classifier_network(config))
    made: tuple[str, ...] = ("baseline",)
    for number in rows.rounds(lab, setup, settings, new_classifier, rows.key(Purpose.ROUNDS)):
        name = f"round-{number}"
        calibrate(name, setup, f"{name}/classifier", f"{name}/split")
        if number == 1:  # the ablation: the same samples and settings, all weights 1
            key = rows.key(Purpose.ROUNDS)
            fit = lambda run: rows.Fit(*run["round-1/split"], new_classifier(key(run)), key(run))  # noqa: B023
            rows.classifier(lab, "unweighted", setup, how._replace(weighting="none"), fit)
            phases = ("baseline", "round-1/draws", "unweighted")
            evaluate(lab, "round-1-unweighted", setup, rows.steered("unweighted"), phases)
        made = (*made, f"{name}/draws", f"{name}/classifier", *[f"{name}/student"] * (config.mode == "distill"))
        evaluate(lab, name, setup, partial(rows.model_after, number), made)
        if config.mode == "stack" and number in (1, config.rounds):
            distil(lab, number, students, made)

    lab.each(add_rejection)
    first = ("baseline", "round-1/draws")
    points = lambda run: Points(run["round-1/split"][0].positives)
    rows.refitted(lab, "refit", setup, points, students, rows.key(Purpose.REFIT))
    evaluate(lab, "refit", setup, rows.student("refit"), (*first, "refit"))

    numbers = range(1, config.rounds + 1)
    start = lambda run: run["round-1/classifier"]["net"]
    fit = lambda run: rows.replay(run, setup, numbers, start(run), run.key(Purpose.REPLAY))
    rows.classifier(lab, "replay", setup, how, fit)
    calibrate("replay", setup, "replay", "round-1/split")
    made = ("baseline", *(f"round-{i}/{part}" for i in numbers for part in ("draws", "classifier")), "replay")
    evaluate(lab, "replay", setup, rows.steered("replay"), made)

    populations = partial(smc_samples, lab, setup._replace(steps=config.smc.length(config.sampler_steps)))
    lab.once("smc", populations)
    lab.each(add_smc)


def distil(lab: Lab, number: int, plain: genneg.StudentTraining, made: tuple[str, ...]) -> None:
    """One network in place of the stack, taught on good samples of the stack and bad ones of all its rounds."""
    config, name, last = lab.config, f"distilled-{number}", f"round-{number}"
    setup = problem(config, student=True)
    settings = plain._replace(training=plain.training._replace(rate=5e-3), model=setup.model)

    def lesson(run: Run) -> Lesson:
        key = run.key(Purpose.STUDENT)
        bad = np.concatenate([run[f"round-{i}/split"][0].negatives for i in range(1, number + 1)])
        good = run[f"evaluate/{last}"].accepted
        points = Points(genneg.mixture(good, bad, config.stored, jax.random.fold_in(key, 1)))
        return Lesson(run[last], points, initialised(student_network(config), key), key)

    rows.distilled(lab, name, problem(config), lesson, settings)
    evaluate(lab, name, setup, rows.student(name), (*made, f"evaluate/{last}", name))


# What is measured.


class Evaluation(NamedTuple):
    """What is measured of one model."""

    points: Samples
    """Up to 10,000 samples, for the figures."""
    accepted: Samples
    """Up to 100,000 good samples."""
    counts: np.ndarray
    """Numbers of samples, of good ones, and of good ones in the outer band of their cells."""
    elbo: Array
    """Of each test point."""


def evaluate(lab: Lab, name: str, setup: genneg.OracleProblem, model: rows.Model, made: Sequence[str]) -> None:
    """Measure a model and add its row; the phases `made` are its oracle calls and its wall-clock time."""
    compute = lambda members: evaluations(lab, members, name, setup, model)
    lab.together(f"evaluate/{name}", compute, Evaluation)
    lab.each(lambda run: run.add(name, measured(run, name, model(run), made), PAPER.get(name)))


def evaluations(
    lab: Lab, members: Sequence[Run], name: str, setup: genneg.OracleProblem, model: rows.Model
) -> list[Evaluation]:
    """Samples and their verdicts, and the ELBO of the test points with the same noise for every model."""
    config, phase = lab.config, f"evaluate {name}"
    scale = lambda run: run.config.guidance_scale
    size = config.samples, config.batch
    drawn = measures.samples(lab, members, phase, setup, model, rows.key(Purpose.SAMPLES), *size, scale)
    test = board(config, Purpose.TEST, config.elbo_points)
    bound = static.partial(likelihood.elbo, levels=config.elbo_levels)
    elbos = measures.bounds(lab, members, setup, bound, model, test, rows.key(Purpose.ELBO), scale)
    found = []
    for (points, _), bounds in zip(drawn, elbos, strict=True):
        good = genneg.verdicts(setup.oracle, points)
        found.append(Evaluation(points[:10_000], points[good][:100_000], tally(config, points), bounds))
    return found


def measured(run: Run, name: str, guided: Guided, made: Sequence[str]) -> dict[str, Estimate]:
    """The metrics of a model."""
    evaluation, baseline = run[f"evaluate/{name}"], run["evaluate/baseline"]
    n, good, outer = (int(count) for count in evaluation.counts)
    cost = (1 + 3 * guided.members) * (2 * run.config.sampler_steps - 1)
    return {
        "infraction_rate": rates.rate(n - good, n),
        "elbo": rates.mean(evaluation.elbo),
        "elbo_gain": rates.mean(evaluation.elbo - baseline.elbo),
        "outer_density": outer_density(outer, good),
        "evaluations_per_accepted": rates.exact(cost * n / max(good, 1), n),
        "oracle_calls": rates.exact(oracle_calls(run, made)),
        "seconds": rates.exact(run.seconds(*made)),
    }


def oracle_calls(run: Run, made: Sequence[str]) -> float:
    """Samples that the oracle judged in phases: of draws all of them, and of evaluations."""
    drawn = [run[phase] for phase in made if phase.endswith("/draws")]
    judged = [run[phase] for phase in made if phase.startswith("evaluate/")]
    return sum(float(found.good) + float(found.bad) for found in drawn) + sum(int(e.counts[0]) for e in judged)


def add_data(run: Run) -> None:
    """The training points, and the largest ELBO that a model of the board can have."""
    config = run.config
    n, good, outer = tally(config, np.asarray(board(config, Purpose.DATA, config.points)))
    area = 4 * config.half_width**2 * ((config.cells**2 + 1) // 2) / config.cells**2
    run.add("data", {
        "infraction_rate": rates.rate(n - good, n),
        "elbo": rates.exact(-np.log(area)),
        "outer_density": outer_density(outer, good),
    })  # fmt: skip


def add_rejection(run: Run) -> None:
    """The baseline's good samples: exact, at the price of the bad ones."""
    evaluation = run["evaluate/baseline"]
    n, good, outer = (int(count) for count in evaluation.counts)
    elbo, gain = measures.conditioned(evaluation.elbo, rates.rate(good, n))
    run.add("rejection", {
        "infraction_rate": rates.rate(0, good),
        "elbo": elbo,
        "elbo_gain": gain,
        "outer_density": outer_density(outer, good),
        "evaluations_per_accepted": rates.exact((2 * run.config.sampler_steps - 1) * n / good, n),
        "oracle_calls": rates.exact(n),
        "seconds": rates.exact(run.seconds("baseline", "evaluate/baseline")),
    })  # fmt: skip


def smc_samples(lab: Lab, setup: genneg.OracleProblem, run: Run) -> dict[str, Any]:
    """Twisted SMC with the first round's classifier as twist, and the oracle at the end."""
    config = run.config
    guided = rows.steered("round-1/classifier")(run)
    run.progress("smc", 0, 1, {})
    keys = jax.random.split(run.key(Purpose.SMC), config.smc.populations)
    found = measures.populations(lab.mesh, setup, config.smc.particles, guided, keys)
    result = measures.pooled(found, setup, jax.random.fold_in(run.key(Purpose.SMC), 1))
    run.progress("smc", 1, 1, {"alpha": float(jnp.exp(result["log_alpha"]))})
    return result


def add_smc(run: Run) -> None:
    """The samples of SMC: exact as their number grows."""
    result, config = run["smc"], run.config
    steps = config.smc.length(config.sampler_steps)
    n, good, outer = (int(count) for count in tally(config, result["samples"]))
    elbo, gain = measures.conditioned(run["evaluate/baseline"].elbo, measures.alpha_of(result))
    made = ("baseline", "round-1/draws", "round-1/classifier", "smc")
    run.add("smc", {
        "infraction_rate": rates.rate(n - good, n),
        "elbo": elbo,
        "elbo_gain": gain,
        "outer_density": outer_density(outer, good),
        "evaluations_per_accepted": rates.exact(4 * steps * n / float(result["effective"]), n),
        "oracle_calls": rates.exact(oracle_calls(run, made) + n),
        "seconds": rates.exact(run.seconds(*made)),
    })  # fmt: skip


def tally(config: CheckerboardConfig, points: np.ndarray) -> np.ndarray:
    """Numbers of all points, of good ones, and of good ones in the outer band of their cells."""
    good = np.asarray(oracle.on_board(jnp.asarray(points), config.cells, config.half_width))
    outer = np.asarray(oracle.in_outer_band(jnp.asarray(points), config.cells, config.half_width))
    return np.array([len(points), good.sum(), (good & outer).sum()])


def outer_density(outer: int, good: int) -> Estimate:
    """Density of the outer band relative to uniform, among good points."""
    return rates.scaled(rates.rate(outer, max(good, 1)), 1 / (1 - (1 - oracle.BAND) ** 2))


# Figures and text.


def draw_figures(folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """The paper's Figures 2 and 3 and the calibration, of the first seed's samples and all seeds' numbers."""
    first, config = members[0], members[0].config
    panels = {"data": np.asarray(board(config, Purpose.DATA, config.points))}
    panels |= {name: np.asarray(found.points) for name, found in named(first, "evaluate/")}
    panels["smc"] = first["smc"]["samples"]
    few = {name: points[:3000] for name, points in panels.items()}
    judge = problem(config).oracle
    judged = {name: (points, label(judge, points)) for name, points in few.items()}
    figures.samples(folder / "samples.png", judged, config.half_width, config.cells)

    metrics = {row.name: row.metrics for row in table}
    names = ["baseline", *(f"round-{i}" for i in range(1, config.rounds + 1))]
    quantities = {"infraction rate": "infraction_rate", "ELBO (nats)": "elbo", "ELBO gain (nats)": "elbo_gain"}
    students = {i: f"distilled-{i}" for i in (1, config.rounds) if f"distilled-{i}" in metrics}
    figures.by_round(
        folder / "rounds.png",
        {title: [metrics[name][metric][:3] for name in names] for title, metric in quantities.items()},
        {
            title: {i: metrics[name][metric].value for i, name in students.items()}
            for title, metric in quantities.items()
        },
        {"ELBO (nats)": metrics["data"]["elbo"].value},
        logarithmic=("infraction rate",),
    )
    reports = dict(named(first, "calibration/"))
    figures.calibration(folder / "calibration.png", reports, {name: alpha(first, name) for name in reports})


def named(run: Run, prefix: str) -> list[tuple[str, Any]]:
    """(name, result) of the phases whose names begin so."""
    return [(phase.removeprefix(prefix), result) for phase, result in run.results.items() if phase.startswith(prefix)]


def alpha(run: Run, classifier: str) -> float:
    """The share of good samples that a classifier was made for."""
    return run[f"{'round-1' if classifier == 'replay' else classifier}/split"][1].alpha


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """The text below the table: each classifier's mean C against alpha, and the ideal gain against the gain seen."""
    first, metrics = members[0], {row.name: row.metrics for row in table}
    head = [
        "classifier",
        "alpha",
        "largest gap of mean C to alpha",
        "mean calibration error",
        "ideal gain",
        "gain seen",
    ]
    before, body = 0.0, []
    for name, report in named(first, "calibration/"):
        share, gain = alpha(first, name), metrics[name]["elbo_gain"].value
        seen = gain - (0.0 if name == "replay" else before)
        before = gain
        deviation = float(np.abs(np.asarray(report.mean) - share).max())
        error = float(np.mean(report.error))
        body.append([name, *(f"{v:.4f}" for v in (share, deviation, error)), f"{-np.log(share):+.4f}", f"{seen:+.4f}"])
    title = "Calibration on held-out samples of the model that each classifier was made for, over noise levels:"
    return f"{NOTES}\n\n{title}\n\n{markdown(head, body)}"


def row_names(config: CheckerboardConfig) -> list[str]:
    """Names of the rows of a run, in their order."""
    rounds = []
    for number in range(1, config.rounds + 1):
        rounds += ["round-1-unweighted"] * (number == 1) + [f"round-{number}"]
        rounds += [f"distilled-{number}"] * (config.mode == "stack" and number in (1, config.rounds))
    return ["data", "baseline", *rounds, "rejection", "refit", "replay", "smc"]


EXPERIMENT = Experiment(
    "genneg.checkerboard", CheckerboardConfig, PRESETS, table, COLUMNS, row_names,
    Paper("Don't be so negative! Score-based generative modeling with oracle-assisted guidance", "2307.16463",
          "section 6.1, Figures 2 and 3", PAPER),
    notes=notes, figures=draw_figures, programs=checkerboard_problem.programs, seeds="seeds",
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
