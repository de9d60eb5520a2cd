"""Reading a server's metrics, and the one error for each way in which that fails."""

import socket
import threading

import pytest

from kvstrata.offload.cli.server import scrape as scraping
from kvstrata.offload.cli.server.look import Look
from kvstrata.offload.cli.server.scrape import Histogram, Scrape, ScrapeError, parse, read
from kvstrata.offload.metering import names as n
from tests.offload.cli.server.server_world import FakeServer, Metrics, healthy, started

VLLM = "# TYPE vllm:num_requests_running gauge\n"
OLD = f"{VLLM}# TYPE kvstrata_events counter\n"


def test_a_server_is_read_by_any_form_of_its_url() -> None:
    with FakeServer(healthy().text()) as server:
        for url in (server.url, f"{server.url}/", f"{server.url}/metrics", server.url[7:]):
            found = read(url)
            assert found.url == server.url
            assert found.total(n.HIT_CHUNKS, tier="fs") == 100_000


def test_values() -> None:
    found = healthy().scrape()
    assert found.total(n.HIT_CHUNKS) == 400_000
    assert found.total(n.PROCESS_RESTARTS) == 0.0
    assert (found.largest(n.CAPACITY), found.largest(n.MOVING_PAGES)) == (1000 * 2**30, None)
    assert list(found.by("tier", n.HIT_CHUNKS).items()) == [("primary", 300_000), ("fs", 100_000)]
    assert found.label(n.INFO, "model_name") == "llama"
    assert found.label(n.OWN_VALUES, "model_name") == ""
    assert found.tiers() == ["fs"]


def test_quantiles_are_prometheus_own() -> None:
    """Those of `histogram_quantile`: within a bucket evenly spread, beyond the last its bound."""
    seen = Histogram(((1.0, 0.0), (5.0, 10.0), (15.0, 30.0), (float("inf"), 40.0)))
    assert seen.count == 40
    assert [seen.quantile(share) for share in (0.125, 0.25, 0.5, 0.75, 0.9)] == [3, 5, 10, 15, 15]
    assert Histogram().quantile(0.5) is None
    assert Histogram(((1.0, 0.0), (float("inf"), 0.0))).quantile(0.5) is None
    metrics = Metrics().observe(n.REUSE_GAP, [2.0] * 10, tier="fs")
    metrics.observe(n.REUSE_GAP, [10.0] * 10, tier="primary")
    found = started(metrics).scrape()
    assert found.histogram(n.REUSE_GAP).count == 20
    assert found.histogram(n.REUSE_GAP, tier="fs").quantile(1.0) == 5.0


def test_engines_are_told_apart() -> None:
    texts = [started(Metrics(engine=engine)).text() for engine in ("10", "2")]
    # as one page has them: a family is there once
    lines = dict.fromkeys(line for text in texts for line in text.splitlines())
    found = parse("http://one:8000", "\n".join(lines) + "\n", 0.0)
    assert list(found.by_engine()) == ["2", "10"]
    assert found.total(n.CAPACITY, tier="primary") == 2 * 64 * 2**30
    assert found.by_engine()["2"].total(n.CAPACITY, tier="primary") == 64 * 2**30


def test_the_gpu_cache() -> None:
    def tokens(engines: int = 1, **labels: str) -> float | None:
        metrics = Metrics().gauge("vllm:cache_config_info", 1, **labels).gauge(n.INFO, 1)
        return Look(metrics.scrape(), metrics.scrape(), engines=engines).gpu_tokens()

    assert tokens(kv_cache_size_tokens="1000", num_gpu_blocks="9", block_size="16") == 1000
    blocks = {"num_gpu_blocks": "100", "block_size": "16"}
    assert tokens(kv_cache_size_tokens="None", **blocks) == 1600
    assert tokens(engines=2, **blocks) == 800, "vLLM adds up its engines' blocks"
    assert tokens(block_size="16") is None


def test_growth_after_a_restart_is_from_zero() -> None:
    before, after = (started(Metrics()).count(n.FAILURES, k, tier="fs", cause="x") for k in (9, 2))
    assert Look(before.scrape(), after.scrape()).grew(n.FAILURES) == 2
    assert Look(after.scrape(), before.scrape()).grew(n.FAILURES) == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<html><body>nginx</body></html>", "/metrics is no Prometheus text: give the URL of"),
        ('{"detail": "no"}', "is no Prometheus text"),
        ('a{b="c"', "is no Prometheus text"),
        ("", "has no metrics of vLLM: give the URL of a vLLM server, which must run without --dis"),
        ("up 1\n", "has no metrics of vLLM"),
        (VLLM, 'is a vLLM without kvstrata: give it a --kv-transfer-config with "spec_name"'),
        (OLD, "has a kvstrata that is older than this command"),
    ],
)
def test_what_is_no_server_of_ours(text: str, says: str) -> None:
    with FakeServer(text) as server, pytest.raises(ScrapeError) as caught:
        read(server.url)
    assert says in str(caught.value) and str(caught.value).startswith(server.url)


def test_no_server() -> None:
    with pytest.raises(ScrapeError, match=r"does not answer \(.*refused\): is the server up"):
        read("http://127.0.0.1:1")
    for url in ("ftp://x", "file:///etc/hosts"):
        with pytest.raises(ScrapeError, match=f"{url} is no URL of a server: give one such as"):
            read(url)
    for url in ("http://", "http://127.0.0.1:x", "http://[::", "", "http://a b"):
        with pytest.raises(ScrapeError, match="is the server up"):
            read(url)
    with FakeServer("", status=404) as server, pytest.raises(ScrapeError, match="answers 404 Not"):
        read(server.url)


def test_an_answer_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "_MOST_BYTES", 1000)
    with FakeServer("x" * 1001) as server, pytest.raises(ScrapeError, match="does not end"):
        read(server.url)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"HTTP/1.1 200 OK\r\n"])
def test_something_else_listens(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ScrapeError):
            read(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_a_server_that_says_nothing() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ScrapeError, match="does not answer"),
    ):
        read(f"http://127.0.0.1:{silent.getsockname()[1]}", patience_s=0.05)


def test_a_scrape_keeps_who_and_when() -> None:
    assert isinstance(found := healthy().scrape(7.0), Scrape)
    assert (found.url, found.when) == ("http://one:8000", 7.0)
