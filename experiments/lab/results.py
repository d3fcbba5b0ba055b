"""Results folders, and runs of one configuration joined over their seeds.

A warning names a file that cannot be read; nothing is taken from a part of it.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.lab.config import Config, replaced
from experiments.lab.experiment import NAMES, Experiment, find
from experiments.lab.folder import FORMAT, fields, flat
from experiments.lab.table import Column, Row
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate


@cache
def known(name: str) -> Experiment:
    """The experiment of a name; an empty one for unknown names and, with a warning, if a package is missing."""
    nothing = Experiment(name, Config, {}, lambda lab: None)
    if name not in NAMES:
        return nothing
    try:
        return find(name)
    except ModuleNotFoundError as error:
        print(f"warning: experiments.{name}: its presets and columns are not known ({error})", file=sys.stderr)
        return nothing


# Runs.


class Report(NamedTuple):
    """A line of metrics.jsonl."""

    time: float
    text: str


class Run(NamedTuple):
    """The run of a folder."""

    folder: Path
    experiment: str
    config: dict[str, Any]
    """Option -> value, without the folder; options of a group are `group.option`."""
    format: int
    """The file's format; formats other than `folder.FORMAT` have other options."""
    rows: dict[str, Row] | None = None
    """None: unfinished."""
    commit: str = "unknown"
    device: str = "unknown"
    reports: tuple[Report, ...] = ()

    @property
    def preset(self) -> str:
        return self.config["preset"]

    @property
    def seconds(self) -> float | None:
        """From the first to the last report, including time in which the run was stopped."""
        return self.reports[-1].time - self.reports[0].time if self.reports else None

    @property
    def seeds(self) -> range:
        """The seeds of the run."""
        count, seed = self.config.get(known(self.experiment).seeds or "", 1), self.config["seed"]
        return range(seed, seed + (count if type(count) is int and 0 < count < 1000 else 1))


PRUNED = {"checkpoints", "data", "labels"}
"""Large folders of a run, which contain no runs."""


def collect(roots: Iterable[Path], warn: Callable[[str], None]) -> list[Run]:
    """Read every run below the roots once; call `warn` with a text for every file that cannot be read."""
    folders: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            warn(f"{root} must be a folder, but it does not exist")
        for place, below, names in os.walk(root, onerror=lambda error: warn(f"{error.filename}: {error.strerror}")):
            below[:] = sorted(name for name in below if name not in PRUNED and not name.startswith("."))
            if {"config.json", "results.json"} & set(names):
                folders.setdefault(Path(place).resolve(), Path(place))
    return [run for folder in folders.values() if (run := read(folder, warn)) is not None]


DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError)
"""The errors of reading a file with any content."""


def read(folder: Path, warn: Callable[[str], None]) -> Run | None:
    """Read results.json, or config.json of an unfinished run; None if the file is damaged or not a run's."""
    path = folder / "results.json"
    path = path if path.exists() else folder / "config.json"
    try:
        held = cleaned(json.loads(path.read_text(encoding="utf-8")))
        config = held["config"] if path.name == "results.json" else held
        options = {
            name: value for name, value in flat(config).items() if name not in ("experiment", "format", "output")
        }
        number = held.get("format", 1)
        types = type(held["experiment"]), type(options["preset"]), type(options["seed"]), type(number)
        if types != (str, str, int, int):
            raise ValueError("experiment, preset, seed or format is of another type")
        run = Run(folder, held["experiment"], options, number)
        if path.name == "results.json":
            rows = {row.name: row for row in map(_row, held["rows"])}
            run = run._replace(rows=rows, commit=str(held["commit"]), device=str(held["device"]))
        return run._replace(reports=tuple(_reports(folder / "metrics.jsonl")))
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        warn(f"{path}: no run of an experiment can be read from it ({reason})")
        return None


def _row(row: Mapping[str, Any]) -> Row:
    metrics = {name: _estimate(estimate) for name, estimate in row["metrics"].items()}
    return Row(str(row["name"]), metrics, {name: float(value) for name, value in row["paper"].items()})


def _estimate(fields: Mapping[str, Any]) -> Estimate:
    # Files have null for a number that is not finite.
    value, low, high = (math.nan if fields[name] is None else float(fields[name]) for name in ("value", "low", "high"))
    return Estimate(value, low, high, int(fields["n"]))


def cleaned(value: Any) -> Any:
    """JSON without control characters, which a terminal or a shell would obey."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " for letter in value)
    if isinstance(value, dict):
        return {cleaned(name): cleaned(content) for name, content in value.items()}
    return list(map(cleaned, value)) if isinstance(value, list) else value


def _reports(path: Path) -> Iterator[Report]:
    """The complete reports of metrics.jsonl; none without such a file."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(*DAMAGED):  # such as a line that was cut off
            held = cleaned(json.loads(line))
            yield Report(float(held["time"]), f"{held['phase']}, {held['done']} of {held['of']}")


def moment(time: float) -> str:
    """A time as text, in UTC."""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except DAMAGED:
        return "an unknown time"


# Configurations.


