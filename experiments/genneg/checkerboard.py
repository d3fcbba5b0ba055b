"""Gen-neG on a checkerboard (2307.16463, section 6.1, Figures 2 and 3).

A diffusion model learns 1,000 points of a checkerboard, an oracle tells which of its samples miss the filled cells, and
rounds of classifiers steer it away from those. One run prints every row, beside what the paper reports.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import contract, figures
from experiments.contract import Between, Column, Config, Folder, Progress, Results, Row, main, markdown
from experiments.lab.experiment import Experiment, Paper
from gendiff import (
    denoiser,
    distributed,
    likelihood,
    losses,
    nets,
    potential,
    process,
    sampling,
    smc,
    together,
    training,
)
from gendiff.checkpoint import Archive
from gendiff.data import checkerboard as data
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided
from gendiff.metrics import rates
from gendiff.metrics.calibration import Calibration
from gendiff.metrics.rates import Estimate
from gendiff.nets.mlp import MLPClassifier, ResidualMLP
from gendiff.oracles import checkerboard as oracle
from gendiff.oracles.oracle import label
from gendiff.static import by_value
from gendiff.types import Params, Samples

DATA_STD = 0.5
"""EDM's sigma_data; a board of half-width 1 has a standard deviation of 0.577."""


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

    width: Annotated[int, Between(8, 4096)] = 128
    """Width of the denoiser."""
    depth: Annotated[int, Between(1, 64)] = 3
    """Residual blocks of the denoiser."""
    baseline_steps: Annotated[int, Between(10, 10_000_000)] = 6000
    """Most training steps of the baseline, on batches of 1,000 points."""
    patience: Annotated[int, Between(10, 10_000_000)] = 2000
    """Stop the baseline when the held-out ELBO has not improved for so many steps."""

    per_class: Annotated[int, Between(10, 100_000_000)] = 20_000
    """Samples of each class that a round wants."""
    draw_budget: Annotated[int, Between(100, 1_000_000_000)] = 300_000
    """The most samples that a round draws for them."""
    classifier_width: Annotated[int, Between(8, 4096)] = 64
    """Width of a classifier."""
    classifier_depth: Annotated[int, Between(1, 64)] = 2
    """Residual blocks of a classifier."""
    classifier_steps: Annotated[int, Between(10, 10_000_000)] = 8000
    """Training steps of a classifier."""
    classifier_batch: Annotated[int, Between(2, 1_000_000)] = 512
    """Batch of a classifier's step, half of it positives."""
    weighting: Literal["importance", "shift"] = "importance"
    """The paper's importance weights, or an unweighted loss with the prior's log-odds added to the logit."""
    select: Literal["all", "balanced"] = "all"
    """Train on all draws, each class half of the batch, or on equally many of both (the paper)."""
    student_steps: Annotated[int, Between(10, 10_000_000)] = 5000
    """Training steps of a distilled or refitted model."""
    stored: Annotated[int, Between(1, 1_000_000_000)] = 2**18
    """Answers of the teacher that a student learns from."""

    guidance_scale: Annotated[float, Between(0.0, 1000.0)] = 1.0
    """Factor on the classifiers' guidance where a model is evaluated; 1 in what later models learn, and for `smc`."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = 18
    """Heun steps, for synthetic data and evaluation alike."""
    smc_steps: Annotated[int, Between(2, 10_000)] = 100
    """Ancestral steps of the twisted SMC sampler."""
    smc_particles: Annotated[int, Between(2, 10_000_000)] = 1024
    """Particles of one SMC population."""
    smc_populations: Annotated[int, Between(2, 1_000_000)] = 16
    """Independent SMC populations."""
    samples: Annotated[int, Between(100, 1_000_000_000)] = 100_000
    """Samples that a model's infraction rate is measured on."""
    elbo_points: Annotated[int, Between(10, 100_000_000)] = 50_000
    """Fresh points of the board that the ELBO is averaged over."""
    elbo_levels: Annotated[int, Between(1, 10_000)] = 32
    """Stratified noise levels a point."""


