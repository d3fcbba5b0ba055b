"""All results on one page, beside the papers' numbers; and what reproduces a row.

    python -m experiments.tables
    python -m experiments.tables FOLDER ... --output page --embed
    python -m experiments.tables --row genneg.checkerboard round-1

The page, in Markdown and in HTML, has a table for each configuration that was run (runs that differ by their seed alone
are joined), says where, when and by which commit, and lists what is missing. Files that cannot be read are named.
"""

import ast
import base64
import dataclasses
import html
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro
from tabulate import tabulate

from gendiff.command import say
from gendiff.data import files

if TYPE_CHECKING:  # JAX and SciPy take seconds to import: --help and errors need neither
    from experiments.contract import Column, Config
    from gendiff.metrics.rates import Estimate


@dataclasses.dataclass(frozen=True)
class Options:
    """What is read, and where the page goes."""

    roots: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)
    """Folders that hold runs, at any depth."""
    output: Path = Path("results/index")
    """The page's files without their ending, .md and .html; a folder gets index.md and index.html."""
    embed: bool = False
    """Put the figures into the HTML, which is then one file to send; else both pages link to them."""
    join_commits: bool = False
    """Join also runs of different commits and devices; else only those that differ by their seed alone."""
    row: tuple[str, str] | None = None
    """EXPERIMENT and ROW: print what reproduces this row, and write no page."""


# The papers' tables.


class Experiment(NamedTuple):
    """A table or figure of a paper, and the experiment that makes it anew."""

    name: str
    """Of the module below `experiments`, and of the results."""
    paper: str
    arxiv: str
    part: str
    rows: Callable[[Any], list[str]]
    """Configuration -> the rows that a run of it has, in their order."""
    extras: tuple[str, ...] = ()
    """What it needs of the package's extras."""
    seeds: str | None = None
    """The option that makes one run of several seeds, from `--seed` on."""


def checkerboard_rows(config: Any) -> list[str]:
    """Rows of genneg.checkerboard."""
    rounds = []
    for number in range(1, config.rounds + 1):
        rounds += ["round-1-unweighted"] * (number == 1) + [f"round-{number}"]
        rounds += [f"distilled-{number}"] * (config.mode == "stack" and number in (1, config.rounds))
    return ["data", "baseline", *rounds, "rejection", "refit", "replay", "smc"]


def traffic_rows(config: Any) -> list[str]:
    """Rows of genneg.traffic; those on recorded maps depend on what is at hand."""
    return [
        "data", "baseline", "by-scene-unweighted", "by-scene", "by-agent-unweighted", "by-agent", "by-agent-stacked",
        "distilled-1", "distilled-2", "time-independent", "by-pair", "by-pair-stronger",
        "rejection", "refit", "smc",
    ]  # fmt: skip


def mnist_rows(config: Any) -> list[str]:
    """Rows of censoring.mnist."""
    sweeps = ["omega"] + ["universal-omega"] * (not config.universal_scale)
    return [
        "uncensored", "single", "union", "ensemble", "ensemble-recurrence", "ensemble-backward",
        "ensemble-recurrence-backward", "universal", "rejection",
        *(f"{sweep}-{scale:g}" for sweep in sweeps for scale in config.sweep),
        *(f"{way}-{n}" for way in ("random", "active") for n in config.active_labels),
        "uncensored-malign-dominant", "non-imitation", "imitation-1", "imitation-2", "imitation-3",
    ]  # fmt: skip


def maze_rows(config: Any) -> list[str]:
    """Rows of relative_reward.maze2d."""
    names = (
        "published", "principled", "published-best-per-goal", "discriminator", "small-data", "unsteered", "steered",
        "expert",
    )  # fmt: skip
    mazes = ["", *(f"/{maze}" for maze in config.mazes if len(config.mazes) > 1)]
    return [name + maze for name in names for maze in mazes]


NEGATIVE = "Don't be so negative! Score-based generative modeling with oracle-assisted guidance"
CENSORED = "Censored sampling of diffusion models using 3 minutes of human feedback"
EXPERIMENTS = (
    Experiment(
        "genneg.checkerboard", NEGATIVE, "2307.16463", "section 6.1, Figures 2 and 3",
        checkerboard_rows, seeds="seeds",
    ),
    Experiment(
        "genneg.traffic", NEGATIVE, "2307.16463", "section 6.2, Table 1 and Figure 1",
        traffic_rows, ("traffic",),
    ),
    Experiment(
        "censoring.mnist", CENSORED, "2307.02770", "section 5.1", mnist_rows,
        ("data", "feedback"),
    ),
    Experiment(
        "relative_reward.maze2d", "Extracting reward functions from diffusion models",
        "2306.01804", "section 5.1, Figures 1 and 3", maze_rows, ("maze",),
    ),
)  # fmt: skip
PRESETS = ("paper", "default", "smoke")
"""Every experiment has these; the order of the page."""


