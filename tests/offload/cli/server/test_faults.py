"""Each fault: a healthy server has none of them, and a sick one has that one, with its figures."""

from collections.abc import Callable

import pytest

from kvstrata.offload.cli.server.faults.seeds import seeds
from kvstrata.offload.cli.server.judging import LEAST_CHUNKS, judge
from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.scrape import Scrape
from kvstrata.offload.metering import names as n
from tests.offload.cli.server.server_world import (
    GIB,
    TOKEN,
    Metrics,
    healthy,
    look,
    sick,
    sickening,
    started,
)

Change = Callable[[Metrics], object]


def only(seen: Look, fault: str, about: str) -> Finding:
    """The one thing that is wrong."""
    (found,) = judge(seen)
    assert (found.fault, found.about) == (fault, about), found
    return found


def says(text: str, *words: str) -> None:
    for word in words:
        assert word in text, text


def test_a_healthy_server_has_nothing() -> None:
    assert judge(sick()) == []
    assert list(seeds([sick(), sick()])) == []


def test_too_little_traffic_is_said() -> None:
    few = started(Metrics()).count(n.QUERY_CHUNKS, LEAST_CHUNKS - 1, tier="primary")
    found = only(look(started(Metrics()), few), "too little traffic", "engine")
    assert not found.wrong
    says(found.found, "needed 199 chunks", "from 200 on")
    enough = started(Metrics()).count(n.QUERY_CHUNKS, LEAST_CHUNKS, tier="primary")
    assert judge(look(few, enough)) == []


def test_tiers_in_vllms_own_manager() -> None:
    """There the manager's metrics are missing; what tiers tell of themselves is judged."""
    metrics = Metrics().gauge(n.BREAKER_OPEN, 0, tier="KVStrataFs")
    metrics.count("vllm:prompt_tokens", 9e6)
    found = only(look(metrics, metrics), "vLLM's own manager", "engine")
    assert not found.wrong
    metrics.gauge(n.STORES_FAILING, 1, tier="KVStrataFs")
    assert [each.fault for each in judge(look(metrics, metrics)) if each.wrong] == ["stores fail"]


# ---- sizes ----


def alone(cpu_tokens: int) -> Metrics:
    """A CPU tier without any other, before a GPU cache of 200,000 tokens."""
    metrics = Metrics().gauge(n.INFO, 1, version="", kv_namespace="", hashing="sha256:1f")
    metrics.gauge("vllm:cache_config_info", 1, kv_cache_size_tokens="200000")
    metrics.gauge(n.CAPACITY_TOKENS, cpu_tokens)
    metrics.gauge(n.CAPACITY, cpu_tokens * TOKEN, tier="primary").gauge(n.SLOTS, 9, state="free")
    return metrics.count(n.QUERY_CHUNKS, LEAST_CHUNKS, tier="primary")


def test_a_cpu_tier_that_is_smaller_than_the_gpus_cache() -> None:
    found = only(look(alone(80_000), alone(80_000)), "CPU tier too small", "primary")
    says(found.found, "80,000 tokens", "200,000")
    says(found.remedy, "cpu_bytes_to_use above 36.6 GiB", "secondary_tiers")
    assert judge(look(alone(200_001), alone(200_001))) == []


