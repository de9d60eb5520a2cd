"""S3-FIFO as an order of eviction, to be held against ours; a configuration calls it NAME."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from kvstrata.offload.primary.eviction.order import Line, Pages, Use
from kvstrata.offload.primary.eviction.policy import Ordered
from kvstrata.tiers.base import PageKey

# Of the paper: the small queue's share of the cache, the most that is counted of a page's uses, and
# how many of them bring it into the main queue.
SMALL_SHARE = 0.1
MOST_USES = 3
ENOUGH_USES = 2


class S3Fifo(Ordered):
    """S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023,
    algorithm 1), for prefixes: of the pages that one request stored, the last leaves first.

    A new page comes into a small queue. If it was used again by the time it gets to its end, it
    goes on into the main queue, else out, and its key is remembered: should it come again soon, it
    comes into the main queue. There each use gives a page one more turn.
    """

    def __init__(self, capacity: int, windows: Mapping[int, int]) -> None:
        self._windows = windows
        self._most_in_small = max(1, int(SMALL_SHARE * capacity))
        self._most_ghosts = capacity - self._most_in_small
        self.clear()

    def clear(self) -> None:
        self._pages = Pages(self._windows)
        self._small, self._main = Line(self._pages), Line(self._pages)
        self._ghosts: OrderedDict[PageKey, None] = OrderedDict()
        self._uses: dict[PageKey, int] = {}

    def ask(self, pages: Mapping[PageKey, int], use: Use) -> None:
        home, uses = self._pages.home, self._uses
        for key in pages:
            if key in home:
                uses[key] = min(MOST_USES, uses.get(key, 0) + 1)

    def evict(self, key: PageKey, end_token: int, use: Use, *, must: bool) -> PageKey | None:
        pages, uses = self._pages, self._uses
        while True:
            from_small = self._small.size >= self._most_in_small
            lines = (self._small, self._main) if from_small else (self._main, self._small)
            line = lines[0]
            oldest = line.oldest()
            if oldest is None:
                line = lines[1]
                oldest = line.oldest()
            if oldest is None or (not must and pages.needs(use, end_token, oldest)):
                return None
            victim = oldest[0]
            used = uses.get(victim, 0)
            if used >= (ENOUGH_USES if line is self._small else 1):
                pages.move((victim,), self._main, Use())  # behind all others
                uses[victim] = 0 if line is self._small else used - 1
                continue
            if line is self._small:
                self._remember(victim)
            self.remove(victim)
            return victim

    def insert(self, key: PageKey, end_token: int, use: Use) -> None:
        again = key in self._ghosts
        if again:
            del self._ghosts[key]
        self._pages.add(key, end_token, self._main if again else self._small, use)
        self._pages.pinned.add(key)

    def remove(self, key: PageKey) -> None:
        super().remove(key)
        self._uses.pop(key, None)

    def _remember(self, key: PageKey) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)

    def ended(self, use: Use) -> None:
        """Being used moves no page."""


NAME = f"{S3Fifo.__module__}:{S3Fifo.__name__}"
