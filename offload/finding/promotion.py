"""Promotions: pages on their way from secondary tiers into the primary tier."""

from __future__ import annotations

import math
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from kvstrata.offload.context import Context
from kvstrata.offload.primary.slots import Awaited, Entry, Writer
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.load_or_recompute import Candidate, LoadOrRecompute
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running
from kvstrata.tiers.base import JobResult, key_group

# Largest share of the promotions' room that one of several tiers may hold: what one tier never
# delivers must not keep the others from delivering.
MOST_OF_ONE_TIER = 0.75
# Promotions start only while less than this share of the primary tier is held by promotions
# (those that hang too), cascades and pins: there must be room for the GPU's pages.
MOST_HELD = 0.9
# Pages that a request reserves in one step, at some 8 us each on the scheduler's thread. The rest
# of its prefix is reserved in the next steps, while it waits for these.
MOST_IN_A_STEP = 4096
# Of the engine's deadline. A request that has not asked for so long (it runs, without what is
# missing, or is gone, or vLLM has no room for it now) keeps no pages in a tier's queue.
ABANDONED_SHARE = 1 / 10


@dataclass(slots=True)
class Reserved:
    """What was reserved for a request in this step, in the order of look-up.

    `reach` is the furthest end, in tokens, of a page that was found in the primary tier behind
    reserved ones, and is of use only with them. `rooms`: how many pages more each tier can be
    expected to deliver before the request's time is over. `awaited`: since when they are, by tier.
    """

    state: RequestState
    pages: list[tuple[TierLink, Entry]] = field(default_factory=list)
    reach: int = 0
    rooms: dict[TierLink, float] = field(default_factory=dict)
    awaited: dict[TierLink, Awaited] = field(default_factory=dict)


