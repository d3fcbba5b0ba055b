"""The pod-scale plan: every `paper` preset compiled for slices of TPUs, without a TPU.

    python -m tpu.plan --output tpu/plan.md

compiles the programs that the experiments name, ahead of time, for real TPU topologies, which libtpu does on any x86
Linux machine (`pip install -e '.[tpu]'`).  Memory, FLOPs, bytes, collectives and errors are the compiler's word.
`roofline` predicts times from them.  Nothing is executed, and nothing is allocated on a device.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from tabulate import tabulate

from experiments.lab.experiment import NAMES, find
from experiments.lab.programs import Program
from tpu.hlo import Collective, Failed, Measured, counted, measured, reason, unexpected
from tpu.roofline import efficiency, predict, total
from tpu.slices import CHIPS, ONE_CHIP, SLICES, SOURCES, NoCompiler, devices_of
from tpu.units import duration, quantity


@contextlib.contextmanager
def as_on_tpus() -> Iterator[None]:
    """Tell the library that its backend is a TPU."""
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        yield


@cache
@as_on_tpus()
def programs_of(name: str) -> Mapping[str, Program]:
    """The programs of an experiment's preset `paper`."""
    found = find(name)
    return found.programs(found.presets["paper"])


EXPERIMENTS: Mapping[str, Callable[[], Mapping[str, Program]]] = {name: partial(programs_of, name) for name in NAMES}


def compile_one(name: str, program: str, where: str, batch: int) -> Measured | Failed:
    """Compile a program for a slice; an error of the compiler becomes `Failed`."""
    asked = EXPERIMENTS[name]()[program]
    with as_on_tpus():
        try:
            mesh = asked.on(devices_of(where), batch)
            begun = time.perf_counter()
            compiled = asked.lower(mesh, batch).compile()
            took = time.perf_counter() - begun
            setup, costs = (lower and lower(mesh, batch).compile() for lower in (asked.setup, asked.costs))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            return Failed(reason(str(error)))
    return measured(compiled, mesh, took, setup, costs)


# The plan.


@dataclasses.dataclass(frozen=True)
class Entry:
    """One program on one slice, with one batch."""

    experiment: str
    program: str
    where: str
    batch: int
    result: Measured | Failed


