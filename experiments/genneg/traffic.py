"""Gen-neG on scenes of traffic (2307.16463, section 6.2, Table 1 and Figure 1): the rows of the table.

`traffic_problem` has the options, the scenes and the networks, `traffic_training` the trainings.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.genneg import measures, rows
from experiments.genneg.traffic_problem import (
    LABELS,
    PRESETS,
    Purpose,
    TrafficConfig,
    calls,
    classifier_network,
    load,
    problem,
    r_elbo,
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
"""r-ELBOs of other models on other data are not comparable: their differences to the paper's baseline, -2750."""
NOTES = """\
The paper's scenes are private; ours are SUMO's, so that levels cannot be compared, only what changes them.
collision, off-road, infraction: share of scenes with an overlap, a vehicle more than 0.3 m off the drivable area, or
either, on maps that no model was trained on. fewer: the baseline's infractions less these, paired (same maps and start
noise). 95 % intervals: the bootstrap over maps.
r-ELBO: -sum_t E || eps - eps_hat ||^2 over T steps on test scenes (for EDM, minus the training loss), Student's
intervals over scenes; its gain to the baseline is paired (same scenes, noise levels and noise). It is not known for
models that are conditioned by rejection. Training draws low noise more often than this sum (--time-power).
evaluations per valid: of a network the size of the denoiser, without maps, which are encoded once a scene; a
classifier counts three times (its gradient) the share of the denoiser's parameters that it has, in the steps that it
guides. seconds: of sampling alone, without compilation and without the oracle, on this device, shared or not.
speed, heading, gap: Wasserstein's distance of the marginal to that of test scenes: speed; angle to the nearest edge of
the road; road to the next vehicle ahead. `data` are the test scenes, their distances those of validation scenes, which
are of other maps. degenerate: vehicles without positive extents or a heading, which are mended.
`time-independent` learned from scenes with the sampler's least noise alone, and its gradient is taken at noisy ones (by
agent); the others are told the noise. Classifiers guide where the signal is at least --least-signal. `distilled-1`
learned from `by-agent`, `distilled-2` from `by-agent-stacked`, both at the scenes drawn for round 2, three quarters of
them good, and three quarters of the times those of classifiers (all, for EDM). `rejection` has the baseline's good
scenes, `refit` was trained on those of round 1. `by-pair-stronger` is `by-pair` with its guidance scaled (--stronger):
`by-agent` counts a collision twice, once for each vehicle. `smc` has `by-pair` for its twist, ancestral steps, and the
oracle at the end; its rates and distances are of one scene of each population that has a good one, its cost is by
effective number of good particles. `recorded-*`: on maps of recorded scenes (CommonRoad), with as many vehicles as were
there, 4 to 12. scenes.png: on the last two maps the baseline has an infraction, and they were chosen for that."""

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
"""What the paper's claims are about."""


every_core = partial(distributed.training_mesh, every_core=True)


def table(lab: Lab) -> None:
    """Every row of the table, in its order."""
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
    evaluate(lab, "by-pair-stronger", pairs, "pair", scale=lambda run: run.config.stronger)

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
    """Say where the baseline's loss was least, and keep its parameters."""
    found = run["baseline"]
    least, where = float(found["loss"]), f"step {int(found['step'])} of {run.config.baseline.steps}"
    run.remarks.append(f"The baseline has its least loss on validation maps, {least:.2f}, at {where}.")
    run.results["baseline"] = found["theta"]


def draw(lab: Lab, phase: str, model: rows.Model) -> None:
    """Draw scenes of a model on training maps, with their constraints."""
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
    """Fit a classifier of scenes, vehicles or pairs to a round's draws, and steer by it and by those `before`."""
    config, place = lab.config, data.take(lab.data.places["test"], 0)
    how = classifier_training(config, weighting)

    def fit(run: Run) -> rows.Fit:
        net = nets.fresh(classifier_network(config, head), run.key(Purpose.CLASSIFIER), place)
        samples = run[f"{drawn}/draws"].relabelled(LABELS[head])
        parts = genneg.split(samples, how, jax.random.fold_in(run.key(Purpose.DRAWS), 7))
        key = jax.random.fold_in(run.key(Purpose.CLASSIFIER), 1)
        return rows.Fit(*parts, begin_from(run["baseline"], net) if config.from_denoiser else net, key)

    setup, model = problem(config, head, timeless), rows.steered(*before, name)
    rows.classifier(lab, name, setup, how, fit, lab.data.conditions, every_core(2 * how.half))
    evaluate(lab, name, model, head, timeless)
    return model


