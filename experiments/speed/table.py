"""What all speed tables share: two sides in processes of their own, compared, then timed in turns.

A table names its `Sides` and its rows; `measure` starts the workers with empty compile caches, refuses to time sides
whose answers differ, and calls every program once in each repetition; `finish` writes the table.  Programs are named
"row/variant", and the row `matmul`, a product of two large square matrices, measures the peak.
"""

import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr

from experiments.lab.config import Between, Config
from experiments.lab.folder import Folder
from experiments.lab.progress import Progress
from experiments.lab.table import Column, Results, Row
from experiments.speed.worker import Worker
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.nets import conv

POINTWISE = 1e-4
"""Largest difference between the sides over the largest answer, where `Sides` says nothing else."""


@dataclasses.dataclass(frozen=True)
class TimedConfig(Config):
    """The options of every speed table."""

    repetitions: Annotated[int, Between(1, 10_000)] = 5
    """Timed calls of each program."""
    matmul: Annotated[int, Between(16, 65_536)] = 2048
    """Rows and columns of the large product that measures the peak."""
    rivals: Literal["all", "eager", "none"] = "all"
    """What to measure beside gendiff; `torch.compile` takes most of the time of a run."""


class Work(NamedTuple):
    """What a call of a row's programs does."""

    flops: float
    """Of one unit, such as a batch of samples, a training step or a product."""
    items: int
    """Samples of one unit."""
    units: int = 1
    """In a call."""
    rivals: tuple[str, ...] = ()
    """The programs beside gendiff's."""


class Sides(NamedTuple):
    """The modules of both workers and what they are told."""

    ours: str
    rival: str
    setup: dict[str, Any]
    """For both; the rival is told as well what ours answers."""
    extra: dict[str, Any] = {}  # noqa: RUF012 (immutable use)
    """For the rival alone."""
    tolerance: Mapping[str, float] = {}
    """Largest differences of single answers, relative to the largest value."""


class Measured(NamedTuple):
    """What a run measured; programs are named "row/variant"."""

    seconds: dict[str, np.ndarray]
    """Of each repetition, for one call's work."""
    first: dict[str, float]
    """Of the first call, which compiles."""
    warm: dict[str, float]
    """Of gendiff's first calls in a second process."""
    errors: dict[str, float]
    """How far the sides' answers differ, relative to the largest answer."""
    missing: list[str]
    """What could not be measured, and why."""


SPEED = (
    Column("seconds", "gendiff s", digits=4),
    Column("samples_per_second", "samples / s", digits=0),
    Column("gflops_per_second", "GF/s", digits=1),
    Column("peak_share", "% of peak", percent=True, digits=1),
    Column("roofline_seconds", "roofline s", digits=4),
    Column("eager_seconds", "eager s", digits=4),
    Column("eager_ratio", "eager / gendiff", digits=2),
)
COMPILED = (
    Column("compiled_seconds", "compiled s", digits=4),
    Column("compiled_ratio", "compiled / gendiff", digits=2),
    Column("compile_seconds", "compile s", digits=2),
    Column("warm_compile_seconds", "compile s, cached", digits=2),
    Column("compiled_compile_seconds", "torch.compile s", digits=1),
)


def rivals(config: TimedConfig, eager: tuple[str, ...] = ("eager",), compiled: bool = True) -> tuple[str, ...]:
    """The programs of a row beside gendiff's: the eager ones, and "compiled" where it is asked for and there."""
    if config.rivals == "none":
        return ()
    return (*eager, "compiled") if config.rivals == "all" and compiled else eager


def product(config: TimedConfig) -> Work:
    """The row `matmul`."""
    return Work(2.0 * config.matmul**3, config.matmul, rivals=rivals(config, compiled=False))


def measure(config: TimedConfig, sides: Sides, rows: Mapping[str, Work], folder: Folder) -> Measured:
    """Starts the workers with empty compile caches, compares their answers, and times their programs."""
    progress = Progress(folder)
    missing: list[str] = []
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(Path(cache) / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "torch"),
        }
        with ExitStack() as stack:
            ours = stack.enter_context(Worker(sides.ours, sides.setup, environment))
            rival = None
            if config.rivals != "none" and importlib.util.find_spec("torch") is None:
                missing.append("PyTorch is not installed, so its columns are empty: `pip install -e .[speed]`.")
            elif config.rivals != "none":
                told = sides.setup | ours.answers | sides.extra
                rival = stack.enter_context(Worker(sides.rival, told, environment))
                errors = compare(ours.answers["answers"], rival.answers, sides.tolerance)
            programs = {}
            for name, work in rows.items():
                programs[f"{name}/gendiff"] = ours
                if rival is not None:
                    programs |= {f"{name}/{variant}": rival for variant in work.rivals}
            first, failed = first_calls(programs, progress)
            missing += failed
            seconds = repeat({name: programs[name] for name in first}, config.repetitions, progress)
        with Worker(sides.ours, sides.setup, environment) as second:
            warm = {name: second.seconds(f"{name}/gendiff") for name in rows}
    return Measured(seconds, first, warm, errors, missing)


