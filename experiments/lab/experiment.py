"""The description of an experiment, which its module holds as `EXPERIMENT`, and the list of all experiments.

The command line, the sweep and the pages of results read it.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.lab import command, phases
from experiments.lab.config import Config, ConfigError
from experiments.lab.phases import Lab, Run
from experiments.lab.programs import Program
from experiments.lab.table import Column, Results, Row, over_seeds

NAMES = ("genneg.checkerboard", "genneg.traffic", "censoring.mnist", "relative_reward.maze2d")
"""Modules below `experiments`, in the order of the pages."""


class Paper(NamedTuple):
    """The table or figure of a paper that an experiment reproduces."""

    title: str
    arxiv: str
    part: str
    """Section and tables, such as "section 6.2, Table 1"."""
    rows: Mapping[str, Mapping[str, float]] = {}
    """Row -> metric -> the paper's number, in our units."""


class Experiment(NamedTuple):
    """An experiment: its configuration, its phases and its table."""

    name: str
    """Its module below `experiments`, which also names its results."""
    config: type[Config]
    presets: Mapping[str, Any]
    """smoke, default and paper, each a `config`."""
    table: Callable[[Lab], None]
    """Computes the phases of all runs, and adds the rows to every run."""
    columns: tuple[Column, ...] = ()
    rows: Callable[[Any], list[str]] = lambda config: []
    """Configuration -> the names of its rows, in order."""
    paper: Paper | None = None
    extras: tuple[str, ...] = ()
    """The extras of the package that it needs."""
    notes: Callable[[Sequence[Run], Sequence[Row]], str] = lambda members, rows: ""
    """The runs of a configuration and its rows -> the text below its table."""
    figures: Callable[[Path, Sequence[Run], Sequence[Row]], None] = lambda folder, members, rows: None
    """Draws into a folder."""
    programs: Callable[[Any], Mapping[str, Program]] = lambda config: {}
    """Configuration -> the programs that take most of its time, for `tpu.plan`."""
    load: Callable[[Any], Any] = lambda config: None
    """Configuration -> the data of all its runs (`run.data`), read before a folder is made."""
    seeds: str | None = None
    """The option with the number of seeds of a run, from `--seed` on; None if a run has one seed."""

    def run(self, config: Any) -> Results:
        """Compute the phases that the folder lacks, and write the table and the figures.

        Raises:
          ConfigError: the folder is of another configuration.
        """
        (outcome,) = self.run_all([config])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def run_all(self, configs: Sequence[Any]) -> list[Results | BaseException]:
        """Run configurations that share their programs (`config.of_program`); if one fails, the others continue."""
        data = command.attempt(lambda: self.load(configs[0]))
        if isinstance(data, Exception):
            return [data] * len(configs)
        open_runs = lambda config: phases.opened(self.name, config, getattr(config, self.seeds) if self.seeds else 1)
        opened = [command.attempt(partial(open_runs, config)) for config in configs]
        members = [run for outcome in opened if isinstance(outcome, list) for run in outcome]
        for run in members:
            run.data = data
        error = command.attempt(lambda: self.table(Lab(members))) if members else None
        for run in members:
            run.error = run.error or error
        finish = lambda members: command.attempt(partial(self._finished, members))
        return [finish(outcome) if isinstance(outcome, list) else outcome for outcome in opened]

    def _finished(self, members: list[Run]) -> Results:
        for run in members:
            run.progress.close()
            if run.error is not None:
                raise run.error
        first = members[0]
        rows = first.rows if len(members) == 1 else over_seeds([run.rows for run in members])
        self.figures(first.folder.path, members, rows)
        return first.folder.finish(rows, self.columns, self.notes(members, rows))

    def main(self) -> None:
        command.main(self.config, self.presets, self.run)


def find(name: str) -> Experiment:
    """Import the experiment of this name.

    Raises:
      ConfigError: `NAMES` lacks the name, which is then never imported.
      ImportError: a package is missing.
    """
    if name not in NAMES:
        raise ConfigError(f"experiment must be one of {', '.join(NAMES)}, got {name}")
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
