"""The memory that a call needs beyond what it starts with, as Linux counts it."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], Any]) -> float | None:
    """Bytes by which the process grows at most during a call, with memory that is free given back before.

    The call is made once before, so that compilers and libraries have what they keep.  None where the system does not
    tell.
    """
    call()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        CLEAR.write_text("5")  # forgets the largest size so far
    except (OSError, AttributeError):
        return None
    call()
    return max(0.0, _status("VmHWM") - before)


def _status(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS}: expected {name}")
    return 1024.0 * int(found[1])
