"""The origin of numbers: the commit of the code, the device and the versions."""

import os
import platform
import subprocess
from pathlib import Path

import jax


def commit() -> str:
    """The commit of the code, with "+changes" if the working tree differs from it."""
    head = _git("rev-parse", "HEAD").strip()
    return head + ("+changes" if _git("status", "--porcelain").strip() else "") if head else "unknown"


def code() -> str:
    """The commit and the changes of the working tree, which are equal for equal code."""
    return commit() + _git("diff", "HEAD")


def _git(*words: str) -> str:
    """The output of a git command; empty without git or a repository."""
    try:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def device() -> str:
    """The name and number of the accelerators, or of the processor's cores."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{len(jax.devices())} x {first.device_kind}"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "jax": jax.__version__}
