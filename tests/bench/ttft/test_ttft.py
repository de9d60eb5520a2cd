"""The TTFT benchmark asks what it says and compares like with like; no look at the speed."""

import csv
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import typer

import tests.bench.ttft.__main__ as command
from kvstrata.offload.config.offload_config import parse_config
from tests.bench.ttft.__main__ import OFF, ON, Figure, compare, offload_config
from tests.bench.ttft.workloads import (
    CHUNK_BLOCKS,
    CPU_TOKENS,
    GPU_BLOCKS,
    LONG,
    warm_up,
    workloads,
)
from tests.engine.driver import BLOCK, Engine

NAMES = ["no reuse", "full reuse", "half reuse", "many short", "few long"]
CHUNK = CHUNK_BLOCKS * BLOCK


def test_the_workloads_reuse_what_they_say_and_never_from_the_gpu_or_the_cpu() -> None:
    found = {workload.name: workload for workload in workloads(1, 2)}
    assert [*found] == NAMES
    assert LONG < (GPU_BLOCKS - 1) * BLOCK < 2 * LONG
    for name in ("no reuse", "half reuse"):
        measured = found[name].measured
        assert len({*map(tuple, measured)}) == len(measured)
    assert found["no reuse"].prepare == []
    for name in ("full reuse", "many short", "few long"):
        prepare, measured = found[name][1:]
        assert measured == [*prepare, *prepare]
        assert sum(len(prompt) // CHUNK * CHUNK for prompt in prepare) > CPU_TOKENS
    prepare, measured = found["half reuse"][1:]
    assert [list(prompt[: len(prompt) // 2]) for prompt in measured] == [*prepare, *prepare]
    assert sum(map(len, prepare)) > CPU_TOKENS
    assert len(found["few long"].measured[0]) == LONG


class FakeEngine:
    """Answers in a time of its own; what it is asked for is noted in `order`."""

    def __init__(self, seconds: float, cached: int, order: list["FakeEngine"]) -> None:
        self.answer = {"seconds": seconds, "cached": cached}
        self.order = order
        self.asked: list[tuple[int, ...]] = []

    def ask(self, prompt: Sequence[int], max_tokens: int) -> dict[str, float]:
        assert max_tokens == 1
        self.asked.append(tuple(prompt))
        self.order.append(self)
        return self.answer


def test_both_engines_get_the_same_requests_in_changing_order() -> None:
    order: list[FakeEngine] = []
    one, other = FakeEngine(0.2, 0, order), FakeEngine(0.1, 16, order)
    figures = list(compare(cast(Engine, one), cast(Engine, other), "slow", ON, 1))
    assert [figure.workload for figure in figures] == NAMES
    assert one.asked == other.asked
    assert one.asked[: len(warm_up(0))] != [*map(tuple, warm_up(0))]
    assert {first is one for first in order[::2]} == {True, False}
    assert all({order[i], order[i + 1]} == {one, other} for i in range(0, len(order), 2))
    short = figures[3]
    assert short[:3] == ("slow", ON, "many short")
    assert short[3:] == pytest.approx((200.0, 100.0, 0.5, 0.1))


def figure(ratio: float, setting: str = ON, workload: str = "no reuse") -> Figure:
    return Figure("slow", setting, workload, 100.0, 100.0 * ratio, ratio, 0.0)


def test_what_ran_with_load_or_recompute_is_judged() -> None:
    (nothing,) = command.held([figure(3.0, OFF), figure(2.0, "")])
    assert nothing.values == []
    (found,) = command.held([figure(1.02), figure(3.0, OFF), figure(1.2, workload="few long")])
    assert found.values == [(1.02, "no reuse (slow)"), (1.2, "few long (slow)")]
    assert (found.bound, found.at_most) == (1.03, True)


def test_the_command_prints_the_ratios_and_appends_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(root: Path, links: list[str], settings: list[str], rounds: int) -> Iterator[Figure]:
        for setting in settings:
            yield figure(1.0, setting)

    monkeypatch.setattr(command, "measure", small)
    path = tmp_path / "ttft.csv"
    for _ in range(2):
        command.main(tmp_path / "root", path, ["slow"], [ON, OFF], 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("targets: 1 met (TTFT")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {"machine", "vllm", *Figure._fields} <= set(rows[0])
    assert list((tmp_path / "root").iterdir()) == []
    for wrong in ({"link": ["dead"]}, {"load_or_recompute": ["maybe"]}):
        with pytest.raises(typer.BadParameter, match="is none of"):
            command.main(tmp_path / "root", **cast(Any, wrong))


def test_every_case_is_compared_with_the_engine_without_offload_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, bool]] = []
    closed = []

    class Started(FakeEngine):
        def close(self) -> None:
            closed.append(self)

    def start(folder: Path, name: str, offload: dict[str, Any] | None) -> Engine:
        started.append((name, offload is not None))
        return cast(Engine, Started(0.1, 0, []))

    monkeypatch.setattr(command, "start", start)
    figures = list(command.measure(tmp_path, ["slow", "fast"], [ON], 1))
    assert started == [("without", False), ("none-", False), ("slow-on", True), ("fast-on", True)]
    assert len(closed) == 4
    cases = [*dict.fromkeys(figure[:2] for figure in figures)]
    assert cases == [("none", ""), ("slow", ON), ("fast", ON)]


@pytest.mark.parametrize("setting", [ON, OFF])
def test_the_engines_configuration_is_one(setting: str, tmp_path: Path) -> None:
    config = parse_config(offload_config(tmp_path, 1e6, setting))
    assert config.load_or_recompute == (setting == ON)
    assert len(config.tiers) == 1


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs an installed vLLM")
def test_an_engine_loads_from_the_tier_behind_the_link(tmp_path: Path) -> None:
    prompts = workloads(1, 1)[1].prepare
    with command.start(tmp_path, "offload", offload_config(tmp_path / "kv", 1e9, OFF)) as engine:
        cold = [engine.ask(prompt, max_tokens=1) for prompt in prompts]
        before = engine.counters()
        answer = engine.ask(prompts[0], max_tokens=1)
        counters = engine.counters()
    assert [each["cached"] for each in cold] == [0] * len(prompts)
    assert answer["cached"] >= len(prompts[0]) - CHUNK
    assert answer["seconds"] > 0
    promoted = "promoted_pages:ThrottledTier"
    assert counters[promoted] - before.get(promoted, 0) == len(prompts[0]) // CHUNK