def points_of(run: Run, samples: Any) -> Points:
    """Samples of a round with their maps."""
    return Points(samples["x"], samples["row"], run.data.conditions)


def distil(lab: Lab, name: str, teacher: rows.Model) -> rows.Model:
    """One network in place of a stack."""
    config = lab.config

    def lesson(run: Run) -> Lesson:
        key, drawn = run.key(Purpose.STUDENT), run["round-2/draws"]
        pool = genneg.mixture(drawn.positives, drawn.negatives, config.stored, jax.random.fold_in(key, 1))
        return Lesson(teacher(run), points_of(run, pool), run["baseline"], jax.random.fold_in(key, 2))

    rows.distilled(lab, name, teaching(config), lesson, student_training(config), every_core(config.student.batch))
    evaluate(lab, name, rows.student(name))
    return rows.student(name)


# What is measured.


class Evaluation(NamedTuple):
    """What is measured of one model: n scenes, and test scenes."""

    vehicles: np.ndarray
    """(n, 12, 7), in metres."""
    holds: np.ndarray
    """(n, 78): which constraints each scene keeps."""
    degenerate: np.ndarray
    """(n, 12): vehicles that had to be mended."""
    elbo: np.ndarray
    """r-ELBO of each test scene; none on recorded maps."""
    seconds: np.ndarray
    """Of one sample, without compilation."""


def evaluate(
    lab: Lab, name: str, model: rows.Model, head: Head = "agent", timeless: bool = False,
    scale: Callable[[Run], float] = lambda run: 1.0, on: str = "test",
) -> None:  # fmt: skip
    """Measure a model on maps of a split and add its row; its classifiers have this head."""
    phase, setup = f"evaluate/{name}", problem(lab.config, head, timeless)
    by = lambda run: scale(run) * run.config.guidance_scale
    lab.together(phase, lambda members: evaluations(lab, members, name, setup, model, by, on), Evaluation)
    cost = lambda run: calls(run.config, 3 * model(run).members, head)
    metrics = lambda run: measured(run, name, cost(run)) if on == "test" else broken(run, run[phase].holds, on)
    lab.each(lambda run: run.add(name, metrics(run), PAPER.get(name)))


def evaluations(
    lab: Lab, members: Sequence[Run], name: str, setup: genneg.OracleProblem, model: rows.Model,
    scale: Callable[[Run], float], on: str = "test",
) -> list[Evaluation]:  # fmt: skip
    """Samples and their verdicts, and the r-ELBO of test scenes with the same noise for every model."""
    config, places = lab.config, lab.data.places[on]
    n, count = config.samples, len(places.present)
    told = data.take(places, scenes.evenly(n, count))
    key = rows.key(Purpose.SAMPLES if on == "test" else Purpose.RECORDED)
    size = measures.equal_parts(n, config.draws.batch)
    drawn = measures.samples(
        lab, members, f"evaluate {name}", setup, model, key, n, size, scale, partial(data.take, told), again=True
    )
    elbos = [np.zeros(0)] * len(members)
    if on == "test":
        which = scenes.evenly(min(config.elbo_scenes, count), count)
        points, where = jnp.asarray(lab.data.x[on][which]), data.take(places, which)
        bound, elbo_key = r_elbo(config), rows.key(Purpose.ELBO)
        elbos = measures.bounds(lab, members, setup, bound, model, points, elbo_key, scale, where)
    found = []
    for (samples, seconds), elbo in zip(drawn, elbos, strict=True):
        verdict = distributed.by_process(scenes.infractions, samples, told)
        vehicles, holds = scenes.metres(samples), np.asarray(oracle.constraints(verdict))
        found.append(Evaluation(vehicles, holds, np.asarray(verdict.degenerate), elbo, np.asarray(seconds)))
    return found


def numbers(run: Run, n: int, on: str = "test") -> np.ndarray:
    """The scenes of a split whose maps n samples are on."""
    return scenes.evenly(n, len(run.data.scenes[on].world))