class Known(NamedTuple):
    """What an experiment's module says of it; nothing where it cannot be imported."""

    columns: tuple["Column", ...] = ()
    presets: Mapping[str, "Config"] = {}
    paper: Mapping[str, Mapping[str, float]] = {}


@cache
def known(name: str) -> Known:
    """The module's columns, presets and the paper's numbers.

    Only what `EXPERIMENTS` names is imported, whatever a file says.
    """
    if name not in {each.name for each in EXPERIMENTS}:
        return Known()
    try:
        module = importlib.import_module(f"experiments.{name}")
    except ImportError as error:
        print(f"warning: experiments.{name}: presets and columns are not known ({error})", file=sys.stderr)
        return Known()
    return Known(module.COLUMNS, module.PRESETS, getattr(module, "PAPER", {}))


# Runs, as their folders tell of them.


class Measured(NamedTuple):
    """A row of results.json."""

    metrics: dict[str, "Estimate"]
    paper: dict[str, float]


class Report(NamedTuple):
    """A line of metrics.jsonl."""

    time: float
    text: str


class Run(NamedTuple):
    """One folder."""

    folder: Path
    experiment: str
    config: dict[str, Any]
    """Every option but the folder's name."""
    rows: dict[str, Measured] | None
    """None: unfinished."""
    commit: str = "unknown"
    device: str = "unknown"
    first: Report | None = None
    last: Report | None = None

    @property
    def place(self) -> str:
        """The folder, as it can be shown."""
        return cleaned(str(self.folder))

    @property
    def preset(self) -> str:
        return self.config["preset"]

    @property
    def seconds(self) -> float | None:
        """From the first to the last report, with the time in which it was stopped."""
        return self.last.time - self.first.time if self.first and self.last else None


PRUNED = {"checkpoints", "data", "labels"}
"""Folders of a run, large, in which there are no runs."""


def collect(roots: Iterable[Path], warn: Callable[[str], None]) -> list[Run]:
    """Every run below the roots, each once; what cannot be read is told and left out."""
    folders: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            warn(f"{root}: no such folder")
        for place, below, names in os.walk(root, onerror=lambda error: warn(f"{error.filename}: {error.strerror}")):
            below[:] = sorted(name for name in below if name not in PRUNED and not name.startswith("."))
            if {"config.json", "results.json"} & set(names):
                folders.setdefault(Path(place).resolve(), Path(place))
    return [run for folder in folders.values() if (run := read(folder, warn)) is not None]


DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError)
"""What reading a file of any content can raise."""


def read(folder: Path, warn: Callable[[str], None]) -> Run | None:
    """The run of a folder, or None where its files are damaged or something else's."""
    documents: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "results.json"):
        path = folder / name
        try:
            if path.exists():
                documents[name] = _object(cleaned(json.loads(path.read_text(encoding="utf-8"))))
        except DAMAGED as error:
            warn(f"{path}: not read ({error})")
            if name == "results.json":
                return None
    if not documents:
        return None
    try:
        return _run(folder, documents.get("config.json", {}), documents.get("results.json"))
    except DAMAGED as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        warn(f"{folder / list(documents)[-1]}: not a run of an experiment ({reason})")
        return None


def _run(folder: Path, stored: dict[str, Any], results: dict[str, Any] | None) -> Run:
    config = stored if results is None else _object(results.get("config", stored))
    # Early versions did not name the experiment in config.json; the folder may.
    named = (results or {}).get("experiment") or stored.get("experiment")
    experiment = named or (folder.parent.name if folder.parent.name in _names() else "unknown experiment")
    config = {name: value for name, value in config.items() if name not in ("experiment", "output")}
    if not isinstance(experiment, str) or not isinstance(config["preset"], str) or type(config["seed"]) is not int:
        raise ValueError("the experiment, its preset or seed is of another type")
    first, last = reports(folder / "metrics.jsonl")
    if results is None:
        return Run(folder, experiment, config, None, first=first, last=last)
    commit, device = (str(results.get(name, "unknown")) for name in ("commit", "device"))
    return Run(folder, experiment, config, _rows(results["rows"]), commit, device, first, last)


