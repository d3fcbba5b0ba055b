"""Gen-neG on a checkerboard (2307.16463, section 6.1, Figures 2 and 3).

A diffusion model learns 1,000 points of a checkerboard, an oracle tells which of its samples miss the filled cells, and
rounds of classifiers steer it away from those. One run prints every row, beside what the paper reports.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.genneg import rows
from experiments.genneg.rows import Draws
from experiments.lab import figures
from experiments.lab.config import Between, Config, SameProgram, Training
from experiments.lab.experiment import Experiment, Paper
from experiments.lab.phases import Lab, Run
from experiments.lab.table import Column, Row, markdown
from gendiff import denoiser, likelihood, losses, nets, potential, process, sampling, training
from gendiff.data import checkerboard as data
from gendiff.denoiser import Denoiser
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided, Lesson, Points
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.nets.mlp import MLPClassifier, ResidualMLP
from gendiff.oracles import checkerboard as oracle
from gendiff.oracles.oracle import label
from gendiff.static import by_value
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar

DATA_STD = 0.5
"""EDM's sigma_data; a board of half-width 1 has a standard deviation of 0.577."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A residual network of points."""

    width: Annotated[int, Between(8, 4096)] = 128
    """Width."""
    depth: Annotated[int, Between(1, 64)] = 3
    """Residual blocks."""


@dataclasses.dataclass(frozen=True)
class Smc:
    """The twisted SMC sampler."""

    steps: Annotated[int, Between(2, 10_000)] = 100
    """Ancestral steps."""
    particles: Annotated[int, Between(2, 10_000_000)] = 1024
    """Particles of one population."""
    populations: Annotated[int, Between(2, 1_000_000)] = 16
    """Independent populations."""


@dataclasses.dataclass(frozen=True)
class CheckerboardConfig(Config):
    """The board, the model, the rounds and the evaluation."""

    cells: Annotated[int, Between(2, 32)] = 4
    """Cells along a side of the board."""
    half_width: Annotated[float, Between(0.1, 10.0)] = 1.0
    """Half of the board's side, in data units."""
    points: Annotated[int, Between(10, 10_000_000)] = 1000
    """Training points."""
    data_seed: Annotated[int, Between(0, 2**31 - 1)] = 1235
    """Seed of the training, held-out and test points: one data set for all runs."""
    rounds: Annotated[int, Between(1, 20)] = 3
    """Rounds of Gen-neG."""
    mode: Literal["stack", "distill"] = "stack"
    """What a round's classifier becomes: one more in the stack, or distilled into the model at once."""
    seeds: Annotated[int, Between(1, 100)] = 1
    """Independent runs, side by side; with more than one, intervals are over the runs (Student)."""

    network: Network = Network()
    """The denoiser's."""
    baseline: Training = Training(6000, batch=1000, patience=2000)
    """Of the baseline, until the held-out ELBO does not improve."""
    draws: Draws = Draws()
    """Of a round."""
    classifier_network: Network = Network(64, 2)
    """A classifier's."""
    classifier: Training = Training(8000, batch=512, rate=5e-3)
    """Of a classifier; half of a batch are positives."""
    weighting: Literal["importance", "shift"] = "importance"
    """The paper's importance weights, or an unweighted loss with the prior's log-odds added to the logit."""
    select: Literal["all", "balanced"] = "all"
    """Train on all draws, each class half of the batch, or on equally many of both (the paper)."""
    student: Training = Training(5000, batch=1000)
    """Of a distilled or refitted model."""
    stored: Annotated[int, Between(1, 1_000_000_000)] = 2**18
    """Answers of the teacher that a student learns from."""

    guidance_scale: Annotated[float, Between(0.0, 1000.0), SameProgram()] = 1.0
    """Factor on the classifiers' guidance where a model is evaluated; 1 in what later models learn, and for `smc`."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = 18
    """Heun steps, for synthetic data and evaluation alike."""
    smc: Smc = Smc()
    """Of the row `smc`."""
    samples: Annotated[int, Between(100, 1_000_000_000)] = 100_000
    """Samples that a model's infraction rate is measured on."""
    elbo_points: Annotated[int, Between(10, 100_000_000)] = 50_000
    """Fresh points of the board that the ELBO is averaged over."""
    elbo_levels: Annotated[int, Between(1, 10_000)] = 32
    """Stratified noise levels a point."""

    @property
    def batch(self) -> int:
        """Samples drawn at a time."""
        return min(self.draws.batch, self.samples)


