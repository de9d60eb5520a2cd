"""TieringManager: what is stored, promoted, evicted and awaited. No vLLM in here.

Called from one thread, the scheduler's. Pages go GPU -> primary tier -> every secondary
tier (cascade.py) and secondary tier -> primary tier -> GPU (promotion.py, started by a look-up
that hits a secondary tier). Nothing here blocks except `reset` and `shutdown`, which have
a bound. Tiers are expected not to raise (`GuardedTier` sees to it).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from kvstrata.offload.audit.audits import Audits
from kvstrata.offload.audit.comparer import Comparer
from kvstrata.offload.audit.schedule import Schedule
from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.context import Context, Event
from kvstrata.offload.demand.cascade import Cascades
from kvstrata.offload.demand.demand import Demand
from kvstrata.offload.demand.lending import Lender
from kvstrata.offload.demand.stores import StorePlan, Stores
from kvstrata.offload.finding.lookup import Answer, TierLookup
from kvstrata.offload.finding.promotion import Promotions
from kvstrata.offload.metering.samples import Samples
from kvstrata.offload.metering.savings import Savings
from kvstrata.offload.primary.eviction.policies import policy_class
from kvstrata.offload.primary.slots import Entry, Hold, PrimaryTier, Writer
from kvstrata.offload.request.parameters import ParameterReader
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.changes import TierChanges
from kvstrata.offload.secondary.costs import PrefillSpeed
from kvstrata.offload.secondary.load_or_recompute import LoadOrRecompute
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import STOP_TIMEOUT_S, OpenTiers, TierJobs
from kvstrata.tiers.base import Lookup, PageLayout, RequestView, key_group

# Members bound once: in Python 3.11 each `Answer.HIT` is a call.
_HIT, _MISS, _PENDING = Answer.HIT, Answer.MISS, Answer.PENDING
_GPU = Writer.GPU


class TieringManager:
    """Pages in the primary tier and the secondary tiers behind it.

    Args:
        config: the engine's configuration.
        slots: slots of the primary tier when all of them can be used.
        layouts: page layout by group.
        view: (slot, bytes) -> the beginning of the slot.
        valid: slot -> whether the workers filled it completely.
        open_tiers: makes the secondary tiers, and others when weights may have changed.
        comparer: compares pages for audits.
        weights_fixed: whether a reset keeps what the secondary tiers hold.
        weights_changed: whether the weights have changed all the same, from then on for good; asked
            at a reset and before the first look-up after it: they may be loaded in between.
        ready: how many slots, from the first on, can be used by now; at least 1. Else all.
        windows: by group, how many tokens before the end of a hit its layers need, where not all
            (a sliding window, a state).
        ahead: how many steps vLLM plans ahead of the GPU.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: OffloadConfig,
        slots: int,
        layouts: Mapping[int, PageLayout],
        view: Callable[[int, int], memoryview],
        valid: Callable[[int], bool],
        open_tiers: OpenTiers,
        comparer: Comparer | None = None,
        *,
        weights_fixed: bool,
        weights_changed: Callable[[], bool] | None = None,
        ready: Callable[[], int] | None = None,
        windows: Mapping[int, int] | None = None,
        ahead: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._weights_fixed = weights_fixed
        self._weights_changed = weights_changed
        self._was_reset = False  # and nothing was looked up since
        self._clock = clock
        self._slots = slots
        self._ready = ready or (lambda: slots)
        self.layouts, self.windows = layouts, windows or {}
        policy = policy_class(config.eviction_policy)(slots, self.windows)
        self.primary = PrimaryTier(self._ready(), policy, clock)
        self._jobs = TierJobs(open_tiers, view, layouts, config.promotion_deadline_s, clock)
        self._context = Context(config, layouts, self.windows, clock, self.primary, self._jobs)
        context = self._context
        self._holds, self._waits, self._report = context.holds, context.waits, context.report
        self._cuts = self._waits.cuts  # asked for every hit
        self.counters: Counter[str] = self._report.counters
        self.speed = PrefillSpeed()
        self.found = context.found
        self.store_sizes = Samples()  # pages that vLLM wants stored at once
        self.savings = Savings(self.speed.seconds_per_token, ahead)
        self._load_or_recompute = LoadOrRecompute(config.load_or_recompute, self.speed)
        self._promotions = Promotions(context, self._load_or_recompute)
        self._lookup = TierLookup(context, self._promotions)
        self._cascades = Cascades(context)
        self.audits = Audits(
            Schedule(config.audit_fraction if comparer is not None else 0.0, clock),
            self.primary,
            self._jobs,
            comparer or Comparer({}),
            layouts,
            view,
            self._report,
        )
        self._demand = Demand(context, self._cascades)
        self._stores = Stores(context, self._demand, self._cascades, self.audits, valid)
        self._parameters = ParameterReader([link.name for link in self._jobs.links], clock)
        self.changes = TierChanges(lambda: self._jobs.links)
        self._requests: dict[str, RequestState] = {}
        self._newest = 0  # number of the newest request
        self._step = 0
        self._polled = False  # results were taken in this step

    @property
    def links(self) -> tuple[TierLink, ...]:
        """The secondary tiers in the order of look-up, with what was learnt of them."""
        return self._jobs.links

    @property
    def serving(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._requests)

    @property
    def saved_net(self) -> float:
        """Seconds of prefill that were saved, less those that requests waited for it."""
        return sum(self.savings.seconds.values()) - self.waited

    @property
    def waited(self) -> float:
        """Seconds that requests waited for tiers, and for the GPU to have their pages."""
        return self._waits.waited

    @property
    def pinned(self) -> int:
        """Pages held by `pin_seconds`."""
        return self.primary.held[Hold.PIN]

    @property
    def not_ready(self) -> int:
        """Slots of the primary tier that cannot be used yet."""
        return self._slots - self.primary.slots

    # -- look-up and load ---------------------------------------------------------

    def lookup(self, key: bytes, end_token: int, request: RequestView) -> Answer:
        """Where the page is; a hit in a secondary tier starts its promotion.

        `end_token` is the chunk's end in the request, in tokens.
        """
        if not self._polled:
            if self._was_reset:
                self._was_reset = False
                self._look_at_weights()
            self._poll()
        audits = self.audits
        if not audits.intervenes:
            return self._find(key, end_token, request)
        if audits.findings.blocks(key):
            return _MISS
        natural = self._find(key, end_token, request)
        return audits.answer(key, end_token, self._state(request), natural, self._lookup.step)

    def _find(self, key: bytes, end_token: int, request: RequestView) -> Answer:
        entry = self.primary.get(key)
        if entry is None:
            if self._holds.outlived:
                self._holds.drop_outlived(request.req_id)
            if key in self.audits.findings.refused:
                return _MISS
            return self._lookup.ask(key, end_token, self._state(request))
        writer = entry.writer
        if writer is None:
            if self._cuts and self._waits.is_cut(self._state(request), end_token):
                return _MISS
            self._holds.keep(entry, request.req_id)
            if self._promotions.unsent:
                self._promotions.reached(request.req_id, end_token)
            return _HIT
        state = self._state(request)
        may_wait = self._waits.for_gpu if writer is _GPU else self._waits.for_tier
        if may_wait(entry, end_token, state):
            return _PENDING
        self.counters["store_timeouts" if writer is _GPU else "promotion_timeouts"] += 1
        return _MISS

    def missed(
        self, key: bytes, end_token: int, ends: dict[bytes, int], request: RequestView
    ) -> None:
        """The request was answered MISS: from that page on it computes its prompt itself.

        `ends` has the end tokens of its pages, in prefix order.
        """
        self._demand.missed(key, end_token, ends, self._state(request), self._step)

    @property
    def answers_alike(self) -> bool:
        """Whether a request that waits in this step is told PENDING of all that `comes`."""
        return not (self.audits.intervenes or self._waits.cuts)

    def comes(self, key: bytes) -> bool:
        """Whether the page is on its way, and in time as of the end of the last step."""
        entry = self.primary.get(key)
        if entry is None or entry.writer is None:
            return False
        return (awaited := entry.awaited) is None or not awaited.late

    def source(self, key: bytes, request: RequestView) -> str | None:
        """The name of the tier the page was promoted from for this request, if it was."""
        state = self._requests.get(request.req_id)
        return state.sources.get(key) if state is not None else None

    def prepare_load(self, keys: Sequence[bytes], request: RequestView) -> list[int]:
        """Hold pages that the request was answered HIT when it was looked up last.

        Some steps may have passed since, with a reset among them, after which the pages are of
        the weights that the request began with.

        Returns:
            Their slots in the order of `keys`.

        Raises:
            KeyError: the request was not answered HIT.
        """
        slots = self._demand.load(keys, self._state(request))
        self.audits.served(len(slots))
        return slots

    def complete_load(self, keys: Collection[bytes], request: RequestView | None = None) -> None:
        """The GPU has the pages. Without `request` none of them had outlived a reset."""
        req_id = request.req_id if request is not None else None
        self._demand.loaded(keys, req_id)
        if req_id is not None and (state := self._requests.get(req_id)) is not None:
            self._waits.loaded(state)

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        """The request uses the pages, in prefix order, perhaps elsewhere (in GPU memory)."""
        found = self.primary.find(keys)
        ends = {entry.key: entry.end_token for entry in found}
        self._demand.ask(ends, self._state(request))
        self._demand.touch_tiers(keys, request)

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
        self._holds.computes(request.req_id)
        state = self._state(request)
        ends = dict(keys)
        self.store_sizes.add((len(ends),))
        if ends:
            last = max(ends.values())
            if state.progress is None:
                self.savings.short.begins(self._demand.computes(state, last))
            state.progress = self.speed.advance(state.progress, self._step, self._clock(), last)
        self._demand.count_misses(state)
        return self._stores.prepare(ends, state)

    def complete_store(self, keys: Collection[bytes], request: RequestView) -> None:
        """The GPU's pages of one plan have arrived: make them loadable, and cascade."""
        state = self._state(request)
        self._stores.complete(keys, state)
        self._forget_if_over(state)

    # -- requests and steps -------------------------------------------------------

    def on_new_request(self, request: RequestView) -> bool:
        """A request arrived.

        Returns:
            Whether some tier wants all its pages, so that those must be offered too of which it is
            known that they were stored.
        """
        state = self._new_state(request)
        for link in self._jobs.links:
            if link.tier.on_new_request(request):
                state.given[link.bit] = set()
        return bool(state.given)

    def on_request_finished(
        self, request: RequestView, pages: Mapping[bytes, int] = MappingProxyType({})
    ) -> None:
        """No more look-ups, loads and stores will be prepared for the request.

        `pages` are those of which it consists, with their end tokens, as far as they are known:
        the first ones may have been in GPU memory, and it used them too.
        """
        state = self._state(request)
        state.finished = True
        self._waits.end(state)
        seen, windows = state.use.seen, self.windows
        more = self.primary.find([key for key in pages if key not in seen])
        # Of groups with windows it used some only, and asked for them
        if windows:
            more = [entry for entry in more if key_group(entry.key) not in windows]
        if ends := {entry.key: entry.end_token for entry in more}:
            self._demand.ask(ends, state)
        self.primary.ended(state.use)
        self._holds.drop(request.req_id)
        self.audits.end(state)
        self._forget_if_over(state)

    def on_step_end(self) -> None:
        """A scheduler step ended: send off the promotions of the step as batches."""
        self._poll()
        for link in self._jobs.links:
            if link.tier.serves:
                link.tier.serve(Lender(self._context, link, self._find_for, self._over_for))
        self._polled = False
        self._step += 1
        self._load_or_recompute.end_step()
        self.savings.short.end_step(self._clock())
        self._promotions.send()
        self._waits.end_step()
        self._cascades.probe()
        self._holds.end_step()
        self._lookup.end_step()
        self.audits.end_step()
        for link in self._jobs.links:
            link.tier.on_step_end()

    def has_pending_work(self) -> bool:
        """Whether steps are needed although no request runs. Hung jobs do not count."""
        return (
            self._promotions.waiting
            or self.audits.comparing
            or self._jobs.any_in_time()
            or any([link.tier.wants_steps() for link in self._jobs.links])
        )

    def take_events(self) -> Iterable[Event]:
        """What came and went since the last call, of what the tiers tell some in each step.

        After a reset they tell nothing until it is known whether they are of these weights still.
        """
        if not self._was_reset:
            for keys, here, link in self.changes.take():
                (self._report.came if here else self._report.left)(keys, link)
        events, self._report.events = self._report.events, []
        get = self.primary.get
        for event in events:
            if not event.announced:  # but what is on its way once more may still come
                event.keys[:] = [key for key in event.keys if get(key) is None]
        return events

    # -- reset and shutdown -------------------------------------------------------

    def reset(self) -> list[Entry]:
        """Forget the primary tier's pages; keep the secondary tiers' if weights are fixed.

        Jobs under way go on, and their slots come free as they end. If the weights may have
        changed, the tiers are stopped, and others opened that know no earlier page.

        Returns:
            Entries that GPU transfers may still touch; give them to
            `primary.end_gpu` once the workers are past those transfers.
        """
        self._take_results()
        self._promotions.clear()
        self._holds.reset()
        held = self.audits.clear() + self.primary.reset() + self._demand.reset()
        self._report.events.clear()
        for state in list(self._requests.values()):
            # vLLM reports no completion for what was under way before a reset
            state.open_stores = 0
            state.sources.clear()
            self._waits.loaded(state)
            state.progress = None
            state.stored_until = None
            self._forget_if_over(state)
        self._polled = False
        self._look_at_weights()
        self._was_reset = self._weights_fixed
        return held

    def shutdown(self) -> None:
        """Let the secondary tiers end what is under way, and stop them; bounded."""
        self._jobs.drain()
        self._jobs.stop()
        self._take_results()
        self.audits.stop(STOP_TIMEOUT_S)

    # -- inside -------------------------------------------------------------------

    def _look_at_weights(self) -> None:
        """Unless the weights are those of before, open tiers that know no earlier page."""
        if self._weights_changed is not None:
            self._weights_fixed = self._weights_fixed and not self._weights_changed()
        if not self._weights_fixed:
            self.audits.drop()
            self._jobs.stop()
            self._take_results()
            self._jobs.reopen()

    def _find_for(self, link: TierLink, key: bytes, request: RequestView) -> Lookup:
        """A tier serves others: what is here, or comes from the other tiers."""
        if request.req_id not in self._requests:
            others = frozenset(each.name for each in self.links if each is not link)
            self.on_new_request(replace(request, tiers=others))
        answer = self.lookup(key, 0, request)
        if answer is _HIT:
            return Lookup.HIT
        return Lookup.MISS if answer is _MISS else Lookup.RETRY

    def _over_for(self, request: RequestView) -> None:
        if request.req_id in self._requests:
            self.on_request_finished(request)

    def _state(self, request: RequestView) -> RequestState:
        return self._requests.get(request.req_id) or self._new_state(request)

    def _new_state(self, request: RequestView) -> RequestState:
        self._newest += 1
        parameters = self._parameters.read(request.params)
        if parameters.pin_seconds > 0.0:
            request = replace(request, pin_s=parameters.pin_seconds)
        state = RequestState(request, self._newest, parameters)
        self.counters["wrong_wishes"] = self._parameters.wrong
        self._requests[request.req_id] = state
        self.audits.begin(state)
        return state

    def _forget_if_over(self, state: RequestState) -> None:
        if state.finished and state.open_stores <= 0:
            self._requests.pop(state.view.req_id, None)
            if self._jobs.links:
                self._demand.touch_tiers(state.use.in_order(), state.view)
            state.use.over()
            for link in self._jobs.links:
                link.tier.on_request_finished(state.view)

    def _poll(self) -> None:
        """Take the tiers' results, once per step."""
        if not self._polled:
            self._polled = True
            self._take_results()

    def _take_results(self) -> None:
        if self.not_ready:
            self.primary.add_slots(self._ready() - self.primary.slots)
        self.audits.settle()
        for job, result in self._jobs.results():
            self._report.moved(job, result)
            if job.promotion:
                state = self._requests.get(job.request.req_id)
                self._promotions.end(job, result, state, self._newest)
            else:
                self._cascades.end(job, result)
        for job, entries in self._jobs.arrivals():
            self.counters[f"promoted_pages:{job.link.name}"] += len(entries)
            self._promotions.arrive(job, entries)
