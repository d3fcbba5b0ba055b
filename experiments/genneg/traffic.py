"""Gen-neG on scenes of traffic (2307.16463, section 6.2, Table 1 and Figure 1): the rows of the table.

`traffic_problem` has the options, scenes and networks, `traffic_training` the trainings, `traffic_measures` the
measurements of a model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.genneg import measures, rows
from experiments.genneg.traffic_measures import Evaluation, distances, evaluations, infractions, metrics, numbers
from experiments.genneg.traffic_problem import (
    LABELS,
    PRESETS,
    Purpose,
    TrafficConfig,
    calls,
    classifier_network,
    load,
    problem,
    teaching,
)
from experiments.genneg.traffic_training import base_training, classifier_training, programs, student_training
from experiments.lab import figures
from experiments.lab.experiment import Experiment, Paper
from experiments.lab.phases import Lab, Run
from experiments.lab.table import Column, Row, markdown
from gendiff import distributed, nets
from gendiff.data import scenes
from gendiff.data import traffic as data
from gendiff.methods import genneg
from gendiff.methods.genneg import Lesson, Points
from gendiff.metrics import rates
from gendiff.metrics import traffic as realism
from gendiff.metrics.rates import Estimate
from gendiff.nets.scene_network import begin_from
from gendiff.nets.scene_transformer import Head
from gendiff.oracles import traffic as oracle

COLUMNS = (
    Column("collision_rate", "collision %", percent=True, digits=1),
    Column("offroad_rate", "off-road %", percent=True, digits=1),
    Column("infraction_rate", "infraction %", percent=True, digits=1),
    Column("infraction_gain", "fewer %", percent=True, digits=1),
    Column("r_elbo", "r-ELBO", digits=0),
    Column("r_elbo_gain", "r-ELBO gain", digits=1),
    Column("r_elbo_per_dim_step", "per dim and step", digits=4),
    Column("evaluations_per_valid", "evaluations per valid", digits=1),
    Column("seconds_per_valid", "seconds per valid", digits=4),
    Column("speed_distance", "speed (m/s)", digits=2),
    Column("heading_distance", "heading (deg)", digits=1),
    Column("gap_distance", "gap (m)", digits=2),
    Column("degenerate_rate", "degenerate %", percent=True, digits=2),
)
PAPER = {
    name: dict(zip(("collision_rate", "offroad_rate", "infraction_rate", "r_elbo_gain"), values, strict=True))
    for name, values in {
        "baseline": (0.283, 0.013, 0.293, 0),
        "by-scene-unweighted": (0.205, 0.009, 0.219, -20),
        "by-scene": (0.233, 0.010, 0.241, -10),
        "by-agent-unweighted": (0.146, 0.008, 0.152, -50),
        "by-agent": (0.164, 0.009, 0.172, -20),
        "by-agent-stacked": (0.116, 0.006, 0.122, -50),
        "distilled-1": (0.122, 0.008, 0.129, 70),
        "distilled-2": (0.051, 0.005, 0.056, 50),
        "time-independent": (0.207, 0.009, 0.214, -21650),
    }.items()
}
"""`r_elbo_gain` is the difference to the paper's baseline, -2750, because r-ELBOs on other data are not comparable."""
NOTES = """\
The paper's scenes are private; ours are SUMO's.  Levels cannot be compared, only differences between rows.
collision, off-road, infraction: share of scenes with an overlap, a vehicle more than 0.3 m off the drivable area, or
either, on maps that no model was trained on. fewer: the baseline's infractions less the row's, paired (same maps and
start noise). 95 % intervals: the bootstrap over maps.
r-ELBO: -sum_t E || eps - eps_hat ||^2 over T steps on test scenes (for EDM, minus the training loss), Student's
intervals over scenes; its gain over the baseline is paired (same scenes, noise levels and noise). It is not known for
models that are conditioned by rejection. Training draws low noise more often than this sum (--time-power).
evaluations per valid: of a network the size of the denoiser, without maps, which are encoded once a scene. A classifier
counts three times (its gradient) its share of the denoiser's parameters, in the steps that it guides. seconds: of
sampling alone, without compilation and without the oracle, on this device, which other programs may use too.
speed, heading, gap: Wasserstein's distance of the marginal from that of test scenes: speed; angle to the nearest edge
of the road; road to the next vehicle ahead. `data` are the test scenes; their distances are those of validation scenes,
which have other maps. degenerate: vehicles without positive extents or a heading, which are mended.
`time-independent` learned only from scenes with the sampler's least noise; its gradient is taken at noisy ones (by
agent). The other classifiers are told the noise. Classifiers guide where the signal is at least --least-signal.
`distilled-1` learned from `by-agent`, `distilled-2` from `by-agent-stacked`, both at the scenes drawn for round 2.
Three quarters of these scenes are good, and three quarters of the times are those of classifiers (all, for EDM).
`rejection` has the baseline's good scenes; `refit` was trained on those of round 1. `by-pair-stronger` is `by-pair`
with its guidance scaled (--stronger), because `by-agent` counts a collision twice, once for each vehicle. `smc` has
`by-pair` as its twist, ancestral steps, and the oracle at the end. Its rates and distances are of one scene of each
population that has a good one; its cost is by effective number of good particles. `recorded-*`: on maps of recorded
scenes (CommonRoad), with as many vehicles as were recorded, 4 to 12. scenes.png: the last two maps were chosen because
the baseline has an infraction on them."""

