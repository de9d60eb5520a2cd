"""The mooncake tier keeps the contract, and its values are those of docs/format.md."""

import pytest

from kvstrata.tiers.testing import MakeTier, TierContract
from tests.tiers.mooncake.conftest import OpenTier
from tests.tiers.mooncake.pool import Master
from tests.tiers.mooncake.values import Values


class TestMooncakeTier(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: OpenTier, master: Master) -> MakeTier:
        return lambda context: open_tier(master, context)

    @pytest.fixture
    def medium(self, values: Values) -> Values:
        return values
