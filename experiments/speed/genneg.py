"""Speed of guided sampling and of a training step: gendiff beside the same networks in PyTorch.

Both frameworks run in processes of their own, one at a time and interleaved, repetition by repetition: PyTorch eager,
eager in chunks that fit the cache, and `torch.compile`. Before anything is timed, both must give the same answers. The
figures mean something on a quiet machine only; `pip install -e .[speed]` installs PyTorch.

Work is counted in matrix products, 2 a b FLOPs for a product of a row with an (a, b) matrix, and nothing else. A
network of width w, depth L and f Fourier frequencies, from d to o numbers, has per row and evaluation

    forward  2 (d f + (d + 2 f) w + 2 L w^2 + w o)

and its gradient in the input as much again. One noise level, so one time embedding, serves a whole step of a sampler:

    sampling, per sample   (2 steps - 1) (denoiser + 2 K classifier)
    training, per point    forward + products of all gradients, with a time embedding a point

`peak` is the fastest product of two large square matrices that JAX or PyTorch did in the same run, and `roofline` the
time of the work at that rate.
"""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments.contract import Between, Column, Config, Folder, Progress, Results, Row, main
from experiments.genneg import checkerboard
from experiments.genneg.checkerboard import CheckerboardConfig
from experiments.speed.worker import Worker
from gendiff.metrics import rates
from gendiff.metrics.rates import Estimate
from gendiff.nets.mlp import MLPClassifier, ResidualMLP

OURS, RIVAL = "experiments.speed.ours", "experiments.speed.rival"
TIME_FEATURES = 32
"""Of the noise level, in both networks."""
PRODUCTS = 20
"""Skinny products timed together."""
TOLERANCE = {"samples": 1e-3}
"""Largest difference between the sides over the largest answer; 18 steps amplify what one evaluation rounds."""
POINTWISE = 1e-4
"""The same for all other answers."""


