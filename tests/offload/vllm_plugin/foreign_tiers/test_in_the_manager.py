"""vLLM's own tiers, and third parties', behind our manager: verified, guarded, bounded."""

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.finding.lookup import Answer  # noqa: E402
from kvstrata.offload.vllm_plugin.foreign_tiers import jobs  # noqa: E402
from kvstrata.tiers.page.identity import namespace_digest  # noqa: E402
from tests.offload.manager_world import chunk, content  # noqa: E402
from tests.offload.vllm_plugin.foreign_tiers.region_world import (  # noqa: E402
    EXAMPLE,
    FS,
    RegionWorld,
    made,
)
from tests.waiting import wait_until  # noqa: E402

PAGES = [chunk(0, index) for index in range(3)]


def stored(world: RegionWorld) -> None:
    """Pages are stored, have left the primary tier, and are with the tiers."""
    request = world.request("first")
    world.store(PAGES, request)
    world.manager.on_request_finished(request)
    world.finish()
    world.forget()


def test_a_third_partys_tier_gives_back_what_it_was_given() -> None:
    world = RegionWorld(made("DictTier"))
    stored(world)
    (tier,) = world.foreign
    request = world.request("second")
    for page in PAGES:
        assert world.settle(page, request) is Answer.HIT
        assert world.loaded(page, request) == content(page[0])
    world.manager.on_request_finished(request)
    assert tier.begun == tier.over == ["first", "second"]
    assert world.settle(chunk(1, 0), world.request("third")) is Answer.MISS


def test_vllms_fs_gives_back_what_it_was_given(tmp_path: Path) -> None:
    world = RegionWorld({**FS, "root_dir": str(tmp_path)})
    stored(world)
    request = world.request("second")
    for page in PAGES:
        assert world.settle(page, request) is Answer.HIT
        assert world.loaded(page, request) == content(page[0])
    world.manager.shutdown()


def test_the_example_has_no_pages_and_serves_none() -> None:
    """It knows keys alone, and says that it loaded them: what is in the slot is somebody else's."""
    world = RegionWorld(EXAMPLE)
    stored(world)
    (tier,) = world.foreign
    assert tier.get_num_chunks() == len(PAGES)
    assert world.settle(PAGES[0], world.request("second")) is Answer.MISS
    assert world.tiers[0].stats().failures == {"header": 1}
    world.store([chunk(1, 0)], world.request("third"))  # the slot is free for others
    world.finish()


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda row: b"\0" + row[1:], "checksum"),
        (lambda row: bytes(len(row)), "header"),
        (lambda row: row[:-120] + bytes(12) + row[-108:], "namespace"),
        (None, "key"),
    ],
)
def test_what_is_not_the_page_is_a_miss(spoil: object, cause: str) -> None:
    world = RegionWorld(made("DictTier"))
    stored(world)
    (tier,) = world.foreign
    key = PAGES[0][0]
    tier.rows[key] = spoil(tier.rows[key]) if callable(spoil) else tier.rows[PAGES[1][0]]
    request = world.request("second")
    assert world.settle(PAGES[0], request) is Answer.MISS
    assert world.settle(PAGES[1], request) is Answer.HIT
    assert world.tiers[0].stats().failures == {cause: 1}


def test_two_namespaces_and_vllm_itself_never_meet(tmp_path: Path) -> None:
    names = []
    for namespace in ({"a": 1}, {"a": 2}):
        world = RegionWorld({**FS, "root_dir": str(tmp_path)}, namespace=namespace)
        stored(world)
        assert world.settle(chunk(9, 9), world.request("none")) is Answer.MISS
        names.append(f"model_kvstrata1_{namespace_digest(namespace)}_")
        world.manager.shutdown()
    found = sorted(os.listdir(tmp_path))
    assert len(found) == 4  # config.json has a folder of its own
    assert all(any(each.startswith(name) for name in names) for each in found)


def test_one_that_raises_costs_its_own_pages_and_is_taken_out() -> None:
    world = RegionWorld(made("RaisingTier"), made("DictTier"))
    for index in range(3):
        world.store([chunk(index, 0)], world.request(str(index)))
        world.finish()
    bad, good = world.manager.links
    assert not bad.breaker.closed and good.breaker.closed
    assert bad.tier.stats().failures == {"raised": 3}
    assert good.tier.stats().counters["stored_pages"] == 3


@pytest.mark.parametrize(("seconds", "held"), [(jobs.LATE_WRITE_S, 1), (0.0, 0)])
def test_a_slot_that_may_be_written_late_is_nobodys(
    seconds: float, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LATE_WRITE_S", seconds)
    world = RegionWorld(made("RaisingTier"))
    world.foreign[0].rows[PAGES[0][0]] = b""
    request = world.request()
    assert world.lookup(PAGES[0], request) is Answer.PENDING
    world.step(2)
    world.now += world.config.promotion_deadline_s
    assert world.lookup(PAGES[0], request) is Answer.MISS  # nobody waits for it
    assert world.manager.primary.promoting == held


def test_nobody_waits_for_one_that_hangs() -> None:
    world = RegionWorld(made("HangingTier"))
    (tier,) = world.foreign
    world.store([PAGES[0]], world.request("first"))
    wait_until(lambda: world.step() or tier.jobs)
    request = world.request("second")
    assert world.lookup(PAGES[1], request) is Answer.RETRY
    world.now += world.config.lookup_deadline_s
    assert world.lookup(PAGES[1], request) is Answer.MISS
    assert not world.tiers[0].drain(0.0)
    assert not world.tiers[0].shutdown(0.0)
    assert not world.tiers[0].get_finished()  # it may still read the slot
    tier.may_stop.set()
    assert world.tiers[0].shutdown(60.0)
    (result,) = world.tiers[0].get_finished()
    assert result.failed == {PAGES[0][0]: "shutdown"}
