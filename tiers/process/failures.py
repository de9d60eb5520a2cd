"""Counting what goes wrong, and one log line per kind."""

from __future__ import annotations

import logging
from collections import Counter


class Failures:
    """Failures of a tier by cause since the start, in the engine's process."""

    def __init__(self, tier: str) -> None:
        """tier: its short name."""
        self._counts: Counter[str] = Counter()
        self._tier = tier
        self._logger = logging.getLogger(f"kvstrata.tiers.{tier}")

    def count(self, cause: str, detail: str, number: int = 1) -> None:
        """Count failures; the first of each cause is logged with its detail."""
        if not self._counts[cause]:
            self.say(f"{cause}: {detail} (logged once per cause; counted from now on)")
        self._counts[cause] += number

    def say(self, text: str) -> None:
        """Log what the operator should know."""
        self._logger.warning("kvstrata %s tier: %s", self._tier, text)

    def totals(self) -> dict[str, int]:
        """A copy of the counts."""
        return dict(self._counts)
