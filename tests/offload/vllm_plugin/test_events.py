"""KV events as a router follows them, under vLLM's scheduler and its tracker of what it announced.

The follower believes of each medium what the events told. It is held against what the tiers have,
step by step, and what vLLM remembers of pages against those that are anywhere.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.distributed.kv_events import AllBlocksCleared  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (  # noqa: E402
    OffloadingEventGroupSpec,
    OffloadingEventsTracker,
)
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    LookupResult,
    OffloadingKVEventsConfig,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)

from kvstrata.offload.config.offload_config import OffloadConfig  # noqa: E402
from kvstrata.offload.manager import TieringManager  # noqa: E402
from kvstrata.offload.primary.region import Region, create_region  # noqa: E402
from kvstrata.offload.secondary import changes  # noqa: E402
from kvstrata.offload.secondary.changes import MOST_CHANGES  # noqa: E402
from kvstrata.offload.secondary.guard import GuardedTier  # noqa: E402
from kvstrata.offload.secondary.tier import TierLink  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import _FORGETS, KVStrataScheduler  # noqa: E402
from kvstrata.tiers.base import PageLayout, SecondaryTier, TensorSpec  # noqa: E402
from kvstrata.tiers.memory import MemoryTier  # noqa: E402
from tests.follower import Follower  # noqa: E402
from tests.offload.manager_world import CONTEXT, World  # noqa: E402
from tests.offload.vllm_plugin.block_engine import BlockEngine, Model  # noqa: E402
from tests.offload.vllm_plugin.test_against_stock import NoRegion  # noqa: E402
from tests.offload.vllm_plugin.traces import trace  # noqa: E402
from tests.tiers.faults import FaultyTier, SlowTier  # noqa: E402

PER_CHUNK, BLOCK = 4, 16
STEP = ScheduleEndContext((), ())
SELF_DESCRIBING = OffloadingKVEventsConfig(
    enable_kv_cache_events=True, self_describing_kv_events=True
)


def announced(keys: Iterable[bytes], per_chunk: int = 1) -> set[Any]:
    """The block hashes of pages in events; those of a chunk differ in their last bytes."""
    hashes = [key[:-4] for key in keys]
    if per_chunk > 1:
        hashes = [bytes([h[0], i]) * 16 for h in hashes for i in range(per_chunk)]
    return {maybe_convert_block_hash(BlockHash(h)) for h in hashes}


class Tracked:
    """The adapter over two tiers' worth of pages, and vLLM's tracker; chunks of four blocks."""

    def __init__(self, folder: Path, tier: SecondaryTier, slots: int) -> None:
        self.world = World([tier], slots)
        fields = {"slots": slots, "slot_bytes": 4096, "workers": 1}
        region: Region = create_region("events", fields, directory=folder)
        self.manager = KVStrataScheduler(self.world.manager, region, events=True)
        self.tracker = OffloadingEventsTracker(SELF_DESCRIBING)
        self.follower = Follower()
        self._group: Any = SimpleNamespace(
            hashes_per_chunk=PER_CHUNK,
            tokens_per_chunk=BLOCK * PER_CHUNK,
            tokens_per_block=BLOCK,
            group_idx=0,
            sliding_window_size_in_chunks=None,
            kv_event_group_spec=OffloadingEventGroupSpec("full_attention", None),
        )

    @property
    def remembered(self) -> set[OffloadKey]:
        return set(self.tracker._pending_event_metadata)

    def prompt(self, seed: int) -> tuple[Any, OffloadKey, ReqContext]:
        hashes = [bytes([seed, i]) * 16 for i in range(PER_CHUNK)]
        tokens = [seed] * (BLOCK * PER_CHUNK)
        request = SimpleNamespace(block_hashes=hashes, all_token_ids=tokens, lora_request=None)
        key = make_offload_key(hashes[-1], 0)
        context = ReqContext(f"r{seed}")
        context.set_offload_key_position(key, BLOCK * PER_CHUNK)
        self.manager.on_new_request(context)
        return request, key, context

    def store(self, seed: int) -> OffloadKey:
        """As vLLM's scheduler does."""
        request, key, context = self.prompt(seed)
        plan = self.manager.prepare_store([key], context)
        assert plan is not None
        self.tracker.record_store(request, self._group, 0, key)
        self.manager.complete_store({key}, context)
        self.manager.on_request_finished(context)
        self.step(3)
        return key

    def lookup(self, seed: int) -> tuple[OffloadKey, ReqContext]:
        """A page that is on its way, as vLLM 0.33's scheduler records it."""
        request, key, context = self.prompt(seed)
        assert self.manager.lookup(key, context) is LookupResult.HIT_PENDING
        self.tracker.record_lookup(request, self._group, 0, key)
        return key, context

    def step(self, times: int = 1) -> list[Any]:
        """What was told."""
        told: list[Any] = []
        for _ in range(times):
            self.manager.on_schedule_end(STEP)
            told += self.tracker.take_events(self.manager.take_events())
        self.follower.hear(told)
        return told

    def reset(self) -> None:
        """As vLLM's scheduler does: it publishes its own events before ours."""
        self.manager.reset_cache()
        self.tracker.reset()
        self.follower.hear([AllBlocksCleared()])


