"""The metrics: one for each thing, in one unit. Prometheus appends `_total` to counters.

`tier` is "primary" or the name of a secondary tier. vLLM adds the labels `model_name` and `engine`.
"""

from __future__ import annotations

from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

from kvstrata.offload.metering.names import (
    AUDIT_ERROR,
    AUDIT_PAGES,
    AUDITS_FORCED,
    BANDWIDTH,
    BREAKER_OPEN,
    BREAKER_OPENINGS,
    BYTES,
    CAPACITY,
    CAPACITY_TOKENS,
    DEADLINE_MISSES,
    DECLINED_REQUESTS,
    DISK_FILES,
    DISK_FREE,
    DISK_USED,
    DISTRUSTED,
    EVICTED_BYTES,
    EVICTED_PAGES,
    EVICTION_AGE,
    FAILURES,
    HIT_CHUNKS,
    HIT_TOKENS,
    INCOMPLETE_PAGES,
    INFO,
    LATENCY,
    MOVING_PAGES,
    NO_ROOM_PAGES,
    OVERDUE_JOBS,
    OWN_COUNTS,
    OWN_VALUES,
    PAGES,
    PINS_REFUSED,
    PREFILL_SPEED,
    PROCESS_RESTARTS,
    PROMOTION_SECONDS,
    PUT_OFF,
    QUARANTINED,
    QUERY_CHUNKS,
    QUERY_TOKENS,
    QUEUED_TASKS,
    READ_BYTES,
    READ_PAGES,
    READ_SECONDS,
    REUSE_GAP,
    SAVED_NET,
    SAVED_SECONDS,
    SHED_PAGES,
    SLOTS,
    STORES_FAILING,
    WAIT_SECONDS,
    WRITE_SECONDS,
    WRITTEN_BYTES,
    WRITTEN_PAGES,
    WRONG_WISHES,
)

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# a second, ..., an hour, 4 hours, a day, a week
_AGES = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0, 604_800.0)

_TIER = ("tier",)
_WAY = ("tier", "direction")


