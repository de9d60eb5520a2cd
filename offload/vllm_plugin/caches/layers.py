"""vLLM's KV caches as `LayerShape`s and `LocalLayer`s: what may be claimed of each layer.

`[H, L, N, C]` is claimed only for attention backends that are known to keep K then V of a
token next to each other in each head's row. Everything else fails closed: to slabs whose
inside is the backend's, or to opaque bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.kernels.geometry import (
    GeometryError,
    LayerShape,
    head_slabs,
    opaque,
    split_kernel_blocks,
    token_major,
)
from kvstrata.kernels.plan import LocalLayer
from kvstrata.offload.vllm_plugin.caches.backends import (
    HEAD_SLABS,
    TOKEN_MAJOR,
    TOKEN_MAJOR_MLA,
    backend_path,
)
from kvstrata.offload.vllm_plugin.caches.content_order import cpu_isa, opaque_order, scales_id
from kvstrata.offload.vllm_plugin.engine.version import content_version

# Names of configuration fields that give a number of KV heads, or of query heads for each:
# of the whole model, of some layers (swa_num_key_value_heads, num_global_key_value_heads,
# attention_other_setting.num_attention_groups), or of each layer.
_KV_HEADS = re.compile(
    "kv_head|key_value_head|heads?_kv|attention_group|query_group|heads_in_group"
)

# All others keep scales, codes or several numbers in a byte beside or in place of the elements.
_PLAIN_MODES = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)

# An allocation may be rounded up to a memory page (vLLM on ROCm).
_MAX_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class WorkerLayer:
    """One layer on this worker: its canonical shape, its cache, and its content order."""

    shape: LayerShape
    local: LocalLayer
    content_order: str


@dataclass(frozen=True, slots=True)
class _Rank:
    """This worker's place.

    heads: the model's KV heads over all TP ranks.
    uniform: whether all layers are known to have that many.
    """

    tp: int
    tp_rank: int
    heads: int
    uniform: bool
    context_parallel: bool
    ranks: int
    rank: int


def collect_layers(
    config: OffloadingConfig, vllm_config: VllmConfig, caches: CanonicalKVCaches
) -> dict[int, list[WorkerLayer]]:
    """The layers of each KV cache group on this worker, by vLLM's group index.

    Layers that share another layer's cache are left out: its pages hold their bytes.

    Raises:
        GeometryError: a cache cannot be described, or not with chunks of several blocks.
    """
    parallel = config.parallel
    per_stage = parallel.tp_size * parallel.pcp_size
    modules: Mapping[str, Any] = get_layers_from_vllm_config(
        vllm_config,
        AttentionLayerBase,
    )
    names = [name for group in config.groups for name in group.layer_names]
    specs = [modules[name].get_kv_cache_spec(vllm_config) for name in names if name in modules]
    per_chunk = config.cache.blocks_per_chunk
    if per_chunk > 1 and any(isinstance(spec, MambaSpec) for spec in specs):
        raise GeometryError(
            f"chunks of {per_chunk} blocks would hardly ever hit with this model's recurrent "
            "(Mamba) layers, whose state vLLM keeps at the end of single blocks: leave out "
            "blocks_per_chunk and block_size, and raise --block-size for larger pages"
        )
    rank = _Rank(
        tp=parallel.tp_size,
        tp_rank=parallel.rank % parallel.tp_size,
        heads=vllm_config.model_config.get_total_num_kv_heads(),
        uniform=_is_uniform(specs, vllm_config),
        context_parallel=parallel.dcp_size > 1 or parallel.pcp_size > 1,
        ranks=per_stage,
        rank=parallel.rank % per_stage,
    )
    blocks = caches.tensors[0].tensor.shape[0]
    groups: dict[int, list[WorkerLayer]] = {}
    for group, refs in zip(config.groups, caches.group_data_refs, strict=True):
        tokens = group.tokens_per_block
        raw = [caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
        layers: list[WorkerLayer] = []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        # Where vLLM packs a group's layers into one tensor, their own views still tell them apart;
        # without those it stays whole.
        if len(raw) != len(group.layer_names):
            packed = [modules.get(name) for name in group.layer_names]
            if not all(_has_views(module, blocks) for module in packed):
                order = opaque_order(packed, tokens, blocks)
                for index, tensor in enumerate(raw):
                    if tensor.untyped_storage().nbytes() - tensor.nbytes >= _MAX_TAIL_BYTES:
                        raise GeometryError(
                            f"vLLM's layout {config.kv_cache_layout} shows only a part of each "
                            "block of this model: use VLLM_KV_CACHE_LAYOUT=BLHNC"
                        )
                    name = f"{group.layer_names[0]}+{index}"
                    layers.append(_opaque_layer(name, tensor, rank, blocks, order))
                groups[group.group_id] = layers
                continue
            raw *= len(group.layer_names)
        for name, tensor in zip(group.layer_names, raw, strict=True):
            module = modules.get(name)
            layer = _worker_layer(name, module, tensor, blocks, tokens, vllm_config, rank)
            view = layer.local.cache.view
            place = (view.data_ptr(), tuple(view.stride()))
            if place not in seen:
                seen.add(place)
                layers.append(layer)
        groups[group.group_id] = layers
    return groups


def _has_views(module: Any, blocks: int) -> bool:
    """Whether vLLM's layer shows its own bytes of each block."""
    view = getattr(module, "kv_cache", None)
    if isinstance(view, torch.Tensor):
        return view.dim() > 2 and view.shape[0] % blocks == 0
    return isinstance(view, tuple)


