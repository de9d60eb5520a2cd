"""The pool tier keeps the contract; its files are those of the fs tier."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.testing import MakeTier, TierContract
from tests.tiers.fs.test_contract import FileMedium
from tests.tiers.pool.pool_world import pool_dir


class TestPoolTier(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: Callable[..., PoolTier]) -> MakeTier:
        return lambda context: open_tier(context)

    @pytest.fixture
    def medium(self, shm: Path) -> FileMedium:
        return FileMedium(pool_dir(shm))