PRESETS = {
    "smoke": CheckerboardConfig(
        preset="smoke", rounds=1, network=Network(32, 1), classifier_network=Network(32, 1),
        baseline=Training(300, batch=1000, patience=300), draws=Draws(500, 8000),
        classifier=Training(150, batch=256, rate=5e-3), student=Training(150, batch=1000), stored=4096,
        sampler_steps=8, smc=Smc(12, 128, 4), samples=4000, elbo_points=500, elbo_levels=8,
    ),
    "default": CheckerboardConfig(),
    "paper": CheckerboardConfig(
        preset="paper", rounds=5, seeds=5, baseline=Training(20_000, batch=1000, patience=5000),
        draws=Draws(50_000, 5_000_000), classifier=Training(20_000, batch=2048, rate=5e-3),
        student=Training(20_000, batch=1000), stored=2**22, samples=1_000_000, elbo_levels=128,
        smc=Smc(256, 4096, 64),
    ),
}  # fmt: skip

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


# The model, its networks and its oracle.


def denoiser_network(config: CheckerboardConfig) -> ResidualMLP:
    """EDM's F, for the baseline and every refitted model."""
    return ResidualMLP(2, config.network.width, config.network.depth, data_std=DATA_STD)


def student_network(config: CheckerboardConfig) -> ResidualMLP:
    """EDM's F of a distilled model: as large as the baseline's, with the sharper features of the classifiers.

    The baseline would overfit 1,000 points with them; a student has as many answers as it wants.
    """
    return ResidualMLP(2, config.network.width, config.network.depth, fourier=64, high=24.0, data_std=DATA_STD)


def classifier_network(config: CheckerboardConfig) -> MLPClassifier:
    """The network of every classifier."""
    return MLPClassifier(config.classifier_network.width, config.classifier_network.depth, data_std=DATA_STD)


def initialised(network: Any, key: Array) -> Params:
    """Fresh parameters of a network of points."""
    return nets.fresh(network, key, jnp.zeros(2), jnp.zeros(()))


@by_value
def classifier_logit(network: MLPClassifier) -> potential.Logit:
    """The logit of a classifier's network, which takes EDM's inputs."""
    return lambda phi, x, t: network.apply(phi, x / jnp.sqrt(t**2 + DATA_STD**2), 0.25 * jnp.log(t))


def problem(config: CheckerboardConfig, student: bool = False) -> genneg.Problem:
    """EDM in two dimensions, with its networks, sampler and oracle; the network is the baseline's or a student's."""
    network = student_network(config) if student else denoiser_network(config)
    return genneg.Problem(
        process=process.edm(),
        model=denoiser.from_edm(network.apply, DATA_STD),
        network=classifier_logit(classifier_network(config)),
        oracle=oracle.checkerboard(config.cells, config.half_width),
        shape=(2,),
        kernel=sampling.heun,
        steps=config.sampler_steps,
        weight=losses.edm_weight(DATA_STD),
        classifier_time=process.classifier_time(),
    )


# How it is trained.


def base_task(config: CheckerboardConfig) -> Callable[[tuple[Array, Array, Array]], training.Task]:
    """The task of a configuration's baseline."""
    return points_task(problem(config), min(32, config.elbo_levels), config.baseline.batch)


@by_value
def points_task(
    setup: genneg.Problem, levels: int, batch: int
) -> Callable[[tuple[Array, Array, Array]], training.Task]:
    """Denoising of points; the context is the points, held-out points, and keys for these."""
    loss = losses.denoising(setup.process, setup.model, setup.weight)

    def task(context: tuple[Array, Array, Array]) -> training.Task:
        points, held_out, keys = context

        def draw(key: Array) -> Array:
            return points if len(points) <= batch else training.minibatch(key, points, batch)

        def validate(theta: Params) -> Array:
            bound = lambda key, x: likelihood.elbo(partial(setup.model, theta), key, x, levels)
            return -jnp.mean(jax.vmap(bound)(keys, held_out))

        return training.Task(loss, draw, validate)

    return task


def base_training(run: Run) -> training.Training:
    """The training of theta: denoising score matching, stopped by the held-out ELBO."""
    config = run.config
    held_out = min(4000, config.elbo_points)
    keys = jax.random.split(run.key(ELBO), held_out)
    context = (board(config, DATA, config.points), board(config, HELD_OUT, held_out), keys)
    start = initialised(denoiser_network(config), run.key(START))
    settings = config.baseline.settings(0.998, 500, 0, schedule="constant")
    return training.Training(run.key(BASELINE), start, base_task(config), context, settings)


