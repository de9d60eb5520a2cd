"""The proxy of docs/examples/prefill_decode, between servers that do as they are told."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.docs.blocks import ROOT
from tests.tiers.valkey.server import free_port
from tests.waiting import PATIENCE_S, wait_until

zmq = pytest.importorskip("zmq")
msgspec = pytest.importorskip("msgspec")
pytest.importorskip("aiohttp")

PROXY = ROOT / "docs/examples/prefill_decode/proxy.py"
CHUNKS = [[1, 2, 3, 4], [5, 6, 7, 8]]
PROMPT = [*CHUNKS[0], *CHUNKS[1], 9]
ENDLESS = str(PATIENCE_S * 10)  # a proxy that waits in vain fails its test

Answer = Callable[[BaseHTTPRequestHandler], None]


class FakeServer(ThreadingHTTPServer):
    """Answers as it is told, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, name: str, happened: list[str], answer: Answer) -> None:
        self.name, self.happened, self.answer = name, happened, answer
        self.asked: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(json.loads(body or b"{}"))
        self.server.happened.append(self.server.name)
        with suppress(ConnectionError):
            self.server.answer(self)

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


def says(status: int, answer: object) -> Answer:
    def send(request: BaseHTTPRequestHandler) -> None:
        body = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return send


def prefilled(cached: int = 0, chat: bool = False) -> Answer:
    usage = {"prompt_tokens_details": {"cached_tokens": cached}}
    prompt = {"prompt_token_ids": PROMPT}
    answer = {"choices": [{}], **prompt} if chat else {"choices": [prompt]}
    return says(200, {**answer, "usage": usage})


