"""Content-order ids: what is known of the order of bytes that an attention backend chose.

Pages with the same shape but another order must never be shared, so the ids are part of the
namespace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec

from kvstrata.offload.vllm_plugin.engine.version import content_version


def opaque_order(modules: Sequence[Any], tokens: int, blocks: int) -> str:
    """What is known of the bytes' order: `opaque/<vLLM's version>/`, then
    `<backend>/block<tokens>/kernel<tokens>/<dtype>` and the scales of each kind of `modules` that
    the bytes belong to; of recurrent states also their shapes, since vLLM keeps some of them
    transposed on some machines.
    """
    kinds = []
    for module in modules:
        backend = module.get_attn_backend().get_name() if module is not None else "unknown"
        cache = getattr(module, "kv_cache", ())
        views = [cache] if isinstance(cache, torch.Tensor) else list(cache)
        facts = []
        for view in views:
            kernel = tokens * blocks // max(1, view.shape[0])
            shape = "" if view is cache else f"/{'x'.join(map(str, view.shape[1:]))}"
            facts.append(f"kernel{kernel}/{view.dtype}{shape}{scales_id(module, view)}")
        kinds.append(f"{backend}/block{tokens}/{'+'.join(facts) or 'unknown'}")
    return f"opaque/{content_version()}/" + ",".join(dict.fromkeys(kinds))


def scales_id(module: Any, view: torch.Tensor) -> str:
    """A digest of the scales of fp8 content, which means something only together with them."""
    if view.dtype.is_floating_point and view.element_size() > 1:
        return ""
    scales = [
        torch.as_tensor(getattr(module, name, 1.0)).flatten().tolist()
        for name in ("_k_scale", "_v_scale")
    ]
    return "/scales-" + hashlib.sha256(repr(scales).encode()).hexdigest()[:12]


def cpu_isa(spec: AttentionSpec, vllm_config: VllmConfig) -> str:
    """The instruction set that vLLM's CPU attention lays its caches out for.

    Chosen as the backend does: by the dtype of the model, not of an fp8 cache.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype: Any = vllm_config.model_config.dtype
    isa = _get_attn_isa(
        dtype,
        spec.block_size,
        spec.head_size,
        vllm_config.cache_config.cache_dtype,
    )
    return f"{isa}-{torch.backends.cpu.get_cpu_capability()}"
