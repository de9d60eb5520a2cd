"""Pools in a folder of a test's own, in /dev/shm as those of servers are."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.pool import place
from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.testing import CONTEXT


@contextmanager
def own_shm() -> Iterator[Path]:
    """The folder; pools are made there meanwhile."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, pytest.MonkeyPatch.context() as m:
        m.setattr(place, "SHM", Path(folder))
        yield Path(folder)


def pool_dir(shm: Path, name: str = "node") -> Path:
    return shm / f"kvstrata-pool-{os.geteuid()}-{name}"


def make_tier(context: TierContext = CONTEXT, **options: Any) -> PoolTier:
    """One on the pool `node`, with few threads."""
    few = {"name": "node", "max_bytes": "64MiB", "n_read_threads": 2, "n_write_threads": 2}
    return PoolTier({**few, **options}, replace(context, region=CONTEXT.region))
