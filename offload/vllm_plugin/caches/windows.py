"""How much of a prefix the layers of a group need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_offload.config import OffloadingConfig


def windows_of(config: OffloadingConfig, vllm_config: VllmConfig) -> dict[int, int]:
    """By group: how many tokens before the end of a hit its layers need. Groups that need the whole
    prefix are left out, and those of which this worker has no layer."""
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return {}  # vLLM keeps, and loads, every block
    modules: Mapping[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    found = {}
    for group in config.groups:
        chunk = group.tokens_per_block * config.cache.blocks_per_chunk
        layers = [modules[name] for name in group.layer_names if name in modules]
        windows = [_window(layer.get_kv_cache_spec(vllm_config), chunk) for layer in layers]
        known = [window for window in windows if window is not None]
        if known and len(known) == len(windows):
            found[group.group_id] = max(known)
    return found


def _window(spec: Any, chunk: int) -> int | None:
    """In tokens, a chunk more than the layer looks back: hits end within chunks."""
    if isinstance(spec, SlidingWindowSpec):
        return spec.sliding_window + chunk
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return spec.attention_chunk_size + chunk
    if isinstance(spec, MambaSpec):
        return chunk  # the last state holds all before it
    return None
