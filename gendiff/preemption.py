"""Preemption: a run that SIGTERM or Ctrl-C asks to stop ends after its next checkpoint, and resumes later.

Users find these names in `gendiff.distributed`.
"""

import signal
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from gendiff import command


class Preempted(Exception):
    """SIGTERM asked the run to stop; everything computed is stored."""

    status = command.STOPPED
    """Exit status of the command."""


class Interrupted(Preempted):
    """Ctrl-C asked the run to stop; everything computed is stored."""

    status = command.INTERRUPTED


_asked = 0
_stopping = False


def heed_notices() -> None:
    """Treat SIGTERM (preemption) and Ctrl-C as requests to stop after the next checkpoint."""
    if jax.process_count() == 1:  # JAX tells several processes of SIGTERM; Ctrl-C ends one of them at once
        command.heed()


def preempted() -> bool:
    """Return True if the run must stop.  Collective: all processes must call it together."""
    global _asked, _stopping
    if jax.process_count() == 1:
        return command.noticed()
    if not _stopping:  # because JAX answers True once
        _asked += 1
        _stopping = bool(multihost_utils.reached_preemption_sync_point(_asked))
    return _stopping


def stop_if_noticed(stored: str) -> None:
    """As `stop_if_preempted`, for work that one process does alone; several processes never stop here."""
    if command.noticed():
        stop(stored)


def stop_if_preempted(stored: str) -> None:
    """Raise Preempted after a notice; `stored` names the newest thing on disk.  Collective."""
    if preempted():
        stop(stored)


def stop(stored: str) -> NoReturn:
    """Raise Preempted, or Interrupted after Ctrl-C; `stored` names the newest thing on disk."""
    number = signal.SIGINT if signal.SIGINT in command.notices else signal.SIGTERM
    kind = Interrupted if number == signal.SIGINT else Preempted
    raise kind(f"{command.stopped_by(number)}: {stored} is stored; the same command goes on from there")
