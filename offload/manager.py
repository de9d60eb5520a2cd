"""TieringManager: what is stored, promoted, evicted and awaited. No vLLM in here.

Called from one thread, the scheduler's. Pages go GPU -> primary tier -> every secondary
tier (cascade) and secondary tier -> primary tier -> GPU (promotion, started by a look-up
that hits a secondary tier). Nothing here blocks except `reset` and `shutdown`, which have
a bound. Tiers are expected not to raise (`GuardedTier` sees to it).
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from kvstrata.offload.config import OffloadConfig
from kvstrata.offload.eviction import POLICIES
from kvstrata.offload.kept import KeptPages, tail_first
from kvstrata.offload.offers import Offers
from kvstrata.offload.primary import Entry, PrimaryTier, Writer
from kvstrata.offload.request import RequestState
from kvstrata.offload.tier_jobs import NamedTier, Running, TierJobs
from kvstrata.tiers.base import JobResult, Lookup, RequestView

logger = logging.getLogger("kvstrata.manager")

# Largest share of the primary tier that pages on their way to one secondary tier may hold:
# a tier that hangs must leave room for the GPU's pages.
MOST_CASCADING = 0.75


class Answer(enum.Enum):
    """What a look-up says; PENDING will become HIT or MISS in bounded time."""

    HIT = enum.auto()
    MISS = enum.auto()
    PENDING = enum.auto()  # the page is coming
    RETRY = enum.auto()  # a tier does not know yet


class StorePlan(NamedTuple):
    """Where the GPU's pages go: `slots[i]` for `keys[i]`; `evicted` made room."""

    keys: list[bytes]
    slots: list[int]
    evicted: list[bytes]


class Event(NamedTuple):
    """Pages came into (or left) a tier; `tier` is None for the primary tier."""

    keys: list[bytes]
    removed: bool
    tier: NamedTier | None


