"""Promotions: pages on their way from secondary tiers into the primary tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        # By request, in the order of look-up
        self._reserved: dict[str, tuple[RequestState, list[tuple[TierLink, Entry]]]] = {}
        self._started: dict[Entry, float] = {}

    def __len__(self) -> int:
        return len(self._started)

    @property
    def unsent(self) -> bool:
        """Whether something was reserved in this step."""
        return bool(self._reserved)

    def may_pay(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether it makes sense to ask the tier for the page."""
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
        self._reserved.setdefault(state.view.req_id, (state, []))[1].append((link, entry))
        return True

    def send(self) -> None:
        """Send off what was reserved in this step: one job for each request and tier."""
        reserved, self._reserved = self._reserved, {}
        for state, pairs in reserved.values():
            worth = self._worth(pairs, state)
            for link, entry in pairs[worth:]:
                self._report.counters["recomputed_pages"] += 1
                state.failed.add((link.index, entry.key))
                self._end(link, entry, state, good=False)
            batches: dict[TierLink, list[Entry]] = {}
            for link, entry in pairs[:worth]:
                batches.setdefault(link, []).append(entry)
            for link, entries in batches.items():
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
        for _, pairs in self._reserved.values():
            for link, entry in pairs:
                link.promoting -= 1
                self._primary.finish_write(entry, good=False)
        self._reserved.clear()
        self._started.clear()

    def _end(self, link: TierLink, entry: Entry, state: RequestState | None, *, good: bool) -> None:
        link.promoting -= 1
        self._started.pop(entry, None)
        if state is not None and not good:
            state.sources.pop(entry.key, None)
        self._primary.finish_write(entry, good=good)

    def _worth(self, pairs: Sequence[tuple[TierLink, Entry]], state: RequestState) -> int:
        """How many of the reserved pages to load. Each spares the tokens up to its end."""
        ends = [entry.end_token for _, entry in pairs]
        layouts = [self._layouts[key_group(entry.key)] for _, entry in pairs]
        start = min(end - layout.tokens for end, layout in zip(ends, layouts, strict=True))
        groups = {key_group(entry.key) for _, entry in pairs}
        in_order = len(groups) == 1 and all(one < two for one, two in pairwise(ends))
        if in_order:
            tokens = [end - begin for begin, end in pairwise([start, *ends])]
        else:
            tokens = [0] * (len(pairs) - 1) + [max(ends) - start]
        parts = [
            Part(link, layout.nbytes, spared)
            for (link, _), layout, spared in zip(pairs, layouts, tokens, strict=True)
        ]
        return self._payoff.worth(parts, state, in_order=in_order)
