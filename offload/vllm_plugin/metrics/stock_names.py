"""What vLLM's own offloading tells under its own names, for dashboards that read them.

They mean what they mean there. Three are not told: `..._tiering_lookup_sync_delay_seconds` would
cost each look-up a look at the clock (vLLM's connector times the same calls as
`vllm:kv_offload_lookup_sync_delay_seconds`), and of the back pressure the moving average and the
dropped stores, since stores are not dropped here, but pages of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm.v1.kv_offload.base import OffloadingMetricMetadata
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstrata.offload.manager import TieringManager
from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.names import PRIMARY
from kvstrata.offload.primary.slots import Hold
from kvstrata.offload.vllm_plugin.metrics.increments import Increments

_CPU = "vllm:kv_offload_cpu_"
_TIERING = "vllm:kv_offload_tiering_"
_NOT_TOLD = (
    f"{_TIERING}lookup_sync_delay_seconds",
    f"{_TIERING}backpressure_store_latency_ema",
    f"{_TIERING}backpressure_stores_dropped",
)


def stock_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Those that this vLLM has, by name."""
    found = TieringOffloadingSpec.build_metric_definitions({"store_threshold": 2})  # all of them
    return {name: each for name, each in found.items() if name not in _NOT_TOLD}


class StockTeller:
    """Tells them; those of tiers under vLLM's labels, `<place>:<name>`, the primary one at 0."""

    def __init__(self) -> None:
        self._known = frozenset(stock_definitions())

    def tell(
        self, manager: TieringManager, promotions: Mapping[str, list[float]], to: Increments
    ) -> None:
        """What there is to tell; `promotions`: seconds of each, by tier."""
        primary, counters = manager.primary, manager.counters
        slots = primary.slots
        busy = slots - primary.free - primary.idle
        read = min(busy, primary.held[Hold.LOAD] + primary.held[Hold.CASCADE])
        to.gauge(f"{_CPU}cache_usage_perc", busy / slots)
        to.gauge(f"{_CPU}cache_read_usage_perc", read / slots)
        to.gauge(f"{_CPU}cache_write_usage_perc", (busy - read) / slots)
        to.observe(f"{_CPU}allocation_size", manager.store_sizes.take())
        to.count("vllm:kv_offload_stores_skipped", counters["stores_skipped"])
        refused = counters["promotion_no_room"]
        to.count(f"{_TIERING}promotion_allocation_failures", refused)
        takings = manager.found.takings
        self._chunks(to, f"0:{PRIMARY}", takings[None])
        for link in manager.links:
            name, label = link.name, f"{link.index + 1}:{link.name}"
            if name in takings:
                self._chunks(to, label, takings[name])
            for ours, theirs, operation in (
                ("promoted", "read", "promotion"),
                ("cascaded", "write", "cascade"),
            ):
                traffic = link.traffic(promotion=operation == "promotion")
                to.count(f"{_TIERING}{theirs}_bytes", counters[f"{ours}_bytes:{name}"], label)
                to.count(f"{_TIERING}{theirs}_time", traffic.seconds, label)
                failed = counters[f"{ours}_failed_jobs:{name}"]
                to.count(f"{_TIERING}{operation}_job_failures", failed, label)
                to.gauge(f"{_TIERING}active_{operation}_jobs", traffic.jobs, label)
            to.gauge(f"{_TIERING}primary_write_usage_perc", link.loads.pages / slots, label)
            to.gauge(f"{_TIERING}primary_read_usage_perc", link.stores.pages / slots, label)
            dropped = counters[f"cascade_skipped:{name}"]
            to.count(f"{_TIERING}backpressure_blocks_dropped", dropped, label)
            to.observe(f"{_TIERING}lookup_async_delay_seconds", link.answers.take(), label)
            if (latency := f"{_TIERING}promotion_latency_seconds") in self._known:
                to.observe(latency, promotions.get(name, ()), label, "success")

    def _chunks(self, to: Increments, label: str, takings: Takings) -> None:
        to.count(f"{_TIERING}chunk_queries", takings.query_chunks, label)
        to.count(f"{_TIERING}chunk_hits", takings.hit_chunks, label)