@pytest.mark.parametrize("guarded", [False, True])
def test_a_removal_names_all_hashes_that_were_announced(tmp_path: Path, guarded: bool) -> None:
    class Disk(MemoryTier):
        medium = "STORAGE"

    disk = Disk({"max_bytes": 128}, CONTEXT)  # two pages
    here = Tracked(tmp_path, GuardedTier("disk", disk) if guarded else disk, slots=1)
    here.step()
    there = here.follower.there
    for seed, chunks in ((1, 1), (2, 2), (3, 2), (4, 2)):
        here.store(seed)
        assert len(there["CPU"]) == PER_CHUNK
        assert len(there["STORAGE"]) == chunks * PER_CHUNK
    assert there["STORAGE"].keys() == announced(disk._pages, PER_CHUNK)
    assert len(here.remembered) == 2
    assert not here.follower.unknown and not here.follower.twice


def test_pages_of_before_and_of_others_are_told_a_few_in_each_step(tmp_path: Path) -> None:
    disk = MemoryTier({}, CONTEXT)
    keys = [n.to_bytes(32, "big") + bytes(4) for n in range(2 * MOST_CHANGES + 20)]
    disk._pages.update(dict.fromkeys(keys[:-10], b""))
    here = Tracked(tmp_path, disk, slots=1)
    there = here.follower.there["STORAGE"]
    assert len(here.step()) == len(there) == MOST_CHANGES and here.manager.has_pending_work()
    for key in keys[-10:]:  # another server stores, and evicts both
        disk._pages[key] = b""
        disk._changes.note(key, True, can_wait=True)
    for key in (*keys[:5], *keys[-15:-5]):  # told and untold ones
        del disk._pages[key]
        disk._changes.note(key, False, can_wait=True)
    own = here.store(1)
    assert announced([own]) <= there.keys(), "at once"
    assert not here.manager.has_pending_work()
    assert there.keys() == announced(keys[5:-15] + keys[-5:]) | announced([own], PER_CHUNK)
    assert not here.follower.unknown and not here.follower.twice


def test_of_a_page_that_nobody_here_computed_its_own_hash_is_told(tmp_path: Path) -> None:
    """And all of them go, when it was computed here meanwhile."""
    disk = MemoryTier({"max_bytes": 64}, CONTEXT)
    here = Tracked(tmp_path, disk, slots=4)
    there = here.follower.there["STORAGE"]
    _, key, _ = here.prompt(1)
    disk._pages[key] = b"x" * 64
    disk._bytes = 64
    here.step()
    assert there == Counter(announced([key]))
    assert here.store(1) == key
    assert there == Counter(announced([key])) and len(here.follower.there["CPU"]) == PER_CHUNK
    other = here.store(2)
    assert there == Counter(announced([other], PER_CHUNK))
    assert here.follower.unknown == {"STORAGE": PER_CHUNK - 1} and not here.follower.twice


def test_after_all_was_cleared_what_survives_is_told_once_more(tmp_path: Path) -> None:
    disk = MemoryTier({"max_bytes": 128}, CONTEXT)
    here = Tracked(tmp_path, disk, slots=4)
    for seed in range(4):
        here.store(seed)
    here.store(5)
    here.manager.on_schedule_end(STEP)  # what it has to tell, nobody heard before the reset
    here.reset()
    assert here.step() == [] and not here.manager.has_pending_work()
    _, key, context = here.prompt(6)
    assert here.manager.lookup(key, context) is LookupResult.MISS
    here.step()
    assert here.follower.there["STORAGE"] == Counter(announced(disk._pages))
    assert not here.follower.there["CPU"] and not here.follower.unknown
    last = here.store(6)
    assert here.follower.there["STORAGE"].keys() == announced(
        disk._pages.keys() - {last}
    ) | announced([last], PER_CHUNK)
    assert not here.follower.unknown and not here.follower.twice


def test_where_nobody_listens_nothing_is_kept_and_no_step_is_asked_for(tmp_path: Path) -> None:
    disk = MemoryTier({}, CONTEXT)
    disk._pages.update((n.to_bytes(32, "big") + bytes(4), b"") for n in range(2 * MOST_CHANGES))
    here = Tracked(tmp_path, disk, slots=2)
    here.manager._events = False
    assert here.step() == [] and not here.manager.has_pending_work()
    here.store(1)
    assert here.step() == [] and not here.world.manager._report.events
    assert not disk._changes._urgent and not disk._changes._patient


def test_of_a_tier_that_never_tells_vllm_remembers_nothing(tmp_path: Path) -> None:
    """Else it did for ever."""

    class Silent(MemoryTier):
        tells_changes = False

    here = Tracked(tmp_path, GuardedTier("silent", Silent({}, CONTEXT)), slots=1)
    for seed in range(5):
        here.store(seed)
    assert len(here.remembered) == 1 and len(here.follower.there["STORAGE"]) == 5 * PER_CHUNK


