"""vLLM's calls in front of the manager: tickets, slots left by a reset, filters, events."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import (  # noqa: E402
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    TierFilter,
    TierMatcher,
)

import kvstrata.offload.vllm_plugin.scheduler as scheduler_module  # noqa: E402
from kvstrata.offload.config.offload_config import OffloadConfig, TierEntry  # noqa: E402
from kvstrata.offload.manager import TieringManager  # noqa: E402
from kvstrata.offload.metering.names import SLOTS  # noqa: E402
from kvstrata.offload.primary.region import Region, create_region  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.offload_cap import has_partial_tails  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.totals import StatsReader  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import KVStrataScheduler, open_scheduler  # noqa: E402
from kvstrata.offload.vllm_plugin.transfer import PageSlots  # noqa: E402
from kvstrata.tiers.base import layouts_to_json  # noqa: E402
from kvstrata.tiers.memory import MemoryTier  # noqa: E402
from tests.offload.manager_world import CONTEXT, TOKENS, World, chunk, content  # noqa: E402

KEYS = [OffloadKey(chunk(0, index)[0]) for index in range(4)]
STEP = ScheduleEndContext((), ())


def context(req_id: str = "r", **more: Any) -> ReqContext:
    made = ReqContext(req_id, **more)
    for index, key in enumerate(KEYS):
        made.set_offload_key_position(key, chunk(0, index)[1])
    return made


class Adapter:
    """The adapter over a world of `slots` slots, and a region of two workers."""

    def __init__(self, folder: Path, slots: int = 4, events: bool = True) -> None:
        self.tier = MemoryTier({}, CONTEXT)
        self.world = World([self.tier], slots)
        fields = {"slots": slots, "slot_bytes": 4096, "workers": 2}
        self.region: Region = create_region("e", fields, directory=folder)
        self.manager = KVStrataScheduler(self.world.manager, self.region, events=events)

    @property
    def inner(self) -> TieringManager:
        return self.world.manager

    def store(self, keys: list[OffloadKey], request: ReqContext) -> PageSlots | None:
        plan = self.manager.prepare_store(keys, request)
        if plan is None:
            return None
        assert isinstance(plan.store_spec, PageSlots)
        return plan.store_spec

    def complete(self, keys: list[OffloadKey], spec: PageSlots, request: ReqContext) -> None:
        for key, slot in zip(keys, spec.slots, strict=True):
            self.world.memory[slot][:] = content(key)
        self.manager.complete_store(set(keys), request)

    def reach(self, *tickets: int) -> None:
        for rank, ticket in enumerate(tickets):
            self.region.set_watermark(rank, ticket)
        self.manager.on_schedule_end(STEP)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return Adapter(tmp_path)


def test_a_slot_is_taken_for_whole_again_before_its_next_store(adapter: Adapter) -> None:
    """Workers only ever say that a page is incomplete: ranks that lag would take it back."""
    for slot in range(4):
        adapter.region.set_incomplete(slot, True)
    spec = adapter.store(KEYS[:2], context())
    assert spec is not None
    complete = {slot for slot in range(4) if adapter.region.is_complete(slot)}
    assert complete == set(spec.slots.tolist())


def test_tickets_have_no_gaps(adapter: Adapter) -> None:
    """A plan without keys makes no transfer, so it must not take a ticket."""
    request = context()
    adapter.manager.on_new_request(request)
    tickets = []
    for keys in ([KEYS[0]], [KEYS[0]], [KEYS[1], KEYS[2]]):
        spec = adapter.store(keys, request)
        assert spec is not None
        tickets.append(spec.ticket)
        if spec.ticket:
            adapter.complete(keys, spec, request)
    load = adapter.manager.prepare_load(KEYS[:2], request)
    assert isinstance(load, PageSlots)
    assert [*tickets, load.ticket] == [1, 0, 2, 3]
    assert load.groups.tolist() == [0, 0]
    assert [adapter.world.memory[slot] for slot in load.slots] == [content(k) for k in KEYS[:2]]


def test_answers_and_sources(adapter: Adapter) -> None:
    request = context()
    adapter.tier._pages[KEYS[1]] = content(KEYS[1])
    spec = adapter.store([KEYS[0]], request)
    assert spec is not None
    assert adapter.manager.lookup(KEYS[0], request) is LookupResult.HIT_PENDING
    adapter.complete([KEYS[0]], spec, request)
    assert adapter.manager.lookup(KEYS[0], request) is LookupResult.HIT
    assert adapter.manager.lookup(KEYS[1], request) is LookupResult.HIT_PENDING
    assert adapter.manager.lookup(KEYS[2], request) is LookupResult.MISS
    adapter.manager.on_schedule_end(STEP)
    assert adapter.manager.lookup(KEYS[1], request) is LookupResult.HIT
    entry = adapter.inner.primary.get(KEYS[1])
    assert entry is not None and entry.end_token == chunk(0, 1)[1]


def test_load_sources(adapter: Adapter) -> None:
    sources = pytest.importorskip(
        "vllm.v1.metrics.cache_hit_source", reason="vLLM 0.31 does not ask"
    ).CacheHitSource
    request = context()
    adapter.tier._pages[KEYS[1]] = content(KEYS[1])
    spec = adapter.store([KEYS[0]], request)
    assert spec is not None
    adapter.complete([KEYS[0]], spec, request)
    adapter.manager.lookup(KEYS[1], request)
    assert adapter.manager.get_load_source(KEYS[0], request) is sources.HOST
    assert adapter.manager.get_load_source(KEYS[1], request) is sources.DISK


def test_slots_of_a_reset_come_back_when_all_workers_are_past_it(adapter: Adapter) -> None:
    request = context()
    spec = adapter.store(KEYS, request)
    assert spec is not None and spec.ticket == 1
    adapter.manager.reset_cache()
    assert adapter.manager.has_pending_work(), "steps are needed to learn of the workers' end"
    assert adapter.store(KEYS[:1], request) is None
    adapter.reach(1, 0)
    assert adapter.store(KEYS[:1], request) is None, "one worker may still write"
    adapter.reach(1, 1)
    assert not adapter.manager.has_pending_work()
    again = adapter.store(KEYS[:1], request)
    assert again is not None and again.ticket == 2


def test_each_reset_waits_for_its_own_transfers(adapter: Adapter) -> None:
    request = context()
    assert adapter.store(KEYS[:1], request)  # ticket 1
    adapter.manager.reset_cache()
    assert adapter.store(KEYS[1:3], request)  # ticket 2
    adapter.manager.reset_cache()
    assert adapter.inner.primary.free == 1
    adapter.reach(1, 1)
    assert adapter.inner.primary.free == 2
    adapter.reach(2, 2)
    assert adapter.inner.primary.free == 4


def test_reset_flushed(adapter: Adapter) -> None:
    """vLLM 0.33 says so itself; the watermark then has nothing left to free."""
    assert adapter.store(KEYS[:2], context())
    adapter.manager.reset_cache()
    adapter.manager.on_reset_flushed()
    assert adapter.inner.primary.free == 4 and not adapter.manager.has_pending_work()
    adapter.reach(1, 1)
    assert adapter.inner.primary.free == 4


@pytest.mark.parametrize(
    ("matchers", "found"),
    [
        ((), LookupResult.MISS),
        ((TierMatcher(Medium.STORAGE),), LookupResult.HIT_PENDING),
        ((TierMatcher(Medium.CPU),), LookupResult.MISS),
        ((TierMatcher(None, Locality.REMOTE),), LookupResult.MISS),
        ((TierMatcher(None, Locality.LOCAL),), LookupResult.HIT_PENDING),
    ],
    ids=repr,
)
def test_load_tier_filter(
    matchers: tuple[TierMatcher, ...], found: LookupResult, adapter: Adapter
) -> None:
    adapter.tier._pages[KEYS[0]] = content(KEYS[0])
    request = context(load_tier_filter=TierFilter(matchers))
    adapter.manager.on_new_request(request)
    assert adapter.manager.lookup(KEYS[0], request) is found


def test_a_request_that_waits_is_answered_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first page of a step; and only what is on its way, and in time."""
    adapter = Adapter(tmp_path)
    lookup, asked = adapter.inner.lookup, []

    def watched(key: bytes, end_token: int, request: Any) -> Any:
        asked.append((request.req_id, KEYS.index(OffloadKey(key))))
        return lookup(key, end_token, request)

    monkeypatch.setattr(adapter.inner, "lookup", watched)
    writer, reader, other = context("writer"), context("reader"), context("other")
    first = adapter.store(KEYS[:1], writer)
    second = adapter.store(KEYS[1:3], writer)
    assert first is not None and second is not None

    def ask(request: ReqContext) -> str:
        found = [adapter.manager.lookup(key, request).name for key in KEYS]
        return "".join({"HIT": "h", "HIT_PENDING": "p", "MISS": "-"}[name] for name in found)

    assert ask(reader) == "ppp-" and asked == [("reader", 0), ("reader", 3)]
    assert ask(other) == "ppp-" and asked[2:] == [("other", 0), ("other", 3)]
    adapter.manager.on_schedule_end(STEP)
    adapter.complete(KEYS[1:3], second, writer)
    asked.clear()
    assert ask(reader) == "phh-" and asked == [("reader", n) for n in range(4)]
    adapter.manager.on_schedule_end(STEP)
    adapter.world.now = 10.0
    assert ask(reader) == "-hh-"
    adapter.inner.reset()
    assert ask(reader) == "----"


