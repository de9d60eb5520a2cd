"""Comparisons off the engine's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from kvstrata.offload.audit.comparison import Comparison, Elements, compare

logger = logging.getLogger("kvstrata.audit")


class Compared(NamedTuple):
    """The end of a comparison; None where the comparison itself failed. `seconds` is its work."""

    comparison: Comparison | None
    seconds: float


class Comparer:
    """One thread, started for the first pair, that compares pages in the order they come.

    Args:
        elements: of the pages of each group.
    """

    def __init__(self, elements: Mapping[int, Sequence[Elements]]) -> None:
        self._elements = elements
        self._thread = ThreadPoolExecutor(1, "kvstrata-audit")
        self._failed = False  # and that was logged

    def submit(self, group: int, computed: memoryview, served: memoryview) -> Future[Compared]:
        """Compare two pages some time soon; the views are valid until that is done."""
        return self._thread.submit(self._compare, group, computed, served)

    def _compare(self, group: int, computed: memoryview, served: memoryview) -> Compared:
        start = time.thread_time()
        comparison = None
        try:
            comparison = compare(computed, served, self._elements[group])
        except Exception:  # an audit that cannot be made is no verdict
            if not self._failed:
                logger.exception("pages of group %d cannot be compared", group)
            self._failed = True
        return Compared(comparison, time.thread_time() - start)