def broken(run: Run, holds: np.ndarray, on: str = "test") -> dict[str, Estimate]:
    """The rates of infractions of samples on maps of a split."""
    return realism.infraction_rates(holds, run.data.scenes[on].world[numbers(run, len(holds), on)])


def measured(run: Run, name: str, cost: float) -> dict[str, Estimate]:
    """The metrics of a row; `cost` is in evaluations of the denoiser's network for one sample."""
    evaluation, baseline, test = run[f"evaluate/{name}"], run["evaluate/baseline"], run.data.scenes["test"]
    which = numbers(run, len(evaluation.holds))
    metrics = broken(run, evaluation.holds)
    if name != "baseline":
        bad, before = (~found.holds.all(1) for found in (evaluation, baseline))
        metrics["infraction_gain"] = rates.paired(before, bad, test.world[which])
    if trials := rates.per_success(metrics["infraction_rate"]):
        metrics["evaluations_per_valid"] = rates.scaled(trials, cost)
        metrics["seconds_per_valid"] = rates.scaled(trials, float(evaluation.seconds))
    bound, steps = rates.mean(evaluation.elbo), run.config.steps if run.config.chain == "ddpm" else 1
    dimensions = 7 * float(test.present[numbers(run, len(evaluation.elbo))].sum(1).mean())
    mended = evaluation.degenerate.sum(1) / test.present[which].sum(1)
    return metrics | {
        "r_elbo": bound,
        "r_elbo_gain": rates.mean(evaluation.elbo - baseline.elbo),
        "r_elbo_per_dim_step": rates.scaled(bound, 1 / (steps * dimensions)),
        "degenerate_rate": rates.clustered(mended, test.world[which]),
    } | distances(run, evaluation.vehicles, which)  # fmt: skip


def distances(run: Run, vehicles: np.ndarray, which: Any, on: str = "test") -> dict[str, Estimate]:
    """How far the marginals are from those of test scenes; `which` are the scenes whose maps the vehicles are on."""
    test, (_, present, distance, *_) = run.data.scenes["test"], data.take(run.data.scenes[on], which)
    real = realism.marginals(test.vehicles, test.present, test.distance, data.HALF)
    return realism.distances(vehicles, present, distance, data.HALF, real)


# Rows without a model of their own.


def add_data(run: Run) -> None:
    """The test scenes, which have no infractions, and how far other maps' marginals are from theirs."""
    none = rates.exact(0.0, len(run.data.scenes["test"].world))
    away = distances(run, run.data.scenes["validation"].vehicles, slice(None), "validation")
    run.add("data", dict.fromkeys(realism.RATES, none) | away)


def add_rejection(run: Run) -> None:
    """The baseline's good scenes: exact, at the price of the others."""
    evaluation = run["evaluate/baseline"]
    good = np.flatnonzero(evaluation.holds.all(1))
    base = next(row.metrics for row in run.rows if row.name == "baseline")
    costs = {name: base[name] for name in ("evaluations_per_valid", "seconds_per_valid")}
    away = distances(run, evaluation.vehicles[good], numbers(run, len(evaluation.holds))[good])
    run.add("rejection", dict.fromkeys(realism.RATES, rates.exact(0.0, len(good))) | costs | away)


def smc_scenes(lab: Lab, model: rows.Model, run: Run) -> measures.Chosen:
    """Twisted SMC, a population for each map, and the oracle at the end."""
    config, n = run.config, run.config.smc.populations
    setup = problem(config, "pair")._replace(steps=config.smc.length(config.sampler_steps))
    told = data.take(run.data.places["test"], numbers(run, n))
    particles, key = config.smc.particles, run.key(Purpose.SMC)
    return measures.one_of_each(lab, run, setup, particles, model(run), key, n, partial(data.take, told))


