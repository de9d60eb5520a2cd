"""A real engine with vLLM's own TieringOffloadingSpec over a filesystem tier of ours."""

from pathlib import Path

import pytest

from kvstrata.tiers.registry import STOCK_MODULE
from tests.engine.driver import Engine, connector, prompt
from tests.spoiling import flip

pytestmark = pytest.mark.vllm

PROMPT = prompt(1)
BLOCKS = 10  # of 32 tokens; the prompt has one token more, which is computed in any case


def test_files_are_found_after_a_restart(llama: Path, tmp_path: Path) -> None:
    """With the same tokens, also when no file is any more what it was."""
    root = tmp_path / "kv"
    config = connector(
        spec_name="CpuTieringSpec",
        spec_module_path="tests.engine.stock_cpu",
        cpu_bytes_to_use=64 << 20,
        secondary_tiers=[
            {
                "type": "KVStrataFs",
                "module_path": STOCK_MODULE,
                "root_dir": str(root),
                "max_bytes": "1GiB",
                "min_free_bytes": 0,
            }
        ],
    )
    with Engine(llama, tmp_path / "log", kv_transfer_config=config) as engine:
        cold = engine.ask(PROMPT)
        assert cold["cached"] == 0
        assert engine.end() == []
    files = list(root.glob("*_r0/*/*/*.safetensors"))
    assert len(files) == BLOCKS
    with Engine(llama, tmp_path / "log 2", kv_transfer_config=config) as engine:
        warm = engine.ask(PROMPT)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == 32 * BLOCKS
        engine.push_out(range(100, 104))
        assert engine.reset(connector=True)  # the CPU tier's rows are gone, and the files stay
        for path in files:
            flip(path)
        spoilt = engine.ask(PROMPT)
        assert spoilt["tokens"] == cold["tokens"] and spoilt["cached"] == 0
        assert len(list(root.glob("*_r0/quarantine/*"))) > 0
        assert engine.end() == []
