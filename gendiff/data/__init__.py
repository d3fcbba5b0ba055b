"""Data sets, one a file, each with a small embedded default."""

import stat
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class DataError(ValueError):
    """A data set that is missing or damaged; the message says where it was looked for."""


def regular(path: Path | str) -> Path:
    """Return the path of a regular file, also behind links.

    Reading a named pipe would wait for a writer for ever, and a device may have no end.

    Raises:
      DataError: the path is no such file, or a link that leads nowhere or to itself.
    """
    try:
        kind = stat.S_IFMT(Path(path).stat().st_mode)
    except OSError as error:
        raise DataError(f"{path} must be a file, got none ({error.strerror})") from None
    if kind != stat.S_IFREG:
        raise DataError(f"{path} must be a file, got {KINDS.get(kind, 'another kind')}")
    return Path(path)