@dataclasses.dataclass(frozen=True)
class SpeedConfig(Config):
    """The sizes; by default those of the checkerboard experiment."""

    samples: Annotated[int, Between(1, 100_000_000)] = 10_000
    """Samples drawn at a time."""
    sampler_steps: Annotated[int, Between(2, 10_000)] = CheckerboardConfig.sampler_steps
    """Heun steps."""
    classifiers: tuple[int, ...] = (0, 1, 5)
    """Numbers K of classifiers, a row each."""
    points: Annotated[int, Between(1, 100_000_000)] = 1000
    """Batch of a training step."""
    train_steps: Annotated[int, Between(1, 100_000)] = 50
    """Training steps timed together."""

    width: Annotated[int, Between(8, 4096)] = CheckerboardConfig.width
    """Width of the denoiser."""
    depth: Annotated[int, Between(1, 64)] = CheckerboardConfig.depth
    """Residual blocks of the denoiser."""
    classifier_width: Annotated[int, Between(8, 4096)] = CheckerboardConfig.classifier_width
    """Width of a classifier."""
    classifier_depth: Annotated[int, Between(1, 64)] = CheckerboardConfig.classifier_depth
    """Residual blocks of a classifier."""

    repetitions: Annotated[int, Between(1, 10_000)] = 5
    """Timed calls of each program."""
    matmul: Annotated[int, Between(16, 65_536)] = 2048
    """Rows and columns of the large product that measures the peak."""
    chunk: Annotated[int, Between(1, 100_000_000)] = 2000
    """Samples at a time of the chunked PyTorch sampler."""
    rivals: Literal["all", "eager", "none"] = "all"
    """What to measure beside gendiff; `torch.compile` takes most of the time of a run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classifiers or min(self.classifiers) < 0 or max(self.classifiers) > 64:
            raise ValueError(f"--classifiers: expected numbers from 0 to 64, given {self.classifiers}")


PRESETS = {
    "smoke": SpeedConfig(
        preset="smoke", samples=200, sampler_steps=4, classifiers=(0, 1), points=50, train_steps=3, width=16,
        depth=1, classifier_width=16, classifier_depth=1, repetitions=2, matmul=128, chunk=100, rivals="eager",
    ),
    "default": SpeedConfig(),
    "paper": SpeedConfig(preset="paper", samples=100_000, repetitions=7),
}  # fmt: skip

COLUMNS = (
    Column("seconds", "gendiff s", digits=4),
    Column("samples_per_second", "samples / s", digits=0),
    Column("gflops_per_second", "GF/s", digits=1),
    Column("peak_share", "% of peak", percent=True, digits=1),
    Column("roofline_seconds", "roofline s", digits=4),
    Column("eager_seconds", "eager s", digits=4),
    Column("eager_ratio", "eager / gendiff", digits=2),
    Column("chunked_ratio", "chunked / gendiff", digits=2),
    Column("compiled_seconds", "compiled s", digits=4),
    Column("compiled_ratio", "compiled / gendiff", digits=2),
    Column("compile_seconds", "compile s", digits=2),
    Column("warm_compile_seconds", "compile s, cached", digits=2),
    Column("compiled_compile_seconds", "torch.compile s", digits=1),
)
NOTES = """\
Median [smallest, largest] of {repetitions} interleaved calls; ratios are of calls of the same repetition. `matmul` is
a product of two {matmul} x {matmul} matrices, `skinny` of ({samples} x {width}) and ({width} x {width}), both by JAX
and by PyTorch eager; peak: {peak:.1f} GF/s. `train-step`: one step on {points} points, Adam with clipped gradients and
an average of the weights. chunked: PyTorch eager, {chunk} samples at a time. compile: the first call less the median,
of gendiff with an empty compile cache and in a second process with the first one's, and of `torch.compile` with empty
caches."""


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


def run(config: SpeedConfig) -> Results:
    """Compares the sides, times them, and writes the table; nothing is kept from an earlier run."""
    folder = Folder("speed.genneg", config)
    with tempfile.TemporaryDirectory() as cache:
        measured = measure(config, Path(cache), Progress(folder))
    products = [seconds for name, seconds in measured.seconds.items() if name.startswith("matmul/")]
    peak = work(config, "matmul") / min(seconds.min() for seconds in products)
    rows = [table_row(config, name, measured, peak) for name in row_names(config)]
    same = ", ".join(f"{name} {error:.0e}" for name, error in measured.errors.items())
    parity = [f"Largest differences of the sides, relative to the largest answer: {same}."] if same else []
    notes = NOTES.format(**dataclasses.asdict(config), peak=peak / 1e9)
    return folder.finish(rows, COLUMNS, "\n".join([notes, *parity, *measured.missing]))


def row_names(config: SpeedConfig) -> list[str]:
    """The rows of the table."""
    return [*(f"sample-k{members}" for members in config.classifiers), "train-step", "matmul", "skinny"]


def variants(config: SpeedConfig, name: str) -> list[str]:
    """The programs of a row beside gendiff's."""
    if config.rivals == "none":
        return []
    chunked = ["chunked"] if name.startswith("sample") else []
    compiled = ["compiled"] if config.rivals == "all" and name not in ("matmul", "skinny") else []
    return ["eager", *chunked, *compiled]


def measure(config: SpeedConfig, cache: Path, progress: Progress) -> Measured:
    """Starts the workers with empty compile caches, compares their answers, and times their programs."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
    }
    names, missing, errors = row_names(config), [], {}
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(OURS, setup(config), environment))
        workers = {"gendiff": ours}
        if config.rivals != "none" and importlib.util.find_spec("torch") is None:
            missing.append("PyTorch is not installed, so its columns are empty: `pip install -e .[speed]`.")
        elif config.rivals != "none":
            told = setup(config) | ours.answers | {"chunk": config.chunk}
            rival = stack.enter_context(Worker(RIVAL, told, environment))
            errors = compare(ours.answers["answers"], rival.answers)
            workers |= dict.fromkeys(("eager", "chunked", "compiled"), rival)
        programs = {
            f"{name}/{variant}": workers[variant]
            for name in names
            for variant in ("gendiff", *variants(config, name))
            if variant in workers
        }
        first, failed = first_calls(programs, progress)
        missing += failed
        seconds = repeat({name: programs[name] for name in first}, config.repetitions, progress)
    with Worker(OURS, setup(config), environment) as second:
        warm = {name: second.seconds(f"{name}/gendiff") for name in names}
    return Measured(seconds, first, warm, errors, missing)


def setup(config: SpeedConfig) -> dict[str, Any]:
    """What `ours.prepare` is given."""
    same = ("seed", "samples", "points", "train_steps", "matmul")
    return {
        "fields": network_fields(config),
        "members": config.classifiers,
        "products": PRODUCTS,
        **{name: getattr(config, name) for name in same},
    }


def network_fields(config: SpeedConfig) -> dict[str, Any]:
    """The fields that are the checkerboard experiment's too."""
    names = ("sampler_steps", "width", "depth", "classifier_width", "classifier_depth")
    return {name: getattr(config, name) for name in names}


