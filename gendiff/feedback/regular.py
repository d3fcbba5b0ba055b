"""Files of folders that strangers may have filled: only regular files are opened, and any name can be shown."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gendiff import data
from gendiff.data import files

try:
    import fcntl
except ImportError:  # Windows: pages of one server are still kept apart, two servers are not
    fcntl = None  # type: ignore[assignment]

KINDS = data.KINDS | {stat.S_IFLNK: "a link (name the file that it leads to)"}
"""Other files than regular ones: they block their reader, never end, or lead elsewhere."""


def descriptor(path: Path, flags: int = os.O_RDONLY, links: bool = False) -> int:
    """Open a regular file without waiting.

    Args:
      path: the file.
      flags: of `os.open`.
      links: follow a link at the path's end, also one that leads out of its folder.

    Raises:
      OSError: it cannot be opened, or is no regular file; `strerror` says which kind it is.
    """
    try:
        _regular(path, os.stat(path) if links else os.lstat(path))  # before it is opened: that can rewind a tape
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    # Another program may replace the file between the look at it and its opening.
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
        raise OSError(errno.EINVAL, f"it must be a regular file, got {KINDS.get(kind, 'a special file')}", str(path))


def shown(path: Path | str) -> str:
    """Return a name as Unicode: the bytes that are none are escaped, such as caf\\xe9.png."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # half an emoji, which no file is called
        name = str(path).encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def locked(path: Path, flags: int, exclusive: bool) -> Iterator[int]:
    """Yield the open file under its lock; make a new name last; closing unlocks."""
    new = not path.exists()
    opened = descriptor(path, flags)
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        if new and os.name == "posix":
            files.sync(path.parent)
        yield opened
    finally:
        os.close(opened)


def write(opened: int, body: bytes) -> None:
    """Write all bytes, and return when they are on the disk."""
    while body:
        body = body[os.write(opened, body) :]
    os.fsync(opened)


def content(opened: int, start: int, count: int | None = None) -> bytes:
    """Return the bytes from `start` on, to the end or `count` of them."""
    with os.fdopen(os.dup(opened), "rb") as file:
        file.seek(start)
        return file.read(count)
