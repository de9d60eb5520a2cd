"""What happens to requests and caches while an engine lives, all on one engine.

The engine's GPU transfers take some steps, so that things happen while they are under way.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import Engine, connector, prompt
from tests.waiting import wait_until

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
        engine.slow_transfers(2, 4)
        yield engine


def check_that_nothing_is_held(engine: Engine) -> None:
    """All slots are free or can be evicted, and no request or transfer is remembered."""

    def is_unused() -> bool:
        engine.ask("a", max_tokens=4)  # pages kept for a request are given up in the next steps
        counters = engine.counters()
        return bool(counters["unused"] == counters["slots"])

    wait_until(is_unused)  # what an aborted request was promoted may still be on its way
    held = engine.held()
    assert not any(held.values()), held


def asked(text: str, **request: Any) -> dict[str, Any]:
    """A request for `Engine.run`."""
    return {"prompt": text, "max_tokens": 12, **request}


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
    assert engine.counters()["failures"] == {"fs": {}}
    check_that_nothing_is_held(engine)


@pytest.mark.parametrize("under_way", ["promotion", "load"])
def test_abort_while_pages_are_on_their_way(engine: Engine, under_way: str) -> None:
    """Once alone, and once beside a request that waits for the same pages."""
    text = prompt({"promotion": 21, "load": 22}[under_way])
    cold = engine.ask(text)
    abort = [{"when": under_way, "do": "abort", "request": 0}]
    for others in (0, 1):
        # the pages are left in the files only, or in the CPU tier
        assert engine.reset(connector=under_way == "promotion")
        answers = engine.run([asked(text)] * (1 + others), abort)
        assert answers[0] is None
        for answer in answers[1:]:
            assert answer is not None
            assert answer["cached"] >= 256
            assert answer["tokens"] == cold["tokens"]
        check_that_nothing_is_held(engine)
    assert engine.reset(connector=under_way == "promotion")
    hit = engine.ask(text)
    assert hit["cached"] >= 256
    assert hit["tokens"] == cold["tokens"]


def test_abort_while_pages_are_being_stored(engine: Engine) -> None:
    text = prompt(23)
    abort = {"when": "store", "do": "abort", "request": 0}
    assert engine.run([asked(text)], [abort]) == [None]
    check_that_nothing_is_held(engine)
    assert engine.reset(connector=False)
    hit = engine.ask(text)
    assert hit["cached"] >= 256
    assert engine.reset(connector=True)
    assert hit["tokens"] == engine.ask(text, params={"max_load_tokens": 0})["tokens"]


@pytest.mark.parametrize("under_way", ["promotion", "load", "store"])
def test_reset_while_pages_are_on_their_way(engine: Engine, under_way: str) -> None:
    """The request that they belong to goes on, with the tokens it would have had."""
    text = prompt({"promotion": 24, "load": 25, "store": 26}[under_way])
    other = prompt(27)
    if under_way != "store":
        engine.ask(text)
    assert engine.reset(connector=under_way == "promotion")
    resets = engine.counters()["resets"]
    reset = {"when": under_way, "do": "reset", "connector": True}
    answers = engine.run([asked(text), asked(other, arrives=2)], [reset])
    assert engine.counters()["resets"] == resets + 1
    check_that_nothing_is_held(engine)
    for each, answer in zip((text, other), answers, strict=True):
        assert engine.reset(connector=True)
        assert answer is not None
        assert engine.ask(each, params={"max_load_tokens": 0})["tokens"] == answer["tokens"]


def test_sleep_keeps_the_files(engine: Engine) -> None:
    """vLLM tells connectors nothing of sleep but that it resets them.

    `EngineCore.sleep` aborts the requests and resets the prefix cache with its connector
    before the workers give up their memory; a CPU worker has none to give up.
    """
    text = prompt(28)
    cold = engine.ask(text)
    engine.generate([prompt(29)], max_tokens=2)  # its stores are under way
    promoted = engine.counters().get("promoted_pages:fs", 0)
    engine.sleep(1)
    engine.wake_up()
    hit = engine.ask(text)
    assert hit["cached"] >= 256
    assert hit["tokens"] == cold["tokens"]
    assert engine.counters()["promoted_pages:fs"] > promoted
    check_that_nothing_is_held(engine)
