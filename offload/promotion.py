"""Promotions: pages on their way from secondary tiers into the primary tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from kvstrata.offload.config import OffloadConfig
from kvstrata.offload.events import Report
from kvstrata.offload.kept import KeptPages
from kvstrata.offload.payoff import Part, Payoff
from kvstrata.offload.primary import Entry, PrimaryTier, Writer
from kvstrata.offload.request import RequestState
from kvstrata.offload.tier_jobs import Running, TierJobs
from kvstrata.offload.tier_link import TierLink
from kvstrata.tiers.base import JobResult, PageLayout, key_group

# Largest share of the promotions' room that one of several tiers may hold: what one tier never
# delivers must not keep the others from delivering.
MOST_OF_ONE_TIER = 0.75


@dataclass(slots=True)
class Batch:
    """What was reserved for a request in this step, in the order of look-up.

    `reach` is the furthest end, in tokens, of a page that was found in the primary tier behind
    reserved ones, and is of use only with them.
    """

    state: RequestState
    pages: list[tuple[TierLink, Entry]] = field(default_factory=list)
    reach: int = 0


class Promotions:
    """Reserves slots during a step, in prefix order, and sends them off as batches at its end.

    Args:
        config: for the promotions' share and their deadline.
        primary: where the pages go.
        kept: holds what arrived until it is loaded.
        jobs: the tiers' jobs.
        payoff: tells whether loading is worth it.
        layouts: page layout by group.
        clock: seconds, monotonic.
        report: the manager's.
    """

    def __init__(
        self,
        config: OffloadConfig,
        primary: PrimaryTier,
        kept: KeptPages,
        jobs: TierJobs,
        payoff: Payoff,
        layouts: Mapping[int, PageLayout],
        clock: Callable[[], float],
        report: Report,
    ) -> None:
        self._deadline_s = config.promotion_deadline_s
        self._most = max(1, int(primary.slots * config.promotion_fraction))
        self._primary = primary
        self._kept = kept
        self._jobs = jobs
        self._payoff = payoff
        self._layouts = layouts
        self._clock = clock
        self._report = report
        self.unsent: dict[str, Batch] = {}  # by request; empty at the end of each step
        self._started: dict[Entry, float] = {}

    def __len__(self) -> int:
        return len(self._started)

    def may_pay(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether it makes sense to ask the tier for the page."""
        if not self._payoff.weighs:
            return True
        layout = self._layouts[key_group(key)]
        return self._payoff.may_pay(Part(link, layout.nbytes, layout.tokens), state)

    def in_time(self, entry: Entry) -> bool:
        """Whether the page, under promotion, may still be waited for."""
        return self._clock() - self._started[entry] < self._deadline_s

    def reserve(self, link: TierLink, key: bytes, end_token: int, state: RequestState) -> bool:
        """Take a slot for the page; False if there is no room for it now."""
        taken = None
        most = self._most
        if len(self._jobs.links) > 1:
            most = max(1, int(most * MOST_OF_ONE_TIER))
        if link.promoting < most and self._primary.promoting < self._most:
            taken = self._primary.allocate([(key, end_token)], Writer.TIER)
        if taken is None:
            self._report.counters["promotion_no_room"] += 1
            return False
        (entry,), evicted = taken
        self._report.left(evicted)
        # Tiers before this one do not have the page; of those behind it nothing is known.
        entry.offered = ~(link.bit - 1)
        link.promoting += 1
        self._started[entry] = self._clock()
        state.sources[key] = link.name
        batch = self.unsent.get(state.view.req_id)
        if batch is None:
            batch = self.unsent[state.view.req_id] = Batch(state)
        batch.pages.append((link, entry))
        return True

    def reached(self, req_id: str, end_token: int) -> None:
        """A page of the primary tier, in use by the request, ends there."""
        batch = self.unsent.get(req_id)
        if batch is not None and end_token > batch.reach:
            batch.reach = end_token

    def send(self) -> None:
        """Send off what was reserved in this step: one job for each request and tier."""
        unsent, self.unsent = self.unsent, {}
        for batch in unsent.values():
            state, pages = batch.state, batch.pages
            worth = self._worth(batch)
            for link, entry in pages[worth:]:
                state.failed.add((link.index, entry.key))
                self._end(link, entry, state, good=False)
            jobs: dict[TierLink, list[Entry]] = {}
            for link, entry in pages[:worth]:
                jobs.setdefault(link, []).append(entry)
            for link, entries in jobs.items():
                self._jobs.submit(link, entries, state.view, promotion=True)

    def end(self, job: Running, result: JobResult, state: RequestState | None) -> None:
        """A job ended; `state` is that of the request it was for, if it still lives."""
        arrived = []
        for key, entry in job.entries.items():
            good = key not in result.failed
            if entry.attached:
                if good:
                    arrived.append(key)
                elif state is not None:
                    state.failed.add((job.link.index, key))
            self._end(job.link, entry, state, good=good)
            if entry.attached:
                self._kept.keep(entry)
        self._report.came(arrived)

    def clear(self) -> None:
        """Forget what was not sent off, and how long the rest is under way."""
        for batch in self.unsent.values():
            for link, entry in batch.pages:
                link.promoting -= 1
                self._primary.finish_writes((entry,), good=False)
        self.unsent.clear()
        self._started.clear()

    def _end(self, link: TierLink, entry: Entry, state: RequestState | None, *, good: bool) -> None:
        link.promoting -= 1
        self._started.pop(entry, None)
        if state is not None and not good:
            state.sources.pop(entry.key, None)
        self._primary.finish_writes((entry,), good=good)

    def _worth(self, batch: Batch) -> int:
        """How many of the reserved pages to load. Each spares the tokens up to its end."""
        ends = [entry.end_token for _, entry in batch.pages]
        layouts = [self._layouts[key_group(entry.key)] for _, entry in batch.pages]
        start = min(end - layout.tokens for end, layout in zip(ends, layouts, strict=True))
        groups = {key_group(entry.key) for _, entry in batch.pages}
        in_order = len(groups) == 1 and all(one < two for one, two in pairwise(ends))
        reach = max(*ends, batch.reach)
        if in_order:
            tokens = [end - begin for begin, end in pairwise([start, *ends[:-1], reach])]
        else:
            tokens = [0] * (len(ends) - 1) + [reach - start]
        parts = [
            Part(link, layout.nbytes, spared)
            for (link, _), layout, spared in zip(batch.pages, layouts, tokens, strict=True)
        ]
        return self._payoff.worth(parts, batch.state, in_order=in_order)
