"""The recipe of docs/examples/prefill_decode: one server prefills, one of another TP size decodes.

Two servers, at TP 1 and at TP 2, share a directory; each prefills for the other in turn.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.engine.driver import ROOT, Server, ask, connector, prompt
from tests.tiers.valkey.server import free_port
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.vllm

FOLDER = ROOT / "docs/examples/prefill_decode"
PAGES = (
    9  # of a prompt of 320 tokens in blocks of 32, which the decoder loads: the last is computed
)
HIT = 32 * PAGES


class Node:
    """A server that announces what it stores, to whichever proxy listens."""

    def __init__(self, model: Path, root: Path, tp: int) -> None:
        self.events = f"tcp://127.0.0.1:{free_port()}"
        config = connector(
            self_describing_kv_events=True,
            secondary_tiers=[{"type": "fs", "root_dir": str(root)}],
        )
        events = {"enable_kv_cache_events": True, "endpoint": self.events}
        self.server = Server(
            model,
            root.with_name(f"tp{tp}.log"),
            kv_transfer_config=config,
            tp=tp,
            arguments=[f"--kv-events-config={json.dumps(events)}"],
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def promoted(self) -> float:
        """How many pages it has read from files."""
        series = 'kvstrata_tier_events_total{engine="0",event="promoted_pages"'
        lines = [line for line in self.server.metrics().splitlines() if line.startswith(series)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture(scope="module")
def nodes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """At TP 1 and at TP 2."""
    root = tmp_path_factory.mktemp("recipe") / "kv"
    with ExitStack() as stack:
        made = []
        for tp in (1, 2):
            made.append(Node(llama, root, tp))
            stack.callback(made[-1].server.close)
            made[-1].server.wait_ready()
        yield made[0], made[1]


@contextmanager
def proxied(prefill: Node, decode: Node) -> Iterator[int]:
    """The port of a proxy, at which the two look like one server."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, str(FOLDER / "proxy.py"), "--tier", "fs", "--port", str(port)),
            *("--prefill", prefill.url, "--decode", decode.url, "--events", prefill.events),
            *("--patience", str(PATIENCE_S)),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _listens(port))
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.parametrize("first", [0, 1], ids=["tp1-tp2", "tp2-tp1"])
def test_one_prefills_and_the_other_decodes(nodes: tuple[Node, Node], first: int) -> None:
    prefill, decode = nodes[first], nodes[1 - first]
    text, before = prompt(200 + first), decode.promoted()
    with proxied(prefill, decode) as port:
        answer = ask(port, text)
    assert answer["cached"] >= HIT
    # The statistics of an engine's last step come after the answer.
    wait_until(lambda: decode.promoted() >= before + PAGES)
    computed = prefill.server.ask(text)  # by the engine that has loaded nothing
    assert computed["text"] == answer["text"]
    assert len(answer["text"]) == 12


def test_the_benchmark_prints_its_table(nodes: tuple[Node, Node]) -> None:
    with proxied(*nodes) as port:
        options = {
            "--proxy": f"http://127.0.0.1:{port}",
            "--decode": nodes[1].url,
            "--model": "model",
            "--prompts": "1",
            "--characters": "200",
            "--tokens": "20",
        }
        words = [word for option in options.items() for word in option]
        program = [sys.executable, str(FOLDER / "bench.py"), *words]
        done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "time to first token" in done.stdout


def test_without_the_prefiller_the_decoder_computes(nodes: tuple[Node, Node]) -> None:
    prefill, decode = nodes
    prefill.server.kill()
    with proxied(prefill, decode) as port:
        answer = ask(port, prompt(202))
    assert answer["cached"] == 0
    assert decode.server.ask(prompt(202))["text"] == answer["text"]
