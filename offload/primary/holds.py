"""Holds: pages of the primary tier that requests count on, or asked to keep there for a time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvstrata.offload.primary.slots import Entry, Hold, PrimaryTier


class Holds:
    """Pages that must not be evicted although nobody copies them.

    **Kept** are answers to look-ups, and what has just arrived. What a request was answered HIT
    stays until it loads, goes on without a load, is looked up anew or ends, even through a reset.
    It may be some steps until the load: while the request waits for the rest of its prefix (two
    prefixes could push each other out for ever), and in vLLM 0.33 while steps under way may still
    use the blocks that it goes to. What arrived from a tier stays for this step and the next.
    Whatever is let go of is so when a step ends, unless the request ends.

    **Pinned** are pages that a request wants to stay (`pin_seconds`) until their time has passed.

    Args:
        primary: where the pages are.
        pin_fraction: largest share of the primary tier that may be pinned at once.
        clock: seconds, monotonic.
    """

    def __init__(
        self, primary: PrimaryTier, pin_fraction: float, clock: Callable[[], float]
    ) -> None:
        self._primary = primary
        self._pin_fraction = pin_fraction
        self._clock = clock
        # To be let go of at the end of this step, and of the next
        self._leaving: list[Iterable[Entry]] = []
        self._staying: list[Iterable[Entry]] = []
        # By request: what it was answered in the last step in which it was looked up; and, of
        # those that are looked up in this step, what they were answered before and not again.
        self._found: dict[str, dict[Entry, None]] = {}
        self._earlier: dict[str, dict[Entry, None]] = {}
        self._asking: str | None = None  # the request of the last answer, and its two:
        self._again: dict[Entry, None] = {}
        self._not_again: dict[Entry, None] = {}
        self.outlived: set[str] = set()  # requests not looked up since a reset, if they have pages
        self._until: dict[Entry, float] = {}  # pinned
        self._order = itertools.count()
        # a heap of one end per pinned page, which may be earlier than the true one
        self._ends: list[tuple[float, int, Entry]] = []

    def __iter__(self) -> Iterator[Entry]:
        """What is kept, once for each hold."""
        by_request = (*self._found.values(), *self._earlier.values())
        return itertools.chain(*self._leaving, *self._staying, *by_request)

    def keep(self, entry: Entry, req_id: str) -> None:
        """The request is answered HIT."""
        if req_id != self._asking:
            self._ask(req_id)
        if entry in self._again:
            return
        self._again[entry] = None
        if entry in self._not_again:
            del self._not_again[entry]
        else:
            self._primary.keep(entry)

    def arrived(self, entries: Sequence[Entry]) -> list[Entry]:
        """The tiers' pages became ready; those to which a key leads stay for this step and the
        next, and are returned."""
        known = [entry for entry in entries if entry.attached]
        self._primary.finish_writes(entries, good=True, hold=Hold.KEPT)
        self._staying.append(known)
        return known

    def of(self, req_id: str) -> dict[bytes, Entry]:
        """What the request was answered HIT, by key, though the key may lead there no more."""
        return {entry.key: entry for entry in self._found.get(req_id, ())}

    def loads(self, req_id: str) -> None:
        """The request's load holds what it needs."""
        if req_id in self._found:
            self._staying += self._take(req_id)

    def computes(self, req_id: str) -> None:
        """The request goes on without a load."""
        if req_id in self._found:
            self._leaving += self._take(req_id)

    def drop(self, req_id: str) -> None:
        """The request ended, or will load nothing of it."""
        if req_id in self._found:
            for entries in self._take(req_id):
                self._primary.let_go(entries, Hold.KEPT)

    def drop_outlived(self, req_id: str) -> None:
        """The request is looked up, and will load nothing from before the reset."""
        if req_id in self.outlived:
            self.drop(req_id)

    def end_step(self) -> None:
        """A step ended."""
        leaving = (*self._leaving, *self._earlier.values())
        self._leaving, self._staying = self._staying, []
        self._earlier.clear()
        self._asking = None
        for entries in leaving:
            self._primary.let_go(entries, Hold.KEPT)
        if self._ends:
            self._expire()

    def reset(self) -> None:
        """Keep only what requests were answered in steps that have ended: vLLM may be about to
        load it."""
        self._primary.let_go(self._until, Hold.PIN)
        self._until.clear()
        self._ends.clear()
        for req_id in list(self._earlier):
            self.drop(req_id)
        self.end_step()
        self.end_step()
        self.outlived = {req_id for req_id, entries in self._found.items() if entries}

    def pin(self, entries: Iterable[Entry], seconds: float) -> int:
        """Hold ready pages so long from now; a longer pin stays. How many found no room."""
        until = self._clock() + seconds
        refused = 0
        most = int(self._primary.slots * self._pin_fraction)
        for entry in entries:
            held = self._until.get(entry)
            if held is not None and held >= until:
                continue
            if held is None:
                if len(self._until) >= most:
                    refused += 1
                    continue
                self._primary.hold((entry,), Hold.PIN)
                heapq.heappush(self._ends, (until, next(self._order), entry))
            self._until[entry] = until
        return refused

    def _expire(self) -> None:
        """Let go of the pinned pages whose time has passed."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            entry = self._ends[0][2]
            if (until := self._until[entry]) > now:
                heapq.heapreplace(self._ends, (until, next(self._order), entry))
            else:
                heapq.heappop(self._ends)
                del self._until[entry]
                self._primary.let_go((entry,), Hold.PIN)

    def _ask(self, req_id: str) -> None:
        if req_id not in self._earlier:
            self._earlier[req_id] = self._found.get(req_id, {})
            self._found[req_id] = {}
            self.outlived.discard(req_id)
        self._asking = req_id
        self._again, self._not_again = self._found[req_id], self._earlier[req_id]

    def _take(self, req_id: str) -> tuple[dict[Entry, None], dict[Entry, None]]:
        if self._asking == req_id:
            self._asking = None
        self.outlived.discard(req_id)
        return self._found.pop(req_id), self._earlier.pop(req_id, {})
