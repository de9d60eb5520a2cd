"""Kinds of KV cache that vLLM's CPU build cannot compute: hits and identical bytes.

With vLLM's own specs, scheduler, connector and cache layouts; see `modelless_engine.py`.
"""

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
)

from tests.engine.conftest import CHECKPOINTS  # noqa: E402
from tests.models import tiny_llama  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import ModellessEngine  # noqa: E402

Start = Callable[..., ModellessEngine]


def text(seed: int, length: int = 320) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(256) for _ in range(length)]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts engines, and closes them at the end."""
    engines = []
    before = dict(os.environ)

    def make(layers: Any, **options: Any) -> ModellessEngine:
        engines.append(ModellessEngine(tiny_llama(CHECKPOINTS), layers, monkeypatch, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    os.environ.clear()  # vLLM's CPU platform sets variables for the workers it would start
    os.environ.update(before)


def full(heads: int = 2, **more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=32, num_kv_heads=heads, head_size=8, dtype=torch.float16, **more
    )


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC"])
def test_full_attention_of_gpu_backends(start: Start, layout: str) -> None:
    engine = start({f"l{i}": (full(), "FLASH_ATTN") for i in range(2)}, layout=layout)
    check_hits(engine, 288)


def check_hits(engine: ModellessEngine, hit: int) -> None:
    assert engine.run(text(1)) == 0
    engine.reset()
    assert engine.run(text(2)) == 0
    engine.reset()
    assert engine.run(text(1)) >= hit
