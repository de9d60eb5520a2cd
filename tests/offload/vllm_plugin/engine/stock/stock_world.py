"""vLLM's own spec and manager with a tier of ours, without a model; and its scheduler over them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.engine.stock.tier import StockTier
from kvstrata.tiers.base import SecondaryTier
from kvstrata.tiers.registry import STOCK_MODULE
from tests.offload.vllm_plugin.block_engine import BLOCK, BlockEngine, Model, Prompt
from tests.waiting import PATIENCE_S, wait_until

T = TypeVar("T", bound=SecondaryTier)
ROW_BYTES = 4096  # of the models here, whose blocks are smaller than a page of memory


def entry(type_name: str, **options: Any) -> dict[str, Any]:
    """As a user writes it."""
    if type_name == "KVStrataFs":
        options = {"min_free_bytes": 0, "n_read_threads": 2, "n_write_threads": 2, **options}
    options = {"lookup_deadline_s": PATIENCE_S, **options}  # no test depends on how fast it is
    return {"type": type_name, "module_path": STOCK_MODULE, **options}


def files_of(root: Path) -> list[Path]:
    """The pages below a root."""
    return sorted(root.glob("*_r0/*/*/*.safetensors"))


def changed(config: VllmConfig, **fields: Any) -> VllmConfig:
    """A copy of vLLM's configuration in which these differ, which are fields of its model's."""
    found = copy.copy(config)
    found.model_config = copy.copy(config.model_config)
    for name, value in fields.items():
        setattr(found.model_config, name, value)
    return found


def open_manager(
    config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    tiers: Sequence[dict[str, Any]],
    slots: int,
    *,
    events: bool = False,
    **extra: Any,
) -> TieringOffloadingManager:
    """What vLLM's connector makes of its configuration, with an engine id of its own."""
    vllm_config = copy.copy(config)
    extra = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": slots * ROW_BYTES,
        "secondary_tiers": list(tiers),
        **extra,
    }
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )
    offloading = build_offloading_config(vllm_config, kv_cache_config)
    spec = TieringOffloadingSpec(dataclasses.replace(offloading, enable_kv_cache_events=events))
    manager = spec.get_manager()
    assert isinstance(manager, TieringOffloadingManager)
    return manager


