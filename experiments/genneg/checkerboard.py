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
    judged_problem,
    judged_times,
    problem,
    student_network,
    student_training,
)
from experiments.lab import figures
from experiments.lab.experiment import Experiment, Paper
from experiments.lab.phases import Lab, Run
from experiments.lab.table import Column, Row
from gendiff import likelihood, static
from gendiff.methods import genneg
from gendiff.methods.genneg import Lesson, Points
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
FIRST = ("baseline", "round-1/draws", "round-1/classifier")
"""The phases of the first round's model."""
PAPER = {"round-1-unweighted": {"infraction_rate": 0.0003, "elbo": -1.42}}
NOTES = """\
Intervals are 95 %: Wilson's for rates, Student's for means; with several seeds, Student's over the seeds.
infraction: share of samples off the filled cells. ELBO: of the reverse diffusion on fresh points of the board, in
nats a point; at best -ln(area), the row `data`. ELBO gain: over the baseline, paired (same points, noise levels and
noise); after one round it is ideally -ln(alpha). `rejection` and `smc` sample p(x | good), so their ELBO is the
baseline's minus ln(alpha). For `rejection` alpha is the Heun sampler's; for `smc` SMC estimates it for its ancestral
chain. outer density: density of a filled cell's frame, 5 % of its width on each side, relative to uniform.
evaluations: of a network as large as the baseline, (1 + 3 K) for one evaluation of K classifiers' guidance, divided by
the share of accepted samples; for `smc` by its effective number of samples. `accepted`: round 1's classifier, and at
low noise the oracle itself, which judges draws of x_0 (ours, not the paper's). oracle calls and seconds: to make the
model and all models that it builds on (training, synthetic data, compilation); for `rejection` and `smc` also to draw
the samples, for `accepted` the calls alone. Seeds run side by side, so their seconds are the time of all seeds.
`-`: not reported."""


def table(lab: Lab) -> None:
    """Compute every phase and add the rows, in the table's order."""
    config = lab.config
    setup, classifiers, students = problem(config), classifier_training(config), student_training(config)
    levels = jnp.geomspace(0.002, 80.0, 9)
    calibrate = partial(measures.calibrate, lab, key=rows.key(Purpose.CALIBRATION), times=levels)
    lab.each(add_data)
    lab.train("baseline", base_training)
    evaluate(lab, "baseline", setup, rows.baseline, ("baseline",))

    settings = genneg.Rounds(
        config.rounds, config.draws.per_class, config.draws.budget, classifiers, config.mode, students, config.stored,
        config.batch,
    )  # fmt: skip
    new_classifier = partial(initialised, classifier_network(config))
    phases: tuple[str, ...] = ("baseline",)
    for number in rows.rounds(lab, setup, settings, new_classifier, rows.key(Purpose.ROUNDS)):
        name = f"round-{number}"
        calibrate(name, setup, f"{name}/classifier", f"{name}/split")
        if number == 1:  # the ablation: the same samples and settings, all weights 1
            key = rows.key(Purpose.ROUNDS)
            fit = lambda run: rows.Fit(*run["round-1/split"], new_classifier(key(run)), key(run))  # noqa: B023
            rows.classifier(lab, "unweighted", setup, classifiers._replace(weighting="none"), fit)
            evaluate(
                lab, "round-1-unweighted", setup, rows.steered("unweighted"),
                ("baseline", "round-1/draws", "unweighted"),
            )  # fmt: skip
        phases = (*phases, f"{name}/draws", f"{name}/classifier", *[f"{name}/student"] * (config.mode == "distill"))
        evaluate(lab, name, setup, partial(rows.model_after, number), phases)
        if config.mode == "stack" and number in (1, config.rounds):
            distil(lab, number, students, phases)

    lab.each(add_rejection)
    points = lambda run: Points(run["round-1/split"][0].positives)
    rows.refitted(lab, "refit", setup, points, students, rows.key(Purpose.REFIT))
    evaluate(lab, "refit", setup, rows.student("refit"), ("baseline", "round-1/draws", "refit"))

    numbers = range(1, config.rounds + 1)
    start = lambda run: run["round-1/classifier"]["net"]
    fit = lambda run: rows.replay(run, setup, numbers, start(run), run.key(Purpose.REPLAY))
    rows.classifier(lab, "replay", setup, classifiers, fit)
    calibrate("replay", setup, "replay", "round-1/split")
    phases = ("baseline", *(f"round-{i}/{part}" for i in numbers for part in ("draws", "classifier")), "replay")
    evaluate(lab, "replay", setup, rows.steered("replay"), phases)

    evaluate(lab, "accepted", judged_problem(config), rows.steered("round-1/classifier"), FIRST)

    lab.once("smc", partial(smc_samples, lab, setup._replace(steps=config.smc.length(config.sampler_steps))))
    lab.each(add_smc)


