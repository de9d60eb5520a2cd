"""How often keys were asked for of late: a table of counters instead of one per key."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

# One counter for each key that can be counted before all are halved, and three times as many spare,
# so that most keys have one to themselves.
_COUNTERS_PER_KEY = 32
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

    def count(self, keys: Collection[bytes]) -> None:
        """The keys were asked for once more."""
        table, mask = self._table, self._mask
        for key in keys:
            at = hash(key) & mask
            value = table[at] + ONE
            table[at] = value if value < _MOST else _MOST
        self._until_halving -= len(keys)
        if self._until_halving <= 0:
            self._until_halving = self._sample
            counters = np.frombuffer(table, np.uint8)
            np.right_shift(counters, 1, out=counters)

    def of(self, key: bytes) -> int:
        """How often a key was asked for, in units of 1 / ONE."""
        return self._table[hash(key) & self._mask]
