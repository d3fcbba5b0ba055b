"""Batches from a random-access source for `training.train`, prefetched by Grain; a process reads only its own rows.

The batches do not depend on the number of processes.  Global batch i holds elements i * size to (i + 1) * size of one
shuffled, endless order.  A position is a number of batches, so a stopped run resumes with the next batch, also on
another number of processes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import grain
import jax

from gendiff import check


class Source(Protocol):
    """A random-access source: a TFDS data source, an ArrayRecord reader, a list or an array."""

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
    """Iterate endlessly over this process's part of the global batches; has `get_state` and `set_state`.

    Args:
      source: its elements are arrays or trees of arrays.
      size: size of the global batch.
      change: function of one element, such as decoding, applied on the host.
      seed: seed of the order, in 0..2^32 - 1.
      threads: reading threads, 1 or more.
      ahead: elements to prefetch, 1 or more.
      process, processes: index and number of processes; default: JAX's.

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
    # Endless in practice: the longest length that Grain's arithmetic can hold.
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat(-(-(2**50) // len(source)))
    elements = order if change is None else order.map(change)
    rows = size // count
    mine = elements.batch(rows)[index::count]
    buffered = max(2, -(-ahead // rows))  # Grain's buffer counts batches
    options = grain.ReadOptions(num_threads=min(threads, buffered), prefetch_buffer_size=buffered)
    return iter(mine.to_iter_dataset(options))