def distil(lab: Lab, number: int, students: genneg.StudentTraining, phases: tuple[str, ...]) -> None:
    """Train a network in place of the stack, on good samples of the stack and bad ones of all its rounds."""
    config, name, last = lab.config, f"distilled-{number}", f"round-{number}"
    setup = problem(config, student=True)
    settings = students._replace(training=students.training._replace(rate=5e-3), model=setup.model)

    def lesson(run: Run) -> Lesson:
        key = run.key(Purpose.STUDENT)
        bad = np.concatenate([run[f"round-{i}/split"][0].negatives for i in range(1, number + 1)])
        good = run[f"evaluate/{last}"].accepted
        points = Points(genneg.mixture(good, bad, config.stored, jax.random.fold_in(key, 1)))
        return Lesson(run[last], points, initialised(student_network(config), key), key)

    rows.distilled(lab, name, problem(config), lesson, settings)
    evaluate(lab, name, setup, rows.student(name), (*phases, f"evaluate/{last}", name))


# Measurements.


class Evaluation(NamedTuple):
    """The measurements of one model."""

    points: Samples
    """Up to 10,000 samples, for the figures."""
    accepted: Samples
    """Up to 100,000 good samples."""
    counts: np.ndarray
    """Numbers of samples, of good ones, and of good ones in the outer band of their cells."""
    elbo: Array
    """Of every test point."""


def evaluate(lab: Lab, name: str, setup: genneg.OracleProblem, model: rows.Model, phases: Sequence[str]) -> None:
    """Measure a model and add its row; `phases` count for its oracle calls and its wall-clock time."""

    def metrics(run: Run) -> dict[str, Estimate]:
        evaluation = run[f"evaluate/{name}"]
        n, good, _ = map(int, evaluation.counts)
        judged = judged_evaluations(run.config, setup)
        calls = (1 + 3 * model(run).members) * (2 * run.config.sampler_steps - 1) + 2 * judged
        bounds = rates.mean(evaluation.elbo), rates.mean(evaluation.elbo - run["evaluate/baseline"].elbo)
        cost = rates.exact(calls * n / max(good, 1), n)
        asked = oracle_calls(run, phases) + n * judged * run.config.judged.draws
        return sampled(evaluation.counts, bounds, cost, asked, run.seconds(*phases))

    measures.evaluate(lab, name, setup, model, evaluations, Evaluation, metrics, PAPER.get(name))


def judged_evaluations(config: CheckerboardConfig, setup: genneg.OracleProblem) -> int:
    """Evaluations of a sample in which the oracle guides; each takes two derivatives of the denoiser more."""
    if setup.last_steps is None:
        return 0
    times = setup.process.grid(setup.steps)[1:-1]  # Heun evaluates twice at a time between two steps
    return 2 * int(np.sum(judged_times(config)(times)))


def evaluations(subject: measures.Subject) -> list[Evaluation]:
    """Samples and their verdicts, and the ELBO of the test points with the same noise for every model."""
    config = subject.lab.config
    drawn = measures.samples(subject, rows.key(Purpose.SAMPLES), config.samples, config.batch)
    test = board(config, Purpose.TEST, config.elbo_points)
    bound = static.partial(likelihood.elbo, levels=config.elbo_levels)
    elbos = measures.bounds(subject, bound, test, rows.key(Purpose.ELBO))
    results = []
    for (points, _), elbo in zip(drawn, elbos, strict=True):
        good = genneg.verdicts(subject.problem.oracle, points)
        results.append(Evaluation(points[:10_000], points[good][:100_000], tally(config, points), elbo))
    return results


def sampled(
    counts: np.ndarray, bounds: tuple[Estimate, Estimate], cost: Estimate, calls: float, seconds: float
) -> dict[str, Estimate]:
    """The metrics of a row with samples.

    Args:
      counts: see `tally`.
      bounds: the ELBO and its gain.
      cost: evaluations per accepted sample.
    """
    n, good, outer = map(int, counts)
    return {
        "infraction_rate": rates.rate(n - good, n),
        "elbo": bounds[0],
        "elbo_gain": bounds[1],
        "outer_density": outer_density(outer, good),
        "evaluations_per_accepted": cost,
        "oracle_calls": rates.exact(calls),
        "seconds": rates.exact(seconds),
    }


def oracle_calls(run: Run, phases: Sequence[str]) -> float:
    """Samples that the oracle judged in phases: all draws, and all samples of evaluations."""
    draws = [run[phase] for phase in phases if phase.endswith("/draws")]
    evaluated = [run[phase] for phase in phases if phase.startswith("evaluate/")]
    return sum(float(drawn.good) + float(drawn.bad) for drawn in draws) + sum(int(e.counts[0]) for e in evaluated)


