"""`max_offload_tokens` below a prompt's partial tail, over which vLLM's connector would end the
engine of a hybrid model."""

from pathlib import Path

import pytest

from tests.engine.conftest import CHECKPOINTS
from tests.engine.driver import Engine, connector, prompt
from tests.hybrid_models import tiny_lfm2

pytestmark = pytest.mark.vllm


def test_a_cap_below_the_partial_tail(tmp_path: Path) -> None:
    prompts = {tokens: prompt(tokens, 300) for tokens in (0, 40, 296)}  # the tail ends at 296
    with Engine(
        tiny_lfm2(CHECKPOINTS),
        tmp_path / "log",
        kv_transfer_config=connector(),
        blocks=60,
        max_model_len=352,
        prefix_match_unit=8,
        enable_prefix_caching=True,
    ) as engine:
        for tokens, text in prompts.items():
            assert engine.ask(text, params={"max_offload_tokens": tokens})["tokens"]
        assert engine.ask(prompt(1, 300))["tokens"], "the engine lives"