def workers_region(name: str) -> tuple[Any, Region]:
    """What workers leave for `open_scheduler`: vLLM's configuration, and their region."""
    fields = {
        "slots": 1,
        "slot_bytes": 4096,
        "workers": 1,
        "model": "m",
        "layouts": layouts_to_json(CONTEXT.layouts),
        "namespace": {},
        "weights_fixed": True,
        "steps_ahead": 0,
        "lora": False,
        "elements": {},
        "windows": {},
    }
    engine = SimpleNamespace(
        engine_id=f"{name}-{os.getpid()}",
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
        groups=[],
    )
    region = create_region(engine.engine_id, fields)
    region.progress.set_usable(0, 1)
    return engine, region


def test_a_tier_is_where_its_entry_says_and_is_quiet_if_it_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, region = workers_region("entry")
    tiers = (
        TierEntry("memory", {"type": "memory"}, kv_events=False, locality="REMOTE"),
        TierEntry("memory-2", {"type": "memory", "max_bytes": 9}),
    )
    settings = OffloadConfig(2**20, tiers=tiers, without_effect={"backpressure": "no need"})
    with caplog.at_level("INFO", "kvstrata"):
        manager = open_scheduler(engine, settings, events=True)
    try:
        named = manager._manager.links
        assert [each.tier.locality for each in named] == ["REMOTE", "LOCAL"]
        for each in named:
            each.tier.inner._pages[KEYS[0]] = b""  # type: ignore[attr-defined]
        assert [event.ownership for event in manager.take_events()] == ["memory-2"]
        said = [line for line in caplog.messages if "do nothing here" in line]
        assert said == [
            "kvstrata: keys of vLLM's own specs that do nothing here: backpressure (no need)"
        ]
    finally:
        manager.shutdown()
        region.close()


