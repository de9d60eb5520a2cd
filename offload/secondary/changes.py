"""What the secondary tiers tell of pages that come and go, a little in each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from weakref import WeakSet

from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import PageKey

# Of each tier in one step: what others did, and what is there at the start. vLLM makes a payload
# of each, which takes it some microseconds; all of a full index is told in 2,048 steps.
MOST_CHANGES = 256


class TierChanges:
    """Takes the changes of the tiers that tell them.

    Attributes:
        more: what could wait was left for the next step, of a tier whose events are published.
    """

    def __init__(self, links: Callable[[], Iterable[TierLink]]) -> None:
        self._links = links
        self._begun: WeakSet[TierLink] = WeakSet()
        self.more = False

    def take(self) -> Iterator[tuple[list[PageKey], bool, TierLink]]:
        """Keys of a tier that came (True) or left (False), those of a key in their order."""
        self.more = False
        for link in self._links():
            if not link.tier.tells_changes:
                continue
            changes = list(link.tier.take_changes(MOST_CHANGES, anew=link not in self._begun))
            self._begun.add(link)
            self.more |= link.kv_events and len(changes) >= MOST_CHANGES
            for here, pairs in groupby(changes, itemgetter(1)):
                yield [key for key, _ in pairs], here, link

    def begin_anew(self) -> None:
        """Whoever hears the changes forgot all: tell of everything once more."""
        self._begun.clear()
        self.more = False
