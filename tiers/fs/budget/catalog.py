"""Which files there are and which was used longest ago: the keeper's memory. No I/O.

One dict from name to position and, by position, arrays: about 190 bytes per file at a million
files, of which the dict, the name and the position take 155.

A name is a file's path below the root, or a shorter form of it (`names.py`). A stamp is a time
in nanoseconds that only grows, so the order of stamps is the order of use; the files of one
access share a stamp, and of these the deepest in its prefix goes first.

numpy is imported where it is needed: it is a third of the start of an I/O process.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from kvstrata.tiers.fs.budget.limits import BLOCK

_NEVER = 2**63 - 1  # stamp of a position that is free
_LEAST_QUEUE = 256  # victims sought at once: this many, or 1/64 of all


class Catalog:
    """Names with cost (bytes, a multiple of `BLOCK`), stamp and depth (end token)."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._positions: dict[bytes, int] = {}
        self._names: list[bytes | None] = []
        self._free: list[int] = []
        self._stamps = array("q")
        self._blocks = array("I")
        self._depths = array("I")
        self._marks = array("B")
        self._mark = 0
        self._queue: list[tuple[int, bytes]] = []  # next victims, the first of them last

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, name: bytes) -> bool:
        return name in self._positions

    def cost(self, name: bytes) -> int:
        """Cost in bytes; KeyError for an unknown name."""
        return self._blocks[self._positions[name]] * BLOCK

    def stamp(self, name: bytes) -> int:
        """When it was used last; KeyError for an unknown name."""
        return self._stamps[self._positions[name]]

    def add(self, name: bytes, cost: int, stamp: int, depth: int = 0) -> int:
        """The file is there, new or replaced; by how much the total grew, in bytes.

        A stamp below the one that is known changes nothing: it came late.
        """
        before = self.nbytes
        position = self._positions.get(name)
        if position is None:
            position = self._take_position(name)
            self._stamps[position] = stamp
            if self._queue and stamp < self._queue[0][0]:
                self._queue.clear()
        else:
            self.nbytes -= self._blocks[position] * BLOCK
            self._stamps[position] = max(stamp, self._stamps[position])
        self._blocks[position] = -(-cost // BLOCK)
        self._marks[position] = self._mark
        if depth:
            self._depths[position] = depth
        self.nbytes += self._blocks[position] * BLOCK
        return self.nbytes - before

    def seen(self, name: bytes, cost: int, stamp: int) -> None:
        """A scan found the file; the stamp counts only if nothing was known of it."""
        self.add(name, cost, 0 if name in self else stamp)

    def use(self, name: bytes, stamp: int, depth: int = 0) -> None:
        """The file was used, if it is known."""
        position = self._positions.get(name)
        if position is not None:
            self._stamps[position] = max(stamp, self._stamps[position])
            if depth:
                self._depths[position] = depth

    def remove(self, name: bytes) -> int:
        """The file is gone; its cost, 0 if it was unknown."""
        position = self._positions.pop(name, None)
        if position is None:
            return 0
        cost = self._blocks[position] * BLOCK
        self.nbytes -= cost
        self._names[position] = None
        self._stamps[position] = _NEVER
        self._depths[position] = 0
        self._free.append(position)
        return cost

    def begin_scan(self) -> None:
        """From here on, notice which files are seen or added."""
        self._mark ^= 1

    def end_scan(self) -> int:
        """Forget the files that were neither seen nor added; returns how many."""
        if not self._names:
            return 0
        import numpy as np

        unseen = np.frombuffer(self._marks, np.uint8) != self._mark
        # a live position always has a stamp below the one of free positions
        unseen &= np.frombuffer(self._stamps, np.int64) != _NEVER
        lost = [self._names[position] for position in np.flatnonzero(unseen)]
        for name in lost:
            assert name is not None
            self.remove(name)
        return len(lost)

    def take_victim(self, spared: Callable[[bytes], bool]) -> bytes | None:
        """The name to evict next, which stays in the catalog; None if all are spared."""
        for filled in (False, True):
            if filled:
                self._fill_queue()
            kept: list[tuple[int, bytes]] = []
            found = None
            while self._queue and found is None:
                stamp, name = self._queue.pop()
                position = self._positions.get(name)
                if position is None or self._stamps[position] != stamp:
                    continue  # it was used or evicted since it was queued
                if spared(name):
                    kept.append((stamp, name))
                else:
                    found = name
            self._queue.extend(reversed(kept))
            if found is not None:
                return found
        return None

    def uses(self) -> Iterator[tuple[bytes, int]]:
        """Each name and its stamp."""
        return ((name, self._stamps[position]) for name, position in self._positions.items())

    def newest(self) -> int:
        """The largest stamp, 0 if empty."""
        return max((stamp for stamp in self._stamps if stamp != _NEVER), default=0)

    def chunks(
        self, count: int
    ) -> Iterator[tuple[list[bytes], Sequence[int], Sequence[int], Sequence[int]]]:
        """(names, stamps, blocks, depths) of at most `count` files at a time."""
        for start in range(0, len(self._names), count):
            live = [
                (name, start + offset)
                for offset, name in enumerate(self._names[start : start + count])
                if name is not None
            ]
            if live:
                where = [position for _, position in live]
                yield (
                    [name for name, _ in live],
                    array("q", [self._stamps[p] for p in where]),
                    array("I", [self._blocks[p] for p in where]),
                    array("I", [self._depths[p] for p in where]),
                )

    def extend(self, names: list[bytes], stamps: bytes, blocks: bytes, depths: bytes) -> None:
        """Add many files that are not known yet, from arrays of native "q", "I" and "I"."""
        start = len(self._names)
        self._positions.update(zip(names, range(start, start + len(names)), strict=True))
        self._names.extend(names)
        self._stamps.frombytes(stamps)
        self._blocks.frombytes(blocks)
        self._depths.frombytes(depths)
        self._marks.frombytes(bytes([self._mark]) * len(names))
        self.nbytes += sum(array("I", blocks)) * BLOCK

    def _take_position(self, name: bytes) -> int:
        if self._free:
            position = self._free.pop()
            self._names[position] = name
        else:
            position = len(self._names)
            self._names.append(name)
            for column in (self._stamps, self._blocks, self._depths, self._marks):
                column.append(0)
        self._blocks[position] = 0
        self._positions[name] = position
        return position

    def _fill_queue(self) -> None:
        if not self._positions:
            return
        import numpy as np

        stamps = np.frombuffer(self._stamps, np.int64)
        count = min(len(self), max(_LEAST_QUEUE, len(self) // 64))
        last = np.partition(stamps, count - 1)[count - 1]
        chosen = np.flatnonzero(stamps <= last)
        depths = np.frombuffer(self._depths, np.uint32)[chosen].astype(np.int64)
        order = chosen[np.lexsort((-depths, stamps[chosen]))]
        queue = [(int(stamps[p]), name) for p in order if (name := self._names[p]) is not None]
        self._queue = queue[::-1]
