"""A grid of runs of one experiment, and one table: means, intervals and the number of seeds.

    python -m experiments.sweep genneg.checkerboard --seeds 0:5 --grid points=500,1000 --preset smoke

Runs that differ only in seeds and in arguments of programs, such as guidance_scale, train and sample as one program.
Each run has a folder of its own, as if it had been started alone.  The same command skips finished runs and continues
stopped runs.  All other options are the experiment's.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm import tqdm

from experiments.lab import command, config, results, start
from experiments.lab.config import Config, ConfigError, of_program
from experiments.lab.experiment import Experiment, find
from experiments.lab.folder import Folder, write
from experiments.lab.progress import Progress
from experiments.lab.table import cell, markdown, plain
from gendiff import distributed
from gendiff.command import BAD_INPUT, say


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a sweep; all others are the experiment's."""

    experiment: tyro.conf.Positional[str]
    """Such as genneg.checkerboard."""
    seeds: str = "0:5"
    """A range without its end, 0:5, or a list, 0,3,7."""
    grid: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[FIELD=VALUE,VALUE.. ..]")] = ()
    """Options of the experiment and their values; the sweep runs all combinations."""
    at_once: int = 8
    """The most runs side by side, which share the memory."""
    output: Path | None = None
    """Folder; default: results/sweeps/<experiment>/<preset>."""

    def __post_init__(self) -> None:
        if self.output is not None:
            config.check_local("--output", self.output)
        if self.at_once < 1:
            raise ConfigError(f"--at-once must be 1 or more, got {self.at_once}")


class Planned(NamedTuple):
    """A run of the grid."""

    name: str
    config: Config


MOST = 1000
"""The most runs of a sweep."""