def batches(program: Program, devices: int) -> list[int]:
    """The preset's batch, and where the devices do not divide it, the next multiple too."""
    if program.divides and program.batch % devices:
        return [program.batch, -(-program.batch // devices) * devices]
    return [program.batch]


def findings(entries: list[Entry]) -> list[str]:
    """The faults of programs: in collectives, in memory, and in compilation."""
    found = []
    for entry in entries:
        program, place = EXPERIMENTS[entry.experiment]()[entry.program], SLICES[entry.where]
        name = f"{entry.experiment} {entry.program} on {entry.where}, {entry.batch:,} {program.unit}"
        if isinstance(entry.result, Failed):
            found.append(f"{name}: {entry.result.reason}")
            continue
        if wrong := unexpected(program.kind, entry.result.collectives, place.chips, entry.result.data):
            found.append(f"{name}: {wrong}")
        if entry.result.memory > CHIPS[place.chip].memory:
            found.append(f"{name}: {quantity(entry.result.memory)}B do not fit")
    return found


HEAD = (
    "program", "slice", "batch", "memory a device (arguments + temporaries + outputs)", "fits", "FLOP", "bytes",
    "collectives", "step", "bound by", "efficiency", "whole",
)  # fmt: skip


def table(entries: list[Entry]) -> str:
    """The rows of one experiment."""
    body = []
    for entry in entries:
        program, place = EXPERIMENTS[entry.experiment]()[entry.program], SLICES[entry.where]
        chip, result = CHIPS[place.chip], entry.result
        how = " (rounded up)" if entry.batch != program.batch else ""
        if isinstance(result, Measured) and result.data and result.data < place.chips:
            how += f", {place.chips // result.data} x {result.data} chips"
        first = [entry.program, entry.where, f"{entry.batch:,} {program.unit}{how}"]
        if isinstance(result, Failed):
            body.append([*first, result.reason, *[""] * 8])
            continue
        fits = "yes" if result.memory <= chip.memory else "**no**"
        parts = " + ".join(f"{quantity(part)}B" for part in result[:3])
        predicted, took = predict(result, chip, place.chips), total(program, result, chip, place.chips, entry.batch)
        alone = reference(entry, entries)
        body.append([
            *first,
            f"{quantity(result.memory)}B ({parts})",
            fits,
            quantity(result.flops - result.setup_flops),
            f"{quantity(result.accessed - result.setup_accessed)}B",
            counted(result.collectives),
            duration(predicted.step),
            predicted.bound,
            "-" if alone is None else f"{100 * efficiency(alone, took, place.chips):.3g} %",
            duration(took),
        ])  # fmt: skip
    return tabulate(body, HEAD, tablefmt="github", disable_numparse=True)


def reference(entry: Entry, entries: list[Entry]) -> float | None:
    """Seconds of the same work on one chip, if it compiles there: for a rounded batch, in proportion."""
    for other in entries:
        same = (other.experiment, other.program, other.where) == (entry.experiment, entry.program, ONE_CHIP)
        if same and isinstance(other.result, Measured):
            program = EXPERIMENTS[entry.experiment]()[entry.program]
            alone = total(program, other.result, CHIPS[SLICES[entry.where].chip], 1, other.batch)
            return alone * entry.batch / other.batch
    return None


def page(entries: list[Entry], versions: str) -> str:
    """The plan in Markdown."""
    chips = tabulate(
        [
            [name, f"{quantity(c.flops)}FLOP/s", f"{quantity(c.memory)}B", f"{quantity(c.bandwidth)}B/s",
             f"{quantity(c.links)}B/s", SOURCES[name]]
            for name, c in CHIPS.items()
        ],
        ("chip", "peak, bfloat16", "HBM", "its bandwidth", "ICI, both directions", "source"),
        tablefmt="github",
    )  # fmt: skip
    slices = "; ".join(
        f"{name}: {place.chips} chip{'s' * (place.chips > 1)}, {place.topology}" for name, place in SLICES.items()
    )
    sections = []
    for experiment, programs in EXPERIMENTS.items():
        rows = [entry for entry in entries if entry.experiment == experiment]
        if rows:
            named = programs().items()
            what = "; ".join(f"`{name}`: {program.what}, {program.steps:,} steps" for name, program in named)
            sections.append(f"## {experiment}\n\n{what}.\n\n{table(rows)}")
        if out := left_out(experiment, rows):
            sections.append(f"Not compiled yet, of {experiment}: {out}.")
    told = "\n".join(f"- {finding}" for finding in findings(entries)) or "None."
    good = sum(not findings([entry]) for entry in entries)
    return INTRODUCTION.format(
        chips=chips, slices=slices, versions=versions, findings=told, good=good, count=len(entries),
        sections="\n\n".join(sections),
    )  # fmt: skip


def left_out(experiment: str, entries: list[Entry]) -> str:
    """The programs of an experiment that the plan lacks, with their slices."""
    done = {(entry.program, entry.where) for entry in entries}
    missing = {name: [where for where in SLICES if (name, where) not in done] for name in EXPERIMENTS[experiment]()}
    return "; ".join(f"`{name}` on {', '.join(slices)}" for name, slices in missing.items() if slices)


INTRODUCTION = """\
# The pod-scale plan

The main programs of each experiment's `paper` preset, compiled ahead of time for slices of TPUs, on a CPU machine
without a TPU. **Nothing was executed**: memory, FLOP, bytes and collectives are the compiler's word
({versions}), times are predicted from them. Made by `python -m tpu.plan --output tpu/plan.md`, which needs
`pip install -e '.[tpu]'`; with `--results tpu/plan.json` programs that were compiled at an earlier commit are kept.

## Chips

{chips}

Slices, by their names at Google, which count chips of v5e but TensorCores of v5p, two a chip: {slices}.

## How times are predicted

step = max(FLOP / peak, bytes / HBM bandwidth) + sum over collectives of f x size / (half the ICI bandwidth),
f = 2 (n - 1) / n for an all-reduce of n chips, (n - 1) / n for a reduce-scatter, an all-gather or an all-to-all, 1 for
a permutation.

- FLOP, bytes and collectives are of one device and one step: XLA counts the body of a loop once. What a sampler does
  before its loop (the maps of traffic) is compiled alone, subtracted, and added once; so are collectives that are not
  in the loop. FLOP and bytes of a
  training step are those of a step on a given batch where it draws from a pool: XLA counts the whole pool as read.
- Float32 programs multiply matrices on a TPU in one bfloat16 pass (JAX's default precision), so the peak is bfloat16's.
- XLA counts as bytes also what stays in the chip's own memory between operations: programs that are small enough for
  that are faster than their bytes say.
- Arithmetic and memory overlap perfectly, collectives with nothing: for large collectives the worst case.
- The links carry a ring over all of a chip's links at full speed. v5e slices below 16 x 16 are no torus: up to half as
  fast. Latency (of the order of 1 us a hop) and the launch of each operation (likewise) are left out.
  **Steps of less than about 100 us are therefore no forecasts**, nor are their efficiencies.
- efficiency: time on one chip over n times that on n chips, for the same work (strong scaling); one chip's program is
  v5e's, for v5p with the figures of v5p; `-` where it does not compile. A batch that the chips do not divide is shared
  by as many as do, and the others compute copies of these parts; what it would take rounded up stands beside it, with
  one chip's time in proportion.
- whole: all steps of one training, or of one call of a sampler; without compilation, validation, checkpoints and input.
- Sizes of data that only a run knows: traffic's pools 262,144 scenes of a class, the checkerboard's 1,048,576 points,
  5,500 images of sevens.

## Findings

{good} of {count} programs compile, fit, and have the collectives that they should have: in training one all-reduce of
the gradient (reduce-scatter and all-gather where the state is sharded), in sampling and between replicas none (chips
that they would leave idle share the batches of a run, with one all-reduce among themselves). libtpu reduces gradients
of more than 120 MiB in pieces, as few as that allows, unless it is given a higher
`xla_jf_crs_combiner_threshold_in_bytes`. On 64 and 256 chips it makes all-reduces of reduce-scatters and of most
all-gathers, which move up to twice as many bytes. The others:

{findings}

{sections}
"""


# The command line.


def measure(experiment: str, program: str, where: str, batch: int, limit: float) -> Measured | Failed:
    """`compile_one` in a process of its own, because compilers crash, run out of memory and hang."""
    command = [sys.executable, "-m", "tpu.plan", "--one", experiment, program, where, str(batch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1], check=False
        )
    except subprocess.TimeoutExpired:
        return Failed(f"did not compile within {limit:g} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Failed(f"the compiler ended with {done.returncode}: {last[:160]}")
    return decoded(json.loads(lines[-1]))


def decoded(stored: dict[str, Any]) -> Measured | Failed:
    """A result from JSON."""
    if "reason" in stored:
        return Failed(**stored)
    return Measured(**stored | {"collectives": tuple(Collective(*values) for values in stored["collectives"])})


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tpu.plan", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="file for the plan; default: print it")
    parser.add_argument("--topology", action="append", choices=SLICES, help="this slice only; may be repeated")
    parser.add_argument("--experiment", action="append", choices=EXPERIMENTS, help="this one only; may be repeated")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that one program may compile (3600)")
    parser.add_argument("--results", type=Path, help="file of results so far, which are not compiled again")
    parser.add_argument("--held", action="store_true", help="write the plan of --results alone, and compile nothing")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Compile what is asked for, one program after the other, and write the plan after each."""
    options = arguments().parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.one:
        name, program, where, batch = options.one
        print(json.dumps(compile_one(name, program, where, int(batch))._asdict()))
        return
    try:
        devices_of(ONE_CHIP)
    except NoCompiler as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    versions = f"jax {jax.__version__}, libtpu {version('libtpu')}"
    held: dict[str, Any] = {}
    if options.results and options.results.exists():
        held = json.loads(options.results.read_text())
    entries: list[Entry] = []
    for name, program, where, batch in asked(options):
        key = f"{name} {program} {where} {batch}"
        if key not in held:
            if options.held:
                continue
            held[key] = measure(name, program, where, batch, options.limit)._asdict()
        entries.append(Entry(name, program, where, batch, decoded(held[key])))
        print(key, summary(entries[-1].result), file=sys.stderr, flush=True)
        if options.results:
            options.results.write_text(json.dumps(held))
        if options.output:
            options.output.write_text(page(entries, versions))
    if not options.output:
        print(page(entries, versions))
    if wrong := [finding for finding in findings(entries) if ": must have" in finding]:
        print("\n".join(["error: not the collectives that there should be:", *wrong]), file=sys.stderr)
        raise SystemExit(1)


def asked(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """(experiment, program, slice, batch) of the plan, in its order."""
    for name in options.experiment or EXPERIMENTS:
        for program, found in EXPERIMENTS[name]().items():
            for where in options.topology or SLICES:
                for batch in batches(found, SLICES[where].chips):
                    yield name, program, where, batch


def summary(result: Measured | Failed) -> str:
    """A result in a few words."""
    if isinstance(result, Failed):
        return result.reason
    return f"{quantity(result.memory)}B, {counted(result.collectives)}, compiled in {result.seconds:.0f} s"


if __name__ == "__main__":
    main()