PAIRED = "Differences between rows, paired (same maps and start noise, same scenes and noise), 95 % intervals as above:"
COMPARED = (
    ("by-scene", "baseline"),
    ("by-agent", "by-scene"),
    ("by-agent-stacked", "by-agent"),
    ("by-scene-unweighted", "by-scene"),
    ("by-agent-unweighted", "by-agent"),
    ("distilled-1", "by-agent"),
    ("distilled-2", "by-agent-stacked"),
    ("by-pair-stronger", "by-agent"),
)
"""The pairs of rows that the paper's claims compare."""


every_core = partial(distributed.training_mesh, every_core=True)


def table(lab: Lab) -> None:
    """Compute every phase and add the rows, in the table's order."""
    config = lab.config
    lab.unchanged("data", lambda run: scenes.fingerprint(run.data.scenes))
    lab.each(add_data)
    best = lambda run, state: {"theta": state.best, "step": state.best_step, "loss": state.best_loss}
    lab.train("baseline", base_training, best, every_core(config.baseline.batch))
    lab.each(keep_theta)
    evaluate(lab, "baseline", rows.baseline)

    draw(lab, "round-1", rows.baseline)
    classify(lab, "by-scene-unweighted", "scene", weighting="none")
    classify(lab, "by-scene", "scene")
    classify(lab, "by-agent-unweighted", "agent", weighting="none")
    first = classify(lab, "by-agent", "agent")
    draw(lab, "round-2", first)
    stacked = classify(lab, "by-agent-stacked", "agent", "round-2", ("by-agent",))
    distil(lab, "distilled-1", first)
    student = distil(lab, "distilled-2", stacked)
    classify(lab, "time-independent", "agent", timeless=True)
    pairs = classify(lab, "by-pair", "pair")
    evaluate(lab, "by-pair-stronger", pairs, "pair", factor=lambda run: run.config.stronger)

    lab.each(add_rejection)
    points = lambda run: points_of(run, run["round-1/draws"].positives)
    students, mesh = student_training(config), every_core(config.student.batch)
    rows.refitted(lab, "refit", problem(config), points, students, rows.key(Purpose.REFIT), mesh)
    evaluate(lab, "refit", rows.student("refit"))
    lab.once("smc", partial(smc_scenes, lab, pairs), measures.Chosen)
    lab.each(add_smc)
    if "recorded" in lab.data.scenes:
        for name, model in {"baseline": rows.baseline, "by-agent-stacked": stacked, "distilled-2": student}.items():
            evaluate(lab, f"recorded-{name}", model, on="recorded")


def keep_theta(run: Run) -> None:
    """Note the step of the baseline's least loss, and keep its parameters."""
    best = run["baseline"]
    least, where = float(best["loss"]), f"step {int(best['step'])} of {run.config.baseline.steps}"
    run.remarks.append(f"The baseline has its least loss on validation maps, {least:.2f}, at {where}.")
    run.results["baseline"] = best["theta"]


def draw(lab: Lab, phase: str, model: rows.Model) -> None:
    """Draw scenes of a model on training maps, and judge their constraints."""
    key = lambda run: jax.random.fold_in(run.key(Purpose.DRAWS), model(run).members)
    name = rows.draws(lab, phase, problem(lab.config), model, key, lab.config.draws, lab.data.conditions)

    def remark(run: Run) -> None:
        drawn = run[name]
        counts = f"{int(drawn.good)} of {int(drawn.good) + int(drawn.bad)} scenes on training maps"
        run.remarks.append(f"Draws for {phase}: {counts} were good, alpha = {drawn.alpha:.4f}.")

    lab.each(remark)


