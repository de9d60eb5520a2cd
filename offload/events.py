"""What the manager reports: totals that only grow, and pages that came and went."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvstrata.offload.secondary.tier import TierLink


class Event(NamedTuple):
    """Pages came into (or left) a tier; `tier` is None for the primary tier.

    Not `announced`: they were to come, some request waited for them perhaps, and never did.
    """

    keys: list[bytes]
    removed: bool
    tier: TierLink | None
    announced: bool = True


class Report:
    """Totals by name (`<event>` or `<event>:<tier>`), and the events not yet taken."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.events: list[Event] = []

    def came(self, keys: list[bytes], tier: TierLink | None = None) -> None:
        """Pages came into a tier, None for the primary tier."""
        if keys:
            self.events.append(Event(keys, removed=False, tier=tier))

    def left(self, keys: list[bytes], tier: TierLink | None = None) -> None:
        """Pages left a tier, None for the primary tier: those were evicted."""
        if keys:
            self.events.append(Event(keys, removed=True, tier=tier))
            if tier is None:
                self.counters["evicted_pages"] += len(keys)

    def given_up(self, keys: list[bytes]) -> None:
        """Pages of the primary tier will not come, of which no `came` was said."""
        if keys:
            self.events.append(Event(keys, removed=True, tier=None, announced=False))
