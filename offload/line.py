"""The order in which pages leave: by request, the earliest first; of one request's from the end.

Without its beginning the end of a prefix serves nobody. So pages are not ordered one by one: those
that a request used last are one entry of the order, which moves as a whole when the request goes
on.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping

from kvstrata.tiers.base import key_group

# Added to the position of pages that leave before all others of a use: no prompt is that long.
_BEYOND = 1 << 48
# A line looks for parts that have become empty when it has twice as many as last time, and some.
_LEAST_PARTS = 64
_stamps = itertools.count(1)


class Use:
    """What one request uses.

    Attributes:
        stamp: when it went on last; later uses have larger stamps.
        seen: end token by key of the pages it asked for, each counted once, in that order.
        reused: those that were there before, and still are its own.
        reach: the furthest end token.
        counts: how often its pages were asked for, see `Frequency`; the least of them, `least`, up
            to the end token `counted`.
    """

    __slots__ = ("counted", "counts", "least", "reach", "reused", "seen", "stamp")

    def __init__(self) -> None:
        self.renew()
        self.seen: dict[bytes, int] = {}
        self.reused: set[bytes] = set()
        self.reach = self.counted = 0
        self.least = 255
        self.counts: dict[bytes, int] = {}

    def see(self, pages: Mapping[bytes, int]) -> None:
        """The request asks for pages; their end tokens."""
        self.seen.update(pages)
        self.reach = max(self.reach, *pages.values())

    def in_order(self) -> list[bytes]:
        """The pages from the beginning of the prefix to its end."""
        return sorted(self.seen, key=self.seen.__getitem__)

    def over(self) -> None:
        """The request is over, and its last pages may stay for long: forget what it asked for."""
        self.seen = {}

    def renew(self) -> None:
        """The request goes on: its pages are the latest of all."""
        self.stamp = next(_stamps)


# A page that would leave next: its key, its end token and its use.
Oldest = tuple[bytes, int, Use]


class _Part:
    """Pages of one use in a line: end token by key. `heap` has the idle ones, once it is needed,
    and others that were idle, in their places when the use reached `reach`; `queued`: the line's
    queue has this part."""

    __slots__ = ("heap", "idle", "line", "pinned", "queued", "reach", "use")

    def __init__(self, line: Line, use: Use) -> None:
        self.line = line
        self.use = use
        self.idle: dict[bytes, int] = {}
        self.pinned: dict[bytes, int] = {}
        self.heap: list[tuple[int, bytes]] | None = None
        self.reach = 0
        self.queued = False


class Pages:
    """The resident pages of a policy: each is in one of its lines, and idle or pinned.

    Args:
        windows: by group, how many tokens before the end of a hit are needed; all, if not given.
            Pages before them, that only one request stored, leave before its others.
    """

    def __init__(self, windows: Mapping[int, int]) -> None:
        self._windows = windows
        # How far a use goes on until pages have to be looked for that its windows have left behind
        self.stride = min(windows.values(), default=_BEYOND)
        self._home: dict[bytes, _Part] = {}
        # Called for every key, so not a method
        self.part: Callable[[bytes], _Part | None] = self._home.get
        self._pinned = 0

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, key: bytes) -> bool:
        return key in self._home

    @property
    def idle(self) -> int:
        """How many are not pinned."""
        return len(self._home) - self._pinned

    def pin(self, key: bytes) -> None:
        """An idle page must not leave; it keeps its place."""
        part = self._home[key]
        part.pinned[key] = part.idle.pop(key)
        self._pinned += 1

    def unpin(self, key: bytes) -> None:
        """A pinned page may leave again."""
        part = self._home[key]
        self._pinned -= 1
        self._make_idle(part, key, part.pinned.pop(key))

    def add(self, key: bytes, end_token: int, line: Line, use: Use) -> None:
        """A page comes in, pinned."""
        part = self._home[key] = line.part(use)
        line.size += 1
        part.pinned[key] = end_token
        self._pinned += 1

    def move(self, key: bytes, line: Line, use: Use) -> None:
        """A page becomes part of another use, perhaps in another line."""
        old = self._home[key]
        if old.use is not use:
            old.use.reused.discard(key)
        part = self._home[key] = line.part(use)
        old.line.size -= 1
        line.size += 1
        end_token = old.pinned.pop(key, None)
        if end_token is not None:
            part.pinned[key] = end_token
        else:
            self._make_idle(part, key, old.idle.pop(key))
        if not (old.queued or old.idle or old.pinned):
            old.line.forget(old.use)

    def gather(self, use: Use) -> None:
        """A request ended: its pages that others asked for since are its own again."""
        for key in use.seen:
            part = self._home.get(key)
            if part is not None and part.use is not use:
                self.move(key, part.line, use)
                use.reused.add(key)

    def remove(self, key: bytes) -> int:
        """A page goes out; its end token."""
        part = self._home.pop(key)
        part.use.reused.discard(key)
        part.line.size -= 1
        end_token = part.idle.pop(key, None)
        if end_token is None:
            end_token = part.pinned.pop(key)
            self._pinned -= 1
        if not (part.queued or part.idle or part.pinned):
            part.line.forget(part.use)
        return end_token

    def _make_idle(self, part: _Part, key: bytes, end_token: int) -> None:
        part.idle[key] = end_token
        if part.heap is not None:
            heapq.heappush(part.heap, (self.place(part.use, key, end_token), key))
        if not part.queued:
            part.queued = True
            part.line.queue(part)

    def needs(self, use: Use, end_token: int, oldest: Oldest) -> bool:
        """Whether a page would be of no use without the one that leaves next, of its own prefix."""
        key, before, of = oldest
        return of is use and before < end_token and self.place(use, key, before) > -_BEYOND

    def place(self, use: Use, key: bytes, end_token: int) -> int:
        """Where a page stands among those of its use: smaller ones leave first."""
        if self._windows and key not in use.reused:
            window = self._windows.get(key_group(key))
            if window is not None and end_token + window <= use.reach:
                return -end_token - _BEYOND
        return -end_token


class Line:
    """Pages in the order in which they leave. Pinned ones keep their place and are passed over.

    Attributes:
        size: how many pages are in it.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._parts: dict[Use, _Part] = {}
        self._queue: list[tuple[int, _Part]] = []  # a heap; an entry's stamp may be outdated
        self._sweep_at = _LEAST_PARTS
        self.size = 0

    def oldest(self) -> Oldest | None:
        """The page that leaves next; None if all are pinned."""
        queue = self._queue
        while queue:
            stamp, part = queue[0]
            idle, use = part.idle, part.use
            if not idle:
                heapq.heappop(queue)
                part.queued = False
                if not part.pinned:
                    self.forget(use)
                continue
            if stamp != use.stamp:
                heapq.heapreplace(queue, (use.stamp, part))
                continue
            heap = part.heap
            behind = use.reach - part.reach >= self._pages.stride
            if heap is None or behind or len(heap) > 2 * len(idle) + 64:
                place = self._pages.place
                heap = [(place(use, key, end_token), key) for key, end_token in idle.items()]
                heapq.heapify(heap)
                part.heap, part.reach = heap, use.reach
            while heap[0][1] not in idle:
                heapq.heappop(heap)
            key = heap[0][1]
            return key, idle[key], use
        return None

    def part(self, use: Use) -> _Part:
        """The pages of a use."""
        part = self._parts.get(use)
        if part is None:
            if len(self._parts) >= self._sweep_at:
                self._sweep()
            part = self._parts[use] = _Part(self, use)
        return part

    def queue(self, part: _Part) -> None:
        """A part has idle pages again."""
        heapq.heappush(self._queue, (part.use.stamp, part))

    def forget(self, use: Use) -> None:
        """A use has no page here any more."""
        del self._parts[use]

    def _sweep(self) -> None:
        """Forget queued parts that have lost their pages: while there is room, nobody asks for the
        oldest page, and comes across them."""
        for _, part in self._queue:
            part.queued = bool(part.idle)
            if not (part.idle or part.pinned):
                self.forget(part.use)
        self._queue = [entry for entry in self._queue if entry[1].queued]
        heapq.heapify(self._queue)
        self._sweep_at = 2 * len(self._parts) + _LEAST_PARTS
