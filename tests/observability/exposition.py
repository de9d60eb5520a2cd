"""A vLLM server's `/metrics` without a server or an engine: `python -m` this prints its URL, and
serves until its input ends.

The metrics are made and filled by vLLM's own logger, as in a server. Between two scrapes all that
can happen happens in engine 0: it hits, evicts, fails and waits. Engine 1 computes long prompts and
asks no tier for them.
"""

from __future__ import annotations

import itertools
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import generate_latest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
    get_connector_metric_definitions,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import FinishReason
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import (
    FinishedRequestStats,
    IterationStats,
    PrefixCacheStats,
    SchedulerStats,
)

from kvstrata.offload.metering import names
from kvstrata.offload.vllm_plugin.entry_point import register
from kvstrata.offload.vllm_plugin.metrics.definitions import metric_definitions
from tests.engine.conftest import CHECKPOINTS
from tests.engine.driver import connector
from tests.models import tiny_llama

GIB = 2**30
LABELS = {
    "tier": (names.PRIMARY, "fs"),
    "direction": ("read", "write"),
    "state": ("free", "idle", "busy", "promoting", "pinned", "not_ready"),
    "wait": ("look-up", "promotion", "gpu"),
    "reason": ("threshold", "worth", "behind"),
    "cause": ("checksum", "no-space"),
    "operation": ("load",),
    "result": ("close", "different"),
}
# What the primary tier has of what is told of tiers; the other one has all of it.
OF_PRIMARY = {
    *(names.QUERY_CHUNKS, names.HIT_CHUNKS, names.QUERY_TOKENS, names.HIT_TOKENS),
    *(names.READ_PAGES, names.READ_BYTES, names.WRITTEN_PAGES, names.WRITTEN_BYTES),
    *(names.EVICTED_PAGES, names.EVICTED_BYTES, names.EVICTION_AGE, names.REUSE_GAP),
    *(names.SAVED_SECONDS, names.PAGES, names.BYTES, names.CAPACITY, names.SHED_PAGES),
}
# Where a value between others is what matters; of counters what is added between two scrapes
VALUES: dict[str, float] = {
    names.SAVED_SECONDS: 100,
    names.WAIT_SECONDS: 400,
    names.PREFILL_SPEED: 8000,
    names.CAPACITY: 64 * GIB,
    names.BYTES: 60 * GIB,
    names.DISK_USED: 70 * GIB,
    names.DISK_FREE: GIB / 2,
    names.BANDWIDTH: 3e9,
    names.HIT_CHUNKS: 50,
    names.HIT_TOKENS: 800,
    names.QUERY_TOKENS: 1600,
    names.BREAKER_OPEN: 1,
    names.STORES_FAILING: 1,
    names.DISTRUSTED: 1,
    names.INFO: 1,
}
SAMPLES = {
    names.REUSE_GAP: [30.0] * 60 + [600.0] * 20,
    names.EVICTION_AGE: [1000.0] * 100,
    names.PROMOTION_SECONDS: [0.02] * 90 + [0.3] * 10,
}
ANY_COUNT, ANY_GAUGE, ANY_SAMPLES = 100.0, 10.0, [0.01, 0.1]


def has(name: str, labels: tuple[str, ...]) -> bool:
    """Whether an engine tells it."""
    return names.PRIMARY not in labels or name in OF_PRIMARY


def everything() -> OffloadingConnectorStats:
    """What an engine tells in which everything happened."""
    stats = OffloadingConnectorStats()
    for name, metric in {**metric_definitions(), **get_connector_metric_definitions()}.items():
        for labels in itertools.product(
            *(LABELS.get(label, (label,)) for label in metric.labelnames)
        ):
            if not has(name, labels):
                continue
            if isinstance(metric, OffloadingCounterMetadata):
                stats.increase_counter(name, VALUES.get(name, ANY_COUNT), labels)
            elif isinstance(metric, OffloadingGaugeMetadata):
                stats.set_gauge(name, VALUES.get(name, ANY_GAUGE), labels)
            else:
                for value in SAMPLES.get(name, ANY_SAMPLES):
                    stats.observe_histogram(name, value, labels)
    return stats


def no_lookups() -> OffloadingConnectorStats:
    """What an engine tells that asks its tiers for nothing."""
    stats = OffloadingConnectorStats()
    stats.set_gauge(names.INFO, 1.0, metric_definitions()[names.INFO].labelnames)
    return stats


def requests(prompt_tokens: int, count: int) -> IterationStats:
    """Requests that came to their end."""
    stats = IterationStats()
    stats.prompt_token_stats.total = prompt_tokens * count
    stats.prompt_token_stats.computed = prompt_tokens * count
    for _ in range(count):
        stats.time_to_first_tokens_iter.append(0.2)
        stats.finished_requests.append(
            FinishedRequestStats(FinishReason.STOP, num_prompt_tokens=prompt_tokens)
        )
    return stats


def config() -> VllmConfig:
    """A server's, as its arguments make it."""
    register()
    return EngineArgs(
        model=str(tiny_llama(CHECKPOINTS)),
        served_model_name="model",
        dtype="float32",
        max_model_len=704,
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(**connector()),
    ).create_engine_config()


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM's server does: in the text format, whatever a client would rather have."""

    logger: PrometheusStatLogger

    def do_GET(self) -> None:
        for engine, stats in enumerate((everything(), no_lookups())):
            seen = PrefixCacheStats(requests=10, queries=100_000, hits=1000)
            scheduler = SchedulerStats(prefix_cache_stats=seen, kv_connector_stats=stats.data)
            self.logger.record(scheduler, requests(10_000, 10), engine_idx=engine)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(generate_latest())

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    """Serve until the input ends."""
    Handler.logger = PrometheusStatLogger(config(), [0, 1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
