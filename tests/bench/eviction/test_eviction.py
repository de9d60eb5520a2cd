"""The eviction benchmark plays what it says and holds `auto` against its targets."""

import csv
from pathlib import Path

import pytest

import tests.bench.eviction.__main__ as command
from kvstrata.kernels.bench.results.targets import summary
from tests.bench.eviction.__main__ import AUTO, ORDERS, Figure, held, measure, rows
from tests.bench.manager.contestants import OURS


def figures(load: str, auto: float) -> list[Figure]:
    values = {order: auto if order == AUTO else 0.5 for order in ORDERS}
    return [Figure(load, 1, 8, *order, value, 0.8) for order, value in values.items()]


def test_auto_alone_is_held_against_what_it_should_load() -> None:
    found = held([*figures("documents", 0.4), *figures("5 x 64", 0.84)])
    cases = ["documents, 1 groups, 8 a step", "5 x 64, 1 groups, 8 a step"]
    assert [case for _, case in found.values] == cases
    assert [round(value) for value, _ in found.values] == [50, 105]
    assert summary([found]).endswith(f">= 100 in 1 of 2, worst: 50.00 {cases[0]})")


def test_a_load_is_a_line() -> None:
    headings, documents, cycle = rows([*figures("documents", 0.4), *figures("5 x 64", 0.84)])
    assert headings[-2:] == [f"{OURS} auto", "target"]
    assert documents == ["documents", "1", "8", *["0.500"] * 4, "0.400", "0.800"]
    assert cycle[-2] == "0.840"


def test_the_command_appends_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(groups: int, step: int) -> list[Figure]:
        return [f._replace(groups=groups, step=step) for f in figures("documents", 0.9)]

    monkeypatch.setattr(command, "measure", one)
    command.main(tmp_path / "eviction.csv")
    assert capsys.readouterr().out.splitlines()[-1].startswith("targets: 1 met (auto, ")
    with (tmp_path / "eviction.csv").open(newline="") as file:
        assert len([*csv.DictReader(file)]) == 4 * len(ORDERS)


@pytest.mark.vllm
def test_every_order_loads_every_load(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr(command, "MIXED", {})
    monkeypatch.setattr(command, "CYCLES", {"2 x 64": (2, 64)})
    found = measure(2, 32)
    assert [figure[3:5] for figure in found] == [*ORDERS]
    # both fit: all but the first time around is loaded
    assert {figure.value for figure in found} == {1 - 2 / 40}
