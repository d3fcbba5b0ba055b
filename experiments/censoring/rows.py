"""The rows of censored sampling (2307.02770): what its tables compare, for any model of images and any judge.

An experiment describes its model and rewards by a `Study`, and asks for rows.  The parts of a trial are in trials.py,
and the rows on which labels to ask for in labelling.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.censoring.trials import (
    REJECTION,
    Censor,
    Study,
    draw,
    evaluations,
    fit_ensemble,
    fit_union,
    fit_universal,
    fold,
    uncensored,
    union,
    universal_settings,
)
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
"""The trial on which scales are chosen: labels and noise that no other row uses."""


def row_names(config: Any) -> list[str]:
    """Names of the rows of a run, in their order."""
    sweeps = ["omega"] + ["universal-omega"] * (not config.guidance.universal_scale)
    return [
        "uncensored", "single", "union", "ensemble", "ensemble-recurrence", "ensemble-backward",
        "ensemble-recurrence-backward", "universal", "rejection",
        *(f"{sweep}-{scale:g}" for sweep in sweeps for scale in config.guidance.sweep),
        *(f"{way}-{n}" for way in ("random", "active") for n in config.active.labels),
        "uncensored-malign-dominant", "non-imitation", "imitation-1", "imitation-2", "imitation-3",
    ]  # fmt: skip


def row(study: Study, name: str, censor: Censor, trials: int, used: Callable[[Run], float] = lambda run: 0) -> None:
    """Draw the samples of all trials, and add their row; `used` is the number of labels."""
    for trial in range(trials):
        draw(study, name, trial, censor)

    def add_row(run: Run) -> None:
        rewards, settings = censor(run, 0)
        members = 0 if rewards is None else potential.leading_size(rewards)
        add(study, run, name, range(trials), evaluations(study, settings, members), used(run))

    study.lab.each(add_row)


def add(study: Study, run: Run, name: str, trials: Sequence[int], cost: float, used: float) -> None:
    """Add the row of samples that are drawn."""
    metrics = measured(study, run, name, trials) | {
        "evaluations_per_sample": rates.exact(cost),
        "seconds_per_sample": rates.exact(float(np.median([run[f"{name}/samples-{t}"]["seconds"] for t in trials]))),
        "labels": rates.exact(used),
    }
    labelling = batches.seconds(run.folder.path / "labels")
    run.add(name, metrics | ({"labelling_seconds": rates.exact(labelling)} if used and labelling is not None else {}))


def measured(study: Study, run: Run, name: str, trials: Sequence[int]) -> dict[str, Estimate]:
    """Malign rate, precision and recall of samples that are drawn, over trials."""
    found = [study.measure(run[f"{name}/samples-{trial}"]["samples"]) for trial in trials]
    return {metric: rates.over_trials([of_trial[metric] for of_trial in found]) for metric in found[0]}


def guided(kind: str, settings: Callable[[Run], Censoring], first: bool = False) -> Censor:
    """The rewards of a trial, of the kind ensemble, union or universal; or the first of them alone."""
    members = slice(1 if first else None)
    return lambda run, trial: (jax.tree.map(lambda a: a[members], run[f"trial-{trial}/{kind}"]), settings(run))


def labels_of(study: Study, run: Run, trials: Sequence[int]) -> float:
    """Labels of an ensemble, all its members together, on average over trials."""
    return study.config.labels.per_class + float(np.mean([len(union(study, run, trial)[0][1]) for trial in trials]))


# The rows of a model that is mostly benign.


def guidance_rows(study: Study) -> None:
    """Single, union and ensemble, and ways to guide; scales come from `choose_scales`."""
    config, guidance, clean = study.config, study.config.guidance, universal_settings(study)
    for trial in range(max(config.trials, config.few_trials)):
        fit_ensemble(study, trial)
    for trial in range(config.trials):
        fit_union(study, trial)
    for trial in range(config.few_trials):
        fit_universal(study, trial)
    own, shared = lambda run: Censoring(run["scale"]), lambda run: Censoring(run["scale"] * config.members)
    used = lambda run: labels_of(study, run, range(config.trials))
    row(study, "uncensored", uncensored, config.trials)
    row(study, "single", guided("ensemble", shared, True), config.trials, lambda run: 2 * config.labels.per_class)
    row(study, "union", guided("union", shared), config.trials, used)
    row(study, "ensemble", guided("ensemble", own), config.trials, used)
    again = {"recurrence": guidance.recurrence}
    back = {"backward": guidance.backward, "backward_rate": guidance.backward_rate}
    for name, changes in (("recurrence", again), ("backward", back), ("recurrence-backward", again | back)):
        changed = lambda run, changes=changes: own(run)._replace(**changes)
        row(study, f"ensemble-{name}", guided("ensemble", changed), config.few_trials, used)
    scaled = lambda run: clean._replace(scale=run["universal-scale"])
    row(study, "universal", guided("universal", scaled), config.few_trials, used)
    study.lab.each(lambda run: rejection(study, run, used(run)))


def rejection(study: Study, run: Run, used: float) -> None:
    """The uncensored samples, each kept with the probability of its reward."""
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
    """Draw the trade-off curves, and choose the scales that are 0: `scale` and `universal-scale` of each run."""
    guidance = study.config.guidance
    fit_ensemble(study, TUNING)
    draw(study, "omega-0", TUNING, uncensored)
    sweep(study, "omega", "ensemble", Censoring())
    study.lab.each(lambda run: run.results.update({"scale": run.config.guidance.scale or chosen(run["omega"])}))
    if not guidance.universal_scale:
        fit_universal(study, TUNING)
        sweep(study, "universal-omega", "universal", universal_settings(study))
    scale = lambda run: guidance.universal_scale or chosen(run["universal-omega"])
    study.lab.each(lambda run: run.results.update({"universal-scale": scale(run)}))


def sweep(study: Study, name: str, kind: str, settings: Censoring) -> None:
    """Draw the samples of each scale; the curve of a run is scale -> malign rate, precision and recall."""
    scales = study.config.guidance.sweep
    for scale in scales:
        draw(study, f"{name}-{scale:g}", TUNING, guided(kind, lambda run, scale=scale: settings._replace(scale=scale)))
    at = lambda run, row: measured(study, run, row, [TUNING])
    curve = lambda run: {0.0: at(run, "omega-0")} | {scale: at(run, f"{name}-{scale:g}") for scale in scales}
    study.lab.each(lambda run: run.results.update({name: curve(run)}))


def sweep_rows(study: Study) -> None:
    """Add the rows of the trade-off curves."""

    def add_rows(run: Run) -> None:
        for name, settings in (("omega", Censoring()), ("universal-omega", universal_settings(study))):
            for scale in study.config.guidance.sweep if name in run.results else ():
                cost, used = evaluations(study, settings, study.config.members), labels_of(study, run, [TUNING])
                add(study, run, f"{name}-{scale:g}", [TUNING], cost, used)

    study.lab.each(add_rows)


def chosen(curve: dict[float, dict[str, Estimate]], least: float = 0.85) -> float:
    """The scale with the fewest malign samples among those that keep `least` of the uncensored model's recall."""
    recall = least * curve[0.0]["recall"].value
    able = {scale: at["malign_rate"].value for scale, at in curve.items() if scale and at["recall"].value >= recall}
    return min(able, key=lambda scale: able[scale]) if able else min(scale for scale in curve if scale)


def draw_figures(judge: Rater, folder: Path, members: Sequence[Run], table: Sequence[Row]) -> None:
    """Sample sheets, the trade-off curve, and labels against rate."""
    first, metrics = members[0], {row.name: row.metrics for row in table}
    many = ("omega", "universal-omega", "random", "active")
    drawn = {name: first[f"{name}/samples-0"]["samples"] for name in metrics if not name.startswith(many)}
    figures.image_sheets(folder / "samples.png", {name: (images, judge(images)) for name, images in drawn.items()})
    at = lambda found: (found["recall"], found["malign_rate"])
    curve = {scale: at(found) for scale, found in first["omega"].items()}
    others = {name: at(metrics[name]) for name in ("single", "union", "ensemble")}
    figures.trade_off(folder / "trade-off.png", curve, others)
    sizes = first.config.active.labels
    rate = lambda way: [(n, metrics[f"{way}-{n}"]["malign_rate"]) for n in sizes]
    figures.by_labels(folder / "labels.png", {way: rate(way) for way in ("random", "active")})
