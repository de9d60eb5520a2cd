"""Which page of the primary tier goes next, and which new page is worth its place.

Pure book-keeping over keys. The policies: `lru` here, `arc` (arc.py) and `auto` (auto.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from kvstrata.offload.primary.eviction.order import Line, Pages, Use
from kvstrata.tiers.base import PageKey


class EvictionPolicy(ABC):
    """Resident keys in the order of eviction; every key is either idle or pinned.

    A key belongs to the request, the `Use`, that asked for it last. A policy of your own is named
    by `eviction_policy` as "package.module:Class". It runs on the scheduler's thread: it must not
    raise, and must be quick. What a use asked for (`seen`) is there until `ended` returns.
    """

    @abstractmethod
    def __init__(self, capacity: int, windows: Mapping[int, int]) -> None:
        """Begin with nothing; at most `capacity` keys will be resident.

        `windows`: see `Line`.
        """

    @abstractmethod
    def ask(self, pages: Mapping[PageKey, int], use: Use) -> None:
        """A request asks for pages, for each the first time: to load or to store them.

        `pages` has their end tokens. Those that are resident were there before: they are reused.
        """

    @abstractmethod
    def evict(self, key: PageKey, end_token: int, use: Use, *, must: bool) -> PageKey | None:
        """Choose an idle key to make room for a new one, forget it as resident and return it.

        None: no key is idle, or none is worth less than the new one, which then is not inserted.
        `must`: the new one needs the room in any case.
        """

    @abstractmethod
    def insert(self, key: PageKey, end_token: int, use: Use) -> None:
        """A new key became resident; it starts pinned (it is being written)."""

    @abstractmethod
    def pin(self, key: PageKey) -> None:
        """An idle key must not be evicted until `unpin`; it keeps its place in the order."""

    @abstractmethod
    def unpin(self, key: PageKey) -> None:
        """A pinned key may be evicted again."""

    @abstractmethod
    def remove(self, key: PageKey) -> None:
        """A resident key is gone for another reason than eviction; no trace is kept."""

    @abstractmethod
    def ended(self, use: Use) -> None:
        """A request ended; its use is complete."""

    @abstractmethod
    def idle(self) -> int:
        """How many keys could be evicted now."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""


class Ordered(EvictionPolicy):
    """What the policies have in common whose pages are in lines."""

    _pages: Pages

    def pin(self, key: PageKey) -> None:
        self._pages.pinned.add(key)

    def unpin(self, key: PageKey) -> None:
        self._pages.unpin(key)

    def remove(self, key: PageKey) -> None:
        self._pages.remove(key)

    def ended(self, use: Use) -> None:
        self._pages.gather(use)

    def idle(self) -> int:
        return self._pages.idle


class LRU(Ordered):
    """Least recently used first."""

    def __init__(self, capacity: int, windows: Mapping[int, int]) -> None:
        self._windows = windows
        self.clear()

    def ask(self, pages: Mapping[PageKey, int], use: Use) -> None:
        here = [key for key in pages if key in self._pages.home]
        if self._windows:
            use.reused.update(dict.fromkeys(here))
        self._pages.move(here, self._line, use)

    def evict(self, key: PageKey, end_token: int, use: Use, *, must: bool) -> PageKey | None:
        oldest = self._line.oldest()
        if oldest is None:
            return None
        if not must and self._pages.needs(use, end_token, oldest):
            return None  # its beginning is worth more than its end
        self._pages.remove(oldest[0])
        return oldest[0]

    def insert(self, key: PageKey, end_token: int, use: Use) -> None:
        self._pages.add(key, end_token, self._line, use)
        self._pages.pinned.add(key)

    def clear(self) -> None:
        self._pages = Pages(self._windows)
        self._line = Line(self._pages)
