"""The valkey tier keeps the contract, and its values are those of docs/format.md."""

import pytest

from kvstrata.tiers.testing import MakeTier, TierContract
from tests.tiers.valkey.conftest import OpenTier
from tests.tiers.valkey.server import Server
from tests.tiers.valkey.values import Values


class TestValkeyTier(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: OpenTier, server: Server) -> MakeTier:
        return lambda context: open_tier(server, context)

    @pytest.fixture
    def medium(self, server: Server) -> Values:
        return Values(server)