def listed(events: Iterable[OffloadingEvent]) -> list[tuple[Any, ...]]:
    return [(e.keys, e.medium, e.removed, e.locality, e.ownership) for e in events]


def test_events(adapter: Adapter) -> None:
    request = context()
    spec = adapter.store(KEYS[:1], request)
    assert spec is not None
    adapter.complete(KEYS[:1], spec, request)
    adapter.manager.on_schedule_end(STEP)
    adapter.manager.on_schedule_end(STEP)
    assert listed(adapter.manager.take_events()) == [
        (KEYS[:1], Medium.CPU, False, Locality.LOCAL, None),
        (KEYS[:1], Medium.STORAGE, False, Locality.LOCAL, "tier0"),
    ]


def test_events_that_nobody_asked_for_do_not_pile_up(tmp_path: Path) -> None:
    adapter = Adapter(tmp_path, events=False)
    request = context()
    spec = adapter.store(KEYS[:1], request)
    assert spec is not None
    adapter.complete(KEYS[:1], spec, request)
    adapter.manager.on_schedule_end(STEP)
    assert list(adapter.manager.take_events()) == []
    assert adapter.inner._report.events == []


def test_stats_are_collected_now_and_then_and_when_all_requests_have_ended(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "STATS_EVERY_S", 1000.0)
    request = context()
    adapter.manager.on_new_request(request)
    assert adapter.manager.get_stats() is not None
    adapter.manager.lookup(OffloadKey(KEYS[0]), request)
    spec = adapter.store(KEYS[:1], request)
    assert spec is not None
    assert adapter.manager.get_stats() is None
    adapter.complete(KEYS[:1], spec, request)
    adapter.manager.on_request_finished(request)
    last = adapter.manager.get_stats()
    assert last is not None and "misses" in str(last.data)


