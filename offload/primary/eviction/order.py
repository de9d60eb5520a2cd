"""The order in which pages leave: by request, the earliest first; of one request's from the end.

Without its beginning the end of a prefix serves nobody. So pages are not ordered one by one: those
that a request used last are one entry of the order, which moves as a whole when the request goes
on.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping
from functools import partial

import msgspec

from kvstrata.tiers.base import key_group

# Added to the position of pages that leave before all others of a use: no prompt is that long.
_BEYOND = 1 << 48
# A line looks for parts that have become empty when it has twice as many as last time, and some.
_LEAST_PARTS = 64
# So many pinned pages are passed over one by one, and then all of a part at once: it may be a long
# prompt that waits for its load.
_MOST_ONE_BY_ONE = 16
_stamps = itertools.count(1)
_numbers = itertools.count()


class Use(msgspec.Struct, gc=False, eq=False):
    """What one request uses. As long as its pages stay, and nothing to the garbage collector.

    Attributes:
        stamp: when it went on last; later uses have larger stamps.
        seen: end token by key of the pages it asked for, each counted once, in that order.
        reused: those that were there before, and still are its own.
        reach: the furthest end token.
        counts: how often its pages were asked for, see `Frequency`; the least of them, `least`, up
            to the end token `counted`.
    """

    stamp: int = msgspec.field(default_factory=partial(next, _stamps))
    seen: dict[bytes, int] = {}
    reused: dict[bytes, None] = {}  # a set would be visited
    reach: int = 0
    counted: int = 0
    least: int = 255
    counts: dict[bytes, int] = {}

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


class _Part(msgspec.Struct, gc=False, eq=False):
    """Pages of one use in a line: end token by key. `passed` were pinned when they were to leave,
    and are so still. `heap` has the others, once it is needed, and some that were among them, in
    their places when the use reached `reach`; `queued`: the line's queue has this part.

    Nothing to the garbage collector, as there is one for each request, so `line` is a number: a
    reference would close a circle."""

    line: int
    use: Use
    number: int
    waiting: dict[bytes, int] = {}
    passed: dict[bytes, int] = {}
    heap: list[tuple[int, bytes]] | None = None
    reach: int = 0
    queued: bool = False


class Pages:
    """The resident pages of a policy, each in one of its lines.

    Args:
        windows: by group, how many tokens before the end of a hit are needed; all, if not given.
            Pages before them, that only one request stored, leave before its others.

    Attributes:
        pinned: pages that must not leave. They keep their places, and are looked for only when they
            would be the next: most are not pinned for so long.
        lines: by number.
        parts: by number, the pages of one use in a line.
        home: by resident key, the number of its part.
    """

    def __init__(self, windows: Mapping[int, int]) -> None:
        self._windows = windows
        # How far a use goes on until pages have to be looked for that its windows have left behind
        self.stride = min(windows.values(), default=_BEYOND)
        self.pinned: set[bytes] = set()
        self.lines: list[Line] = []
        self.parts: dict[int, _Part] = {}
        # Dicts of keys and numbers, here of millions, are nothing to the garbage collector.
        self.home: dict[bytes, int] = {}
        self._passed = 0

    def __len__(self) -> int:
        return len(self.home)

    def part(self, key: bytes) -> _Part:
        """The pages that a resident one is one of."""
        return self.parts[self.home[key]]

    def line(self, key: bytes) -> Line:
        """That of a resident page."""
        return self.lines[self.part(key).line]

    @property
    def idle(self) -> int:
        """How many are not pinned."""
        return len(self.home) - len(self.pinned)

    def unpin(self, key: bytes) -> None:
        """A pinned page may leave again."""
        self.pinned.remove(key)
        if self._passed:
            part = self.part(key)
            end_token = part.passed.pop(key, None)
            if end_token is not None:
                self._passed -= 1
                self._wait(part, key, end_token)

    def add(self, key: bytes, end_token: int, line: Line, use: Use) -> None:
        """A page comes in."""
        part = line.part(use)
        self.home[key] = part.number
        line.size += 1
        self._wait(part, key, end_token)

    def move(self, keys: Iterable[bytes], line: Line, use: Use) -> None:
        """Pages become part of another use, perhaps in another line."""
        home, parts, lines, part = self.home, self.parts, self.lines, None
        for key in keys:
            old = parts[home[key]]
            if old.use is not use:
                old.use.reused.pop(key, None)
            if part is None:
                part = line.part(use)
            home[key] = part.number
            lines[old.line].size -= 1
            line.size += 1
            end_token = old.waiting.pop(key, None)
            if end_token is None:
                end_token = self._out_of(old, key)
            part.waiting[key] = end_token
            if part.heap is not None or not part.queued:
                self._wait(part, key, end_token)
            if not old.waiting:
                lines[old.line].clean(old)

    def pass_over(self, part: _Part, keys: Collection[bytes]) -> None:
        """Waiting pages are pinned, and one of them would be the next to leave."""
        part.passed.update((key, part.waiting.pop(key)) for key in keys)
        self._passed += len(keys)

    def gather(self, use: Use) -> None:
        """A request ended: its pages that others asked for since are its own again. Of those that
        are not here its counts are of no more use."""
        home = self.home
        for key in use.seen:
            if key in home and (part := self.part(key)).use is not use:
                use.reused[key] = None
                line = self.lines[part.line]
                if self._windows:  # it may still be in the heap, in another place
                    line.part(use).heap = None
                self.move((key,), line, use)
        for key in [key for key in use.counts if key not in home]:
            del use.counts[key]

    def remove(self, key: bytes) -> int:
        """A page goes out; its end token."""
        part = self.parts[self.home.pop(key)]
        part.use.reused.pop(key, None)
        line = self.lines[part.line]
        line.size -= 1
        self.pinned.discard(key)
        end_token = self._out_of(part, key)
        if not part.waiting:
            line.clean(part)
        return end_token

    def _out_of(self, part: _Part, key: bytes) -> int:
        end_token = part.waiting.pop(key, None)
        if end_token is None:
            end_token = part.passed.pop(key)
            self._passed -= 1
        return end_token

    def _wait(self, part: _Part, key: bytes, end_token: int) -> None:
        """One of a part's pages, perhaps put there just now, waits to leave."""
        part.waiting[key] = end_token
        if part.heap is not None:
            heapq.heappush(part.heap, (self.place(part.use, key, end_token), key))
        if not part.queued:
            part.queued = True
            self.lines[part.line].queue(part)

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
        self._number = len(pages.lines)
        pages.lines.append(self)
        self._parts: dict[Use, _Part] = {}
        # A heap of stamps, which may be outdated, and numbers of parts
        self._queue: list[tuple[int, int]] = []
        self._sweep_at = _LEAST_PARTS
        self.size = 0

    def oldest(self) -> Oldest | None:
        """The page that leaves next; None if all are pinned."""
        queue, pages = self._queue, self._pages
        pinned = 0
        while queue:
            stamp, number = queue[0]
            part = pages.parts[number]
            waiting, use = part.waiting, part.use
            if not waiting:
                heapq.heappop(queue)
                part.queued = False
                self.clean(part)
                continue
            if stamp != use.stamp:
                heapq.heapreplace(queue, (use.stamp, number))
                continue
            heap = part.heap
            behind = use.reach - part.reach >= pages.stride
            if heap is None or behind or len(heap) > 2 * len(waiting) + 64:
                place = pages.place
                heap = [(place(use, key, end_token), key) for key, end_token in waiting.items()]
                heapq.heapify(heap)
                part.heap, part.reach = heap, use.reach
            while (key := heap[0][1]) not in waiting:
                heapq.heappop(heap)
            if key not in pages.pinned:
                return key, waiting[key], use
            pinned += 1
            if pinned < _MOST_ONE_BY_ONE:
                pages.pass_over(part, (key,))
            else:
                pages.pass_over(part, [key for key in waiting if key in pages.pinned])
                part.heap = None
        return None

    def part(self, use: Use) -> _Part:
        """The pages of a use."""
        part = self._parts.get(use)
        if part is None:
            if len(self._parts) >= self._sweep_at:
                self._sweep()
            part = self._parts[use] = _Part(self._number, use, next(_numbers))
            self._pages.parts[part.number] = part
        return part

    def queue(self, part: _Part) -> None:
        """A part has waiting pages again."""
        heapq.heappush(self._queue, (part.use.stamp, part.number))

    def clean(self, part: _Part) -> None:
        """A page left the part: forget it if that was its last."""
        if not (part.queued or part.waiting or part.passed):
            del self._parts[part.use]
            del self._pages.parts[part.number]

    def _sweep(self) -> None:
        """Forget queued parts that have lost their pages: while there is room, nobody asks for the
        oldest page, and comes across them."""
        parts, queue = self._pages.parts, []
        for entry in self._queue:
            part = parts[entry[1]]
            part.queued = bool(part.waiting)
            if part.queued:
                queue.append(entry)
            else:
                self.clean(part)
        heapq.heapify(queue)
        self._queue = queue
        self._sweep_at = 2 * len(self._parts) + _LEAST_PARTS
