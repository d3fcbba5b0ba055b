"""Settings of the process that must come before the first use of JAX: devices, compile cache."""

import os
import platform
import sys
from pathlib import Path

import jax

from gendiff import distributed


def start() -> None:
    """Called first by every command line.  Each setting gives way to what the user has set in the environment.

    Raises:
      distributed.StartError: other processes of the run were told of, and did not come.
    """
    # One virtual device a core lets the two cores sample independently: 1.2 times faster than threads inside each op.
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 4))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gendiff" / "jax"
        try:  # private: who can write a cached program can run code
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            jax.config.update("jax_compilation_cache_dir", str(cache))
        except OSError as error:
            print(f"warning: no compile cache in {cache} ({error.strerror})", file=sys.stderr)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    distributed.start()
    distributed.heed_notices()


def device() -> str:
    """What ran: the accelerator's or processor's name, and how many."""
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
