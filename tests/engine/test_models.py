"""Hits and identical tokens for models whose KV cache is not one group of plain attention."""

from pathlib import Path

import pytest

from tests.engine.driver import Engine, connector, prompt

pytestmark = pytest.mark.vllm

PROMPT = prompt(1)
OTHERS = range(10, 26)


def test_sliding_window_and_full_attention(gemma3: Path, tmp_path: Path) -> None:
    """Two kinds of groups, from the CPU tier and, in a new engine, from files."""
    config = connector(secondary_tiers=[{"type": "fs", "root_dir": str(tmp_path / "kv")}])
    with Engine(gemma3, tmp_path / "1.log", kv_transfer_config=config, blocks=160) as engine:
        cold = engine.ask(PROMPT)
        assert cold["cached"] == 0
        engine.push_out(OTHERS)
        hit = engine.ask(PROMPT)
        assert hit["cached"] >= 288
        assert hit["tokens"] == cold["tokens"]
    with Engine(gemma3, tmp_path / "2.log", kv_transfer_config=config, blocks=160) as engine:
        hit = engine.ask(PROMPT)
        assert hit["cached"] >= 288
        assert hit["tokens"] == cold["tokens"]
        assert engine.counters()["promoted_pages:fs"] > 0


def test_latent_attention(deepseek: Path, tmp_path: Path) -> None:
    """MLA: one latent row per token, two blocks per chunk."""
    config = connector(blocks_per_chunk=2, secondary_tiers=[{"type": "memory"}])
    with Engine(deepseek, tmp_path / "1.log", kv_transfer_config=config, blocks=48) as engine:
        cold = engine.ask(PROMPT)
        engine.push_out(OTHERS)
        hit = engine.ask(PROMPT)
        assert (cold["cached"], hit["tokens"]) == (0, cold["tokens"])
        assert hit["cached"] >= 288
        assert engine.reset(connector=True)
        again = engine.ask(PROMPT)
        assert again["tokens"] == cold["tokens"]
        assert again["cached"] >= 288
        assert engine.counters()["promoted_pages:memory"] > 0
