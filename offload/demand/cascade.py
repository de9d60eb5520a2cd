"""Cascades: pages on their way from the primary tier into secondary tiers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstrata.offload.context import Context
from kvstrata.offload.primary.slots import Entry, Hold
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running
from kvstrata.tiers.base import JobResult, RequestView

# Pages are given to secondary tiers only while less than this share of the primary tier is held
# by cascades, promotions and pins; and largest share that pages on their way to one of several
# tiers may hold. A tier that hangs must leave room for the GPU's pages, and for the other tiers'.
MOST_CASCADING = 0.75
MOST_TO_ONE_TIER = 0.5
# A tier whose queue of stores would take longer is given no more until it is shorter: pages in
# the queue cannot be evicted.
LONGEST_QUEUE_S = 10.0


class Cascades:
    """Gives pages to the tiers that should have them, as far as the tiers keep up."""

    def __init__(self, context: Context) -> None:
        self._primary, self._jobs = context.primary, context.jobs
        self._report = context.report

    def wanted(self, state: RequestState) -> bool:
        """Whether some tier may be given the request's pages."""
        return any(
            link.breaker.closed and not link.trust.lost and state.parameters.allow(link.name)
            for link in self._jobs.sinks
        )

    def give(self, entries: Sequence[Entry], state: RequestState) -> None:
        """Store ready pages, in prefix order, in the tiers that should have them and do not."""
        for link in self._jobs.sinks:
            bit = link.bit
            given = state.given.get(bit)
            if given is None:
                due = [entry for entry in entries if not entry.offered & bit]
            else:
                due = [entry for entry in entries if entry.key not in given]
            if not due or link.trust.lost or not state.parameters.allow(link.name):
                continue
            if link.asked.counts and given is None:
                wanted = set(link.asked.wanted([entry.key for entry in due]))
                due = [entry for entry in due if entry.key in wanted]
            probe = link.breaker.wants_probe
            chosen = self._fitting(link, due) if link.breaker.closed else due[:probe]
            if len(chosen) < len(due):
                self._report.counters[f"cascade_skipped:{link.name}"] += len(due) - len(chosen)
            if chosen:
                if given is not None:
                    given.update([entry.key for entry in chosen])
                self._submit(link, chosen, state.view, probe=probe)

    def probe(self) -> None:
        """Give a page it knows to each tier that was taken out and may be well again.

        A page that it does not know may be one that a request wanted kept from it. One that is
        given none is asked for the next page.
        """
        for link in self._jobs.links:
            if not link.may_store:
                link.breaker.try_again()
            elif link.breaker.wants_probe and not link.trust.lost:
                known = (entry for entry in reversed(link.recent) if entry.attached and entry.ready)
                if (entry := next(known, None)) is not None:
                    self._submit(link, [entry], RequestView("probe"), probe=True)

    def end(self, job: Running, result: JobResult) -> None:
        """A job ended."""
        good, bad = job.parted(result)
        for entry in bad:
            entry.offered &= ~job.link.bit  # to be tried when it is asked for again
        self._primary.let_go(job.entries, Hold.CASCADE)
        if job.link in self._jobs.links and not job.link.tier.tells_changes:
            self._report.came([entry.key for entry in good], job.link)

    def _submit(
        self, link: TierLink, entries: Sequence[Entry], request: RequestView, *, probe: bool = False
    ) -> None:
        if probe:
            link.breaker.probing()
        bit = link.bit
        for entry in entries:
            entry.offered |= bit
        link.recent.extend(entries[:1])
        self._primary.hold(entries, Hold.CASCADE)
        self._jobs.submit(link, entries, request, promotion=False, probe=probe)

    def _fitting(self, link: TierLink, due: Sequence[Entry]) -> Sequence[Entry]:
        """The first pages, as many as the tier may be given now."""
        slots = self._primary.slots
        several = len(self._jobs.sinks) > 1
        most = math.ceil(slots * (MOST_TO_ONE_TIER if several else MOST_CASCADING))
        due = due[: max(0, most - link.stores.pages)]
        room = math.ceil(slots * MOST_CASCADING) - self._primary.held_long
        nbytes, cost = link.stores.nbytes, link.stores.cost
        time_left = cost.seconds(nbytes + self._jobs.nbytes(due)) <= LONGEST_QUEUE_S
        if time_left and len(due) <= room:
            return due
        chosen: list[Entry] = []
        for entry, size in zip(due, self._jobs.sizes(due), strict=True):
            nbytes += size
            # With nothing under way one page goes in any case, to see how long it takes now.
            if (chosen or link.stores.pages) and cost.seconds(nbytes) > LONGEST_QUEUE_S:
                break
            room -= not entry.is_held(Hold.CASCADE)
            if room < 0:
                break
            chosen.append(entry)
        return chosen
