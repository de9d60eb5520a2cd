"""Kinds of KV cache that vLLM's CPU build cannot compute: hits and identical bytes.

With vLLM's own specs, scheduler, connector and cache layouts; see `modelless_engine.py`.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstrata.offload.vllm_plugin.registration import RegistrationError  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import ModellessEngine  # noqa: E402

Start = Callable[..., ModellessEngine]


def text(seed: int, length: int = 320) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(256) for _ in range(length)]


def full(heads: int = 2, size: int = 8, **more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": 32, "num_kv_heads": heads, "head_size": size, "dtype": torch.float16}
        | more
    )


def window(heads: int = 2, size: int = 8, dtype: torch.dtype = torch.float16) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=32, num_kv_heads=heads, head_size=size, dtype=dtype, sliding_window=64
    )


def latent(size: int, dtype: torch.dtype = torch.bfloat16) -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=size, dtype=dtype)


def check_hits(engine: ModellessEngine, hit: int, generate: int = 1) -> None:
    """What the engine reads of a prompt that comes from the tiers is what it wrote."""
    for seed in (1, 2):
        assert engine.run(text(seed), generate) == 0
        engine.reset()
    assert engine.run(text(1), generate) >= hit


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_token_major(start: Start, layout: str, tp: int) -> None:
    """Full attention of the GPU backends, in each of vLLM's layouts."""
    layers = {f"l{i}": (full(4 // tp), "FLASH_ATTN") for i in range(2)}
    engine = start(layers, layout=layout, tp=tp)
    assert engine.pages == [(("F16", (4, 2, 32, 16)),)]
    check_hits(engine, 288)


def test_fp8(start: Start) -> None:
    mode = KVQuantMode.FP8_PER_TENSOR
    layers = {"l": (full(dtype=torch.uint8, kv_quant_mode=mode), "FLASHINFER")}
    engine = start(layers, kv_cache_dtype="fp8")
    assert engine.pages == [(("F8_E4M3", (2, 1, 32, 16)),)]
    check_hits(engine, 288)


def test_scales_per_token_and_head(start: Start) -> None:
    """The scales lie beside the content: opaque bytes of each rank."""
    mode = KVQuantMode.INT8_PER_TOKEN_HEAD
    spec = full(dtype=torch.int8, kv_quant_mode=mode, state_content_bytes=2 * 8 + 2 * 4)
    engine = start({"l": (spec, "TRITON_ATTN")}, tp=2)
    assert engine.pages == [(("U8", (2, 32 * 2 * 24)),)]
    check_hits(engine, 288)


def test_key_and_value_on_the_head_axis(start: Start) -> None:
    """As in NVFP4: opaque."""
    mode = KVQuantMode.NVFP4
    spec = full(dtype=torch.uint8, kv_quant_mode=mode, num_head_slots=4, state_content_bytes=9)
    engine = start({"l": (spec, "FLASHINFER")})
    assert engine.pages == [(("U8", (1, 32 * 4 * 9)),)]
    check_hits(engine, 288)


def test_sliding_window(start: Start) -> None:
    layers = {"full": (full(), "FLASH_ATTN"), "window": (window(), "FLASH_ATTN")}
    engine = start(layers, blocks=60)
    assert engine.pages == [(("F16", (2, 1, 32, 16)),)] * 2
    check_hits(engine, 288)


def test_chunked_local_attention(start: Start) -> None:
    local = ChunkedLocalAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=8, dtype=torch.float16, attention_chunk_size=64
    )
    engine = start({"full": (full(), "FLASH_ATTN"), "local": (local, "FLASH_ATTN")}, blocks=60)
    assert engine.pages == [(("F16", (2, 1, 32, 16)),)] * 2
    check_hits(engine, 256)


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_groups_with_other_block_sizes(start: Start, blocks_per_chunk: int) -> None:
    """vLLM doubles the blocks of layers with half the bytes per token; they stay shareable."""
    layers = {"full": (full(size=16), "FLASH_ATTN"), "window": (window(), "FLASH_ATTN")}
    engine = start(layers, blocks=60, extra={"blocks_per_chunk": blocks_per_chunk})
    assert sorted(engine.pages) == [
        (("F16", (2, 1, 32 * blocks_per_chunk, 32)),),
        (("F16", (2, 1, 64 * blocks_per_chunk, 16)),),
    ]
    check_hits(engine, 256)


@pytest.mark.parametrize("tp", [1, 2])
def test_latent_attention_with_an_indexer(start: Start, tp: int) -> None:
    """As in DeepSeek-V3.2: one group with two kinds of layers, both alike on all ranks."""
    layers = {
        "mla.0": (latent(24), "FLASHMLA"),
        "indexer.0": (latent(12, torch.uint8), "DEEPSEEK_V32_INDEXER"),
    }
    engine = start(layers, tp=tp, layout="BLHNC")
    assert engine.pages == [(("BF16", (1, 1, 32, 24)), ("U8", (tp, 32 * 12)))]
    check_hits(engine, 288)


def test_context_parallelism(start: Start) -> None:
    """The ranks hold tokens in turn: opaque bytes of each."""
    layers = {"l": (full(heads=1), "FLASH_ATTN")}
    engine = start(layers, tp=2, model_heads=1, decode_context_parallel_size=2)
    assert engine.pages == [(("U8", (2, 32 * 32)),)]
    check_hits(engine, 256)


def test_draft_group(start: Start) -> None:
    """A group that vLLM marks as the draft's keeps its last chunk back while decoding."""

    def mark(config: KVCacheConfig) -> None:
        for group in config.kv_cache_groups:
            group.is_eagle_group = group.layer_names == ["draft"]

    layers = {"full": (full(), "FLASH_ATTN"), "draft": (window(), "FLASH_ATTN")}
    engine = start(layers, blocks=60, change=mark, extra={"offload_prompt_only": False})
    check_hits(engine, 256, generate=70)


def test_chunks_of_several_blocks_are_refused_with_recurrent_layers(start: Start) -> None:
    """vLLM keeps a state where a prompt ends, which is seldom where such a chunk ends."""
    state = MambaSpec(
        block_size=32,
        shapes=((256,), (256,)),
        dtypes=(torch.float32,) * 2,
        mamba_cache_mode="align",
    )
    layers = {"attention": (full(), "FLASH_ATTN"), "mamba": (state, "MAMBA2_ATTN")}
    with pytest.raises(RegistrationError, match="chunks of 2 blocks would hardly ever hit"):
        start(layers, extra={"blocks_per_chunk": 2})
