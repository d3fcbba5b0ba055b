"""The command line of an experiment: its errors are one line each, with an exit status of their own."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from tqdm import tqdm

from experiments.lab import origin, start
from experiments.lab.config import C, ConfigError, parse
from experiments.lab.table import Results
from gendiff import command, distributed, training
from gendiff.checkpoint import CheckpointError
from gendiff.command import BAD_INPUT, INTERRUPTED, LOST, UNREAD

T = TypeVar("T")
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
        start.start()
        given = distributed.everywhere(lambda: parse(config, presets, sys.argv[1:]))
        agree("the configuration", given)
        if given.preset == "smoke":
            start.compile_quickly()
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
        distributed.agree("the code", origin.code())


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


def go_on(error: Exception) -> Exception:
    """Return the error of one run, for the others to go on without it.

    A notice of preemption stops them all.  Of several processes, an error that may be of one alone ends the job: the
    others would wait for that process in a collective.
    """
    if isinstance(error, distributed.Preempted):
        raise error
    if jax.process_count() > 1 and not isinstance(error, training.NotFinite):
        end(error)
    return error


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
