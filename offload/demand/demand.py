"""Demand: what requests ask for, as far as it counts for what is kept, and where."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvstrata.offload.cascade import Cascades
from kvstrata.offload.context import Context
from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.request.request import RequestState
from kvstrata.tiers.base import RequestView


@dataclass(slots=True, eq=False)
class Demand:
    """Tells the primary tier and the secondary ones who asks for which pages."""

    _context: Context
    _cascades: Cascades

    def ask(self, ends: Mapping[bytes, int], state: RequestState) -> None:
        """A request asks for pages, perhaps once more; their end tokens by key."""
        use = state.use
        use.renew()
        seen = use.seen
        pages = {key: end for key, end in ends.items() if key not in seen} if seen else dict(ends)
        if pages:
            self._context.primary.ask(pages, use)
        if state.coming:
            came = {key: end for key, end in ends.items() if key in state.coming}
            state.coming -= came.keys()
            pages |= came
        if pages:
            self._context.reuse.count(pages)
            for link in self._context.jobs.links:
                link.asked.count(pages)

    def meet(self, entries: Sequence[Entry], state: RequestState) -> None:
        """A request has, or is about to have, ready pages: tiers that lack them may want them now,
        and it may want to keep them."""
        self._cascades.give(entries, state)
        if state.parameters.pin_seconds > 0.0:
            refused = self._context.holds.pin(entries, state.parameters.pin_seconds)
            self._context.report.counters["pins_refused"] += refused

    def touch_tiers(self, keys: Collection[bytes], request: RequestView) -> None:
        """Tell the tiers that the pages, in prefix order, were used."""
        for link in self._context.jobs.links if keys else ():
            if link.breaker.closed:
                link.tier.touch(keys, request)
