"""Promotions: pages on their way from secondary tiers into the primary tier."""

from __future__ import annotations

import math
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
# Promotions start only while less than this share of the primary tier is held by promotions
# (those that hang too), cascades and pins: there must be room for the GPU's pages.
MOST_HELD = 0.9


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
        asked: told of the pages that a request asks for.
        held: slots held by promotions, cascades and pins.
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
        asked: Callable[[Mapping[bytes, int], RequestState], None],
        held: Callable[[], int],
        clock: Callable[[], float],
        report: Report,
    ) -> None:
        self._deadline_s = config.promotion_deadline_s
        self._fraction = config.promotion_fraction
        self._asked = asked
        self._held = held
        self._primary = primary
        self._kept = kept
        self._jobs = jobs
        self._payoff = payoff
        self._layouts = layouts
        self._clock = clock
        self._report = report
        self.unsent: dict[str, Batch] = {}  # by request; empty at the end of each step
        self._step = 0
        self._started: dict[Entry, tuple[TierLink, float]] = {}  # those in time, oldest first

    def __len__(self) -> int:
        return len(self._started)

    def may_pay(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether it makes sense to ask the tier for the page."""
        if not self._payoff.weighs:
            return True
        layout = self._layouts[key_group(key)]
        return self._payoff.may_pay(Part(link, layout.nbytes, layout.tokens), state)

    def may_wait(self, entry: Entry, state: RequestState) -> bool:
        """Whether the request may wait, or wait on, for a page under promotion."""
        started = self._started.get(entry)
        if started is None or self._clock() - started[1] >= self._deadline_s:
            return False
        return self._may_go_on(state)

    def reserve(self, link: TierLink, key: bytes, end_token: int, state: RequestState) -> bool:
        """Take a slot for the page; False if there is no room for it now, or no time."""
        if not self._may_go_on(state):
            self._report.counters["promotion_timeouts"] += 1
            return False
        slots = self._primary.slots
        of_one = most = max(1, int(slots * self._fraction))
        if len(self._jobs.links) > 1:
            of_one = max(1, int(most * MOST_OF_ONE_TIER))
        has_room = link.promoting < of_one and len(self._started) < most
        entries: list[Entry] = []
        if has_room and self._held() < math.ceil(slots * max(MOST_HELD, self._fraction)):
            self._asked({key: end_token}, state)
            page = (key, end_token)
            entries, evicted = self._primary.allocate([page], Writer.TIER, state.use, must=True)
        if not entries:
            self._report.counters["promotion_no_room"] += 1
            return False
        (entry,) = entries
        self._report.left(evicted)
        # Tiers before this one do not have the page; of those behind it nothing is known.
        entry.offered = ~(link.bit - 1)
        entry.source = link.name
        link.promoting += 1
        self._started[entry] = link, self._clock()
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
        """A step ended: send off what was reserved in it, one job for each request and tier."""
        self._step += 1
        self._give_up_overdue()
        unsent, self.unsent = self.unsent, {}
        for batch in unsent.values():
            state, pages = batch.state, batch.pages
            worth = self._worth(batch) if self._payoff.weighs else len(pages)
            for link, entry in pages[worth:]:
                state.unworthy.add((link.index, entry.key))
                self._cancel(entry, state)
            jobs: dict[TierLink, list[Entry]] = {}
            for link, entry in pages[:worth]:
                jobs.setdefault(link, []).append(entry)
            for link, entries in jobs.items():
                if link.breaker.closed:
                    self._jobs.submit(link, entries, state.view, promotion=True)
                else:  # it opened in this step
                    for entry in entries:
                        self._cancel(entry, state)

    def end(self, job: Running, result: JobResult, state: RequestState | None, newest: int) -> None:
        """A job ended.

        Args:
            job: the job.
            result: what arrived.
            state: of the request it was for, if that still lives.
            newest: number of the newest request.
        """
        link = job.link
        good = [entry for entry in job.entries.values() if entry.key not in result.failed]
        started = self._started
        for entry in job.entries.values():
            if started.pop(entry, None) is not None:
                link.promoting -= 1
        self._primary.finish_writes(good, good=True)
        arrived = [entry for entry in good if entry.attached]
        self._kept.arrived(arrived)
        link.recent.extend(arrived[:1])
        self._report.came([entry.key for entry in arrived])
        if result.failed:
            bad = [entry for entry in job.entries.values() if entry.key in result.failed]
            self._primary.finish_writes(bad, good=False)
            for entry in bad:
                link.lose(entry.key, newest)
                if state is not None:
                    state.sources.pop(entry.key, None)

    def clear(self) -> None:
        """Forget what was not sent off, and wait no more for the rest."""
        for batch in self.unsent.values():
            for _, entry in batch.pages:
                self._cancel(entry, batch.state)
        self.unsent.clear()
        for entry in list(self._started):
            self._forget(entry)

    def _may_go_on(self, state: RequestState) -> bool:
        """Whether the request's time for waiting, in steps without a gap, is not over."""
        now = self._clock()
        if state.waited_in < self._step - 1:
            state.waits_since = now
        state.waited_in = self._step
        return now - state.waits_since < self._deadline_s

    def _give_up_overdue(self) -> None:
        """What is past its deadline is no longer counted on, and does not hold up the others."""
        now = self._clock()
        while self._started:
            entry, (_, started) = next(iter(self._started.items()))
            if now - started < self._deadline_s:
                break
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        started = self._started.pop(entry, None)
        if started is not None:
            started[0].promoting -= 1

    def _cancel(self, entry: Entry, state: RequestState) -> None:
        self._forget(entry)
        state.sources.pop(entry.key, None)
        self._primary.finish_writes((entry,), good=False)

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