def compare(
    ours: Mapping[str, np.ndarray], rival: Mapping[str, np.ndarray], tolerance: Mapping[str, float]
) -> dict[str, float]:
    """Largest difference of each answer, relative to the largest value of the answer.

    Raises:
      ValueError: they differ by more than rounding, so the sides do not compute the same thing.
    """
    errors = {}
    for name, ours_value in ours.items():
        scale = np.abs(ours_value).max()
        errors[name] = float(np.abs(ours_value - rival[name]).max() / scale)
        limit = tolerance.get(name, POINTWISE)
        if not errors[name] <= limit:  # also where one is not a number
            raise ValueError(f"speed: {name}: expected PyTorch to agree to {limit:g}, given {errors[name]:.2g}")
    return errors


def first_calls(programs: Mapping[str, Worker], progress: Progress) -> tuple[dict[str, float], list[str]]:
    """Seconds of the first calls, and why `torch.compile` failed where it did: its programs are then left out."""
    seconds, reasons = {}, []
    for i, (name, worker) in enumerate(programs.items()):
        try:
            seconds[name] = worker.seconds(name)
        except ChildProcessError as error:
            if not name.endswith("/compiled") or worker.process.poll() is not None:
                raise
            reasons.append(f"torch.compile could not be measured: {error}")
        progress("compile", i + 1, len(programs), {})
    return seconds, list(dict.fromkeys(reasons))


def repeat(programs: Mapping[str, Worker], repetitions: int, progress: Progress) -> dict[str, np.ndarray]:
    """Seconds of each program in each repetition, after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(repetitions + 1):
        for name, worker in programs.items():
            seconds[name].append(worker.seconds(name))
        progress("measure", i, repetitions, {})
        progress.folder.log(repetition=i, seconds={name: values[-1] for name, values in seconds.items()})
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def finish(
    folder: Folder,
    rows: Mapping[str, Work],
    measured: Measured,
    columns: Sequence[Column],
    notes: str,
    more: Mapping[str, dict[str, Estimate]] = {},
) -> Results:
    """Writes the table.

    Args:
      notes: a template of the configuration's fields and of `peak`, in GF/s.
      more: further metrics of single rows.
    """
    products = [seconds for name, seconds in measured.seconds.items() if name.startswith("matmul/")]
    peak = rows["matmul"].flops / min(seconds.min() for seconds in products)
    table = [Row(name, metrics(name, work, measured, peak) | more.get(name, {})) for name, work in rows.items()]
    same = ", ".join(f"{name} {error:.0e}" for name, error in measured.errors.items())
    parity = [f"Largest differences of the sides, relative to the largest answer: {same}."] if same else []
    text = notes.format(**dataclasses.asdict(folder.config), peak=peak / 1e9)
    return folder.finish(table, columns, "\n".join([text, *parity, *measured.missing]))


def metrics(name: str, work: Work, measured: Measured, peak: float) -> dict[str, Estimate]:
    """The metrics of a row; what was not measured is left out."""
    ours = measured.seconds[f"{name}/gendiff"] / work.units
    rate = work.flops / ours
    row = {
        "seconds": spread(ours),
        "samples_per_second": spread(work.items / ours),
        "gflops_per_second": spread(rate / 1e9),
        "peak_share": spread(rate / peak),
        "roofline_seconds": rates.exact(work.flops / peak),
        "compile_seconds": beyond(measured.first[f"{name}/gendiff"], measured.seconds[f"{name}/gendiff"]),
        "warm_compile_seconds": beyond(measured.warm[name], measured.seconds[f"{name}/gendiff"]),
    }
    for variant in work.rivals:
        seconds = measured.seconds.get(f"{name}/{variant}")
        if seconds is None:
            continue
        row[f"{variant}_seconds"] = spread(seconds / work.units)
        row[f"{variant}_ratio"] = spread(seconds / work.units / ours)
        if variant == "compiled":
            row["compiled_compile_seconds"] = beyond(measured.first[f"{name}/{variant}"], seconds)
    return row


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """2 for each multiply-add of the convolutions and matrix products of a function without loops."""
    return counted(jax.make_jaxpr(function)(*arguments).jaxpr)


def counted(jaxpr: Jaxpr) -> float:
    """The same for a traced function."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [getattr(variable.aval, "shape", ()) for variable in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2.0 * math.prod(shapes[2]) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive in (conv.correlate_p, conv.spread_p, conv.gather_p):
            # The kernel (m, *window, i, o) and the map (m, n, *positions, o), whichever of the three is the result.
            kernel, positions = {
                conv.correlate_p: (shapes[1], shapes[2]),
                conv.spread_p: (shapes[1], shapes[0]),
                conv.gather_p: (shapes[2], shapes[1]),
            }[equation.primitive]
            total += 2.0 * math.prod(positions) * math.prod(kernel[1:-1])
        else:
            inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
            total += sum(counted(each) for each in inner if isinstance(each, Jaxpr))
    return total


def spread(values: np.ndarray) -> Estimate:
    """Median, smallest and largest of the repetitions."""
    return Estimate(float(np.median(values)), float(values.min()), float(values.max()), len(values))


def beyond(first: float, seconds: np.ndarray) -> Estimate:
    """What the first call took beyond the others."""
    return rates.exact(max(0.0, first - float(np.median(seconds))))