def seeds(text: str) -> list[int]:
    """The seeds of `0:5` or `0,3,7`."""
    try:
        first, colon, last = text.partition(":")
        numbers = range(int(first), int(last)) if colon else [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds must be such as 0:5 or 0,3,7, got {text}") from None
    count = max(numbers.stop - numbers.start, 0) if isinstance(numbers, range) else len(numbers)  # len may overflow
    if not 1 <= count <= MOST:
        raise ConfigError(f"--seeds must name 1 to {MOST:,} seeds, got {text}, which names {count:,}")
    config.check_distinct("--seeds", numbers)
    return list(numbers)


def grid(text: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of `field=value,value` for every field."""
    values: dict[str, list[str]] = {}
    fields = [field for field in fields if field not in ("seed", "output", "preset")]
    for word in text:
        name, equals, listed = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not all(listed.split(",")):
            raise ConfigError(f"--grid must be FIELD=VALUE,VALUE.., got {word}")
        if name not in fields or name in values:
            raise ConfigError(f"--grid must name these fields once at most ({', '.join(fields)}), got {name}")
        values[name] = listed.split(",")
        config.check_distinct(f"--grid {name}", values[name])
    if (count := math.prod(map(len, values.values()))) > MOST:
        raise ConfigError(f"--grid must have at most {MOST:,} combinations, got {count:,}")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def plan(experiment: Experiment, options: Options, others: Sequence[str], folder: Path) -> list[Planned]:
    """The runs of a grid, with a folder and one seed each.

    Raises:
      ConfigError: they are too many, a configuration is out of range, or two configurations or folders are the same.
    """
    planned: list[Planned] = []
    names: dict[Any, str] = {}
    one_seed = [f"--{experiment.seeds}", "1"] if experiment.seeds else []
    fields = [name for name, _, _ in config.options(experiment.presets["default"])]
    points, numbers = grid(options.grid, fields), seeds(options.seeds)
    if (count := len(points) * len(numbers)) > MOST:
        raise ConfigError(f"--seeds, --grid must give at most {MOST:,} runs, got {count:,}")
    for point, seed in itertools.product(points, numbers):
        name = "_".join([*(f"{field}-{value}" for field, value in point.items()), f"seed-{seed}"]).replace("/", "-")
        words = [word for field, value in point.items() for word in (f"--{field.replace('_', '-')}", value)]
        own = [*one_seed, *others, *words, "--seed", str(seed), "--output", str(folder / name)]
        run = Planned(name, config.parse(experiment.config, experiment.presets, own))
        for same in (name, dataclasses.replace(run.config, output=None)):  # such as a-b of a/b, and 1 and 1.0
            if same in names:
                raise ConfigError(f"--grid must give different runs, got {names[same]} and {name}, which are the same")
            names[same] = name
        planned.append(run)
    return planned


def sweep(experiment: Experiment, planned: Sequence[Planned], folder: Path, at_once: int) -> dict[str, BaseException]:
    """Do the runs that are not finished; return run -> error for those that failed."""
    done = distributed.first(lambda: [run.name for run in planned if finished(experiment, run)])
    failed: dict[str, BaseException] = {}
    bar = tqdm(
        total=len(planned), initial=len(done), desc=f"sweep of {experiment.name}", unit=" runs", file=sys.stderr,
        disable=not distributed.is_first(),
    )  # fmt: skip
    for part in parts([run for run in planned if run.name not in done], at_once):
        bar.set_postfix({"side by side": len(part)})
        with quiet():  # bars of several runs would overwrite one another; metrics.jsonl has their reports
            outcomes = experiment.run_all([run.config for run in part])
        for run, outcome in zip(part, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                failed[run.name] = outcome
            else:
                bar.update()
    bar.close()
    kept = distributed.first(lambda: [run.name for run in planned if finished(experiment, run)])
    for run in planned:
        if run.name not in kept:
            gone = OSError(f"{run.config.output} must have its results, but they are gone: run the same command again")
            failed.setdefault(run.name, gone)
    return failed


def parts(planned: Sequence[Planned], at_once: int) -> list[list[Planned]]:
    """Groups of at most `at_once` runs that share their programs."""
    groups: dict[Any, list[Planned]] = {}
    for run in planned:
        groups.setdefault(of_program(run.config), []).append(run)
    return [group[i : i + at_once] for group in groups.values() for i in range(0, len(group), at_once)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and the output of the runs."""
    before, Progress.bars = Progress.bars, False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        Progress.bars = before


def finished(experiment: Experiment, planned: Planned) -> bool:
    """Return True if the run has results of this configuration; damaged results are computed again."""
    folder = planned.config.output
    assert folder is not None
    warnings: list[str] = []
    if not (folder / "results.json").exists() or not (run := results.read(folder, warnings.append)) or run.rows is None:
        return False
    return Folder.check(folder, experiment.name, planned.config)


def report(folder: Path, planned: Sequence[Planned]) -> str:
    """Return the table of all finished runs, and write it to table.md and sweep.json."""
    warnings: list[str] = []
    runs = [results.read(folder / run.name, warnings.append) for run in planned]
    joined = results.joined_runs([run for run in runs if run is not None and run.rows is not None], join_commits=True)
    blocks: list[str] = []
    document = []
    for table in joined:
        rows = results.joined_rows(table)
        columns = results.columns(table.first.experiment, [row for row, _ in rows.values()])
        cells = lambda row: [cell(row.metrics.get(column.metric), column) for column in columns]  # noqa: B023
        body = [[name, *cells(row), str(count)] for name, (row, count) in rows.items()]
        head = ["row", *[column.title for column in columns], "seeds"]
        blocks.append(f"{results.describe(table.first)}\n\n{markdown(head, body)}")
        document.append({
            "config": {name: value for name, value in table.first.config.items() if name != "seed"},
            "seeds": [run.config["seed"] for run in table.runs],
            "rows": {name: plain(row.metrics) for name, (row, _) in rows.items()},
        })  # fmt: skip
    text = "\n\n".join([*blocks, *warnings])
    page = f"# Sweep\n\n{text}\n\nMeans over seeds, 95 % intervals (Student's).\n"
    distributed.first(lambda: write(folder / "table.md", page))
    distributed.first(lambda: write(folder / "sweep.json", json.dumps(document, indent=2) + "\n"))
    return text


def main() -> None:

    def work() -> dict[str, BaseException]:
        start.start()
        options, experiment, planned, folder = distributed.everywhere(parsed)
        command.agree("the sweep", planned)
        start.compile_for(planned[0].config.preset)
        distributed.first(lambda: config.make_folder(folder))
        failed = sweep(experiment, planned, folder, options.at_once)
        table = report(folder, planned)
        if distributed.is_first():
            say(f"{table}\n\nTable and runs: {folder}")
        return failed

    failed = command.guarded(work)
    for name, error in failed.items():
        if command.traced():
            traceback.print_exception(error)
        print(f"{distributed.name()}error: {name}: {error}", file=sys.stderr)
    if failed:
        mendable = all(isinstance(error, command.MENDABLE) for error in failed.values())
        raise SystemExit(BAD_INPUT if mendable else 1)


def parsed() -> tuple[Options, Experiment, list[Planned], Path]:
    """The sweep of the command line: its options, experiment, runs and folder."""
    config.check_words(sys.argv[1:])
    options, others = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    experiment = find(options.experiment)
    folder = options.output or Path("results") / "sweeps" / experiment.name / config.preset_of(others)
    return options, experiment, plan(experiment, options, others, folder), folder


if __name__ == "__main__":
    main()
