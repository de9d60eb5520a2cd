"""StockTier: a tier of ours behind the interface of vLLM's own manager."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadingEvent,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstrata.offload.config.stock_entry import parse_stock_entry
from kvstrata.offload.secondary.breaker import Operation
from kvstrata.offload.secondary.changes import TierChanges
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.engine.stock.jobs import StockJobs
from kvstrata.offload.vllm_plugin.engine.stock.seen import SeenEngine
from kvstrata.offload.vllm_plugin.metrics.definitions import tier_metric_definitions
from kvstrata.offload.vllm_plugin.metrics.old_names import old_tier_definitions
from kvstrata.offload.vllm_plugin.metrics.totals import StatsReader
from kvstrata.tiers.base import Lookup, PageKey, RequestView

logger = logging.getLogger("kvstrata")

STATS_EVERY_S = 0.1  # vLLM asks in every step
# So often a page is loaded for one request. vLLM's manager may evict what it promoted before the
# request has all that it waits for: two that do not fit together would do so for ever.
MOST_LOADS = 2
_LABELS = ("type", "medium")
# Members bound once: in Python 3.11 each `LookupResult.HIT` is a call.
_HIT, _MISS, _RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY


@dataclass(slots=True)
class _Asking:
    """A request as far as the tier knows it; `number` counts up."""

    view: RequestView
    number: int
    since: dict[PageKey, float] = field(default_factory=dict)  # look-ups that wait for an answer
    loaded: Counter[PageKey] = field(default_factory=Counter)  # how often, for this request
    silent: bool = False  # it asks no more


class StockTier(SecondaryTierManager):
    """One tier. A subclass for each name gives it a medium.

    As behind our own manager its mistakes are caught, look-ups have a deadline, a breaker takes it
    out while it is sick, and its pages have a namespace.
    """

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **given: Any,
    ) -> None:
        """Open it.

        Args:
            offloading_spec: vLLM's `TieringOffloadingSpec`.
            primary_kv_view: int8 [chunks, bytes of a row], vLLM's CPU tier.
            tier_type: the name in the configuration.
            backpressure_detector: vLLM's own, if one is configured; it comes before ours.
            given: the other keys of the entry.

        Raises:
            ConfigError, NamespaceError, RuntimeError: the entry is wrong, or the engine cannot
                have tiers of ours.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        entry = parse_stock_entry(tier_type, given)
        self._lookup_deadline_s = entry.lookup_deadline_s
        self._engine = SeenEngine(offloading_spec.config, primary_kv_view, entry)
        try:
            self._jobs = StockJobs(
                self._engine.open,
                primary_kv_view,
                self._engine.layouts,
                entry.promotion_deadline_s,
                self._ended,
            )
        except BaseException:
            self._engine.close()
            raise
        link = self._jobs.link
        self.locality = Locality(link.tier.locality) if link and link.tier.locality else None
        self._requests: dict[str, _Asking] = {}
        self._newest = 0
        self._timeouts = self._crowded = 0
        self._publishes = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] = []
        self._changes = TierChanges(lambda: filter(None, [self._jobs.link]))
        self._stats = StatsReader()
        self._next_stats = 0.0

    # -- look-up and requests ------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT and MISS as the tier says; RETRY at most for `lookup_deadline_s`."""
        link, request = self._jobs.usable, self._request(req_context)
        if link is None or not link.may_load or request.silent:
            return _MISS
        if link.lost and link.lost.get(key, -1) >= request.number:
            return _MISS  # it did not arrive: asking for it again would never end
        found = link.tier.lookup(key, request.view)
        if found is Lookup.RETRY:
            return _RETRY if self._may_wait(link, key, request) else _MISS
        request.since.pop(key, None)
        if link.breaker.doubtful:
            link.breaker.succeeded(Operation.LOOKUP)
        if found is not Lookup.HIT:
            return _MISS
        if request.loaded and request.loaded[key] >= MOST_LOADS:
            request.silent = True
            self._crowded += 1
            return _MISS
        return _HIT

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Its chunks are stored as they are computed, which is vLLM's default."""
        request = self._request(req_context)
        if link := self._jobs.link:
            link.tier.on_new_request(request.view)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """It used its pages, those too that vLLM had in memory, of which it tells nobody."""
        request = self._request(req_context)
        if link := self._jobs.link:
            # There is no public way to all of a request's keys.
            pages = getattr(req_context, "_offload_key_positions", {})
            link.tier.touch(list(pages), request.view)
            link.tier.on_request_finished(request.view)
        del self._requests[req_context.req_id]

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """The pages were used."""
        if link := self._jobs.link:
            link.tier.touch(keys, self._view(req_context))

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Send off what the step asked for; try a tier again that was taken out."""
        if link := self._jobs.link:
            link.trust.lost = not link.tier.trusted
            link.breaker.try_again()
            link.tier.on_step_end()

    # -- jobs ----------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        """See `SecondaryTierManager.submit_store`; nothing is evicted here."""
        self._jobs.store(job_metadata, self._view(job_metadata.req_context))

    def submit_load(self, job_metadata: TransferJob) -> None:
        """See `SecondaryTierManager.submit_load`; pages are verified."""
        self._jobs.load(job_metadata, self._view(job_metadata.req_context))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """See `SecondaryTierManager.get_finished_jobs`."""
        return self._jobs.finished()

    def drain_jobs(self) -> None:
        """Wait for the jobs, at last by force; vLLM is about to reset its caches.

        It calls this for nothing else, so here the weights are looked at: where they may have
        changed, no page of before is used again.
        """
        self._jobs.drain(reopen=not self._engine.same_weights())
        self._changes.begin_anew()

    def shutdown(self) -> None:
        """Stop; after it nothing touches vLLM's memory."""
        self._jobs.close()
        self._engine.close()

    # -- what is told --------------------------------------------------------------

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Pages that came and went, where KV events are on."""
        if self._publishes:
            for keys, here, link in self._changes.take():
                self._tell(link, keys, removed=not here)
        events, self._events = self._events, []
        return events

    def has_pending_work(self) -> bool:
        """Steps are needed until all is told."""
        return self._changes.more

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """The metrics of our tiers; `extra_config` is the entry, which is checked."""
        parse_stock_entry(str(extra_config["type"]), extra_config)
        return old_tier_definitions() | tier_metric_definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What happened since the last call."""
        now, link = time.monotonic(), self._jobs.link
        if now < self._next_stats or link is None:
            return None
        self._next_stats = now + STATS_EVERY_S
        more = {
            "cascade_skipped": self._jobs.skipped,
            "crowded_out": self._crowded,
            "lookup_timeouts": self._timeouts,
        }
        return self._stats.read_tier(link, more)

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """vLLM 0.33: the labels of the tier in `vllm:kv_offload_config_info`."""
        return _LABELS

    def config_info(self) -> Mapping[str, str]:
        """vLLM 0.33: their values; no options, which may be passwords."""
        medium = self.medium.value if self.medium else ""
        return dict(zip(_LABELS, (self.tier_type, medium), strict=True))

    # -- inside --------------------------------------------------------------------

    def _request(self, req_context: ReqContext) -> _Asking:
        request = self._requests.get(req_context.req_id)
        if request is None:
            self._newest += 1
            view = self._view(req_context)
            request = self._requests[req_context.req_id] = _Asking(view, self._newest)
        return request

    def _view(self, req_context: ReqContext) -> RequestView:
        """Not remembered: vLLM submits loads of requests that were aborted in the same step."""
        known = self._requests.get(req_context.req_id)
        if known is not None:
            return known.view
        return RequestView(req_context.req_id, req_context.kv_transfer_params or {})

    def _may_wait(self, link: TierLink, key: PageKey, request: _Asking) -> bool:
        now = time.monotonic()
        if now - request.since.setdefault(key, now) < self._lookup_deadline_s:
            return True
        request.silent = True
        link.breaker.failed(Operation.LOOKUP)
        if not self._timeouts:
            logger.warning(
                "tier %s did not answer a look-up within %g s; requests go on without it "
                "(logged once; counted from now on as lookup_timeouts)",
                link.name,
                self._lookup_deadline_s,
            )
        self._timeouts += 1
        return False

    def _ended(
        self, link: TierLink, loader: str | None, good: list[PageKey], failed: list[PageKey]
    ) -> None:
        if loader is None:
            if not link.tier.tells_changes:
                self._tell(link, good)
            return
        if request := self._requests.get(loader):
            request.loaded.update(good)
        for key in failed:
            link.lose(key, self._newest)

    def _tell(self, link: TierLink, keys: list[PageKey], *, removed: bool = False) -> None:
        if not (self._publishes and link.kv_events and self.medium and keys):
            return
        self._events.append(
            OffloadingEvent(
                keys=[OffloadKey(key) for key in keys],
                medium=self.medium,
                removed=removed,
                locality=self.locality,
                ownership=self.tier_type,
                removal_expected=not removed,
            )
        )