def classify(
    lab: Lab, name: str, head: Head, drawn: str = "round-1", before: tuple[str, ...] = (),
    weighting: Literal["importance", "none"] = "importance", timeless: bool = False,
) -> rows.Model:  # fmt: skip
    """Fit a classifier of scenes, vehicles or pairs to a round's draws; guide with it and with the phases `before`."""
    config, place = lab.config, data.take(lab.data.places["test"], 0)
    settings = classifier_training(config, weighting)

    def fit(run: Run) -> rows.Fit:
        net = nets.fresh(classifier_network(config, head), run.key(Purpose.CLASSIFIER), place)
        samples = run[f"{drawn}/draws"].relabelled(LABELS[head])
        parts = genneg.split(samples, settings, jax.random.fold_in(run.key(Purpose.DRAWS), 7))
        key = jax.random.fold_in(run.key(Purpose.CLASSIFIER), 1)
        return rows.Fit(*parts, begin_from(run["baseline"], net) if config.from_denoiser else net, key)

    setup, model = problem(config, head, timeless), rows.steered(*before, name)
    rows.classifier(lab, name, setup, settings, fit, lab.data.conditions, every_core(2 * settings.half))
    evaluate(lab, name, model, head, timeless)
    return model


def points_of(run: Run, samples: Any) -> Points:
    """Samples of a round with their maps."""
    return Points(samples["x"], samples["row"], run.data.conditions)


def distil(lab: Lab, name: str, teacher: rows.Model) -> rows.Model:
    """Train a network in place of a stack."""
    config = lab.config

    def lesson(run: Run) -> Lesson:
        key, drawn = run.key(Purpose.STUDENT), run["round-2/draws"]
        pool = genneg.mixture(drawn.positives, drawn.negatives, config.stored, jax.random.fold_in(key, 1))
        return Lesson(teacher(run), points_of(run, pool), run["baseline"], jax.random.fold_in(key, 2))

    rows.distilled(lab, name, teaching(config), lesson, student_training(config), every_core(config.student.batch))
    evaluate(lab, name, rows.student(name))
    return rows.student(name)


def evaluate(
    lab: Lab, name: str, model: rows.Model, head: Head = "agent", timeless: bool = False,
    factor: Callable[[Run], float] = lambda run: 1.0, on: str = "test",
) -> None:  # fmt: skip
    """Measure a model on maps of a split and add its row; its classifiers have this head."""
    cost = lambda run: calls(run.config, 3 * model(run).members, head)
    row = lambda run: metrics(run, name, cost(run)) if on == "test" else infractions(run, name, on)
    setup, measure = problem(lab.config, head, timeless), partial(evaluations, on=on)
    measures.evaluate(lab, name, setup, model, measure, Evaluation, row, PAPER.get(name), factor)


# Rows without a model of their own.


def add_data(run: Run) -> None:
    """Add the test scenes, which have no infractions, and the distances of validation scenes from them."""
    none = rates.exact(0.0, len(run.data.scenes["test"].world))
    vehicles = run.data.scenes["validation"].vehicles
    run.add("data", dict.fromkeys(realism.RATES, none) | distances(run, vehicles, slice(None), "validation"))


def add_rejection(run: Run) -> None:
    """Add the baseline's good scenes: they are exact, at the price of the bad ones."""
    evaluation = run["evaluate/baseline"]
    good = np.flatnonzero(evaluation.holds.all(1))
    baseline = next(row.metrics for row in run.rows if row.name == "baseline")
    costs = {name: baseline[name] for name in ("evaluations_per_valid", "seconds_per_valid")}
    marginals = distances(run, evaluation.vehicles[good], numbers(run, len(evaluation.holds))[good])
    run.add("rejection", dict.fromkeys(realism.RATES, rates.exact(0.0, len(good))) | costs | marginals)


def smc_scenes(lab: Lab, model: rows.Model, run: Run) -> measures.Chosen:
    """Run twisted SMC, a population for each map, and the oracle at the end."""
    config, n = run.config, run.config.smc.populations
    setup = problem(config, "pair")._replace(steps=config.smc.length(config.sampler_steps))
    conditions = partial(data.take, data.take(run.data.places["test"], numbers(run, n)))
    return measures.one_of_each(
        lab, run, setup, config.smc.particles, model(run), run.key(Purpose.SMC), n, conditions
    )  # fmt: skip