class StockEngine:
    """vLLM's scheduler, whose blocks go through vLLM's CPU tier and ours.

    What a request reads without having computed it is compared (`BlockEngine`). However slow the
    machine is, the tier has ended what it was given before the next step; of a trace, before each
    eighth step.
    """

    def __init__(self, model: Model, tier: dict[str, Any], slots: int, **options: Any) -> None:
        config = options.pop("config", model.config)
        self.manager = open_manager(config, copy.deepcopy(model.kv), [tier], slots, **options)
        (self.tier,) = self.manager.secondary_tiers
        assert isinstance(self.tier, StockTier)
        rows = np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.int64)
        assert rows.shape == (slots, ROW_BYTES // 8)
        self._engine = BlockEngine(model, self.manager, slots, rows[:, :BLOCK])
        self._steps, self._every = 0, 1
        ends = self.manager.on_schedule_end

        def ends_and_waits(context: ScheduleEndContext) -> None:
            ends(context)
            self._steps += 1
            if self._steps % self._every == 0:
                link = self.tier._jobs.link
                assert link is not None and link.tier.drain(PATIENCE_S)

        setattr(self.manager, "on_schedule_end", ends_and_waits)  # noqa: B010

    @property
    def loaded(self) -> int:
        """See `BlockEngine.loaded`."""
        return self._engine.loaded

    def run(self, *prompts: Sequence[int]) -> int:
        """Serve prompts one after the other, with an empty GPU; how many blocks were loaded."""
        before = self.loaded
        for tokens in prompts:
            self._engine.run([Prompt(list(tokens), 1)])
            self._engine.reset()
        return self.loaded - before

    def play(self, rounds: Sequence[Sequence[Prompt]]) -> None:
        """Serve a trace; the GPU forgets all after each round."""
        self._every = 8
        for prompts in rounds:
            self._engine.run(prompts)
            self._engine.reset()

    def total(self, what: str) -> int:
        """A counter of the tier, or the count of a failure."""
        link = self.tier._jobs.link
        assert link is not None
        stats = link.tier.stats()
        return stats.counters.get(what, 0) + stats.failures.get(what, 0)

    def close(self) -> None:
        """As vLLM ends, and leaves nothing in /dev/shm. May be called twice."""
        self._engine.close()
        assert not Path(self.manager.primary_tier._mmap_region.mmap_path).exists()


class StockWorld:
    """vLLM's own manager, called as its connector calls it; the rows are filled by the test."""

    def __init__(self, model: Model, tier: dict[str, Any], *, slots: int = 8, **options: Any):
        config, kv = options.pop("config", model.config), options.pop("kv", model.kv)
        self.manager = open_manager(config, copy.deepcopy(kv), [tier], slots, **options)
        (made,) = self.manager.secondary_tiers
        assert isinstance(made, StockTier)
        self.tier = made
        self._requests = 0
        self._open = True

    @property
    def link(self) -> TierLink:
        """What is known of the tier."""
        link = self.tier._jobs.link
        assert link is not None
        return link

    def wrap(self, make: Callable[[SecondaryTier], T]) -> T:
        """From now on the guard has this around the tier."""
        guard = self.link.tier
        assert isinstance(guard, GuardedTier)
        wrapper = make(guard.inner)
        guard.inner = wrapper
        return wrapper

    def request(self) -> ReqContext:
        """A new one."""
        self._requests += 1
        context = ReqContext(f"request {self._requests}")
        self.manager.on_new_request(context)
        return context

    def store(self, rows: Mapping[int, int], request: ReqContext | None = None) -> None:
        """Store for each number a row of this byte, and wait until the tier has it or not."""
        self.begin_store(rows, request)
        self.settle()

    def begin_store(self, rows: Mapping[int, int], request: ReqContext | None = None) -> None:
        """As `store`, without waiting."""
        request = request or self.request()
        keys = [key_of(number) for number in rows]
        plan = self.manager.prepare_store(keys, request)
        assert plan is not None and plan.keys_to_store == keys
        for chunk, byte in zip(chunks_of(plan.store_spec), rows.values(), strict=True):
            self._rows()[chunk] = byte
        self.manager.complete_store(keys, request)

    def forget(self) -> None:
        """The CPU tier loses all its rows."""
        self.manager.primary_tier.reset_cache()
        self._rows()[:] = -1

    def reset(self) -> None:
        """vLLM resets its caches, and (0.33) says when the workers are past it."""
        self.manager.reset_cache()
        getattr(self.manager, "on_reset_flushed", lambda: None)()

    def look(self, number: int, request: ReqContext) -> LookupResult:
        """One look-up, and the end of its step."""
        found = self.manager.lookup(key_of(number), request)
        self.step()
        return found

    def find(self, number: int, request: ReqContext | None = None) -> int | None:
        """Look a row up until there is an answer: its byte, or None."""
        request = request or self.request()
        waiting = (LookupResult.RETRY, LookupResult.HIT_PENDING)
        found: list[LookupResult] = []

        def answered() -> bool:
            found.append(self.look(number, request))
            return found[-1] not in waiting

        wait_until(answered)
        if found[-1] is LookupResult.MISS:
            return None
        keys = [key_of(number)]
        (chunk,) = chunks_of(self.manager.prepare_load(keys, request))
        row = self._rows()[chunk].copy()
        self.manager.complete_load(keys, request)
        assert (row == row[0]).all(), "a row of several"
        return int(row[0])

    def step(self) -> None:
        """The scheduler's step ends."""
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def settle(self) -> None:
        """Step until no job is under way."""

        def idle() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        wait_until(idle)

    def close(self) -> None:
        """As vLLM ends. May be called twice."""
        if self._open:
            self._open = False
            self.manager.shutdown()

    def _rows(self) -> npt.NDArray[np.int8]:
        return np.asarray(self.manager.primary_tier.get_kv_memoryview())


def key_of(number: int) -> OffloadKey:
    """Of a chunk of the first group."""
    return make_offload_key(number.to_bytes(32, "big"), 0)


def chunks_of(spec: Any) -> list[int]:
    """The CPU tier's chunks of a transfer; it calls them blocks."""
    found: list[int] = spec.block_ids.tolist()
    return found


StartEngine = Callable[..., StockEngine]
