"""The rows of censored sampling on which samples to label: active choice, and imitation on a model that is malign."""

from typing import Any

import numpy as np

from experiments.censoring.rows import add, row
from experiments.censoring.trials import (
    ACTIVE,
    IMITATION,
    POOL,
    Study,
    augmented,
    draw,
    evaluations,
    fit,
    fold,
    mark,
    reward_training,
    uncensored,
)
from experiments.lab.phases import Run
from gendiff import potential, training
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Imitation, Labelled, Request
from gendiff.methods.censoring.labels import Pair
from gendiff.steps import packed, unpacked


def active_rows(study: Study) -> None:
    """Labels where the ensemble disagrees, against labels at random; both begin with the same ones."""
    config = study.config
    ways = [(way, n) for way in ("random", "active") for n in config.active.labels]
    for trial in range(config.few_trials):
        draw_pool(study, trial)
        for way, n in ways:
            active_round(study, trial, way, n)
    cost = evaluations(study, Censoring(), config.members)
    for way, n in ways:
        study.lab.each(lambda run, name=f"{way}-{n}", n=n: add(study, run, name, range(config.few_trials), cost, n))


def draw_pool(study: Study, trial: int) -> None:
    """The samples to choose from, with a random order that begins with one of each class."""
    n, phase = study.config.active.pool, f"active/pool-{trial}"

    def compute(members: list[Run]) -> list[dict[str, Any]]:
        asked = [Request(run[study.model], None, Censoring(), fold(run, POOL, trial)) for run in members]
        drawn = censoring.draw_all(study.noisy.problem, asked, n, study.lab.mesh)
        return [{"samples": samples} for samples in drawn]

    def judge(run: Run) -> None:
        samples = run[phase]["samples"]
        benign = study.judge(samples)
        if benign.all() or not benign.any():
            raise ValueError(f"--active.pool must have samples of both classes, got {n} of one class: draw more")
        order = np.random.default_rng((run.seed, trial)).permutation(n)
        first = [int(order[np.flatnonzero(benign[order] == verdict)[0]]) for verdict in (False, True)]
        run.results[f"active/{trial}"] = {"samples": samples, "benign": benign, "order": order}
        run.results[f"active/{trial}"] |= {"random": first, "active": first}

    study.lab.together(phase, compute)
    study.lab.each(judge)


def active_round(study: Study, trial: int, way: str, n: int) -> None:
    """More labels of the pool, up to n, an ensemble on them, and its samples."""
    sizes, number = study.config.active.labels, trial * 1000 + n
    # The first labels are the same either way.
    phase = lambda n: f"trial-{trial}/{'random' if n == sizes[0] else way}-{n}"
    before = [phase(size) for size in sizes if size < n]

    def choose(run: Run) -> None:
        """Go on in the random order, or first where the last ensemble disagrees."""
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
    fit(study, phase(n), study.noisy, labels, study.config.weights.ensemble, ACTIVE * 1_000_000 + number)
    draw(study, f"{way}-{n}", trial, lambda run, trial: (run[phase(n)], Censoring(run["scale"])))


# A model that is mostly malign.


def imitation_rows(study: Study) -> None:
    """The model itself, as many labels of it as of all rounds, and rounds of labels among censored samples."""
    per_class = study.config.labels.per_class
    row(study, "uncensored-malign-dominant", uncensored, study.config.few_trials)
    imitation(study, "non-imitation", 3 * per_class, (1.0,))
    # 500, 1500 and 3000 steps in the paper's proportion.
    imitation(study, "imitation", per_class, (1 / 6, 1 / 2, 1.0))


def imitation(study: Study, name: str, per_class: int, shares: tuple[float, ...]) -> None:
    """A row for each round; a share is of three times the steps of an ensemble, at which the round ends."""
    config, trials = study.config, range(study.config.few_trials)
    ends = tuple(max(1, round(3 * config.reward.steps * share)) for share in shares)
    how = Imitation(ends, per_class, reward_training(config, config.weights.imitation, ends[-1]), Censoring())
    rows = [name if len(ends) == 1 else f"{name}-{number}" for number in range(1, len(ends) + 1)]
    for trial in trials:
        for number, title in enumerate(rows, 1):
            imitation_round(study, how, trial, name, number)
            draw(study, title, trial, lambda run, trial, n=number: imitated(run, trial, name, n))
    cost = evaluations(study, Censoring(), 1)
    for number, title in enumerate(rows, 1):
        used = 2.0 * per_class * number
        study.lab.each(lambda run, title=title, used=used: add(study, run, title, trials, cost, used))


def imitated(run: Run, trial: int, name: str, number: int) -> tuple[Any, Censoring]:
    """The reward after a round of imitation; before the first, none."""
    rewards = run[f"trial-{trial}/{name}-{number}"][0].last if number else None
    return rewards, Censoring(run.config.guidance.imitation_scale)


def imitation_round(study: Study, how: Imitation, trial: int, name: str, number: int) -> None:
    """Mark samples that the reward so far censors, and train it on: `trial-<t>/<name>-<number>` is (state, labels)."""
    before, phase = f"trial-{trial}/{name}-{number - 1}", f"trial-{trial}/{name}-{number}"
    keys = lambda run: censoring.round_keys(fold(run, IMITATION, trial), number)
    censor = lambda run, trial: imitated(run, trial, name, number - 1)
    mark(study, f"{phase}/labels", f"{name}-{trial}", how.per_class, lambda run: keys(run)[0], trial, censor)

    def begin(run: Run) -> tuple[Any, Labelled]:
        """The state to go on from, or a new reward; and all labels."""
        state, labelled = run[before] if number > 1 else (study.noisy.new(keys(run)[2]), None)
        return state, censoring.joined(labelled, run[f"{phase}/labels"], how.per_class)

    def asked(run: Run) -> training.Training:
        state, labelled = begin(run)
        sets = augmented(study, [labelled[:2]], keys(run)[1])
        return censoring.round_training(study.noisy.problem, how, number, sets, state, keys(run)[3])

    def end(run: Run) -> None:
        state, labelled = begin(run)
        fresh = potential.stacked(study.noisy.new(keys(run)[2])) if number == 1 else state.last
        settings = how.training.training._replace(steps=how.steps[number - 1])
        run.results[phase] = unpacked(run[f"{phase}/reward"], fresh, settings), labelled

    study.lab.train(f"{phase}/reward", asked, lambda run, state: packed(state))
    study.lab.each(end)
