"""The rows of a table, and how they are printed in Markdown."""

from collections.abc import Sequence
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
    """What the paper reports for this row, in the same units; empty where it reports nothing."""


class Column(NamedTuple):
    """How a metric is printed."""

    metric: str
    title: str
    percent: bool = False
    digits: int = 3


class Results(NamedTuple):
    """What an experiment's `run` returns."""

    rows: list[Row]
    folder: Path
    table: str


def table(rows: list[Row], columns: Sequence[Column]) -> str:
    """The Markdown table: value [low, high] for each metric, and the paper's numbers where there are any."""
    papers = [column for column in columns if any(column.metric in row.paper for row in rows)]
    head = ["row", *[column.title for column in columns], *[f"paper: {column.title}" for column in papers]]
    body = [
        [row.name]
        + [_cell(row.metrics.get(column.metric), column) for column in columns]
        + [_number(row.paper[column.metric], column) if column.metric in row.paper else "-" for column in papers]
        for row in rows
    ]
    return markdown(head, body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table of texts."""
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True)


def _cell(estimate: Estimate | None, column: Column) -> str:
    if estimate is None:
        return "-"
    text = _number(estimate.value, column)
    if estimate.low == estimate.high:
        return text
    return f"{text} [{_number(estimate.low, column)}, {_number(estimate.high, column)}]"


def _number(value: float, column: Column) -> str:
    return f"{value * (100 if column.percent else 1):,.{column.digits}f}"


def over_seeds(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """One table from those of several seeds, which have the same rows."""
    merged = []
    for same in zip(*tables, strict=True):
        names = same[0].metrics
        merged.append(same[0]._replace(metrics={n: rates.over_seeds([row.metrics[n] for row in same]) for n in names}))
    return merged
