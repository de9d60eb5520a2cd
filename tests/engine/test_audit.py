"""Audits on the real engine: a sound store stays in use, one of another model is found."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from tests.engine.driver import Engine, connector, prompt

pytestmark = pytest.mark.vllm

PROMPTS = [prompt(seed) for seed in range(12)]  # 320 tokens each, 10 pages
FROM_NOWHERE = {"kv_load_tiers": []}  # the tiers are offered what is computed, and give nothing
# Two steps for a prompt, one, and steps in which several prompts meet
SHAPES: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 192, "max_num_seqs": 1},
    {"max_num_batched_tokens": 2048, "max_num_seqs": 1},
    {"max_num_batched_tokens": 512, "max_num_seqs": 4},
    {"max_num_batched_tokens": 2048, "max_num_seqs": 4, "tp": 2},
]


def offload(root: Path, **extra: Any) -> dict[str, Any]:
    return connector(secondary_tiers=[{"type": "fs", "root_dir": str(root)}], **extra)


def compute_again(engine: Engine, texts: list[str]) -> None:
    """Let the engine compute what the files hold."""
    engine.reset(connector=True)
    engine.generate(texts, max_tokens=1, params=FROM_NOWHERE)
    engine.settle()


def check_soundness(engine: Engine, audits: int, seed: int) -> None:
    """So many audits find nothing wrong."""
    choose = random.Random(seed)
    found = engine.counters()
    while found.get("audit_pages", 0) < audits:
        compute_again(engine, choose.sample(PROMPTS, choose.randint(1, 4)))
        found = engine.counters()
    assert found["audit_different"] == 0
    assert found["failures"] == {"fs": {}}
    assert engine.distrusted() == []


def test_a_sound_store_stays_in_use(llama: Path, tmp_path: Path, is_long: bool) -> None:
    """Pages that one engine wrote, and engines of other batch shapes and TP sizes compute."""
    audits = 500 if is_long else 40
    root = tmp_path / "kv"
    shapes = SHAPES if is_long else SHAPES[:1]
    for number, shape in enumerate(shapes):
        log = tmp_path / f"{number}.log"
        config = offload(root)
        with Engine(llama, log, kv_transfer_config=config, blocks=64, **shape) as engine:
            if number == 0:
                engine.generate(PROMPTS, max_tokens=1)
                engine.settle()
            check_soundness(engine, audits, number)
            # and what audits do not withhold is still served
            engine.reset(connector=True)
            assert engine.ask(PROMPTS[0])["cached"] >= 288


def trust(root: Path) -> str:
    """The operator's word."""
    (home,) = (path.parent for path in root.glob("*/config.json"))
    done = CliRunner().invoke(app, ["trust", str(root), home.name])
    assert done.exit_code == 0, done.output
    return done.output


def test_pages_of_another_rope_base_are_found(llama: Path, tmp_path: Path) -> None:
    """They were forced into the same namespace, as by a field that nobody thought of."""
    root, log = tmp_path / "kv", tmp_path / "2.log"
    writer = offload(root)
    other_base = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    with Engine(
        llama, tmp_path / "1.log", kv_transfer_config=writer, blocks=64, hf_overrides=other_base
    ) as engine:
        engine.generate(PROMPTS, max_tokens=1)
        engine.settle()
    (config,) = root.glob("*/config.json")
    with Engine(llama, tmp_path / "reference.log", kv_transfer_config=None, blocks=64) as engine:
        right = [engine.ask(text)["tokens"] for text in PROMPTS[:3]]

    reader = offload(root, audit_fraction=1.0)
    with Engine(llama, log, kv_transfer_config=reader, blocks=64, namespace_of=config) as engine:
        # Three prompts of its own: of what it computes, so much may be withheld for audits.
        engine.generate([prompt(seed) for seed in range(100, 103)], max_tokens=1)
        assert engine.ask(PROMPTS[0], max_tokens=1)["cached"] >= 288  # nothing is known yet
        engine.ask(PROMPTS[1], max_tokens=1)
        found = engine.counters()
        assert (found["audits_forced"], found["audit_pages"]) == (1, 1)
        assert found["audit_different"] == 1, "the first audit finds it"
        assert found["tiers"]["fs"]["rejected_pages"] == 1
        # both pages are kept, with the reason in their names
        kept = [path.name.split("-", 1)[1] for path in root.glob("*_r0/quarantine/*")]
        stored, computed = sorted(kept, key=len)
        assert stored.startswith("audit-")
        assert computed == stored.replace("audit-", "audit-computed-")

        deadline = time.monotonic() + 60
        while not engine.distrusted():
            assert time.monotonic() < deadline
            compute_again(engine, PROMPTS[2:4])
        assert engine.distrusted() == ["fs"]
        assert engine.counters()["audit_different"] >= 3
        for text, tokens in zip(PROMPTS, right, strict=False):
            engine.reset(connector=True)
            answer = engine.ask(text)
            assert (answer["cached"], answer["tokens"]) == (0, tokens), "nothing more is served"
        said = trust(root)
        assert "is trusted again" in said and "audits found pages" in said
        deadline = time.monotonic() + 60
        while engine.distrusted():  # it hears of it
            assert time.monotonic() < deadline
            engine.ask(prompt(200), max_tokens=1)
            time.sleep(0.2)
        engine.reset(connector=True)
        assert engine.ask(PROMPTS[5], max_tokens=1)["cached"] > 0
    logged = log.read_text()
    assert "NOT what this engine computes" in logged and f"kvstrata trust {root}" in logged
