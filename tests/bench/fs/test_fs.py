"""The benchmark measures what it says, with small pages and no look at the speed."""

import csv
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import tests.bench.fs.__main__ as command
from kvstrata.kernels.bench.results.targets import summary
from tests.bench.fs import budget, lookups, transfers
from tests.bench.fs.contestants import Ours, Raw, Stock
from tests.bench.fs.figures import Figure
from tests.bench.fs.targets import TARGETS
from tests.bench.jobs import Memory, WrongBytes

PAGE = 4096


def names(figures: Sequence[Figure]) -> set[str]:
    return {figure.contestant for figure in figures}


def of_page(contestant: str, value: float, **changes: object) -> Figure:
    figure = Figure(contestant, "store", "16 jobs of 4", "idle", 2**19, "GB/s", value)
    return figure._replace(**changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where vLLM is not installed, and each round once only."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: "vllm" not in n and found(n))
    monkeypatch.setattr(transfers, "_MOST_OFTEN", 1)
    monkeypatch.setattr(lookups, "KEYS", 64)


def test_each_case_has_its_figures(tmp_path: Path) -> None:
    figures = list(transfers.measure(tmp_path, PAGE, 1))
    speeds = [f for f in figures if f.metric == "GB/s"]
    assert len(speeds) == len({f[:-1] for f in speeds}) == 2 * 2 * 3 * 2  # shape, engine, ...
    assert names(figures) == {Ours.name, Raw.name}
    assert all(figure.value > 0 for figure in figures)
    assert {f.shape for f in figures if f.metric == "job p99 ms"} == {"16 jobs of 4"}
    kept = {path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert kept == {0}


@pytest.mark.parametrize("operation", ["load cold", "load warm"])
def test_a_contestant_that_loads_other_bytes_is_found_out(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, operations = Raw.move, iter(transfers.OPERATIONS)

    def flip(self: Raw, store: bool, keys: Sequence[bytes], per_job: int) -> list[float]:
        times = move(self, store, keys, per_job)
        if next(operations) == operation:
            self.view[5 * PAGE] ^= 1
        return times

    make = Raw.__init__

    def keep_view(self: Raw, root: Path, memory: object) -> None:
        make(self, root, memory)  # type: ignore[arg-type]
        self.view = memory.view  # type: ignore[attr-defined]

    monkeypatch.setattr(Raw, "__init__", keep_view)
    monkeypatch.setattr(Raw, "move", flip)
    with pytest.raises(WrongBytes, match=f"raw: {operation}"):
        list(transfers.measure(tmp_path, PAGE, 1))


def test_lookups_and_the_index_have_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "INDEXED", 100_000)
    figures = [*lookups.measure_time(tmp_path, 1), *lookups.measure_memory()]
    assert [figure.operation for figure in figures] == [
        "lookup, first",
        "lookup, unknown",
        "lookup, repeated",
        "index",
    ]
    # a dict of 36-byte keys has 69 bytes per key at least
    assert figures[-1].value > 69 and all(figure.value > 0 for figure in figures)


def test_each_target_is_of_its_figures() -> None:
    figures = [of_page(Ours.name, 1.9), of_page(Stock.name, 2.0), of_page(Raw.name, 2.0)]
    figures += [f._replace(operation="load warm") for f in figures]
    first = Figure(Ours.name, "lookup, first", "9 keys", "idle", 0, "us/key", 3.0)
    again = first._replace(operation="lookup, repeated", value=8.0)
    figures += [f for ours in (first, again) for f in (ours, ours._replace(contestant=Stock.name))]
    line = summary(target.held(figures) for target in TARGETS)
    assert "3 met (idle, against stock: 0.95 >= 0.95, the worst of 1 case; lookup, against" in line
    assert "1 missed (load warm, against stock >= 4 in 1 of 1, worst: 0.95 idle 512 KiB" in line
    assert f"{len(TARGETS) - 4} not measured (busy, against stock;" in line


def test_the_command_writes_everything_and_ends_well_when_targets_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lookups, "INDEXED", 1000)
    monkeypatch.setattr(budget, "_PAGE_BYTES", PAGE)
    command.main(Path("root"), Path("fs.csv"), Path("fs.png"), 1, 50, [4])
    printed = capsys.readouterr().out.splitlines()
    assert "stock vLLM is not installed: measuring against the device only" in printed
    assert printed[-1].startswith("targets: ")
    with open("fs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"machine", "kernel", "python", "vllm", *Figure._fields} <= set(rows[0])
    asked = {f"lookup, {which}" for which in ("first", "unknown", "repeated")}
    operations = {*transfers.OPERATIONS, *asked, "index"}
    starts = {row["operation"] for row in rows if row["metric"] == "s"}
    assert {row["operation"] for row in rows} - starts == {*operations, budget.OPERATION}
    assert {"start", "first look-up", "first scan", "index loaded"} <= starts
    assert Path("fs.png").read_bytes().startswith(b"\x89PNG")
    assert list(Path("root").iterdir()) == []


@pytest.mark.vllm
def test_stock_is_measured_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.undo()
    memory = Memory(PAGE, transfers.PAGES)
    stock = Stock(tmp_path, memory)
    transfers.verify(stock, memory, 4)
    keys = [os.urandom(32) + bytes(4) for _ in range(transfers.PAGES)]
    assert len(stock.move(True, keys, 4)) == 16
    first, repeated = lookups.ask(stock, keys)
    assert first > 0 and repeated > 0
    stock.close()
    memory.close()
