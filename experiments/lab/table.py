"""The rows of a table, printed in Markdown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate


class Row(NamedTuple):
    """One row of a table."""

    name: str
    metrics: dict[str, Estimate]
    paper: dict[str, float] = {}  # noqa: RUF012 (immutable use)
    """The paper's numbers for this row, in the same units."""


def plain(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates as JSON."""
    return {name: estimate._asdict() for name, estimate in metrics.items()}


class Column(NamedTuple):
    """The format of a metric."""

    metric: str
    title: str
    percent: bool = False
    digits: int | None = 3
    """Digits after the point; None: four significant digits, for a metric that no experiment describes."""


class Results(NamedTuple):
    """The results of a run."""

    rows: list[Row]
    folder: Path
    table: str


def table(rows: list[Row], columns: Sequence[Column]) -> str:
    """The Markdown table: value [low, high] of every metric, and the paper's numbers."""
    papers = [column for column in columns if any(column.metric in row.paper for row in rows)]
    head = ["row", *[column.title for column in columns], *[f"paper: {column.title}" for column in papers]]
    ours = lambda row: [cell(row.metrics.get(column.metric), column) for column in columns]
    return markdown(head, [[row.name, *ours(row), *(theirs(row, column) for column in papers)] for row in rows])


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True)


def cell(estimate: Estimate | None, column: Column) -> str:
    """value [low, high]; the value alone for a count or a time, `-` for None."""
    if estimate is None:
        return "-"
    text = number(estimate.value, column)
    if estimate.low == estimate.high:
        return text
    return f"{text} [{number(estimate.low, column)}, {number(estimate.high, column)}]"


def theirs(row: Row, column: Column) -> str:
    """The paper's number of a row, `-` if it reports none."""
    return number(row.paper[column.metric], column) if column.metric in row.paper else "-"


def number(value: float, column: Column) -> str:
    """A value in the column's units; `?` if it is not finite."""
    if not math.isfinite(value):
        return "?"
    if column.digits is None:
        return f"{value:,.4g}"
    return f"{value * (100 if column.percent else 1):,.{column.digits}f}"


def over_seeds(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """The table over several seeds, whose tables have the same rows."""
    metrics = lambda rows: {n: rates.over_seeds([row.metrics[n] for row in rows]) for n in rows[0].metrics}
    return [rows[0]._replace(metrics=metrics(rows)) for rows in zip(*tables, strict=True)]
