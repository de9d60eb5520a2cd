"""What foreign tiers tell of themselves: KV events, metrics, and their settings as labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import OffloadingEvent, OffloadingMetricMetadata

from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.foreign_tiers.tier import ForeignTier
from kvstrata.tiers.registry import TierEntry, tier_class


def metric_definitions(tiers: Sequence[TierEntry]) -> dict[str, OffloadingMetricMetadata]:
    """Those of the foreign ones among the configured tiers, by name."""
    found: dict[str, OffloadingMetricMetadata] = {}
    for tier in tiers:
        cls = tier_class(tier.entry)
        if issubclass(cls, ForeignTier):
            found |= cls.foreign.build_metric_definitions(dict(tier.entry))
    return found


def config_info_keys(tiers: Sequence[TierEntry]) -> tuple[str, ...]:
    """vLLM 0.33: the names of their labels."""
    found: list[str] = []
    for tier in tiers:
        cls = tier_class(tier.entry)
        if issubclass(cls, ForeignTier) and hasattr(cls.foreign, "config_info_keys"):
            found += cls.foreign.config_info_keys(dict(tier.entry))
    return tuple(found)


def config_info(link: TierLink) -> Mapping[str, Any]:
    """vLLM 0.33: the labels of a tier."""
    tier = _foreign(link)
    return tier.config_info() if tier is not None else {}


def hit_source(link: TierLink) -> Any:
    """vLLM's word for a hit of the tier, a `CacheHitSource`; None if it has none of its own."""
    tier = _foreign(link)  # in vLLM 0.31 none has
    return getattr(tier.foreign, "cache_hit_source", None) if tier is not None else None


def tells_events(link: TierLink) -> bool:
    """Whether the tier tells itself what it stores and drops."""
    tier = _foreign(link)
    return tier is not None and tier.tells_events


def events(links: Sequence[TierLink]) -> Iterator[OffloadingEvent]:
    """What came and went in tiers that tell it, as far as somebody wants to know."""
    for link in links:
        tier = _foreign(link)
        for event in tier.take_events() if tier is not None else ():
            if link.kv_events:
                yield replace(event, ownership=event.ownership or link.name)


def add_stats(links: Sequence[TierLink], stats: OffloadingConnectorStats) -> None:
    """Add what the tiers counted since the last call."""
    for link in links:
        tier = _foreign(link)
        counted = tier.take_stats() if tier is not None else None
        if counted is not None and not counted.is_empty():
            stats.aggregate(counted)


def _foreign(link: TierLink) -> ForeignTier | None:
    inner = link.tier.inner if isinstance(link.tier, GuardedTier) else link.tier
    return inner if isinstance(inner, ForeignTier) else None
