import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.pool import place
from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.testing import CONTEXT


@pytest.fixture(autouse=True)
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of this test in /dev/shm, in which its pools lie."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setattr(place, "SHM", Path(folder))
        yield Path(folder)


@pytest.fixture
def open_tier() -> Iterator[Callable[..., PoolTier]]:
    """Makes tiers on the pool `node` with few threads; shuts them down at the end."""
    made: list[PoolTier] = []

    def make(context: TierContext = CONTEXT, **options: Any) -> PoolTier:
        few = {"name": "node", "max_bytes": "64MiB", "n_read_threads": 2, "n_write_threads": 2}
        context = replace(context, region=CONTEXT.region)
        made.append(PoolTier({**few, **options}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)
