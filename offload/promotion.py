"""Promotions: pages on their way from secondary tiers into the primary tier."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.events import Report
from kvstrata.offload.primary.holds import Holds
from kvstrata.offload.primary.slots import Entry, PrimaryTier, Writer
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.request.waits import Waits
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.load_or_recompute import Candidate, LoadOrRecompute
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
class Reserved:
    """What was reserved for a request in this step, in the order of look-up.

    `reach` is the furthest end, in tokens, of a page that was found in the primary tier behind
    reserved ones, and is of use only with them. `rooms`: how many pages more each tier can be
    expected to deliver before the request's time is over. `started`: since when each is waited for.
    """

    state: RequestState
    pages: list[tuple[TierLink, Entry]] = field(default_factory=list)
    reach: int = 0
    rooms: dict[TierLink, float] = field(default_factory=dict)
    started: dict[TierLink, Started] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Started:
    """Since when pages are on their way, from where, for which request, and how many in time."""

    link: TierLink
    time: float  # seconds
    req_id: str
    pages: int = 0


class Promotions:
    """Reserves slots during a step, in prefix order, and sends them off from its end on.

    What was reserved goes to its tier in short jobs of which few are under way at a time (see
    `Pace`). So what a request no longer waits for is mostly not begun, and gives its slots back.

    Args:
        config: for the promotions' share.
        primary: where the pages go.
        holds: keeps what arrived until it is loaded.
        jobs: the tiers' jobs.
        choice: tells whether loading is worth it.
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
        choice: LoadOrRecompute,
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
        self._load_or_recompute = choice
        self._layouts = layouts
        self._several_groups = len(layouts) > 1
        self._clock = clock
        self._report = report
        self.unsent: dict[str, Reserved] = {}  # by request; empty at the end of each step
        # Those in time: from their reservation, and anew from their submission; oldest first, with
        # some of which nothing is under way any more
        self._started: dict[Entry, Started] = {}
        self._oldest: deque[Started] = deque()

    def __len__(self) -> int:
        return len(self._started)

    def may_pay(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether it makes sense to ask the tier for the page."""
        if not self._load_or_recompute.weighs:
            return True
        layout = self._layouts[key_group(key)]
        return self._load_or_recompute.may_pay(Candidate(link, layout.nbytes, layout.tokens), state)

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
        reserved = self.unsent.get(state.view.req_id) or Reserved(state)
        slots = self._primary.slots
        of_one = most = max(1, int(slots * self._fraction))
        if len(self._jobs.links) > 1:
            of_one = max(1, int(most * MOST_OF_ONE_TIER))
        has_room = link.promoting < of_one and len(self._started) < most
        most_held = math.ceil(slots * max(MOST_HELD, self._fraction))
        has_room = has_room and self._primary.held_long < most_held
        entries: list[Entry] = []
        if has_room and self._has_time(link, reserved):
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
        started = reserved.started.get(link)
        if started is None:
            started = reserved.started[link] = self._start(link, state.waited_at, state)
        self._started[entry] = started
        started.pages += 1
        link.promoting += 1
        state.sources[key] = link.name
        group = key[-4:]
        if group not in state.groups:
            state.groups |= {group}
        self.unsent[state.view.req_id] = reserved
        reserved.pages.append((link, entry))
        return True

    def reached(self, req_id: str, end_token: int) -> None:
        """A page of the primary tier, in use by the request, ends there."""
        reserved = self.unsent.get(req_id)
        if reserved is not None and end_token > reserved.reach:
            reserved.reach = end_token

    def send(self) -> None:
        """A step ended: queue what was reserved in it, and give the tiers as much as they need."""
        self._give_up_overdue()
        unsent, self.unsent = self.unsent, {}
        for reserved in unsent.values():
            self._enqueue(reserved)
        for link in self._jobs.links:
            if link.queue or link.loads.pages:
                self._submit(link)

    def arrive(self, job: Running, entries: Collection[Entry]) -> None:
        """Pages of a job have arrived."""
        self._forget(entries)
        arrived = [entry for entry in entries if entry.attached]
        self._holds.arrived(arrived)  # before they become idle
        self._primary.finish_writes(entries, good=True)
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
        failed = result.failed
        if not failed:
            self.arrive(job, job.entries.values())
        else:
            self.arrive(job, [entry for key, entry in job.entries.items() if key not in failed])
            bad = [entry for key, entry in job.entries.items() if key in failed]
            self._forget(bad)
            for entry in bad:
                job.link.lose(entry.key, newest)
                if state is not None:
                    state.sources.pop(entry.key, None)
            self._give_up(bad)

    def clear(self) -> None:
        """Forget what was not sent off, and wait no more for the rest."""
        for reserved in self.unsent.values():
            for _, entry in reserved.pages:
                self._cancel(entry, reserved.state)
        self.unsent.clear()
        for link in self._jobs.links:
            self._drop(link.queue.drop(lambda state: True))
        self._forget(list(self._started))

    def _has_time(self, link: TierLink, reserved: Reserved) -> bool:
        """Whether one page more can arrive while its request waits, and be reserved in this step.

        Not asked of the first page under way at a tier: it shows how long loads take now. Nor
        where pages are of several groups: vLLM looks them up group by group, and the last must
        not get nothing.
        """
        if self._several_groups:
            return True
        if len(reserved.pages) >= MOST_IN_A_STEP:
            return False
        room = reserved.rooms.get(link)
        if room is None:
            own = link.queue.pages(reserved.state.view.req_id)
            sharing = len(link.queue) + (not own)
            loads = link.pace.within(self._waits.left(reserved.state)) - link.loads.pages
            room = loads / sharing - own
        reserved.rooms[link] = room - 1.0
        return room >= 1.0 or not link.promoting

    def _enqueue(self, reserved: Reserved) -> None:
        """Queue what of it is worth loading."""
        state, pages = reserved.state, reserved.pages
        worth = self._worth(reserved) if self._load_or_recompute.weighs else len(pages)
        for link, entry in pages[worth:]:
            state.unworthy.add((link.index, entry.key))
            self._cancel(entry, state)
        for link in reserved.started:
            entries = [entry for of, entry in pages[:worth] if of is link]
            if not entries:
                continue
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
            self._started[entries[0]].pages -= len(entries)  # they were reserved together
            started = self._start(link, now, state)
            started.pages = len(entries)
            self._started.update(dict.fromkeys(entries, started))
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
        now, late = self._clock(), False
        oldest = self._oldest
        while oldest and (not oldest[0].pages or now - oldest[0].time >= self._deadline_s):
            overdue = oldest.popleft()
            if overdue.pages:
                late = True
                entries = [e for e, started in self._started.items() if started is overdue]
                self._forget(entries)
                for entry in entries:
                    entry.late = True
        for link in self._jobs.links if late else ():
            self._drop(link.queue.drop_pages(lambda state, entry: entry.late))

    def _start(self, link: TierLink, time: float, state: RequestState) -> Started:
        started = Started(link, time, state.view.req_id)
        self._oldest.append(started)
        return started

    def _forget(self, entries: Iterable[Entry]) -> None:
        """Count on pages no longer."""
        gone = Counter(map(self._started.pop, entries, repeat(None)))
        for started, pages in gone.items():
            if started is not None:
                started.pages -= pages
                started.link.promoting -= pages

    def _cancel(self, entry: Entry, state: RequestState) -> None:
        self._forget((entry,))
        state.sources.pop(entry.key, None)
        self._give_up((entry,))

    def _give_up(self, entries: Sequence[Entry]) -> None:
        self._report.given_up([entry.key for entry in entries if entry.attached])
        self._primary.finish_writes(entries, good=False)

    def _worth(self, reserved: Reserved) -> int:
        """How many of the reserved pages to load. Each spares the tokens up to its end."""
        ends = [entry.end_token for _, entry in reserved.pages]
        layouts = [self._layouts[key_group(entry.key)] for _, entry in reserved.pages]
        start = min(end - layout.tokens for end, layout in zip(ends, layouts, strict=True))
        groups = {key_group(entry.key) for _, entry in reserved.pages}
        in_order = len(groups) == 1 and all(one < two for one, two in pairwise(ends))
        reach = max(*ends, reserved.reach)
        if in_order:
            tokens = [end - begin for begin, end in pairwise([start, *ends[:-1], reach])]
        else:
            tokens = [0] * (len(ends) - 1) + [reach - start]
        candidates = [
            Candidate(link, layout.nbytes, spared)
            for (link, _), layout, spared in zip(reserved.pages, layouts, tokens, strict=True)
        ]
        return self._load_or_recompute.worth(candidates, reserved.state, in_order=in_order)
