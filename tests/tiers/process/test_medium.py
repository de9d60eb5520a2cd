"""What a medium's exceptions mean, and a server that is silent or slow."""

import time

import pytest

from kvstrata.tiers.page.form import BadPage
from kvstrata.tiers.process.medium import (
    MoveError,
    Outcome,
    PageRef,
    attempt,
    while_it_answers,
)
from kvstrata.tiers.testing import make_key

PAGES = [PageRef(make_key(n)) for n in range(10)]
VIEWS = [memoryview(bytearray(1))] * len(PAGES)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (BadPage("size", "long"), Outcome("size", gone=True, stuck=True, detail="long")),
        (MoveError("denied", "who are you"), Outcome("denied", detail="who are you")),
        (OSError("the disk"), Outcome("io-error", detail="the disk")),
        (KeyError("x"), Outcome("internal", detail="KeyError: 'x'")),
    ],
)
def test_what_an_error_means(error: Exception, outcome: Outcome) -> None:
    def move() -> Outcome:
        raise error

    assert attempt(move) == outcome


def test_a_page_that_failed_costs_no_other_and_silence_costs_all() -> None:
    asked: list[PageRef] = []

    def move(page: PageRef, view: memoryview, access: int) -> Outcome:
        asked.append(page)
        if page == PAGES[2]:
            raise MoveError("denied", "")
        if page == PAGES[4]:
            raise MoveError("silent", "nobody there")
        return Outcome(moved=True)

    outcomes = while_it_answers(move, PAGES, VIEWS, 0, "silent")
    assert [each.cause for each in outcomes] == [None, None, "denied", None, *["silent"] * 6]
    assert asked == PAGES[:5]


def test_a_task_of_many_slow_pages_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def move(page: PageRef, view: memoryview, access: int) -> Outcome:
        nonlocal now
        now += 4.0
        return Outcome(moved=True)

    outcomes = while_it_answers(move, PAGES, VIEWS, 0, "silent")
    assert [each.moved for each in outcomes] == [True] * 4 + [False] * 6
    assert {each.cause for each in outcomes[4:]} == {"silent"}
    assert "15 s" in outcomes[4].detail
