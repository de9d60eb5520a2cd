"""The circuit breaker against a clock that stands still."""

import logging

import pytest

from kvstrata.offload.secondary.breaker import (
    FAILURES_TO_OPEN,
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    CircuitBreaker,
    Operation,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("disk", clock)


def fail(
    breaker: CircuitBreaker, kind: Operation = Operation.LOAD, times: int = FAILURES_TO_OPEN
) -> None:
    for _ in range(times):
        breaker.failed(kind)


def test_only_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    fail(breaker, times=FAILURES_TO_OPEN - 1)
    breaker.succeeded(Operation.LOAD)
    fail(breaker, times=FAILURES_TO_OPEN - 1)
    assert breaker.closed
    breaker.failed(Operation.LOAD)
    assert not breaker.closed and breaker.openings.total() == 1


def test_stores_that_succeed_do_not_excuse_loads(breaker: CircuitBreaker) -> None:
    for _ in range(FAILURES_TO_OPEN):
        breaker.succeeded(Operation.STORE)
        breaker.failed(Operation.LOAD)
    assert not breaker.closed
    breaker.succeeded(Operation.STORE)
    breaker.succeeded(Operation.LOOKUP)
    assert not breaker.closed


def test_a_late_success_of_what_failed_closes_it(breaker: CircuitBreaker) -> None:
    fail(breaker)
    breaker.succeeded(Operation.LOAD)
    assert breaker.closed
    fail(breaker, times=FAILURES_TO_OPEN - 1)
    assert breaker.closed, "it begins anew"


def test_it_is_probed_after_the_back_off_which_doubles(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker)
    expected = FIRST_BACKOFF_S
    for _ in range(10):
        assert not breaker.wants_probe
        clock.now += expected - 0.001
        assert not breaker.wants_probe
        clock.now += 0.002
        assert breaker.wants_probe and not breaker.closed
        breaker.probing()  # and no success
        expected = min(2 * expected, LONGEST_BACKOFF_S)
    assert expected == LONGEST_BACKOFF_S


def test_a_probe_that_succeeds_closes_it_on_trial(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_BACKOFF_S
    breaker.probing()
    breaker.probe_succeeded()
    assert breaker.closed
    breaker.failed(Operation.LOAD)
    assert not breaker.closed, "one failure is enough now"
    clock.now += 2 * FIRST_BACKOFF_S - 0.001
    assert not breaker.wants_probe, "and it is left alone for longer"
    clock.now += 0.002
    breaker.probing()
    breaker.probe_succeeded()
    breaker.succeeded(Operation.LOAD)
    fail(breaker, times=FAILURES_TO_OPEN - 1)
    assert breaker.closed, "the trial is over"
    breaker.failed(Operation.LOAD)
    clock.now += FIRST_BACKOFF_S
    assert breaker.wants_probe, "and so are the long back-offs"


def test_failures_while_open_change_nothing(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_BACKOFF_S / 2
    fail(breaker, Operation.STORE, 10)
    clock.now += FIRST_BACKOFF_S / 2
    assert breaker.wants_probe and breaker.openings.total() == 1


def test_opening_and_closing_are_logged(
    breaker: CircuitBreaker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fail(breaker)
        fail(breaker)
        breaker.succeeded(Operation.LOAD)
        breaker.succeeded(Operation.LOAD)
    assert [record.getMessage() for record in caplog.records] == [
        "tier disk: 3 loads in a row failed or came too late (the last one: late); it is left "
        "alone for 1 s",
        "tier disk is in use again",
    ]
