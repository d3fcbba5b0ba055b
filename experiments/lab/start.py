"""Settings of the process that must come before the first use of JAX: devices, compile cache."""

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
    """Called first by every command line.  Each setting gives way to what the user has set in the environment.

    Raises:
      distributed.StartError: other processes of the run were told of, and did not come.
    """
    # One virtual device a core lets the two cores sample independently: 1.2 times faster than threads inside each op.
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
    except (RuntimeError, AssertionError) as error:  # the second where a platform is known and its plugin is missing
        reason, asked = str(error).strip().partition("\n")[0], os.environ.get("JAX_PLATFORMS", "")
        reason = reason or "the platform is not installed"
        raise distributed.StartError(f"JAX finds no device with JAX_PLATFORMS={asked!r}: {reason}") from None
    distributed.heed_notices()


def compile_quickly() -> None:
    """Compile with few optimisations, for runs of seconds; JAX_DISABLE_MOST_OPTIMIZATIONS or XLA_FLAGS go before it."""
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ or os.environ.get("XLA_FLAGS"):
        return
    with contextlib.suppress(AttributeError):  # of a JAX without this option
        jax.config.update("jax_disable_most_optimizations", True)


def cache_home() -> Path:
    """The folder of all caches of the user: $XDG_CACHE_HOME, or ~/.cache where it is unset, empty or relative.

    Raises:
      OSError: the user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute() or home == Path(home.anchor):
        raise OSError(f"the user has no home folder: {HOME}")
    return home / ".cache"


def private(folder: Path) -> Path:
    """The folder, made if it is missing, which nobody else can write to: who can write a cached program can run code.

    Raises:
      OSError: it cannot be made, or others can write to it or put another one in its place.
    """
    try:
        for place in (*reversed(folder.parents), folder):  # `parents=True` would not give them this mode
            place.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror})") from None
    if not hasattr(os, "getuid"):  # Windows
        return folder
    whole = folder.resolve()
    for place in (whole, *whole.parents):
        held = place.stat()
        # Groups of one user are common, hence umask 002: a group may write to the folders above.
        open_to_others = held.st_mode & (0o022 if place == whole else 0o002)
        if held.st_uid not in ({os.getuid()} if place == whole else {0, os.getuid()}):
            raise OSError(f"{place} belongs to user {held.st_uid}, who can change what is in it: {HOME}")
        if open_to_others and (place == whole or not held.st_mode & stat.S_ISVTX):
            remedy = "delete it" if place == whole else f"delete {folder} and `chmod go-w {place}`"
            mode = f"{stat.S_IMODE(held.st_mode):o}"
            raise OSError(f"{place} has mode {mode}, so others can change what is in it: {remedy}, or {HOME}")
    return folder


def remove_torn_entries() -> None:
    """Remove the entries of the compile cache that a full disk or a kill cut off, where JAX warns of them: it reads
    them again in every run, and never replaces them."""
    show = warnings.showwarning

    def heal(message: Any, category: type[Warning], *more: Any, **named: Any) -> None:
        found = re.match(r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'", str(message))
        folder = getattr(jax.config, "jax_compilation_cache_dir", None)
        if not found or not folder:
            return show(message, category, *more, **named)
        for entry in Path(folder).glob(f"{glob.escape(found[1])}-*"):
            entry.unlink(missing_ok=True)
        reason = str(message).split(": ", 1)[-1]
        print(f"warning: removed the entries of {found[1]} from the compile cache {folder} ({reason})", file=sys.stderr)

    warnings.showwarning = heal
