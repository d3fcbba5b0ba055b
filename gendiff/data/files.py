"""Atomic writes, opening of regular files only, paths of command lines, and arrays without pickled code."""

import argparse
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gendiff.data import KINDS


def store(path: Path, put: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically, by renaming; several processes may write one path.

    Args:
      path: the file.
      put: writes the content to an open file.

    Raises:
      OSError: writing failed; an existing file is unchanged.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with part.open("wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())  # before the renaming, because a crash could keep the name and lose the bytes
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and path.is_dir():  # only POSIX systems can open folders
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems cannot sync folders
            raise
    finally:
        os.close(opened)


def store_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8."""
    store(path, lambda file: file.write(text.encode()))


LINKED = KINDS | {stat.S_IFLNK: "a link (name the file that it leads to)"}


def descriptor(path: Path, flags: int = os.O_RDONLY, links: bool = False) -> int:
    """Open a regular file without waiting; return its descriptor.

    Other kinds are refused, because they block their reader, never end, or lead elsewhere.

    Args:
      path: the file.
      flags: flags of `os.open`.
      links: follow a link at the path's end, also out of its folder.

    Raises:
      OSError: the file cannot be opened, or is not regular; `strerror` names its kind.
    """
    try:
        _regular(path, os.stat(path) if links else os.lstat(path))  # before opening, because that can rewind a tape
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    # Check again after opening, because another program may replace the file in between.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    flags |= 0 if links else getattr(os, "O_NOFOLLOW", 0)
    opened = os.open(path, flags, 0o644)
    try:
        _regular(path, os.fstat(opened))
    except OSError:
        os.close(opened)
        raise
    return opened


def _regular(path: Path, found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it must be a regular file, got {LINKED.get(kind, 'a special file')}", str(path))


def local(name: str, path: Path) -> Path:
    """Return `path`; refuse addresses such as gs://bucket/x, because writing would make a folder `gs:`.

    Args:
      name: the argument's name for the error, such as "--data".
      path: the path.

    Raises:
      ValueError: `path` is an address.
    """
    if re.match(r"[A-Za-z][\w+.-]+:(/|$)", str(path)):
        raise ValueError(f"{name} must be a path of a file system, got {path}: mount it, or copy it and name the copy")
    return path


def argument(text: str) -> Path:
    """Return a command line's argument as a path; the `type` of an argparse argument.

    Raises:
      argparse.ArgumentTypeError: the path is empty, or is an address.
    """
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    try:
        return local("it", Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load(path: Path, what: str, *names: str) -> list[np.ndarray]:
    """Read arrays of an .npz file.

    Args:
      path: the file.
      what: the expected content, for the error.
      names: names of the arrays.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [stored[name] for name in names]
    except Exception as error:  # damaged archives raise many types
        raise ValueError(f"{path} must hold {what}, got a damaged file ({error!r})") from None
