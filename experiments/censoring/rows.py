"""The rows of censored sampling (2307.02770), for any model of images and any judge.

An experiment describes its model and rewards by a `Study`, and asks for rows.  trials.py has the parts of a trial, and
labelling.py the rows about the choice of labels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.censoring.trials import REJECTION, Censor, Study, fold, uncensored
from experiments.lab import figures
from experiments.lab.phases import Run
from experiments.lab.table import Row
from gendiff import potential
from gendiff.feedback import batches
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Rater
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate

TUNING = 1_000_000
"""The trial that chooses scales: no other row uses its labels and noise."""


def row_names(config: Any) -> list[str]:
    """Return the names of the rows of a run, in their order."""
    sweeps = ["omega"] + ["universal-omega"] * (not config.guidance.universal_scale)
    return [
        "uncensored", "single", "union", "ensemble", "ensemble-recurrence", "ensemble-backward",
        "ensemble-recurrence-backward", "universal", "rejection",
        *(f"{sweep}-{scale:g}" for sweep in sweeps for scale in config.guidance.sweep),
        *(f"{way}-{n}" for way in ("random", "active") for n in config.active.labels),
        "uncensored-malign-dominant", "non-imitation", "imitation-1", "imitation-2", "imitation-3",
    ]  # fmt: skip


def row(study: Study, name: str, censor: Censor, trials: int, used: Callable[[Run], float] = lambda run: 0) -> None:
    """Draw the samples of all trials, and add their row; `used` counts the labels."""
    for trial in range(trials):
        study.draw(name, trial, censor)

    def add_row(run: Run) -> None:
        rewards, settings = censor(run, 0)
        members = 0 if rewards is None else potential.leading_size(rewards)
        add(study, run, name, range(trials), study.cost(settings, members), used(run))

    study.lab.each(add_row)


def add(study: Study, run: Run, name: str, trials: Sequence[int], cost: float, used: float) -> None:
    """Add the row of drawn samples, with `cost` evaluations per sample and `used` labels."""
    metrics = measured(study, run, name, trials) | {
        "evaluations_per_sample": rates.exact(cost),
        "seconds_per_sample": rates.exact(float(np.median([run[f"{name}/samples-{t}"]["seconds"] for t in trials]))),
        "labels": rates.exact(used),
    }
    labelling = batches.seconds(run.folder.path / "labels")
    run.add(name, metrics | ({"labelling_seconds": rates.exact(labelling)} if used and labelling is not None else {}))


def measured(study: Study, run: Run, name: str, trials: Sequence[int]) -> dict[str, Estimate]:
    """Measure malign rate, precision and recall of drawn samples, over trials."""
    values = [study.measure(run[f"{name}/samples-{trial}"]["samples"]) for trial in trials]
    return {metric: rates.over_trials([of_trial[metric] for of_trial in values]) for metric in values[0]}


def guided(kind: str, settings: Callable[[Run], Censoring], first: bool = False) -> Censor:
    """Censor by a trial's rewards of a kind: ensemble, union or universal; `first` takes the first member only."""
    members = slice(1 if first else None)
    return lambda run, trial: (jax.tree.map(lambda a: a[members], run[f"trial-{trial}/{kind}"]), settings(run))


def labels_of(study: Study, run: Run, trials: Sequence[int]) -> float:
    """Count the labels of all members of an ensemble together, on average over trials."""
    benign = [len(censoring.union(study.pairs(run, trial))[1]) for trial in trials]
    return study.config.labels.per_class + float(np.mean(benign))


# The rows of a mostly benign model.


def guidance_rows(study: Study) -> None:
    """Add single, union and ensemble, and the variants of guidance, after `choose_scales`."""
    config, guidance = study.config, study.config.guidance
    for trial in range(max(config.trials, config.few_trials)):
        study.fit_ensemble(trial)
    for trial in range(config.trials):
        study.fit_union(trial)
    for trial in range(config.few_trials):
        study.fit_universal(trial)
    own, shared = lambda run: Censoring(run["scale"]), lambda run: Censoring(run["scale"] * config.members)
    used = lambda run: labels_of(study, run, range(config.trials))
    row(study, "uncensored", uncensored, config.trials)
    row(study, "single", guided("ensemble", shared, True), config.trials, lambda run: 2 * config.labels.per_class)
    row(study, "union", guided("union", shared), config.trials, used)
    row(study, "ensemble", guided("ensemble", own), config.trials, used)
    recurrence = {"recurrence": guidance.recurrence}
    backward = {"backward": guidance.backward, "backward_rate": guidance.backward_rate}
    variants = {"recurrence": recurrence, "backward": backward, "recurrence-backward": recurrence | backward}
    for name, changes in variants.items():
        changed = lambda run, changes=changes: own(run)._replace(**changes)
        row(study, f"ensemble-{name}", guided("ensemble", changed), config.few_trials, used)
    universal = guided("universal", lambda run: study.universal(run["universal-scale"]))
    row(study, "universal", universal, config.few_trials, used)
    study.lab.each(lambda run: rejection(study, run, used(run)))


