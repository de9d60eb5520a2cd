"""ARC: adaptive replacement between pages used once and pages used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from kvstrata.offload.primary.eviction.order import Line, Pages, Use
from kvstrata.offload.primary.eviction.policy import Ordered


class ARC(Ordered):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003, figure 4).

    T1 holds keys used once, T2 keys used again, B1 and B2 the keys lately evicted from each; a miss
    that is found in B1 or B2 moves the target size of T1.
    """

    def __init__(self, capacity: int, windows: Mapping[int, int]) -> None:
        self._capacity = capacity
        self._windows = windows
        self.clear()

    def clear(self) -> None:
        self._b1: OrderedDict[bytes, None] = OrderedDict()
        self._b2: OrderedDict[bytes, None] = OrderedDict()
        self._target = 0.0  # p of the paper: wanted size of T1, in keys
        self._pages = Pages(self._windows)
        self._t1, self._t2 = Line(self._pages), Line(self._pages)

    def ask(self, pages: Mapping[bytes, int], use: Use) -> None:
        # From the end, as they would have come: what is adapted to last counts most.
        for key in reversed(list(pages)):
            if key in self._pages.home:
                if self._windows:
                    use.reused[key] = None
                self._pages.move((key,), self._t2, use)
            elif key in self._b1:
                step = max(1.0, len(self._b2) / len(self._b1))
                self._target = min(self._target + step, float(self._capacity))
            elif key in self._b2:
                step = max(1.0, len(self._b1) / len(self._b2))
                self._target = max(self._target - step, 0.0)

    def evict(self, key: bytes, end_token: int, use: Use, *, must: bool) -> bytes | None:
        size = self._t1.size
        from_t1 = size > self._target or (key in self._b2 and 0 < size == self._target)
        lines = [(self._t1, self._b1), (self._t2, self._b2)]
        for line, ghosts in lines if from_t1 else reversed(lines):
            oldest = line.oldest()
            if oldest is None:
                continue
            if not must and self._pages.needs(use, end_token, oldest):
                continue  # its beginning is worth more than its end
            victim = oldest[0]
            self._pages.remove(victim)
            ghosts[victim] = None
            return victim
        return None

    def insert(self, key: bytes, end_token: int, use: Use) -> None:
        again = False
        for ghosts in (self._b1, self._b2):
            if key in ghosts:
                del ghosts[key]
                again = True
        self._pages.add(key, end_token, self._t2 if again else self._t1, use)
        self._pages.pinned.add(key)
        self._trim_ghosts()

    def _trim_ghosts(self) -> None:
        while self._b1 and self._t1.size + len(self._b1) > self._capacity:
            self._b1.popitem(last=False)
        total = len(self._pages) + len(self._b1) + len(self._b2)
        while self._b2 and total > 2 * self._capacity:
            self._b2.popitem(last=False)
            total -= 1
