"""What an experiment's module says of itself, and the experiments there are.

Every module ends with `EXPERIMENT = Experiment(..)`.  The command line, the sweep and the pages of results ask it.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.contract import Column, Config, ConfigError, Results

NAMES = ("genneg.checkerboard", "genneg.traffic", "censoring.mnist", "relative_reward.maze2d")
"""Modules below `experiments`, in the order of the pages."""


class Paper(NamedTuple):
    """The table or figure of a paper that an experiment makes anew."""

    title: str
    arxiv: str
    part: str
    """Section and tables, as in "section 6.2, Table 1"."""
    rows: Mapping[str, Mapping[str, float]] = {}
    """Row -> metric -> the paper's number, in our units."""


class Experiment(NamedTuple):
    """An experiment: its configuration, what it runs and what its table has."""

    name: str
    """Its module below `experiments`; names its results too."""
    config: type[Config]
    presets: Mapping[str, Any]
    """smoke, default and paper, each a `config`."""
    run: Callable[[Any], Results]
    columns: tuple[Column, ...] = ()
    rows: Callable[[Any], list[str]] = lambda config: []
    """Configuration -> the names of its rows, in their order."""
    paper: Paper | None = None
    extras: tuple[str, ...] = ()
    """Extras of the package that it needs."""
    seeds: str | None = None
    """The option that makes several seeds in one run, from `--seed` on; None if a run has one seed."""


def find(name: str) -> Experiment:
    """Import the experiment of this name; a name that is not in `NAMES` is never imported.

    Raises:
      ConfigError: there is no such experiment.
      ImportError: a package is missing.
    """
    if name not in NAMES:
        raise ConfigError(f"experiment must be one of {', '.join(NAMES)}, got {name}")
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment
