"""A tier of ours as vLLM's own manager sees it."""

import copy
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from vllm.config import LoRAConfig  # noqa: E402
from vllm.v1.kv_offload.base import LookupResult, Medium  # noqa: E402

from kvstrata.offload.secondary import changes, tiers  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.old_names import TIER_EVENTS, TIER_STATE  # noqa: E402
from tests.engine.conftest import CHECKPOINTS  # noqa: E402
from tests.models import tiny_llama  # noqa: E402
from tests.offload.vllm_plugin.block_engine import Model  # noqa: E402
from tests.offload.vllm_plugin.engine.stock.stock_world import (  # noqa: E402
    StockWorld,
    changed,
    entry,
    files_of,
    key_of,
)
from tests.spoiling import flip  # noqa: E402
from tests.tiers.faults import FaultyTier, SlowTier  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

World = Callable[..., StockWorld]
RETRY, MISS = LookupResult.RETRY, LookupResult.MISS


def test_rows_come_back(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    it.store({1: 11, 2: 22})
    it.forget()
    assert [it.find(number) for number in (1, 2, 3)] == [11, 22, None]


def test_more_than_the_cpu_tier_holds(world: World) -> None:
    it = world(entry("KVStrataMemory"), slots=4)
    for number in range(12):
        it.store({number: number})
    assert [it.find(number) for number in range(12)] == list(range(12))


def test_vllms_memory_is_let_go(world: World, caplog: pytest.LogCaptureFixture) -> None:
    it = world(entry("KVStrataMemory"))
    it.store({1: 1})
    memory = it.manager.primary_tier._mmap_region
    with caplog.at_level(logging.WARNING, logger="vllm"):
        it.close()
    assert memory.mmap_obj is None and not Path(memory.mmap_path).exists()
    assert "Failed to close" not in caplog.text


# -- what goes wrong ------------------------------------------------------------------


def test_a_lookup_without_an_answer_ends_as_a_miss(world: World) -> None:
    it = world(entry("KVStrataMemory", lookup_deadline_s=0.05))
    it.store({1: 11})
    it.forget()
    slow = it.wrap(SlowTier)
    slow.hang()
    first = it.request()
    assert it.look(1, first) is RETRY
    wait_until(lambda: it.look(1, first) is MISS)
    assert it.look(2, first) is MISS, "it waits for no other page either"
    for _ in range(2):  # three requests in vain
        request = it.request()
        wait_until(lambda request=request: it.look(1, request) is MISS)
    assert not it.link.breaker.closed
    assert it.look(1, it.request()) is MISS, "nobody asks a tier that was taken out"
    slow.release()
    wait_until(lambda: it.find(1) == 11)


def test_a_load_that_fails_is_a_miss_for_those_who_asked(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    it.store({1: 11, 2: 22})
    it.forget()
    sick = {key_of(1)}
    it.wrap(
        lambda tier: FaultyTier(
            tier, lambda what, key: "checksum" if what == "load" and key in sick else None
        )
    )
    first = it.request()
    assert it.find(1, first) is None and it.find(2, first) == 22
    sick.clear()
    assert it.find(1, first) is None, "asked again and again, it would never end"
    assert it.find(1) == 11


def test_of_a_job_what_arrived_is_used(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    it.store({1: 11, 2: 22, 3: 33})
    it.forget()
    it.wrap(
        lambda tier: FaultyTier(
            tier, lambda what, key: "checksum" if what == "load" and key == key_of(2) else None
        )
    )
    request = it.request()
    pending = [it.manager.lookup(key_of(number), request) for number in (1, 2, 3)]
    assert pending == [LookupResult.HIT_PENDING] * 3
    it.settle()
    assert [it.look(number, request) for number in (1, 2, 3)] == [
        *(LookupResult.HIT, MISS, LookupResult.HIT)
    ]


def test_requests_that_push_each_other_out_end(world: World) -> None:
    """Their pages do not fit together; each asks for all of its own until it has them at once."""
    it = world(entry("KVStrataMemory"), slots=4)
    for number in range(8):
        it.store({number: number})
    it.forget()
    requests = [(it.request(), range(4)), (it.request(), range(4, 8))]
    for _ in range(4):
        answers = []
        for request, numbers in requests:
            answers.append([it.manager.lookup(key_of(number), request) for number in numbers])
            it.settle()
    assert answers == [[MISS] * 4, [LookupResult.HIT] * 4]
    assert it.find(0) == 0, "others find it"


def test_a_sick_tier_is_given_nothing(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    it.wrap(lambda tier: FaultyTier(tier, lambda what, key: "broken"))
    for number in range(3):
        it.store({number: 1})
    assert not it.link.breaker.closed
    it.store({4: 1})
    assert it.tier._jobs.skipped == 1


def test_a_hung_tier_leaves_room(world: World) -> None:
    it = world(entry("KVStrataMemory"), slots=8)
    slow = it.wrap(SlowTier)
    slow.hang()
    for number in range(8):
        it.begin_store({number: 1})
    assert it.link.stores.pages == 6 and it.tier._jobs.skipped == 2
    slow.release()
    it.settle()


def test_a_reset_waits_until_no_row_is_touched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "STOP_TIMEOUT_S", 0.01)
    it = world(entry("KVStrataMemory"))
    slow = it.wrap(SlowTier)
    slow.hang()
    it.begin_store({1: 1})
    reset = threading.Thread(target=it.reset)
    reset.start()
    wait_until(lambda: slow is not vars(it.link.tier)["inner"])  # another took its place
    assert reset.is_alive(), "the old one may still read its row"
    slow.release()
    reset.join()
    assert not it.manager.has_pending_work()
    it.store({1: 5})
    it.forget()
    assert it.find(1) == 5


def test_nothing_is_remembered_of_requests_that_ended(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    first, aborted = it.request(), it.request()
    it.store({1: 11}, first)
    it.forget()
    assert it.manager.lookup(key_of(1), aborted) is LookupResult.HIT_PENDING
    for request in (first, aborted):
        it.manager.on_request_finished(request)
    it.settle()  # with the load of the one that was aborted
    assert not it.tier._requests
    assert it.find(1) == 11


# -- weights ---------------------------------------------------------------------------


def test_weights_that_may_change_make_pages_private(world: World, tmp_path: Path) -> None:
    tier = entry("KVStrataFs", root_dir=str(tmp_path), max_bytes="1GiB", weights_fixed=False)
    it = world(tier)
    it.store({1: 11})
    it.forget()
    assert it.find(1) == 11
    it.reset()
    assert it.find(1) is None
    it.close()
    assert world(tier).find(1) is None


def test_fixed_weights_outlive_a_reset(world: World, tmp_path: Path) -> None:
    tier = entry("KVStrataFs", root_dir=str(tmp_path))
    it = world(tier)
    it.store({1: 11})
    it.reset()
    assert it.find(1) == 11
    it.close()
    assert world(tier).find(1) == 11


def test_weight_files_that_changed_are_seen_at_a_reset(
    world: World, model: Model, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(tiny_llama(CHECKPOINTS), checkpoint)
    tier = entry("KVStrataFs", root_dir=str(tmp_path / "kv"))
    it = world(tier, config=changed(model.config, model=str(checkpoint)))
    it.store({1: 11})
    flip(next(checkpoint.glob("*.safetensors")))
    it.reset()
    assert it.find(1) is None


def test_lora_adapters_turn_it_off(world: World, model: Model, tmp_path: Path) -> None:
    config = copy.copy(model.config)
    config.lora_config = LoRAConfig(max_lora_rank=8)
    it = world(entry("KVStrataFs", root_dir=str(tmp_path)), config=config)
    it.store({1: 11})
    it.forget()
    assert it.find(1) is None and not files_of(tmp_path)
    it.reset()
    it.close()
    word = entry("KVStrataFs", root_dir=str(tmp_path), lora_paths_immutable=True)
    it = world(word, config=config)
    it.store({1: 11})
    it.forget()
    assert it.find(1) == 11


# -- what is said of it ----------------------------------------------------------------


def test_a_tier_may_only_be_read_or_only_written(world: World, tmp_path: Path) -> None:
    root = str(tmp_path)
    reader = world(entry("KVStrataFs", root_dir=root, load_only=True))
    reader.store({1: 11})
    assert not files_of(tmp_path) and reader.tier._jobs.skipped == 0
    reader.close()
    writer = world(entry("KVStrataFs", root_dir=root, store_only=True))
    writer.store({1: 11})
    writer.forget()
    assert writer.find(1) is None and len(files_of(tmp_path)) == 1


def test_a_threshold(world: World) -> None:
    it = world(entry("KVStrataMemory", store_threshold=2))
    it.store({1: 11})
    it.forget()
    assert it.find(1) is None
    it.store({1: 11})
    it.forget()
    assert it.find(1) == 11


def test_events(world: World, tmp_path: Path) -> None:
    it = world(entry("KVStrataFs", root_dir=str(tmp_path), locality="REMOTE"), events=True)
    it.store({1: 11, 2: 22})
    (stored,) = [each for each in it.manager.take_events() if each.medium is Medium.STORAGE]
    assert set(stored.keys) == {key_of(1), key_of(2)} and not stored.removed
    assert (stored.ownership, stored.locality and stored.locality.value) == ("KVStrataFs", "REMOTE")
    it.forget()
    for path in files_of(tmp_path):
        flip(path)
    assert it.find(1) is None
    (gone,) = [each for each in it.manager.take_events() if each.medium is Medium.STORAGE]
    assert gone.removed and list(gone.keys) == [key_of(1)]
    it.reset()  # of which vLLM tells that all was cleared
    (kept,) = [each for each in it.manager.take_events() if each.medium is Medium.STORAGE]
    assert not kept.removed and list(kept.keys) == [key_of(2)]


def test_events_that_can_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MOST_CHANGES", 2)
    it = world(entry("KVStrataMemory"), events=True)
    it.store({1: 11, 2: 22, 3: 33})
    it.reset()
    told = [len(each.keys) for each in it.manager.take_events() if each.ownership]
    assert told == [2] and it.manager.has_pending_work()
    told += [len(each.keys) for each in it.manager.take_events() if each.ownership]
    assert told == [2, 1] and not it.manager.has_pending_work()


def test_no_events_where_nobody_wants_them(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    it.store({1: 11})
    assert list(it.manager.take_events()) == []


def test_metrics(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    names = type(it.tier).build_metric_definitions(entry("KVStrataMemory"))
    it.store({1: 11})
    stats = it.manager.get_stats()
    assert stats is not None
    assert {TIER_EVENTS, TIER_STATE} <= set(names)
    text = str(stats.data)
    assert "stored_pages" in text and TIER_EVENTS in text


def test_labels_of_vllm_033(world: World) -> None:
    it = world(entry("KVStrataMemory"))
    info: dict[str, Any] = dict(it.tier.config_info())
    assert info == {"type": "KVStrataMemory", "medium": "CPU"}
    assert set(type(it.tier).config_info_keys({})) == set(info)
