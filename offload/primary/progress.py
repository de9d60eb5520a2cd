"""How far the workers are with the region's memory: counters that all processes share.

The slots are reserved in ranges, which the workers take in turn: range i is worker i % n's. So
each worker's NUMA node gets its share of the pages, early and late ones alike. Each worker makes
all ranges usable for itself, in their order; those that all can use are the engine's.
"""

from __future__ import annotations

import numpy as np

# Long enough to cost a worker's device little to keep apart (4,096 ranges in 1 TiB), and soon done:
# 0.1 to 0.5 s (docs/benchmarks.md). At start each worker tries its copies on one range, so a range
# has some slots also where they are large.
RANGE_BYTES = 256 << 20
LEAST_SLOTS = 16

_RESERVED, _USABLE, _LEFT_OUT, _SERVING = range(4)


class Progress:
    """Counters in shared memory. Each has one writer and only grows.

    Args:
        marks: int64 [workers, at least 4], zero at first.
        slots: number of slots, at least one per worker.
        slot_bytes: size of a slot in bytes.
    """

    def __init__(self, marks: np.ndarray, slots: int, slot_bytes: int) -> None:
        self._marks = marks
        self._slots = slots
        self.workers = len(marks)
        wanted = min(-(-slots * slot_bytes // RANGE_BYTES), slots // LEAST_SLOTS)
        self.ranges = max(self.workers, wanted)

    def slots_of(self, index: int) -> range:
        """The slots of a range."""
        first, stop = (i * self._slots // self.ranges for i in (index, index + 1))
        return range(first, stop)

    @property
    def first_slots(self) -> int:
        """How many slots the first ranges of all workers have together."""
        return self.slots_of(self.workers).start

    def reserved(self, index: int) -> bool:
        """Whether the slots of a range have memory."""
        return bool(self._marks[index % self.workers, _RESERVED] > index // self.workers)

    def set_reserved(self, rank: int, count: int) -> None:
        """The first `count` of a worker's own ranges have memory."""
        self._marks[rank, _RESERVED] = count

    def set_usable(self, rank: int, count: int) -> None:
        """A worker can use the first `count` ranges."""
        self._marks[rank, _USABLE] = count

    def usable(self) -> int:
        """How many slots, from the first on, all workers can use."""
        count = int(self._marks[:, _USABLE].min())
        return count * self._slots // self.ranges

    @property
    def complete(self) -> bool:
        """Whether all workers can use all that is to be used."""
        return bool(self._marks[:, _USABLE].min() >= self.limit)

    def leave_out(self, rank: int, index: int) -> None:
        """This range and those behind it will not be used: a worker could not have it."""
        self._marks[rank, _LEFT_OUT] = max(self._marks[rank, _LEFT_OUT], self.ranges - index)

    @property
    def limit(self) -> int:
        """How many ranges are to be used; all, but where one was left out."""
        return self.ranges - int(self._marks[:, _LEFT_OUT].max())

    def serve(self) -> None:
        """The scheduler is there: the workers have started, and captured their CUDA graphs."""
        self._marks[0, _SERVING] = 1

    @property
    def serving(self) -> bool:
        """Whether `serve` was called."""
        return bool(self._marks[0, _SERVING])
