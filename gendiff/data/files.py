"""Files that are written whole or not at all; arrays in them, without code."""

import argparse
import errno
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def store(path: Path, put: Callable[[BinaryIO], Any]) -> None:
    """Writes what `put` writes, to a file that appears whole, by renaming; several processes may do so.

    Raises:
      OSError: it could not be written; a file that was there is as it was.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with part.open("wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())  # before it has its name, because a crash could keep the name and lose the bytes
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    if os.name != "posix" and path.is_dir():  # only there folders can be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def store_text(path: Path, text: str) -> None:
    """Writes a text, as `store` does."""
    store(path, lambda file: file.write(text.encode()))


def local(name: str, path: Path) -> Path:
    """Return `path`; refuse addresses such as gs://bucket/x, which would become a folder `gs:`.

    Args:
      name: such as "--data".

    Raises:
      ValueError: it is an address.
    """
    if re.match(r"[A-Za-z][\w+.-]+:(/|$)", str(path)):
        raise ValueError(f"{name} must be a path of a file system, got {path}: mount it, or copy it and name the copy")
    return path


def argument(text: str) -> Path:
    """A path of a command line, for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    try:
        return local("it", Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load(path: Path, what: str, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz file.

    Args:
      what: it should hold, for the error.

    Raises:
      ValueError: there is no such file, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [stored[name] for name in names]
    except Exception as error:  # a damaged archive has many ways to say so
        raise ValueError(f"{path}: expected {what}, given a damaged file ({error!r})") from None
