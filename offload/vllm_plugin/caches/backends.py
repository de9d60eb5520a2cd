"""Attention backends, by the path of their class, whose caches are known from the inside.

The path and not the name: AITER's backend calls itself FLASH_ATTN too, and so do classes that
models derive from vLLM's and that lay out their blocks in another way. A class that is not listed
here is unknown, whatever it derives from.
"""

from __future__ import annotations

from typing import Any

_BACKENDS = "vllm.v1.attention.backends"
# The cache view is [B, H, N, K then V]: each splits the last axis at head_size after a transpose
# (the files of these names, 0.31 to 0.33). The composites route between two of the others.
TOKEN_MAJOR = frozenset(
    {
        f"{_BACKENDS}.flash_attn.FlashAttentionBackend",
        f"{_BACKENDS}.flashinfer.FlashInferBackend",
        f"{_BACKENDS}.triton_attn.TritonAttentionBackend",
        f"{_BACKENDS}.flex_attention.FlexAttentionBackend",
        f"{_BACKENDS}.triton_flash_attn.TritonFlashAttentionBackend",
        f"{_BACKENDS}.triton_flashinfer.TritonFlashInferBackend",
    }
)
# The cache is one latent row per token, written by concat_and_cache_mla.
TOKEN_MAJOR_MLA = frozenset(
    {
        f"{_BACKENDS}.mla.cpu_mla.CPUMLABackend",
        f"{_BACKENDS}.mla.cutlass_mla.CutlassMLABackend",
        f"{_BACKENDS}.mla.flashinfer_mla.FlashInferMLABackend",
        f"{_BACKENDS}.mla.flashmla.FlashMLABackend",
        f"{_BACKENDS}.mla.flashattn_mla.FlashAttnMLABackend",
        f"{_BACKENDS}.mla.triton_mla.TritonMLABackend",
    }
)
# vLLM's CPU attention: one slab per head, K transposed in an order of the ISA, then V.
HEAD_SLABS = frozenset({f"{_BACKENDS}.cpu_attn.CPUAttentionBackend"})


def backend_path(backend: type[Any]) -> str:
    """`module.Class` of an attention backend.

    vLLM derives classes at run time that differ from their base in the builder of metadata alone
    (chunked local attention, fast prefill; `subclass_attention_backend`): they write what their
    base writes and count as it.
    """
    while len(backend.__bases__) == 1 and _members(backend) == {"get_builder_cls"}:
        backend = backend.__bases__[0]
    return f"{backend.__module__}.{backend.__qualname__}"


def _members(cls: type[Any]) -> set[str]:
    """What a class defines itself, without what Python adds."""
    names = set(vars(cls)) - {"_abc_impl"}
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}
