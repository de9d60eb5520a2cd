"""What left a tier, how old it was, and how soon it came again."""

import pytest

from kvstrata.offload.metering import departures
from kvstrata.offload.metering.departures import Departures
from kvstrata.offload.metering.samples import MOST, Samples
from tests.offload.manager_world import World, chunk

A, B, C = b"a", b"b", b"c"


def test_ages_and_gaps() -> None:
    now = [10.0]
    tier = Departures(lambda: now[0])
    tier.came([A, B])
    tier.left([A, B], [4.0, 9.0])
    now[0] = 15.0
    tier.came([B, C])
    now[0] = 25.0
    tier.came([A, B])
    assert tier.pages == 2
    assert (tier.ages.take(), tier.gaps.take()) == ([6.0, 1.0], [5.0, 15.0])
    assert (tier.ages.take(), tier.gaps.take()) == ([], [])


def test_what_is_forgotten_has_no_gap() -> None:
    tier = Departures(lambda: 1.0)
    tier.left([A])
    tier.forget()
    tier.came([A])
    assert not tier.gaps.take()


def test_the_oldest_departures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "GENERATION", 4)
    tier = Departures(lambda: 1.0)
    keys = [bytes([i]) for i in range(11)]
    for key in keys:
        tier.left([key])
    tier.came(keys)
    assert 4 <= len(tier.gaps.take()) <= 8


def test_of_a_rush_some_are_told() -> None:
    samples = Samples()
    samples.add(range(MOST - 1))
    samples.add([1.0, 2.0])
    assert len(samples.take()) == MOST
    samples.add([3.0])
    assert samples.take() == [3.0]


def test_pages_of_the_primary_tier() -> None:
    """One slot. A page that was loaded is as old as its last load."""
    world = World([], slots=1)
    left = world.manager.primary.departures
    world.store([chunk(0, 0)], world.request("first"))
    world.now = 20.0
    reader = world.request("reader")
    key, end = chunk(0, 0)
    world.lookup((key, end), reader)
    world.manager.prepare_load([key], reader)
    world.manager.on_step_end()
    world.manager.complete_load([key], reader)
    world.manager.on_request_finished(reader)
    world.manager.on_step_end()
    world.now = 30.0
    world.store([chunk(1, 0)], world.request("other"))
    assert (left.ages.take(), left.gaps.take()) == ([10.0], [])
    world.now = 45.0
    world.store([chunk(0, 0)], world.request("again"))
    assert (left.ages.take(), left.gaps.take()) == ([15.0], [15.0])
    assert left.pages == 2
