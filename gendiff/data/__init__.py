"""Data sets, one per module, with small embedded defaults."""

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
    """A data set is missing or damaged; the message names the place that was searched."""


def regular(path: Path | str) -> Path:
    """Return the path of a regular file; follow links.

    Other kinds are refused, because reading a named pipe waits for a writer and a device may have no end.

    Raises:
      DataError: the path is not a regular file, or is a broken or circular link.
    """
    try:
        kind = stat.S_IFMT(Path(path).stat().st_mode)
    except OSError as error:
        raise DataError(f"{path} must be a file, got none ({error.strerror})") from None
    if kind != stat.S_IFREG:
        raise DataError(f"{path} must be a file, got {KINDS.get(kind, 'another kind')}")
    return Path(path)
