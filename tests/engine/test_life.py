"""What happens to requests and caches while an engine lives, all on one engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.driver import Engine, connector, prompt

pytestmark = pytest.mark.vllm

OTHERS = range(100, 104)


@pytest.fixture(scope="module")
def engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Few GPU blocks, two blocks per chunk, generated tokens stored as well."""
    folder = tmp_path_factory.mktemp("life")
    config = connector(
        blocks_per_chunk=2,
        offload_prompt_only=False,
        secondary_tiers=[{"type": "fs", "root_dir": str(folder / "kv")}],
    )
    with Engine(llama, folder / "log", kv_transfer_config=config) as engine:
        yield engine


def test_max_offload_tokens_bounds_what_is_stored(engine: Engine) -> None:
    text = prompt(1)
    before = engine.counters().get("stored_pages", 0)
    cold = engine.ask(text, params={"max_offload_tokens": 128})
    assert engine.counters()["stored_pages"] - before == 2  # 128 tokens in chunks of 64
    engine.push_out(OTHERS)
    hit = engine.ask(text, params={"max_offload_tokens": 0})
    assert (hit["cached"], hit["tokens"]) == (128, cold["tokens"])


def test_max_load_tokens_and_load_tiers(engine: Engine) -> None:
    text = prompt(2)
    cold = engine.ask(text)
    engine.push_out(OTHERS)
    some = engine.ask(text, params={"max_load_tokens": 192})
    assert (some["cached"], some["tokens"]) == (192, cold["tokens"])
    assert engine.reset(connector=True)  # only the files have it now
    none = engine.ask(text, params={"kv_load_tiers": []})
    assert (none["cached"], none["tokens"]) == (0, cold["tokens"])
    assert engine.reset(connector=True)
    files = engine.ask(text, params={"kv_load_tiers": [{"medium": "storage"}]})
    assert files["cached"] >= 256
    assert files["tokens"] == cold["tokens"]


def test_preemption_while_stores_are_in_flight(engine: Engine) -> None:
    """Requests that outgrow the GPU cache together; each must read as if it ran alone."""
    texts = [prompt(seed, length=160) for seed in (11, 12, 13)]
    together = engine.generate(texts, max_tokens=150)
    assert engine.counters()["preemptions"] > 0
    engine.settle()
    assert engine.reset(connector=False)
    for text, answer in zip(texts, together, strict=True):
        alone = engine.ask(text, max_tokens=150, params={"max_load_tokens": 0})
        assert alone["tokens"] == answer["tokens"]
        assert engine.reset(connector=False)
        loaded = engine.ask(text, max_tokens=150)
        assert loaded["cached"] >= 128
        assert loaded["tokens"] == answer["tokens"]


def test_reset_of_cache_and_connector(engine: Engine) -> None:
    text = prompt(3)
    cold = engine.ask(text)
    engine.generate([prompt(4)], max_tokens=2)  # its stores are under way at the reset
    assert engine.reset(connector=True)
    counters = engine.counters()
    hit = engine.ask(text)
    assert hit["cached"] >= 256
    assert hit["tokens"] == cold["tokens"]
    assert engine.counters()["promoted_pages:fs"] > counters.get("promoted_pages:fs", 0)
    counters = engine.counters()
    assert counters["unused"] == counters["slots"], "a slot is still held after all ended"
    assert counters["failures"] == {"fs": {}}
