"""An engine serves while the memory of its CPU tier is still being reserved."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.primary import progress  # noqa: E402
from kvstrata.offload.primary.region import Region, RegionError  # noqa: E402
from kvstrata.offload.vllm_plugin.registration import RegistrationError  # noqa: E402
from tests.engine.driver import region_files  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import ModellessEngine  # noqa: E402
from tests.offload.vllm_plugin.test_other_kinds_of_cache import Start, full, text  # noqa: E402
from tests.waiting import PATIENCE_S, wait_until  # noqa: E402

SLOT_BYTES = 4096
MANY = "9MiB"  # over a thousand slots beside the header
FIRST = 64  # of them, of each worker


class Memory:
    """Stands before `Region.reserve`: after each worker's first range it waits, or fails."""

    def __init__(self) -> None:
        self.more = threading.Event()
        self.short = False
        self._reserve = Region.reserve

    def reserve(self, region: Region, slots: range) -> None:
        if slots.start >= region.progress.first_slots:
            assert self.more.wait(PATIENCE_S)
            if self.short:
                raise RegionError("too little is free: lower cpu_bytes_to_use")
        self._reserve(region, slots)


@pytest.fixture
def memory(start: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Nobody waits for it any more when engines are closed."""
    made = Memory()
    monkeypatch.setattr(progress, "RANGE_BYTES", FIRST * SLOT_BYTES)
    monkeypatch.setattr(Region, "reserve", lambda region, slots: made.reserve(region, slots))
    yield made
    made.more.set()


def open_engine(start: Start, tp: int) -> ModellessEngine:
    layers: Any = {"l": (full(4 // tp), "FLASH_ATTN")}
    engine = start(layers, tp=tp, extra={"cpu_bytes_to_use": MANY})
    assert FIRST // 2 * tp < engine.manager.primary.slots <= FIRST * tp
    assert engine.manager.not_ready > 0
    return engine


@pytest.mark.parametrize("tp", [1, 2])
def test_the_first_requests_do_not_wait(memory: Memory, start: Start, tp: int) -> None:
    engine = open_engine(start, tp)
    assert engine.run(text(1)) == 0
    engine.reset()
    assert engine.run(text(1)) >= 288
    assert not memory.more.is_set() and engine.manager.not_ready > 0
    memory.more.set()
    left = engine.manager._ready
    wait_until(lambda: left() == engine.manager.primary.slots + engine.manager.not_ready)
    engine.reset()
    assert engine.run(text(1)) >= 288
    assert engine.manager.not_ready == 0
    # more than the first slots hold
    prompts = [text(seed) for seed in range(2, 2 + FIRST * tp // 9)]
    for prompt in prompts:
        assert engine.run(prompt) == 0
    engine.reset()
    assert min(engine.run(prompt) for prompt in prompts) >= 288


def test_a_shortage_at_the_start_refuses_it_on_all_workers(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reserve(region: Region, slots: range) -> None:
        if slots.start > 0:
            raise RegionError("too little is free: lower cpu_bytes_to_use")

    monkeypatch.setattr(Region, "reserve", reserve)
    with pytest.raises(RegistrationError, match=r"cache: worker 1: too little .*cpu_bytes_to_use"):
        open_engine(start, 2)
    assert region_files() == []


def test_an_engine_ends_while_memory_is_reserved(memory: Memory, start: Start) -> None:
    engine = open_engine(start, 2)
    assert engine.run(text(1)) == 0
    memory.more.set()
    engine.close()
    assert not any(t.name == "kvstrata-reserver" for t in threading.enumerate())


def test_an_engine_goes_on_with_what_it_has(
    memory: Memory,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = open_engine(start, 2)
    # vLLM's logger, which is its parent now, may keep lines to itself
    monkeypatch.setattr(logging.getLogger("kvstrata"), "parent", logging.getLogger())
    ready = engine.manager.primary.slots
    memory.short = True
    memory.more.set()
    wait_until(lambda: "lower cpu_bytes_to_use" in caplog.text)
    assert engine.run(text(1)) == 0
    engine.reset()
    assert engine.run(text(1)) >= 288
    assert engine.manager.primary.slots == ready
