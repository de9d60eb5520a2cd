"""A window for what is new, and admission by frequency to the rest: W-TinyLFU, for prefixes."""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata.offload.eviction import EvictionPolicy
from kvstrata.offload.frequency import ONE, Frequency
from kvstrata.offload.line import Line, Oldest, Use


class Windowed(EvictionPolicy):
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
        self._most_in_window = int(share * capacity)
        self._window, self._main, self._passing = (Line(windows) for _ in range(3))
        self._next: dict[bytes, Line] = {}  # where a page goes for which one was evicted

    @property
    def share(self) -> float:
        """Of the window."""
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        smaller = share < self._share
        self._share = share
        self._most_in_window = int(share * self.capacity)
        if smaller and len(self._window) > len(self._main):
            # What is held is kept: nothing has to move, and the oldest are the first to leave.
            self._window, self._main = self._main, self._window

    def __len__(self) -> int:
        return len(self._window) + len(self._main) + len(self._passing)

    def __contains__(self, key: bytes) -> bool:
        return self._line(key) is not None

    def ask(self, pages: Mapping[bytes, int], use: Use) -> None:
        for key in pages:
            line = self._line(key)
            if line is None:
                continue
            end_token, _, pinned = line.remove(key)
            use.reused.add(key)
            if line is self._passing or self._share >= 1.0:
                line = self._window
            elif line is self._window:
                line = self._main
                if len(self._main) >= self._most_in_main:
                    self._demote()
            line.add(key, end_token, use, pinned=pinned)

    def evict(self, key: bytes, end_token: int, use: Use, *, must: bool) -> bytes | None:
        main = _others(self._main, end_token, use)
        if main is not None and self._share < 1.0 and self._beats(key, main.key):
            return self._take(key, main, self._main, self._main)
        window = _others(self._window, end_token, use)
        if main is not None and len(self._window) < self._most_in_window:
            return self._take(key, main, self._main, self._window)
        while window is not None and main is not None and self._beats(window.key, main.key):
            self._window.remove(window.key)
            self._main.add(window.key, window.end_token, window.use, pinned=False)
            if len(self._main) > self._most_in_main:
                return self._take(key, main, self._main, self._window)
            window = _others(self._window, end_token, use)
        if window is not None:
            return self._take(key, window, self._window, self._window)
        passing = self._passing.oldest()
        if passing is not None:
            return self._take(key, passing, self._passing, self._passing)
        if not must:
            return None
        for line in (self._main, self._window):
            oldest = line.oldest()
            if oldest is not None:
                return self._take(key, oldest, line, self._passing)
        return None

    def insert(self, key: bytes, end_token: int, use: Use) -> None:
        line = self._next.pop(key, None)
        if line is None:  # there was room
            line = self._main if len(self._main) < self._most_in_main else self._window
        line.add(key, end_token, use, pinned=True)

    def pin(self, key: bytes) -> None:
        self._home(key).pin(key)

    def unpin(self, key: bytes) -> None:
        self._home(key).unpin(key)

    def remove(self, key: bytes) -> None:
        self._home(key).remove(key)

    def ended(self, use: Use) -> None:
        pass

    def idle(self) -> int:
        return sum(len(line) - line.pinned for line in (self._window, self._main, self._passing))

    def clear(self) -> None:
        self._window, self._main, self._passing = (Line(self._windows) for _ in range(3))
        self._next.clear()

    @property
    def _most_in_main(self) -> int:
        return self.capacity - self._most_in_window

    def _line(self, key: bytes) -> Line | None:
        if key in self._window:
            return self._window
        if key in self._main:
            return self._main
        return self._passing if key in self._passing else None

    def _home(self, key: bytes) -> Line:
        if key in self._window:
            return self._window
        return self._main if key in self._main else self._passing

    def _beats(self, key: bytes, held: bytes) -> bool:
        """Whether a key was asked for more often than one that is held, before it was this time."""
        return self._frequency.of(key) > self._frequency.of(held) + ONE

    def _demote(self) -> None:
        """The main part's oldest page goes back to the window, where it is old."""
        oldest = self._main.oldest()
        if oldest is not None:
            self._main.remove(oldest.key)
            self._window.add(oldest.key, oldest.end_token, oldest.use, pinned=False)

    def _take(self, key: bytes, page: Oldest, line: Line, into: Line) -> bytes:
        line.remove(page.key)
        self._next = {key: into}
        return page.key


def _others(line: Line, end_token: int, use: Use) -> Oldest | None:
    """The oldest page of a line, but none that comes before the new one in its own prefix."""
    oldest = line.oldest()
    if oldest is None or (oldest.use is use and oldest.end_token < end_token):
        return None
    return oldest
