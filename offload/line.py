"""The order in which pages leave: by request, the earliest first; of one request's from the end.

Without its beginning the end of a prefix serves nobody. So pages are not ordered one by one: those
that a request used last are one entry of the order, which moves as a whole when the request goes
on.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from typing import NamedTuple

from kvstrata.tiers.base import key_group

# Added to the position of pages that leave before all others of a use: no prompt is that long.
_BEYOND = 1 << 48
_stamps = itertools.count(1)


class Use:
    """What one request uses.

    Attributes:
        stamp: when it went on last; later uses have larger stamps.
        seen: end token by key of the pages it asked for, each counted once, in that order.
        reused: those that were there before.
        reach: the furthest end token.
    """

    __slots__ = ("reach", "reused", "seen", "stamp")

    def __init__(self) -> None:
        self.renew()
        self.seen: dict[bytes, int] = {}
        self.reused: set[bytes] = set()
        self.reach = 0

    def see(self, pages: Mapping[bytes, int]) -> None:
        """The request asks for pages; their end tokens."""
        self.seen.update(pages)
        self.reach = max(self.reach, *pages.values())

    def in_order(self) -> list[bytes]:
        """The pages from the beginning of the prefix to its end."""
        return sorted(self.seen, key=self.seen.__getitem__)

    def renew(self) -> None:
        """The request goes on: its pages are the latest of all."""
        self.stamp = next(_stamps)


class Oldest(NamedTuple):
    """The page that a line would give up next."""

    key: bytes
    end_token: int
    use: Use


class _Part:
    """Pages of one use in a line: end token by key. `heap` has the idle ones, once it is needed,
    and others that were idle; `queued`: the line's queue has this part."""

    __slots__ = ("heap", "idle", "pinned", "queued", "use")

    def __init__(self, use: Use) -> None:
        self.use = use
        self.idle: dict[bytes, int] = {}
        self.pinned: dict[bytes, int] = {}
        self.heap: list[tuple[int, bytes]] | None = None
        self.queued = False


class Line:
    """Pages in the order in which they leave. Pinned ones keep their place and are passed over.

    Args:
        windows: by group, how many tokens before the end of a hit are needed; all, if not given.
            Pages before them, that only this request stored, leave before its others.
    """

    def __init__(self, windows: Mapping[int, int]) -> None:
        self._windows = windows
        self._home: dict[bytes, _Part] = {}
        self._parts: dict[Use, _Part] = {}
        self._queue: list[tuple[int, _Part]] = []  # a heap; an entry's stamp may be outdated
        self.pinned = 0  # how many

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, key: bytes) -> bool:
        return key in self._home

    def add(self, key: bytes, end_token: int, use: Use, *, pinned: bool) -> None:
        """A page comes in, as part of a use."""
        part = self._parts.get(use)
        if part is None:
            part = self._parts[use] = _Part(use)
        self._home[key] = part
        if pinned:
            self.pinned += 1
            part.pinned[key] = end_token
        else:
            self._idle(part, key, end_token)

    def remove(self, key: bytes) -> tuple[int, Use, bool]:
        """A page goes out: its end token, its use, and whether it is pinned."""
        part = self._home.pop(key)
        end_token = part.idle.pop(key, None)
        pinned = end_token is None
        if end_token is None:
            end_token = part.pinned.pop(key)
            self.pinned -= 1
        if not (part.idle or part.pinned or part.queued):
            del self._parts[part.use]
        return end_token, part.use, pinned

    def pin(self, key: bytes) -> None:
        """An idle page must not leave."""
        part = self._home[key]
        part.pinned[key] = part.idle.pop(key)
        self.pinned += 1

    def unpin(self, key: bytes) -> None:
        """A pinned page may leave again."""
        part = self._home[key]
        self.pinned -= 1
        self._idle(part, key, part.pinned.pop(key))

    def oldest(self) -> Oldest | None:
        """The page that leaves next; None if all are pinned."""
        queue = self._queue
        while queue:
            stamp, part = queue[0]
            use = part.use
            if not part.idle:
                heapq.heappop(queue)
                part.queued = False
                if not part.pinned:
                    del self._parts[use]
            elif stamp != use.stamp:
                heapq.heapreplace(queue, (use.stamp, part))
            else:
                return Oldest(*self._last(part), use)
        return None

    def _idle(self, part: _Part, key: bytes, end_token: int) -> None:
        part.idle[key] = end_token
        if part.heap is not None:
            heapq.heappush(part.heap, (self._place(part.use, key, end_token), key))
        if not part.queued:
            part.queued = True
            heapq.heappush(self._queue, (part.use.stamp, part))

    def _last(self, part: _Part) -> tuple[bytes, int]:
        """The idle page of a part that leaves first."""
        idle, heap = part.idle, part.heap
        if heap is None or len(heap) > 2 * len(idle) + 64:
            heap = [(self._place(part.use, key, end), key) for key, end in idle.items()]
            heapq.heapify(heap)
            part.heap = heap
        while heap[0][1] not in idle:
            heapq.heappop(heap)
        key = heap[0][1]
        return key, idle[key]

    def _place(self, use: Use, key: bytes, end_token: int) -> int:
        """Smaller ones leave first."""
        if self._windows and key not in use.reused:
            window = self._windows.get(key_group(key))
            if window is not None and end_token + window <= use.reach:
                return -end_token - _BEYOND
        return -end_token
