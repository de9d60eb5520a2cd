"""A real pool for the tests: a master, and a process that lends memory."""

import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.sessions import pause
from tests.tiers.valkey.server import free_port
from tests.waiting import wait_until

LEAST_SEGMENT = 2**24


def why_not() -> str:
    """Why there can be no pool here; "" if there can."""
    if find_spec("mooncake") is None:
        return "no pool: mooncake-transfer-engine-non-cuda is not installed"
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return "no pool: libibverbs.so.1 is missing; apt-get install libibverbs1"
    return ""


def program(name: str) -> str:
    """The path of one of the library's programs."""
    found = find_spec("mooncake")
    assert found is not None and found.origin is not None
    return str(Path(found.origin).with_name(name))


class _Process:
    """One that is killed and stopped at will."""

    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        pause(self.process.pid)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


class Master(_Process):
    """The one that knows where values are. It forgets all when it ends."""

    def __init__(self, *settings: str) -> None:
        self.settings = settings
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                program("mooncake_master"),
                *("--rpc_address=127.0.0.1", f"--rpc_port={self.port}"),
                *("--metrics_host=127.0.0.1", f"--metrics_port={self.metrics_port}"),
                *("--client_ttl=2", "--default_kv_lease_ttl=60000", *self.settings),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the master ended"
        with socket.socket() as way:
            return way.connect_ex(("127.0.0.1", self.port)) == 0


class Lender(_Process):
    """Mooncake's own, as docs/tiers.md starts it."""

    def __init__(self, master: Master) -> None:
        self.process = subprocess.Popen(
            [
                program("mooncake_client"),
                *(f"--master_server_address={master.address}", "--host=127.0.0.1"),
                *("--metadata_server=P2PHANDSHAKE", "--global_segment_size=16MB"),
                f"--port={free_port()}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


class Peer(_Process):
    """See peer.py."""

    def __init__(self, master: Master, segment: int = LEAST_SEGMENT) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("peer.py")),
                master.address,
                f"{segment}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._answer() == 0, "the pool cannot be used"

    def put(self, name: str, value: bytes, *, pinned: bool = False) -> int:
        """Place a value; what the library says."""
        code = self._ask("put", name, base64.b64encode(value).decode(), *[True] * pinned)
        assert isinstance(code, int)
        return code

    def get(self, name: str) -> bytes | None:
        value = self._ask("get", name)
        return base64.b64decode(value) if isinstance(value, str) else None

    def drop(self, name: str) -> int:
        """Remove a value that nobody was promised; what the library says."""
        code = self._ask("drop", name)
        assert isinstance(code, int)
        return code

    def peek(self, port: int, address: int | None = None) -> list[int]:
        """See peer.py; 0 where it was done."""
        codes = self._ask("peek", port, address)
        assert isinstance(codes, list)
        return codes

    def clear(self) -> None:
        self._ask("clear")

    def _ask(self, *question: object) -> object:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> object:
        assert self.process.stdout is not None
        found: object = json.loads(self.process.stdout.readline())
        return found
