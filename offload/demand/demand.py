"""Demand: what requests ask for, as far as it counts for what is kept, and where."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvstrata.offload.cascade import Cascades
from kvstrata.offload.events import Report
from kvstrata.offload.primary.holds import Holds
from kvstrata.offload.primary.slots import Entry, PrimaryTier
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.reuse import ReuseCounter
from kvstrata.offload.secondary.tiers import TierJobs
from kvstrata.tiers.base import RequestView


@dataclass(slots=True, eq=False)
class Demand:
    """Tells the primary tier and the secondary ones who asks for which pages."""

    _primary: PrimaryTier
    _holds: Holds  # pins pages
    _reuse: ReuseCounter  # counts for the engine's `store_threshold`
    _cascades: Cascades
    _jobs: TierJobs
    _report: Report

    def ask(self, ends: Mapping[bytes, int], state: RequestState) -> None:
        """A request asks for pages, perhaps once more; their end tokens by key."""
        use = state.use
        use.renew()
        seen = use.seen
        pages = {key: end for key, end in ends.items() if key not in seen} if seen else dict(ends)
        if pages:
            self._primary.ask(pages, use)
        if state.coming:
            came = {key: end for key, end in ends.items() if key in state.coming}
            state.coming -= came.keys()
            pages |= came
        if pages:
            self._reuse.count(pages)
            self._cascades.asked(pages)

    def meet(self, entries: Sequence[Entry], state: RequestState) -> None:
        """A request has, or is about to have, ready pages: tiers that lack them may want them now,
        and it may want to keep them."""
        self._cascades.give(entries, state)
        if state.parameters.pin_seconds > 0.0:
            refused = self._holds.pin(entries, state.parameters.pin_seconds)
            self._report.counters["pins_refused"] += refused

    def touch_tiers(self, keys: Collection[bytes], request: RequestView) -> None:
        """Tell the tiers that the pages, in prefix order, were used."""
        if not keys:
            return
        for link in self._jobs.links:
            if link.breaker.closed:
                link.tier.touch(keys, request)
