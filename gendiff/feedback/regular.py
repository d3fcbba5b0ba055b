"""Names, locks and contents of files in untrusted folders; `gendiff.data.files.descriptor` opens them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gendiff.data import files

try:
    import fcntl
except ImportError:  # Windows: the pages of one server still take turns, but two servers do not
    fcntl = None  # type: ignore[assignment]


def shown(path: Path | str) -> str:
    """Return a name as Unicode, with other bytes escaped, such as caf\\xe9.png."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair, which no file name holds
        name = str(path).encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def locked(path: Path, flags: int, exclusive: bool) -> Iterator[int]:
    """Open and lock a file, and yield its descriptor; sync the name of a new file to the disk.  Closing unlocks."""
    new = not path.exists()
    opened = files.descriptor(path, flags)
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        if new and os.name == "posix":
            files.sync(path.parent)
        yield opened
    finally:
        os.close(opened)


def write(opened: int, body: bytes) -> None:
    """Write all bytes and wait until they are on the disk."""
    while body:
        body = body[os.write(opened, body) :]
    os.fsync(opened)


def content(opened: int, start: int, count: int | None = None) -> bytes:
    """Read `count` bytes from `start` on; None: to the end."""
    with os.fdopen(os.dup(opened), "rb") as file:
        file.seek(start)
        return file.read(count)
