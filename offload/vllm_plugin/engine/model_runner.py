"""What vLLM's model runners do to KV blocks beside our transfers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec


def overwrites_before_flush(vllm_config: VllmConfig) -> bool:
    """Whether blocks may be overwritten in the step that gives them away before this step's flush
    of the stores that read them.

    Model runner V2, the default on GPUs, zeroes new blocks and copies shared ones in
    `update_requests`, and only then calls `handle_preemptions`, which submits and flushes
    (vllm/v1/worker/gpu/model_runner.py, 0.31 to 0.33). V1 calls it first. Blocks are zeroed where
    caches hold recurrent states or more than one precision
    (`KVCacheConfig.needs_kv_cache_zeroing`), and copied only with recurrent states
    (`partial_hash_hits_enabled`).
    """
    if not vllm_config.use_v2_model_runner:
        return False
    modules: Mapping[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    precisions = set()
    for module in modules.values():
        spec = module.get_kv_cache_spec(vllm_config)
        if isinstance(spec, MambaSpec):
            return True
        if isinstance(spec, AttentionSpec):
            spec = module.get_attn_backend().customize_spec(spec)
            precisions.add((spec.dtype, spec.kv_quant_mode))
    return len(precisions) > 1
