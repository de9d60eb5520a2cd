"""vLLM's scheduler with its own OffloadingConnector, and the simulator's model of both, find alike.

Both call the same manager over the same modelled disk. `BlockEngine` also compares each block that
is read with what was computed, so what it finds is true.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher  # noqa: E402
from vllm.v1.kv_offload.base import make_offload_key  # noqa: E402
from vllm.v1.request import Request as VllmRequest  # noqa: E402

from kvstrata.offload.primary.region import Region  # noqa: E402
from kvstrata.offload.simulate.disk import ModelledDisk  # noqa: E402
from kvstrata.offload.simulate.gpu_cache import GpuCache  # noqa: E402
from kvstrata.offload.simulate.scheduler import Scheduler  # noqa: E402
from kvstrata.offload.simulate.setup import (  # noqa: E402
    Engine,
    Setup,
    Speeds,
    World,
    build,
    parse_setup,
)
from kvstrata.offload.simulate.traces import Request  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import KVStrataScheduler  # noqa: E402
from kvstrata.tiers.base import Job  # noqa: E402
from tests.offload.vllm_plugin.block_engine import (  # noqa: E402
    BLOCK,
    BlockEngine,
    Model,
    Prompt,
    Rows,
)
from tests.offload.vllm_plugin.test_against_stock import NoRegion, play  # noqa: E402
from tests.offload.vllm_plugin.traces import trace  # noqa: E402

PAGE = 7 * 4096  # bytes, of which none is moved
GPU_BLOCKS = 4000  # more than a trace has
STEP_S = 0.01  # of the real scheduler, on the clock of the replay
# So that what ends when does not depend on how long steps take, which differs between the two.
AT_ONCE = Speeds(gpu=math.inf, read=math.inf, write=math.inf, latency=0.0)
ENGINE = Engine(BLOCK, PAGE, gpu_bytes=GPU_BLOCKS * PAGE, speeds=AT_ONCE)
LRU = {"eviction_policy": "lru"}
Rounds = Sequence[Sequence[Prompt]]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("full", GPU_BLOCKS)


def rounds(seed: int, *, together: bool) -> Rounds:
    """Prompts of a random trace, those of a round together or one after the other.

    None is aborted, and each generates one token: vLLM's prefix cache has what was generated, too,
    and a trace does not say what that was.
    """
    found = [[Prompt(prompt.tokens, 1) for prompt in prompts] for prompts in trace(seed)]
    return found if together else [[prompt] for prompts in found for prompt in prompts]


def requests(prompts: Sequence[Prompt], at: float) -> list[Request]:
    """The prompts with vLLM's own keys: `auto` takes its samples by key."""
    hasher = get_request_block_hasher(BLOCK, sha256)
    found = []
    for prompt in prompts:
        asked = VllmRequest("r", prompt.tokens, SamplingParams(), None, block_hasher=hasher)
        keys = [bytes(make_offload_key(each, 0)) for each in asked.block_hashes]
        found.append(Request(at, len(prompt.tokens), prompt.generate, keys))
    return found


def moves(disk: ModelledDisk, memory: Rows) -> None:
    """Let the modelled disk move pages after all: what is loaded is compared with what it should
    be. A key's page is always the same."""
    store, load = disk.submit_store, disk.submit_load
    pages: dict[bytes, Rows] = {}

    def submit_store(job: Job) -> None:
        pages.update(
            (key, memory[slot].copy()) for key, slot in zip(job.keys, job.slots, strict=True)
        )
        store(job)

    def submit_load(job: Job) -> None:
        for key, slot in zip(job.keys, job.slots, strict=True):
            memory[slot] = pages[key]
        load(job)

    vars(disk).update(submit_store=submit_store, submit_load=submit_load)


class Steps:
    """A manager for vLLM on whose clock each of its steps takes the same time.

    vLLM tells of the requests that ended in one step in the order of a set, which is another one in
    each process. Here it is that of their arrival.
    """

    def __init__(self, world: World) -> None:
        self._clock = world.clock
        self._inner = KVStrataScheduler(world.manager, cast(Region, NoRegion()), events=False)
        self._ended: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        for context in sorted(self._ended, key=lambda context: int(context.req_id[1:])):
            self._inner.on_request_finished(context)
        self._ended.clear()
        return getattr(self._inner, name)

    def on_request_finished(self, context: Any) -> None:
        self._ended.append(context)

    def on_schedule_end(self, context: Any) -> None:
        self.__getattr__("on_schedule_end")(context)
        self._clock.now += STEP_S


def found(world: World) -> dict[str, int]:
    """Chunks by tier, and what became of the others."""
    counters = world.manager.counters
    names = ("primary_hits", "promoted_hits:fs", "loaded_pages", "stored_pages", "evicted_pages")
    assert world.disk is not None
    return {
        **{name: counters[name] for name in names},
        "on disk": len(world.disk),
        "evicted from disk": world.disk.evicted,
        "written": world.disk.written,
    }


def replayed(setup: Setup, rounds: Rounds, *, reset: bool) -> dict[str, int]:
    """What the simulator finds; `reset`: the GPU forgets all after each round."""
    world = build(setup, ENGINE)
    scheduler = Scheduler(world, ENGINE, step_tokens=4 * BLOCK)
    for prompts in rounds:
        scheduler.run(requests(prompts, world.clock.now))
        if reset:
            scheduler.gpu = GpuCache(GPU_BLOCKS)
    assert len(scheduler.counts.ttft) == sum(map(len, rounds))
    return {**found(world), "gpu": scheduler.counts.gpu_tokens // BLOCK}


def served(setup: Setup, rounds: Rounds, model: Model, *, reset: bool) -> dict[str, int]:
    """What vLLM finds."""
    world, slots = build(setup, ENGINE), setup.slots(ENGINE)
    memory: Rows = np.zeros((slots, BLOCK), np.int64)
    assert world.disk is not None
    moves(world.disk, memory)
    engine = BlockEngine(model, cast(Any, Steps(world)), slots, memory)
    play(engine, rounds, reset=reset)
    return {**found(world), "gpu": engine.found - engine.loaded}


def setup_of(config: Mapping[str, object]) -> Setup:
    return parse_setup(
        {
            "cpu_bytes_to_use": 40 * PAGE,
            "secondary_tiers": [{"type": "fs", "max_bytes": 200 * PAGE}],
            **config,
        }
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "config",
    [LRU, {"eviction_policy": "arc"}, {"eviction_policy": "auto"}, {**LRU, "store_threshold": 2}],
    ids=str,
)
def test_requests_one_after_the_other(model: Model, config: dict[str, object], seed: int) -> None:
    setup, asked = setup_of(config), rounds(seed, together=False)
    ours = replayed(setup, asked, reset=True)
    assert ours == served(setup, asked, model, reset=True)
    assert ours["primary_hits"] and ours["promoted_hits:fs"] and ours["evicted_pages"]


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_requests_together(model: Model, seed: int, reset: bool) -> None:
    """They share steps, find each other's blocks in GPU memory, and wait for the same pages."""
    setup, asked = setup_of(LRU), rounds(seed, together=True)
    ours = replayed(setup, asked, reset=reset)
    assert ours == served(setup, asked, model, reset=reset)
    assert ours["gpu"] and (ours["promoted_hits:fs"] or not reset)