def _worker_layer(
    name: str,
    module: Any,
    raw: torch.Tensor,
    blocks: int,
    tokens: int,
    vllm_config: VllmConfig,
    rank: _Rank,
) -> WorkerLayer:
    unknown = opaque_order([module], tokens, blocks)
    view = getattr(module, "kv_cache", None)
    spec = module.get_kv_cache_spec(vllm_config) if module is not None else None
    if isinstance(view, tuple) and isinstance(spec, MambaSpec):
        raw = _states(view[0], blocks, spec.state_content_size_bytes)
    if not isinstance(view, torch.Tensor) or not isinstance(spec, AttentionSpec):
        return _opaque_layer(name, raw, rank, blocks, unknown)
    if spec.block_size != tokens:  # vLLM enlarges the blocks of layers with smaller pages
        spec = replace(spec, block_size=tokens)
    backend = module.get_attn_backend()
    spec = backend.customize_spec(spec)  # what vLLM allocated the cache for
    if view.shape[0] % blocks == 0:
        raw = view  # vLLM's raw bytes are right only where a block is one run
    if view.dim() == 3:  # MLA binds its cache without the head axis
        view = view.unsqueeze(1)
    path = backend_path(backend)
    heads = _heads_of(spec, rank)
    if heads is None or not _is_plain(spec, view, blocks):
        return _opaque_layer(name, raw, rank, blocks, unknown)
    total, first, replicas, replica = heads
    if path in (TOKEN_MAJOR_MLA if _is_mla(spec) else TOKEN_MAJOR):
        cache = token_major(name, _typed(view, vllm_config))
        order = scales_id(module, view)
        if order:  # whether queries are quantised, too, is the backend's choice
            order = f"{path}{order}"
    elif path in HEAD_SLABS:
        cache = head_slabs(name, _typed(view, vllm_config))
        isa = cpu_isa(spec, vllm_config)
        sizes = f"block{spec.block_size}/kernel{view.shape[2]}"
        order = f"cpu_attn/{content_version()}/{isa}/{sizes}/{view.dtype}{scales_id(module, view)}"
    else:
        return _opaque_layer(name, raw, rank, blocks, unknown)
    cache = split_kernel_blocks(cache, blocks)
    return WorkerLayer(cache.shape(total), LocalLayer(cache, first, replicas, replica), order)


def _opaque_layer(
    name: str, raw: torch.Tensor, rank: _Rank, blocks: int, order: str
) -> WorkerLayer:
    cache = split_kernel_blocks(opaque(name, raw), blocks)
    return WorkerLayer(cache.shape(rank.ranks), LocalLayer(cache, rank.rank), order)


def _states(first: torch.Tensor, blocks: int, nbytes: int) -> torch.Tensor:
    """The recurrent states of a layer, `nbytes` per block from the first state's view on.

    vLLM's raw bytes take a padded page for the distance of two blocks, which is wrong in layouts
    that keep the layers of a block together.
    """
    item = first.element_size()
    storage = torch.empty(0, dtype=torch.uint8, device=first.device)
    storage.set_(first.untyped_storage())
    start = first.storage_offset() * item
    return storage.as_strided((blocks, nbytes), (first.stride(0) * item, 1), start)


def _heads_of(spec: AttentionSpec, rank: _Rank) -> tuple[int, int, int, int] | None:
    """(total heads, first local head, replicas, replica), or None if it cannot be told.

    vLLM gives a rank max(1, total // TP) heads of a layer. One head on each of several ranks
    may thus be a copy; a layer's own total is not to be had, only that of the whole model.
    """
    if rank.context_parallel:
        return None
    if _is_mla(spec):
        return 1, 0, rank.tp, rank.tp_rank
    local = spec.num_kv_heads
    if local > 1 or rank.tp == 1:
        return local * rank.tp, rank.tp_rank * local, 1, 0
    if not rank.uniform or rank.heads < 1 or rank.tp % rank.heads:
        return None
    replicas = rank.tp // rank.heads
    return rank.heads, rank.tp_rank // replicas, replicas, rank.tp_rank % replicas


def _is_uniform(specs: Iterable[Any], vllm_config: VllmConfig) -> bool:
    """Whether every layer has the model's number of KV heads, as far as can be seen: in the
    heads on this rank and in all that the configurations of the model and its draft say.
    """
    local = {
        spec.num_kv_heads for spec in specs if isinstance(spec, AttentionSpec) and not _is_mla(spec)
    }
    model = vllm_config.model_config
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    heads = model.get_total_num_kv_heads()
    said = {heads}
    for part in (model, draft):
        if part is not None:
            said.add(part.get_total_num_kv_heads())
            said.update(_kv_heads_in(part.hf_text_config.to_dict()))
    return len(local) <= 1 and said == {heads}


def _kv_heads_in(value: Any, *, named: bool = False) -> Iterator[Any]:
    """The values that a configuration gives for numbers of KV heads, at any depth."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _kv_heads_in(item, named=named or bool(_KV_HEADS.search(str(key))))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _kv_heads_in(item, named=named)
    elif named and value is not None:
        yield value


def _is_mla(spec: AttentionSpec) -> bool:
    return isinstance(spec, MLAAttentionSpec)


def _is_plain(spec: AttentionSpec, view: torch.Tensor, blocks: int) -> bool:
    """One dense row of K and V (or one latent row) per head and token, nothing else."""
    known = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MLAAttentionSpec)
    width = spec.head_size if _is_mla(spec) else spec.head_size + spec.head_size_v
    return (
        type(spec) in known
        and spec.num_head_slots is None
        and spec.state_content_bytes is None
        and spec.tokens_per_state == 1
        and spec.kv_quant_mode in _PLAIN_MODES
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
