"""The object tier keeps the contract over a directory, in which its objects are files."""

from pathlib import Path

import pytest

from kvstrata.tiers.testing import MakeTier, TierContract
from tests.tiers.fs.test_contract import FileMedium
from tests.tiers.object.conftest import OpenTier


class TestObjectTier(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: OpenTier, directory: Path) -> MakeTier:
        return lambda context: open_tier(context)

    @pytest.fixture
    def medium(self, directory: Path) -> FileMedium:
        return FileMedium(directory)
