from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.mooncake.tier import MooncakeTier
from kvstrata.tiers.testing import CONTEXT
from tests.tiers.mooncake.pool import LEAST_SEGMENT, Master, Peer, why_not
from tests.tiers.mooncake.values import Values

OpenTier = Callable[..., MooncakeTier]
StartMaster = Callable[..., Master]
StartPeer = Callable[..., Peer]


@pytest.fixture(scope="session")
def pool_is_possible() -> None:
    if why := why_not():
        pytest.skip(why)


@pytest.fixture(scope="session")
def shared_pool(pool_is_possible: None) -> Iterator[tuple[Master, Peer]]:
    master = Master()
    peer = Peer(master, 4 * LEAST_SEGMENT)
    yield master, peer
    peer.kill()
    master.kill()


@pytest.fixture
def peer(shared_pool: tuple[Master, Peer]) -> Peer:
    """The lender of the pool of all tests, without anything in it."""
    shared_pool[1].clear()
    return shared_pool[1]


@pytest.fixture
def master(shared_pool: tuple[Master, Peer], peer: Peer) -> Master:
    """That of the pool of all tests."""
    return shared_pool[0]


@pytest.fixture
def values(peer: Peer) -> Values:
    return Values(peer)


@pytest.fixture
def start_master(pool_is_possible: None) -> Iterator[StartMaster]:
    """Makes one for a test that changes or ends it."""
    made: list[Master] = []

    def start(*settings: str) -> Master:
        made.append(Master(*settings))
        return made[-1]

    yield start
    for each in made:
        each.kill()


@pytest.fixture
def start_peer(start_master: StartMaster) -> Iterator[StartPeer]:
    """Makes a lender, which ends before the masters."""
    made: list[Peer] = []

    def start(master: Master, segment: int = LEAST_SEGMENT) -> Peer:
        made.append(Peer(master, segment))
        return made[-1]

    yield start
    for each in made:
        each.kill()


@pytest.fixture
def open_tier(pool_is_possible: None) -> Iterator[OpenTier]:
    made: list[MooncakeTier] = []

    def make(master: Master, /, context: TierContext = CONTEXT, **options: object) -> MooncakeTier:
        context = replace(context, region=CONTEXT.region)
        made.append(MooncakeTier({"master": master.address, **options}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)
