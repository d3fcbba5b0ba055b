"""Every number that an experiment can be told has a range, and what is outside is one error."""

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from experiments import sweep
from experiments.lab import command
from experiments.lab.config import Between, Config, ConfigError, options
from experiments.lab.experiment import find

PAPERS = ("genneg.checkerboard", "genneg.traffic", "censoring.mnist", "relative_reward.maze2d")
OTHERS = (
    "censoring.oracle",
    *(f"speed.{name}" for name in ("genneg", "censoring", "traffic", "relative_reward", "mesh", "input")),
)


def presets(name: str) -> dict[str, Config]:
    return importlib.import_module(f"experiments.{name}").PRESETS


def ranges(config: Any, prefix: str = "") -> dict[str, tuple[Any, Between]]:
    """Each option with a number in it, those of groups too: its type and its range.  An option of a kind that this test
    does not see into is an error."""
    found = {}
    for field, hint in get_type_hints(type(config), include_extras=True).items():
        name, value = prefix + field, getattr(config, field)
        limits = [mark for mark in get_args(hint)[1:] if isinstance(mark, Between)]
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(value):
            found |= ranges(value, f"{name}.")
        elif limits:
            found[name] = kind, limits[0]
        else:
            assert kind in (str, bool, Path | None) or get_origin(kind) is Literal or name == "mazes", (name, hint)
    return found


def replaced(config: Any, option: str, value: Any) -> Any:
    """The configuration with another value of an option, which may be of a group."""
    field, dot, inner = option.partition(".")
    return dataclasses.replace(config, **{field: replaced(getattr(config, field), inner, value) if dot else value})


def outside(kind: Any, limits: Between) -> list[Any]:
    numbers: list[float] = [math.nan, math.inf, -math.inf, limits.low - 1, limits.high + 1, -1, 10**30]
    numbers += [0] if limits.low > 0 else []
    numbers = [number for number in numbers if not limits.low <= number <= limits.high]
    if get_origin(kind) is not tuple:
        return numbers
    return [(*[limits.high] * place, number) for number in numbers for place in (0, 2)] + [()] * (limits.least > 0)


@pytest.mark.parametrize("name", [*PAPERS, *OTHERS])
def test_every_number_out_of_range_is_one_error(name: str) -> None:
    config = presets(name)["default"]
    checked = 0
    for field, (kind, limits) in ranges(config).items():
        for value in outside(kind, limits):
            with pytest.raises(ConfigError) as caught:
                replaced(config, field, value)
            assert str(caught.value).startswith(f"--{field.replace('_', '-')} must "), value
            assert "\n" not in str(caught.value)
            checked += 1
    assert checked >= 5 * len(list(options(config))) / 2


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("genneg.checkerboard", ["--baseline.patience", "-1"], "--baseline.patience must be 10 to 100000000, got -1"),
        ("genneg.traffic", ["--eta", "nan"], "--eta must be 0.0 to 1.0, got nan"),
        ("genneg.traffic", ["--eta", "5"], "--eta must be 0.0 to 1.0, got 5.0"),
        ("genneg.traffic", ["--seed", "-1"], "--seed must be 0 to 2147483647, got -1"),
        ("censoring.mnist", ["--training.rate", "inf"], "--training.rate must be 1e-07 to 1.0, got inf"),
        ("censoring.mnist", ["--guidance.sweep", "1", "nan"], "--guidance.sweep must be 1e-06 to 1000.0, got nan"),
        ("censoring.mnist", ["--resnet.widths"], "--resnet.widths must have 1 or more numbers, got 0"),
        ("relative_reward.maze2d", ["--rewards.rate", "2"], "--rewards.rate must be 1e-07 to 1.0, got 2.0"),
        ("relative_reward.maze2d", ["--decay", "2"], "--decay must be 0.0 to 0.99999, got 2.0"),
        ("relative_reward.maze2d", ["--multipliers", "1", "0"], "--multipliers must be 1 to 64, got 0"),
        ("relative_reward.maze2d", ["--mazes"], "--mazes must have 1 or more values, got none"),
    ],
)
def test_a_command_says_it_in_one_line_with_status_2(
    name: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.lab.start.start", lambda: None)
    monkeypatch.setattr("sys.argv", ["experiment", *words])
    known = presets(name)
    with pytest.raises(SystemExit) as left:
        command.main(type(known["default"]), known, lambda config: pytest.fail("it ran"))
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {said}", "(GENDIFF_TRACEBACK=1 shows where)"]


def test_a_value_of_a_grid_out_of_range_is_the_same_error(tmp_path: Path) -> None:
    what = find("genneg.checkerboard")
    for value in ("nan", "-1", "1001"):
        with pytest.raises(ConfigError, match=f"--guidance-scale must be 0.0 to 1000.0, got {float(value)}"):
            sweep.plan(what, sweep.Options(what.name, "0:1", (f"guidance_scale={value}",)), [], tmp_path)