def _names() -> list[str]:
    return [each.name for each in EXPERIMENTS]


def cleaned(value: Any) -> Any:
    """The same without control characters, which a terminal or a shell would obey."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " for letter in value)
    if isinstance(value, dict):
        return {cleaned(name): cleaned(each) for name, each in value.items()}
    return [cleaned(each) for each in value] if isinstance(value, list) else value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, given {type(value).__name__}")
    return value


def _rows(given: Any) -> dict[str, Measured]:
    rows = {}
    for row in given:
        metrics = {name: _estimate(each) for name, each in _object(row["metrics"]).items()}
        paper = {name: float(value) for name, value in _object(row.get("paper", {})).items()}
        rows[str(row["name"])] = Measured(metrics, paper)
    return rows


def _estimate(given: Mapping[str, Any]) -> "Estimate":
    from gendiff.metrics.rates import Estimate

    # Files have null for what is not finite.
    number = lambda name: math.nan if given[name] is None else float(given[name])
    return Estimate(number("value"), number("low"), number("high"), int(given.get("n") or 0))


def reports(path: Path, most: int = 65_536) -> tuple[Report | None, Report | None]:
    """The first and the last whole report; a file that is not there, or holds none, has none."""
    try:
        with path.open("rb") as file:
            head = file.read(most)
            file.seek(max(0, path.stat().st_size - most))
            tail = file.read()
    except OSError:
        return None, None
    first = next(filter(None, map(_report, head.splitlines())), None)
    return first, next(filter(None, map(_report, reversed(tail.splitlines()))), None)


def _report(line: bytes) -> Report | None:
    try:
        given = cleaned(json.loads(line))
        return Report(float(given["time"]), f"{given['phase']}, {given['done']} of {given['of']}")
    except DAMAGED:
        return None  # a line that was cut off, or one of another kind


def moment(time: float) -> str:
    """A time as people write it."""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except DAMAGED:
        return "an unknown time"


# Configurations.


class Difference(NamedTuple):
    """How a run's configuration relates to today's preset of its name."""

    config: "Config | None"
    """As today's class; None where there is none, or options have changed."""
    changed: dict[str, Any]
    """Options whose value is not the preset's; all of them where the preset is not known."""


def difference(run: Run) -> Difference:
    """The run's configuration beside today's preset."""
    options = {name: value for name, value in run.config.items() if name not in ("preset", "seed")}
    preset = known(run.experiment).presets.get(run.preset)
    if preset is None:
        return Difference(None, options)
    usual = json.loads(json.dumps(dataclasses.asdict(preset), default=str))
    changed = {name: value for name, value in options.items() if name not in usual or usual[name] != value}
    alive: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()
    }
    try:
        return Difference(dataclasses.replace(preset, **alive), changed)
    except Exception:  # options that are gone, or values of another type or range: whatever a class says of them
        return Difference(None, changed)


def describe(run: Run) -> str:
    """A configuration in words: its preset, and what differs from it."""
    changed = difference(run).changed
    fields = ", ".join(f"{name} = {_plain(value)}" for name, value in changed.items())
    if run.preset not in known(run.experiment).presets:
        return f"preset {run.preset}: {fields}"
    return f"preset {run.preset}" + (f" with {fields}" if fields else "")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def arguments(fields: Mapping[str, Any]) -> list[str]:
    """Fields as the words of a command line."""
    words: list[str] = []
    for name, value in fields.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return words


# Runs of one configuration, joined.


class Table(NamedTuple):
    """Runs of one configuration, with seeds that have nothing in common."""

    runs: list[Run]
    repeated: list[Run]
    """Further runs of seeds that are in `runs` already; nothing is taken from them."""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [seed for run in self.runs for seed in seeds(run)]


def seeds(run: Run) -> range:
    """The seeds that a run has in it."""
    option = next((each.seeds for each in EXPERIMENTS if each.name == run.experiment), None)
    several = run.config.get(option, 1) if option else 1
    return range(
        run.config["seed"], run.config["seed"] + (several if type(several) is int and 0 < several < 1000 else 1)
    )


