"""What the manager and the tiers counted, as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)

from kvstrata.offload.manager import TieringManager
from kvstrata.offload.metering import names
from kvstrata.offload.metering.names import PRIMARY
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.metrics.increments import Increments
from kvstrata.offload.vllm_plugin.metrics.old_names import tell_old, tell_old_tier
from kvstrata.offload.vllm_plugin.metrics.stock_names import StockTeller
from kvstrata.tiers.base import TierStats

# What tiers tell under the same names (`TierStats`), and is every tier's.
_COUNTS = {
    "evicted_pages": names.EVICTED_PAGES,
    "evicted_bytes": names.EVICTED_BYTES,
    "restarted_processes": names.PROCESS_RESTARTS,
}
_GAUGES = {
    "pages": names.PAGES,
    "bytes": names.BYTES,
    "capacity_bytes": names.CAPACITY,
    "disk_used_bytes": names.DISK_USED,
    "disk_free_bytes": names.DISK_FREE,
    "disk_files": names.DISK_FILES,
}
_QUEUES = {"read_queue": "read", "write_queue": "write"}
# Told in other words: of each job, or as what requests found
_TOLD = frozenset(
    ("lookups", "hits", "stored_pages", "stored_bytes", "loaded_pages", "loaded_bytes", "jobs")
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the primary tier: bytes of a slot, and tokens of prompts that a slot holds."""

    slot_bytes: int = 0
    slot_tokens: float = 0.0


