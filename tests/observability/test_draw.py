"""The dashboard as it is drawn where there is no Grafana."""

from pathlib import Path
from typing import Any, cast

from tests.observability.draw import Span, draw_row, lines, save
from tests.observability.drawing import words
from tests.observability.prometheus import Prometheus
from tests.observability.queries import panels

SPAN = Span(1000.0, 1060.0)
LABELS = ("tier", "direction", "state", "wait", "reason", "cause", "operation", "result")


class Answers:
    """In place of a Prometheus: every query has two series, or none."""

    def __init__(self, number: int = 2) -> None:
        self.number = number
        self.asked: list[dict[str, str]] = []

    def get(self, path: str, **parameters: str) -> Any:
        self.asked.append(parameters)
        values = [[SPAN.start + 5 * step, f"{step + 1}"] for step in range(12)]
        series = [
            {"metric": dict.fromkeys(LABELS, f"l{n}"), "values": values} for n in range(self.number)
        ]
        return {"resultType": "matrix", "result": series}


def test_a_legend_has_the_labels() -> None:
    answers = Answers()
    for panel in panels():
        for target in panel["targets"]:
            found = list(lines(target, cast(Prometheus, answers), SPAN))
            assert [line.times[:2] for line in found] == [[0.0, 5.0]] * 2
            assert not any("{" in line.legend for line in found)
    assert all("$" not in asked["query"] for asked in answers.asked)


def test_a_row_is_drawn_with_values_and_without(tmp_path: Path) -> None:
    row = "What went wrong?"
    for number in (2, 0):
        picture = draw_row(row, cast(Prometheus, Answers(number)), SPAN)
        titles = {axes.get_title() for axes in picture.axes} - {""}
        assert titles == {panel["title"] for panel in panels(row)}
        texts = [text.get_text() for axes in picture.axes for text in axes.texts]
        assert texts.count("none so far") == (0 if number else len(titles))
        save(picture, tmp_path / "row.png")
        assert 1000 < (tmp_path / "row.png").stat().st_size < 100_000


def test_values_have_their_unit() -> None:
    assert [words(*each) for each in ((0.25, "s"), (130, "s"), (3 * 2**30, "bytes"))] == [
        *("250 ms", "130 s", "3 GiB")
    ]
    assert words(-2.5e6, "Bps") == "-2.5 MB/s" and words(0.125, "percentunit") == "12.5 %"
    assert words(166, "suffix: tokens/s") == "166 tokens/s" and words(1500, "short") == "1.5 k"
