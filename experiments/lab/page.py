"""Pages of results in Markdown: our numbers beside the papers', their origin, and missing results."""

import html
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.lab import results
from experiments.lab.experiment import NAMES, Experiment
from experiments.lab.reproduce import today
from experiments.lab.results import Run, Table, cleaned, difference, expected, joined_rows, joined_runs, known
from experiments.lab.table import Row, cell, markdown, theirs

INTERVALS = (
    "Intervals are 95 %: over several seeds Student's, else the run's own, which its notes explain. "
    "-: not reported; ?: not finite."
)
WRITER = "python -m experiments.tables"


def page(runs: Sequence[Run], warnings: Sequence[str], base: Path, join_commits: bool = False) -> str:
    """The page of all runs; links to figures are relative to `base`."""
    others = sorted({run.experiment for run in runs if run.rows is not None} - set(NAMES))
    head = ["table", "of the paper", "finished runs", "configurations", "unfinished"]
    body = [_summary(name, [run for run in runs if run.experiment == name], join_commits) for name in [*NAMES, *others]]
    again = f"To reproduce a row: {code(f'{WRITER} --row EXPERIMENT ROW')}"
    parts = ["# gendiff: results", f"Ours beside the papers' numbers. {INTERVALS} {again}", markdown(head, body)]
    for name in [*NAMES, *others]:
        parts += [f"## {escaped(name)}", of_paper(name), *sections(name, runs, base, join_commits)]
    gaps = [f"- {gap}" for gap in missing(runs, warnings, join_commits)]
    return "\n\n".join([*parts, "## What is missing", "\n".join(gaps or ["Nothing."])]) + "\n"


def documents(folder: Path, runs: Sequence[Run]) -> dict[Path, str]:
    """Pages of committed results: path -> text, for every experiment with a `findings.md` in its folder of `folder`.

    The first line of `findings.md` is the page's title; the page includes the rest below its tables.

    Raises:
      ValueError: packages of an experiment are not installed.
    """
    pages = {}
    for name in NAMES:
        findings = folder / name / "findings.md"
        if findings.exists():
            if not known(name).presets:
                raise ValueError(f"--docs needs the packages of {name}: install the packages that the warning names")
            title = findings.read_text(encoding="utf-8").splitlines()[0]
            written = f"<!-- {WRITER} --docs writes this page: change {name}/findings.md, or the results beside it. -->"
            again = f"The commit and every option of a row: {code(f'{WRITER} docs/results --row {name} ROW')}."
            notes = [f"{INTERVALS} {again}"] if any(run.experiment == name for run in runs) else []
            include = f"```{{include}} {name}/findings.md\n:start-line: 1\n```"
            parts = [title, written, of_paper(name), *notes, *sections(name, runs, folder, level=2), include]
            pages[folder / f"{name}.md"] = "\n\n".join(parts) + "\n"
    return pages


def _summary(name: str, own: Sequence[Run], join_commits: bool) -> list[str]:
    done = sum(run.rows is not None for run in own)
    paper = known(name).paper
    link = f"[{escaped(name)}](#{re.sub('[^a-z0-9_-]', '', name.lower())})"
    numbers = [done, len(joined_runs(own, join_commits)), len(own) - done]
    return [link, paper.part if paper else "-", *map(str, numbers)]


def of_paper(name: str) -> str:
    paper = known(name).paper
    if paper is None:
        return "Its packages are not installed." if name in NAMES else "Of no paper."
    return f"{paper.title}, [arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}), {paper.part}."


def sections(name: str, runs: Sequence[Run], base: Path, join_commits: bool = False, level: int = 3) -> Iterator[str]:
    """An experiment's tables; without results, the paper's numbers."""
    tables = joined_runs([run for run in runs if run.experiment == name], join_commits)
    for table in tables:
        yield from _section(table, base, level)
    if tables:
        return
    yield f"No results. Run {code(f'python -m experiments.{name}')}."
    paper = known(name).paper
    if paper and paper.rows:
        rows = [Row(row, {}, dict(numbers)) for row, numbers in paper.rows.items()]
        columns = results.columns(name, rows)
        body = [[code(row.name), *(theirs(row, column) for column in columns)] for row in rows]
        yield "The paper's numbers:"
        yield markdown(["row", *(column.title for column in columns)], body)


def _section(table: Table, base: Path, level: int) -> Iterator[str]:
    first, count = table.first, len(table.seeds)
    seeds = f"{'seed' if count == 1 else f'{count} seeds:'} {', '.join(map(str, table.seeds))}"
    yield f"{'#' * level} {escaped(f'{results.describe(first)}; {seeds}')}"
    yield comparison(table)
    head = ["folder", "seed", "commit", "device", "seconds", "ended"]
    yield markdown(head, [_where(run, base) for run in table.runs])
    if table.repeated:
        folders = cleaned(", ".join(str(run.folder) for run in table.repeated))
        yield escaped(f"Repeated configurations and seeds, which no number above includes: {folders}")
    if difference(first).config is not None:
        yield "Command for today's code:"
        yield _verbatim("\n".join(shlex.join(["python", *today(run)]) for run in table.runs))
    if pictures := sorted(path for path in first.folder.glob("*.png") if not path.name.startswith(".")):
        if len(table.runs) > 1:
            yield f"Figures of seed {first.config['seed']}:"
        yield "\n".join(f"![{escaped(cleaned(path.name))}]({_relative(path, base)})" for path in pictures)
    if notes := _notes(first.folder / "table.md"):
        yield "Notes of the run:"
        yield _verbatim(notes)


