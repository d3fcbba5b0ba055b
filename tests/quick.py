"""Flags under which XLA compiles faster, for tests and smoke presets; `python -m tests.quick` prints those it knows.

Nearly all their time goes into machine code that runs once, so LLVM optimises nothing. XLA's own passes, hence the
program, stay. `XLA_FLAGS=` (nothing, or other flags) turns this off.
"""

import os
import subprocess
import sys

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Halves the compilation of JAX 0.10; XLA of JAX 0.12 ends every process that sets it.
    "--xla_cpu_use_fusion_emitters=false",
)


def accepted() -> list[str]:
    """Return the flags that this XLA knows; each has a process to try it, because an unknown flag ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    tried = [subprocess.Popen(command, env=environment | {"XLA_FLAGS": flag}, **quiet) for flag in FLAGS]
    return [flag for flag, process in zip(FLAGS, tried, strict=True) if process.wait() == 0]


if __name__ == "__main__":
    print(*accepted())
