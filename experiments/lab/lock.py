"""A lock on a folder of results, because two runs that write into one folder destroy each other's checkpoints."""

import contextlib
import os
import shlex
import socket
import sys
import time
from pathlib import Path

from gendiff.data import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
STALE = 600
"""Seconds after which a silent lock of another host counts as lost, because some servers keep a lost client's lock."""
_descriptors: dict[Path, int] = {}
"""The locks that this process holds."""


class Taken(Exception):
    """Another process has the lock; the text names it."""


def take(folder: Path) -> None:
    """Lock a folder until `release` or the end of the process, even by `kill -9`, because the kernel holds the lock.

    Without locks in the file system, print a warning.

    Raises:
      Taken: another process has the lock.
      OSError: the lock file cannot be made.
    """
    path = folder.resolve() / NAME
    if fcntl is None or _has(path):
        return
    release(folder)
    try:
        descriptor = files.descriptor(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:  # such as a link, which may lead to another user's file
        raise OSError(f"{path} must be a regular file of the run ({error.strerror}): remove it") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder, age = os.read(descriptor, 4096).decode(errors="replace"), time.time() - os.fstat(descriptor).st_mtime
        os.close(descriptor)
        if f" on {socket.gethostname()} " in holder or age < STALE:
            raise Taken(holder or "another process") from None
        print(f"warning: {path}: {holder} has been silent for {age:.0f} s and counts as lost", file=sys.stderr)
    except OSError as error:
        os.close(descriptor)
        print(f"warning: {path}: no lock ({error.strerror}): start no second run in this folder", file=sys.stderr)
    else:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _holder().encode())
        _descriptors[path] = descriptor


def _has(path: Path) -> bool:
    """Return True if this process holds the lock on the file that has this name now."""
    try:
        return path in _descriptors and os.path.samestat(os.fstat(_descriptors[path]), path.stat())
    except OSError:
        return False


def lost(folder: Path) -> bool:
    """Return True if this process took the lock, and the folder was removed or replaced since."""
    path = folder.resolve() / NAME
    return path in _descriptors and not _has(path)


def _holder() -> str:
    since, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.orig_argv)
    shown = "".join(letter if letter.isprintable() else " " for letter in command)[:500]
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {shown}"


def touch(folder: Path) -> None:
    """Refresh the lock, so that other hosts see that its holder is alive."""
    descriptor = _descriptors.get(folder.resolve() / NAME)
    if descriptor is not None:
        with contextlib.suppress(OSError):  # some file systems have no such times
            os.utime(descriptor)


def release(folder: Path) -> None:
    """Unlock the folder, if this process locked it."""
    descriptor = _descriptors.pop(folder.resolve() / NAME, None)
    if descriptor is not None:
        os.close(descriptor)
