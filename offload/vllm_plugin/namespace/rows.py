"""The namespace of rows: pages as vLLM's own offloading lays them out.

A row is what vLLM's CPU tier holds of one chunk: of each worker in turn, the blocks as its caches
have them. Nothing is known of its inside, so whatever may change it is in the namespace, and the
field `rows`, which no other namespace has, tells it from those of canonical pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError
from kvstrata.offload.vllm_plugin.namespace.device import device_fields
from kvstrata.offload.vllm_plugin.namespace.environment import kernel_choice
from kvstrata.offload.vllm_plugin.namespace.namespace import (
    check_length,
    computed_fields,
    topology_fields,
)
from kvstrata.offload.vllm_plugin.namespace.values import plain
from kvstrata.tiers.base import PageLayout, TensorSpec, layouts_to_json

# Which of them is there decides which attention backend vLLM chooses, and what it writes.
_LIBRARIES = ("torch", "triton", "flashinfer-python", "flash-attn", "amd-aiter", "aiter")
# Layers that need the end of a prefix only.
_PARTIAL = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)


def row_layouts(config: OffloadingConfig, row_bytes: int) -> dict[int, PageLayout]:
    """By KV cache group: a row, whatever group it is of, is `row_bytes` bytes."""
    row = (TensorSpec("kv", "U8", (row_bytes,)),)
    return {
        group.group_id: PageLayout(row, group.tokens_per_block * config.cache.blocks_per_chunk)
        for group in config.groups
    }


def row_fields(
    config: OffloadingConfig,
    vllm_config: VllmConfig,
    layouts: Mapping[int, PageLayout],
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """The namespace as JSON-serialisable fields; for the arguments see `namespace_fields`.

    Raises:
        NamespaceError: a field that decides cannot be written down, or all are too long.
    """
    attention = {
        name: plain(getattr(vllm_config, name, None), name)
        for name in ("attention_config", "mamba_config")
    }
    fields = {
        **computed_fields(config, vllm_config, weights),
        "device": device_fields(quantised=True),
        "pages": layouts_to_json(layouts),
        "tokens_per_block": [group.tokens_per_block for group in config.groups],
        "groups": {str(group.group_id): list(group.layer_names) for group in config.groups},
        "topology": topology_fields(config, vllm_config),
        "rows": {
            "vllm": vllm.__version__,
            "libraries": {name: _version(name) for name in _LIBRARIES},
            "kernels": {**attention, "environment": kernel_choice()},
            "workers": config.parallel.world_size,
            "blocks": config.cache.blocks_per_chunk,
            "block_bytes_per_worker": config.worker_kv_bytes_per_block,
            "one_for_all_workers": config.replicated_layout,
            "canonical_layout": config.canonical_layout,
        },
    }
    check_length(fields)
    return fields


def check_rows(config: OffloadingConfig, vllm_config: VllmConfig, caches: KVCacheConfig) -> None:
    """Refuse engines of which vLLM may store rows that are not what was computed.

    In its CPU tier such a row is gone after a while; a file stays. For the reasons see
    docs/stock.md.

    Raises:
        NamespaceError: naming what makes them so, and the remedy.
    """
    kinds = [type(spec) for group in caches.kv_cache_groups for spec in _specs(group.kv_cache_spec)]
    partial = sorted({kind.__name__ for kind in kinds if issubclass(kind, _PARTIAL)})
    if partial and config.cache.blocks_per_chunk > 1:
        raise NamespaceError(
            f"blocks_per_chunk: {config.cache.blocks_per_chunk} with layers that do not need all "
            f"of a prefix ({', '.join(partial)}): vLLM stores chunks of them of which blocks are "
            'missing; give 1, or use kvstrata\'s own spec: "spec_name": "KVStrataSpec"'
        )
    if vllm_config.use_v2_model_runner and caches.needs_kv_cache_zeroing:
        raise NamespaceError(
            "vLLM's second model runner may overwrite blocks of recurrent states, or of caches of "
            "more than one precision, before they are stored; use kvstrata's own spec, which "
            'leaves out such pages: "spec_name": "KVStrataSpec"'
        )


def _specs(spec: Any) -> list[Any]:
    """Of one group, each that there is."""
    return [*spec.kv_cache_specs.values()] if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
