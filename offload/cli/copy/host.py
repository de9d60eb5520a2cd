"""What a medium tells while pages are copied, where there is no engine to hear it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kvstrata.tiers.process.medium import News

logger = logging.getLogger("kvstrata.copy")


class PlaceHost:
    """The `Host` of a place's medium.

    Args:
        shown: the place as its user names it.
    """

    is_behind = False

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._reported: set[str] = set()

    def report(self, cause: str, detail: str) -> None:
        """Logged once per cause, with the place."""
        if cause not in self._reported:
            self._reported.add(cause)
            logger.warning("kvstrata: %s: %s: %s", self._shown, cause, detail)

    def say(self, text: str) -> None:
        """Limits of servers, which are theirs to tell."""

    def tell(self, news: Sequence[News]) -> None:
        """Nobody here looks pages up."""

    def complete(self, complete: bool) -> None:
        """Nor does anybody wait for that."""

    def trust(self, trusted: bool) -> None:
        """Only audits take trust away, and there are none."""

    def upkeep(self, done: Mapping[str, int]) -> None:
        """Evictions are those of servers."""

    def figures(
        self, gauges: Mapping[str, float], samples: Mapping[str, Sequence[float]] = {}
    ) -> None:
        """And so are metrics."""