def joined_runs(runs: Iterable[Run], join_commits: bool = False) -> list[Table]:
    """Finished runs by configuration; commit and device count as part of it unless `join_commits`."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = {name: value for name, value in run.config.items() if name != "seed"}
        where = [] if join_commits else [run.commit, run.device]
        groups.setdefault(json.dumps([run.experiment, config, where], sort_keys=True), []).append(run)
    tables = [_table(group) for group in groups.values()]
    order = lambda table: (
        PRESETS.index(table.first.preset) if table.first.preset in PRESETS else len(PRESETS),
        len(difference(table.first).changed),
        -max((run.last.time for run in table.runs if run.last), default=0.0),
    )
    return sorted(tables, key=order)


def _table(group: list[Run]) -> Table:
    """The newest run of each seed; two runs that share a seed are not independent."""
    taken: list[Run] = []
    repeated: list[Run] = []
    for run in sorted(group, key=lambda run: -(run.last.time if run.last else 0.0)):
        held = {seed for each in taken for seed in seeds(each)}
        (repeated if held & set(seeds(run)) else taken).append(run)
    return Table(sorted(taken, key=lambda run: run.config["seed"]), repeated)


def joined(estimates: Sequence["Estimate"], share: bool = False) -> "Estimate":
    """Mean over seeds with Student's interval, of a share within [0, 1]; one seed keeps its own.

    Seeds that agree to the last digit, such as rates of 0, say nothing of their spread: then it is the mean of their
    own intervals.
    """
    from gendiff.metrics import rates

    if len(estimates) > 1 and not all(math.isfinite(each.value) for each in estimates):
        return rates.Estimate(math.nan, math.nan, math.nan, sum(each.n for each in estimates))
    spread = rates.over_seeds(estimates)
    if len(estimates) == 1:
        return spread
    if spread.high > spread.low:
        return spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high)) if share else spread
    return rates.over_trials(estimates, least=len(estimates) + 1)


def joined_rows(table: Table) -> dict[str, tuple[Measured, int]]:
    """Row -> what was measured over seeds, and the runs that have it."""
    names = list(dict.fromkeys(name for run in table.runs for name in run.rows or {}))
    # Differences of shares are per cent too, and may be below 0.
    described = known(table.first.experiment).columns
    shares = {each.metric for each in described if each.percent and not each.metric.endswith("_gain")}
    rows = {}
    for name in names:
        same = [run.rows[name] for run in table.runs if run.rows and name in run.rows]
        metrics = dict.fromkeys(metric for row in same for metric in row.metrics)
        measured = {
            metric: joined([row.metrics[metric] for row in same if metric in row.metrics], metric in shares)
            for metric in metrics
        }
        rows[name] = Measured(measured, same[0].paper), len(same)
    return rows


def expected(table: Table) -> list[str]:
    """The rows that a run of this configuration has; none where that is not known."""
    config = difference(table.first).config
    experiment = next((each for each in EXPERIMENTS if each.name == table.first.experiment), None)
    return experiment.rows(config) if experiment and config is not None else []


# Numbers.

UNKNOWN = -1
"""Digits of a column that no experiment describes."""


def columns(experiment: str, rows: Iterable[Measured]) -> list["Column"]:
    """The experiment's columns that any row has, and what else was measured."""
    from experiments.contract import Column

    rows = list(rows)
    found = dict.fromkeys(metric for row in rows for metric in (*row.metrics, *row.paper))
    titled = [column for column in known(experiment).columns if column.metric in found]
    others = [metric for metric in found if metric not in {each.metric for each in titled}]
    return titled + [Column(metric, metric, digits=UNKNOWN) for metric in others]


def number(value: float, column: "Column") -> str:
    """A value in the column's units."""
    if not math.isfinite(value):
        return "?"
    if column.digits == UNKNOWN:
        return f"{value:,.4g}"
    return f"{value * (100 if column.percent else 1):,.{column.digits}f}"


def shown(estimate: "Estimate | None", column: "Column") -> str:
    """value [low, high]; a count or a measured time has no interval, `?` is a number that is not finite."""
    if estimate is None:
        return "-"
    text = number(estimate.value, column)
    if estimate.low == estimate.high:
        return text
    return f"{text} [{number(estimate.low, column)}, {number(estimate.high, column)}]"


# The page: blocks, which are written twice.


class Code(str):
    """Text as it is typed."""


class Link(NamedTuple):
    """A text that leads somewhere."""

    text: str
    url: str


Part = str | Code | Link


class Heading(NamedTuple):
    """A title."""

    level: int
    text: str
    anchor: str = ""


class Text(NamedTuple):
    """A paragraph."""

    parts: tuple[Part, ...]


class Bullets(NamedTuple):
    """A list of paragraphs."""

    items: list[tuple[Part, ...]]


