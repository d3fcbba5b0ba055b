"""Times of compiled programs, predicted by a roofline from the compiler's FLOPs, bytes and collectives."""

from typing import NamedTuple

from experiments.lab.programs import Program
from tpu.hlo import Collective, Measured
from tpu.slices import Chip


class Predicted(NamedTuple):
    """Seconds of one step."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        """Arithmetic and memory overlap; collectives wait for both, so that this is the worst case of them."""
        return max(self.compute, self.memory) + self.links

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def link_seconds(collectives: tuple[Collective, ...], devices: int, chip: Chip) -> float:
    """Seconds of collectives, as rings over all links of a chip, one direction of each at a time (half of `links`)."""
    seconds = 0.0
    for collective in collectives:
        n = collective.group or devices
        passes = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        seconds += collective.size * passes.get(collective.kind, (n - 1) / n) / (chip.links / 2)
    return seconds


def predict(found: Measured, chip: Chip, devices: int) -> Predicted:
    """The time of one step of the program's loop."""
    flops, accessed = found.flops - found.setup_flops, found.accessed - found.setup_accessed
    looped = tuple(collective for collective in found.collectives if collective.looped)
    return Predicted(
        max(flops, 0.0) / chip.flops, max(accessed, 0.0) / chip.bandwidth, link_seconds(looped, devices, chip)
    )


def total(program: Program, found: Measured, chip: Chip, devices: int, batch: int) -> float:
    """Seconds of all steps: of a training, or of one call of a sampler with all of its chunks."""
    before = max(found.setup_flops / chip.flops, found.setup_accessed / chip.bandwidth)
    once = link_seconds(tuple(collective for collective in found.collectives if not collective.looped), devices, chip)
    chunks = 1 if program.chunk is None else -(-batch // (devices * program.chunk))
    return chunks * (program.steps * predict(found, chip, devices).step + before) + once


def efficiency(alone: float, together: float, devices: int) -> float:
    """Of the same work: time on one chip over n times that on n chips."""
    return alone / (devices * together)
