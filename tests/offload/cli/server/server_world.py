"""A server's metrics without a server: healthy ones, to be made sick, as text and over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from kvstrata.offload.cli.server.look import Look
from kvstrata.offload.cli.server.scrape import Scrape, parse
from kvstrata.offload.metering import names as n

GIB = 2**30
AGES = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0)
TOKEN = 131_072  # bytes: Llama 3 8B


class Metrics:
    """What one vLLM shows: every metric has the labels `model_name` and `engine`."""

    def __init__(self, model: str = "llama", engine: str = "0") -> None:
        self._labels = {"model_name": model, "engine": engine}
        self._registry = CollectorRegistry()
        self._known: dict[str, Any] = {}
        self.gauge("vllm:num_requests_running", 0).gauge("vllm:num_requests_waiting", 0)

    def count(self, name: str, value: float, **labels: str) -> Self:
        """A counter grows."""
        self._labelled(Counter, name, labels).inc(value)
        return self

    def gauge(self, name: str, value: float, **labels: str) -> Self:
        """A gauge has a value."""
        self._labelled(Gauge, name, labels).set(value)
        return self

    def observe(self, name: str, values: Iterable[float], **labels: str) -> Self:
        """A histogram sees values."""
        for value in values:
            self._labelled(Histogram, name, labels).observe(value)
        return self

    def text(self) -> str:
        """As `/metrics` has it."""
        return generate_latest(self._registry).decode()

    def scrape(self, when: float = 0.0, url: str = "http://one:8000") -> Scrape:
        """As it is read."""
        return parse(url, self.text(), when)

    def _labelled(self, kind: type[MetricWrapperBase], name: str, labels: dict[str, str]) -> Any:
        labels = {**self._labels, **labels}
        if name not in self._known:
            more = {"buckets": AGES} if kind is Histogram else {}
            self._known[name] = kind(name, name, list(labels), registry=self._registry, **more)
        return self._known[name].labels(**labels)


def started(
    metrics: Metrics, namespace: str = "9a0e0ab15cf5", hashing: str = "sha256:1f"
) -> Metrics:
    """An engine with a CPU tier of 64 GiB and a disk, before its first request."""
    metrics.gauge(n.INFO, 1, version="0.1.0", kv_namespace=namespace, hashing=hashing)
    metrics.gauge("vllm:cache_config_info", 1, kv_cache_size_tokens="200000", block_size="16")
    metrics.gauge(n.CAPACITY_TOKENS, 64 * GIB // TOKEN)
    metrics.gauge(n.CAPACITY, 64 * GIB, tier="primary").gauge(n.CAPACITY, 1000 * GIB, tier="fs")
    for state, slots in (("free", 10), ("idle", 900), ("busy", 90), ("not_ready", 0)):
        metrics.gauge(n.SLOTS, slots, state=state)
    for name in (n.BREAKER_OPEN, n.STORES_FAILING, n.DISTRUSTED):
        metrics.gauge(name, 0, tier="fs")
    metrics.gauge(n.DISK_USED, 500 * GIB, tier="fs").gauge(n.DISK_FREE, 900 * GIB, tier="fs")
    metrics.gauge(n.PREFILL_SPEED, 0)
    return metrics


def healthy() -> Metrics:
    """The same after a day of service: every metric is there, and nothing is wrong.

    Pages are evicted long after their last use, and hardly any comes again.
    """
    metrics = started(Metrics())
    metrics.count("vllm:prompt_tokens", 9e6).count("vllm:prefix_cache_hits", 1e6)
    metrics.count("vllm:request_success", 5000)
    metrics.gauge("vllm:num_requests_running", 3).gauge("vllm:num_requests_waiting", 1)
    metrics.gauge(n.PREFILL_SPEED, 8000)
    for tier, asked, found in (("primary", 500_000, 300_000), ("fs", 200_000, 100_000)):
        metrics.count(n.QUERY_CHUNKS, asked, tier=tier).count(n.HIT_CHUNKS, found, tier=tier)
        metrics.count(n.QUERY_TOKENS, 16 * asked, tier=tier)
        metrics.count(n.HIT_TOKENS, 16 * found, tier=tier)
        metrics.count(n.SAVED_SECONDS, found / 500, tier=tier)
        for pages, nbytes, number in (
            (n.READ_PAGES, n.READ_BYTES, found),
            (n.WRITTEN_PAGES, n.WRITTEN_BYTES, 600_000),
            (n.EVICTED_PAGES, n.EVICTED_BYTES, 100_000),
        ):
            metrics.count(pages, number, tier=tier)
            metrics.count(nbytes, number * 16 * TOKEN, tier=tier)
        metrics.gauge(n.PAGES, 1000, tier=tier).gauge(n.BYTES, 60 * GIB, tier=tier)
        metrics.observe(n.EVICTION_AGE, [3000.0] * 1000, tier=tier)
        metrics.observe(n.REUSE_GAP, [600.0] * 60, tier=tier)
        metrics.count(n.SHED_PAGES, 500, tier=tier, reason="behind")
    for direction in ("read", "write"):
        metrics.gauge(n.BANDWIDTH, 3e9, tier="fs", direction=direction)
        metrics.gauge(n.LATENCY, 0.002, tier="fs", direction=direction)
    metrics.count(n.WAIT_SECONDS, 40).gauge(n.SAVED_NET, 760)
    metrics.count(n.DEADLINE_MISSES, 4, wait="look-up").count(n.DECLINED_REQUESTS, 20, tier="fs")
    metrics.count(n.NO_ROOM_PAGES, 50).count(n.INCOMPLETE_PAGES, 30)
    metrics.count(n.AUDIT_PAGES, 300, result="close").gauge(n.AUDIT_ERROR, 0.001)
    metrics.count(n.FAILURES, 3, tier="fs", cause="missing")
    return metrics


def look(then: Metrics, now: Metrics) -> Look:
    """Ten seconds between two reads of one engine."""
    return Look(then.scrape(0.0), now.scrape(10.0))


def sick(*changes: Callable[[Metrics], object]) -> Look:
    """A healthy engine, to which something happened long before both reads."""
    return look(_changed(changes), _changed(changes))


def sickening(*changes: Callable[[Metrics], object]) -> Look:
    """A healthy engine, to which something happened between the reads."""
    return look(healthy(), _changed(changes))


def _changed(changes: Iterable[Callable[[Metrics], object]]) -> Metrics:
    metrics = healthy()
    for change in changes:
        change(metrics)
    return metrics


class FakeServer:
    """Serves text at /metrics on 127.0.0.1; a context.

    Attributes:
        answers: the text of each answer; the last one again and again.
    """

    def __init__(self, *answers: str, port: int = 0, status: int = 200) -> None:
        self.answers = list(answers)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                self.send_response(status if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