class TieringManager:
    """Pages in the primary tier and the secondary tiers behind it.

    Args:
        config: the engine's configuration.
        slots: slots of the primary tier.
        view: (slot, group) -> the page's bytes.
        valid: slot -> whether the workers filled it completely.
        open_tiers: makes the secondary tiers; called again at a reset when
            `weights_fixed` is false, for tiers that know nothing of earlier pages.
        weights_fixed: whether a reset keeps what the secondary tiers hold.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: OffloadConfig,
        slots: int,
        view: Callable[[int, int], memoryview],
        valid: Callable[[int], bool],
        open_tiers: Callable[[], Sequence[NamedTier]],
        *,
        weights_fixed: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._valid = valid
        self._weights_fixed = weights_fixed
        self._clock = clock
        self.primary = PrimaryTier(slots, POLICIES[config.eviction_policy](slots))
        self._most_promoting = max(1, int(slots * config.promotion_fraction))
        self._most_cascading = math.ceil(slots * MOST_CASCADING)
        self._jobs = TierJobs(open_tiers, view, clock)
        self._requests: dict[str, RequestState] = {}
        self._wanted: dict[tuple[int, str], list[Entry]] = {}  # (tier index, request)
        self._promotion_started: dict[bytes, float] = {}
        self._offers = Offers(config.store_threshold, config.max_tracker_size)
        self._events: list[Event] = []
        self._kept = KeptPages(self.primary)
        self._polled = False  # results were taken in this step
        self.counters: Counter[str] = Counter()

    @property
    def tiers(self) -> tuple[NamedTier, ...]:
        """The secondary tiers in the order of look-up."""
        return self._jobs.tiers

    # -- look-up and load ---------------------------------------------------------

    def lookup(self, key: bytes, end_token: int, request: RequestView) -> Answer:
        """Where the page is; a hit in a secondary tier starts its promotion.

        `end_token` is the chunk's end in the request, in tokens.
        """
        self._poll()
        state = self._state(request)
        entry = self.primary.get(key)
        if entry is not None:
            if entry.ready:
                self._kept.keep(entry)
                self.counters["primary_hits"] += 1
                return Answer.HIT
            if entry.writer is Writer.GPU or self._in_time(key):
                return Answer.PENDING
            self.counters["promotion_timeouts"] += 1
            return Answer.MISS
        retry = False
        for index, named in enumerate(self.tiers):
            if request.tiers is not None and named.name not in request.tiers:
                continue
            if index in state.silent or (index, key) in state.failed:
                continue
            found = named.tier.lookup(key, request)
            if found is Lookup.RETRY:
                retry = self._may_retry(state, index, key) or retry
                continue
            state.first_retry.pop((index, key), None)
            if found is Lookup.HIT and not retry:
                # Behind an undecided key nothing is reserved: the prefix may end there.
                if state.awaits:
                    return Answer.RETRY
                return self._promote(index, key, end_token, state)
        if retry:
            state.awaits = True
            return Answer.RETRY
        self.counters["misses"] += 1
        return Answer.MISS

    def source(self, key: bytes, request: RequestView) -> str | None:
        """The name of the tier the page was promoted from for this request, if it was."""
        state = self._requests.get(request.req_id)
        return state.sources.get(key) if state is not None else None

    def prepare_load(self, keys: Sequence[bytes], request: RequestView) -> list[int]:
        """Hold pages that were just looked up as HIT; their slots in the order of `keys`.

        Raises:
            KeyError: a page is not ready in the primary tier.
        """
        entries = []
        for key in keys:
            entry = self.primary.get(key)
            if entry is None or not entry.ready:
                raise KeyError(f"page {key.hex()} is not ready to be loaded")
            entries.append(entry)
        for entry in entries:
            self.primary.begin_read(entry, gpu=True)
        self.touch(keys, request)
        self.counters["loaded_pages"] += len(entries)
        return [entry.slot for entry in entries]

    def complete_load(self, keys: Collection[bytes]) -> None:
        """The GPU has the pages."""
        entries = [entry for key in keys if (entry := self.primary.get(key)) is not None]
        assert len(entries) == len(keys), "a page held by prepare_load cannot leave"
        for entry in tail_first(entries):
            self.primary.end_read(entry, gpu=True)

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        """The pages, in prefix order, were used, perhaps elsewhere (in GPU memory)."""
        self.primary.touch(reversed(list(keys)))
        for named in self.tiers:
            named.tier.touch(keys, request)

    # -- store --------------------------------------------------------------------

    def prepare_store(
        self, keys: Sequence[tuple[bytes, int]], request: RequestView
    ) -> StorePlan | None:
        """Choose which pages to store, and where, in the order of `keys`.

        Args:
            keys: keys with the chunk's end in the request, in tokens.
            request: on whose behalf.

        Returns:
            None when there is no room now. Otherwise `complete_store` must follow if
            the plan has keys.
        """
        # vLLM asks after the end of the step: this must not pass for the next step's poll.
        self._take_results()
        ends = dict(keys)
        new = [key for key in ends if self.primary.get(key) is None]
        wanted = [key for key in new if self._offers.is_wanted(key)]
        # More than could ever fit: its beginning is better than nothing.
        del wanted[self.primary.slots - (len(ends) - len(new)) :]
        taken = self.primary.allocate(
            [(key, ends[key]) for key in wanted], Writer.GPU, protected=ends
        )
        if taken is None:
            self.counters["store_no_room"] += 1
            return None
        self._offers.count(new)
        self.counters["stores_skipped"] += len(new) - len(wanted)
        entries, evicted = taken
        if entries:
            self._state(request).open_stores += 1
        if evicted:
            self.counters["evicted_pages"] += len(evicted)
            self._events.append(Event(evicted, removed=True, tier=None))
        return StorePlan([e.key for e in entries], [e.slot for e in entries], evicted)

    def complete_store(self, keys: Collection[bytes], request: RequestView) -> None:
        """The GPU's pages of one plan have arrived: make them loadable, and cascade."""
        stored: list[Entry] = []
        entries = [entry for key in keys if (entry := self.primary.get(key)) is not None]
        for entry in tail_first(entries):
            assert entry.writer is Writer.GPU
            good = self._valid(entry.slot)
            self.primary.finish_write(entry, good=good)
            if good:
                stored.append(entry)
            else:
                self.counters["incomplete_pages"] += 1
        stored.reverse()
        if stored:
            self.counters["stored_pages"] += len(stored)
            self._events.append(Event([e.key for e in stored], removed=False, tier=None))
            for named in self.tiers:
                self._cascade(named, stored, request)
        state = self._state(request)
        state.open_stores -= 1
        self._forget_if_over(state)

    # -- requests and steps -------------------------------------------------------

    def on_new_request(self, request: RequestView) -> None:
        """A request arrived."""
        self._requests[request.req_id] = RequestState(request)
        for named in self.tiers:
            named.tier.on_new_request(request)

    def on_request_finished(self, request: RequestView) -> None:
        """No more look-ups, loads and stores will be prepared for the request."""
        state = self._state(request)
        state.finished = True
        self._forget_if_over(state)

    def on_step_end(self) -> None:
        """A scheduler step ended: send off the promotions of the step as batches."""
        self._poll()
        self._polled = False
        self._kept.end_step()
        for state in self._requests.values():
            state.awaits = False
        wanted, self._wanted = self._wanted, {}
        for (index, req_id), entries in wanted.items():
            asker = self._requests.get(req_id)
            view = asker.view if asker is not None else RequestView(req_id)
            self._jobs.submit(self.tiers[index], entries, view, promotion=True)
        for named in self.tiers:
            named.tier.on_step_end()

    def has_pending_work(self) -> bool:
        """Whether steps are needed although no request runs. Hung jobs do not count."""
        return bool(self._wanted) or self._jobs.any_in_time(self._config.promotion_deadline_s)

    def take_events(self) -> Iterable[Event]:
        """What came and went since the last call."""
        for named in self.tiers:
            removed = list(named.tier.take_removed())
            if removed:
                self._events.append(Event(removed, removed=True, tier=named))
        events, self._events = self._events, []
        return events

    # -- reset and shutdown -------------------------------------------------------

    def reset(self) -> list[Entry]:
        """Forget the primary tier's pages; keep the secondary tiers' if weights are fixed.

        Returns:
            Entries that GPU transfers may still touch; give them to
            `primary.end_gpu` once the workers are past those transfers.
        """
        self._jobs.drain()
        self._take_results()
        for entries in self._wanted.values():  # reserved, never submitted
            for entry in entries:
                self.primary.finish_write(entry, good=False)
        self._wanted.clear()
        self._kept.clear()
        held = self.primary.reset()
        self._promotion_started.clear()
        self._offers.clear()
        self._events.clear()
        for state in list(self._requests.values()):
            # vLLM reports no completion for what was under way before a reset
            state.open_stores = 0
            state.sources.clear()
            self._forget_if_over(state)
        if not self._weights_fixed:
            self._jobs.stop()
            self._take_results()
            self._jobs.reopen()
        return held

    def shutdown(self) -> None:
        """Let the secondary tiers end what is under way, and stop them; bounded."""
        self._jobs.drain()
        self._jobs.stop()
        self._take_results()

    # -- inside -------------------------------------------------------------------

    def _state(self, request: RequestView) -> RequestState:
        state = self._requests.get(request.req_id)
        if state is None:
            state = self._requests[request.req_id] = RequestState(request)
        return state

    def _forget_if_over(self, state: RequestState) -> None:
        if state.finished and state.open_stores <= 0:
            self._requests.pop(state.view.req_id, None)
            for named in self.tiers:
                named.tier.on_request_finished(state.view)

    def _cascade(self, named: NamedTier, stored: Sequence[Entry], request: RequestView) -> None:
        """Hand pages to a tier, as far as it does not hold too much of the primary tier."""
        room = self._most_cascading - self._jobs.cascading(named)
        entries = stored[: max(0, room)]
        self.counters[f"cascade_skipped:{named.name}"] += len(stored) - len(entries)
        if not entries:
            return
        for entry in entries:
            self.primary.begin_read(entry, gpu=False)
        self._jobs.submit(named, entries, request, promotion=False)

    def _may_retry(self, state: RequestState, index: int, key: bytes) -> bool:
        """Whether the request may still wait for the tier's answer."""
        now = self._clock()
        since = state.first_retry.setdefault((index, key), now)
        if now - since < self._config.lookup_deadline_s:
            return True
        state.silent.add(index)
        self.counters["lookup_timeouts"] += 1
        logger.warning(
            "tier %s did not answer a look-up within %g s; request %s goes on without it",
            self.tiers[index].name,
            self._config.lookup_deadline_s,
            state.view.req_id,
        )
        return False

    def _in_time(self, key: bytes) -> bool:
        started = self._promotion_started.get(key, self._clock())
        return self._clock() - started < self._config.promotion_deadline_s

    def _promote(self, index: int, key: bytes, end_token: int, state: RequestState) -> Answer:
        taken = None
        if self.primary.promoting < self._most_promoting:
            taken = self.primary.allocate([(key, end_token)], Writer.TIER)
        if taken is None:
            self.counters["promotion_no_room"] += 1
            return Answer.MISS
        entries, evicted = taken
        if evicted:
            self.counters["evicted_pages"] += len(evicted)
            self._events.append(Event(evicted, removed=True, tier=None))
        self._promotion_started[key] = self._clock()
        state.sources[key] = self.tiers[index].name
        self._wanted.setdefault((index, state.view.req_id), []).extend(entries)
        return Answer.PENDING

    def _poll(self) -> None:
        """Take the tiers' results, once per step."""
        if not self._polled:
            self._polled = True
            self._take_results()

    def _take_results(self) -> None:
        for job, result in self._jobs.results():
            self._end(job, result)

    def _end(self, job: Running, result: JobResult) -> None:
        direction = "promoted" if job.promotion else "cascaded"
        name = job.tier.name
        self.counters[f"{direction}_pages:{name}"] += len(job.entries) - len(result.failed)
        self.counters[f"{direction}_failed:{name}"] += len(result.failed)
        self.counters[f"{direction}_bytes:{name}"] += result.nbytes
        if not job.promotion:
            for entry in reversed(list(job.entries.values())):
                self.primary.end_read(entry, gpu=False)
            stored = [key for key in job.entries if key not in result.failed]
            if stored and job.tier in self.tiers:
                self._events.append(Event(stored, removed=False, tier=job.tier))
            return
        arrived: list[bytes] = []
        state = self._requests.get(job.request.req_id)
        for key, entry in job.entries.items():
            good = key not in result.failed
            if entry.attached:
                self._promotion_started.pop(key, None)
                if good:
                    arrived.append(key)
                elif state is not None:
                    state.failed.add((self.tiers.index(job.tier), key))
                    state.sources.pop(key, None)
            self.primary.finish_write(entry, good=good)
            if entry.attached:
                self._kept.keep(entry)
        if arrived:
            self._events.append(Event(arrived, removed=False, tier=None))
