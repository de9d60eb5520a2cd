"""Limits, marks, and what a file costs."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs.budget.limits import (
    HIGH,
    LOW,
    Limits,
    Usage,
    file_cost,
    parse_space,
    smallest,
)


@pytest.mark.parametrize(
    ("size", "cost"), [(0, 4096), (1, 8192), (4096, 8192), (4097, 12288), (2**21, 2**21 + 4096)]
)
def test_file_cost(size: int, cost: int) -> None:
    assert file_cost(size) == cost


@pytest.mark.parametrize(
    ("value", "expected"),
    [("10%", Fraction(1, 10)), (" 2.5 %", Fraction(1, 40)), ("1KiB", 1024), (5, 5)],
)
def test_min_free(value: object, expected: object) -> None:
    assert parse_space("x", value) == expected


@pytest.mark.parametrize("value", ["0%", "100%", "-1%", "%", "ten", 0, True, None, 0.5])
def test_wrong_min_free(value: object) -> None:
    with pytest.raises(TierConfigError, match="x: "):
        parse_space("x", value)


def test_the_smallest_rules() -> None:
    assert smallest([]) == Limits() and not Limits()
    found = smallest([Limits(100, 0, 5), Limits(0, 7, 9), Limits(50, 8, 0)])
    assert found == Limits(max_bytes=50, max_files=7, min_free_bytes=9)


sizes = st.integers(0, 2**50)


@given(st.builds(Limits, sizes, sizes, sizes), st.builds(Usage, sizes, sizes, sizes), sizes)
def test_what_room_holds_keeps_every_limit(limits: Limits, usage: Usage, cost: int) -> None:
    within = (
        (not limits.max_bytes or usage.nbytes + cost <= limits.max_bytes)
        and (not limits.max_files or usage.files + 1 <= limits.max_files)
        and (not limits.min_free_bytes or usage.free_bytes - cost >= limits.min_free_bytes)
    )
    assert limits.room(usage).holds(cost) == within
    low, high, full = (limits.room(usage, mark) for mark in (LOW, HIGH, Fraction(1)))
    assert low.nbytes <= high.nbytes <= full.nbytes and low.files <= high.files <= full.files
