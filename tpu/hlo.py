"""What TPU's compiler says of a program: memory, costs, and the collectives of its text."""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu.units import quantity

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip
INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = ([^=]*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
SHAPE = re.compile(r"\b(pred|token|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,<=]*)\]")


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str
    size: int
    """Bytes of the array that an all-reduce reduces, an all-gather gathers, or a reduce-scatter starts from; of a
    permutation, the bytes that one device sends."""
    looped: bool = False
    """Whether it is in a loop, and so in every step."""
    group: int | None = None
    """How many devices take part in it together; None for all."""


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program, in HLO's text; one in a loop is one."""
    found, computation = [], ""
    looped, uses, chains = set[str](), dict[str, set[str]](), set[str]()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := COMPUTATION.match(line):
            computation = header[1]
        looped.update(re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", line))
        uses.setdefault(computation, set()).update(re.findall(r"%([\w.\-]+)", line))
        if match := INSTRUCTION.match(line):
            # TPU's compiler cuts a collective into a chain of steps that it fuses with other work.
            if chain := re.search(r'chain_id="\w+"', line):
                if chain[0] in chains:
                    continue
                chains.add(chain[0])
            members = groups(line)
            group = None if members is None else len(members[0])
            collective = _collective(match[2], match[1], bool(match[3]), computation, group or devices)
            found.append((computation, collective._replace(group=group)))
    names, new = set(uses), looped
    while new := {used for name in new for used in uses.get(name, ()) if used in names} - looped:
        looped |= new
    return [collective._replace(looped=where in looped) for where, collective in found]


def _collective(kind: str, shapes: str, start: bool, computation: str, devices: int) -> Collective:
    """Of an instruction in a computation; `start` if it is the first half of two."""
    sizes = [_size(*shape) for shape in SHAPE.findall(shapes)]
    if start and kind != "all-reduce":
        # (operands, results, and words for the hardware, which are scalars)
        sizes = sizes[: len(sizes) - len(re.findall(r"\b[us]32\[\]", shapes))]
        sizes = sizes[len(sizes) // 2 :]
    if kind == "reduce-scatter":
        sizes = [size * devices for size in sizes]
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # TPU's compiler fuses it from an all-reduce and a slice
    return Collective(kind, sum(sizes))


def groups(line: str) -> list[list[int]] | None:
    """The groups of devices of a collective, as places in the mesh; None where all devices are one group.

    XLA has three spellings: {{0,1},{2,3}}, an iota such as [2,2]<=[4] or [4,2]<=[2,4]T(1,0), and, of JAX 0.12 on, the
    axes of a mesh, mesh['replica'=2,'data'=4] {'data'}.
    """
    if match := re.search(r"replica_groups=\{(\{[0-9,{}]+\})\}", line):
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line):
        shape, sizes = ([int(n) for n in text.split(",")] for text in match.groups()[:2])
        order = [int(n) for n in match[3].split(",")] if match[3] else range(len(sizes))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape).tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]+)\] *\{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=([0-9]+)", match[1])}
        inside = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[2])]
        devices = np.arange(math.prod(axes.values())).reshape([*axes.values()])
        last = np.moveaxis(devices, inside, range(-len(inside), 0))
        return last.reshape(-1, math.prod(last.shape[devices.ndim - len(inside) :])).tolist()
    return None


def _size(dtype: str, dimensions: str) -> int:
    """Bytes of an array of HLO."""
    if dtype == "token":
        return 0
    bits = 8 if dtype == "pred" else int(re.findall(r"[0-9]+", dtype)[0])
    elements = math.prod(int(d.lstrip("<=")) for d in dimensions.split(",") if d)
    return -(-elements * bits // 8)


class Measured(NamedTuple):
    """One program on one slice; costs and memory are one device's."""

    arguments: float
    temporaries: float
    outputs: float
    """Without the outputs that take the place of arguments."""
    flops: float
    """Of one pass through the loop, and of the work before and after it."""
    accessed: float
    """Bytes, likewise."""
    collectives: tuple[Collective, ...]
    seconds: float
    """Of compilation."""
    setup_flops: float = 0.0
    setup_accessed: float = 0.0
    data: int | None = None
    """Length of the mesh's axis `data`, where that is not all devices."""

    @property
    def memory(self) -> float:
        """Bytes on one device, all at once."""
        return self.arguments + self.temporaries + self.outputs


class Failed(NamedTuple):
    """The reason why a program does not compile."""

    reason: str


def measured(
    compiled: Any, mesh: jax.sharding.Mesh, seconds: float = 0.0, setup: Any = None, costs: Any = None
) -> Measured:
    """Read a compiled program; `setup` and `costs` are the program's, where it has them."""
    memory = compiled.memory_analysis()
    cost = (costs or compiled).cost_analysis()
    before = {} if setup is None else setup.cost_analysis()
    return Measured(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        tuple(collectives(compiled.as_text(), mesh.size)),
        seconds,
        before.get("flops", 0.0),
        before.get("bytes accessed", 0.0),
        mesh.shape["data"],
    )


def reason(message: str) -> str:
    """The first line of an error, and where memory is too small, by how much."""
    if used := re.search(r"Used ([0-9.]+[KMGT]) of ([0-9.]+[KMGT]) hbm", message):
        return f"out of memory: {used[1]}iB of {used[2]}iB"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


JOINED = 120 * 2**20
"""Bytes up to which libtpu joins all-reduces (seen: of 300 arrays of 1 MiB 120, 120 and 60): a larger gradient is
reduced in pieces of at most so many.  With its option xla_jf_crs_combiner_threshold_in_bytes it is one."""


MANY = 64
"""Chips from which on TPU's compiler replaces reduce-scatters and all-gathers by all-reduces, on v5p of any size."""


def unexpected(kind: str, found: tuple[Collective, ...], devices: int, data: int | None = None) -> str:
    """The fault of a program's collectives; empty if they are as they should be.

    Args:
      kind: of the program; see `experiments.lab.programs.Program`.
      data: length of the mesh's axis `data`; default: all devices.
    """
    if kind in ("training", "replicas"):  # the loss, summed over steps, may be reduced once after them
        found = tuple(part for part in found if part.looped or part[:2] != ("all-reduce", 4))
    kinds = [part.kind for part in found]
    alone = kind == "replicas" and (data or 1) == 1  # a device a run; else devices share the batches of their runs
    if devices == 1 or kind == "sampling" or alone:
        return f"must have no collective, got {counted(found)}" if kinds else ""
    allowed = {devices, data or devices} if kind == "training" else {data or devices}  # over copies too
    if across := [part for part in found if (part.group or devices) not in allowed]:
        return f"must have collectives of {data} devices, got {counted(tuple(across))} of others"
    if kind in ("training", "replicas"):
        smallest = sorted(part.size for part in found)[:2]
        pieces = set(kinds) == {"all-reduce"} and (len(kinds) == 1 or sum(smallest) > JOINED)
        return "" if pieces else f"must have one all-reduce, got {counted(found)}"
    both = {"all-gather", "reduce-scatter"} if devices < MANY else set[str]()
    if kinds and both <= set(kinds) <= {"all-reduce", "all-gather", "reduce-scatter"}:
        return ""
    return f"must have reduce-scatter and all-gather, got {counted(found)}"


def counted(found: tuple[Collective, ...]) -> str:
    """Collectives by kind: how many and of how many bytes."""
    parts = []
    for kind in dict.fromkeys(part.kind for part in found):
        sizes = [part.size for part in found if part.kind == kind]
        parts.append(f"{len(sizes)} {kind} ({quantity(sum(sizes))}B)")
    return ", ".join(parts) or "none"
