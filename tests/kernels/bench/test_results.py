"""Figures, targets and tables of any benchmark."""

import csv
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstrata.kernels.bench.results.figures import append_csv, machine
from kvstrata.kernels.bench.results.tables import print_table, shown
from kvstrata.kernels.bench.results.targets import Held, Target, ratios, summary


class Figure(NamedTuple):
    contestant: str
    case: str
    value: float


OURS = [Figure("ours", "store", 3.0), Figure("ours", "load", 1.0), Figure("ours", "ask", 5.0)]
THEIRS = [Figure("one", "store", 2.0), Figure("other", "store", 4.0), Figure("one", "load", 0.5)]
NOTHING = Figure("one", "ask", 0.0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_file_grows_below_one_line_of_names(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    append_csv(path, OURS[:1])
    append_csv(path, OURS[1:])
    assert [row["value"] for row in rows(path)] == ["3.0", "1.0", "5.0"]
    assert [*rows(path)[0]] == [*machine(), *Figure._fields]
    assert rows(path)[2]["machine"] == machine()["machine"]


def test_a_file_that_is_there_keeps_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    path.write_text("case,python,contestant,value\nstore,3.10,ours,1\n")
    append_csv(path, OURS[:1])
    here = {"case": "store", "python": machine()["python"], "contestant": "ours", "value": "3.0"}
    assert rows(path)[1] == here


def test_a_file_of_other_figures_is_refused_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    path.write_text("case,value\n")
    with pytest.raises(ValueError, match="contestant"):
        append_csv(path, OURS)
    assert path.read_text() == "case,value\n"


def test_a_figure_is_divided_by_the_largest_of_the_others() -> None:
    figures = [*OURS, *THEIRS, NOTHING]
    assert ratios(figures, "ours", "one") == {OURS[0]: 1.5, OURS[1]: 2.0}
    assert ratios(figures, "ours", "one", "other") == {OURS[0]: 0.75, OURS[1]: 2.0}
    assert ratios(figures, "ours", "absent") == {}


def test_a_target_holds_what_it_applies_to() -> None:
    alone = Target("alone", "ours", lambda figure: figure.case != "ask", 2.0)
    assert alone.held([*OURS, *THEIRS]) == ("alone", [(3.0, "store"), (1.0, "load")], 2.0, False)
    least = Target("least", "ours", lambda figure: True, 1.0, ("one",), at_most=True)
    assert least.held([*OURS, *THEIRS]).values == [(1.5, "store"), (2.0, "load")]


def test_the_summary_names_the_worst_first() -> None:
    assert summary([Held("fast", [(3.0, "store"), (2.5, "load")], 2.0), Held("far", [], 1.0)]) == (
        "targets: 1 met (fast: 2.50 >= 2, the worst of 2 cases), 1 not measured (far)"
    )
    values = [(1.5, "store"), (0.5, "ask"), (2.0, "load")]
    assert summary([Held("small", values, 1.0, at_most=True)]) == (
        "targets: 1 missed (small <= 1 in 2 of 3, worst: 2.00 load; 1.50 store)"
    )


def test_words_begin_and_numbers_end_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["case", "us"], ["a", shown(12.345)], ["bcdef", shown(None)]], 1)
    assert capsys.readouterr().out == "case      us\na      12.35\nbcdef\n"