def tier_metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Those that are told of each tier, by name."""
    return {name: each for name, each in metric_definitions().items() if "tier" in each.labelnames}


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """All of them by name."""
    count, gauge, spread = (
        OffloadingCounterMetadata,
        OffloadingGaugeMetadata,
        OffloadingHistogramMetadata,
    )
    return {
        QUERY_CHUNKS: count(
            "Chunks that requests needed and that were in no tier before this one: each counts "
            "once, when its request loads or begins to compute.",
            _TIER,
        ),
        HIT_CHUNKS: count("Those of them that the tier had, and the request loaded.", _TIER),
        QUERY_TOKENS: count("Like the chunks that were queried, in tokens of prompts.", _TIER),
        HIT_TOKENS: count("Tokens of prompts that were served from the tier.", _TIER),
        DEADLINE_MISSES: count(
            "Waits past their deadline, after which the request computed: of a look-up, of a "
            "promotion, of a page that the GPU fills.",
            ("wait",),
        ),
        DECLINED_REQUESTS: count(
            "Requests that computed what the tier has, since that was expected to be sooner.",
            _TIER,
        ),
        SAVED_SECONDS: count(
            "Seconds of prefill that were not computed: tokens served from the tier, at the speed "
            "by which prefills advance here.",
            _TIER,
        ),
        WAIT_SECONDS: count(
            "Seconds that requests waited for tiers: for look-ups, promotions and the copy to the "
            "GPU, in vain or not."
        ),
        SAVED_NET: gauge("Seconds of prefill saved so far, less those that requests waited."),
        PREFILL_SPEED: gauge(
            "Tokens per second by which a request's prefill advances; 0 while it is not known."
        ),
        READ_PAGES: count("Pages that were read from the tier; of the primary one by GPUs.", _TIER),
        READ_BYTES: count("Bytes that were read from the tier.", _TIER),
        READ_SECONDS: count(
            "Seconds in which the tier read, summed over its jobs. Of the primary one see "
            "vllm:kv_offload_load_time.",
            _TIER,
        ),
        WRITTEN_PAGES: count(
            "Pages that were stored in the tier, those included that it had already.", _TIER
        ),
        WRITTEN_BYTES: count("Bytes that were written to the tier.", _TIER),
        WRITE_SECONDS: count(
            "Seconds in which the tier wrote, summed over its jobs. Of the primary one see "
            "vllm:kv_offload_store_time.",
            _TIER,
        ),
        PROMOTION_SECONDS: spread(
            "Seconds from the reservation of pages to the end of the job that brought them.",
            _TIER,
            buckets=_LATENCIES,
        ),
        MOVING_PAGES: gauge("Pages on their way from (read) or to (write) the tier.", _WAY),
        QUEUED_TASKS: gauge("Tasks that the tier's I/O processes have, or wait for them.", _WAY),
        LATENCY: gauge("Seconds until the tier begins to move a page, once measured.", _WAY),
        BANDWIDTH: gauge(
            "Bytes per second that decisions reckon with, once measured; where jobs are small and "
            "alike their latency is in it. What was moved in what time: the bytes by the seconds.",
            _WAY,
        ),
        PAGES: gauge("Pages that are in the tier, as far as this engine knows.", _TIER),
        BYTES: gauge("Bytes of these pages.", _TIER),
        CAPACITY: gauge(
            "Bytes that the tier may hold; 0 while there is no limit. Of the fs tier what all "
            "files below its directories may take, with min_free_bytes as of now.",
            _TIER,
        ),
        CAPACITY_TOKENS: gauge("Tokens for which the primary tier has room."),
        SLOTS: gauge(
            "Slots of the primary tier by state: free, idle (evictable), busy, and of the busy "
            "ones: promoting, pinned; not_ready while their memory is being reserved.",
            ("state",),
        ),
        DISK_USED: gauge(
            "Bytes that the files below the tier's directories take, whoever wrote them.", _TIER
        ),
        DISK_FREE: gauge("Bytes that are free on the disks of the tier.", _TIER),
        DISK_FILES: gauge("Files below the tier's directories.", _TIER),
        EVICTED_PAGES: count("Pages that left the tier to make room.", _TIER),
        EVICTED_BYTES: count("Bytes of these pages.", _TIER),
        EVICTION_AGE: spread(
            "Seconds since a page was stored or used last, when it was evicted; a sample where "
            "many leave at once.",
            _TIER,
            buckets=_AGES,
        ),
        REUSE_GAP: spread(
            "Seconds from a page's eviction until it came again, since a request needed it.",
            _TIER,
            buckets=_AGES,
        ),
        SHED_PAGES: count(
            "Pages that were not stored, by reason: threshold (not asked for often enough), worth "
            "(worth less than what is held), behind (the tier does not keep up, or is out).",
            ("tier", "reason"),
        ),
        PUT_OFF: count(
            "How often vLLM had to offer a request's pages again, since none could be evicted then."
        ),
        NO_ROOM_PAGES: count("Pages that a tier had, and for which the primary one had no room."),
        INCOMPLETE_PAGES: count("Pages that the workers could not fill, and that were dropped."),
        PINS_REFUSED: count("Pages that a request wished pinned, beyond what may be."),
        WRONG_WISHES: count("Wishes in kv_transfer_params.kvstrata that were not understood."),
        FAILURES: count("What failed at the tier, by cause.", ("tier", "cause")),
        QUARANTINED: count(
            "Pages that are not what they must be and were put aside, by cause.", ("tier", "cause")
        ),
        BREAKER_OPEN: gauge("1 while the tier is left alone since it failed.", _TIER),
        BREAKER_OPENINGS: count(
            "How often that began, by what was asked of the tier and how it failed last.",
            ("tier", "operation", "cause"),
        ),
        STORES_FAILING: gauge("1 while nothing of its last store was stored.", _TIER),
        DISTRUSTED: gauge("1 while its pages are not believed after audits.", _TIER),
        OVERDUE_JOBS: count("Jobs of the tier that did not end in time.", _TIER),
        PROCESS_RESTARTS: count("I/O processes of the tier that were replaced.", _TIER),
        AUDIT_PAGES: count(
            "Pages that were computed again and compared, by result: equal, close, different.",
            ("result",),
        ),
        AUDITS_FORCED: count("Pages that were withheld so that they would be computed again."),
        AUDIT_ERROR: gauge(
            "The largest relative error of a row that an audit found (docs/audit.md)."
        ),
        INFO: gauge(
            "1; the version, the namespace's digest, and the hashing of prefixes (algorithm and a "
            "mark of its seed): servers that share pages have the same.",
            ("version", "kv_namespace", "hashing"),
        ),
        OWN_COUNTS: count(
            "What a tier that is not kvstrata's counts of its own.", ("tier", "name")
        ),
        OWN_VALUES: gauge("Present values that it tells of its own.", ("tier", "name")),
    }
