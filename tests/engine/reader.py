"""Who follows a document's commands on a real server, with a model and a port of their own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.driver import ROOT, START_TIMEOUT_S, engine_environment

STOP_S = 60  # more than --shutdown-timeout


class Reader:
    """Does what the README says, with a model, a directory and a port of its own."""

    def __init__(self, model: Path, root: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"
        self.model = model
        self.log = log
        python = Path(sys.executable).parent
        environment = engine_environment()
        del environment["VLLM_CPU_KVCACHE_SPACE"]
        self.environment = environment | {
            "PATH": f"{python}:{os.environ['PATH']}",
            "MODEL": str(model),
            "KV": str(root),
        }

    def export(self, command: str) -> None:
        """Keep what `export` sets, but the model and the directory."""
        for word in command.split()[1:]:
            name, _, value = word.partition("=")
            self.environment.setdefault(name, value)

    def run(self, command: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            ["bash", "-c", command.replace("localhost:8000", self.address)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def serving(self, command: str) -> Iterator[None]:
        """The server, in the foreground of a terminal; Ctrl-C at the end, which it obeys."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"{command} --port {self._port}"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(process)
            yield
            os.killpg(process.pid, signal.SIGINT)
            process.wait(STOP_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://{self.address}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")


def form(printed: str, model: str) -> str:
    """Without the numbers and the model's name."""
    return re.sub(r"\d+", "N", printed.replace(model, "MODEL")).strip()
