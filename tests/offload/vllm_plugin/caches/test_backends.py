"""What is claimed of which attention backend: all that vLLM has, and what only looks like one."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.attention.backend import (  # noqa: E402
    subclass_attention_backend,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import MLAAttentionSpec  # noqa: E402

from kvstrata.kernels.geometry import HEAD_SLABS, OPAQUE, TOKEN_MAJOR  # noqa: E402
from kvstrata.offload.vllm_plugin.caches import backends, layers  # noqa: E402
from tests.offload.vllm_plugin.caches import registered_backends  # noqa: E402
from tests.offload.vllm_plugin.caches.test_layers import Module, collect  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import backend_class  # noqa: E402

FLASH = AttentionBackendEnum.FLASH_ATTN.value
# content of keys and values, and of latent rows
KINDS = {
    **dict.fromkeys(registered_backends.TOKEN_MAJOR, (TOKEN_MAJOR, OPAQUE)),
    **dict.fromkeys(registered_backends.MLA, (OPAQUE, TOKEN_MAJOR)),
    **dict.fromkeys(registered_backends.SLABS, (HEAD_SLABS, HEAD_SLABS)),
    **dict.fromkeys(registered_backends.OPAQUE, (OPAQUE, OPAQUE)),
}


def content_of(monkeypatch: pytest.MonkeyPatch, backend: type[Any], *, latent: bool = False) -> str:
    monkeypatch.setattr(layers, "cpu_isa", lambda *_: "isa")
    module = Module(2, backend)
    if latent:
        module.spec = MLAAttentionSpec(
            block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32
        )
        module.kv_cache = torch.zeros(6, 16, 16)
    [layer] = collect(monkeypatch, {"layer": module})
    return layer.shape.content


def test_every_registered_backend_was_looked_at() -> None:
    """One that vLLM adds fails here until somebody has read how it lays out a block."""
    registered = {member.value for member in AttentionBackendEnum if member.value}
    assert registered <= KINDS.keys()


def test_the_allow_lists_are_the_tables() -> None:
    assert set(registered_backends.TOKEN_MAJOR) == backends.TOKEN_MAJOR
    assert set(registered_backends.MLA) == backends.TOKEN_MAJOR_MLA
    assert set(registered_backends.SLABS) == backends.HEAD_SLABS


@pytest.mark.parametrize("path", sorted(KINDS))
def test_what_is_claimed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_class(path)
    found = [content_of(monkeypatch, backend, latent=latent) for latent in (False, True)]
    assert tuple(found) == KINDS[path]


@pytest.mark.parametrize("name", ["FLASH_ATTN", "ROCM_AITER_FA", "TRITON_ATTN", "CPU_ATTN"])
def test_vllms_own_classes_are_found_by_their_path(name: str) -> None:
    member = AttentionBackendEnum[name]
    assert backends.backend_path(member.get_class()) == member.value


def test_a_name_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """AITER's backend, and a plug-in's, with the name of FlashAttention."""
    for path in (AttentionBackendEnum.ROCM_AITER_FA.value, "plugin.FlashAttentionBackend"):
        backend = backend_class(path, "FLASH_ATTN")
        assert backend.get_name() == "FLASH_ATTN"
        assert content_of(monkeypatch, backend) == OPAQUE


def test_two_heads_of_aiters_shuffled_layout_are_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V on the head axis: with two local heads the view has the shape of a plain cache."""
    rocm = pytest.importorskip("vllm.v1.attention.backends.rocm_aiter_fa")
    monkeypatch.setattr(rocm.rocm_aiter_ops, "is_shuffle_kv_cache_enabled", lambda: True)
    assert content_of(monkeypatch, rocm.AiterFlashAttentionBackend) == OPAQUE


def test_the_backend_customises_the_spec_before_it_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were AITER's class on the list, its spec would still say what it holds."""
    rocm = pytest.importorskip("vllm.v1.attention.backends.rocm_aiter_fa")
    backend = rocm.AiterFlashAttentionBackend
    monkeypatch.setattr(layers, "TOKEN_MAJOR", {backends.backend_path(backend)})
    assert content_of(monkeypatch, backend) == TOKEN_MAJOR
    monkeypatch.setattr(rocm.rocm_aiter_ops, "is_shuffle_kv_cache_enabled", lambda: True)
    assert content_of(monkeypatch, backend) == OPAQUE


def test_another_builder_of_metadata_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM derives chunked local attention and fast prefill, also one from the other."""
    flash = backend_class(FLASH)
    once = subclass_attention_backend("ChunkedLocalAttention_64_", flash, object)
    twice = subclass_attention_backend("FastPrefill_", once, object)
    assert content_of(monkeypatch, once) == content_of(monkeypatch, twice) == TOKEN_MAJOR
    aiter = backend_class(AttentionBackendEnum.ROCM_AITER_FA.value)
    derived = subclass_attention_backend("ChunkedLocalAttention_64_", aiter, object)
    assert content_of(monkeypatch, derived) == OPAQUE


def test_another_implementation_may_change_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As models derive theirs, which keep the name, and as cross attention's."""
    overrides = {"get_impl_cls": lambda: object, "get_builder_cls": lambda: object}
    derived = subclass_attention_backend_with_overrides("Own", backend_class(FLASH), overrides)
    assert content_of(monkeypatch, derived) == OPAQUE
