"""The metrics of version 0.1, which mix units under one label; told until 0.3."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

from kvstrata.offload.manager import TieringManager
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.metrics.increments import Increments
from kvstrata.tiers.base import TierStats

EVENTS = "kvstrata_events"
TIER_EVENTS = "kvstrata_tier_events"
TIER_STATE = "kvstrata_tier_state"
_RENAMED = {"evicted_pages": "evicted_files", "pages": "indexed_keys"}


def old_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Those of the manager and of tiers, by name."""
    return {
        EVENTS: OffloadingCounterMetadata("Deprecated: see docs/metrics.md.", ("event",)),
        **old_tier_definitions(),
    }


def old_tier_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Those of tiers."""
    return {
        TIER_EVENTS: OffloadingCounterMetadata(
            "Deprecated: see docs/metrics.md.", ("tier", "event")
        ),
        TIER_STATE: OffloadingGaugeMetadata("Deprecated: see docs/metrics.md.", ("tier", "name")),
    }


def tell_old(manager: TieringManager, to: Increments) -> None:
    """What the manager counted."""
    for name, value in manager.counters.items():
        event, _, tier = name.partition(":")
        if tier:
            to.count(TIER_EVENTS, value, tier, event)
        else:
            to.count(EVENTS, value, event)


def tell_old_tier(
    link: TierLink, stats: TierStats, to: Increments, more: Mapping[str, int] = {}
) -> None:
    """What a tier counted, and its present state; `more`: other totals."""
    ours = {
        "breaker_openings": link.breaker.openings.total(),
        "declined_requests": link.declined,
        "overdue_jobs": link.overdue_jobs,
    }
    for name, total in {**stats.counters, **ours, **more}.items():
        to.count(TIER_EVENTS, total, link.name, _RENAMED.get(name, name))
    for name, value in {**stats.gauges, **_link_gauges(link)}.items():
        to.gauge(TIER_STATE, value, link.name, _RENAMED.get(name, name))


def _link_gauges(link: TierLink) -> dict[str, float]:
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