class World:
    """Two servers, what the prefiller announces, and the proxy between them."""

    def __init__(self, *options: str) -> None:
        self.happened: list[str] = []
        self.prefill = FakeServer("prefill", self.happened, prefilled())
        self.decode = FakeServer("decode", self.happened, says(200, "decoded"))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        events = f"tcp://127.0.0.1:{free_port()}"
        self._zmq = zmq.Context()
        self._publisher = self._zmq.socket(zmq.XPUB)
        self._publisher.linger = 0
        self._publisher.connect(events)
        self.process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    str(PROXY),
                    "--tier",
                    "fs",
                    "--port",
                    self.url.rpartition(":")[2],
                ),
                *("--prefill", self.prefill.url, "--decode", self.decode.url, "--events", events),
                *options,
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._publisher.poll(1000 * PATIENCE_S), "nobody listens to events"
        self._publisher.recv()
        wait_until(self._serves)
        self.happened.clear()

    def announce(self, chunk: Sequence[int], tier: str = "fs", kind: str = "BlockStored") -> None:
        event = {"type": kind, "block_hashes": [b""], "token_ids": chunk, "ownership": tier}
        self.publish(msgspec.msgpack.encode([0.0, [event]]))

    def publish(self, payload: bytes) -> None:
        self.happened.append("event")
        self._publisher.send_multipart([b"", bytes(8), payload])

    def ask(self, path: str = "/v1/completions", **body: Any) -> tuple[int, object]:
        data = json.dumps({"prompt": "...", **body}).encode()
        try:
            answer = self.open(path, data)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, json.load(answer)

    def open(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(self.url + path, data)
        return urllib.request.urlopen(request, timeout=PATIENCE_S)

    def close(self) -> str:
        """What the proxy said."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=PATIENCE_S)
        self._zmq.destroy(linger=0)
        for server in (self.prefill, self.decode):
            server.shutdown()
            server.server_close()
        return said

    def _serves(self) -> bool:
        with suppress(OSError):
            self.open("/health").close()
            return True
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*options: str) -> World:
        made.append(World(*options))
        return made[-1]

    yield make
    for world in made:
        if world.process.poll() is None:
            world.close()


def asks(world: World, **body: Any) -> tuple[threading.Thread, list[tuple[int, object]]]:
    """Ask in a thread, until the prefiller was asked; what is answered will be in the list."""
    answers: list[tuple[int, object]] = []
    world.happened.clear()
    thread = threading.Thread(target=lambda: answers.append(world.ask(**body)), daemon=True)
    thread.start()
    wait_until(lambda: "prefill" in world.happened)
    return thread, answers


def test_the_decoder_is_asked_when_all_pages_are_stored(start: Callable[..., World]) -> None:
    world = start("--patience", ENDLESS)
    thread, answers = asks(world, max_tokens=7, stream=True, min_tokens=3)
    world.announce(CHUNKS[0])
    world.announce(CHUNKS[1], tier="object")
    world.announce(CHUNKS[1], kind="BlockRemoved")
    world.publish(b"none of vLLM's")
    world.announce(CHUNKS[1])
    thread.join(PATIENCE_S)
    assert answers == [(200, "decoded")]
    assert world.happened == ["prefill", *["event"] * 5, "decode"]
    assert world.prefill.asked[-1] == {"prompt": "...", "max_tokens": 1, "return_token_ids": True}
    whole = {"prompt": "...", "max_tokens": 7, "stream": True, "min_tokens": 3}
    assert world.decode.asked[-1] == whole


def test_what_was_not_computed_is_not_waited_for(start: Callable[..., World]) -> None:
    world = start("--patience", ENDLESS)
    world.prefill.answer = prefilled(cached=len(PROMPT) - 1, chat=True)
    assert world.ask("/v1/chat/completions") == (200, "decoded")
    assert world.happened == ["prefill", "decode"]
    world.prefill.answer = prefilled(cached=len(CHUNKS[0]))
    thread, answers = asks(world)
    world.announce(CHUNKS[1])
    thread.join(PATIENCE_S)
    assert answers == [(200, "decoded")]


def test_nobody_waits_longer_than_the_patience(start: Callable[..., World]) -> None:
    world = start("--patience", "0.1")
    for _ in range(2):
        assert world.ask("/v1/chat/completions") == (200, "decoded")
    assert world.happened == ["prefill", "decode"] * 2
    assert world.close().count("pages are late") == 1


@pytest.mark.parametrize("failure", ["gone", "broken", "no JSON", "nothing"])
def test_without_a_prefiller_the_decoder_computes(
    start: Callable[..., World], failure: str
) -> None:
    world = start("--patience", ENDLESS, "--longest-prefill", "0.5")
    if failure == "gone":
        world.prefill.shutdown()
        world.prefill.server_close()
    world.prefill.answer = {
        "gone": prefilled(),
        "broken": says(500, "broken"),
        "no JSON": says(200, "no object"),
        "nothing": lambda request: threading.Event().wait(1.0) and None,
    }[failure]
    for _ in range(5):
        assert world.ask() == (200, "decoded")
    assert world.happened.count("decode") == 5
    assert 1 <= world.close().count("the prefiller failed") < 5, "it must be left alone"


def test_the_decoder_says_what_is_wrong(start: Callable[..., World]) -> None:
    world = start("--patience", ENDLESS)
    world.prefill.answer = world.decode.answer = says(400, "no such model")
    for _ in range(2):
        assert world.ask() == (400, "no such model")
    assert world.happened == ["prefill", "decode"] * 2
    world.decode.shutdown()
    world.decode.server_close()
    status, said = world.ask()
    assert status == 502 and "no decoder" in str(said)


def test_an_answer_is_passed_on_as_it_comes_and_ends_with_its_client(
    start: Callable[..., World],
) -> None:
    world = start()
    read, over = threading.Event(), threading.Event()

    def stream(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"first")
        assert read.wait(PATIENCE_S)
        try:
            while True:
                request.wfile.write(b"more")
        except ConnectionError:
            over.set()

    world.decode.answer = stream
    world.prefill.answer = prefilled(cached=len(PROMPT) - 1)
    with world.open("/v1/completions", b"{}") as answer:
        assert answer.read(5) == b"first"
        read.set()
        assert answer.read(4) == b"more"
    assert over.wait(PATIENCE_S), "the decoder goes on for nobody"


def test_other_requests_are_the_decoders(start: Callable[..., World]) -> None:
    world = start()
    with world.open("/v1/models?all=1") as answer:
        assert json.load(answer) == "decoded"
    assert world.ask("/tokenize") == (200, "decoded")
    assert world.happened == ["decode"] * 2