def rejection(study: Study, run: Run, used: float) -> None:
    """Add the row of the uncensored samples that pass rejection by the ensemble."""
    config, trials, kept = study.config, range(study.config.trials), []
    for trial in trials:
        drawn, rewards = run[f"uncensored/samples-{trial}"], run[f"trial-{trial}/ensemble"]
        key = fold(run, REJECTION, trial)
        kept.append(censoring.reject(study.noisy.problem, rewards, drawn["samples"], key, run["scale"]))
        run.results[f"rejection/samples-{trial}"] = drawn | {"samples": drawn["samples"][kept[-1]]}
    share = float(np.mean(kept))
    for trial in trials:
        run[f"rejection/samples-{trial}"]["seconds"] /= share or np.nan
    if min(keep.sum() for keep in kept) <= 3:
        run.remarks.append(f"Rejection keeps {100 * share:.1f} % of the samples: too few for a row.")
    else:
        add(study, run, "rejection", trials, (config.sampler_steps + config.members) / share, used)


# The trade-off over omega.


def choose_scales(study: Study) -> None:
    """Draw the trade-off curves, and choose the scales that are 0: `scale` and `universal-scale` of a run."""
    guidance = study.config.guidance
    study.fit_ensemble(TUNING)
    study.draw("omega-0", TUNING, uncensored)
    sweep(study, "omega", "ensemble", Censoring())
    study.lab.each(lambda run: run.results.update({"scale": run.config.guidance.scale or chosen(run["omega"])}))
    if not guidance.universal_scale:
        study.fit_universal(TUNING)
        sweep(study, "universal-omega", "universal", study.universal())
    scale = lambda run: guidance.universal_scale or chosen(run["universal-omega"])
    study.lab.each(lambda run: run.results.update({"universal-scale": scale(run)}))


def sweep(study: Study, name: str, kind: str, settings: Censoring) -> None:
    """Draw the samples of all scales; a run's curve is scale -> malign rate, precision and recall."""
    scales = study.config.guidance.sweep
    for scale in scales:
        study.draw(f"{name}-{scale:g}", TUNING, guided(kind, lambda run, scale=scale: settings._replace(scale=scale)))
    names = {0.0: "omega-0"} | {scale: f"{name}-{scale:g}" for scale in scales}
    curve = lambda run: {scale: measured(study, run, row, [TUNING]) for scale, row in names.items()}
    study.lab.each(lambda run: run.results.update({name: curve(run)}))


def sweep_rows(study: Study) -> None:
    """Add the rows of the trade-off curves."""

    def add_rows(run: Run) -> None:
        for name, settings in (("omega", Censoring()), ("universal-omega", study.universal())):
            for scale in study.config.guidance.sweep if name in run.results else ():
                cost, used = study.cost(settings, study.config.members), labels_of(study, run, [TUNING])
                add(study, run, f"{name}-{scale:g}", [TUNING], cost, used)

    study.lab.each(add_rows)


def chosen(curve: dict[float, dict[str, Estimate]], least: float = 0.85) -> float:
    """Return the scale with the fewest malign samples that keeps the share `least` of the model's recall."""
    recall = least * curve[0.0]["recall"].value
    malign = {scale: at["malign_rate"].value for scale, at in curve.items() if scale and at["recall"].value >= recall}
    return min(malign, key=lambda scale: malign[scale]) if malign else min(scale for scale in curve if scale)


def draw_figures(judge: Rater, folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Draw sample sheets, the trade-off curve, and the malign rate against labels."""
    run, metrics = members[0], {row.name: row.metrics for row in table}
    unshown = ("omega", "universal-omega", "random", "active")
    drawn = {name: run[f"{name}/samples-0"]["samples"] for name in metrics if not name.startswith(unshown)}
    figures.image_sheets(folder / "samples.png", {name: (images, judge(images)) for name, images in drawn.items()})
    point = lambda values: (values["recall"], values["malign_rate"])
    curve = {scale: point(values) for scale, values in run["omega"].items()}
    others = {name: point(metrics[name]) for name in ("single", "union", "ensemble")}
    figures.trade_off(folder / "trade-off.png", curve, others)
    sizes = run.config.active.labels
    rate = lambda way: [(n, metrics[f"{way}-{n}"]["malign_rate"]) for n in sizes]
    figures.by_labels(folder / "labels.png", {way: rate(way) for way in ("random", "active")})
