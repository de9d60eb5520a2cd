"""Metrics: the manager's and the tiers' totals as vLLM's Prometheus metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

from kvstrata.offload.manager import TieringManager
from kvstrata.offload.secondary.tier import TierLink

EVENTS = "kvstrata_events"
SLOTS = "kvstrata_primary_slots"
TIER_EVENTS = "kvstrata_tier_events"
TIER_FAILURES = "kvstrata_tier_failures"
TIER_STATE = "kvstrata_tier_state"
AUDIT_ERROR = "kvstrata_audit_largest_error"
PREFILL_SPEED = "kvstrata_prefill_tokens_per_second"


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """The metrics by name. Prometheus appends `_total` to counters."""
    return {
        **tier_metric_definitions(),
        EVENTS: OffloadingCounterMetadata(
            "What the manager did, in pages or occurrences, by event.", ("event",)
        ),
        SLOTS: OffloadingGaugeMetadata(
            "Slots of the primary tier by state: free, idle (evictable), busy, and of the busy "
            "ones: promoting, pinned; not_ready while their memory is being reserved.",
            ("state",),
        ),
        PREFILL_SPEED: OffloadingGaugeMetadata(
            "Tokens per second by which a request's prefill advances; 0 while it is not known."
        ),
        AUDIT_ERROR: OffloadingGaugeMetadata(
            "The largest relative error of a row that an audit found (docs/audit.md)."
        ),
    }


def tier_metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Those of them that are the tiers'."""
    return {
        TIER_EVENTS: OffloadingCounterMetadata(
            "What a secondary tier did, in pages, bytes or occurrences, by event.",
            ("tier", "event"),
        ),
        TIER_FAILURES: OffloadingCounterMetadata(
            "Pages or calls that failed at a secondary tier, by cause.", ("tier", "cause")
        ),
        TIER_STATE: OffloadingGaugeMetadata(
            "A secondary tier's present values, for example queue lengths.", ("tier", "name")
        ),
    }


class StatsReader:
    """Turns totals that only grow into the increments vLLM wants."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, ...]] = Counter()

    def read(self, manager: TieringManager) -> OffloadingConnectorStats:
        """What happened since the last call, and the present state."""
        stats = OffloadingConnectorStats()
        for name, value in manager.counters.items():
            event, _, tier = name.partition(":")
            if tier:
                self._add(stats, TIER_EVENTS, (tier, event), value)
            else:
                self._add(stats, EVENTS, (event,), value)
        primary = manager.primary
        busy = primary.slots - primary.free - primary.idle
        for state, slots in (
            ("free", primary.free),
            ("idle", primary.idle),
            ("busy", busy),
            ("promoting", primary.promoting),
            ("pinned", manager.pinned),
            ("not_ready", manager.not_ready),
        ):
            stats.set_gauge(SLOTS, slots, (state,))
        per_token = manager.speed.seconds_per_token()
        stats.set_gauge(PREFILL_SPEED, 1.0 / per_token if per_token else 0.0)
        stats.set_gauge(AUDIT_ERROR, manager.audits.findings.largest_error)
        for link in manager.links:
            self.add_tier(stats, link)
        return stats

    def add_tier(
        self, stats: OffloadingConnectorStats, link: TierLink, more: Mapping[str, int] = {}
    ) -> None:
        """What one tier did since the last call, and its present state; `more`: other totals."""
        tier_stats = link.tier.stats()
        ours = {
            "breaker_openings": link.breaker.openings,
            "declined_requests": link.declined,
            "overdue_jobs": link.overdue_jobs,
        }
        for name, total in {**tier_stats.counters, **ours, **more}.items():
            self._add(stats, TIER_EVENTS, (link.name, name), total)
        for cause, total in tier_stats.failures.items():
            self._add(stats, TIER_FAILURES, (link.name, cause), total)
        for name, gauge in {**tier_stats.gauges, **_link_gauges(link)}.items():
            stats.set_gauge(TIER_STATE, gauge, (link.name, name))

    def _add(
        self, stats: OffloadingConnectorStats, metric: str, labels: tuple[str, ...], total: int
    ) -> None:
        # A tier opened anew counts from zero again: never report less than nothing.
        increment = total - self._seen[(metric, *labels)]
        self._seen[(metric, *labels)] = total
        if increment > 0:
            stats.increase_counter(metric, increment, labels)


def _link_gauges(link: TierLink) -> dict[str, float]:
    """What the manager knows of a tier; costs as far as they were measured."""
    gauges = {
        "breaker_open": float(not link.breaker.closed),
        "stores_failing": float(link.stores_failing),
        "distrusted": float(link.trust.lost),
        "storing_pages": float(link.stores.pages),
        "loading_pages": float(link.loads.pages),
    }
    for direction, traffic in (("load", link.loads), ("store", link.stores)):
        if traffic.cost.known:
            gauges[f"{direction}_latency_s"] = traffic.cost.seconds(0)
            gauges[f"{direction}_seconds_per_gib"] = traffic.cost.seconds_per_byte * 2**30
    return gauges
