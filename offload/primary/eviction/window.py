"""A window for what is new, and admission by frequency to the rest: W-TinyLFU, for prefixes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kvstrata.offload.primary.eviction.frequency import ONE, Frequency
from kvstrata.offload.primary.eviction.order import Line, Oldest, Pages, Use
from kvstrata.offload.primary.eviction.policy import Ordered


class Windowed(Ordered):
    """W-TinyLFU (Einziger, Friedman and Manes, ACM Transactions on Storage 13.4, 2017), where a new
    page need not be stored at all.

    A new page comes into the window, or at once into the main part if it is asked for more often
    than the oldest there. The window's oldest has to be so to take that one's place; else it
    leaves. A page of the window that is used again moves to the main part. With a window of the
    whole this is LRU; with a small one, what is held stays, and what is asked for once passes by.

    A new page that finds the window full of pages of its own request is not worth storing: its
    beginning is. Where it has to be stored all the same, for a tier behind, it is the first to
    leave.

    Args:
        capacity: keys.
        windows: see `Line`.
        share: of the window, 0 to 1.
        frequency: of all keys; who made it counts.
    """

    def __init__(
        self, capacity: int, windows: Mapping[int, int], share: float, frequency: Frequency
    ) -> None:
        self.capacity = capacity
        self._windows = windows
        self._frequency = frequency
        self._share = share
        self._size(share)
        Windowed.clear(self)

    def clear(self) -> None:
        self._pages = Pages(self._windows)
        self._window, self._main, self._passing = (Line(self._pages) for _ in range(3))
        self._next: dict[bytes, Line] = {}  # where a page goes for which one was evicted

    @property
    def share(self) -> float:
        """Of the window."""
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        smaller = share < self._share
        self._share = share
        self._size(share)
        if smaller and self._window.size > self._main.size:
            # What is held is kept: nothing has to move, and the oldest are the first to leave.
            self._window, self._main = self._main, self._window

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def resident(self) -> Collection[bytes]:
        """The keys that are here."""
        return self._pages.home

    def ask(self, pages: Mapping[bytes, int], use: Use) -> None:
        home = self._pages.home
        here = [key for key in pages if key in home]
        if self._windows:
            use.reused.update(dict.fromkeys(here))
        if self._share >= 1.0:
            self._pages.move(here, self._window, use)
            return
        for key in here:
            line = self._pages.line(key)
            if line is self._passing:
                line = self._window
            elif line is self._window:
                line = self._main
                if self._main.size >= self._most_in_main:
                    self._demote()
            self._pages.move((key,), line, use)

    def evict(self, key: bytes, end_token: int, use: Use, *, must: bool) -> bytes | None:
        main = self._others(self._main, end_token, use) if self._main.size else None
        if main is not None and self._share < 1.0 and self._beats(key, use, main):
            return self._take(key, main, self._main)
        if main is not None and self._window.size < self._most_in_window:
            return self._take(key, main, self._window)
        window = self._others(self._window, end_token, use)
        while window is not None and main is not None and self._beats(window[0], window[2], main):
            self._pages.move(window[:1], self._main, window[2])
            if self._main.size > self._most_in_main:
                return self._take(key, main, self._window)
            window = self._others(self._window, end_token, use)
        if window is not None:
            return self._take(key, window, self._window)
        passing = self._passing.oldest()
        if passing is not None:
            return self._take(key, passing, self._passing)
        if not must:
            return None
        last = self._main.oldest() or self._window.oldest()
        return None if last is None else self._take(key, last, self._passing)

    def insert(self, key: bytes, end_token: int, use: Use) -> None:
        self.bring(key, end_token, use)
        self._pages.pinned.add(key)

    def bring(self, key: bytes, end_token: int, use: Use) -> None:
        """A new key became resident, which may leave at once."""
        line = self._next.pop(key, None)
        if line is None:  # there was room
            line = self._main if self._main.size < self._most_in_main else self._window
        self._pages.add(key, end_token, line, use)

    def _size(self, share: float) -> None:
        self._most_in_window = int(share * self.capacity)
        self._most_in_main = self.capacity - self._most_in_window

    def _beats(self, key: bytes, use: Use, held: Oldest) -> bool:
        """Whether a key was asked for more often than one that is held, before it was this time."""
        return self._frequency.of(key, use) > self._frequency.of(held[0], held[2]) + ONE

    def _demote(self) -> None:
        """The main part's oldest page goes back to the window, where it is old."""
        oldest = self._main.oldest()
        if oldest is not None:
            self._pages.move(oldest[:1], self._window, oldest[2])

    def _take(self, key: bytes, victim: Oldest, into: Line) -> bytes:
        self._pages.remove(victim[0])
        if into is not self._window or self._most_in_main:
            self._next = {key: into}
        return victim[0]

    def _others(self, line: Line, end_token: int, use: Use) -> Oldest | None:
        """The oldest page of a line, but none that the new one needs in its own prefix."""
        oldest = line.oldest()
        if oldest is None or self._pages.needs(use, end_token, oldest):
            return None
        return oldest