def compare(ours: Mapping[str, np.ndarray], rival: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest difference of each answer, relative to the largest value of the answer.

    Raises:
      ValueError: they differ by more than rounding, so the sides do not compute the same thing.
    """
    errors = {}
    for name, ours_value in ours.items():
        scale = np.abs(ours_value).max()
        errors[name] = float(np.abs(ours_value - rival[name]).max() / scale)
        limit = TOLERANCE.get(name, POINTWISE)
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


def table_row(config: SpeedConfig, name: str, measured: Measured, peak: float) -> Row:
    """A row; what was not measured is left out."""
    units = {"train-step": config.train_steps, "skinny": PRODUCTS}.get(name, 1)
    items = {"train-step": config.points, "matmul": config.matmul}.get(name, config.samples)
    ours = measured.seconds[f"{name}/gendiff"] / units
    rate = work(config, name) / ours
    metrics = {
        "seconds": spread(ours),
        "samples_per_second": spread(items / ours),
        "gflops_per_second": spread(rate / 1e9),
        "peak_share": spread(rate / peak),
        "roofline_seconds": rates.exact(work(config, name) / peak),
        "compile_seconds": beyond(measured.first[f"{name}/gendiff"], measured.seconds[f"{name}/gendiff"]),
        "warm_compile_seconds": beyond(measured.warm[name], measured.seconds[f"{name}/gendiff"]),
    }
    for variant in variants(config, name):
        seconds = measured.seconds.get(f"{name}/{variant}")
        if seconds is None:
            continue
        metrics[f"{variant}_seconds"] = spread(seconds / units)
        metrics[f"{variant}_ratio"] = spread(seconds / units / ours)
        if variant == "compiled":
            metrics["compiled_compile_seconds"] = beyond(measured.first[f"{name}/{variant}"], seconds)
    return Row(name, metrics)


def spread(values: np.ndarray) -> Estimate:
    """Median, smallest and largest of the repetitions."""
    return Estimate(float(np.median(values)), float(values.min()), float(values.max()), len(values))


def beyond(first: float, seconds: np.ndarray) -> Estimate:
    """What the first call took beyond the others."""
    return rates.exact(max(0.0, first - float(np.median(seconds))))


def work(config: SpeedConfig, name: str) -> float:
    """FLOPs of one unit of a row: a batch of samples, a training step, a product."""
    if name == "matmul":
        return 2.0 * config.matmul**3
    if name == "skinny":
        return 2.0 * config.samples * config.width**2
    fields = CheckerboardConfig(**network_fields(config))
    denoiser, classifier = checkerboard.denoiser_network(fields), checkerboard.classifier_network(fields)
    if name == "train-step":
        return config.points * training_flops(denoiser)
    members = int(name.removeprefix("sample-k"))
    evaluation = forward_flops(denoiser, 2) + 2 * members * forward_flops(classifier, 1)
    return config.samples * (2 * config.sampler_steps - 1) * evaluation


def forward_flops(net: ResidualMLP | MLPClassifier, outputs: int) -> float:
    """FLOPs of an evaluation at one point of the plane, without the time embedding."""
    waves, width = net.fourier, net.width
    return 2.0 * (2 * waves + (2 + 2 * waves) * width + 2 * net.depth * width**2 + width * outputs)


def training_flops(net: ResidualMLP) -> float:
    """FLOPs of the loss and its gradient at one point: the frequencies and the inputs need no gradient."""
    waves, width, embedding = net.fourier, net.width, net.width // 2
    blocks = 2 * net.depth * width**2 + width * net.features + net.depth * embedding * width
    first = (2 + 2 * waves) * width + TIME_FEATURES * embedding
    return 2.0 * (2 * waves + 2 * first + 3 * blocks)


if __name__ == "__main__":
    main(SpeedConfig, PRESETS, run)
