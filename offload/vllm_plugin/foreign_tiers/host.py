"""HostSpec: what a tier for vLLM's own manager is told of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from kvstrata.offload.vllm_plugin.foreign_tiers.seal import SEAL_VERSION
from kvstrata.tiers.base import PageLayout, TierContext
from kvstrata.tiers.page.identity import namespace_digest


class HostSpec(OffloadingSpec):
    """The engine as a tier is to see it: with one worker, whose blocks are our pages.

    By the model's name tiers tell whose pages are whose, in names of files and between peers. Here
    it ends in the namespace's digest, so that neither another namespace of ours nor a server with
    vLLM's own manager, whose pages have another form, ever takes them for its own.

    Attributes:
        num_chunks, kv_bytes_per_chunk: slots, and bytes of each, as vLLM's own specs say it.
    """

    def __init__(self, context: TierContext) -> None:
        """Describe the engine of this context, which has a region."""
        region = context.region
        assert region is not None
        config = context.engine
        if not isinstance(config, OffloadingConfig):
            config = _without_engine(context.layouts)
        name = f"{context.model}_kvstrata{SEAL_VERSION}_{namespace_digest(context.namespace)}"
        blocks = config.cache.blocks_per_chunk
        super().__init__(
            replace(
                config,
                model=replace(config.model, name=name),
                worker_kv_bytes_per_block=region.slot_bytes // blocks,
                parallel=replace(config.parallel, **_ONE_WORKER),
                replicated_layout=False,
                canonical_layout=False,
                kv_cache_layout=None,
            )
        )
        self.num_chunks = region.slots
        self.kv_bytes_per_chunk = region.slot_bytes

    def get_manager(self) -> OffloadingManager:
        """There is none of vLLM's."""
        raise NotImplementedError

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """There is none of vLLM's."""
        raise NotImplementedError


# Pages are the same whatever the parallelism; where they are not, the namespace says so.
_ONE_WORKER: dict[str, Any] = {
    **dict.fromkeys(("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size"), 1),
    "rank": 0,
    "is_parallelism_agnostic": True,
}


def _without_engine(layouts: Mapping[int, PageLayout]) -> OffloadingConfig:
    """The configuration of an engine with these pages, for tests of tiers and for tools."""
    return OffloadingConfig(
        groups=tuple(
            OffloadingGroupConfig(layout.tokens, (f"group{group}",), group)
            for group, layout in layouts.items()
        ),
        worker_kv_bytes_per_block=0,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="none",
        model=OffloadingModelConfig("", "uint8"),
        cache=OffloadingCacheConfig(max(layout.tokens for layout in layouts.values()), 1),
        parallel=OffloadingParallelConfig(
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            **_ONE_WORKER,
        ),
    )
