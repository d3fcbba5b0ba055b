"""The rows of censored sampling about the choice of labels: active choice, and imitation on a mostly malign model."""

from typing import Any

import numpy as np

from experiments.censoring.rows import add, row
from experiments.censoring.trials import ACTIVE, IMITATION, POOL, Study, fold, reward_training, uncensored
from experiments.lab.phases import Run
from gendiff import potential, training
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Imitation, Labelled
from gendiff.methods.censoring.labels import Pair
from gendiff.steps import packed, unpacked


def active_rows(study: Study) -> None:
    """Compare labels where the ensemble disagrees with random labels; both start from the same ones."""
    config, trials = study.config, range(study.config.few_trials)
    ways = [(way, n) for way in ("random", "active") for n in config.active.labels]
    for trial in trials:
        draw_pool(study, trial)
        for way, n in ways:
            active_round(study, trial, way, n)
    cost = study.cost(Censoring(), config.members)
    for way, n in ways:
        study.lab.each(lambda run, name=f"{way}-{n}", n=n: add(study, run, name, trials, cost, n))


def draw_pool(study: Study, trial: int) -> None:
    """Draw the samples to choose from, in a random order that starts with a sample of either class."""
    n, phase = study.config.active.pool, f"active/pool-{trial}"

    def compute(members: list[Run]) -> list[dict[str, Any]]:
        requests = [study.request(run, trial, None, fold(run, POOL, trial)) for run in members]
        pools = censoring.draw_all(study.noisy.problem, requests, n, study.lab.mesh)
        return [{"samples": samples} for samples in pools]

    def judge(run: Run) -> None:
        samples = run[phase]["samples"]
        benign = study.judge(samples)
        if benign.all() or not benign.any():
            raise ValueError(f"--active.pool must have samples of both classes, got {n} of one class: draw more")
        order = np.random.default_rng((run.seed, trial)).permutation(n)
        first = [int(order[np.flatnonzero(benign[order] == verdict)[0]]) for verdict in (False, True)]
        pool = {"samples": samples, "benign": benign, "order": order, "random": first, "active": first}
        run.results[f"active/{trial}"] = pool

    study.lab.together(phase, compute)
    study.lab.each(judge)


def active_round(study: Study, trial: int, way: str, n: int) -> None:
    """Label samples of the pool until there are n, fit an ensemble, and draw its samples."""
    sizes, number = study.config.active.labels, trial * 1000 + n
    # Both ways share their first labels.
    phase = lambda n: f"trial-{trial}/{'random' if n == sizes[0] else way}-{n}"
    before = [phase(size) for size in sizes if size < n]

    def choose(run: Run) -> None:
        """Follow the random order, or take first the samples on which the last ensemble disagrees."""
        pool = run[f"active/{trial}"]
        left = np.array([i for i in pool["order"] if i not in set(pool[way])])
        if way == "active" and before:
            disagreement = censoring.disagreement(study.noisy.problem, run[before[-1]], pool["samples"][left])
            left = left[np.argsort(-disagreement, kind="stable")]
        pool[way] = pool[way] + [int(i) for i in left[: n - len(pool[way])]]

    def labels(run: Run) -> list[Pair]:
        pool = run[f"active/{trial}"]
        samples, benign = pool["samples"][pool[way]], pool["benign"][pool[way]]
        marked = Labelled(samples[~benign], samples[benign], n)
        share = min(len(marked.benign), max(len(marked.malign), 1))
        return censoring.bootstrap(marked, study.config.members, share, fold(run, ACTIVE, number))

    study.lab.each(choose)
    study.fit(phase(n), study.noisy, labels, study.config.weights.ensemble, ACTIVE * 1_000_000 + number)
    study.draw(f"{way}-{n}", trial, lambda run, trial: (run[phase(n)], Censoring(run["scale"])))


# A mostly malign model.


def imitation_rows(study: Study) -> None:
    """Compare the model, as many labels of it as of all rounds, and rounds of labels of censored samples."""
    per_class = study.config.labels.per_class
    row(study, "uncensored-malign-dominant", uncensored, study.config.few_trials)
    imitation(study, "non-imitation", 3 * per_class, (1.0,))
    # In proportion 500, 1500 and 3000 steps, as in the paper.
    imitation(study, "imitation", per_class, (1 / 6, 1 / 2, 1.0))


def imitation(study: Study, name: str, per_class: int, shares: tuple[float, ...]) -> None:
    """Add the rows of all rounds; a round ends at its share of three times the steps of an ensemble."""
    config, trials = study.config, range(study.config.few_trials)
    ends = tuple(max(1, round(3 * config.reward.steps * share)) for share in shares)
    settings = Imitation(ends, per_class, reward_training(config, config.weights.imitation, ends[-1]), Censoring())
    rows = [name if len(ends) == 1 else f"{name}-{number}" for number in range(1, len(ends) + 1)]
    for trial in trials:
        for number, title in enumerate(rows, 1):
            imitation_round(study, settings, trial, name, number)
            study.draw(title, trial, lambda run, trial, n=number: imitated(run, trial, name, n))
    cost = study.cost(Censoring(), 1)
    for number, title in enumerate(rows, 1):
        used = 2.0 * per_class * number
        study.lab.each(lambda run, title=title, used=used: add(study, run, title, trials, cost, used))


def imitated(run: Run, trial: int, name: str, number: int) -> tuple[Any, Censoring]:
    """Censor by the reward of a round of imitation; in round 0 by none."""
    rewards = run[f"trial-{trial}/{name}-{number}"][0].last if number else None
    return rewards, Censoring(run.config.guidance.imitation_scale)


def imitation_round(study: Study, settings: Imitation, trial: int, name: str, number: int) -> None:
    """Mark censored samples, and train the reward on; `trial-<t>/<name>-<number>` becomes (state, labels)."""
    before, phase = f"trial-{trial}/{name}-{number - 1}", f"trial-{trial}/{name}-{number}"
    keys = lambda run: censoring.round_keys(fold(run, IMITATION, trial), number)
    censor = lambda run, trial: imitated(run, trial, name, number - 1)
    study.mark(f"{phase}/labels", f"{name}-{trial}", settings.per_class, lambda run: keys(run)[0], trial, censor)

    def begin(run: Run) -> tuple[Any, Labelled]:
        """Return the last state, or a new reward, and all labels."""
        state, labelled = run[before] if number > 1 else (study.noisy.new(keys(run)[2]), None)
        return state, censoring.joined(labelled, run[f"{phase}/labels"], settings.per_class)

    def job(run: Run) -> training.Training:
        state, labelled = begin(run)
        sets = study.augmented([labelled[:2]], keys(run)[1])
        return censoring.round_training(study.noisy.problem, settings, number, sets, state, keys(run)[3])

    def end(run: Run) -> None:
        state, labelled = begin(run)
        like = potential.stacked(state) if number == 1 else state.last
        trained = settings.training.training._replace(steps=settings.steps[number - 1])
        run.results[phase] = unpacked(run[f"{phase}/reward"], like, trained), labelled

    study.lab.train(f"{phase}/reward", job, lambda run, state: packed(state))
    study.lab.each(end)
