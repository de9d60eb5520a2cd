"""Stamps: where an access stands in the order of use.

A stamp is a time in nanoseconds that only grows, so that it says something to people; the
order is that of arrival at the keeper, whatever the clocks do. What one engine did may arrive
out of order, since its I/O processes write a journal each; its accesses are numbered, and the
numbers decide.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import OrderedDict

_ENGINE_BITS, _COUNTER_BITS = 24, 40  # of an access; 34 years at 1,000 accesses per second
_MOST_ENGINES = 64
_MOST_ACCESSES = 2**12  # remembered of each, at least: others of their pages may still arrive


def first_access() -> int:
    """Where an engine begins to number its accesses, so that they differ from other engines'."""
    return int.from_bytes(os.urandom(_ENGINE_BITS // 8)) << _COUNTER_BITS


class Stamps:
    """Gives each access its stamp. No I/O."""

    def __init__(self, newest: int) -> None:
        """All stamps of new accesses will be above `newest`."""
        self._newest = newest
        self._engines: OrderedDict[int, tuple[list[int], list[int]]] = OrderedDict()

    def next(self) -> int:
        """The stamp of something that is no access, now."""
        self._newest = max(self._newest + 1, time.time_ns())
        return self._newest

    def of(self, access: int) -> int:
        """The same for all pages of an access."""
        engine = access >> _COUNTER_BITS
        accesses, stamps = self._engines.setdefault(engine, ([], []))
        self._engines.move_to_end(engine)
        at = bisect_left(accesses, access)
        if at < len(accesses) and accesses[at] == access:
            return stamps[at]
        if at < len(accesses):
            # It was late. Stamps differ by as much as accesses do, or more: there is room.
            stamp = stamps[at] - (accesses[at] - access)
        else:
            if accesses:
                self._newest = max(self._newest, stamps[-1] + access - accesses[-1] - 1)
            stamp = self.next()
        accesses.insert(at, access)
        stamps.insert(at, stamp)
        if len(accesses) > 2 * _MOST_ACCESSES:
            del accesses[:_MOST_ACCESSES], stamps[:_MOST_ACCESSES]
        if len(self._engines) > _MOST_ENGINES:
            self._engines.popitem(last=False)
        return stamp
