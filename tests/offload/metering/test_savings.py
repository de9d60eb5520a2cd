"""What hits are worth, in seconds of prefill."""

import pytest

from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.savings import LEAST_PREFILLS, LEAST_TOKENS, Savings, ShortPrefills


def prefill(short: ShortPrefills, clock: float, tokens: int, seconds: float, ahead: int) -> float:
    """One request is computed in one step of `seconds`; the time after it."""
    short.end_step(clock)
    short.begins(tokens)
    for _ in range(ahead):
        short.end_step(clock)  # planned while the GPU computes the step before
    short.end_step(clock + seconds)
    return clock + seconds + 100.0  # then the engine is idle


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_speed_of_short_prefills(ahead: int) -> None:
    short, clock = ShortPrefills(ahead), 0.0
    for _ in range(LEAST_PREFILLS):
        assert short.seconds_per_token() is None
        clock = prefill(short, clock, 1000, 2.0, ahead)
    assert short.seconds_per_token() == pytest.approx(0.002)


def test_a_few_tokens_say_nothing_of_the_speed() -> None:
    short, clock = ShortPrefills(), 0.0
    for _ in range(2 * LEAST_PREFILLS):
        clock = prefill(short, clock, LEAST_TOKENS - 1, 2.0, 0)
    assert short.seconds_per_token() is None


def test_long_prefills_count_where_there_are_any() -> None:
    known: list[float | None] = [None]
    savings, clock = Savings(lambda: known[0]), 0.0
    for _ in range(LEAST_PREFILLS):
        clock = prefill(savings.short, clock, 1000, 2.0, 0)
    assert savings.seconds_per_token() == pytest.approx(0.002)
    known[0] = 0.5
    assert savings.seconds_per_token() == 0.5


def test_what_was_served_is_priced_once_at_the_speed_of_then() -> None:
    speed: list[float | None] = [None]
    savings = Savings(lambda: speed[0])
    takings: dict[str | None, Takings] = {None: Takings(hit_tokens=10), "fs": Takings()}
    savings.price(takings)
    assert not savings.seconds
    speed[0] = 2.0
    savings.price(takings)
    savings.price(takings)
    assert savings.seconds == {None: 20.0, "fs": 0.0}
    speed[0], takings["fs"].hit_tokens = 3.0, 5
    savings.price(takings)
    assert savings.seconds == {None: 20.0, "fs": 15.0}
