"""Hits and identical tokens for every kind of KV cache that vLLM's CPU build can run.

What it cannot run is in `tests/offload/vllm_plugin/test_other_kinds_of_cache.py`, with vLLM's own
KV cache specs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.draft_models import tiny_eagle, tiny_llama_window
from tests.engine.conftest import CHECKPOINTS
from tests.engine.driver import Engine, connector, prompt
from tests.hybrid_models import tiny_gemma3n, tiny_gemma4, tiny_granite_hybrid, tiny_lfm2
from tests.models import tiny_gemma3, tiny_llama

pytestmark = pytest.mark.vllm

PROMPT = prompt(1)  # 320 tokens
OTHERS = range(10, 16)


@dataclass(frozen=True)
class Kind:
    """A kind of KV cache.

    model: builds the checkpoint.
    hit: tokens of `PROMPT` that must come from the cache.
    blocks: GPU blocks, fewer than `OTHERS` need.
    extra: keys of kv_connector_extra_config.
    arguments: arguments of `vllm.LLM`.
    """

    model: Callable[[Path], Path]
    hit: int
    blocks: int
    extra: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def speculative(draft: Callable[[Path], Path], **config: Any) -> dict[str, Any]:
    """Two guesses per step by a draft."""
    model = str(draft(CHECKPOINTS))
    return {"speculative_config": {"model": model, "num_speculative_tokens": 2, **config}}


# vLLM 0.32's CPU kernel of Mamba-2 gives the state at the end of a step only, and the engine
# wants those at block boundaries too ("IndexError: index 9 is out of bounds for dimension 0
# with size 1", mamba_mixer2.py). Steps of one block have no others.
ONE_BLOCK_STEPS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}

KINDS = {
    "shared-caches": Kind(tiny_gemma3n, 288, 80),
    "mamba": Kind(tiny_granite_hybrid, 256, 40, arguments=ONE_BLOCK_STEPS),
}
LONG_KINDS = {
    "sliding-window-chunks-of-2": Kind(tiny_gemma3, 256, 90, {"blocks_per_chunk": 2}),
    "groups-of-other-block-sizes": Kind(tiny_gemma4, 256, 60),
    "short-convolutions": Kind(tiny_lfm2, 288, 60),
}
HAS_AMX = torch.cpu._is_amx_tile_supported()
if HAS_AMX or torch.cpu._is_avx512_supported():  # vLLM's CPU attention has fp8 caches only there
    KINDS["fp8"] = Kind(tiny_llama, 288, 24, arguments={"kv_cache_dtype": "fp8"})
    arguments = {"kv_cache_dtype": "fp8_e5m2"}
    LONG_KINDS["fp8-e5m2"] = Kind(tiny_llama, 288, 24, arguments=arguments)


def check_hits(kind: Kind, folder: Path) -> None:
    """A prompt has the same tokens when computed, from the CPU tier, and from files."""
    config = connector(
        secondary_tiers=[{"type": "fs", "root_dir": str(folder / "kv")}], **kind.extra
    )
    with Engine(
        kind.model(CHECKPOINTS),
        folder / "log",
        kv_transfer_config=config,
        blocks=kind.blocks,
        max_model_len=352,
        **kind.arguments,
    ) as engine:
        cold = engine.ask(PROMPT)
        assert cold["cached"] == 0
        engine.push_out(OTHERS)
        before = engine.counters()
        warm = engine.ask(PROMPT)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] >= kind.hit
        loaded = engine.counters()["loaded_pages"] - before.get("loaded_pages", 0)
        assert loaded > 0, "the GPU still had the prompt"
        engine.push_out(OTHERS)
        assert engine.reset(connector=True)
        filed = engine.ask(PROMPT)
        assert filed["tokens"] == cold["tokens"]
        assert filed["cached"] >= kind.hit
        counters = engine.counters()
        assert counters["promoted_pages:fs"] >= loaded
        assert counters["failures"] == {"fs": {}}


@pytest.mark.parametrize("name", KINDS)
def test_hits_and_identical_tokens(name: str, tmp_path: Path) -> None:
    check_hits(KINDS[name], tmp_path)


@pytest.mark.parametrize("name", LONG_KINDS)
def test_more_kinds(name: str, tmp_path: Path, is_long: bool) -> None:
    if not is_long:
        pytest.skip("long form")
    check_hits(LONG_KINDS[name], tmp_path)


def test_eagle(tmp_path: Path, is_long: bool) -> None:
    """The draft's layer shares the target's group; generated tokens are stored as well."""
    if not is_long:
        pytest.skip("long form")
    draft = speculative(tiny_eagle, method="eagle")
    check_hits(Kind(tiny_llama, 288, 24, {"offload_prompt_only": False}, draft), tmp_path)


def test_draft_group(llama: Path, tmp_path: Path) -> None:
    """The draft's KV cache is a group of its own, and as good from the tiers as computed.

    The draft is always right, so a request takes a third of the steps. A wrong cache would cost
    no token, since the target corrects it, but steps.
    """
    config = connector(
        offload_prompt_only=False,
        secondary_tiers=[{"type": "fs", "root_dir": str(tmp_path / "kv")}],
    )
    draft = speculative(tiny_llama_window, method="draft_model")
    with Engine(llama, tmp_path / "log", kv_transfer_config=config, blocks=64, **draft) as engine:

        def ask() -> tuple[dict[str, Any], int]:
            before = engine.counters()["steps"]
            answer = engine.ask(PROMPT)
            return answer, engine.counters()["steps"] - before

        cold, steps = ask()
        assert (cold["cached"], steps) == (0, 5)  # the first token alone, then 3 per step
        engine.push_out(OTHERS)
        loaded = engine.counters().get("loaded_pages", 0)
        warm, steps = ask()
        assert (warm["tokens"], steps) == (cold["tokens"], 5)
        assert warm["cached"] >= 288
        assert engine.counters()["loaded_pages"] > loaded
        engine.push_out(OTHERS)
        assert engine.reset(connector=True)
        filed, steps = ask()
        assert (filed["tokens"], steps) == (cold["tokens"], 5)
        assert filed["cached"] >= 288
        assert engine.counters()["promoted_pages:fs"] > 0


def test_sliding_window_and_full_attention(gemma3: Path, tmp_path: Path) -> None:
    """Two kinds of groups, from the CPU tier and, in a new engine, from files."""
    config = connector(secondary_tiers=[{"type": "fs", "root_dir": str(tmp_path / "kv")}])
    with Engine(gemma3, tmp_path / "1.log", kv_transfer_config=config, blocks=160) as engine:
        cold = engine.ask(PROMPT)
        assert cold["cached"] == 0
        engine.push_out(range(10, 26))
        hit = engine.ask(PROMPT)
        assert hit["cached"] >= 288
        assert hit["tokens"] == cold["tokens"]
    with Engine(gemma3, tmp_path / "2.log", kv_transfer_config=config, blocks=160) as engine:
        hit = engine.ask(PROMPT)
        assert hit["cached"] >= 288
        assert hit["tokens"] == cold["tokens"]
        assert engine.counters()["promoted_pages:fs"] > 0


# What vLLM runs MLA with: on CPUs with AMX a backend that takes nothing but bfloat16, unless the
# other one is named; elsewhere the other one.
LATENT = {
    "float32": {"attention_backend": "CPU_MLA"} if HAS_AMX else {},
    **({"bfloat16": {}} if HAS_AMX else {}),
}


@pytest.mark.parametrize("dtype", LATENT)
def test_latent_attention(dtype: str, deepseek: Path, tmp_path: Path) -> None:
    """MLA: one latent row per token, two blocks per chunk."""
    config = connector(blocks_per_chunk=2, secondary_tiers=[{"type": "memory"}])
    with Engine(
        deepseek,
        tmp_path / "1.log",
        kv_transfer_config=config,
        blocks=48,
        dtype=dtype,
        **LATENT[dtype],
    ) as engine:
        cold = engine.ask(PROMPT)
        engine.push_out(range(10, 20))  # of 20 or of 10 blocks each
        hit = engine.ask(PROMPT)
        assert cold["cached"] == 0
        assert hit["cached"] >= 256
        if dtype == "float32":  # in bfloat16 another batch shape may round to other tokens
            assert hit["tokens"] == cold["tokens"]
        assert engine.counters()["loaded_pages"] > 0
        assert engine.reset(connector=True)
        again = engine.ask(PROMPT)
        assert (again["tokens"], again["cached"]) == (hit["tokens"], hit["cached"])
        assert engine.counters()["promoted_pages:memory"] > 0