def test_hits_and_misses_are_pages_each_counted_once(adapter: Adapter) -> None:
    counters, tier = adapter.inner.counters, adapter.tier
    tier._pages[KEYS[1]] = content(KEYS[1])
    writer, reader = context("writer"), context("reader")
    spec = adapter.store(KEYS[:1], writer)
    assert spec is not None
    adapter.complete(KEYS[:1], spec, writer)
    for _ in range(3):  # it waits, and looks up anew in each step
        found = [adapter.manager.lookup(key, reader).name for key in KEYS[:3]]
        if found[1] == "HIT":
            break
        adapter.manager.on_schedule_end(STEP)
    assert found == ["HIT", "HIT", "MISS"]
    assert not (counters["primary_hits"] or counters["misses"]), "it may be aborted"
    adapter.manager.prepare_load(KEYS[:2], reader)
    hits = counters["primary_hits"], counters["promoted_hits:tier0"]
    assert hits == (1, 1) and counters["loaded_pages"] == 2
    assert counters["misses"] == 2, "the page that was asked for, and the one behind it"
    adapter.manager.complete_load(KEYS[:2], reader)
    adapter.store(KEYS[2:], reader)
    assert counters["misses"] == 2
    other = context("other")
    assert adapter.manager.lookup(KEYS[2], other) is LookupResult.HIT_PENDING
    assert adapter.manager.lookup(KEYS[3], other) is LookupResult.HIT_PENDING


def test_what_was_found_in_the_end_is_no_miss(adapter: Adapter) -> None:
    reader, counters = context("reader"), adapter.inner.counters
    assert adapter.manager.lookup(KEYS[0], reader) is LookupResult.MISS
    adapter.manager.on_schedule_end(STEP)
    adapter.tier._pages[KEYS[0]] = content(KEYS[0])
    for found in (LookupResult.HIT_PENDING, LookupResult.HIT):
        assert adapter.manager.lookup(KEYS[0], reader) is found
        adapter.manager.on_schedule_end(STEP)
    adapter.manager.prepare_load(KEYS[:1], reader)
    assert counters["misses"] == 0 and counters["promoted_hits:tier0"] == 1
    nothing = context("nothing")
    assert adapter.manager.lookup(KEYS[1], nothing) is LookupResult.MISS
    adapter.store(KEYS[1:], nothing)
    assert counters["misses"] == 3


def test_stats_tell_slots_that_are_not_ready() -> None:
    world = World([], slots=4, ready=1)
    slots = StatsReader().read(world.manager).data["data"][SLOTS]
    assert slots["free",] == 1 and slots["busy",] == 0 and slots["not_ready",] == 3


def test_stats_are_increments(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "STATS_EVERY_S", 0.0)
    request = context()
    spec = adapter.store(KEYS[:2], request)
    assert spec is not None
    adapter.complete(KEYS[:2], spec, request)
    first, second = adapter.manager.get_stats(), adapter.manager.get_stats()
    assert first is not None and second is not None
    assert "stored_pages" in str(first.data) and "stored_pages" not in str(second.data)


# -- max_offload_tokens where vLLM's connector would end the engine over it ----------


@pytest.mark.parametrize(
    ("tokens", "stored"),
    [(0, 0), (TOKENS - 1, 0), (TOKENS, 1), (3 * TOKENS - 1, 2), (4 * TOKENS, 4)],
)
def test_a_cap_is_kept_here_and_vllm_does_not_see_it(
    tmp_path: Path, tokens: int, stored: int
) -> None:
    adapter = Adapter(tmp_path)
    manager = KVStrataScheduler(adapter.inner, adapter.region, events=False, caps=True)
    params = {"max_offload_tokens": tokens, "kv_load_tiers": None}
    request = context(kv_transfer_params=params)
    manager.on_new_request(request)
    assert params == {"max_offload_tokens": None, "kv_load_tiers": None}
    plan = manager.prepare_store(KEYS, request)
    assert plan is not None and plan.keys_to_store == KEYS[:stored]


@pytest.mark.parametrize(("caps", "value"), [(False, 16), (True, -1), (True, True), (True, "16")])
def test_what_vllm_keeps_or_refuses_is_left_to_it(tmp_path: Path, caps: bool, value: Any) -> None:
    adapter = Adapter(tmp_path)
    manager = KVStrataScheduler(adapter.inner, adapter.region, events=False, caps=caps)
    request = context(kv_transfer_params={"max_offload_tokens": value})
    manager.on_new_request(request)
    assert request.kv_transfer_params == {"max_offload_tokens": value}
    plan = manager.prepare_store(KEYS, request)
    assert plan is not None and plan.keys_to_store == KEYS


@pytest.mark.parametrize(
    ("tokens_per_hash", "blocks_per_chunk", "found"),
    [(16, 1, True), (32, 1, False), (16, 2, False)],
)
def test_partial_tails(tokens_per_hash: int, blocks_per_chunk: int, found: bool) -> None:
    config: Any = SimpleNamespace(
        cache=SimpleNamespace(tokens_per_hash=tokens_per_hash, blocks_per_chunk=blocks_per_chunk),
        groups=[SimpleNamespace(tokens_per_block=32), SimpleNamespace(tokens_per_block=32)],
    )
    assert has_partial_tails(config) == found
