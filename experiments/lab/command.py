"""The command line of an experiment: an error is one line and an exit status."""

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
"""The first words of JAX's errors that this process itself caused, mostly by too little memory."""
ASKED_FOR = distributed.Preempted, SystemExit, KeyboardInterrupt, BrokenPipeError
"""Exceptions that end a run on purpose."""
MENDABLE = (
    ConfigError, CheckpointError, ValueError, FloatingPointError, OSError,
    distributed.StartError, distributed.Disagreement, distributed.Elsewhere,
)  # fmt: skip
"""Errors that a user can repair; their line is enough."""


def main(config: type[C], presets: Mapping[str, C], run: Callable[[C], Results]) -> None:
    """Run an experiment with the configuration of the command line."""

    def work() -> None:
        start.start()
        parsed = distributed.everywhere(lambda: parse(config, presets, sys.argv[1:]))
        agree("the configuration", parsed)
        start.compile_for(parsed.preset)
        results = run(parsed)
        if distributed.is_first():
            command.say(f"{results.table}\n\nResults, figures and checkpoints: {results.folder}")

    guarded(work)


def agree(name: str, value: Any) -> None:
    """Compare a value, and the code, over all processes.

    Raises:
      distributed.Disagreement: they differ; every process raises it.
    """
    if jax.process_count() > 1:
        distributed.agree(name, repr(value))
        distributed.agree("the code", origin.code())


def guarded(work: Callable[[], T]) -> T:
    """Return `work()`; end the process with one line and an exit status if it fails."""
    try:
        return work()
    except BaseException as error:
        end(error)
        raise


def end(error: BaseException) -> None:
    """End the process for an error; return if only a traceback explains the error and this process runs alone."""
    known = said(error)
    if known is None and not distributed.joined():  # several processes would wait for one another
        return
    if known is None or (traced() and not isinstance(error, ASKED_FOR)):
        traceback.print_exception(error)
    leave(*(known or ("", 1)))


def attempt(work: Callable[[], T]) -> T | Exception:
    """Return `work()` of one run, or its error (see `go_on`)."""
    try:
        return work()
    except Exception as error:
        return go_on(error)


def go_on(error: Exception) -> Exception:
    """Return the error of one run, so that the other runs continue.

    A notice of preemption stops all runs.  If the job has several processes, an error that may be one process's own
    ends the job, because the others would wait for that process in a collective.
    """
    if isinstance(error, distributed.Preempted):
        raise error
    if jax.process_count() > 1 and not isinstance(error, training.NotFinite):
        end(error)
    return error


def said(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status of an error; None if only a traceback explains it."""
    if isinstance(error, SystemExit) and distributed.joined():  # from the command line, such as --help
        return ("", error.code or 0) if isinstance(error.code, int | None) else (str(error.code), 1)
    if isinstance(error, distributed.Preempted):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return f"{command.stopped_by(signal.SIGINT)}: stored results are complete", INTERRUPTED
    if isinstance(error, BrokenPipeError):  # nobody reads the output, as with `| head -1`
        return "", UNREAD
    if isinstance(error, MENDABLE):
        return f"error: {error}" + ("" if traced() else "\n(GENDIFF_TRACEBACK=1 shows where)"), BAD_INPUT
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        reason = str(error).strip().splitlines()[0][:200]
        if reason.startswith(OURS):
            return f"error: {reason}", BAD_INPUT
        return f"error: another process of the run was lost: start all processes again ({reason})", LOST
    return None


def traced() -> bool:
    """Return True if errors are shown with their traceback."""
    return bool(os.environ.get("GENDIFF_TRACEBACK"))


def leave(message: str, status: int) -> NoReturn:
    if message:
        tqdm.write(f"{distributed.name()}{message}", file=sys.stderr)  # on a line of its own beside a bar
        sys.stderr.flush()
    if distributed.joined():  # a plain exit would wait for the other processes
        sys.stdout.flush()
        if distributed.is_first():  # the others end with this process, so let them report first
            time.sleep(1.0)
        os._exit(status)
    raise SystemExit(status) from None
