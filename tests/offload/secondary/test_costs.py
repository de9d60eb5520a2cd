"""What transfers and prefill cost, from synthetic measurements."""

from statistics import median

import pytest

from kvstrata.offload.secondary.costs import (
    LEAST_JOBS,
    LEAST_STEPS,
    Advance,
    PrefillSpeed,
    TransferCost,
)

MIB = 2**20


def test_a_cost_is_unknown_at_first() -> None:
    cost = TransferCost()
    for _ in range(LEAST_JOBS - 1):
        cost.add(MIB, 1.0)
    assert not cost.known and cost.seconds(MIB) == cost.seconds_per_byte == 0.0
    cost.add(MIB, 1.0)
    assert cost.known and cost.seconds(MIB) == 1.0


def test_latency_and_bandwidth_are_told_apart() -> None:
    cost = TransferCost()
    for pages in (1, 2, 5, 9, 30):
        cost.add(pages * MIB, 0.05 + pages * 0.01)
    assert cost.seconds(0) == pytest.approx(0.05)
    assert cost.seconds_per_byte * MIB == pytest.approx(0.01)
    assert cost.seconds(100 * MIB) == pytest.approx(1.05)


@pytest.mark.parametrize(
    "jobs",
    [
        [(2 * MIB, 4.0), (2 * MIB, 2.0)] * 2,  # one size: no line through it
        [(MIB, 4.0), (3 * MIB, 2.0)] * 2,  # the larger the faster
        [(3 * MIB, 0.0), (5 * MIB, 24.0)] * 2,  # less than no latency
    ],
)
def test_where_no_line_makes_sense_the_cost_is_proportional(jobs: list[tuple[int, float]]) -> None:
    cost = TransferCost()
    for nbytes, seconds in jobs:
        cost.add(nbytes, seconds)
    typical = median(seconds / nbytes for nbytes, seconds in jobs)
    assert cost.seconds(0) == 0.0
    assert cost.seconds(7 * MIB) == pytest.approx(7 * MIB * typical)


def test_one_hiccup_changes_nothing() -> None:
    cost = TransferCost()
    for pages in range(1, 12):
        cost.add(pages * MIB, 0.05 + pages * 0.01)
        if pages == 6:
            cost.add(3 * MIB, 60.0)
    assert cost.seconds(100 * MIB) == pytest.approx(1.05)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_tier_that_became_another_one_is_learnt_anew(factor: float) -> None:
    cost = TransferCost()
    for pages in range(1, 30):
        cost.add(pages * MIB, pages * 0.01)
    for pages in (3, 5):
        cost.add(pages * MIB, factor * pages * 0.01)
        assert cost.seconds(10 * MIB) == pytest.approx(0.1)
    cost.add(7 * MIB, factor * 0.07)
    assert not cost.known, "three in a row"
    for pages in (1, 2, 3):
        cost.add(pages * MIB, factor * pages * 0.01)
    assert cost.seconds(10 * MIB) == pytest.approx(0.1 * factor)


def test_old_jobs_are_forgotten() -> None:
    cost = TransferCost()
    for nbytes in range(1, 200):
        cost.add(nbytes, 1000.0)
    for nbytes in range(1, 40):
        cost.add(nbytes, 2.0 * nbytes)
    assert cost.seconds(10) == pytest.approx(20.0)


def prefill(speed: PrefillSpeed, steps: int, first: int = 0, gap: int = 1) -> None:
    """A request of 100 tokens per step, 0.5 s each."""
    last: Advance | None = None
    for step in range(steps):
        last = speed.advance(last, first + step * gap, 0.5 * step, 100 * (step + 1))


def test_prefill_is_timed_between_successive_steps() -> None:
    speed = PrefillSpeed()
    prefill(speed, LEAST_STEPS + 1)
    assert speed.seconds_per_token() is None
    prefill(speed, 3)
    assert speed.seconds_per_token() == pytest.approx(0.005)


def test_the_first_distance_of_a_run_does_not_count() -> None:
    """vLLM may schedule the second step while the first one runs."""
    speed = PrefillSpeed()
    for _ in range(10 * LEAST_STEPS):
        prefill(speed, 2)
    assert speed.seconds_per_token() is None


def test_decoding_and_interrupted_prefill_do_not_count() -> None:
    speed = PrefillSpeed()
    prefill(speed, 10 * LEAST_STEPS, gap=2)
    assert speed.seconds_per_token() is None
    last: Advance | None = None
    for step in range(10 * LEAST_STEPS):  # the same offer again: there was no room for it
        last = speed.advance(last, step, float(step), 100)
    assert speed.seconds_per_token() is None


def test_long_steps_weigh_more() -> None:
    """A short step has its overhead, which no load spares."""
    speed = PrefillSpeed()
    for _ in range(LEAST_STEPS):
        last = speed.advance(None, 1, 0.0, 10)
        last = speed.advance(last, 2, 1.0, 20)
        last = speed.advance(last, 3, 2.0, 30)
        speed.advance(last, 4, 3.0, 1030)
    assert speed.seconds_per_token() == pytest.approx(2.0 / 1010)