def add_smc(run: Run) -> None:
    """The samples of SMC."""
    chosen, config, n = run["smc"], run.config, run.config.smc.populations
    good = len(chosen.samples)
    metrics: dict[str, Estimate] = {}
    if good:
        which = numbers(run, n)[chosen.numbers]
        holds = scenes.constraints(chosen.samples, data.take(run.data.places["test"], which))
        # By the oracle's last word, none: exact, and seen to be.
        broken = [rates.exact(np.mean(~kept), good) for kept in realism.kept(holds)]
        metrics = dict(zip(realism.RATES, broken, strict=True))
        metrics |= distances(run, scenes.metres(chosen.samples), which)
        # The gradient of the twist at x_t, and its value at x_s.
        cost = config.smc.particles * calls(config, 4, "pair", config.smc.length(config.sampler_steps))
        effective = rates.mean(chosen.effective).value
        metrics["evaluations_per_valid"] = rates.exact(cost / effective, n)
        metrics["seconds_per_valid"] = rates.exact(float(chosen.seconds) / effective, n)
    run.remarks.append(f"Of {n} populations of SMC, {good} have a good particle of {config.smc.particles}.")
    run.add("smc", metrics)


# Text and figures.


def notes(members: Sequence[Run], table: Sequence[Row]) -> str:
    """The text below the table, with the differences between rows."""
    run, body = members[0], []
    maps = run.data.scenes["test"].world[numbers(run, run.config.samples)]
    signed = lambda found: f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
    for name, other in COMPARED:
        one, two = run[f"evaluate/{name}"], run[f"evaluate/{other}"]
        rate = rates.paired(~one.holds.all(1), ~two.holds.all(1), maps)
        body.append([f"`{name}` - `{other}`", signed(rates.scaled(rate, 100)), signed(rates.mean(one.elbo - two.elbo))])
    compared = markdown(["rows", "infraction, points", "r-ELBO"], body)
    return f"{NOTES}\n\n{' '.join(run.remarks)}\n\n{PAIRED}\n\n{compared}"


FIGURE_ROWS = ("baseline", "by-scene", "by-agent", "by-pair", "distilled-2")


def draw_figures(folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Scenes as in Fig. 1 a-f, and where infractions happen as in Fig. 1 g-h."""
    run = members[0]
    test, which = run.data.scenes["test"], numbers(run, run.config.samples)
    found = {name: run[f"evaluate/{name}"] for name in (*FIGURE_ROWS, "by-agent-stacked")}
    bad, count = {name: ~oracle.by_agent(evaluation.holds) for name, evaluation in found.items()}, len(test.world)
    # Of the last two maps, two on which the baseline fails: its first sample of a map is row i.
    good = found["baseline"].holds[:count].all(1)
    failed = np.flatnonzero(~good) if len(good) == count and not good.all() else np.arange(count)
    shown = np.array([0, count - 1, failed[len(failed) // 3], failed[2 * len(failed) // 3]])
    # The first sample on the map of each scene that is shown.
    first = [int(np.argmin(np.abs(which - i))) for i in shown]
    panels = {"held out": [(test.distance[i], test.vehicles[i], test.present[i], np.zeros(12, bool)) for i in shown]}
    for name in FIGURE_ROWS:
        panels[name] = [
            (test.distance[i], found[name].vehicles[n], test.present[i], bad[name][n] & test.present[i])
            for n, i in zip(first, which[first], strict=True)
        ]
    figures.traffic_scenes(folder / "scenes.png", panels, data.HALF)
    places = lambda name: found[name].vehicles[bad[name]][:, :2]
    names = ("baseline", "by-agent", "by-agent-stacked", "distilled-2")
    figures.infraction_maps(folder / "infractions.png", {n: (places(n), len(which)) for n in names}, data.HALF)


ROWS = [
    "data", "baseline", "by-scene-unweighted", "by-scene", "by-agent-unweighted", "by-agent", "by-agent-stacked",
    "distilled-1", "distilled-2", "time-independent", "by-pair", "by-pair-stronger", "rejection", "refit", "smc",
]  # fmt: skip
"""Rows of every run; those on recorded maps depend on the maps."""
EXPERIMENT = Experiment(
    "genneg.traffic", TrafficConfig, PRESETS, table, COLUMNS, lambda config: ROWS,
    Paper("Don't be so negative! Score-based generative modeling with oracle-assisted guidance", "2307.16463",
          "section 6.2, Table 1 and Figure 1", PAPER),
    extras=("traffic",), notes=notes, figures=draw_figures, load=load, programs=programs,
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