needs_033 = pytest.mark.skipif(not _FORGETS, reason="vLLM 0.33 records pages on their way")


@needs_033
@pytest.mark.parametrize("how", ["fails", "is dropped as its request ends", "is incomplete"])
def test_what_never_comes_is_forgotten(tmp_path: Path, how: str) -> None:
    disk = MemoryTier({}, CONTEXT)
    tier = FaultyTier(disk, lambda operation, key: "checksum" if operation == "load" else None)
    here = Tracked(tmp_path, tier, slots=4)
    here.step()
    for seed in range(10):
        _, key, _ = here.prompt(seed)
        disk._pages[key] = b"x" * 64
        if how == "is incomplete":
            here.world.incomplete.update(range(4))
            here.store(seed)
            continue
        _, context = here.lookup(seed)
        if how != "fails":
            here.manager.on_request_finished(context)
        here.step(3)
        here.manager.on_request_finished(context)
    assert not here.remembered and not here.follower.there["CPU"]
    assert not here.follower.unknown, "nobody was told of what was never announced"


@needs_033
def test_what_is_on_its_way_again_is_not_forgotten(tmp_path: Path) -> None:
    disk = MemoryTier({}, CONTEXT)
    here = Tracked(tmp_path, SlowTier(disk, polls=1), slots=4)
    _, key, _ = here.prompt(1)
    disk._pages[key] = b"x" * 64
    _, context = here.lookup(1)
    here.manager.on_request_finished(context)
    here.manager.on_schedule_end(STEP)  # it is cancelled, and looked up anew before vLLM is told
    assert here.world.manager.primary.get(key) is None
    here.lookup(1)
    here.step(4)
    assert here.remembered == {key}
    assert len(here.follower.there["CPU"]) == PER_CHUNK


class Tier(MemoryTier):
    medium = "STORAGE"

    def others_write(self, choose: random.Random) -> None:
        """Another server stores or evicts some pages."""
        for _ in range(choose.randrange(6)):
            if self._pages and choose.random() < 0.5:
                key = choose.choice(list(self._pages))
                self._bytes -= len(self._pages.pop(key))
                self._changes.note(key, False, can_wait=True)
            else:
                key = choose.randbytes(32) + bytes(4)
                self._pages[key] = b""
                self._changes.note(key, True, can_wait=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("full", 56)


@pytest.mark.parametrize("seed", range(3))
def test_a_follower_knows_what_is_where(
    seed: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random traces with too little room in both tiers, loads and stores that fail, others that
    store and evict, and resets after which some pages are left.
    """
    monkeypatch.setattr(changes, "MOST_CHANGES", 3)
    choose = random.Random(seed)
    slots = 24
    page = 8 * BLOCK  # a row of the engine
    layout = PageLayout((TensorSpec("kv", "U8", (page,)),), BLOCK)
    context = CONTEXT.__class__("model", {}, {0: layout})
    disk = Tier({"max_bytes": 48 * page}, context)
    for _ in range(9):
        disk.others_write(choose)
    faulty = FaultyTier(disk, lambda operation, key: "bad" if choose.random() < 0.1 else None)
    tier = SlowTier(faulty, polls=seed % 3)
    inner = TieringManager(
        OffloadConfig(cpu_bytes=slots * page),
        slots,
        {0: layout},
        lambda slot, nbytes: memoryview(engine._copies._slots[slot]).cast("B"),
        lambda slot: choose.random() < 0.95,
        lambda deadline_s, clock: [
            TierLink("disk", GuardedTier("disk", tier), 0, deadline_s, clock, medium="STORAGE")
        ],
        weights_fixed=True,
    )
    manager = KVStrataScheduler(inner, cast(Region, NoRegion()), events=True)
    engine = BlockEngine(model, manager, slots)
    half = engine._half
    half._events_tracker = tracker = OffloadingEventsTracker(SELF_DESCRIBING)
    follower = Follower()

    def take_events() -> Iterator[Any]:
        if choose.random() < 0.1:
            disk.others_write(choose)
        follower.hear(iter(tracker.take_events(list(manager.take_events()))))
        ready = [entry.key for entry in inner.primary if entry.ready]
        assert follower.there["CPU"].keys() == announced(ready)
        return iter(())

    half.take_events = take_events
    for prompts in trace(seed)[:10]:
        engine.run(prompts)
        take_events()
        while manager.has_pending_work():
            take_events()
        assert follower.there["STORAGE"].keys() == announced(disk._pages)
        anywhere = {entry.key for entry in inner.primary} | set(disk._pages)
        leaked = tracker._pending_event_metadata.keys() - anywhere
        assert not leaked or not _FORGETS  # 0.32 keeps what was incomplete
        if choose.random() < 0.5:
            engine.reset()  # of the GPU's cache only, of which this follower believes nothing
        else:
            assert engine.scheduler.reset_prefix_cache(reset_connector=True)
            follower.hear([AllBlocksCleared()])
    assert inner.counters["loaded_pages"] and disk.stats().counters["loaded_pages"]
    assert not follower.unknown and not follower.twice
    engine.close()