class Grid(NamedTuple):
    """A table."""

    head: list[str]
    body: list[list[Part]]


class Verbatim(NamedTuple):
    """Text of a file, as it is there."""

    title: str
    text: str


class Figures(NamedTuple):
    """Pictures."""

    paths: list[Path]


Block = Heading | Text | Bullets | Grid | Verbatim | Figures


def page(runs: Sequence[Run], warnings: Sequence[str], join_commits: bool = False) -> list[Block]:
    """Everything that there is to say about the runs."""
    names = _names()
    others = sorted({run.experiment for run in runs if run.rows is not None} - set(names))
    blocks: list[Block] = [
        Heading(1, "gendiff: results"),
        Text(("Ours beside the papers' numbers. Intervals are 95 %: over seeds where there are several (Student's), "
              "else the run's own, which its notes explain. -: not reported; ?: not finite. What reproduces a row: ",
              Code("python -m experiments.tables --row EXPERIMENT ROW"))),
        Grid(["table", "of the paper", "finished runs", "configurations", "unfinished"],
             [_summary(name, runs, join_commits) for name in [*names, *others]]),
    ]  # fmt: skip
    for experiment in EXPERIMENTS:
        blocks += [
            Heading(2, experiment.name, experiment.name),
            Text(
                (
                    f"{experiment.paper}, ",
                    Link(f"arXiv:{experiment.arxiv}", f"https://arxiv.org/abs/{experiment.arxiv}"),
                    f", {experiment.part}",
                )
            ),
        ]
        blocks += _results(experiment.name, runs, join_commits)
    for name in others:
        blocks += [Heading(2, name, name), Text(("Of no paper.",)), *_results(name, runs, join_commits)]
    blocks.append(Heading(2, "What is missing", "missing"))
    blocks.append(Bullets(list(missing(runs, warnings, join_commits)) or [("Nothing.",)]))
    return blocks


def _summary(name: str, runs: Sequence[Run], join_commits: bool) -> list[Part]:
    own = [run for run in runs if run.experiment == name]
    done = [run for run in own if run.rows is not None]
    part = next((each.part for each in EXPERIMENTS if each.name == name), "-")
    numbers = [len(done), len(joined_runs(done, join_commits)), len(own) - len(done)]
    return [Link(name, f"#{urllib.parse.quote(name)}"), part, *map(str, numbers)]


def _results(name: str, runs: Sequence[Run], join_commits: bool) -> Iterator[Block]:
    """An experiment's tables; the paper's numbers alone where there are none."""
    tables = joined_runs([run for run in runs if run.experiment == name and run.rows is not None], join_commits)
    for table in tables:
        yield from _section(table)
    if tables:
        return
    yield Text(("No results. Run ", Code(f"python -m experiments.{name}")))
    paper = {row: Measured({}, dict(values)) for row, values in known(name).paper.items()}
    if paper:
        given = columns(name, paper.values())
        body: list[list[Part]] = [
            [Code(row), *(number(each.paper[c.metric], c) if c.metric in each.paper else "-" for c in given)]
            for row, each in paper.items()
        ]
        yield Text(("The paper's numbers:",))
        yield Grid(["row", *(column.title for column in given)], body)


def _section(table: Table) -> Iterator[Block]:
    """One configuration: its table, where it was run, figures and notes."""
    first = table.first
    count = len(table.seeds)
    yield Heading(3, f"{describe(first)}; {'seed' if count == 1 else f'{count} seeds:'} {_listed(table.seeds)}")
    yield comparison(table)
    yield Grid(["folder", "seed", "commit", "device", "seconds", "ended"], [_where(run) for run in table.runs])
    if table.repeated:
        folders = ", ".join(run.place for run in table.repeated)
        yield Text((f"The same configuration and seeds again, in no number above: {folders}",))
    pictures = sorted(path for path in first.folder.glob("*.png") if not path.name.startswith("."))
    if pictures:
        if len(table.runs) > 1:
            yield Text((f"Figures of seed {first.config['seed']}:",))
        yield Figures(pictures)
    if notes := _notes(first.folder / "table.md"):
        yield Verbatim(f"Notes of {first.place}", notes)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _where(run: Run) -> list[Part]:
    seconds = "-" if run.seconds is None else f"{run.seconds:,.0f}"
    ended = moment(run.last.time) if run.last else "-"
    return [Code(run.place), _listed(seeds(run)), Code(run.commit), run.device, seconds, ended]


def comparison(table: Table) -> Grid:
    """Our rows, the paper's numbers beside each metric that it has, and the rows that are missing."""
    rows, counts = {}, {}
    for name, (measured, count) in joined_rows(table).items():
        rows[name], counts[name] = measured, count
    paper = known(table.first.experiment).paper
    lacking = {name: Measured({}, dict(paper.get(name, {}))) for name in expected(table) if name not in rows}
    given = columns(table.first.experiment, [*rows.values(), *lacking.values()])
    reported = {metric for row in (*rows.values(), *lacking.values()) for metric in row.paper}
    head, body = ["row"], []
    for column in given:
        head += [column.title] + ["paper"] * (column.metric in reported)
    for name, row in (rows | lacking).items():
        remark = " (missing)" if name in lacking else ""
        if 0 < counts.get(name, 0) < len(table.runs):
            remark = f" ({counts[name]} of {len(table.runs)} runs)"
        cells: list[Part] = [Code(name) if not remark else name + remark]
        for column in given:
            cells.append(shown(row.metrics.get(column.metric), column))
            if column.metric in reported:
                cells.append(number(row.paper[column.metric], column) if column.metric in row.paper else "-")
        body.append(cells)
    return Grid(head, body)


def _notes(path: Path) -> str:
    """What stands below the table of table.md."""
    try:
        lines = [cleaned(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    begin = next((i for i, line in enumerate(lines) if line.startswith("|")), None)
    if begin is None:
        return ""
    end = next((i for i in range(begin, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[end:]).strip()


def missing(runs: Sequence[Run], warnings: Sequence[str], join_commits: bool = False) -> Iterator[tuple[Part, ...]]:
    """What was not run, not finished, not measured or not read."""
    done = [run for run in runs if run.rows is not None]
    for experiment in EXPERIMENTS:
        own = [run for run in done if run.experiment == experiment.name]
        if not own:
            yield Code(experiment.name), f" ({experiment.part}): no results. ", Code(_module(experiment.name))
        for preset in (known(experiment.name).presets or PRESETS) if own else ():
            same = [run for run in own if run.preset == preset]
            if same and not all(difference(run).changed for run in same):
                continue
            how = "run only with other options" if same else "never finished"
            yield Code(experiment.name), f": preset {preset} {how}. ", Code(_of_preset(experiment, preset))
    for table in joined_runs(done, join_commits):
        for run in table.runs:
            if lacking := [name for name in expected(table) if name not in (run.rows or {})]:
                yield Code(run.place), f": rows missing of {run.experiment}: ", Code(", ".join(lacking))
    for run in runs:
        if run.rows is None:
            yield unfinished(run)
    for warning in warnings:
        yield (warning,)


def unfinished(run: Run) -> tuple[Part, ...]:
    """How far a run came that has no results."""
    state = "no report yet" if run.last is None else f"last report {run.last.text}, at {moment(run.last.time)}"
    what = f" ({run.experiment}, preset {run.preset}, seed {run.config['seed']}) is unfinished: {state}."
    return Code(run.place), what


def _of_preset(experiment: Experiment, preset: str) -> str:
    """The command for a whole preset: the papers' tables are means over five seeds."""
    if preset == "paper" and experiment.seeds is None:
        return f"{_module('sweep')} {experiment.name} --preset paper --seeds 0:5"
    return f"{_module(experiment.name)} --preset {preset}"


def _module(name: str) -> str:
    return f"python -m experiments.{name}"


# Writing it.


def as_markdown(blocks: Iterable[Block], base: Path) -> str:
    """The page in Markdown; figures are linked relative to `base`."""
    return "\n\n".join(_markdown(block, base) for block in blocks) + "\n"


def _markdown(block: Block, base: Path) -> str:
    match block:
        case Heading(level, text, anchor):
            mark = f'<a id="{html.escape(anchor)}"></a>\n\n' if anchor else ""
            return f"{mark}{'#' * level} {escaped(text)}"
        case Text(parts):
            return _in_markdown(parts)
        case Bullets(items):
            return "\n".join(f"- {_in_markdown(parts)}" for parts in items)
        case Grid(head, body):
            cells = [[_in_markdown((part,)) for part in row] for row in body]
            return tabulate(cells, [escaped(title) for title in head], tablefmt="pipe", disable_numparse=True)
        case Verbatim(title, text):  # indented, as nothing in the text can end that
            return f"{escaped(title)}:\n\n" + "\n".join(f"    {line}" for line in text.splitlines())
        case Figures(paths):
            return "\n".join(f"![{escaped(cleaned(path.name))}]({_relative(path, base)})" for path in paths)


def _in_markdown(parts: Iterable[Part]) -> str:
    words = []
    for part in parts:
        if isinstance(part, Link):
            words.append(f"[{escaped(part.text)}]({part.url})")
        elif isinstance(part, Code) and not set(part) & set("`|\\"):
            words.append(f"`{part}`")
        else:
            words.append(escaped(part))
    return "".join(words)


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, take for what it is."""
    return re.sub(r"[\\`*|#~]|\](?=[(\[:])|\b_|_\b", r"\\\g<0>", html.escape(text, quote=False))


def _relative(path: Path, base: Path) -> str:
    return urllib.parse.quote(os.fsencode(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; }
h2 { margin-top: 3rem; border-bottom: 2px solid #3b6ea5; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { background: #f2f5f9; }
.paper { color: #8a4b08; background: #fdf6ec; }
code, pre { font: 12.5px ui-monospace, monospace; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
img { max-width: min(100%, 44rem); }
figcaption { color: #666; font-size: 12.5px; }
"""
# Nothing of the page runs, even if a text slipped through.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src * data: file:"


def as_html(blocks: Iterable[Block], base: Path, embed: bool = False) -> str:
    """The page in HTML; figures are linked relative to `base`, or in it with `embed`."""
    body = "\n".join(_html(block, base, embed) for block in blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>gendiff: results</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _html(block: Block, base: Path, embed: bool) -> str:
    match block:
        case Heading(level, text, anchor):
            mark = f' id="{html.escape(anchor)}"' if anchor else ""
            return f"<h{level}{mark}>{html.escape(text)}</h{level}>"
        case Text(parts):
            return f"<p>{_in_html(parts)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_in_html(parts)}</li>" for parts in items) + "\n</ul>"
        case Grid(head, body):
            of_paper = [' class="paper"' if title == "paper" else "" for title in head]
            row = lambda tag, cells: (
                "<tr>"
                + "".join(f"<{tag}{of}>{_in_html((cell,))}</{tag}>" for cell, of in zip(cells, of_paper, strict=True))
            )
            lines = "\n".join(f"{row('td', cells)}</tr>" for cells in body)
            return f'<div class="wide"><table>\n{row("th", head)}</tr>\n{lines}\n</table></div>'
        case Verbatim(title, text):
            return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        case Figures(paths):
            return "\n".join(_figure(path, base, embed) for path in paths)


def _in_html(parts: Iterable[Part]) -> str:
    words = []
    for part in parts:
        if isinstance(part, Link):
            words.append(f'<a href="{html.escape(part.url)}">{html.escape(part.text)}</a>')
        else:
            words.append(f"<code>{html.escape(part)}</code>" if isinstance(part, Code) else html.escape(part))
    return "".join(words)


def _figure(path: Path, base: Path, embed: bool) -> str:
    source = _relative(path, base)
    if embed:
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    name = html.escape(cleaned(path.name))
    return (
        f'<figure><img src="{html.escape(source)}" alt="{name}" loading="lazy"><figcaption>{name}</figcaption></figure>'
    )


def write(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.store_text(path, text)


# What reproduces a row.

ROOT = Path(__file__).parents[1]


def commands(run: Run) -> list[str]:
    """The shell's lines that run it again, in a clone of the repository."""
    commit, _, changes = run.commit.partition("+")
    lines = []
    if changes:
        lines.append("# warning: the code had changes that are in no commit; numbers may differ")
    if re.fullmatch("[0-9a-f]{7,64}", commit):
        lines.append(f"git checkout {commit}")
    else:
        lines.append("# warning: the commit is not known")
    extras = [each.extras for each in EXPERIMENTS if each.name == run.experiment]
    wanted = [*(extras[0] if extras else ()), *_accelerator(run.device)]
    what = f"'.[{','.join(wanted)}]'" if wanted else "."
    lines.append(f"python3 -m venv .venv && .venv/bin/pip install -q -e {what}")
    if not extras:
        lines.append("# warning: not known which extras of the package this experiment needs")
    return [*lines, shlex.join([".venv/bin/python", *command(run)])]


def command(run: Run) -> list[str]:
    """The experiment's command line, with the options that differ from the preset.

    Presets change. Where they are not what they were at the run's commit, every option is given.
    """
    fields = {name: value for name, value in run.config.items() if name not in ("preset", "seed")}
    if same_presets(run.commit, run.experiment):
        fields = difference(run).changed
    place = f"results/again/{run.experiment}/{run.preset}-{run.config['seed']}"
    start = ["--preset", run.preset, "--seed", str(run.config["seed"]), "--output", place]
    return ["-m", f"experiments.{run.experiment}", *start, *arguments(fields)]


@cache
def same_presets(commit: str, experiment: str) -> bool:
    """Whether an experiment's presets are today what they were at a commit (without its changes)."""
    if experiment not in _names() or not (found := re.match(r"[0-9a-f]{7,64}(?=\+|$)", commit)):
        return False
    file = f"experiments/{experiment.replace('.', '/')}.py"
    try:
        then = subprocess.run(["git", "show", f"{found[0]}:{file}"], cwd=ROOT, capture_output=True, check=True).stdout
        return _settings(then) == _settings((ROOT / file).read_bytes())
    except (OSError, subprocess.CalledProcessError, SyntaxError):
        return False


def _settings(code: bytes) -> list[str]:
    """The options and presets that a module states."""
    found = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            found += [ast.dump(each) for each in node.body if isinstance(each, ast.AnnAssign)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRESETS":
            found.append(ast.dump(node.value))
    return found


def _accelerator(device: str) -> tuple[str, ...]:
    """The extra for what ran: accelerators are told as "8 x NAME"."""
    if not re.match(r"\d+ x ", device):
        return ()
    return ("tpu",) if "tpu" in device.lower() else ("cuda",)


def reproduce(runs: Sequence[Run], experiment: str, row: str, join_commits: bool = False) -> str:
    """What reproduces a row, for every configuration that has it.

    Raises:
      ValueError: no finished run has it.
    """
    done = [run for run in runs if run.rows is not None]
    own = [run for run in done if run.experiment == experiment]
    if not own:
        found = ", ".join(sorted({run.experiment for run in done})) or "none"
        raise ValueError(f"--row: expected an experiment with results ({found}), given {experiment}")
    tables = [table for table in joined_runs(own, join_commits) if row in joined_rows(table)]
    if not tables:
        found = ", ".join(dict.fromkeys(name for run in own for name in run.rows or {})) or "none"
        raise ValueError(f"--row: expected a row of {experiment} ({found}), given {row}")
    return "\n\n".join(_reproduced(table, row) for table in tables)


def _reproduced(table: Table, row: str) -> str:
    measured, count = joined_rows(table)[row]
    values = [
        f"#   {column.title}: {shown(measured.metrics.get(column.metric), column)}"
        + (f" (the paper: {number(measured.paper[column.metric], column)})" if column.metric in measured.paper else "")
        for column in columns(table.first.experiment, [measured])
    ]
    over = f", mean over {count} runs" if count > 1 else ""
    lines = [f"# {table.first.experiment}, {describe(table.first)}", f"# Measured for {row}{over}:", *values]
    for run in table.runs:
        if run.rows and row in run.rows:
            took = "" if run.seconds is None else f", the whole run in {run.seconds:,.0f} s from first to last report"
            lines += [f"# Seed {_listed(seeds(run))}: {run.place}, on {run.device}{took}", *commands(run)]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, prog="python -m experiments.tables", description=__doc__)
    # A running experiment may hold the accelerator, and a page needs none.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    warnings: list[str] = []

    def warn(text: str) -> None:
        text = cleaned(text)
        print(f"warning: {text}", file=sys.stderr)
        warnings.append(text)

    try:
        for path in (*options.roots, options.output):
            files.local("a folder or --output", path)
        runs = collect(options.roots, warn)
        if not runs:
            places = ", ".join(map(str, options.roots))
            raise ValueError(
                f"no run of an experiment in {places}: run one first, {_module(_names()[0])} --preset smoke"
            )
        if options.row is not None:
            say(reproduce(runs, *options.row, options.join_commits))
            return
        output = options.output / "index" if options.output.is_dir() else options.output
        stem = output.with_suffix("") if output.suffix in (".md", ".html") else output
        blocks = page(runs, warnings, options.join_commits)
        for ending, text in (
            (".md", as_markdown(blocks, stem.parent)),
            (".html", as_html(blocks, stem.parent, options.embed)),
        ):
            write(stem.with_name(stem.name + ending), text)
            say(str(stem.with_name(stem.name + ending)))
    except (ValueError, OSError) as error:
        if os.environ.get("GENDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
