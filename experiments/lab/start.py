"""Settings of the process before the first use of JAX: devices, compile cache."""

import contextlib
import glob
import os
import re
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

from gendiff import distributed

HOME = "set XDG_CACHE_HOME to a folder of yours"


def start() -> None:
    """Prepare the process of a command line; the user's environment variables override every setting.

    Raises:
      distributed.StartError: other processes of the run did not come, or JAX finds no device.
    """
    # A virtual device for each core samples 1.2 times faster on two cores than threads inside each operation.
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 4))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            jax.config.update("jax_compilation_cache_dir", str(private(cache_home() / "gendiff" / "jax")))
        except OSError as error:
            print(f"warning: no compile cache: {error}", file=sys.stderr)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    remove_torn_entries()
    distributed.start()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: the plugin of a known platform is missing
        reason, platforms = str(error).strip().partition("\n")[0], os.environ.get("JAX_PLATFORMS", "")
        reason = reason or "the platform is not installed"
        raise distributed.StartError(f"JAX finds no device with JAX_PLATFORMS={platforms!r}: {reason}") from None
    distributed.heed_notices()


def compile_for(preset: str) -> None:
    """Compile the smoke preset with few optimisations; JAX_DISABLE_MOST_OPTIMIZATIONS or XLA_FLAGS go before it."""
    if preset != "smoke" or "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ or os.environ.get("XLA_FLAGS"):
        return
    with contextlib.suppress(AttributeError):  # of a JAX without this option
        jax.config.update("jax_disable_most_optimizations", True)


def cache_home() -> Path:
    """The folder of all caches of the user: $XDG_CACHE_HOME, or ~/.cache if it is unset, empty or relative.

    Raises:
      OSError: the user has no home.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():
        return folder
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute() or home == Path(home.anchor):
        raise OSError(f"the user has no home folder: {HOME}")
    return home / ".cache"


def private(folder: Path) -> Path:
    """Make the folder if it is missing, and check that only the user can write to it.

    Another user who can write a cached program could run code.

    Raises:
      OSError: it cannot be made, or others can write to it or replace it.
    """
    try:
        for place in (*reversed(folder.parents), folder):  # `parents=True` would not give them this mode
            place.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror})") from None
    if not hasattr(os, "getuid"):  # Windows
        return folder
    path = folder.resolve()
    for place in (path, *path.parents):
        held = place.stat()
        # A group may write to the folders above, because umask 002 and groups of one user are common.
        open_to_others = held.st_mode & (0o022 if place == path else 0o002)
        if held.st_uid not in ({os.getuid()} if place == path else {0, os.getuid()}):
            raise OSError(f"{place} belongs to user {held.st_uid}, who can change its files: {HOME}")
        if open_to_others and (place == path or not held.st_mode & stat.S_ISVTX):
            remedy = "delete it" if place == path else f"delete {folder} and `chmod go-w {place}`"
            mode = f"{stat.S_IMODE(held.st_mode):o}"
            raise OSError(f"{place} has mode {mode}, so others can change its files: {remedy}, or {HOME}")
    return folder


def remove_torn_entries() -> None:
    """Remove entries of the compile cache of which JAX warns, because JAX never replaces an entry that was cut off."""
    show = warnings.showwarning

    def heal(message: Any, category: type[Warning], *more: Any, **named: Any) -> None:
        entry = re.match(r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'", str(message))
        folder = getattr(jax.config, "jax_compilation_cache_dir", None)
        if not entry or not folder:
            return show(message, category, *more, **named)
        for path in Path(folder).glob(f"{glob.escape(entry[1])}-*"):
            path.unlink(missing_ok=True)
        reason = str(message).split(": ", 1)[-1]
        print(f"warning: removed the entries of {entry[1]} from the compile cache {folder} ({reason})", file=sys.stderr)

    warnings.showwarning = heal