class Promotions:
    """Reserves slots during a step, in prefix order, and sends them off from its end on.

    What was reserved goes to its tier in short jobs of which few are under way at a time (see
    `Pace`). So what a request no longer waits for is mostly not begun, and gives its slots back.
    """

    def __init__(self, context: Context, choice: LoadOrRecompute) -> None:
        self._context = context
        self._primary, self._jobs, self._waits = context.primary, context.jobs, context.waits
        self._report = context.report
        self._load_or_recompute = choice
        self.unsent: dict[str, Reserved] = {}  # by request; empty at the end of each step
        # By tier, pages in time: from their reservation, and anew from their submission; oldest
        # first, with some of which nothing is under way any more
        self._oldest: defaultdict[TierLink, deque[Awaited]] = defaultdict(deque)

    def __len__(self) -> int:
        """Pages in time."""
        return sum(link.promoting for link in self._jobs.links)

    @property
    def waiting(self) -> bool:
        """Whether something was reserved that a tier was not given yet."""
        return bool(self.unsent) or any(link.queue for link in self._jobs.links)

    def may_pay(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether it makes sense to ask the tier for the page."""
        if not self._load_or_recompute.weighs:
            return True
        layout = self._context.layouts[key_group(key)]
        return self._load_or_recompute.may_pay(Candidate(link, layout.nbytes, layout.tokens), state)

    def reserve(self, link: TierLink, key: bytes, end_token: int, state: RequestState) -> bool:
        """Take a slot for the page; False if there is no room for it now, or no time."""
        req_id = state.view.req_id
        if self._waits.is_first(state):
            state.needs = req_id
        if not self._waits.goes_on(state, end_token, link.deadline_s):
            self._report.counters["promotion_timeouts"] += 1
            return False
        reserved = self.unsent.get(req_id) or Reserved(state)
        entries: list[Entry] = []
        if self._has_room(link) and self._has_time(link, reserved):
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
        entry.offered = link.found_here
        entry.source = state.sources[key] = link.name
        awaited = reserved.awaited.get(link)
        if awaited is None:
            awaited = reserved.awaited[link] = self._await(link, state.waited_at, state)
        self._expect((entry,), awaited)
        link.promoting += 1
        group = key[-4:]
        if group not in state.groups:
            state.groups |= {group}
        self.unsent[req_id] = reserved
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

    def arrive(self, job: Running, entries: Sequence[Entry]) -> None:
        """Pages of a job have arrived."""
        self._forget(job.link, entries)
        arrived = self._context.holds.arrived(entries)
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
        good, bad = job.parted(result)
        self.arrive(job, good)
        job.link.promotions.add((self._context.clock() - job.timing.started,))
        if not bad:
            return
        self._forget(job.link, bad)
        for entry in bad:
            job.link.lose(entry.key, newest)
            if state is not None:
                state.sources.pop(entry.key, None)
        self._give_up(bad)

    def clear(self) -> None:
        """Forget what was not sent off, and wait no more for the rest."""
        for reserved in self.unsent.values():
            for link, entry in reserved.pages:
                self._cancel(link, entry, reserved.state)
        self.unsent.clear()
        for link in self._jobs.links:
            self._drop(link, link.queue.drop(lambda state: True))
        for link, oldest in self._oldest.items():
            for awaited in oldest:
                self._count_out(link, awaited, awaited.pages)
        self._oldest.clear()

    def _has_room(self, link: TierLink) -> bool:
        """Whether one page more may be on its way from the tier."""
        slots, fraction = self._primary.slots, self._context.config.promotion_fraction
        of_one = most = max(1, int(slots * fraction))
        if len(self._jobs.sources) > 1:
            of_one = max(1, int(most * MOST_OF_ONE_TIER))
        most_held = math.ceil(slots * max(MOST_HELD, fraction))
        has_room = link.promoting < of_one and len(self) < most
        return has_room and self._primary.held_long < most_held

    def _has_time(self, link: TierLink, reserved: Reserved) -> bool:
        """Whether one page more can arrive while its request waits, and be reserved in this step.

        Not asked of the first page under way at a tier: it shows how long loads take now. Nor
        where pages are of several groups: vLLM looks them up group by group, and the last must
        not get nothing.
        """
        if self._context.several_groups:
            return True
        if len(reserved.pages) >= MOST_IN_A_STEP:
            return False
        room = reserved.rooms.get(link)
        if room is None:
            own = link.queue.pages(reserved.state.view.req_id)
            sharing = len(link.queue) + (not own)
            left = min(self._waits.left(reserved.state), link.deadline_s)
            loads = link.pace.within(left) - link.loads.pages
            room = loads / sharing - own
        reserved.rooms[link] = room - 1.0
        return room >= 1.0 or not link.promoting

    def _enqueue(self, reserved: Reserved) -> None:
        """Queue what of it is worth loading."""
        state, pages = reserved.state, reserved.pages
        worth = self._worth(reserved) if self._load_or_recompute.weighs else len(pages)
        for link, entry in pages[worth:]:
            state.unworthy.add((link.index, entry.key))
            self._cancel(link, entry, state)
        del pages[worth:]
        for link in reserved.awaited:
            entries = [entry for of, entry in pages if of is link]
            if not entries:
                continue
            sizes = self._jobs.sizes(entries)
            ahead = link.ahead(state.view.req_id, self._jobs.nbytes(entries))
            link.queue.add(
                state, entries, sizes, Timing(self._context.clock(), ahead, len(entries))
            )

    def _submit(self, link: TierLink) -> None:
        """Give a tier the next jobs."""
        now, queue, pace = self._context.clock(), link.queue, link.pace
        in_use = link.breaker.closed and not link.trust.lost
        self._drop(link, queue.drop(lambda state: not in_use or self._is_gone(state, now)))
        if self._waits.cuts:
            self._drop(link, queue.drop_pages(_is_cut))
        pace.look(now, link.loads.pages)
        whole = link.tier.whole_loads
        while queue and (whole or link.loads.pages < pace.ahead):
            state, entries, timing = queue.take(sys.maxsize if whole else pace.job)
            reserved = entries[0].awaited  # they were reserved together
            assert reserved is not None
            if reserved.pages == len(entries) and self._oldest[link][-1] is reserved:
                reserved.since = now  # all of the newest ones
            else:
                reserved.pages -= len(entries)
                self._expect(entries, self._await(link, now, state))
            self._jobs.submit(link, entries, state.view, promotion=True, timing=timing)
        pace.limited = bool(queue)

    def _is_gone(self, state: RequestState, now: float) -> bool:
        """Whether the request has ended, or asked for no page that it waits for of late."""
        return state.finished or now - state.waited_at >= ABANDONED_SHARE * self._waits.deadline_s

    def _drop(self, link: TierLink, dropped: Sequence[tuple[RequestState, Entry]]) -> None:
        for state, entry in dropped:
            self._cancel(link, entry, state)

    def _give_up_overdue(self) -> None:
        """What is past its deadline is no longer counted on, and does not hold up the others."""
        now = self._context.clock()
        for link, oldest in self._oldest.items():
            late = False
            while oldest and (not oldest[0].pages or now - oldest[0].since >= link.deadline_s):
                overdue = oldest.popleft()
                if overdue.pages:
                    late = overdue.late = True
                    self._count_out(link, overdue, overdue.pages)
            if late:
                self._drop(link, link.queue.drop_pages(_is_late))

    def _await(self, link: TierLink, since: float, state: RequestState) -> Awaited:
        awaited = Awaited(since, link.deadline_s, state.view.req_id)
        self._oldest[link].append(awaited)
        return awaited

    def _expect(self, entries: Sequence[Entry], awaited: Awaited) -> None:
        for entry in entries:
            entry.awaited = awaited
        awaited.pages += len(entries)

    def _forget(self, link: TierLink, entries: Sequence[Entry]) -> None:
        """Count on pages no longer that were asked for together."""
        awaited = entries[0].awaited if entries else None
        if awaited is not None and awaited.pages:
            self._count_out(link, awaited, len(entries))

    def _count_out(self, link: TierLink, awaited: Awaited, pages: int) -> None:
        awaited.pages -= pages
        link.promoting -= pages

    def _cancel(self, link: TierLink, entry: Entry, state: RequestState) -> None:
        self._forget(link, (entry,))
        state.sources.pop(entry.key, None)
        self._give_up((entry,))

    def _give_up(self, entries: Sequence[Entry]) -> None:
        self._report.given_up([entry.key for entry in entries if entry.attached])
        self._primary.finish_writes(entries, good=False)

    def _worth(self, reserved: Reserved) -> int:
        """How many of the reserved pages to load. Each spares the tokens up to its end."""
        ends = [entry.end_token for _, entry in reserved.pages]
        layouts = [self._context.layouts[key_group(entry.key)] for _, entry in reserved.pages]
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


def _is_cut(state: RequestState, entry: Entry) -> bool:
    return state.cut is not None and entry.end_token >= state.cut


def _is_late(state: RequestState, entry: Entry) -> bool:
    return entry.awaited is not None and entry.awaited.late
