"""How large jobs are and how many pages are under way, as a tier shows what it can do."""

import math

import pytest

from kvstrata.offload.secondary.pace import FIRST_AHEAD, FIRST_PAGES, MOST_PAGES, Pace

DEADLINE_S = 10.0


def test_nothing_is_known_at_first() -> None:
    pace = Pace(DEADLINE_S, 0.0)
    pace.look(5.0, 0)
    assert (pace.job, pace.ahead, pace.speed) == (FIRST_PAGES, FIRST_AHEAD, None)
    assert pace.within(1.0) == math.inf


@pytest.mark.parametrize(
    ("speed", "job"), [(0.5, 1), (8.0, 2), (200.0, 50), (1e4, MOST_PAGES), (1e6, MOST_PAGES)]
)
def test_the_speed_of_a_busy_tier(speed: float, job: int) -> None:
    pace = Pace(DEADLINE_S, 0.0)
    for step in range(1, 17):
        pace.moved(int(speed / 4 * step) - int(speed / 4 * (step - 1)))
        pace.look(step / 4, 1000)
    assert pace.speed == pytest.approx(speed, rel=0.01) and pace.job == job
    assert pace.ahead == max(job, int(speed * (1.0 + 0.25)))
    assert pace.within(4.0) == pytest.approx(4 * speed, rel=0.01)


def test_a_tier_that_delivers_nothing_says_nothing_of_its_speed() -> None:
    pace = Pace(DEADLINE_S, 0.0)
    for step in range(100):
        pace.look(step / 4, 128)
    assert pace.speed is None and pace.ahead == FIRST_AHEAD
    pace.moved(8)
    pace.look(25.0, 120)
    assert pace.speed == pytest.approx(8 / 25)


def test_a_tier_that_has_nothing_left_to_do_gets_more() -> None:
    pace = Pace(DEADLINE_S, 0.0)
    ahead = []
    for step in range(1, 4):
        pace.limited = step < 3
        pace.moved(pace.ahead)
        pace.look(step / 10, 0)
        ahead.append(pace.ahead)
    assert ahead == [4 * FIRST_AHEAD, 16 * FIRST_AHEAD, 16 * FIRST_AHEAD], "if more had waited"
    assert pace.job == MOST_PAGES and pace.speed is None, "it may be faster"


def test_a_tier_is_found_to_be_faster_than_it_was() -> None:
    pace = Pace(DEADLINE_S, 0.0)
    pace.moved(100)
    pace.look(1.0, 10)
    assert pace.speed == 100.0
    pace.moved(100)
    pace.look(1.1, 0)
    assert pace.speed == pytest.approx(1000.0)
    pace.moved(1)
    pace.look(9.0, 0)
    assert pace.speed == pytest.approx(1000.0), "it had no more to do"


def test_results_that_come_at_once() -> None:
    pace = Pace(DEADLINE_S, 3.0)
    pace.moved(4)
    pace.look(3.0, 0)
    assert pace.job == MOST_PAGES
