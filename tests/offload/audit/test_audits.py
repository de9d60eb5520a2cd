"""Audits over the manager: what is compared, what is not, and what follows."""

import logging

import pytest

from kvstrata.offload.audit import audits
from kvstrata.offload.audit.schedule import LONGEST_S
from kvstrata.offload.audit.trust import MOST_DIFFERENT
from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.finding.lookup import Answer
from kvstrata.tiers.base import RequestView
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, LAYOUTS, TOKENS, World, chunk, content

HIT, MISS, PENDING = Answer.HIT, Answer.MISS, Answer.PENDING
ITEMS = [chunk(1, index) for index in range(4)]


@pytest.fixture(autouse=True)
def one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only there are look-ups answered MISS on purpose."""
    monkeypatch.delitem(LAYOUTS, 1)


def world(tiers: int = 1, slots: int = 64, fraction: float = 0.001) -> World:
    made = [MemoryTier({}, CONTEXT) for _ in range(tiers)]
    config = OffloadConfig(cpu_bytes=1, audit_fraction=fraction)
    return World(made, slots, config, audited=True)


def compute(here: World, name: str = "r", items: list[tuple[bytes, int]] = ITEMS) -> RequestView:
    """A request that finds nothing and computes everything."""
    here.now += 1.0
    request = here.request(name)
    assert here.lookup(items[0], request) is MISS
    here.store(items, request)
    here.manager.on_request_finished(request)
    here.step(3)
    return request


def evict(here: World) -> None:
    """Push everything out of the primary tier, through a request that asks for nothing."""
    request = here.request("evict", wishes={"persist": False})
    here.store([chunk(99, index) for index in range(64)], request)
    here.manager.on_request_finished(request)
    here.step(3)


def counters(here: World) -> dict[str, int]:
    return {k: v for k, v in here.manager.counters.items() if k.startswith("audit")}


def test_what_a_tier_holds_and_the_engine_computes_is_compared() -> None:
    """Another server stored the pages after the request had been answered MISS."""
    here = world()
    compute(here)
    evict(here)
    here.now += 1.0
    request = RequestView("r2", tiers=frozenset())  # `kv_load_tiers`: it may load from nowhere
    here.manager.on_new_request(request)
    assert here.lookup(ITEMS[0], request) is MISS
    here.store(ITEMS, request)
    here.step(3)
    assert counters(here) == {"audit_pages": 4, "audit_close": 0, "audit_different": 0}
    primary = here.manager.primary
    assert primary.free + primary.idle == primary.slots, "no slot is kept"
    assert [here.lookup(item, here.request("r3")) for item in ITEMS] == [HIT] * 4


def test_what_the_primary_tier_holds_behind_an_evicted_head() -> None:
    here = world()
    compute(here, items=ITEMS[1:])  # as if its head had been evicted
    compute(here, "r2")
    assert counters(here)["audit_pages"] == 3


def test_pages_that_were_loaded_or_came_from_the_gpu_prove_nothing() -> None:
    here = world()
    compute(here)
    request = here.request("r2")
    # vLLM has them in GPU memory, asks for what follows, and offers all of them again
    tail = [chunk(1, 4)]
    assert here.lookup(tail[0], request) is MISS
    here.store([*ITEMS, *tail], request)
    here.step()
    # it loads two and computes the others
    other = here.request("r3")
    assert [here.lookup(item, other) for item in ITEMS] == [HIT] * 4
    here.manager.prepare_load([key for key, _ in ITEMS], other)
    here.manager.complete_load([key for key, _ in ITEMS])
    here.store([chunk(1, 5)], other)
    here.step()
    assert counters(here) == {}


def test_off() -> None:
    here = world(fraction=0.0)
    compute(here, items=ITEMS[1:])
    compute(here, "r2")
    assert counters(here) == {}


def load(here: World, name: str) -> list[Answer]:
    """A request that takes what it gets and computes the rest; its last answers."""
    request = here.request(name)
    for _ in range(5):
        answers = []
        for item in ITEMS:
            answers.append(here.lookup(item, request))
            if answers[-1] is MISS:
                break
        here.step()
        if PENDING not in answers and Answer.RETRY not in answers:
            break
    hits = [key for (key, _), a in zip(ITEMS, answers, strict=False) if a is HIT]
    if hits:
        here.manager.prepare_load(hits, request)
        here.manager.complete_load(hits)
    if rest := ITEMS[len(hits) :]:
        here.store(rest, request)
    here.manager.on_request_finished(request)
    here.step(3)
    return answers


def test_the_last_page_of_a_hit_is_withheld_once_it_is_due() -> None:
    here = world()
    compute(here)
    compute(here, "other", [chunk(2, index) for index in range(40)])  # 5 % of it may be audited
    assert load(here, "early") == [HIT] * 4
    here.now = LONGEST_S
    assert load(here, "an hour later") == [HIT] * 4, "a hit makes it due"
    assert load(here, "next") == [HIT, HIT, HIT, MISS]
    assert load(here, "after") == [HIT] * 4
    assert counters(here) == {
        "audits_forced": 1,
        "audit_pages": 1,
        "audit_close": 0,
        "audit_different": 0,
    }


def test_a_fraction_of_what_is_served() -> None:
    here = world(fraction=0.1)
    compute(here, "other", [chunk(2, index) for index in range(40)])
    compute(here)
    answers = [load(here, str(index)) for index in range(10)]
    # 40 pages were served, so 4 are due; but 44 were computed, of which 5 % make 2
    assert [each for each in answers if MISS in each] == [[HIT, HIT, HIT, MISS]] * 2


def test_from_a_tier_to_the_gpu_and_back() -> None:
    here = world(fraction=1.0)
    compute(here)
    evict(here)
    assert load(here, "first") == [HIT] * 4
    evict(here)
    assert load(here, "second") == [HIT, HIT, HIT, MISS]
    assert counters(here)["audit_pages"] == 1
    assert counters(here)["audit_different"] == 0


def test_another_weight_is_found_and_refused(caplog: pytest.LogCaptureFixture) -> None:
    here = world(fraction=1.0)
    (tier,) = here.tiers
    compute(here)
    evict(here)
    here.epoch = 1  # what the engine computes changed, and nobody said so
    load(here, "first")
    evict(here)
    with caplog.at_level(logging.ERROR, "kvstrata.audit"):
        assert load(here, "second") == [HIT, HIT, HIT, MISS]
    assert counters(here)["audit_different"] == 1
    (record,) = caplog.records
    assert ITEMS[3][0].hex() in record.getMessage() and "tier0" in record.getMessage()
    assert ITEMS[3][0] not in here.manager.primary._entries, "neither page may be served"
    assert tier.stats().counters["rejected_pages"] == 1
    # it is not stored again either
    request = here.request("third")
    assert here.lookup(ITEMS[3], request) is MISS
    plan = here.manager.prepare_store([ITEMS[3]], request)
    assert plan is not None and plan.keys == []


def test_three_different_pages_take_the_tier_out(caplog: pytest.LogCaptureFixture) -> None:
    here = world(fraction=1.0)
    (tier,) = here.tiers
    compute(here)
    evict(here)
    here.epoch = 1
    here.now += 1.0
    request = RequestView("r2", tiers=frozenset())
    here.manager.on_new_request(request)
    assert here.lookup(ITEMS[0], request) is MISS
    here.store(ITEMS[:MOST_DIFFERENT], request)
    here.step(3)
    assert counters(here)["audit_different"] == MOST_DIFFERENT
    assert here.manager.audits.findings.distrusted == ["tier0"]
    assert not tier.trusted
    assert "nothing is loaded from it" in caplog.text and "Restart the engine" in caplog.text
    # nothing more is served from it, also what was in the primary tier already
    other = here.request("r3")
    assert here.lookup(ITEMS[3], other) is MISS
    evict(here)
    assert here.lookup(ITEMS[3], other) is MISS
    # and nothing is stored in it
    stored = tier.stats().counters["stored_pages"]
    here.store([chunk(7, 0)], other)
    here.step(3)
    assert tier.stats().counters["stored_pages"] == stored
    tier.trusted = True  # the operator's word
    here.step()
    assert here.manager.audits.findings.distrusted == []
    evict(here)
    assert here.lookup(ITEMS[3], here.request("r4")) is PENDING


def test_pages_of_a_tier_leave_the_primary_tier_with_its_trust() -> None:
    here = world()
    compute(here)
    evict(here)
    load(here, "promotes")
    assert here.lookup(ITEMS[2], here.request("r")) is HIT
    here.tiers[0].trusted = False  # another server found it
    here.step()
    assert here.lookup(ITEMS[2], here.request("r2")) is MISS


def test_the_primary_tier_may_lose_its_trust_too() -> None:
    """Weights that were changed in place: what the GPU stored itself is another model's."""
    here = world(tiers=0, fraction=1.0)
    compute(here, items=[*ITEMS[1:], chunk(3, 0)])
    here.epoch = 1
    compute(here, "r2")
    assert counters(here)["audit_different"] == 3
    assert here.manager.audits.findings.distrusted == ["CPU"]
    assert here.lookup(chunk(3, 0), here.request("r3")) is MISS