def add_data(run: Run) -> None:
    """Add the training points, and the largest ELBO that a model of the board can have."""
    config = run.config
    n, good, outer = tally(config, np.asarray(board(config, Purpose.DATA, config.points)))
    area = 4 * config.half_width**2 * ((config.cells**2 + 1) // 2) / config.cells**2
    run.add("data", {
        "infraction_rate": rates.rate(n - good, n),
        "elbo": rates.exact(-np.log(area)),
        "outer_density": outer_density(outer, good),
    })  # fmt: skip


def add_rejection(run: Run) -> None:
    """Add the baseline's good samples: they are exact, at the price of the bad ones."""
    evaluation = run["evaluate/baseline"]
    n, good, outer = map(int, evaluation.counts)
    bounds = measures.conditioned(evaluation.elbo, rates.rate(good, n))
    cost = rates.exact((2 * run.config.sampler_steps - 1) * n / good, n)
    seconds = run.seconds("baseline", "evaluate/baseline")
    run.add("rejection", sampled(np.array([good, good, outer]), bounds, cost, n, seconds))


def smc_samples(lab: Lab, setup: genneg.OracleProblem, run: Run) -> dict[str, Any]:
    """Run twisted SMC with the first round's classifier as twist, and the oracle at the end."""
    config, model = run.config, rows.steered("round-1/classifier")(run)
    run.progress("smc", 0, 1, {})
    keys = jax.random.split(run.key(Purpose.SMC), config.smc.populations)
    drawn = measures.populations(lab.mesh, setup, config.smc.particles, model, keys)
    result = measures.pooled(drawn, setup, jax.random.fold_in(run.key(Purpose.SMC), 1))
    run.progress("smc", 1, 1, {"alpha": float(jnp.exp(result["log_alpha"]))})
    return result


def add_smc(run: Run) -> None:
    """Add the samples of SMC, which become exact as their number grows."""
    result, config = run["smc"], run.config
    counts, steps = tally(config, result["samples"]), config.smc.length(config.sampler_steps)
    bounds = measures.conditioned(run["evaluate/baseline"].elbo, measures.alpha_of(result))
    phases, n = (*FIRST, "smc"), int(counts[0])
    cost = rates.exact(4 * steps * n / float(result["effective"]), n)
    run.add("smc", sampled(counts, bounds, cost, oracle_calls(run, phases) + n, run.seconds(*phases)))


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
    """Draw the paper's Figures 2 and 3 and the calibration: samples of the first seed, numbers of all seeds."""
    first, config = members[0], members[0].config
    points = {"data": np.asarray(board(config, Purpose.DATA, config.points))}
    evaluated = [phase for phase in first.results if phase.startswith("evaluate/")]
    points |= {phase.removeprefix("evaluate/"): np.asarray(first[phase].points) for phase in evaluated}
    points["smc"] = first["smc"]["samples"]
    judge = problem(config).oracle
    panels = {name: (x[:3000], label(judge, x[:3000])) for name, x in points.items()}
    figures.samples(folder / "samples.png", panels, config.half_width, config.cells)

    metrics = {row.name: row.metrics for row in table}
    names = ["baseline", *(f"round-{i}" for i in range(1, config.rounds + 1))]
    quantities = {"infraction rate": "infraction_rate", "ELBO (nats)": "elbo", "ELBO gain (nats)": "elbo_gain"}
    students = {i: f"distilled-{i}" for i in (1, config.rounds) if f"distilled-{i}" in metrics}
    curves, stars = {}, {}
    for title, metric in quantities.items():
        curves[title] = [metrics[name][metric][:3] for name in names]
        stars[title] = {i: metrics[name][metric].value for i, name in students.items()}
    best = {"ELBO (nats)": metrics["data"]["elbo"].value}
    figures.by_round(folder / "rounds.png", curves, stars, best, logarithmic=("infraction rate",))
    figures.calibration(folder / "calibration.png", measures.calibrations(first))


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """The text below the table, with the calibration of every classifier of the first seed."""
    gains = {row.name: row.metrics["elbo_gain"].value for row in table if "elbo_gain" in row.metrics}
    title = "Calibration on held-out samples of the model that each classifier was trained for, over noise levels:"
    return f"{NOTES}\n\n{title}\n\n{measures.calibration_table(members[0], gains)}"


def row_names(config: CheckerboardConfig) -> list[str]:
    """The names of a run's rows, in their order."""
    rounds = []
    for number in range(1, config.rounds + 1):
        rounds += ["round-1-unweighted"] * (number == 1) + [f"round-{number}"]
        rounds += [f"distilled-{number}"] * (config.mode == "stack" and number in (1, config.rounds))
    return ["data", "baseline", *rounds, "rejection", "refit", "replay", "accepted", "smc"]


EXPERIMENT = Experiment(
    "genneg.checkerboard", CheckerboardConfig, PRESETS, table, COLUMNS, row_names,
    Paper("Don't be so negative! Score-based generative modeling with oracle-assisted guidance", "2307.16463",
          "section 6.1, Figures 2 and 3", PAPER),
    notes=notes, figures=draw_figures, programs=checkerboard_problem.programs, seeds="seeds",
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
