"""Promotions: pages on their way from secondary tiers into the primary tier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.events import Report
from kvstrata.offload.load_or_recompute import Part, Payoff
from kvstrata.offload.primary.holds import Holds
from kvstrata.offload.primary.slots import Entry, PrimaryTier, Writer
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.request.waits import Waits
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running, TierJobs
from kvstrata.tiers.base import JobResult, PageLayout, key_group

# Largest share of the promotions' room that one of several tiers may hold: what one tier never
# delivers must not keep the others from delivering.
MOST_OF_ONE_TIER = 0.75
# Promotions start only while less than this share of the primary tier is held by promotions
# (those that hang too), cascades and pins: there must be room for the GPU's pages.
MOST_HELD = 0.9
# Pages that a request reserves in one step, at some 8 us each on the scheduler's thread. The rest
# of its prefix is reserved in the next steps, while it waits for these.
MOST_IN_A_STEP = 4096
# Of the deadline. A request that has not asked for so long (it runs, without what is missing, or
# is gone, or vLLM has no room for it now) keeps no pages in a tier's queue.
ABANDONED_SHARE = 1 / 10


@dataclass(slots=True)
class Batch:
    """What was reserved for a request in this step, in the order of look-up.

    `reach` is the furthest end, in tokens, of a page that was found in the primary tier behind
    reserved ones, and is of use only with them. `rooms`: how many pages more each tier can be
    expected to deliver before the request's time is over.
    """

    state: RequestState
    pages: list[tuple[TierLink, Entry]] = field(default_factory=list)
    reach: int = 0
    rooms: dict[TierLink, float] = field(default_factory=dict)


class Started(NamedTuple):
    """Since when a page is on its way, from where, and for which request."""

    link: TierLink
    time: float  # seconds
    req_id: str


class Promotions:
    """Reserves slots during a step, in prefix order, and sends them off from its end on.

    What was reserved goes to its tier in short jobs of which few are under way at a time (see
    `Pace`). So what a request no longer waits for is mostly not begun, and gives its slots back.

    Args:
        config: for the promotions' share.
        primary: where the pages go.
        holds: keeps what arrived until it is loaded.
        jobs: the tiers' jobs.
        payoff: tells whether loading is worth it.
        layouts: page layout by group.
        waits: how long requests wait.
        clock: seconds, monotonic.
        report: the manager's.
    """

    def __init__(
        self,
        config: OffloadConfig,
        primary: PrimaryTier,
        holds: Holds,
        jobs: TierJobs,
        payoff: Payoff,
        layouts: Mapping[int, PageLayout],
        waits: Waits,
        clock: Callable[[], float],
        report: Report,
    ) -> None:
        self._waits = waits
        self._deadline_s = waits.deadline_s
        self._fraction = config.promotion_fraction
        self._primary = primary
        self._holds = holds
        self._jobs = jobs
        self._payoff = payoff
        self._layouts = layouts
        self._several_groups = len(layouts) > 1
        self._clock = clock
        self._report = report
        self.unsent: dict[str, Batch] = {}  # by request; empty at the end of each step
        # Those in time, oldest first: from their reservation, and anew from their submission
        self._started: dict[Entry, Started] = {}

    def __len__(self) -> int:
        return len(self._started)

    def may_pay(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether it makes sense to ask the tier for the page."""
        if not self._payoff.weighs:
            return True
        layout = self._layouts[key_group(key)]
        return self._payoff.may_pay(Part(link, layout.nbytes, layout.tokens), state)

    @property
    def waiting(self) -> bool:
        """Whether something was reserved that a tier was not given yet."""
        return bool(self.unsent) or any(link.queue for link in self._jobs.links)

    def may_wait(self, entry: Entry, end_token: int, state: RequestState) -> bool:
        """Whether the request may wait, or wait on, for a page under promotion."""
        started = self._started.get(entry)
        if started is None or self._clock() - started.time >= self._deadline_s:
            return False
        if self._waits.is_first(state):
            state.needs = started.req_id
        return self._waits.goes_on(state, end_token)

    def reserve(self, link: TierLink, key: bytes, end_token: int, state: RequestState) -> bool:
        """Take a slot for the page; False if there is no room for it now, or no time."""
        if self._waits.is_first(state):
            state.needs = state.view.req_id
        if not self._waits.goes_on(state, end_token):
            self._report.counters["promotion_timeouts"] += 1
            return False
        batch = self.unsent.get(state.view.req_id) or Batch(state)
        slots = self._primary.slots
        of_one = most = max(1, int(slots * self._fraction))
        if len(self._jobs.links) > 1:
            of_one = max(1, int(most * MOST_OF_ONE_TIER))
        has_room = link.promoting < of_one and len(self._started) < most
        most_held = math.ceil(slots * max(MOST_HELD, self._fraction))
        has_room = has_room and self._primary.held_long < most_held
        entries: list[Entry] = []
        if has_room and self._has_time(link, batch):
            if key not in state.use.seen:
                self._primary.ask({key: end_token}, state.use)
                state.coming.add(key)
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
        self._started[entry] = Started(link, state.waited_at, state.view.req_id)
        state.sources[key] = link.name
        group = key[-4:]
        if group not in state.groups:
            state.groups |= {group}
        self.unsent[state.view.req_id] = batch
        batch.pages.append((link, entry))
        return True

    def reached(self, req_id: str, end_token: int) -> None:
        """A page of the primary tier, in use by the request, ends there."""
        batch = self.unsent.get(req_id)
        if batch is not None and end_token > batch.reach:
            batch.reach = end_token

    def send(self) -> None:
        """A step ended: queue what was reserved in it, and give the tiers as much as they need."""
        self._give_up_overdue()
        unsent, self.unsent = self.unsent, {}
        for batch in unsent.values():
            self._enqueue(batch)
        for link in self._jobs.links:
            if link.queue or link.loads.pages:
                self._submit(link)

    def arrive(self, job: Running, entries: Sequence[Entry]) -> None:
        """Pages of a job have arrived."""
        for entry in entries:
            self._forget(entry)
        self._primary.finish_writes(entries, good=True)
        arrived = [entry for entry in entries if entry.attached]
        self._holds.arrived(arrived)
        job.link.recent.extend(arrived[:1])
        self._report.came([entry.key for entry in arrived])

    def end(self, job: Running, result: JobResult, state: RequestState | None, newest: int) -> None:
        """A job ended.

        Args:
            job: the job.
            result: what arrived.
            state: of the request it was for, if that still lives.
            newest: number of the newest request.
        """
        self.arrive(job, [e for e in job.entries.values() if e.key not in result.failed])
        if result.failed:
            bad = [entry for entry in job.entries.values() if entry.key in result.failed]
            for entry in bad:
                self._forget(entry)
                job.link.lose(entry.key, newest)
                if state is not None:
                    state.sources.pop(entry.key, None)
            self._give_up(bad)

    def clear(self) -> None:
        """Forget what was not sent off, and wait no more for the rest."""
        for batch in self.unsent.values():
            for _, entry in batch.pages:
                self._cancel(entry, batch.state)
        self.unsent.clear()
        for link in self._jobs.links:
            self._drop(link.queue.drop(lambda state: True))
        for entry in list(self._started):
            self._forget(entry)

    def _has_time(self, link: TierLink, batch: Batch) -> bool:
        """Whether one page more can arrive while its request waits, and be reserved in this step.

        Not asked of the first page under way at a tier: it shows how long loads take now. Nor
        where pages are of several groups: vLLM looks them up group by group, and the last must
        not get nothing.
        """
        if self._several_groups:
            return True
        if len(batch.pages) >= MOST_IN_A_STEP:
            return False
        room = batch.rooms.get(link)
        if room is None:
            own = link.queue.pages(batch.state.view.req_id)
            sharing = len(link.queue) + (not own)
            loads = link.pace.within(self._waits.left(batch.state)) - link.loads.pages
            room = loads / sharing - own
        batch.rooms[link] = room - 1.0
        return room >= 1.0 or not link.promoting

    def _enqueue(self, batch: Batch) -> None:
        """Queue what of a batch is worth loading."""
        state, pages = batch.state, batch.pages
        worth = self._worth(batch) if self._payoff.weighs else len(pages)
        for link, entry in pages[worth:]:
            state.unworthy.add((link.index, entry.key))
            self._cancel(entry, state)
        loads: dict[TierLink, list[Entry]] = {}
        for link, entry in pages[:worth]:
            loads.setdefault(link, []).append(entry)
        for link, entries in loads.items():
            sizes = self._jobs.sizes(entries)
            ahead = link.ahead(state.view.req_id, sum(sizes))
            link.queue.add(state, entries, sizes, Timing(self._clock(), ahead, len(entries)))

    def _submit(self, link: TierLink) -> None:
        """Give a tier the next jobs."""
        now = self._clock()
        if not link.breaker.closed or link.trust.lost:
            self._drop(link.queue.drop(lambda state: True))
        else:
            self._drop(link.queue.drop(lambda state: self._is_gone(state, now)))
        if self._waits.cuts:
            self._drop(link.queue.drop_pages(self._is_cut))
        loads, pace = link.loads, link.pace
        pace.look(now, loads.pages)
        while link.queue and loads.pages < pace.ahead:
            state, entries, timing = link.queue.take(pace.job)
            for entry in entries:
                if (started := self._started.pop(entry, None)) is not None:
                    self._started[entry] = Started(link, now, started.req_id)
            self._jobs.submit(link, entries, state.view, promotion=True, timing=timing)
        pace.limited = bool(link.queue)

    def _is_gone(self, state: RequestState, now: float) -> bool:
        """Whether the request has ended, or asked for no page that it waits for of late."""
        return state.finished or now - state.waited_at >= ABANDONED_SHARE * self._deadline_s

    def _is_cut(self, state: RequestState, entry: Entry) -> bool:
        return state.cut is not None and entry.end_token >= state.cut

    def _drop(self, dropped: Sequence[tuple[RequestState, Entry]]) -> None:
        for state, entry in dropped:
            self._cancel(entry, state)

    def _give_up_overdue(self) -> None:
        """What is past its deadline is no longer counted on, and does not hold up the others."""
        now, some = self._clock(), False
        while self._started:
            entry, started = next(iter(self._started.items()))
            if now - started.time < self._deadline_s:
                break
            self._forget(entry)
            entry.late = some = True
        for link in self._jobs.links if some else ():
            self._drop(link.queue.drop_pages(lambda state, entry: entry.late))

    def _forget(self, entry: Entry) -> None:
        started = self._started.pop(entry, None)
        if started is not None:
            started.link.promoting -= 1

    def _cancel(self, entry: Entry, state: RequestState) -> None:
        self._forget(entry)
        state.sources.pop(entry.key, None)
        self._give_up((entry,))

    def _give_up(self, entries: Sequence[Entry]) -> None:
        self._report.given_up([entry.key for entry in entries if entry.attached])
        self._primary.finish_writes(entries, good=False)

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
