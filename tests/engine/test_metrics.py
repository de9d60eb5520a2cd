"""What a real server tells Prometheus, and its log, of what it did.

Prompts of ten pages; GPU memory has room for two of them, the CPU tier for three, and the disk's
budget for five: all evict, and both tiers hit.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstrata.offload.metering import names
from tests.engine.driver import BLOCK, Server, connector, prompt, serving
from tests.observability.prometheus import needs_prometheus
from tests.observability.queries import answers, board_queries
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

PAGE = 96 * 1024  # bytes, of the tiny model
CHUNKS = 10  # of a prompt of 320 tokens
ORDER = (0, 1, 2) * 2 + (0, 1, 2, 3, 4) * 2
# Of metrics that a sound engine has nothing to tell of; tests/offload/vllm_plugin/test_metrics.py
# tells them all.
OF_TROUBLE = {
    *(names.BREAKER_OPENINGS, names.QUARANTINED, names.FAILURES, names.OVERDUE_JOBS),
    *(names.PROCESS_RESTARTS, names.INCOMPLETE_PAGES, names.PINS_REFUSED, names.WRONG_WISHES),
    *(names.DEADLINE_MISSES, names.DECLINED_REQUESTS, names.PUT_OFF, names.NO_ROOM_PAGES),
    *(names.AUDIT_PAGES, names.AUDITS_FORCED, names.SHED_PAGES, names.OWN_COUNTS),
    names.OWN_VALUES,
}


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("metrics")
    files = {"type": "fs", "root_dir": str(folder / "kv"), "max_files": 60}
    slots = 36 * PAGE + 2**20  # with the region's header
    config = connector(
        cpu_bytes_to_use=slots,
        secondary_tiers=[files],
        eviction_policy="lru",
        log_interval_s=0.5,
        audit_fraction=0,
    )
    with serving(llama, folder / "server.log", kv_transfer_config=config) as server:
        for number in (*ORDER, 5, 6, 7, 8):  # the last ones pass the disk's budget
            server.ask(prompt(number))
        wait_until(lambda: ask_and_scrape(server)[names.EVICTED_PAGES, "fs"] > 0)
        yield server


def scrape(server: Server) -> Mapping[tuple[str, str], float]:
    """The values by name and `tier`, or all labels that are ours; histograms by their count."""
    found = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created", "_sum")):
                continue
            labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            name = re.sub("_(total|count)$", "", sample.name)
            found[name, ",".join(labels.values())] = sample.value
    return found


def ask_and_scrape(server: Server) -> Mapping[tuple[str, str], float]:
    """vLLM collects metrics while it runs requests: a short one, of which no page is kept."""
    server.ask("?", max_tokens=2)
    return scrape(server)


@pytest.fixture
def told(server: Server) -> Mapping[tuple[str, str], float]:
    return ask_and_scrape(server)


def test_what_requests_found(told: Mapping[tuple[str, str], float]) -> None:
    """vLLM counts the same tokens of its own."""
    hits = told[names.HIT_TOKENS, "primary"] + told[names.HIT_TOKENS, "fs"]
    assert hits == told["vllm:external_prefix_cache_hits", ""] > 0
    assert told[names.HIT_TOKENS, "fs"] == BLOCK * told[names.HIT_CHUNKS, "fs"] > 0
    queried = told[names.QUERY_CHUNKS, "primary"] - told[names.HIT_CHUNKS, "primary"]
    assert told[names.QUERY_CHUNKS, "fs"] == queried
    assert told["vllm:kv_offload_tiering_chunk_hits", "1:fs"] == told[names.HIT_CHUNKS, "fs"]


def test_what_moved(told: Mapping[tuple[str, str], float]) -> None:
    """vLLM counts the same bytes between GPU and CPU tier."""
    for ours, theirs in ((names.READ_BYTES, "load"), (names.WRITTEN_BYTES, "store")):
        assert told[ours, "primary"] == told[f"vllm:kv_offload_{theirs}_bytes", ""] > 0
    for pages, nbytes in (
        (names.READ_PAGES, names.READ_BYTES),
        (names.WRITTEN_PAGES, names.WRITTEN_BYTES),
    ):
        assert told[nbytes, "fs"] <= PAGE * told[pages, "fs"]
    assert told[names.READ_SECONDS, "fs"] > 0 and told[names.WRITE_SECONDS, "fs"] > 0
    assert 0 < told[names.PROMOTION_SECONDS, "fs"] <= told[names.READ_PAGES, "fs"]


def test_what_is_there(server: Server) -> None:
    root = server.log.parent / "kv"

    def is_so() -> bool:
        """The disk may be a moment ahead."""
        told, files = ask_and_scrape(server), list(root.glob("*_r0/*/*/*.safetensors"))
        evicted = told[names.WRITTEN_PAGES, "fs"] - told[names.EVICTED_PAGES, "fs"]
        return (
            len(files) == told[names.PAGES, "fs"] <= evicted
            and PAGE * len(files) == told[names.BYTES, "fs"]
            and told[names.BYTES, "fs"] < told[names.DISK_USED, "fs"]
            and len(files) < told[names.DISK_FILES, "fs"] <= 60
        )

    wait_until(is_so)
    told = scrape(server)
    slots = sum(told[names.SLOTS, state] for state in ("free", "idle", "busy"))
    assert told[names.PAGES, "primary"] == slots - told[names.SLOTS, "free"] >= CHUNKS
    assert told[names.CAPACITY, "primary"] == slots * PAGE
    assert told[names.CAPACITY_TOKENS, ""] == slots * BLOCK
    assert told[names.DISK_FREE, "fs"] > 0


def test_what_left(told: Mapping[tuple[str, str], float]) -> None:
    left = told[names.WRITTEN_PAGES, "primary"] + told[names.READ_PAGES, "fs"]
    assert told[names.EVICTED_PAGES, "primary"] == left - told[names.PAGES, "primary"]
    for tier in ("primary", "fs"):
        assert 0 < told[names.EVICTION_AGE, tier] <= told[names.EVICTED_PAGES, tier]
    assert told[names.REUSE_GAP, "primary"] > 0


def test_what_it_saved(told: Mapping[tuple[str, str], float]) -> None:
    """Each token that was served is priced at the speed at which prompts are computed here."""
    speed = told[names.PREFILL_SPEED, ""]
    saved = told[names.SAVED_SECONDS, "primary"] + told[names.SAVED_SECONDS, "fs"]
    tokens = told[names.HIT_TOKENS, "primary"] + told[names.HIT_TOKENS, "fs"]
    assert speed > 0 and tokens / speed / 10 < saved < 10 * tokens / speed
    net = told[names.SAVED_NET, ""]
    assert net == pytest.approx(saved - told[names.WAIT_SECONDS, ""])


def test_every_metric_is_there(told: Mapping[tuple[str, str], float]) -> None:
    """But those of trouble; and nothing else under our name that is not of version 0.1."""
    ours = {value for name, value in vars(names).items() if name.isupper()} - {names.PRIMARY}
    seen = {name for name, _ in told if name.startswith("kvstrata_")}
    assert ours - OF_TROUBLE <= seen
    assert seen - ours == {"kvstrata_events", "kvstrata_tier_events", "kvstrata_tier_state"}
    assert told[names.INFO, next(labels for name, labels in told if name == names.INFO)] == 1.0


def test_the_log_says_whether_it_pays(server: Server) -> None:
    text = server.log.read_text()
    line = r"kvstrata \S+: CPU tier of 3\d pages of 96.0 KiB .* secondary tiers: fs in /"
    assert re.search(line, text)
    line = r"kvstrata: in \d+ s [\d,]+ of [\d,]+ chunks were found \(primary \d+, fs \d+\)"
    assert re.search(line, text)


@needs_prometheus
def test_the_dashboard_is_filled(server: Server) -> None:
    """All of it but what went wrong, which is nothing."""
    rows = "Does it pay?", "Is each tier of the right size?", "How fast is it?"
    answers(board_queries(*rows), f"http://127.0.0.1:{server.port}")