PRESETS = {
    "smoke": CheckerboardConfig(
        preset="smoke", rounds=1, width=32, depth=1, classifier_width=32, classifier_depth=1, baseline_steps=300,
        patience=300, per_class=500, draw_budget=8000, classifier_steps=150, classifier_batch=256, student_steps=150,
        stored=4096, sampler_steps=8, smc_steps=12, smc_particles=128, smc_populations=4, samples=4000,
        elbo_points=500, elbo_levels=8,
    ),
    "default": CheckerboardConfig(),
    "paper": CheckerboardConfig(
        preset="paper", rounds=5, seeds=5, baseline_steps=20_000, patience=5000, per_class=50_000,
        draw_budget=5_000_000, classifier_steps=20_000, classifier_batch=2048, student_steps=20_000, stored=2**22,
        samples=1_000_000, elbo_levels=128, smc_steps=256, smc_particles=4096, smc_populations=64,
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


def denoiser_network(config: CheckerboardConfig) -> ResidualMLP:
    """EDM's F, for the baseline and every student."""
    return ResidualMLP(2, config.width, config.depth, data_std=DATA_STD)


def student_network(config: CheckerboardConfig) -> ResidualMLP:
    """EDM's F of a distilled model: as large as the baseline's, with the sharper features of the classifiers.

    The baseline would overfit 1,000 points with them; a student has as many answers as it wants.
    """
    return ResidualMLP(2, config.width, config.depth, fourier=64, high=24.0, data_std=DATA_STD)


def student_model(config: CheckerboardConfig) -> denoiser.Model:
    """The denoiser of a student."""
    return denoiser.from_edm(student_network(config).apply, DATA_STD)


def classifier_network(config: CheckerboardConfig) -> MLPClassifier:
    """The network of every classifier."""
    return MLPClassifier(config.classifier_width, config.classifier_depth, data_std=DATA_STD)


def initialised(network: Any, key: Array) -> Params:
    """Fresh parameters of a network of points."""
    return nets.fresh(network, key, jnp.zeros(2), jnp.zeros(()))


@by_value
def classifier_logit(network: MLPClassifier) -> potential.Logit:
    """The logit of a classifier's network, which takes EDM's inputs."""
    return lambda phi, x, t: network.apply(phi, x / jnp.sqrt(t**2 + DATA_STD**2), 0.25 * jnp.log(t))


def problem(config: CheckerboardConfig) -> genneg.Problem:
    """EDM in two dimensions, with its networks, sampler and oracle."""
    return genneg.Problem(
        process=process.edm(),
        model=denoiser.from_edm(denoiser_network(config).apply, DATA_STD),
        network=classifier_logit(classifier_network(config)),
        oracle=oracle.checkerboard(config.cells, config.half_width),
        shape=(2,),
        kernel=sampling.heun,
        steps=config.sampler_steps,
        weight=losses.edm_weight(DATA_STD),
        classifier_time=process.classifier_time(),
    )


def base_task(config: CheckerboardConfig) -> Callable[[tuple[Array, Array, Array]], training.Task]:
    """The task of a configuration's baseline."""
    return points_task(problem(config), min(32, config.elbo_levels))


@by_value
def points_task(setup: genneg.Problem, levels: int) -> Callable[[tuple[Array, Array, Array]], training.Task]:
    """Denoising of points; the context is the points, held-out points, and keys for these."""
    loss = losses.denoising(setup.process, setup.model, setup.weight)

    def task(context: tuple[Array, Array, Array]) -> training.Task:
        points, held_out, keys = context

        def draw(key: Array) -> Array:
            return points if len(points) <= 1000 else training.minibatch(key, points, 1000)

        def validate(theta: Params) -> Array:
            bound = lambda key, x: likelihood.elbo(partial(setup.model, theta), key, x, levels)
            return -jnp.mean(jax.vmap(bound)(keys, held_out))

        return training.Task(loss, draw, validate)

    return task


DATA, HELD_OUT, TEST, START, BASELINE, ROUNDS, SAMPLES, ELBO, STUDENT, REFIT, REPLAY, SMC, CALIBRATION = range(13)
"""What the keys are for."""
BATCH = 16_384
"""Samples drawn at a time: one compiled program for each number of classifiers."""


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


class Run:
    """One seed of the experiment: each method makes phases, evaluates what they made, and adds rows."""

    def __init__(self, config: CheckerboardConfig, archive: Archive, progress: Progress, seed: int) -> None:
        self.config, self.archive, self.progress = config, archive, progress
        self.problem, self.key = problem(config), jax.random.key(seed)
        self.student = self.problem._replace(model=student_model(config))
        self.mesh = distributed.make_mesh()
        self.rows: list[Row] = []
        self.evaluations: dict[str, Evaluation] = {}
        self.calibrations: dict[str, Calibration] = {}
        self.alphas: dict[str, float] = {}
        self.smc_drawn = np.zeros((0, 2))

    def all(self) -> None:
        """Every row of the table, in its order."""
        self.data()
        theta = self.baseline()
        rounds = self.rounds(theta)
        self.rejection()
        self.refit(theta, rounds[0])
        self.replay(theta, rounds)
        self.smc(theta, rounds[0])
        self.progress.close()

    # Shared by the phases.

    def fold(self, purpose: int) -> Array:
        return jax.random.fold_in(self.key, purpose)

    def board(self, purpose: int, n: int) -> Array:
        key = jax.random.fold_in(jax.random.key(self.config.data_seed), purpose)
        return data.draw(key, n, self.config.cells, self.config.half_width)

    def host(self, phase: str, steps: int) -> training.Host:
        return genneg.host(self.archive, self.progress, phase, steps)

    def add(
        self,
        name: str,
        guided: Guided,
        phases: Sequence[str],
        oracle_calls: float,
        setup: genneg.Problem | None = None,
    ) -> Evaluation:
        """Evaluates a model and adds its row; `phases` made it and are its wall-clock time."""
        setup = self.problem if setup is None else setup
        evaluation = self.archive.once(f"evaluate/{name}", lambda: self.evaluate(name, guided, setup), Evaluation)
        self.evaluations[name] = evaluation
        n, good, outer = (int(count) for count in evaluation.counts)
        cost = (1 + 3 * guided.members) * (2 * self.config.sampler_steps - 1)
        measured = {
            "infraction_rate": rates.rate(n - good, n),
            "elbo": rates.mean(evaluation.elbo),
            "elbo_gain": rates.mean(evaluation.elbo - self.evaluations["baseline"].elbo),
            "outer_density": outer_density(outer, good),
            "evaluations_per_accepted": rates.exact(cost * n / max(good, 1), n),
            "oracle_calls": rates.exact(oracle_calls),
            "seconds": rates.exact(sum(self.archive.seconds[phase] for phase in phases)),
        }
        self.rows.append(Row(name, measured, PAPER.get(name, {})))
        return evaluation

    def evaluate(self, name: str, guided: Guided, setup: genneg.Problem) -> Evaluation:
        """Samples and their verdicts, and the ELBO of the test points with the same noise for every model."""
        config = self.config
        batch = min(BATCH, config.samples)
        kept: list[np.ndarray] = []
        self.progress(f"evaluate {name}", 0, config.samples, {})
        for first in range(0, config.samples, batch):
            key = jax.random.fold_in(self.fold(SAMPLES), first)
            points = genneg.draw(setup, guided, key, batch, self.mesh, config.guidance_scale)
            kept.append(points[: config.samples - first])
            self.progress(f"evaluate {name}", min(first + batch, config.samples), config.samples, {})
        points = np.concatenate(kept)
        good = genneg.verdicts(setup.oracle, points)
        test = self.board(TEST, config.elbo_points)
        given = (guided, test, self.fold(ELBO), config.guidance_scale)
        elbo = together.call(elbos, (setup, config.elbo_levels), self.mesh, given)
        return Evaluation(
            points[:10_000], points[good][:100_000], tally(config, points), distributed.gather(elbo, len(test))
        )

    # The rows.

    def data(self) -> None:
        """The training points, and the largest ELBO that a model of the board can have."""
        n, good, outer = tally(self.config, np.asarray(self.board(DATA, self.config.points)))
        area = 4 * self.config.half_width**2 * ((self.config.cells**2 + 1) // 2) / self.config.cells**2
        measured = {
            "infraction_rate": rates.rate(n - good, n),
            "elbo": rates.exact(-np.log(area)),
            "outer_density": outer_density(outer, good),
        }
        self.rows.append(Row("data", measured))

    def baseline(self) -> Params:
        """theta: denoising score matching, stopped by the held-out ELBO."""
        theta = self.archive.once("baseline", self.train_baseline)
        self.add("baseline", Guided(theta), ["baseline"], 0)
        return theta

    def train_baseline(self) -> Params:
        config, held_out = self.config, min(4000, self.config.elbo_points)
        settings = training.Settings(
            config.baseline_steps, decay=0.998, schedule="constant", every=min(500, config.baseline_steps),
            patience=config.patience,
        )  # fmt: skip
        keys = jax.random.split(self.fold(ELBO), held_out)
        context = (self.board(DATA, config.points), self.board(HELD_OUT, held_out), keys)
        start = initialised(denoiser_network(config), self.fold(START))
        host = self.host("baseline", config.baseline_steps)
        return training.train(self.fold(BASELINE), start, base_task(config), context, settings, host).best

    def rounds(self, theta: Params) -> list[genneg.Round]:
        """The rounds of Algorithm 1, the ablation without importance sampling, and the distilled models."""
        config = self.config
        settings = genneg.Rounds(
            config.rounds, config.per_class, config.draw_budget, self.classifier_training(), config.mode,
            self.student_training(), config.stored, min(BATCH, config.samples),
        )  # fmt: skip
        done: list[genneg.Round] = []
        phases, calls = ["baseline"], 0.0
        rounds = genneg.run(
            self.problem,
            theta,
            self.new_classifier,
            settings,
            self.fold(ROUNDS),
            self.archive,
            self.mesh,
            self.progress,
        )
        for each in rounds:
            done.append(each)
            name = f"round-{each.number}"
            calls += float(each.train.good) + float(each.train.bad)
            self.calibrate(name, each.classifier, each)
            if each.number == 1:
                self.unweighted(theta, each)
            phases += [
                f"{name}/draws",
                f"{name}/classifier",
                *([f"{name}/student"] if config.mode == "distill" else []),
            ]
            evaluation = self.add(name, each.guided, phases, calls)
            if config.mode == "stack" and each.number in (1, config.rounds):
                self.distilled(done, evaluation, phases, calls)
        return done

    def unweighted(self, theta: Params, first: genneg.Round) -> None:
        """Round 1 without importance sampling: the same samples and settings, all weights 1."""
        settings = self.classifier_training()._replace(weighting="none")
        classifier = self.archive.once("unweighted", lambda: self.fit_classifier("unweighted", first, settings))
        calls = float(first.train.good) + float(first.train.bad)
        guided = genneg.append(Guided(theta), classifier)
        self.add("round-1-unweighted", guided, ["baseline", "round-1/draws", "unweighted"], calls)

    def fit_classifier(self, phase: str, samples: genneg.Round, settings: genneg.ClassifierTraining) -> Params:
        key = self.fold(ROUNDS)
        host = self.host(phase, settings.training.steps)
        start = self.new_classifier(key)
        return genneg.fit_classifier(self.problem, samples.train, samples.held_out, start, settings, key, host)

    def distilled(self, rounds: list[genneg.Round], evaluation: Evaluation, phases: list[str], calls: float) -> None:
        """One network in place of the stack, taught on good samples of the stack and bad ones of all its rounds."""
        config, teacher = self.config, rounds[-1]
        name = f"distilled-{teacher.number}"
        plain = self.student_training()
        settings = plain._replace(training=plain.training._replace(rate=5e-3), model=self.student.model)
        start = initialised(student_network(config), self.fold(STUDENT))
        bad = np.concatenate([each.train.negatives for each in rounds])
        x0 = genneg.mixture(evaluation.accepted, bad, config.stored, jax.random.fold_in(self.fold(STUDENT), 1))
        psi = self.archive.once(
            name,
            lambda: genneg.distill(
                self.problem, teacher.guided, genneg.Points(x0), start, settings, self.fold(STUDENT),
                self.host(name, settings.training.steps), self.mesh,
            ),
        )  # fmt: skip
        made = [*phases, f"evaluate/round-{teacher.number}", name]
        self.add(name, Guided(psi), made, calls + int(evaluation.counts[0]), self.student)

    def rejection(self) -> None:
        """The baseline's good samples: exact, at the price of the bad ones."""
        evaluation = self.evaluations["baseline"]
        n, good, outer = (int(count) for count in evaluation.counts)
        elbo, gain = conditioned(evaluation, rates.rate(good, n))
        measured = {
            "infraction_rate": rates.rate(0, good),
            "elbo": elbo,
            "elbo_gain": gain,
            "outer_density": outer_density(outer, good),
            "evaluations_per_accepted": rates.exact((2 * self.config.sampler_steps - 1) * n / good, n),
            "oracle_calls": rates.exact(n),
            "seconds": rates.exact(self.archive.seconds["baseline"] + self.archive.seconds["evaluate/baseline"]),
        }
        self.rows.append(Row("rejection", measured))

    def refit(self, theta: Params, first: genneg.Round) -> None:
        """The baseline trained on with its own accepted samples."""
        settings = self.student_training()
        psi = self.archive.once(
            "refit",
            lambda: genneg.refit(
                self.problem, genneg.Points(first.train.positives), theta, settings, self.fold(REFIT),
                self.host("refit", settings.training.steps),
            ),
        )  # fmt: skip
        calls = float(first.train.good) + float(first.train.bad)
        self.add("refit", Guided(psi), ["baseline", "round-1/draws", "refit"], calls)

    def replay(self, theta: Params, rounds: list[genneg.Round]) -> None:
        """One classifier of the baseline from the samples of all rounds, begun from the first round's."""
        settings = self.classifier_training()

        def fit() -> Params:
            train, held_out, density = genneg.replay(rounds, self.problem)
            host = self.host("replay", settings.training.steps)
            start = rounds[0].classifier["net"]
            key = self.fold(REPLAY)
            return genneg.fit_classifier(self.problem, train, held_out, start, settings, key, host, density)

        classifier = self.archive.once("replay", fit)
        self.calibrate("replay", classifier, rounds[0])
        calls = sum(float(each.train.good) + float(each.train.bad) for each in rounds)
        made = [f"round-{each.number}/{part}" for each in rounds for part in ("draws", "classifier")]
        self.add("replay", genneg.append(Guided(theta), classifier), ["baseline", *made, "replay"], calls)

    def smc(self, theta: Params, first: genneg.Round) -> None:
        """Twisted SMC with the first round's classifier as twist, and the oracle at the end."""
        config = self.config
        guided = genneg.append(Guided(theta), first.classifier)
        result = self.archive.once("smc", lambda: self.smc_samples(guided))
        self.smc_drawn = result["samples"]
        n = len(result["samples"])
        _, good, outer = tally(config, result["samples"])
        log_alpha = float(result["log_alpha"])
        low, high = np.exp(log_alpha + result["log_alpha_interval"])
        alpha = Estimate(float(np.exp(log_alpha)), float(low), float(high), n)
        elbo, gain = conditioned(self.evaluations["baseline"], alpha)
        cost = 4 * config.smc_steps * n / float(result["effective"])
        calls = float(first.train.good) + float(first.train.bad) + n
        made = ("baseline", "round-1/draws", "round-1/classifier", "smc")
        measured = {
            "infraction_rate": rates.rate(n - good, n),
            "elbo": elbo,
            "elbo_gain": gain,
            "outer_density": outer_density(outer, good),
            "evaluations_per_accepted": rates.exact(cost, n),
            "oracle_calls": rates.exact(calls),
            "seconds": rates.exact(sum(self.archive.seconds[phase] for phase in made)),
        }
        self.rows.append(Row("smc", measured))

    def smc_samples(self, guided: Guided) -> dict[str, Any]:
        config = self.config
        self.progress("smc", 0, 1, {})
        keys = jax.random.split(self.fold(SMC), config.smc_populations)
        given = distributed.place(self.mesh, (guided, keys))
        populations = distributed.gather(
            populate(self.problem, config.smc_steps, config.smc_particles, self.mesh, *given), len(keys)
        )
        pooled = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), populations._replace(resampled=jnp.zeros((1, 1))))
        good = jnp.asarray(genneg.verdicts(self.problem.oracle, np.asarray(pooled.particles)))
        judged = smc.judge(pooled, good, jax.random.fold_in(self.fold(SMC), 1))
        # Populations are independent: their own estimates of alpha give the interval of the pooled one.
        each = np.exp(populations.log_weights) * np.asarray(good).reshape(config.smc_populations, -1)
        estimate = rates.mean(each.mean(1))
        interval = np.log(np.maximum([estimate.low, estimate.high], 1e-12)) - float(judged.log_alpha)
        self.progress("smc", 1, 1, {"alpha": float(jnp.exp(judged.log_alpha))})
        return judged._asdict() | {"log_alpha_interval": interval, "resampled": populations.resampled}

    # How things are trained.

    def new_classifier(self, key: Array) -> Params:
        return initialised(classifier_network(self.config), key)

    def classifier_training(self) -> genneg.ClassifierTraining:
        config = self.config
        steps = config.classifier_steps
        settings = training.Settings(steps, 5e-3, 0.998, min(500, steps), warmup=min(200, steps // 5))
        return genneg.ClassifierTraining(settings, config.classifier_batch // 2, config.weighting, config.select)

    def student_training(self) -> genneg.StudentTraining:
        steps = self.config.student_steps
        settings = training.Settings(steps, 1e-3, 0.998, min(500, steps), warmup=min(200, steps // 5))
        return genneg.StudentTraining(settings, 1000)

    def calibrate(self, name: str, classifier: Params, samples: genneg.Round) -> None:
        """The calibration report of a classifier, on the held-out part of its samples."""
        times = jnp.geomspace(0.002, 80.0, 9)
        report = self.archive.once(
            f"calibration/{name}",
            lambda: genneg.calibration(self.problem, classifier, samples.held_out, self.fold(CALIBRATION), times),
            Calibration,
        )
        self.calibrations[name], self.alphas[name] = report, samples.held_out.alpha


@partial(jax.jit, static_argnums=(0, 1, 2))
def elbos(
    problem: genneg.Problem, levels: int, mesh: Any, guided: Guided, points: Array, key: Array, scale: float
) -> Array:
    """ELBO of each point (n, 2); the same key gives the same noise for every model."""
    model = genneg.denoiser(problem, guided, scale)
    keys = jax.random.split(key, len(points))
    one = lambda given: likelihood.elbo(model, given[0], given[1], levels)
    return distributed.chunked(one, (keys, points), 1024, mesh, cut=False)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def populate(problem: genneg.Problem, steps: int, particles: int, mesh: Any, guided: Guided, keys: Array) -> Any:
    """One SMC population for each key."""
    plain = genneg.denoiser(problem, Guided(guided.theta))
    steered, twist = genneg.denoiser(problem, guided), genneg.twist(problem, guided)
    grid = problem.process.grid(steps)
    one = lambda key: smc.twisted(problem.process, plain, steered, twist, grid, key, problem.shape, particles)
    return distributed.chunked(one, keys, 1, mesh, cut=False)


def tally(config: CheckerboardConfig, points: np.ndarray) -> np.ndarray:
    """Numbers of all points, of good ones, and of good ones in the outer band of their cells."""
    good = np.asarray(oracle.on_board(jnp.asarray(points), config.cells, config.half_width))
    outer = np.asarray(oracle.in_outer_band(jnp.asarray(points), config.cells, config.half_width))
    return np.array([len(points), good.sum(), (good & outer).sum()])


def outer_density(outer: int, good: int) -> Estimate:
    """Density of the outer band relative to uniform, among good points."""
    return rates.scaled(rates.rate(outer, max(good, 1)), 1 / (1 - (1 - oracle.BAND) ** 2))


def conditioned(baseline: Evaluation, alpha: Estimate) -> tuple[Estimate, Estimate]:
    """ELBO, and its gain, of the baseline conditioned on good: log p(x) - log alpha on every good x."""
    gain = Estimate(-np.log(alpha.value), -np.log(alpha.high), -np.log(alpha.low), alpha.n)
    return rates.shifted(rates.mean(baseline.elbo), gain.value), gain


def run(config: CheckerboardConfig) -> Results:
    """Runs what the folder does not hold yet, and writes the table and the figures."""
    folder = Folder("genneg.checkerboard", config)
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        progress = Progress(folder, f"seed {seed}: " if config.seeds > 1 else "")
        runs.append(Run(config, Archive(folder.path / "checkpoints" / f"seed-{seed}"), progress, seed))
    if len(runs) == 1:
        runs[0].all()
    else:
        for outcome in contract.side_by_side([each.all for each in runs]):
            if outcome.error is not None:
                raise outcome.error
    rows = merge([each.rows for each in runs])
    draw_figures(folder, config, rows, runs[0])
    return folder.finish(rows, COLUMNS, f"{NOTES}\n\n{calibration_table(runs[0], rows)}")


def merge(tables: list[list[Row]]) -> list[Row]:
    """One table from the tables of several seeds."""
    merged = []
    for same in zip(*tables, strict=True):
        names = same[0].metrics
        merged.append(same[0]._replace(metrics={n: rates.over_seeds([row.metrics[n] for row in same]) for n in names}))
    return merged


def draw_figures(folder: Folder, config: CheckerboardConfig, rows: list[Row], first: Run) -> None:
    """The paper's Figures 2 and 3 and the calibration, of the first seed's samples and all seeds' numbers."""
    panels = {"data": np.asarray(first.board(DATA, config.points))}
    panels |= {name: np.asarray(each.points) for name, each in first.evaluations.items()}
    panels["smc"] = first.smc_drawn
    few = {name: points[:3000] for name, points in panels.items()}
    judged = {name: (points, label(first.problem.oracle, points)) for name, points in few.items()}
    figures.samples(folder.path / "samples.png", judged, config.half_width, config.cells)

    table = {row.name: row.metrics for row in rows}
    names = ["baseline", *(f"round-{i}" for i in range(1, config.rounds + 1))]
    quantities = {"infraction rate": "infraction_rate", "ELBO (nats)": "elbo", "ELBO gain (nats)": "elbo_gain"}
    students = {i: f"distilled-{i}" for i in (1, config.rounds) if f"distilled-{i}" in table}
    figures.by_round(
        folder.path / "rounds.png",
        {title: [table[name][metric][:3] for name in names] for title, metric in quantities.items()},
        {title: {i: table[name][metric].value for i, name in students.items()} for title, metric in quantities.items()},
        {"ELBO (nats)": table["data"]["elbo"].value},
        logarithmic=("infraction rate",),
    )
    figures.calibration(folder.path / "calibration.png", first.calibrations, first.alphas)


def calibration_table(first: Run, rows: list[Row]) -> str:
    """Each classifier's mean C against alpha, its calibration error, and the ideal gain against the gain seen."""
    table = {row.name: row.metrics for row in rows}
    head = [
        "classifier",
        "alpha",
        "largest gap of mean C to alpha",
        "mean calibration error",
        "ideal gain",
        "gain seen",
    ]
    before, body = 0.0, []
    for name, report in first.calibrations.items():
        alpha, gain = first.alphas[name], table[name]["elbo_gain"].value
        seen = gain - (0.0 if name == "replay" else before)
        before = gain
        deviation = float(np.abs(np.asarray(report.mean) - alpha).max())
        error = float(np.mean(report.error))
        body.append([name, *(f"{v:.4f}" for v in (alpha, deviation, error)), f"{-np.log(alpha):+.4f}", f"{seen:+.4f}"])
    title = "Calibration on held-out samples of the model that each classifier was made for, over noise levels:"
    return f"{title}\n\n{markdown(head, body)}"


def row_names(config: CheckerboardConfig) -> list[str]:
    """Names of the rows of a run, in their order."""
    rounds = []
    for number in range(1, config.rounds + 1):
        rounds += ["round-1-unweighted"] * (number == 1) + [f"round-{number}"]
        rounds += [f"distilled-{number}"] * (config.mode == "stack" and number in (1, config.rounds))
    return ["data", "baseline", *rounds, "rejection", "refit", "replay", "smc"]


EXPERIMENT = Experiment(
    "genneg.checkerboard", CheckerboardConfig, PRESETS, run, COLUMNS, row_names,
    Paper("Don't be so negative! Score-based generative modeling with oracle-assisted guidance", "2307.16463",
          "section 6.1, Figures 2 and 3", PAPER),
    seeds="seeds",
)  # fmt: skip


if __name__ == "__main__":
    main(CheckerboardConfig, PRESETS, run)
