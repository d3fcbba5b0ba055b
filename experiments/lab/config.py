"""The configuration of an experiment: a frozen dataclass with groups, presets, and a command line.

    --preset smoke --seed 3 --baseline.steps 500 --classifier.rate 1e-3

An experiment's options are the fields of its `Config`.  A field that is a dataclass, such as `Training`, is a group.
`Annotated[int, Between(1, 20)]` gives an option its range.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro

from gendiff import training
from gendiff.data import files

C = TypeVar("C", bound="Config")
T = TypeVar("T")


class Between(NamedTuple):
    """The inclusive range of an option, or of every number of a tuple."""

    low: float
    high: float
    least: int = 1
    """The fewest numbers of a tuple."""

    def check(self, option: str, value: Any) -> None:
        """Raise ConfigError for a number outside, also NaN, or for too few numbers."""
        numbers = value if isinstance(value, tuple | list) else [value]
        if len(numbers) < self.least:
            raise ConfigError(f"{option} must have {self.least} or more numbers, got {len(numbers)}")
        for number in numbers:
            if not self.low <= number <= self.high:
                raise ConfigError(f"{option} must be {self.low} to {self.high}, got {number}")


class Distinct(NamedTuple):
    """Mark an option as a list of one or more different values: `Annotated[tuple[int, ...], Distinct()]`."""


class ConfigError(Exception):
    """An option out of its range, or a folder of another configuration (no ValueError, because tyro would frame it)."""


class SameProgram(NamedTuple):
    """Mark an option as an argument of compiled programs: runs that differ in it alone share their programs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of every experiment."""

    preset: str = "default"
    """smoke (under a minute), default (minutes on two CPU cores) or paper (the paper's sizes, for accelerators). Other
    options change single fields of the preset."""
    seed: Annotated[int, Between(0, 2**31 - 1), SameProgram()] = 0
    """Seed of the first run; further runs take the next numbers."""
    output: Annotated[Path | None, SameProgram()] = None
    """Folder of the results, from which a stopped run continues. Default: results/<experiment>/<preset>-<seed>."""

    def __post_init__(self) -> None:
        for name, marks, value in options(self):
            option = "--" + name.replace("_", "-")
            if isinstance(value, Path):
                check_local(option, value)
            for limits in marks:
                if isinstance(limits, Between) and value is not None:
                    limits.check(option, value)
                if isinstance(limits, Distinct):
                    check_distinct(option, value)


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of a network."""

    steps: Annotated[int, Between(1, 100_000_000)] = 1000
    """Training steps, at most."""
    batch: Annotated[int, Between(1, 1_000_000)] = 64
    """Examples in a step."""
    rate: Annotated[float, Between(1e-7, 1.0)] = 1e-3
    """Learning rate."""

    def settings(self, decay: float, every: int, warmup: int, **others: Any) -> training.Settings:
        """The settings of `training.train`, with `every` and `warmup` reduced where the steps are few."""
        return training.Settings(
            self.steps, self.rate, decay, min(every, self.steps), warmup=min(warmup, self.steps // 5), **others,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Validated(Training):
    """The training of a network, validated on held-out examples."""

    patience: Annotated[int | None, Between(10, 100_000_000)] = None
    """Steps without a better validation loss after which training stops; default: it never stops early."""

    def settings(self, decay: float, every: int, warmup: int, **others: Any) -> training.Settings:
        return super().settings(decay, every, warmup, patience=self.patience, **others)


@dataclasses.dataclass(frozen=True)
class Scheduled(Training):
    """The training of a network whose schedule is an option."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of the learning rate."""

    def settings(self, decay: float, every: int = 0, warmup: int = 0, **others: Any) -> training.Settings:
        """The settings of `training.train`; by default a checkpoint every 100 steps or every fiftieth of the steps."""
        every = every or max(100, self.steps // 50)  # so that long runs of large models do not write all the time
        return super().settings(decay, every, warmup, schedule=self.schedule, **others)


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, tuple, Any]]:
    """(name, marks of its annotation, value) of every option; an option of a group is `group.option`."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        hint, value, name = hints[field.name], getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{name}.")
        else:
            yield name, get_args(hint)[1:] if get_origin(hint) is Annotated else (), value


def replaced(config: T, changes: Mapping[str, Any]) -> T:
    """The configuration with other values; an option of a group is `group.option`, and lists become tuples."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        group, dot, option = name.partition(".")
        if dot:
            values[group] = replaced(values.get(group, getattr(config, group)), {option: value})
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def of_program(config: Config) -> tuple:
    """A key of the compiled programs: configurations with equal keys share them all."""
    marked = lambda marks: any(isinstance(mark, SameProgram) for mark in marks)
    return type(config), tuple((name, value) for name, marks, value in options(config) if not marked(marks))


def check_local(option: str, path: Path) -> None:
    """Raise ConfigError for an address such as gs://bucket, as `files.local` does."""
    try:
        files.local(option, path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_distinct(option: str, values: Sequence[Any]) -> None:
    """Raise ConfigError for an empty list, or a value that occurs twice and whose results would count twice."""
    if not values:
        raise ConfigError(f"{option} must have 1 or more values, got none")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ConfigError(f"{option} must name every value once, got {value} twice: leave one out")


def check_words(words: Sequence[str]) -> None:
    """Raise ConfigError for an empty value of an option, because an empty path means the current folder."""
    option = "the command line"
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
        if word in ("", f"{option}="):
            raise ConfigError(f"{option} must have a value, got an empty value: leave it out")


def make_folder(path: Path) -> None:
    """Make the folder of `--output`; raise ConfigError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output must be a folder, got {path} ({error.strerror}): name another one") from None


def parse(config: type[C], presets: Mapping[str, C], arguments: Sequence[str]) -> C:
    """The configuration of a command line: a preset, changed by options.

    Raises:
      ConfigError: a value is empty, no such preset exists, or an option is out of range.
    """
    check_words(arguments)
    preset = preset_of(arguments)
    if preset not in presets:
        raise ConfigError(f"--preset must be one of {', '.join(presets)}, got {preset}")
    module = sys.modules[config.__module__]
    return tyro.cli(config, default=presets[preset], args=list(arguments), description=module.__doc__)


def preset_of(arguments: Sequence[str]) -> str:
    """The name of the preset in a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="default")
    return parser.parse_known_args(arguments)[0].preset