def _where(run: Run, base: Path) -> list[str]:
    seconds = "-" if run.seconds is None else f"{run.seconds:,.0f}"
    folder = cleaned(os.path.relpath(run.folder.resolve(), base.resolve()))
    ended = results.moment(run.reports[-1].time) if run.reports else "-"
    return [code(folder), ", ".join(map(str, run.seeds)), code(run.commit), escaped(run.device), seconds, ended]


def comparison(table: Table) -> str:
    """Our rows beside the paper's numbers, and missing rows."""
    name = table.first.experiment
    paper = known(name).paper
    rows = joined_rows(table)
    for row in expected(table):
        rows.setdefault(row, (Row(row, {}, dict(paper.rows.get(row, {}) if paper else {})), 0))
    columns = results.columns(name, [measured for measured, _ in rows.values()])
    reported = {metric for measured, _ in rows.values() for metric in measured.paper}
    head, body = ["row"], []
    for column in columns:
        head += [escaped(column.title)] + ["the paper's"] * (column.metric in reported)
    for row, (measured, count) in rows.items():
        cells = [code(row)]
        if count < len(table.runs):
            cells = [escaped(f"{row} ({f'{count} of {len(table.runs)} runs' if count else 'missing'})")]
        for column in columns:
            cells.append(cell(measured.metrics.get(column.metric), column))
            cells += [theirs(measured, column)] * (column.metric in reported)
        body.append(cells)
    return markdown(head, body)


def _notes(path: Path) -> str:
    """The text below the table of table.md."""
    try:
        text = "\n".join(map(cleaned, path.read_text(encoding="utf-8", errors="replace").splitlines()))
    except OSError:
        return ""
    below = re.search(r"^\|.*\n(?:\|.*\n)*([\s\S]*)", text, re.MULTILINE)
    return below[1].strip() if below else ""


def missing(runs: Sequence[Run], warnings: Sequence[str], join_commits: bool = False) -> Iterator[str]:
    """Missing results: presets without a finished run, rows, unfinished runs, and warnings."""
    for experiment in map(known, NAMES):
        own = [run for run in runs if run.experiment == experiment.name and run.rows is not None]
        if not own:
            part = f" ({experiment.paper.part})" if experiment.paper else ""
            yield f"{code(experiment.name)}{part}: no results. {code(f'python -m experiments.{experiment.name}')}"
        for preset in experiment.presets if own else ():
            same = [run for run in own if run.preset == preset]
            if not same or all(difference(run).changed for run in same):
                state = "run only with other options" if same else "never finished"
                yield f"{code(experiment.name)}: preset {preset} {state}. {code(of_preset(experiment, preset))}"
    for run in (run for table in joined_runs(runs, join_commits) for run in table.runs):
        if lacking := [name for name in expected(Table([run], [])) if name not in (run.rows or {})]:
            rows = f": rows missing of {run.experiment}: "
            yield code(cleaned(str(run.folder))) + escaped(rows) + code(", ".join(lacking))
    for run in runs:
        if run.rows is None:
            last = run.reports[-1] if run.reports else None
            state = f"last report {last.text}, at {results.moment(last.time)}" if last else "no report yet"
            run_state = f" ({run.experiment}, preset {run.preset}, seed {run.config['seed']}) is unfinished: {state}."
            yield code(cleaned(str(run.folder))) + escaped(run_state)
    yield from map(escaped, warnings)


def of_preset(experiment: Experiment, preset: str) -> str:
    """The command for a preset; five seeds for `paper`, because the papers report means."""
    if preset == "paper" and experiment.seeds is None:
        return f"python -m experiments.sweep {experiment.name} --preset paper --seeds 0:5"
    return f"python -m experiments.{experiment.name} --preset {preset}"


# Markdown.


def code(text: str) -> str:
    """Text as code."""
    return escaped(text) if set(text) & set("`|\\") else f"`{text}`"


def escaped(text: str) -> str:
    """Text without the special characters of Markdown and HTML."""
    return re.sub(r"[\\`*|#~]|\](?=[(\[:])|\b_|_\b", r"\\\g<0>", html.escape(text, quote=False))


def _verbatim(text: str) -> str:
    """Text of a file as an indented block, which no text can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _relative(path: Path, base: Path) -> str:
    return urllib.parse.quote(os.fsencode(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()))
