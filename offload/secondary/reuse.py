"""Counts how often a chunk was asked for, for `store_threshold`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class ReuseCounter:
    """Keys and how often they were offered; the least recently offered are forgotten first.

    Args:
        threshold: a key is wanted from this many offers on; 0 and 1 want every key.
        capacity: how many keys are remembered.
    """

    def __init__(self, threshold: int, capacity: int) -> None:
        self._threshold = threshold
        self._capacity = capacity
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    @property
    def counts(self) -> bool:
        """Whether there is a threshold to count up to."""
        return self._threshold > 1

    def __len__(self) -> int:
        return len(self._counts)

    def wanted(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of the keys that were offered often enough."""
        if not self.counts:
            return list(keys)
        return [key for key in keys if self._counts.get(key, 0) >= self._threshold]

    def count(self, keys: Iterable[bytes]) -> None:
        """The keys were offered."""
        if not self.counts:
            return
        for key in keys:
            self._counts[key] = self._counts.pop(key, 0) + 1
        while len(self._counts) > self._capacity:
            self._counts.popitem(last=False)