def add_smc(run: Run) -> None:
    chosen, config, n = run["smc"], run.config, run.config.smc.populations
    good = len(chosen.samples)
    estimates: dict[str, Estimate] = {}
    if good:
        which = numbers(run, n)[chosen.numbers]
        holds = scenes.constraints(chosen.samples, data.take(run.data.places["test"], which))
        # Their rates are 0 because the oracle chose them: these rates only confirm it.
        estimates = {
            name: rates.exact(np.mean(~kept), good)
            for name, kept in zip(realism.RATES, realism.kept(holds), strict=True)
        }
        estimates |= distances(run, scenes.metres(chosen.samples), which)
        # The gradient of the twist at x_t, and its value at x_s.
        cost = config.smc.particles * calls(config, 4, "pair", config.smc.length(config.sampler_steps))
        effective = rates.mean(chosen.effective).value
        estimates["evaluations_per_valid"] = rates.exact(cost / effective, n)
        estimates["seconds_per_valid"] = rates.exact(float(chosen.seconds) / effective, n)
    run.remarks.append(f"Of {n} populations of SMC, {good} have a good particle of {config.smc.particles}.")
    run.add("smc", estimates)


# Text and figures.


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """The text below the table, with the differences between rows."""
    run, body = members[0], []
    maps = run.data.scenes["test"].world[numbers(run, run.config.samples)]
    signed = lambda estimate: f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"
    for name, other in COMPARED:
        row, base = run[f"evaluate/{name}"], run[f"evaluate/{other}"]
        rate = rates.paired(~row.holds.all(1), ~base.holds.all(1), maps)
        gain = rates.mean(row.elbo - base.elbo)
        body.append([f"`{name}` - `{other}`", signed(rates.scaled(rate, 100)), signed(gain)])
    compared = markdown(["rows", "infraction, points", "r-ELBO"], body)
    return f"{NOTES}\n\n{' '.join(run.remarks)}\n\n{PAIRED}\n\n{compared}"


FIGURE_ROWS = ("baseline", "by-scene", "by-agent", "by-pair", "distilled-2")


def draw_figures(folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Draw scenes as in Fig. 1 a-f, and the places of infractions as in Fig. 1 g-h."""
    run = members[0]
    test, which = run.data.scenes["test"], numbers(run, run.config.samples)
    evaluated = {name: run[f"evaluate/{name}"] for name in (*FIGURE_ROWS, "by-agent-stacked")}
    bad, count = {name: ~oracle.by_agent(evaluation.holds) for name, evaluation in evaluated.items()}, len(test.world)
    # The last two of four maps are two on which the baseline fails: its first sample of a map is row i.
    good = evaluated["baseline"].holds[:count].all(1)
    failed = np.flatnonzero(~good) if len(good) == count and not good.all() else np.arange(count)
    shown = np.array([0, count - 1, failed[len(failed) // 3], failed[2 * len(failed) // 3]])
    first = [int(np.argmin(np.abs(which - i))) for i in shown]  # the first sample on the map of a shown scene
    panels = {"held out": [(test.distance[i], test.vehicles[i], test.present[i], np.zeros(12, bool)) for i in shown]}
    for name in FIGURE_ROWS:
        panels[name] = [
            (test.distance[i], evaluated[name].vehicles[n], test.present[i], bad[name][n] & test.present[i])
            for n, i in zip(first, which[first], strict=True)
        ]
    figures.traffic_scenes(folder / "scenes.png", panels, data.HALF)
    places = lambda name: evaluated[name].vehicles[bad[name]][:, :2]
    names = ("baseline", "by-agent", "by-agent-stacked", "distilled-2")
    figures.infraction_maps(folder / "infractions.png", {n: (places(n), len(which)) for n in names}, data.HALF)


ROWS = [
    "data", "baseline", "by-scene-unweighted", "by-scene", "by-agent-unweighted", "by-agent", "by-agent-stacked",
    "distilled-1", "distilled-2", "time-independent", "by-pair", "by-pair-stronger", "rejection", "refit", "smc",
]  # fmt: skip
"""The rows of every run; recorded maps add more."""
EXPERIMENT = Experiment(
    "genneg.traffic", TrafficConfig, PRESETS, table, COLUMNS, lambda config: ROWS,
    Paper("Don't be so negative! Score-based generative modeling with oracle-assisted guidance", "2307.16463",
          "section 6.2, Table 1 and Figure 1", PAPER),
    extras=("traffic",), notes=notes, figures=draw_figures, load=load, programs=programs,
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
