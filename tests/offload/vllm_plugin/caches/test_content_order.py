"""Content-order ids: what must keep pages of the same shape apart."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from kvstrata.offload.vllm_plugin.caches.content_order import cpu_isa, opaque_order  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.version import content_version  # noqa: E402

BLOCKS = 4


def recurrent(*shapes: tuple[int, ...]) -> Any:
    """Stands for vLLM's Mamba layer."""
    return SimpleNamespace(
        kv_cache=tuple(torch.zeros(BLOCKS, *shape) for shape in shapes),
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "MAMBA2_ATTN"),
    )


def test_transposed_states_are_another_order() -> None:
    """vLLM turns the convolution's state round on CPUs with AVX-512 BF16."""
    one = opaque_order([recurrent((3, 8), (2, 4))], 32, BLOCKS)
    form = f"opaque/{content_version()}/MAMBA2_ATTN"
    assert one == f"{form}/block32/kernel32/torch.float32/3x8+kernel32/torch.float32/2x4"
    assert opaque_order([recurrent((8, 3), (2, 4))], 32, BLOCKS) != one


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_isa_of_the_model_dtype(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU attention lays an fp8 cache of a bfloat16 model out for AMX where there is AMX."""
    from vllm.platforms import CpuArchEnum, current_platform

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(current_platform, "get_cpu_architecture", lambda: CpuArchEnum.X86)
    spec = FullAttentionSpec(
        block_size=32,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.bfloat16 if cache == "auto" else torch.float8_e4m3fn,
    )
    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype=cache),
    )
    assert cpu_isa(spec, engine).startswith("amx-")


@pytest.mark.parametrize(
    ("version", "form"),
    [
        ("0.32.0", "vllm0.32"),
        ("0.32.1.post1", "vllm0.32"),
        ("0.33.0+cu130", "vllm0.33"),
        ("0.33.0+rocm7.0", "vllm0.33"),
        ("0.33.1rc1", "vllm0.33.1rc1"),
        ("0.33.1.dev7+g1234567", "vllm0.33.1.dev7+g1234567"),
        ("0.33.0+mine", "vllm0.33.0+mine"),
        ("dev", "vllmdev"),
    ],
)
def test_content_of_vllm_is_of_a_minor_version(
    version: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an odd build it is of that build alone."""
    monkeypatch.setattr("vllm.__version__", version)
    assert content_version() == form
    assert opaque_order([None], 32, BLOCKS).startswith(f"opaque/{form}/")