def classifier_training(config: CheckerboardConfig) -> genneg.ClassifierTraining:
    """How classifiers are trained."""
    settings = config.classifier.settings(0.998, 500, 200)
    return genneg.ClassifierTraining(settings, config.classifier.batch // 2, config.weighting, config.select)


def student_training(config: CheckerboardConfig) -> genneg.StudentTraining:
    """How students are trained."""
    return genneg.StudentTraining(config.student.settings(0.998, 500, 200), config.student.batch)


# The rows.

DATA, HELD_OUT, TEST, START, BASELINE, ROUNDS, SAMPLES, ELBO, STUDENT, REFIT, REPLAY, SMC, CALIBRATION = range(13)
"""Purposes of random keys."""


def board(config: CheckerboardConfig, purpose: int, n: int) -> Array:
    """n points of the board, (n, 2)."""
    key = jax.random.fold_in(jax.random.key(config.data_seed), purpose)
    return data.draw(key, n, config.cells, config.half_width)


def table(lab: Lab) -> None:
    """Every row of the table, in its order."""
    config = lab.config
    setup, how, students = problem(config), classifier_training(config), student_training(config)
    baseline = lambda run: Guided(run["baseline"])
    lab.each(add_data)
    lab.train("baseline", base_training)
    evaluate(lab, "baseline", setup, baseline, ("baseline",))

    settings = genneg.Rounds(
        config.rounds, config.draws.per_class, config.draws.budget, how, config.mode, students, config.stored,
        config.batch,
    )  # fmt: skip
    new_classifier = partial(initialised, classifier_network(config))
    made: tuple[str, ...] = ("baseline",)
    for number in rows.rounds(lab, setup, settings, new_classifier, lambda run: run.key(ROUNDS)):
        name = f"round-{number}"
        calibrate(lab, name, setup, f"{name}/classifier", f"{name}/split")
        if number == 1:  # the ablation: the same samples and settings, all weights 1
            fit = lambda run: rows.Fit(*run["round-1/split"], new_classifier(run.key(ROUNDS)), run.key(ROUNDS))
            rows.classifier(lab, "unweighted", setup, how._replace(weighting="none"), fit)
            unweighted = lambda run: genneg.append(baseline(run), run["unweighted"])
            evaluate(lab, "round-1-unweighted", setup, unweighted, ("baseline", "round-1/draws", "unweighted"))
        made = (*made, f"{name}/draws", f"{name}/classifier", *[f"{name}/student"] * (config.mode == "distill"))
        evaluate(lab, name, setup, partial(rows.model_after, number), made)
        if config.mode == "stack" and number in (1, config.rounds):
            distil(lab, number, students, made)

    lab.each(add_rejection)
    first = ("baseline", "round-1/draws")
    rows.refitted(
        lab, "refit", setup, lambda run: Points(run["round-1/split"][0].positives), students, lambda run: run.key(REFIT)
    )
    evaluate(lab, "refit", setup, lambda run: Guided(run["refit"]), (*first, "refit"))

    numbers = range(1, config.rounds + 1)
    start = lambda run: run["round-1/classifier"]["net"]
    fit = lambda run: rows.replay(run, setup, numbers, start(run), run.key(REPLAY))
    rows.classifier(lab, "replay", setup, how, fit)
    calibrate(lab, "replay", setup, "replay", "round-1/split")
    made = ("baseline", *(f"round-{i}/{part}" for i in numbers for part in ("draws", "classifier")), "replay")
    evaluate(lab, "replay", setup, lambda run: genneg.append(baseline(run), run["replay"]), made)

    populations = partial(smc_samples, lab, setup._replace(steps=config.smc.steps))
    lab.once("smc", populations)
    lab.each(add_smc)


def calibrate(lab: Lab, name: str, setup: genneg.Problem, classifier: str, split: str) -> None:
    """The calibration report of a classifier."""
    times = jnp.geomspace(0.002, 80.0, 9)
    rows.calibrate(lab, name, setup, classifier, split, lambda run: run.key(CALIBRATION), times)


def distil(lab: Lab, number: int, plain: genneg.StudentTraining, made: tuple[str, ...]) -> None:
    """One network in place of the stack, taught on good samples of the stack and bad ones of all its rounds."""
    config, name, last = lab.config, f"distilled-{number}", f"round-{number}"
    setup = problem(config, student=True)
    settings = plain._replace(training=plain.training._replace(rate=5e-3), model=setup.model)

    def lesson(run: Run) -> Lesson:
        key = run.key(STUDENT)
        bad = np.concatenate([run[f"round-{i}/split"][0].negatives for i in range(1, number + 1)])
        good = run[f"evaluate/{last}"].accepted
        points = Points(genneg.mixture(good, bad, config.stored, jax.random.fold_in(key, 1)))
        return Lesson(run[last], points, initialised(student_network(config), key), key)

    rows.distilled(lab, name, problem(config), lesson, settings)
    evaluate(lab, name, setup, lambda run: Guided(run[name]), (*made, f"evaluate/{last}", name))


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


def evaluate(lab: Lab, name: str, setup: genneg.Problem, model: rows.Model, made: Sequence[str]) -> None:
    """Measure a model and add its row; the phases `made` are its oracle calls and its wall-clock time."""
    compute = lambda members: evaluations(lab, members, name, setup, model)
    lab.together(f"evaluate/{name}", compute, Evaluation)
    lab.each(lambda run: run.add(name, measured(run, name, model(run), made), PAPER.get(name)))


def evaluations(
    lab: Lab, members: Sequence[Run], name: str, setup: genneg.Problem, model: rows.Model
) -> list[Evaluation]:
    """Samples and their verdicts, and the ELBO of the test points with the same noise for every model."""
    config, phase = lab.config, f"evaluate {name}"
    scale = lambda run: run.config.guidance_scale
    size = config.samples, config.batch
    drawn = rows.samples(lab, members, phase, setup, model, lambda run: run.key(SAMPLES), *size, scale)
    test, bound = board(config, TEST, config.elbo_points), elbo(config.elbo_levels)
    elbos = rows.bounds(lab, members, setup, bound, model, test, lambda run: run.key(ELBO), scale)
    found = []
    for (points, _), bounds in zip(drawn, elbos, strict=True):
        good = genneg.verdicts(setup.oracle, points)
        found.append(Evaluation(points[:10_000], points[good][:100_000], tally(config, points), bounds))
    return found


@by_value
def elbo(levels: int) -> rows.Bound:
    """The ELBO of a point."""

    def bound(model: Denoiser, key: PRNGKey, x0: Sample) -> Scalar:
        return likelihood.elbo(model, key, x0, levels)

    return bound


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
    n, good, outer = tally(config, np.asarray(board(config, DATA, config.points)))
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
    elbo, gain = rows.conditioned(evaluation.elbo, rates.rate(good, n))
    run.add("rejection", {
        "infraction_rate": rates.rate(0, good),
        "elbo": elbo,
        "elbo_gain": gain,
        "outer_density": outer_density(outer, good),
        "evaluations_per_accepted": rates.exact((2 * run.config.sampler_steps - 1) * n / good, n),
        "oracle_calls": rates.exact(n),
        "seconds": rates.exact(run.seconds("baseline", "evaluate/baseline")),
    })  # fmt: skip


def smc_samples(lab: Lab, setup: genneg.Problem, run: Run) -> dict[str, Any]:
    """Twisted SMC with the first round's classifier as twist, and the oracle at the end."""
    config = run.config
    guided = genneg.append(Guided(run["baseline"]), run["round-1/classifier"])
    run.progress("smc", 0, 1, {})
    keys = jax.random.split(run.key(SMC), config.smc.populations)
    found = rows.populations(lab.mesh, setup, config.smc.particles, guided, keys)
    result = rows.pooled(found, setup, jax.random.fold_in(run.key(SMC), 1))
    run.progress("smc", 1, 1, {"alpha": float(jnp.exp(result["log_alpha"]))})
    return result


def add_smc(run: Run) -> None:
    """The samples of SMC: exact as their number grows."""
    result, config = run["smc"], run.config
    n, good, outer = (int(count) for count in tally(config, result["samples"]))
    elbo, gain = rows.conditioned(run["evaluate/baseline"].elbo, rows.alpha_of(result))
    made = ("baseline", "round-1/draws", "round-1/classifier", "smc")
    run.add("smc", {
        "infraction_rate": rates.rate(n - good, n),
        "elbo": elbo,
        "elbo_gain": gain,
        "outer_density": outer_density(outer, good),
        "evaluations_per_accepted": rates.exact(4 * config.smc.steps * n / float(result["effective"]), n),
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
    panels = {"data": np.asarray(board(config, DATA, config.points))}
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
    notes=notes, figures=draw_figures, seeds="seeds",
)  # fmt: skip
run = EXPERIMENT.run


if __name__ == "__main__":
    EXPERIMENT.main()
