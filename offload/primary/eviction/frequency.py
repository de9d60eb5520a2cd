"""How often keys were asked for of late: a table of counters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvstrata.offload.primary.eviction.order import Use

# Six for each key that can be counted before all are halved, so that most keys have one to
# themselves. On a published trace of conversations this decides as a counter for each key does, and
# half as many decide worse.
_COUNTERS_PER_KEY = 64
_LEAST_COUNTERS = 1 << 12
# All are halved after so many counts per resident key: the sample of TinyLFU (Einziger, Friedman
# and Manes, ACM Transactions on Storage 13.4, 2017) is of about this size.
_COUNTS_PER_KEY = 10
ONE = 16  # a count, so that what is halved four times is still told from nothing
_MOST = 255


class Frequency:
    """Counts keys; earlier counts fade.

    Args:
        capacity: how many keys are resident at most.
    """

    def __init__(self, capacity: int) -> None:
        size = _LEAST_COUNTERS
        while size < _COUNTERS_PER_KEY * capacity:
            size *= 2
        self._table = bytearray(size)
        self._mask = size - 1
        self._until_halving = self._sample = _COUNTS_PER_KEY * capacity

    def count(self, pages: Mapping[bytes, int], use: Use) -> None:
        """A request asks for pages, in prefix order; their end tokens by key.

        The end of a prefix was never asked for more often than its beginning: `use.counts` gets the
        least count from the beginning to each page, which a counter that is shared does not spoil.
        """
        table, mask, counts = self._table, self._mask, use.counts
        least, last = use.least, use.counted
        for key, end_token in pages.items():
            at = hash(key) & mask
            if end_token <= last:  # of another group, from its beginning
                least = _MOST
            last = end_token
            before = table[at]
            if before + ONE < least:
                least = before + ONE
            if before < least:
                table[at] = least
            counts[key] = least
        use.least, use.counted = least, last
        self._until_halving -= len(pages)
        if self._until_halving <= 0:
            self._until_halving = self._sample
            counters = np.frombuffer(table, np.uint8)
            np.right_shift(counters, 1, out=counters)

    def of(self, key: bytes, use: Use) -> int:
        """How often a page that the use asked for was asked for, in units of 1 / ONE."""
        return min(use.counts.get(key, _MOST), self._table[hash(key) & self._mask])