def test_the_whole_cpu_tier_counts_while_its_memory_is_being_reserved() -> None:
    started, half = healthy(), healthy()
    half.gauge(n.SLOTS, 1000, state="not_ready").gauge(n.CAPACITY_TOKENS, 32 * GIB // TOKEN)
    assert look(half, half).bytes_per_token() == look(started, started).bytes_per_token() == TOKEN
    half = alone(100_001).gauge(n.SLOTS, 9, state="not_ready")
    half.gauge(n.CAPACITY, 2 * 100_001 * TOKEN, tier="primary")
    assert [each.fault for each in judge(look(half, half))] == ["memory missing"]


@pytest.mark.parametrize(("room", "is_enough"), [(0, True), (100, True), (4, False)])
def test_a_small_cpu_tier_before_another(room: int, is_enough: bool) -> None:
    """As a gateway to a larger tier, or to one without a limit, it is no fault."""
    metrics = alone(80_000).gauge(n.CAPACITY, room * GIB, tier="fs")
    assert (
        judge(look(metrics, metrics)) == []
        if is_enough
        else only(look(metrics, metrics), "CPU tier too small", "primary")
    )


def returns(tier: str, age: float, gap: float, number: int = 20_000) -> Change:
    """So many evicted pages came again."""

    def change(metrics: Metrics) -> None:
        metrics.observe(n.EVICTION_AGE, [age] * number, tier=tier)
        metrics.observe(n.REUSE_GAP, [gap] * number, tier=tier)

    return change


def test_thrashing() -> None:
    found = only(sick(returns("primary", 300.0, 15.0)), "thrashing", "primary")
    says(found.found, "100,000 evicted pages", "20,060 or more (20.1 %)", "within 10 s")
    says(found.remedy, "raise cpu_bytes_to_use to 1.1 times what it is, about 68.3 GiB")


def test_evictions_that_do_no_harm() -> None:
    """What comes again comes late, or hardly anything comes again."""
    assert judge(sick(returns("primary", 60.0, 900.0))) == []
    assert judge(sick(returns("primary", 300.0, 15.0, number=2000))) == []


@pytest.mark.parametrize("tier", ["primary", "fs"])
def test_pages_that_were_lost_otherwise_tell_nothing_of_the_size(tier: str) -> None:
    """As where a root was moved away: its pages come again, and none of them was evicted."""
    assert judge(sick(returns(tier, 300.0, 15.0, number=100_000))) == []


def test_a_budget_that_evicts_before_reuse() -> None:
    found = only(sick(returns("fs", 300.0, 15.0)), "budget evicts before reuse", "fs")
    says(found.found, "100,000 chunks were found in it")
    says(
        found.remedy,
        "raise max_bytes of the tier to 1.1 times what it uses, about 5",
        "store_threshold: 2",
    )


def test_a_budget_that_evicts_what_is_found_nowhere_then() -> None:
    """Pages come again later than they were kept: that is the tier's size, too."""
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.count(n.EVICTED_PAGES, 1000, tier="fs").count(n.HIT_CHUNKS, 50, tier="fs")
    returns("fs", 60.0, 900.0, number=400)(metrics)
    found = only(look(metrics, metrics), "budget evicts before reuse", "fs")
    says(found.found, "came again, half of them within 10 min", "50 chunks were found")
    metrics.count(n.HIT_CHUNKS, 400, tier="fs")
    assert judge(look(metrics, metrics)) == []


@pytest.mark.parametrize("tier", ["primary", "fs"])
def test_much_is_stored_and_nothing_loaded(tier: str) -> None:
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.count(n.WRITTEN_BYTES, 1100 * GIB, tier=tier).count(n.READ_BYTES, 5 * GIB, tier=tier)
    found = only(look(metrics, metrics), "hardly used", tier)
    says(found.found, "1.1 TiB were stored", "5.0 GiB (0.455 %)")
    says(found.remedy, "set store_threshold to 2")
    assert ("tier's entry" in found.remedy) == (tier == "fs")
    metrics.count(n.SHED_PAGES, 9, tier=tier, reason="threshold")
    says(only(look(metrics, metrics), "hardly used", tier).remedy, "raise store_threshold, or make")
    metrics.count(n.READ_BYTES, 20 * GIB, tier=tier)
    assert judge(look(metrics, metrics)) == []


@pytest.mark.parametrize(
    ("tier", "fault"), [("primary", "thrashing"), ("fs", "budget evicts before reuse")]
)
def test_pages_that_are_evicted_before_they_can_be_loaded(tier: str, fault: str) -> None:
    """The tier is too small: what is asked for again is no argument to store less of it."""
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.count(n.WRITTEN_BYTES, 1100 * GIB, tier=tier)
    metrics.count(n.EVICTED_PAGES, 1000, tier=tier)
    returns(tier, 300.0, 15.0, number=900)(metrics)
    only(look(metrics, metrics), fault, tier)
    returns(tier, 300.0, 15.0, number=900)(metrics)
    assert judge(look(metrics, metrics)) == [], "pages that were lost otherwise came again, too"


def test_what_was_stored_may_still_be_read() -> None:
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.count(n.WRITTEN_BYTES, 63 * GIB, tier="primary")
    metrics.count(n.WRITTEN_BYTES, 999 * GIB, tier="fs")
    assert judge(look(metrics, metrics)) == []


# ---- speed ----


def test_a_disk_that_is_slower_than_computing() -> None:
    slow = sick(lambda m: m.gauge(n.BANDWIDTH, 5e8, tier="fs", direction="read"))
    found = only(slow, "slower than computing", "fs")
    says(
        found.found,
        "4,096 tokens take 1.08 s to load",
        "512.0 MiB, 2 ms of it at any size",
        "512 ms to compute",
    )
    says(found.found, "20 requests computed what the tier had")
    says(found.remedy, "faster disk")


def test_load_or_recompute_is_proposed_where_it_is_off() -> None:
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.gauge(n.BANDWIDTH, 5e8, tier="fs", direction="read").gauge(n.PREFILL_SPEED, 8000)
    metrics.gauge(n.LATENCY, 0.0, tier="fs", direction="read")
    found = only(look(metrics, metrics), "slower than computing", "fs")
    says(found.remedy, 'set "load_or_recompute": true')
    metrics.gauge(n.PREFILL_SPEED, 0)
    assert judge(look(metrics, metrics)) == [], "the speed is not known"


def test_a_tier_of_which_the_latency_is_all() -> None:
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.gauge(n.LATENCY, 2.5, tier="fs", direction="read").gauge(n.PREFILL_SPEED, 8000)
    says(only(look(metrics, metrics), "slower than computing", "fs").found, "2.5 s of it at any")


def test_latency_of_small_loads_is_not_taken_for_bandwidth() -> None:
    """Loads of one size tell no line: by the engine's estimate 512 MiB would take two minutes."""
    metrics = started(Metrics()).count(n.QUERY_CHUNKS, 9000, tier="primary")
    metrics.gauge(n.BANDWIDTH, 4.5e6, tier="fs", direction="read").gauge(n.PREFILL_SPEED, 800)
    metrics.gauge(n.LATENCY, 0.0, tier="fs", direction="read")
    metrics.count(n.READ_BYTES, 180e6, tier="fs").count(n.READ_SECONDS, 1, tier="fs")
    metrics.observe(n.PROMOTION_SECONDS, [0.02, 0.06], tier="fs")
    assert judge(look(metrics, metrics)) == []
    metrics.gauge(n.PREFILL_SPEED, 8000)
    found = only(look(metrics, metrics), "slower than computing", "fs")
    says(found.found, "take 3.02 s to load", "40 ms of it at any size")


def test_deadlines_that_are_missed() -> None:
    found = only(
        sick(lambda m: m.count(n.DEADLINE_MISSES, 200, wait="promotion")),
        "deadlines missed",
        "waits",
    )
    says(found.found, "204 waits in 5,000 requests (4.08 %)", "promotion 200, look-up 4")
    says(found.remedy, "promotion_deadline_s")


def test_waits_that_cost_more_than_hits_save() -> None:
    found = only(sick(lambda m: m.count(n.WAIT_SECONDS, 1160)), "costs more than it saves", "waits")
    says(found.found, "waited 20 min", "saved them 13.3 min")


def test_a_tier_that_does_not_keep_up() -> None:
    found = only(
        sick(lambda m: m.count(n.SHED_PAGES, 400_000, tier="fs", reason="behind")),
        "does not keep up",
        "fs",
    )
    says(found.found, "400,500 of 1,000,500 pages (40 %)", "writes 2.8 GiB a second")


# ---- failures ----


def test_a_breaker_that_is_open_and_why() -> None:
    def fails(metrics: Metrics) -> None:
        metrics.gauge(n.BREAKER_OPEN, 1, tier="fs")
        metrics.count(n.BREAKER_OPENINGS, 2, tier="fs", operation="load", cause="io-error")
        metrics.count(n.FAILURES, 12, tier="fs", cause="io-error")

    for seen in (sick(fails), sickening(fails)):
        found = only(seen, "breaker", "fs")
        assert found.wrong
        says(found.found, "is left alone since loads failed (io-error), 2 times")
        says(found.found, "io-error 12, missing 3")
        says(found.remedy, "look at the disk")


def test_the_cause_of_the_latest_opening_is_named() -> None:
    def earlier(metrics: Metrics) -> Metrics:
        return metrics.count(n.BREAKER_OPENINGS, 9, tier="fs", operation="look-up", cause="missing")

    now = earlier(healthy()).count(
        n.BREAKER_OPENINGS, 1, tier="fs", operation="store", cause="late"
    )
    found = only(look(earlier(healthy()), now), "breaker", "fs")
    assert found.wrong, "it was open between the reads"
    says(found.found, "was left alone, and is in use again", "since stores failed (late)")


def test_a_breaker_of_last_night_is_told_and_is_no_fault() -> None:
    seen = sick(
        lambda m: m.count(n.BREAKER_OPENINGS, 9, tier="fs", operation="load", cause="io-error")
    )
    assert not only(seen, "breaker", "fs").wrong


def test_processes_that_restart() -> None:
    restarted: Change = lambda m: m.count(n.PROCESS_RESTARTS, 2, tier="fs")  # noqa: E731
    says(only(sickening(restarted), "I/O processes restart", "fs").found, "2 I/O processes")
    assert judge(sick(restarted)) == []


def test_stores_that_fail() -> None:
    seen = sick(
        lambda m: m.gauge(n.STORES_FAILING, 1, tier="fs"),
        lambda m: m.count(n.FAILURES, 40, tier="fs", cause="read-only"),
    )
    says(only(seen, "stores fail", "fs").found, "failures: read-only 40, missing 3")


def test_a_disk_that_is_full() -> None:
    full: Change = lambda m: m.count(n.FAILURES, 40, tier="fs", cause="no-space")  # noqa: E731
    found = only(sickening(full), "disk full", "fs")
    says(found.found, "no-space 40", "500.0 GiB used", "1000.0 GiB allowed", "900.0 GiB free")
    says(found.remedy, "min_free_bytes")
    failing: Change = lambda m: m.gauge(n.STORES_FAILING, 1, tier="fs")  # noqa: E731
    only(sickening(full, failing), "disk full", "fs")
    assert judge(sick(full)) == [], "it was full once"


def test_pages_in_the_quarantine() -> None:
    bad: Change = lambda m: m.count(n.QUARANTINED, 2, tier="fs", cause="checksum")  # noqa: E731
    found = only(sickening(bad), "quarantined pages", "fs")
    assert found.wrong
    says(found.found, "2 pages", "checksum 2", "2 of them while this looked")
    says(found.remedy, "smartctl")
    assert not only(sick(bad), "quarantined pages", "fs").wrong
    assert only(sick(*[bad] * 5), "quarantined pages", "fs").wrong
    copied = sick(lambda m: m.count(n.QUARANTINED, 20, tier="fs", cause="key"))
    says(only(copied, "quarantined pages", "fs").remedy, "copies or renames")


def test_audits_that_differ() -> None:
    found = only(
        sick(
            lambda m: m.count(n.AUDIT_PAGES, 2, result="different"),
            lambda m: m.gauge(n.AUDIT_ERROR, 0.75),
        ),
        "audits differ",
        "audits",
    )
    says(found.found, "of 302 pages", "2 were not", "0.75")


def test_a_tier_that_is_not_trusted() -> None:
    found = only(sick(lambda m: m.gauge(n.DISTRUSTED, 1, tier="fs")), "distrusted", "fs")
    says(found.remedy, "kvstrata trust")


# ---- memory and requests ----


def test_memory_that_is_missing() -> None:
    def missing(slots: int) -> Metrics:
        return healthy().gauge(n.SLOTS, slots, state="not_ready")

    found = only(look(missing(1000), missing(1000)), "memory missing", "primary")
    assert found.wrong
    says(found.found, "1,000 of 2,000 slots (50 %) could not be reserved")
    coming = only(look(missing(2000), missing(1000)), "memory missing", "primary")
    assert not coming.wrong
    says(coming.found, "is still being reserved")


@pytest.mark.parametrize(
    ("name", "fault", "remedy"),
    [
        (n.NO_ROOM_PAGES, "no room to load", "promotion_fraction"),
        (n.INCOMPLETE_PAGES, "pages not filled", "blocks_per_chunk"),
    ],
)
def test_pages_without_room_and_pages_that_are_not_filled(
    name: str, fault: str, remedy: str
) -> None:
    found = only(sick(lambda m: m.count(name, 100_000)), fault, "primary")
    says(found.found, "100,0")
    says(found.remedy, remedy)


def test_prompts_that_are_not_looked_up() -> None:
    metrics = started(Metrics()).count("vllm:prompt_tokens", 500_000)
    found, told = judge(look(metrics, metrics))
    assert (found.fault, told.fault) == ("no look-ups", "too little traffic")
    says(found.found, "500,000 tokens")
    metrics.count("vllm:prefix_cache_hits", 450_000)
    assert [each.fault for each in judge(look(metrics, metrics))] == ["too little traffic"]


def test_wishes_that_are_not_granted() -> None:
    wrong = only(sick(lambda m: m.count(n.WRONG_WISHES, 5)), "wrong wishes", "kv_transfer_params")
    says(wrong.found, "5 wishes")
    pins = only(sick(lambda m: m.count(n.PINS_REFUSED, 7)), "pins refused", "primary")
    says(pins.remedy, "pin_fraction")


# ---- several servers ----


def server(url: str, model: str = "llama", tier: str | None = "fs", **info: str) -> Look:
    metrics = Metrics(model)
    labels = {"version": "0.1.0", "kv_namespace": "a", "hashing": "sha256:1f", **info}
    metrics.gauge(n.INFO, 1, **labels)
    if tier is not None:
        metrics.gauge(n.PAGES, 1, tier=tier)
    return Look(metrics.scrape(url=url), metrics.scrape(url=url))


def test_servers_that_hash_differently() -> None:
    looks = [server("http://a"), server("http://b", hashing="xxhash:2e", kv_namespace="b")]
    (found,) = seeds(looks)
    assert (found.fault, found.about, found.wrong) == ("hash seeds differ", "llama", True)
    says(found.found, "sha256:1f at http://a; xxhash:2e at http://b")
    says(found.remedy, "PYTHONHASHSEED")
    assert list(seeds([server("http://a"), server("http://b")])) == []


def test_servers_of_other_models_or_other_settings() -> None:
    assert list(seeds([server("http://a"), server("http://b", "qwen", hashing="x:1")])) == []
    (found,) = seeds([server("http://a"), server("http://b", kv_namespace="b")])
    assert found.fault == "namespaces differ"
    says(found.found, "a at http://a; b at http://b")
    says(found.remedy, "--why")
    none = [server("http://a", tier=None), server("http://b", tier=None, kv_namespace="b")]
    assert list(seeds(none)) == [], "without a tier that servers share nothing is shared"


# ---- the definitions ----


def test_only_metrics_and_labels_that_there_are_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    definitions = pytest.importorskip("kvstrata.offload.vllm_plugin.metrics.definitions")
    known = definitions.metric_definitions()
    asked: set[tuple[str, str]] = set()
    real = Scrape.matching

    def matching(self: Scrape, name: str, **labels: str) -> object:
        family = name.removesuffix("_bucket").removesuffix("_sum")
        asked.add((family, ""))
        asked.update((family, label) for label in labels)
        return real(self, name, **labels)

    monkeypatch.setattr(Scrape, "matching", matching)
    judge(sick())
    ours = {(name, label) for name, label in asked if name.startswith("kvstrata_")}
    assert len(ours) > 30
    for name, label in ours:
        assert name in known
        assert not label or label in known[name].labelnames, (name, label)
