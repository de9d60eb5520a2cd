"""Comparisons off the engine's thread: in order, and never an exception into the engine."""

import logging
from concurrent.futures import wait

import pytest

from kvstrata.offload.audit.comparer import Comparer
from kvstrata.offload.audit.comparison import Elements, Verdict

PAGE = 64  # bytes


def page(number: int) -> memoryview:
    return memoryview(bytes([number]) * PAGE)


def test_pages_are_compared_by_one_thread() -> None:
    comparer = Comparer({0: [Elements(PAGE, "U8", PAGE, 1)]})
    futures = [comparer.submit(0, page(1), page(number)) for number in (1, 2)]
    assert not wait(futures, 10).not_done
    verdicts = [
        found.comparison and found.comparison.verdict
        for found in (each.result() for each in futures)
    ]
    assert verdicts == [Verdict.EQUAL, Verdict.DIFFERENT]


def test_a_comparison_that_fails_is_no_verdict_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    comparer = Comparer({})
    with caplog.at_level(logging.ERROR, "kvstrata.audit"):
        ends = [comparer.submit(7, page(1), page(1)).result(10) for _ in range(2)]
    assert [end.comparison for end in ends] == [None, None]
    assert len([r for r in caplog.records if "group 7 cannot be compared" in r.message]) == 1
