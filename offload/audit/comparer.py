"""Comparisons off the engine's thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from kvstrata.offload.audit.comparison import Comparison, Elements, compare

logger = logging.getLogger("kvstrata.audit")


class PagePair(NamedTuple):
    """Two pages of one group to compare; the views are valid until the result is taken."""

    number: int
    group: int
    computed: memoryview
    served: memoryview


class Compared(NamedTuple):
    """The end of a comparison; None where the comparison itself failed. `seconds` is its work."""

    number: int
    comparison: Comparison | None
    seconds: float


class Comparer:
    """One thread that compares pages in the order they come.

    Args:
        elements: of the pages of each group.
    """

    def __init__(self, elements: Mapping[int, Sequence[Elements]]) -> None:
        self._elements = elements
        self._pairs: SimpleQueue[PagePair | None] = SimpleQueue()
        self._done: deque[Compared] = deque()
        self._thread: threading.Thread | None = None
        self._failed = False  # and that was logged

    def submit(self, pair: PagePair) -> None:
        """Compare the pages some time soon."""
        if self._thread is None:  # the first one
            name = "kvstrata-audit"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
        self._pairs.put(pair)

    def take(self) -> list[Compared]:
        """The comparisons that ended since the last call."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def stop(self, timeout_s: float) -> None:
        """End after those that were submitted; wait so long for it."""
        if self._thread is not None:
            self._pairs.put(None)
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while pair := self._pairs.get():
            start = time.thread_time()
            comparison = None
            try:
                elements = self._elements[pair.group]
                comparison = compare(pair.computed, pair.served, elements)
            except Exception:  # an audit that cannot be made is no verdict
                if not self._failed:
                    logger.exception("pages of group %d cannot be compared", pair.group)
                self._failed = True
            self._done.append(Compared(pair.number, comparison, time.thread_time() - start))
