"""Batches from a random-access source for `training.train`, read ahead by Grain: each process reads its own rows.

The batches of a run do not depend on how many processes it has: batch i of all of them together holds elements
i * size to (i + 1) * size of one shuffled, endless order, and a position is a number of batches, so that a run that was
stopped goes on with the next one, also on another number of processes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import grain
import jax

from gendiff import check


class Source(Protocol):
    """What TFDS's data sources, ArrayRecord readers, lists and arrays are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def batches(
    source: Source,
    size: int,
    seed: int,
    change: Callable[[Any], Any] | None = None,
    threads: int = 8,
    ahead: int = 64,
    process: int | None = None,
    processes: int | None = None,
) -> grain.DatasetIterator:
    """An endless iterator over this process's part of each global batch, with `get_state` and `set_state`.

    Args:
      source: elements are arrays or trees of them.
      size: of the global batch.
      change: of one element, on the host, such as decoding.
      seed: of the order, 0 or more.
      threads, ahead: readers, and elements that they read ahead, 1 or more.
      process, processes: default to JAX's.

    Raises:
      ValueError: the source is empty, the processes do not divide the batch, or a number is out of range.
    """
    index = jax.process_index() if process is None else process
    count = jax.process_count() if processes is None else processes
    check.number("stream: elements of the source", len(source), at_least=1)
    check.number("stream: processes", count, at_least=1, whole=True)
    check.number("stream: process", index, at_least=0, below=count, whole=True)
    check.number("stream: size", size, at_least=1, whole=True)
    check.number("stream: seed", seed, at_least=0, below=2**32, whole=True)
    check.number("stream: threads", threads, at_least=1, whole=True)
    check.number("stream: ahead", ahead, at_least=1, whole=True)
    if size % count:
        raise ValueError(f"stream: size must be a multiple of the {count} processes, got {size}")
    # Endless in effect: a length that Grain's own arithmetic can hold.
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat(-(-(2**50) // len(source)))
    elements = order if change is None else order.map(change)
    mine = elements.batch(size // count)[index::count]
    each = size // count
    buffered = max(2, -(-ahead // each))  # in batches, as Grain counts here
    options = grain.ReadOptions(num_threads=min(threads, buffered), prefetch_buffer_size=buffered)
    return iter(mine.to_iter_dataset(options))