class Difference(NamedTuple):
    """A run's configuration compared with today's preset of the same name."""

    config: Config | None
    """The configuration in today's class; None if the preset is unknown or options have changed."""
    changed: dict[str, Any]
    """Options that differ from the preset: all if the preset is unknown, none if the format is another."""


def difference(run: Run) -> Difference:
    """Compare a run's configuration with today's preset."""
    if run.format != FORMAT:
        return Difference(None, {})
    options = {name: value for name, value in run.config.items() if name not in ("preset", "seed")}
    preset = known(run.experiment).presets.get(run.preset)
    if preset is None:
        return Difference(None, options)
    usual = flat(fields(preset))
    changed = {name: value for name, value in options.items() if name not in usual or usual[name] != value}
    try:
        return Difference(replaced(preset, changed), changed)
    except Exception:  # a class may raise anything for options that are gone or of another type
        return Difference(None, changed)


def describe(run: Run) -> str:
    """A configuration as text: its preset and the options that differ from it."""
    changed = [(name, value if isinstance(value, list) else [value]) for name, value in difference(run).changed.items()]
    fields = ", ".join(f"{name} = {' '.join(map(str, values))}" for name, values in changed)
    fields = fields if run.format == FORMAT else f"options of format {run.format}"
    return f"preset {run.preset}" + (f" with {fields}" if fields else "")


# Runs of one configuration, joined.


class Table(NamedTuple):
    """Runs of one configuration, no two with a seed in common."""

    runs: list[Run]
    repeated: list[Run]
    """Further runs of seeds that `runs` has already; they count for no number."""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [seed for run in self.runs for seed in run.seeds]


def joined_runs(runs: Iterable[Run], join_commits: bool = False) -> list[Table]:
    """Group finished runs by configuration, commit and device; with `join_commits`, by configuration alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.rows is not None:
            config = {name: value for name, value in run.config.items() if name != "seed"}
            where = [] if join_commits else [run.commit, run.device]
            groups.setdefault(json.dumps([run.experiment, config, where], sort_keys=True), []).append(run)
    return sorted(map(_table, groups.values()), key=_order)


def _order(table: Table) -> tuple[int, int, float]:
    presets = [*known(table.first.experiment).presets][::-1]  # the paper's sizes first
    place = presets.index(table.first.preset) if table.first.preset in presets else len(presets)
    return place, len(difference(table.first).changed), -max(map(_ended, table.runs))


def _ended(run: Run) -> float:
    return run.reports[-1].time if run.reports else 0.0


def _table(group: list[Run]) -> Table:
    """The newest run of each seed, because two runs that share a seed are not independent."""
    taken: list[Run] = []
    repeated: list[Run] = []
    for run in sorted(group, key=_ended, reverse=True):
        held = {seed for other in taken for seed in other.seeds}
        (repeated if held & set(run.seeds) else taken).append(run)
    return Table(sorted(taken, key=lambda run: run.config["seed"]), repeated)


def joined(estimates: Sequence[Estimate], share: bool = False) -> Estimate:
    """Mean over seeds with Student's interval, clipped to [0, 1] for a share; a single seed keeps its own interval.

    If all seeds have the same value, such as a rate of 0, they show no spread; the interval is then the mean of theirs.
    """
    if len(estimates) > 1 and not all(math.isfinite(estimate.value) for estimate in estimates):
        return Estimate(math.nan, math.nan, math.nan, sum(estimate.n for estimate in estimates))
    spread = rates.over_seeds(estimates)
    if len(estimates) == 1:
        return spread
    if spread.high > spread.low:
        return spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high)) if share else spread
    return rates.over_trials(estimates, least=len(estimates) + 1)


def joined_rows(table: Table) -> dict[str, tuple[Row, int]]:
    """Row -> its metrics over seeds, and the number of runs that have it."""
    # A difference of shares is in per cent too, but may be below 0.
    described = known(table.first.experiment).columns
    shares = {column.metric for column in described if column.percent and not column.metric.endswith("_gain")}
    rows = {}
    for name in dict.fromkeys(name for run in table.runs for name in run.rows or {}):
        same = [run.rows[name] for run in table.runs if run.rows and name in run.rows]
        metrics = dict.fromkeys(metric for row in same for metric in row.metrics)
        measured = {
            metric: joined([row.metrics[metric] for row in same if metric in row.metrics], metric in shares)
            for metric in metrics
        }
        rows[name] = same[0]._replace(metrics=measured), len(same)
    return rows


def expected(table: Table) -> list[str]:
    """The rows of a run of this configuration; none if they are not known."""
    config = difference(table.first).config
    return [] if config is None else known(table.first.experiment).rows(config)


def columns(experiment: str, rows: Iterable[Row]) -> list[Column]:
    """The experiment's columns that any row has, and then other metrics."""
    metrics = dict.fromkeys(metric for row in rows for metric in (*row.metrics, *row.paper))
    titled = [column for column in known(experiment).columns if column.metric in metrics]
    others = [metric for metric in metrics if metric not in {column.metric for column in titled}]
    return titled + [Column(metric, metric, digits=None) for metric in others]
