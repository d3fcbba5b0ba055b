"""Every experiment's contract: one command line, one folder of results.

An experiment is a frozen dataclass that extends `Config`, its `PRESETS`, and `run(config) -> Results`.  `main` gives it

    python -m experiments.<paper>.<table> --preset smoke|default|paper --seed N --output FOLDER --FIELD VALUE ...

and FOLDER gets `config.json`, `metrics.jsonl`, `results.json`, `table.md`, figures, and `checkpoints/`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jax
import tyro
from tabulate import tabulate
from tqdm import tqdm

from experiments import lock, runtime
from gendiff import command, distributed, together, training
from gendiff.checkpoint import Archive, CheckpointError
from gendiff.command import BAD_INPUT, INTERRUPTED, LOST, UNREAD
from gendiff.data import files
from gendiff.metrics.rates import Estimate

C = TypeVar("C", bound="Config")
T = TypeVar("T")


class Between(NamedTuple):
    """The range of an option, both ends allowed: `Annotated[int, Between(1, 20)]`; of a tuple, that of its numbers."""

    low: float
    high: float
    least: int = 1
    """The fewest numbers of a tuple."""

    def check(self, option: str, value: Any) -> None:
        """Raise ConfigError for a number outside (NaN is), or for too few numbers."""
        several = isinstance(value, tuple | list)
        if several and len(value) < self.least:
            raise ConfigError(f"{option} must have {self.least} or more numbers, got {len(value)}")
        for number in value if several else [value]:
            if not self.low <= number <= self.high:
                raise ConfigError(f"{option} must be {self.low} to {self.high}, got {number}")


class Distinct(NamedTuple):
    """Marks an option that is a list of one value or more, none twice: `Annotated[tuple[int, ...], Distinct()]`."""


class ConfigError(Exception):
    """An option out of its range, or a folder of another configuration (no ValueError: tyro would frame it)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of every experiment."""

    preset: str = "default"
    """smoke (seconds), default (minutes on two CPU cores) or paper (the paper's sizes, for an accelerator). The options
    below change single fields of the preset."""
    seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of the first run; further runs use the next numbers."""
    output: Path | None = None
    """Folder for the results; a run that was stopped goes on from there. Default:
    results/<experiment>/<preset>-<seed>."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            option, value = "--" + name.replace("_", "-"), getattr(self, name)
            if isinstance(value, Path):
                check_local(option, value)
            if get_origin(hint) is not Annotated:
                continue
            for limits in get_args(hint)[1:]:
                if isinstance(limits, Between) and value is not None:
                    limits.check(option, value)
                if isinstance(limits, Distinct):
                    check_distinct(option, value)


def check_local(option: str, path: Path) -> None:
    """Refuse addresses such as gs://bucket, as `files.local` does.

    Raises:
      ConfigError: it is one.
    """
    try:
        files.local(option, path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_distinct(option: str, values: Sequence[Any]) -> None:
    """Refuse an empty list, and one with a value twice, because its results would count twice.

    Raises:
      ConfigError: it is one of them.
    """
    if not values:
        raise ConfigError(f"{option} must have 1 or more values, got none")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ConfigError(f"{option} must name every value once, got {value} twice: leave one out")


def check_words(words: Sequence[str]) -> None:
    """Refuse an empty value of an option, which would be the current folder where a path is meant.

    Raises:
      ConfigError: a word of the command line has one.
    """
    option = "the command line"
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
        if word in ("", f"{option}="):
            raise ConfigError(f"{option} must have a value, got an empty one: leave it out")


def make_folder(path: Path) -> None:
    """Make the folder that `--output` names.

    Raises:
      ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output must be a folder, got {path} ({error.strerror}): name another one") from None


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


def parse(config: type[C], presets: Mapping[str, C], arguments: Sequence[str]) -> C:
    """The configuration of a command line: a preset, and every field as an option."""
    check_words(arguments)
    preset = preset_of(arguments)
    if preset not in presets:
        raise ConfigError(f"--preset: expected one of {', '.join(presets)}, given {preset}")
    module = sys.modules[config.__module__]
    return tyro.cli(config, default=presets[preset], args=list(arguments), description=module.__doc__)


def preset_of(arguments: Sequence[str]) -> str:
    """The name of the preset in a command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="default")
    return first.parse_known_args(arguments)[0].preset


OURS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""How errors of JAX begin that are no other process's: memory, above all."""
ASKED_FOR = distributed.Preempted, SystemExit, KeyboardInterrupt, BrokenPipeError
"""Ends that are no errors."""
MENDABLE = (
    ConfigError, CheckpointError, ValueError, FloatingPointError, OSError,
    distributed.StartError, distributed.Disagreement, distributed.Elsewhere,
)  # fmt: skip


def main(config: type[C], presets: Mapping[str, C], run: Callable[[C], Results]) -> None:
    """The command line of an experiment."""

    def work() -> None:
        runtime.start()
        given = distributed.everywhere(lambda: parse(config, presets, sys.argv[1:]))
        agree("the configuration", given)
        results = run(given)
        if distributed.is_first():
            command.say(f"{results.table}\n\nResults, figures and checkpoints: {results.folder}")

    guarded(work)


def agree(what: str, given: Any) -> None:
    """Compares over the processes what they were asked for, and their code.

    Raises:
      distributed.Disagreement: on all of them.
    """
    if jax.process_count() > 1:
        distributed.agree(what, repr(given))
        distributed.agree("the code", code())


def guarded(work: Callable[[], T]) -> T:
    """`work()`; what goes wrong in it is one line, and an exit status of its own."""
    try:
        return work()
    except BaseException as error:
        end(error)
        raise


def end(error: BaseException) -> None:
    """Ends the process for an error; returns where Python ends a process alone for one that only a traceback tells."""
    known = said(error)
    if known is None and not distributed.joined():  # else Python would wait for the others, and they for this one
        return
    if known is None or (traced() and not isinstance(error, ASKED_FOR)):
        traceback.print_exception(error)
    leave(*(known or ("", 1)))


def side_by_side(works: Sequence[Callable[[], T]], note: Callable[..., None] = lambda *_: None) -> list:
    """`together.runs`.  Of several processes, what may have failed on one alone ends the job, since the others would
    wait for it in their next collective."""

    def alone(work: Callable[[], T]) -> T:
        try:
            return work()
        except (training.NotFinite, distributed.Preempted):  # of what all of them have
            raise
        except BaseException as error:
            if jax.process_count() > 1:
                end(error)
            raise

    return together.runs([functools.partial(alone, work) for work in works], note)


def said(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status of what went wrong; None where only a traceback helps."""
    if isinstance(error, SystemExit) and distributed.joined():  # of the command line: --help, an unknown option
        return ("", error.code or 0) if isinstance(error.code, int | None) else (str(error.code), 1)
    if isinstance(error, distributed.Preempted):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return f"{command.stopped_by(signal.SIGINT)}: what was stored is complete", INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `| head -1`: nobody reads it
        return "", UNREAD
    if isinstance(error, MENDABLE):
        return f"error: {error}" + ("" if traced() else "\n(GENDIFF_TRACEBACK=1 shows where)"), BAD_INPUT
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        reason = str(error).strip().splitlines()[0][:200]
        if reason.startswith(OURS):
            return f"error: {reason}", BAD_INPUT
        return f"error: another process of the run was lost: start all of them again ({reason})", LOST
    return None


def traced() -> bool:
    """Whether errors are shown with where they come from."""
    return bool(os.environ.get("GENDIFF_TRACEBACK"))


def leave(message: str, status: int) -> NoReturn:
    """Ends the process."""
    if message:
        tqdm.write(f"{distributed.name()}{message}", file=sys.stderr)  # beside a bar, on a line of its own
        sys.stderr.flush()
    if distributed.joined():  # at its end Python would wait for the other processes
        sys.stdout.flush()
        if distributed.is_first():  # theirs ends with this one, which they all listen to: let them speak
            time.sleep(1.0)
        os._exit(status)
    raise SystemExit(status) from None


class Folder:
    """The folder of one run: opened, checked against the configuration, and written to without half-written files."""

    def __init__(self, experiment: str, config: Config) -> None:
        self.experiment, self.config = experiment, config
        self.path = config.output or Path("results") / experiment / f"{config.preset}-{config.seed}"
        distributed.first(self._open)
        self.archive = Archive(self.path / "checkpoints")

    def _open(self) -> None:
        make_folder(self.path)
        self._is_ours()
        try:
            lock.take(self.path)
        except lock.Taken as holder:
            raise ConfigError(
                f"--output must be a folder that no other run uses, got {self.path}: wait for it, or name another "
                f"folder ({holder})"
            ) from None
        self._is_ours()  # again, because another run may have come between
        text = json.dumps({"experiment": self.experiment} | _fields(self.config), indent=2) + "\n"
        (self.path / "checkpoints").mkdir(exist_ok=True)
        for name in CONFIGS:
            if _stored(self.path / name) != json.loads(text):
                write(self.path / name, text)

    def _is_ours(self) -> None:
        own = (lock.NAME, "checkpoints") if not any(self.path.glob("checkpoints/*")) else (lock.NAME,)
        if not self.check(self.path, self.experiment, self.config) and any(
            each.name not in own and not each.name.endswith(".tmp") for each in self.path.iterdir()
        ):
            raise ConfigError(
                f"--output must be an empty folder or one of this experiment, got {self.path}, where neither "
                "config.json nor its copy in checkpoints can be read: name another folder, or empty this one"
            )

    @staticmethod
    def check(path: Path, experiment: str, config: Config) -> bool:
        """Whether the folder holds a run of this experiment with this configuration; False where it holds none.

        The configuration stands beside the checkpoints, in config.json, and in results.json.  The first of them that
        can be read counts, so that a damaged config.json does not part a run from its checkpoints.

        Raises:
          ConfigError: it holds another one.
        """
        held = [found for name in CONFIGS if (found := _stored(path / name)) is not None][:1]
        if not held and (results := _stored(path / "results.json")) and isinstance(results.get("config"), dict):
            held = [results["config"] | {"experiment": results.get("experiment"), "output": None}]
        fields = {"experiment": experiment} | _fields(config)
        for each in held:
            names = sorted({name for name in {*each, *fields} if each.get(name) != fields.get(name)})
            if names:
                changes = "; ".join(f"{name}: expected {each.get(name)}, given {fields.get(name)}" for name in names)
                raise ConfigError(f"--output: {path} holds another configuration ({changes}): name another folder")
        return bool(held)

    def _check_there(self) -> None:
        """Raise OSError if the folder is no longer the one that the run began in."""
        if lock.lost(self.path) or not (self.path / "config.json").exists():
            raise OSError(
                f"{self.path} must stay as it is during the run, but it was removed or replaced: empty the folder and "
                "run the same command again"
            )

    def write(self, name: str, text: str) -> None:
        """Writes a whole file or leaves the old one; the first process does."""

        def first() -> None:
            self._check_there()
            write(self.path / name, text)

        distributed.first(first)

    def log(self, **values: Any) -> None:
        """Appends one line to metrics.jsonl; the first process does."""
        distributed.first(lambda: self.append(**values))

    def append(self, **values: Any) -> None:
        """`log` of one process alone."""
        self._check_there()
        lock.touch(self.path)
        path = self.path / "metrics.jsonl"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        with writing(path), os.fdopen(files.descriptor(path, flags), "ab+") as file:
            # A line that a full disk cut off must not swallow this one.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(_jsonable(values)).encode() + b"\n")

    def finish(self, rows: list[Row], columns: Sequence[Column], notes: str = "") -> Results:
        """Writes results.json and table.md, and returns them."""
        table = f"{_table(rows, columns)}\n\n{notes}".strip()
        document = {
            "experiment": self.experiment,
            "commit": commit(),
            "device": runtime.device(),
            "processes": jax.process_count(),
            "config": dataclasses.asdict(self.config),
            "rows": [
                {
                    "name": row.name,
                    "metrics": {name: estimate._asdict() for name, estimate in row.metrics.items()},
                    "paper": row.paper,
                }
                for row in rows
            ],
        }
        self.write("results.json", json.dumps(_jsonable(document), indent=2, allow_nan=False) + "\n")
        self.write("table.md", f"# {self.experiment}, preset {self.config.preset}\n\n{table}\n")
        distributed.first(self._check_there)
        lock.release(self.path)
        return Results(rows, self.path, table)


CONFIGS = ("checkpoints/config.json", "config.json")
"""The configuration beside its checkpoints, from which the one of the folder is written again if it is lost."""


def _stored(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or a damaged one."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def write(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one."""
    with writing(path):
        files.store_text(path, text)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in it is told of the file."""
    try:
        yield
    except OSError as error:
        kept = "; checkpoints are kept" if path.parent.exists() else ""
        raise OSError(f"{path}: could not be written ({error.strerror}){kept}") from None


class Progress:
    """One bar a phase, with rate and remaining time; every report also goes to metrics.jsonl.

    A report is also a place where a run can stop after a notice of preemption: all processes make the same ones.
    """

    bars = True
    """Whether bars are drawn, of all runs of this process."""

    def __init__(self, folder: Folder, prefix: str = "") -> None:
        self.folder, self.prefix, self.phase = folder, prefix, ""
        self.bar: tqdm | None = None

    def __call__(self, phase: str, done: int, of: int, metrics: Mapping[str, float]) -> None:
        distributed.stop_if_preempted("every checkpoint and every phase that was finished")
        distributed.first(lambda: self._show(phase, done, of, metrics))

    def alone(self, phase: str, of: int) -> Callable[[int], None]:
        """Reports of what one process does while the others wait (`distributed.first`): it cannot ask them anything."""

        def report(done: int) -> None:
            distributed.stop_if_noticed("every part that was finished")
            self._show(phase, min(done, of), of, {})

        return report

    def _show(self, phase: str, done: int, of: int, metrics: Mapping[str, float]) -> None:
        self.folder.append(time=round(time.time(), 1), phase=self.prefix + phase, done=done, of=of, **metrics)
        if phase != self.phase or self.bar is None:
            self.close()
            self.phase = phase
            self.bar = tqdm(
                total=of, initial=done, desc=self.prefix + phase, mininterval=0.5, dynamic_ncols=True,
                disable=not self.bars,
            )  # fmt: skip
        self.bar.update(min(done, of) - self.bar.n)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
        if done >= of:
            self.close()

    def close(self) -> None:
        """Ends the current bar."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.phase = None, ""


def _table(rows: list[Row], columns: Sequence[Column]) -> str:
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


def _fields(config: Config) -> dict[str, Any]:
    return _jsonable(dataclasses.asdict(config) | {"output": None})


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def commit() -> str:
    """The commit of the code, with "+changes" where the working tree differs from it."""
    try:
        return _git("rev-parse", "HEAD").strip() + ("+changes" if _git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code() -> str:
    """The commit, and what the working tree changes in it: two that run the same code have the same."""
    try:
        return commit() + _git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return commit()


def _git(*words: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout
