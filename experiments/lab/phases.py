"""Phases of K runs, which are seeds or configurations that share their programs.

An experiment asks for every phase by name, and for all runs at once:

    lab.once("data", compute)          on the host, run by run
    lab.train("baseline", training)    one program for all runs
    lab.together("draws", compute)     any other work for all runs

A run stores a phase's result in its folder and as `run["baseline"]`.  A killed experiment continues after its last
finished phase, and a training after its last checkpoint.  If a run fails, the other runs continue.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from experiments.lab import command
from experiments.lab.config import Config, ConfigError
from experiments.lab.folder import Folder
from experiments.lab.progress import Progress
from experiments.lab.table import Row
from gendiff import distributed, runs, training
from gendiff.checkpoint import Archive
from gendiff.metrics.rates import Estimate


class Run:
    """One seed of one configuration."""

    def __init__(self, config: Any, seed: int, folder: Folder, archive: Archive, progress: Progress) -> None:
        self.config, self.seed, self.folder, self.archive, self.progress = config, seed, folder, archive, progress
        self.data: Any = None
        """The data that the experiment loaded, the same for all runs."""
        self.results: dict[str, Any] = {}
        """Phase -> its result."""
        self.rows: list[Row] = []
        self.remarks: list[str] = []
        """Sentences below the table."""
        self.error: BaseException | None = None

    def __getitem__(self, phase: str) -> Any:
        return self.results[phase]

    def key(self, purpose: int) -> Array:
        """The random key of a purpose; equal seeds have equal keys."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)

    def add(self, name: str, metrics: dict[str, Estimate], paper: dict[str, float] | None = None) -> None:
        """Add a row to the table, with the paper's numbers."""
        self.rows.append(Row(name, metrics, paper or {}))

    def seconds(self, *phases: str) -> float:
        """Wall-clock time of phases; a phase of several runs counts the time of all."""
        return sum(self.archive.seconds[phase] for phase in phases)

    def hosted(self, phase: str, job: training.Training, mesh: jax.sharding.Mesh | None) -> training.Training:
        """The training with this run's checkpoints and reports, on a mesh."""
        report = lambda step, metrics: self.progress(phase, step, job.settings.steps, metrics)
        host = training.Host(mesh, self.archive.steps(phase), report, job.host.fully_sharded)
        return job._replace(host=host)


class Lab:
    """The runs of an experiment that have not failed, and their mesh for sampling."""

    def __init__(self, members: Sequence[Run]) -> None:
        self.runs = list(members)
        self.mesh = distributed.make_mesh()

    @property
    def config(self) -> Any:
        """The configuration of the first run; the others differ only in options that are arguments of programs."""
        return self.runs[0].config

    @property
    def data(self) -> Any:
        """The data that the experiment loaded for all runs."""
        return self.runs[0].data

    def once(self, phase: str, compute: Callable[[Run], Any], kind: Callable[..., Any] = dict) -> None:
        """Compute a phase run by run, or read its stored result.

        Args:
          compute: gives a dict, or a NamedTuple of type `kind`, of arrays and numbers.
        """
        self.each(lambda run: run.results.update({phase: run.archive.once(phase, lambda: compute(run), kind)}))

    def unchanged(self, phase: str, checksums: Callable[[Run], dict[str, Any]]) -> None:
        """Fail a run whose data differ from those that it began with; `checksums` gives name -> number."""
        self.once(phase, checksums)

        def check(run: Run) -> None:
            for name, value in checksums(run).items():
                if name not in run[phase] or int(run[phase][name]) != int(value):
                    raise ConfigError(f"--output must be of the same {phase}, got another {name} set than before")

        self.each(check)

    def each(self, work: Callable[[Run], Any]) -> None:
        """Do work run by run, without storing a result."""
        for run in list(self.runs):
            self._guard(run, work)

    def together(
        self, phase: str, compute: Callable[[list[Run]], Sequence[Any]], kind: Callable[..., Any] = dict
    ) -> None:
        """Compute a phase of all runs without a stored result, together.

        If that fails, compute it run by run.

        Args:
          compute: runs -> a result for each run, a dict or a NamedTuple of type `kind`.
        """
        distributed.stop_if_preempted("every phase that was finished")
        waiting: list[Run] = []

        def read(run: Run) -> None:
            stored = run.archive.held(phase, kind)
            if stored is None:
                waiting.append(run)
            else:
                run.results[phase] = stored

        self.each(read)
        groups = [waiting] if waiting else []
        while groups:
            group = groups.pop(0)
            begun = time.perf_counter()
            try:
                results = jax.block_until_ready(list(compute(group)))
            except (ArithmeticError, ValueError) as error:
                if len(group) > 1:
                    groups += [[run] for run in group]
                else:
                    self._failed(group[0], error)
                continue
            except Exception as error:  # such as a full disk
                for run in group:
                    self._failed(run, error)
                continue
            seconds = time.perf_counter() - begun
            for run, result in zip(group, results, strict=True):
                self._guard(run, partial(_keep, phase, result, seconds, kind))

    def train(
        self, phase: str, job: Callable[[Run], training.Training],
        result: Callable[[Run, training.State], Any] = lambda run, state: state.best,
        mesh: jax.sharding.Mesh | None = None, shared: bool = False,
    ) -> None:  # fmt: skip
        """Train a phase of all runs, in one program where they agree.

        Args:
          job: run -> the training.  Only `fully_sharded` of its host counts.
          result: (run, last state) -> the phase's result; default: the best parameters.
          mesh: for a run that trains alone.
          shared: all runs have the same training, so train once.
        """

        def compute(members: list[Run]) -> list[Any]:
            trained = members[:1] if shared else members
            states = self.trained(phase, trained, [job(run) for run in trained], mesh)
            states = states * len(members) if shared else states
            return [result(run, state) for run, state in zip(members, states, strict=True)]

        self.together(phase, compute)

    def trained(
        self, phase: str, members: Sequence[Run], jobs: Sequence[training.Training],
        mesh: jax.sharding.Mesh | None = None,
    ) -> list[training.State]:  # fmt: skip
        """Train every member and return the last states, for a phase that does more than train."""
        return runs.train([run.hosted(phase, job, mesh) for run, job in zip(members, jobs, strict=True)])

    def _guard(self, run: Run, work: Callable[[Run], Any]) -> None:
        try:
            work(run)
        except Exception as error:
            self._failed(run, error)

    def _failed(self, run: Run, error: Exception) -> None:
        """Continue without a run; raise the error if it was the last."""
        run.error = command.go_on(error)
        self.runs.remove(run)
        if not self.runs:
            raise error


def _keep(phase: str, result: Any, seconds: float, kind: Callable[..., Any], run: Run) -> None:
    run.results[phase] = run.archive.keep(phase, result, seconds, kind)


def opened(experiment: str, config: Config, seeds: int = 1) -> list[Run]:
    """The runs of a configuration in its folder, one for each seed.

    Raises:
      ConfigError: the folder is of another configuration, or another process uses it.
    """
    folder = Folder(experiment, config)
    place = folder.path / "checkpoints"
    progress = lambda seed: Progress(folder, f"seed {seed}: " if seeds > 1 else "")
    numbers = range(config.seed, config.seed + seeds)
    return [Run(config, seed, folder, Archive(place / f"seed-{seed}"), progress(seed)) for seed in numbers]
