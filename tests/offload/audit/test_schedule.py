"""How often pages are audited."""

import pytest

from kvstrata.offload.audit.schedule import (
    LONGEST_S,
    MOST_OF_CORE,
    MOST_OF_PREFILL,
    Schedule,
)

TOKENS = 16


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_one_page_in_a_thousand(clock: Clock) -> None:
    schedule, forced = Schedule(0.001, clock), 0
    for _ in range(10_000):
        schedule.computed(100 * TOKENS)
        schedule.served(10)
        if schedule.is_due(TOKENS):
            schedule.forced(TOKENS)
            schedule.ended(0.0, forced=True)
            forced += 1
    assert forced == 100


def test_what_comes_of_itself_counts(clock: Clock) -> None:
    schedule = Schedule(0.001, clock)
    for _ in range(10_000):
        schedule.computed(100 * TOKENS)
        schedule.served(10)
        schedule.ended(0.0, forced=False)
        assert not schedule.is_due(TOKENS)


def test_a_share_of_prefill(clock: Clock) -> None:
    """Where nearly everything is served, audits must not be most of what is computed."""
    schedule, forced, computed = Schedule(1.0, clock), 0, 0
    for _ in range(10_000):
        schedule.served(100)
        schedule.computed(TOKENS)
        computed += TOKENS
        if schedule.is_due(TOKENS):
            schedule.forced(TOKENS)
            forced += TOKENS
    assert 0.9 * MOST_OF_PREFILL <= forced / computed <= MOST_OF_PREFILL


def test_at_least_one_an_hour_while_there_are_hits(clock: Clock) -> None:
    schedule, forced = Schedule(1e-9, clock), 0
    for minute in range(24 * 60):
        clock.now = 60.0 * minute
        schedule.served(1)
        if schedule.is_due(TOKENS):
            schedule.forced(TOKENS)
            schedule.ended(0.0, forced=True)
            forced += 1
    assert forced == 23
    clock.now += 10 * LONGEST_S
    assert not schedule.is_due(TOKENS), "without hits there is nothing to audit"
    assert not Schedule(1e-9, clock).is_due(TOKENS)


def test_a_share_of_a_core(clock: Clock) -> None:
    schedule, worked = Schedule(0.001, clock), 0.0
    for _ in range(100_000):
        clock.now += 0.001
        if schedule.has_time():
            schedule.ended(0.004, forced=False)
            worked += 0.004
    assert worked / clock.now == pytest.approx(MOST_OF_CORE, rel=0.05)


def test_tiers_that_hold_nothing_are_left_alone_for_a_while(clock: Clock) -> None:
    schedule = Schedule(0.001, clock)
    assert schedule.may_ask()
    schedule.found_none()
    assert not schedule.may_ask() and schedule.has_time()
    clock.now += 1.0
    assert schedule.may_ask()


def test_off(clock: Clock) -> None:
    schedule = Schedule(0.0, clock)
    schedule.computed(10**9)
    clock.now = 10 * LONGEST_S
    schedule.served(10**9)
    assert not schedule.on and not schedule.is_due(TOKENS) and not schedule.has_time()
