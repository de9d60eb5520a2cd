"""Pages that a request asked to keep in the primary tier for a time (`pin_seconds`)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable

from kvstrata.offload.primary.slots import Entry, PrimaryTier


class Pins:
    """Pages held until their time has passed, up to a share of the primary tier.

    Args:
        primary: where the pages are.
        fraction: largest share of the primary tier that may be pinned at once.
        clock: seconds, monotonic.
    """

    def __init__(self, primary: PrimaryTier, fraction: float, clock: Callable[[], float]) -> None:
        self._primary = primary
        self._fraction = fraction
        self._clock = clock
        self._until: dict[Entry, float] = {}
        self._order = itertools.count()
        # a heap of one end per page, which may be earlier than the true one
        self._ends: list[tuple[float, int, Entry]] = []

    def __len__(self) -> int:
        return len(self._until)

    def pin(self, entries: Iterable[Entry], seconds: float) -> int:
        """Hold ready pages so long from now; a longer pin stays. How many found no room."""
        until = self._clock() + seconds
        refused = 0
        most = int(self._primary.slots * self._fraction)
        for entry in entries:
            held = self._until.get(entry)
            if held is not None and held >= until:
                continue
            if held is None:
                if len(self._until) >= most:
                    refused += 1
                    continue
                self._primary.begin_reads((entry,), gpu=False)
                heapq.heappush(self._ends, (until, next(self._order), entry))
            self._until[entry] = until
        return refused

    def expire(self) -> None:
        """Let go of the pages whose time has passed."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            entry = self._ends[0][2]
            if (until := self._until[entry]) > now:
                heapq.heapreplace(self._ends, (until, next(self._order), entry))
            else:
                heapq.heappop(self._ends)
                del self._until[entry]
                self._primary.end_reads((entry,), gpu=False)

    def clear(self) -> None:
        """Let go of everything."""
        self._primary.end_reads(self._until, gpu=False)
        self._until.clear()
        self._ends.clear()
