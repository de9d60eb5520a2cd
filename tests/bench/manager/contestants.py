"""Our manager and stock vLLM's, both with pages so small that a million take no memory.

vLLM is imported inside the functions: importing a benchmark must not need it.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from kvstrata.offload.audit.comparison import Elements
from kvstrata.offload.config.offload_config import OffloadConfig, TierEntry
from kvstrata.offload.primary.region import create_region
from kvstrata.offload.primary.reserver import Reserver
from kvstrata.tiers.base import PageLayout, TensorSpec, layouts_to_json
from tests.bench.manager.instant import InstantTier

OURS, STOCK = "kvstrata", "stock vLLM"
_PAGE_BYTES = 16  # nobody moves them
_TOKENS = 256  # of a chunk


def make(name: str, slots: int, tier: bool, policy: str | None = None, groups: int = 1) -> Any:
    """A manager of `slots` pages, with or without a secondary tier; vLLM's OffloadingManager.

    policy: "lru" or "arc", or of ours "auto"; each manager's own default, if not given.
    """
    maker, default = {OURS: (_ours, "auto"), STOCK: (_stock, "lru")}[name]
    return maker(slots, tier, policy or default, groups)


def _ours(slots: int, tier: bool, policy: str, groups: int) -> Any:
    """As an engine opens it: behind the adapter, the tier behind its guard."""
    from kvstrata.offload.vllm_plugin.scheduler import open_scheduler

    layout = PageLayout((TensorSpec("kv", "U8", (_PAGE_BYTES,)),), _TOKENS)
    fields = {
        "slots": slots,
        "slot_bytes": _PAGE_BYTES,
        "workers": 1,
        "model": "benchmark",
        "layouts": layouts_to_json(dict.fromkeys(range(groups), layout)),
        "namespace": {},
        "weights_fixed": True,
        "steps_ahead": 0,
        "elements": {
            group: [Elements(_PAGE_BYTES, "U8", _PAGE_BYTES, 1)] for group in range(groups)
        },
        "weights_watch": None,
        "windows": {},
        "lora": False,
    }
    cache = SimpleNamespace(blocks_per_chunk=1, tokens_per_hash=_TOKENS)
    group = SimpleNamespace(tokens_per_block=_TOKENS)
    engine = SimpleNamespace(
        engine_id=f"benchmark-{os.getpid()}", cache=cache, groups=[group] * groups
    )
    region = create_region(engine.engine_id, fields)
    reserver = Reserver(region, 0)
    reserver.reserve_first()  # all: its slots are small
    reserver.start(lambda slots: None)
    entry = {"type": InstantTier.__name__, "module_path": InstantTier.__module__}
    tiers = (TierEntry("instant", entry),) if tier else ()
    settings = OffloadConfig(cpu_bytes=slots * _PAGE_BYTES, tiers=tiers, eviction_policy=policy)
    manager = open_scheduler(cast(Any, engine), settings, events=False)
    region.close()
    return manager


class _Pages:
    """What stock asks of vLLM's SharedOffloadRegion."""

    def __init__(self, slots: int) -> None:
        self._pages = np.zeros((slots, _PAGE_BYTES), np.uint8)

    def create_kv_memoryview(self) -> memoryview:
        return self._pages.data

    def cleanup(self) -> None:
        """Nothing is shared."""


def _stock(slots: int, tier: bool, policy: str, groups: int) -> Any:
    """As vLLM's TieringOffloadingSpec makes it, with its own example of a tier."""
    from vllm.v1.kv_offload.tiering.example.manager import ExampleSecondaryTierManager
    from vllm.v1.kv_offload.tiering.manager import (
        CPUPrimaryTierOffloadingManager,
        TieringOffloadingManager,
    )

    primary = CPUPrimaryTierOffloadingManager(slots, cast(Any, _Pages(slots)), policy)
    view = primary.get_kv_memoryview()
    tiers = [ExampleSecondaryTierManager(cast(Any, None), view, "example")] if tier else []
    return TieringOffloadingManager(primary, cast(Any, tiers))
