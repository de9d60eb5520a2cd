from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.pool.tier import PoolTier
from tests.tiers.pool.pool_world import make_tier, own_shm


@pytest.fixture(autouse=True)
def shm() -> Iterator[Path]:
    """See `own_shm`."""
    with own_shm() as folder:
        yield folder


@pytest.fixture
def open_tier() -> Iterator[Callable[..., PoolTier]]:
    """`make_tier`; shuts the tiers down at the end."""
    made: list[PoolTier] = []

    def make(*arguments: Any, **options: Any) -> PoolTier:
        made.append(make_tier(*arguments, **options))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)
