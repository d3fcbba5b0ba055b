"""Commands that reproduce a row or a run."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lab import results
from experiments.lab.results import Run, Table, cleaned, joined_rows, joined_runs, known
from experiments.lab.table import cell, theirs


def reproduce(runs: Sequence[Run], experiment: str, row: str, join_commits: bool = False) -> str:
    """The shell commands that reproduce a row, for every configuration that has it.

    Raises:
      ValueError: no finished run has it.
    """
    tables = joined_runs(runs, join_commits)
    own = [table for table in tables if table.first.experiment == experiment]
    if not own:
        names = ", ".join(sorted({table.first.experiment for table in tables})) or "none"
        raise ValueError(f"--row must name an experiment with results ({names}), got {experiment}")
    having = [table for table in own if row in joined_rows(table)]
    if not having:
        names = ", ".join(dict.fromkeys(name for table in own for name in joined_rows(table))) or "none"
        raise ValueError(f"--row must name a row of {experiment} ({names}), got {row}")
    return "\n\n".join(_reproduced(table, row) for table in having)


def _reproduced(table: Table, row: str) -> str:
    measured, count = joined_rows(table)[row]
    over = f", mean over {count} runs" if count > 1 else ""
    lines = [f"# {table.first.experiment}, {results.describe(table.first)}", f"# Measured for {row}{over}:"]
    for column in results.columns(table.first.experiment, [measured]):
        lines.append(f"#   {column.title}: {cell(measured.metrics.get(column.metric), column)}")
        if column.metric in measured.paper:
            lines[-1] += f" (the paper: {theirs(measured, column)})"
    for run in table.runs:
        if run.rows and row in run.rows:
            took = "" if run.seconds is None else f", the whole run in {run.seconds:,.0f} s from first to last report"
            seeds = ", ".join(map(str, run.seeds))
            lines += [f"# Seed {seeds}: {cleaned(str(run.folder))}, on {run.device}{took}", *commands(run)]
    return "\n".join(lines)


def commands(run: Run) -> list[str]:
    """The shell commands that repeat a run in a clone of the repository, with the code of its commit."""
    commit, _, changes = run.commit.partition("+")
    lines = ["# warning: the code had changes that are in no commit; numbers may differ"] if changes else []
    known_commit = re.fullmatch("[0-9a-f]{7,64}", commit)
    lines.append(f"git checkout {commit}" if known_commit else "# warning: the commit is not known")
    experiment = known(run.experiment)
    extras = ",".join([*experiment.extras, *_accelerator(run.device)])
    package = f"'.[{extras}]'" if extras else "."
    lines.append(f"python3 -m venv .venv && .venv/bin/pip install -q -e {package}")
    if not experiment.presets:
        lines.append("# warning: the extras of the package that this experiment needs are not known")
    return [*lines, shlex.join([".venv/bin/python", *command(run)])]


def command(run: Run) -> list[str]:
    """The experiment's command line with every option, because presets change."""
    place = f"results/again/{run.experiment}/{run.preset}-{run.config['seed']}"
    fields = {name: value for name, value in run.config.items() if name not in ("preset", "seed")}
    return [*_start(run), "--output", place, *arguments(fields)]


def today(run: Run) -> list[str]:
    """The experiment's command line for today's code, with the options that differ from the preset."""
    return [*_start(run), *arguments(results.difference(run).changed)]


def _start(run: Run) -> list[str]:
    return ["-m", f"experiments.{run.experiment}", "--preset", run.preset, "--seed", str(run.config["seed"])]


def arguments(fields: Mapping[str, Any]) -> list[str]:
    """The words of a command line for options, also of groups (`group.option`)."""
    words: list[str] = []
    for name, value in fields.items():
        group, dot, option = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{group}{dot}{'' if value else 'no-'}{option}")
        else:
            words += [f"--{group}{dot}{option}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _accelerator(device: str) -> tuple[str, ...]:
    """The extra for the device of a run; accelerators are written as "8 x NAME"."""
    if not re.match(r"\d+ x ", device):
        return ()
    return ("tpu",) if "tpu" in device.lower() else ("cuda",)
