"""Chips and slices of TPUs, and their devices for the compiler."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """Figures of one chip; see SOURCES."""

    flops: float
    """A second, bfloat16, at peak."""
    memory: float
    """Bytes of HBM."""
    bandwidth: float
    """Of it, bytes a second."""
    links: float
    """Bytes a second over all of its ICI links, both directions together, as Google states it."""


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 400e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9),
}
SOURCES = {
    "v5e": "https://docs.cloud.google.com/tpu/docs/v5e",
    "v5p": "https://docs.cloud.google.com/tpu/docs/v5p",
}


class Slice(NamedTuple):
    """A slice of TPUs, as `jax.experimental.topologies` wants it."""

    chip: str
    chips: int
    topology: str
    options: dict[str, Any]


MEGACORE = {"chip_config_name": "megacore"}
SLICES = {
    "v5e-1": Slice("v5e", 1, "v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    "v5e-8": Slice("v5e", 8, "v5e:2x4", {}),
    "v5e-256": Slice("v5e", 256, "v5e:16x16", {}),
    "v5p-128": Slice("v5p", 64, "v5p:4x4x4", MEGACORE | {"chips_per_host_bounds": (2, 2, 1)}),
}
"""By their names at Google, which count chips of v5e but TensorCores of v5p, two a chip."""
ONE_CHIP = "v5e-1"
"""The slice whose programs efficiencies are relative to, with the figures of the chip in question."""


class NoCompiler(Exception):
    """There is no libtpu."""


def devices_of(name: str) -> list[jax.Device]:
    """The devices of a slice, for the compiler.

    Raises:
      NoCompiler: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler("libtpu, TPU's compiler, must be installed, got none: pip install -e '.[tpu]' (on x86 Linux)")
    # Otherwise libtpu asks Google's metadata server, for minutes, which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # One process at a time may have the TPUs; the compiler wants none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    chosen = SLICES[name]
    return list(topologies.get_topology_desc(chosen.topology, "tpu", **chosen.options).devices)