def test_incomplete_pages_are_not_compared() -> None:
    here = world()
    compute(here, items=ITEMS[1:])
    here.incomplete = set(range(here.slots))
    compute(here, "r2")
    assert counters(here) == {}
    here.incomplete = set()
    compute(here, "r3", items=ITEMS)
    assert counters(here)["audit_pages"] == 3


@pytest.mark.parametrize("when", ["stored", "compared"])
def test_a_reset_in_between(when: str) -> None:
    here = world()
    compute(here, items=ITEMS[1:])
    request = here.request("r2")
    assert here.lookup(ITEMS[0], request) is MISS
    plan = here.manager.prepare_store(ITEMS, request)
    assert plan is not None and len(plan.keys) == 4
    if when == "compared":
        for key, slot in zip(plan.keys, plan.slots, strict=True):
            here.memory[slot][:] = content(key)
        here.manager.complete_store(set(plan.keys), request)
    for entry in here.manager.reset():
        here.manager.primary.end_gpu(entry)
    here.step(3)
    assert here.manager.primary.free == here.slots
    ended = 3 if when == "compared" else 0
    assert counters(here).get("audit_pages", 0) == ended


def test_few_slots_are_left_to_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "_LEAST_FREE", 16)  # as it is; the histories change it
    here = world(slots=8)
    compute(here, items=ITEMS[1:])
    compute(here, "r2")
    assert counters(here) == {}


def test_order_and_slots_of_a_plan() -> None:
    here = world()
    compute(here, items=ITEMS[1:3])
    request = here.request("r2")
    assert here.lookup(ITEMS[0], request) is MISS
    plan = here.manager.prepare_store(ITEMS, request)
    assert plan is not None
    assert plan.keys == [key for key, _ in ITEMS]
    present = {here.manager.primary.get(key).slot for key, _ in ITEMS[1:3]}  # type: ignore[union-attr]
    assert len(set(plan.slots)) == 4 and not present & set(plan.slots)


def test_tokens(one_group: None) -> None:
    assert ITEMS[0][1] == TOKENS
