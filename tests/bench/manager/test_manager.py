"""The manager's benchmark measures what it says; no look at the speed."""

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.bench.manager.__main__ as command
from tests.bench.manager.contestants import OURS, STOCK
from tests.bench.manager.rounds import (
    ARRIVE,
    EVICTING,
    HIT,
    LOAD,
    PROMOTING,
    Figure,
    Player,
    WrongAnswer,
    measure,
)

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs an installed vLLM"
)


def figure(contestant: str, value: float, **changes: object) -> Figure:
    made = Figure(contestant, 0, 1000, HIT, "us/chunk", value)
    return made._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("tiers", [0, 1])
def test_both_managers_have_the_same_figures(tiers: int) -> None:
    figures = list(measure(1000, tiers, 2))
    cases = {name: {f[1:-1] for f in figures if f.contestant == name} for name in (OURS, STOCK)}
    assert len(figures) == len({f[:-1] for f in figures}) == 2 * len(cases[OURS])
    assert cases[OURS] == cases[STOCK]
    operations = {figure.operation for figure in figures}
    promotions = {PROMOTING, ARRIVE}
    assert promotions < {*command.TARGETED}
    assert operations & promotions == (promotions if tiers else set())
    assert operations >= {*command.TARGETED} - promotions


class Forgetful:
    """Stands for a manager; finds nothing and stores all but one chunk."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None

    def lookup(self, key: bytes, request: object) -> Any:
        from vllm.v1.kv_offload.base import LookupResult

        return LookupResult.MISS

    def prepare_store(self, keys: list[bytes], request: object) -> Any:
        from vllm.v1.kv_offload.base import LoadStoreSpec, PrepareStoreOutput

        return PrepareStoreOutput(keys[1:], LoadStoreSpec(), [])  # type: ignore[arg-type]


@pytest.mark.vllm
@needs_vllm
def test_a_manager_that_does_something_else_is_found_out() -> None:
    player = Player(Forgetful())
    keys = [bytes([index]) * 36 for index in range(4)]
    with pytest.raises(WrongAnswer, match="not all chunks"):
        player.store("new", keys, EVICTING)
    with pytest.raises(WrongAnswer, match="not all look-ups said HIT"):
        player.load("old", keys)


def test_growth_is_the_most_pages_by_the_fewest() -> None:
    figures = [figure(OURS, 0.6), figure(STOCK, 1.0)]
    figures += [f._replace(resident=10**6, value=f.value * 2) for f in figures]
    assert command.growth(figures).values == [(2.0, "lookup, hit (1,000,000, 0 tiers)")]


def test_only_operations_with_a_target_are_judged() -> None:
    figures = [figure(OURS, 1.0, operation=name) for name in (LOAD, "on_new_request")]
    figures += [f._replace(contestant=STOCK, value=2.0) for f in figures]
    found = command.AGAINST_STOCK.held(figures)
    assert found.values == [(0.5, "prepare_load (1,000, 0 tiers)")]
    assert len(command.growth(figures).values) == 1


def test_the_command_prints_the_ratios_and_appends_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(resident: int, tiers: int, rounds: int) -> Iterator[Figure]:
        for name in (OURS, STOCK):
            yield figure(name, 1.0 + resident, resident=resident, tiers=tiers)

    monkeypatch.setattr(command, "measure", small)
    path = tmp_path / "manager.csv"
    for _ in range(2):
        command.main(path, [1000, 2000], [0, 1], 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("targets: 2 missed (time against stock <= 0.7 in 4 of 4")
    assert "1,000 kvstrata" in printed[1] and printed[2].startswith("0      lookup, hit")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {"machine", "vllm", *Figure._fields} <= set(rows[0])
