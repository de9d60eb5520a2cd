"""Increments: totals that only grow, as vLLM wants them told."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)


class Increments:
    """Statistics from one reading to the next; `stats` are those that were not taken yet."""

    def __init__(self) -> None:
        self.stats = OffloadingConnectorStats()
        self._seen: dict[tuple[str, ...], float] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def take(self) -> OffloadingConnectorStats:
        """What was told since the last call."""
        taken, self.stats = self.stats, OffloadingConnectorStats()
        return taken

    def count(self, metric: str, total: float, *labels: str) -> None:
        """Of that there was so much in all."""
        # A tier that was opened anew counts from zero again: never tell less than nothing. But
        # that there is nothing yet is told once, for whoever asks how fast it grows.
        key = (metric, *labels)
        increment = total - self._seen.get(key, 0)
        is_new = key not in self._seen
        self._seen[key] = total
        if increment > 0 or is_new:
            self.stats.increase_counter(metric, increment, labels)

    def gauge(self, metric: str, value: float, *labels: str) -> None:
        """It is so much now; told if it changed, since vLLM logs all that it is told."""
        if self._told.get((metric, *labels)) != value:
            self._told[(metric, *labels)] = value
            self.stats.set_gauge(metric, value, labels)

    def observe(self, metric: str, values: Iterable[float], *labels: str) -> None:
        """These values were seen."""
        for value in values:
            self.stats.observe_histogram(metric, value, labels)
