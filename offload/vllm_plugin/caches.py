"""vLLM's KV caches as `LayerShape`s and `LocalLayer`s: what may be claimed of each layer.

`[H, L, N, C]` is claimed only for attention backends that are known to keep K then V of a
token next to each other in each head's row. Everything else fails closed: to slabs whose
inside is the backend's, or to opaque bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.kernels.geometry import (
    LayerShape,
    head_slabs,
    opaque,
    split_kernel_blocks,
    token_major,
)
from kvstrata.kernels.plan import LocalLayer

# Backends whose cache view is [B, H, N, K then V]: each splits the last axis at
# head_size after a transpose (vllm/v1/attention/backends/*.py of 0.32 and 0.33).
_TOKEN_MAJOR = frozenset({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"})
# Backends whose cache is one latent row per token, written by concat_and_cache_mla.
_TOKEN_MAJOR_MLA = frozenset(
    {"CPU_MLA", "CUTLASS_MLA", "FLASHINFER_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA"}
)
# vLLM's CPU attention: one slab per head, K transposed in an order of the ISA, then V.
_HEAD_SLABS = frozenset({"CPU_ATTN"})


@dataclass(frozen=True, slots=True)
class WorkerLayer:
    """One layer on this worker: its canonical shape, its cache, and its content order."""

    shape: LayerShape
    local: LocalLayer
    order: str


@dataclass(frozen=True, slots=True)
class _Rank:
    """This worker's place. `heads` are the model's KV heads over all TP ranks."""

    tp: int
    tp_rank: int
    heads: int
    context_parallel: bool
    ranks: int
    rank: int


def collect_layers(
    config: OffloadingConfig, vllm_config: VllmConfig, caches: CanonicalKVCaches
) -> dict[int, list[WorkerLayer]]:
    """The layers of each KV cache group on this worker, by vLLM's group index.

    Layers that share another layer's cache are left out: its pages hold their bytes.

    Raises:
        GeometryError: a cache cannot be described.
    """
    parallel = config.parallel
    per_stage = parallel.tp_size * parallel.pcp_size
    rank = _Rank(
        tp=parallel.tp_size,
        tp_rank=parallel.rank % parallel.tp_size,
        heads=vllm_config.model_config.get_total_num_kv_heads(),
        context_parallel=parallel.dcp_size > 1 or parallel.pcp_size > 1,
        ranks=per_stage,
        rank=parallel.rank % per_stage,
    )
    modules: Mapping[str, Any] = get_layers_from_vllm_config(
        vllm_config,
        AttentionLayerBase,
    )
    blocks = caches.tensors[0].tensor.shape[0]
    groups: dict[int, list[WorkerLayer]] = {}
    for group, refs in zip(config.groups, caches.group_data_refs, strict=True):
        names = group.layer_names
        raw = [caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
        layers: list[WorkerLayer] = []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        # A packed cache comes as one tensor for all layers; it stays whole.
        if len(raw) != len(names):
            for index, tensor in enumerate(raw):
                layers.append(_opaque_layer(f"{names[0]}+{index}", tensor, rank, blocks))
            groups[group.group_id] = layers
            continue
        for name, tensor in zip(names, raw, strict=True):
            layer = _worker_layer(name, modules.get(name), tensor, blocks, vllm_config, rank)
            view = layer.local.cache.view
            place = (view.data_ptr(), tuple(view.stride()))
            if place not in seen:
                seen.add(place)
                layers.append(layer)
        groups[group.group_id] = layers
    return groups


def _worker_layer(
    name: str,
    module: Any,
    raw: torch.Tensor,
    blocks: int,
    vllm_config: VllmConfig,
    rank: _Rank,
) -> WorkerLayer:
    view = getattr(module, "kv_cache", None)
    spec = module.get_kv_cache_spec(vllm_config) if module is not None else None
    if not isinstance(view, torch.Tensor) or not isinstance(spec, AttentionSpec):
        return _opaque_layer(name, raw, rank, blocks)
    if view.shape[0] % blocks == 0:
        raw = view  # vLLM's raw bytes are right only where a block is one run
    if view.dim() == 3:  # MLA binds its cache without the head axis
        view = view.unsqueeze(1)
    backend = module.get_attn_backend().get_name()
    heads = _heads_of(spec, rank)
    if heads is None or not _is_plain(spec, view, blocks):
        return _opaque_layer(name, raw, rank, blocks)
    total, first, replicas, replica = heads
    if backend in _TOKEN_MAJOR_MLA or (backend in _TOKEN_MAJOR and not _is_mla(spec)):
        cache = token_major(name, _typed(view, vllm_config))
        order = _scales(module, view)
    elif backend in _HEAD_SLABS:
        cache = head_slabs(name, view)
        isa = _cpu_isa(spec, vllm_config)
        sizes = f"block{spec.block_size}/kernel{view.shape[2]}"
        order = f"cpu_attn/{isa}/{sizes}/{view.dtype}{_scales(module, view)}"
    else:
        return _opaque_layer(name, raw, rank, blocks)
    cache = split_kernel_blocks(cache, blocks)
    return WorkerLayer(cache.shape(total), LocalLayer(cache, first, replicas, replica), order)


def _opaque_layer(name: str, raw: torch.Tensor, rank: _Rank, blocks: int) -> WorkerLayer:
    cache = split_kernel_blocks(opaque(name, raw), blocks)
    return WorkerLayer(cache.shape(rank.ranks), LocalLayer(cache, rank.rank), "opaque")


def _heads_of(spec: AttentionSpec, rank: _Rank) -> tuple[int, int, int, int] | None:
    """(total heads, first local head, replicas, replica), or None if it cannot be told."""
    if rank.context_parallel:
        return None
    if _is_mla(spec):
        return 1, 0, rank.tp, rank.tp_rank
    local = spec.num_kv_heads
    if rank.heads == local * rank.tp:
        return rank.heads, rank.tp_rank * local, 1, 0
    if local == 1 and rank.heads < rank.tp and rank.tp % rank.heads == 0:
        replicas = rank.tp // rank.heads
        return rank.heads, rank.tp_rank // replicas, replicas, rank.tp_rank % replicas
    # Layers with a head count of their own (not the model's) shard the same way.
    if local * rank.tp > rank.heads and local > 1:
        return local * rank.tp, rank.tp_rank * local, 1, 0
    return None


def _is_mla(spec: AttentionSpec) -> bool:
    return isinstance(spec, MLAAttentionSpec)


def _is_plain(spec: AttentionSpec, view: torch.Tensor, blocks: int) -> bool:
    """One dense row of K and V (or one latent row) per head and token, nothing else."""
    known = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MLAAttentionSpec)
    width = spec.head_size if _is_mla(spec) else spec.head_size + spec.head_size_v
    quant = spec.kv_quant_mode
    return (
        type(spec) in known
        and spec.num_head_slots is None
        and spec.state_content_bytes is None
        and spec.tokens_per_state == 1
        and not quant.is_per_token_head
        and not quant.is_nvfp4
        and view.dim() == 4
        and view.shape[1] == spec.num_kv_heads
        and view.shape[0] % blocks == 0
        and view.shape[0] * view.shape[2] == blocks * spec.block_size
        and view.shape[3] == width
    )


def _typed(view: torch.Tensor, vllm_config: VllmConfig) -> torch.Tensor:
    """vLLM keeps fp8 caches as uint8; give them their dtype."""
    if view.dtype is not torch.uint8:
        return view
    e5m2 = vllm_config.cache_config.cache_dtype == "fp8_e5m2"
    return view.view(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn)


def _scales(module: Any, view: torch.Tensor) -> str:
    """fp8 content means something only together with its scales."""
    if view.dtype.is_floating_point and view.element_size() > 1:
        return ""
    scales = [float(getattr(module, name, 1.0)) for name in ("_k_scale", "_v_scale")]
    return "/scales-" + hashlib.sha256(repr(scales).encode()).hexdigest()[:12]


def _cpu_isa(spec: AttentionSpec, vllm_config: VllmConfig) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(
        spec.dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype
    )
    return f"{isa}-{torch.backends.cpu.get_cpu_capability()}"
