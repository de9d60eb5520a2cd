import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore

import kvstrata.tiers.process.process as process_module
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.object import bucket
from kvstrata.tiers.object.tier import ObjectTier
from kvstrata.tiers.testing import CONTEXT

OpenTier = Callable[..., ObjectTier]


@pytest.fixture
def open_tier() -> Iterator[OpenTier]:
    """Makes tiers with few threads; shuts them down at the end."""
    made: list[ObjectTier] = []

    def make(context: TierContext = CONTEXT, **options: Any) -> ObjectTier:
        defaults = {"url": "s3://pages", "n_read_threads": 2, "n_write_threads": 2}
        context = replace(context, region=CONTEXT.region)
        made.append(ObjectTier({**defaults, **options}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of every bucket, here and in I/O processes that start from now on."""
    made = tmp_path / "bucket"
    made.mkdir()
    script = str(Path(__file__).with_name("local_worker.py"))
    monkeypatch.setattr(process_module, "COMMAND", (sys.executable, "-P", script, str(made)))
    monkeypatch.setattr(bucket, "open_store", lambda config: LocalStore(made))
    return made
