"""The README's way from nothing to a hit, on a real server, by its own commands."""

import json
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

from tests.docs.blocks import shell_commands
from tests.docs.known import way_of
from tests.engine.driver import ROOT, START_TIMEOUT_S, engine_environment
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

STOP_S = 60  # more than --shutdown-timeout
PAGES = 8  # of 1,091 characters, each a token of the tiny model, in vLLM's CPU blocks of 128


class Reader:
    """Does what the README says, with a model, a directory and a port of its own."""

    def __init__(self, model: Path, root: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.log = log
        python = Path(sys.executable).parent
        environment = engine_environment()
        del environment["VLLM_CPU_KVCACHE_SPACE"]
        self._environment = environment | {
            "PATH": f"{python}:{os.environ['PATH']}",
            "MODEL": str(model),
            "KV": str(root),
        }

    def export(self, command: str) -> None:
        """Keep what `export` sets, but the model and the directory."""
        for word in command.split()[1:]:
            name, _, value = word.partition("=")
            self._environment.setdefault(name, value)

    def run(self, command: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            ["bash", "-c", command.replace("localhost:8000", f"127.0.0.1:{self.port}")],
            env=self._environment,
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
                ["bash", "-c", f"{command} --port {self.port}"],
                cwd=ROOT,
                env=self._environment,
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
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")


def form(printed: str, model: str) -> str:
    """Without the numbers and the model's name."""
    return re.sub(r"\d+", "N", printed.replace(model, "MODEL")).strip()


def test_from_nothing_to_a_hit(llama: Path, root: Path, tmp_path: Path) -> None:
    shown = [
        command
        for command in shell_commands([ROOT / "README.md"])
        if (way := way_of(command)) is not None and way.how == "served"
    ]
    exports = [each.text for each in shown if each.text.startswith("export ")]
    (serve,) = [each.text for each in shown if each.text.startswith("python -m vllm.")]
    cold, warm, metrics, wishes = (each for each in shown if each.text.startswith("curl "))
    (model,) = re.findall(r'model_name="([^"]*)"', metrics.printed)

    reader = Reader(llama, root, tmp_path / "server.log")
    for command in exports:
        reader.export(command)
    root.mkdir(0o700)
    with reader.serving(serve):
        printed = reader.run(cold.text)
        assert printed == cold.printed
        wait_until(lambda: len(list(root.rglob("*.safetensors"))) >= PAGES)
    with reader.serving(serve):
        printed = reader.run(warm.text)
        assert form(printed, str(llama)) == form(warm.printed, model)
        cached = int(printed.rpartition(":")[2])
        assert cached == PAGES * 128
        assert form(reader.run(metrics.text), str(llama)) == form(metrics.printed, model)
        # the statistics of an engine's last step come after the answer
        wait_until(lambda: float(reader.run(metrics.text).split()[-1]) == cached)
        answer = json.loads(reader.run(wishes.text))
        assert answer["choices"], answer
    assert "kv_transfer_params" not in reader.log.read_text()  # a wish that is ignored is logged
