"""Pages of results in Markdown: ours beside the papers' numbers, where it was run, and what is missing."""

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
from experiments.lab.results import Measured, Run, Table, cleaned, difference, expected, joined_rows, joined_runs, known
from experiments.lab.table import cell, markdown, theirs

INTERVALS = (
    "Intervals are 95 %: over seeds where there are several (Student's), else the run's own, which its notes explain. "
    "-: not reported; ?: not finite."
)
WRITER = "python -m experiments.tables"


def page(runs: Sequence[Run], warnings: Sequence[str], base: Path, join_commits: bool = False) -> str:
    """Everything that there is to say about the runs; figures are linked relative to `base`."""
    others = sorted({run.experiment for run in runs if run.rows is not None} - set(NAMES))
    head = ["table", "of the paper", "finished runs", "configurations", "unfinished"]
    body = [_summary(name, [run for run in runs if run.experiment == name], join_commits) for name in [*NAMES, *others]]
    again = f"What reproduces a row: {code(f'{WRITER} --row EXPERIMENT ROW')}"
    parts = ["# gendiff: results", f"Ours beside the papers' numbers. {INTERVALS} {again}", markdown(head, body)]
    for name in [*NAMES, *others]:
        parts += [f"## {escaped(name)}", of_paper(name), *sections(name, runs, base, join_commits)]
    gaps = [f"- {gap}" for gap in missing(runs, warnings, join_commits)]
    return "\n\n".join([*parts, "## What is missing", "\n".join(gaps or ["Nothing."])]) + "\n"


def documents(folder: Path, runs: Sequence[Run]) -> dict[Path, str]:
    """Pages of committed results: path -> text, for every experiment that has a folder in `folder`.

    `findings.md` of that folder has the title and the text, which the page includes below its tables.
    """
    pages = {}
    for name in NAMES:
        findings = folder / name / "findings.md"
        if findings.exists():
            if not known(name).presets:
                raise ValueError(f"--docs needs the packages of {name}: install those that the warning names")
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
    """The paper of an experiment."""
    paper = known(name).paper
    if paper is None:
        return "Its packages are not installed." if name in NAMES else "Of no paper."
    return f"{paper.title}, [arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}), {paper.part}."


def sections(name: str, runs: Sequence[Run], base: Path, join_commits: bool = False, level: int = 3) -> Iterator[str]:
    """An experiment's tables, or the paper's numbers alone where there are none."""
    tables = joined_runs([run for run in runs if run.experiment == name], join_commits)
    for table in tables:
        yield from _section(table, base, level)
    if tables:
        return
    yield f"No results are here. Run {code(f'python -m experiments.{name}')}."
    paper = known(name).paper
    if paper and paper.rows:
        rows = {row: (Measured({}, dict(numbers)), 0) for row, numbers in paper.rows.items()}
        given = results.columns(name, [row for row, _ in rows.values()])
        body = [[code(row), *(theirs(own, column) for column in given)] for row, (own, _) in rows.items()]
        yield "The paper's numbers:"
        yield markdown(["row", *(column.title for column in given)], body)


def _section(table: Table, base: Path, level: int) -> Iterator[str]:
    first, count = table.first, len(table.seeds)
    listed = ", ".join(map(str, table.seeds))
    what = f"{results.describe(first)}; {'seed' if count == 1 else f'{count} seeds:'} {listed}"
    yield f"{'#' * level} {escaped(what)}"
    yield comparison(table)
    head = ["folder", "seed", "commit", "device", "seconds", "ended"]
    yield markdown(head, [_where(run, base) for run in table.runs])
    if table.repeated:
        folders = cleaned(", ".join(str(run.folder) for run in table.repeated))
        yield escaped(f"The same configuration and seeds again, in no number above: {folders}")
    if difference(first).config is not None:
        yield "Today's code runs it again by:"
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
    """Our rows, the paper's number beside each metric that it has, and the rows that are missing."""
    name = table.first.experiment
    paper = known(name).paper
    rows = joined_rows(table)
    for row in expected(table):
        rows.setdefault(row, (Measured({}, dict(paper.rows.get(row, {}) if paper else {})), 0))
    given = results.columns(name, [measured for measured, _ in rows.values()])
    reported = {metric for measured, _ in rows.values() for metric in measured.paper}
    head, body = ["row"], []
    for column in given:
        head += [escaped(column.title)] + ["the paper's"] * (column.metric in reported)
    for row, (measured, count) in rows.items():
        cells = [code(row)]
        if count < len(table.runs):
            cells = [escaped(f"{row} ({f'{count} of {len(table.runs)} runs' if count else 'missing'})")]
        for column in given:
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
    found = re.search(r"^\|.*\n(?:\|.*\n)*([\s\S]*)", text, re.MULTILINE)
    return found[1].strip() if found else ""


def missing(runs: Sequence[Run], warnings: Sequence[str], join_commits: bool = False) -> Iterator[str]:
    """What was not run, not finished, not measured or not read."""
    for experiment in map(known, NAMES):
        own = [run for run in runs if run.experiment == experiment.name and run.rows is not None]
        if not own:
            part = f" ({experiment.paper.part})" if experiment.paper else ""
            yield f"{code(experiment.name)}{part}: no results. {code(f'python -m experiments.{experiment.name}')}"
        for preset in experiment.presets if own else ():
            same = [run for run in own if run.preset == preset]
            if not same or all(difference(run).changed for run in same):
                how = "run only with other options" if same else "never finished"
                yield f"{code(experiment.name)}: preset {preset} {how}. {code(of_preset(experiment, preset))}"
    for run in (run for table in joined_runs(runs, join_commits) for run in table.runs):
        if lacking := [name for name in expected(Table([run], [])) if name not in (run.rows or {})]:
            what = f": rows missing of {run.experiment}: "
            yield code(cleaned(str(run.folder))) + escaped(what) + code(", ".join(lacking))
    for run in runs:
        if run.rows is None:
            last = run.reports[-1] if run.reports else None
            state = f"last report {last.text}, at {results.moment(last.time)}" if last else "no report yet"
            what = f" ({run.experiment}, preset {run.preset}, seed {run.config['seed']}) is unfinished: {state}."
            yield code(cleaned(str(run.folder))) + escaped(what)
    yield from map(escaped, warnings)


def of_preset(experiment: Experiment, preset: str) -> str:
    """The command for a preset: the papers' tables are means over five seeds."""
    if preset == "paper" and experiment.seeds is None:
        return f"python -m experiments.sweep {experiment.name} --preset paper --seeds 0:5"
    return f"python -m experiments.{experiment.name} --preset {preset}"


# Markdown.


def code(text: str) -> str:
    """Text as it is typed."""
    return escaped(text) if set(text) & set("`|\\") else f"`{text}`"


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, take for what it is."""
    return re.sub(r"[\\`*|#~]|\](?=[(\[:])|\b_|_\b", r"\\\g<0>", html.escape(text, quote=False))


def _verbatim(text: str) -> str:
    """Text of a file, indented, because nothing in it can end that."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _relative(path: Path, base: Path) -> str:
    return urllib.parse.quote(os.fsencode(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()))
