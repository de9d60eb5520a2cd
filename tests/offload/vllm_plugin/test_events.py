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

from vllm.distributed.kv_events import BlockRemoved, BlockStored  # noqa: E402
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
from kvstrata.offload.secondary.guard import GuardedTier  # noqa: E402
from kvstrata.offload.secondary.tier import TierLink  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import _FORGETS, KVStrataScheduler  # noqa: E402
from kvstrata.tiers.base import PageLayout, SecondaryTier, TensorSpec  # noqa: E402
from kvstrata.tiers.memory import MemoryTier  # noqa: E402
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


class Follower:
    """What a router believes: hashes by medium, and how often each was announced."""

    def __init__(self) -> None:
        self.there: dict[str, Counter[Any]] = {"CPU": Counter(), "STORAGE": Counter()}
        self.unknown = 0  # removals of what was not announced

    def hear(self, events: Iterator[Any]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                self.there[event.medium].update(dict.fromkeys(event.block_hashes, 1))
            elif isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    self.unknown += not self.there[event.medium].pop(block_hash, 0)


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

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.manager.on_schedule_end(STEP)
            self.follower.hear(iter(self.tracker.take_events(self.manager.take_events())))


@pytest.mark.parametrize("guarded", [False, True])
def test_a_removal_names_all_hashes_that_were_announced(tmp_path: Path, guarded: bool) -> None:
    class Disk(MemoryTier):
        medium = "STORAGE"

    disk = Disk({"max_bytes": 128}, CONTEXT)  # two pages
    here = Tracked(tmp_path, GuardedTier("disk", disk) if guarded else disk, slots=1)
    there = here.follower.there
    for seed, chunks in ((1, 1), (2, 2), (3, 2), (4, 2)):
        here.store(seed)
        assert len(there["CPU"]) == PER_CHUNK
        assert len(there["STORAGE"]) == chunks * PER_CHUNK
    assert there["STORAGE"].keys() == announced(disk._pages, PER_CHUNK)
    assert len(here.remembered) == 2 and not here.follower.unknown


def test_of_a_tier_that_never_tells_vllm_remembers_nothing(tmp_path: Path) -> None:
    """Else it did for ever."""

    class Silent(MemoryTier):
        take_removed = SecondaryTier.take_removed

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
    assert here.follower.unknown == 0, "nobody was told of what was never announced"


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


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("full", 56)


@pytest.mark.parametrize("seed", range(3))
def test_a_follower_knows_what_is_where(seed: int, model: Model) -> None:
    """Random traces with too little room in both tiers, and loads and stores that fail."""
    choose = random.Random(seed)
    slots = 24
    page = 8 * BLOCK  # a row of the engine
    layout = PageLayout((TensorSpec("kv", "U8", (page,)),), BLOCK)
    context = CONTEXT.__class__("model", {}, {0: layout})
    disk = Tier({"max_bytes": 48 * page}, context)
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
        follower.hear(iter(tracker.take_events(list(manager.take_events()))))
        ready = [entry.key for entry in inner.primary if entry.ready]
        assert follower.there["CPU"].keys() == announced(ready)
        return iter(())

    half.take_events = take_events
    for prompts in trace(seed)[:10]:
        engine.run(prompts)
        manager.on_schedule_end(STEP)  # what a tier dropped is told a step later
        take_events()
        assert follower.there["STORAGE"].keys() == announced(disk._pages)
        anywhere = {entry.key for entry in inner.primary} | set(disk._pages)
        leaked = tracker._pending_event_metadata.keys() - anywhere
        assert not leaked or not _FORGETS  # 0.32 keeps what was incomplete
        engine.reset()
    assert inner.counters["loaded_pages"] and disk.stats().counters["loaded_pages"]
    assert follower.unknown == 0
    engine.close()