class StatsReader:
    """Tells what has changed since it was asked last.

    Args:
        sizes: of the primary tier.
        info: the values of `INFO`'s labels; none: it is not told.
    """

    def __init__(self, sizes: Sizes | None = None, info: Sequence[str] = ()) -> None:
        self._to = Increments()
        self._sizes = sizes or Sizes()
        self._info = tuple(info)
        self._stock = StockTeller()
        self._held: dict[str, dict[str, float]] = {}  # gauges of each tier

    def read(self, manager: TieringManager) -> OffloadingConnectorStats:
        """What happened since the last call, and the present state."""
        to = self._to
        self._tell_found(manager)
        self._tell_primary(manager)
        self._tell_rest(manager)
        promotions = {link.name: link.promotions.take() for link in manager.links}
        for name, seconds in promotions.items():
            to.observe(names.PROMOTION_SECONDS, seconds, name)
        self._stock.tell(manager, promotions, to)
        tell_old(manager, to)
        for link in manager.links:
            self._tell_link(manager, link)
            self._tell_tier(link)
        if self._info:
            to.gauge(names.INFO, 1.0, *self._info)
        return to.take()

    def held(self, manager: TieringManager) -> dict[str, tuple[float, float]]:
        """Bytes that each tier holds, as of the last `read`, and may hold, 0 without a limit.

        Of one that keeps files: those that all files take.
        """
        primary, slot_bytes = manager.primary, self._sizes.slot_bytes
        held: dict[str, tuple[float, float]] = {
            PRIMARY: ((primary.slots - primary.free) * slot_bytes, primary.slots * slot_bytes)
        }
        for name, gauges in self._held.items():
            nbytes = gauges.get("disk_used_bytes", gauges.get("bytes"))
            if nbytes is not None:
                held[name] = nbytes, gauges.get("capacity_bytes", 0.0)
        return held

    def read_tier(self, link: TierLink, more: Mapping[str, int]) -> OffloadingConnectorStats:
        """Of one tier under vLLM's own manager; `more`: other totals."""
        self._tell_tier(link, more)
        return self._to.take()

    def _tell_found(self, manager: TieringManager) -> None:
        to, savings = self._to, manager.savings
        savings.price(manager.found.takings)
        for found_in, takings in manager.found.takings.items():
            tier = found_in or PRIMARY
            to.count(names.QUERY_CHUNKS, takings.query_chunks, tier)
            to.count(names.HIT_CHUNKS, takings.hit_chunks, tier)
            to.count(names.QUERY_TOKENS, takings.query_tokens, tier)
            to.count(names.HIT_TOKENS, takings.hit_tokens, tier)
            to.count(names.SAVED_SECONDS, savings.seconds[found_in], tier)
        to.count(names.WAIT_SECONDS, manager.waited)
        to.gauge(names.SAVED_NET, manager.saved_net)
        per_token = savings.seconds_per_token()
        to.gauge(names.PREFILL_SPEED, 1.0 / per_token if per_token else 0.0)
        for wait, counter in (
            ("look-up", "lookup_timeouts"),
            ("promotion", "promotion_timeouts"),
            ("gpu", "store_timeouts"),
        ):
            to.count(names.DEADLINE_MISSES, manager.counters[counter], wait)

    def _tell_primary(self, manager: TieringManager) -> None:
        to, primary, counters = self._to, manager.primary, manager.counters
        slots, used = primary.slots, primary.slots - primary.free
        slot_bytes = self._sizes.slot_bytes
        for state, count in (
            ("free", primary.free),
            ("idle", primary.idle),
            ("busy", used - primary.idle),
            ("promoting", primary.promoting),
            ("pinned", manager.pinned),
            ("not_ready", manager.not_ready),
        ):
            to.gauge(names.SLOTS, count, state)
        to.gauge(names.PAGES, len(primary), PRIMARY)
        to.gauge(names.BYTES, used * slot_bytes, PRIMARY)
        to.gauge(names.CAPACITY, (slots + manager.not_ready) * slot_bytes, PRIMARY)
        to.gauge(names.CAPACITY_TOKENS, slots * self._sizes.slot_tokens)
        to.count(names.READ_PAGES, counters["loaded_pages"], PRIMARY)
        to.count(names.WRITTEN_PAGES, counters["stored_pages"], PRIMARY)
        to.count(names.READ_BYTES, counters["loaded_pages"] * slot_bytes, PRIMARY)
        to.count(names.WRITTEN_BYTES, counters["stored_pages"] * slot_bytes, PRIMARY)
        evicted = primary.departures
        to.count(names.EVICTED_PAGES, evicted.pages, PRIMARY)
        to.count(names.EVICTED_BYTES, evicted.pages * slot_bytes, PRIMARY)
        to.observe(names.EVICTION_AGE, evicted.ages.take(), PRIMARY)
        to.observe(names.REUSE_GAP, evicted.gaps.take(), PRIMARY)
        for reason, counter in (
            ("threshold", "stores_skipped"),
            ("worth", "stores_declined"),
        ):
            to.count(names.SHED_PAGES, counters[counter], PRIMARY, reason)

    def _tell_rest(self, manager: TieringManager) -> None:
        to, counters = self._to, manager.counters
        to.count(names.PUT_OFF, counters["store_no_room"])
        to.count(names.NO_ROOM_PAGES, counters["promotion_no_room"])
        to.count(names.INCOMPLETE_PAGES, counters["incomplete_pages"])
        to.count(names.PINS_REFUSED, counters["pins_refused"])
        to.count(names.WRONG_WISHES, counters["wrong_wishes"])
        close, different = counters["audit_close"], counters["audit_different"]
        to.count(names.AUDIT_PAGES, counters["audit_pages"] - close - different, "equal")
        to.count(names.AUDIT_PAGES, close, "close")
        to.count(names.AUDIT_PAGES, different, "different")
        to.count(names.AUDITS_FORCED, counters["audits_forced"])
        to.gauge(names.AUDIT_ERROR, manager.audits.findings.largest_error)

    def _tell_link(self, manager: TieringManager, link: TierLink) -> None:
        """What the manager knows of a tier's jobs."""
        to, counters, name = self._to, manager.counters, link.name
        to.count(names.READ_PAGES, counters[f"promoted_pages:{name}"], name)
        to.count(names.READ_BYTES, counters[f"promoted_bytes:{name}"], name)
        to.count(names.WRITTEN_PAGES, counters[f"cascaded_pages:{name}"], name)
        to.count(names.WRITTEN_BYTES, counters[f"cascaded_bytes:{name}"], name)
        to.count(names.SHED_PAGES, counters[f"cascade_skipped:{name}"], name, "behind")

    def _tell_tier(self, link: TierLink, more: Mapping[str, int] = {}) -> None:
        """What one tier did since the last call, and its present state."""
        to, name, stats = self._to, link.name, link.tier.stats()
        tell_old_tier(link, stats, to, more)
        to.count(names.READ_SECONDS, link.loads.seconds, name)
        to.count(names.WRITE_SECONDS, link.stores.seconds, name)
        to.count(names.DECLINED_REQUESTS, link.declined, name)
        to.count(names.OVERDUE_JOBS, link.overdue_jobs, name)
        for (operation, cause), total in link.breaker.openings.items():
            to.count(names.BREAKER_OPENINGS, total, name, operation.value, cause)
        to.gauge(names.BREAKER_OPEN, float(not link.breaker.closed), name)
        to.gauge(names.STORES_FAILING, float(link.stores_failing), name)
        to.gauge(names.DISTRUSTED, float(link.trust.lost), name)
        for direction, traffic in (("read", link.loads), ("write", link.stores)):
            to.gauge(names.MOVING_PAGES, traffic.pages, name, direction)
            if traffic.cost.known:
                to.gauge(names.LATENCY, traffic.cost.seconds(0), name, direction)
                if per_byte := traffic.cost.seconds_per_byte:
                    to.gauge(names.BANDWIDTH, 1.0 / per_byte, name, direction)
        to.observe(names.REUSE_GAP, link.departures.gaps.take(), name)
        to.observe(names.EVICTION_AGE, stats.samples.get("eviction_age_s", ()), name)
        for cause, total in stats.failures.items():
            to.count(names.FAILURES, total, name, cause)
        for cause, total in stats.quarantined.items():
            to.count(names.QUARANTINED, total, name, cause)
        self._tell_own(name, stats, more)

    def _tell_own(self, name: str, stats: TierStats, more: Mapping[str, int]) -> None:
        """What the tier counts and has: under every tier's names where it is every tier's."""
        to = self._to
        self._held[name] = stats.gauges
        for counter, total in {**stats.counters, **more}.items():
            if metric := _COUNTS.get(counter):
                to.count(metric, total, name)
            elif counter not in _TOLD:
                to.count(names.OWN_COUNTS, total, name, counter)
        for gauge, value in stats.gauges.items():
            if metric := _GAUGES.get(gauge):
                to.gauge(metric, value, name)
            elif direction := _QUEUES.get(gauge):
                to.gauge(names.QUEUED_TASKS, value, name, direction)
            elif gauge not in _TOLD:
                to.gauge(names.OWN_VALUES, value, name, gauge)
