"""KV events of real servers: who adds them up knows which pages are where.

Two servers on one directory that is too small for both, with resets and a restart. What a
subscriber believes is held against what the manager itself takes to be where.
"""

import itertools
import json
import random
import socket
import struct
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import msgspec  # noqa: E402
import zmq  # noqa: E402
from vllm.distributed.kv_events import KVEventBatch  # noqa: E402
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash  # noqa: E402

from tests.engine.driver import Server, connector, prompt, serving  # noqa: E402
from tests.follower import Follower  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

REQUESTS = 300
MEMORY = 5 * 2**20  # bytes: some twenty pages of two blocks
BUDGET = 8 * 2**20  # bytes: some forty
PROMPTS = 30  # of one to ten blocks: three times as many pages as the disk has room for
END = struct.pack(">q", -1)  # of a replay


class Subscriber:
    """Hears one publisher, and asks for what it missed: it came late, say."""

    def __init__(self, port: int, replay_port: int) -> None:
        self.follower = Follower()
        self._next = 0  # sequence number
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._events = zmq.Context.instance().socket(zmq.SUB)
        self._events.connect(f"tcp://127.0.0.1:{port}")
        self._events.setsockopt_string(zmq.SUBSCRIBE, "")
        self._replay_port = replay_port

    def hear(self) -> Follower:
        """What it believes, with all that has arrived."""
        while self._events.poll(0):
            _, number, batch = self._events.recv_multipart()
            (seq,) = struct.unpack(">q", number)
            if seq > self._next:
                for missed, before in self.replay(self._next):
                    if missed < seq:
                        self._take(missed, before)
            self._take(seq, batch)
        return self.follower

    def _take(self, seq: int, batch: bytes) -> None:
        assert seq == self._next, "a batch is lost, or came twice"
        self._next += 1
        self.follower.hear(self._decode(batch).events)

    def replay(self, start: int) -> Iterator[tuple[int, bytes]]:
        """What the publisher said from that number on, once more."""
        with zmq.Context.instance().socket(zmq.DEALER) as socket:
            socket.connect(f"tcp://127.0.0.1:{self._replay_port}")
            socket.send_multipart([b"", struct.pack(">q", start)])
            while True:
                *_, number, batch = socket.recv_multipart()
                if number == END:
                    return
                yield struct.unpack(">q", number)[0], batch

    def close(self) -> None:
        self._events.close()


class Told:
    """A server, its subscriber, and the truth."""

    def __init__(self, server: Server, subscriber: Subscriber, truth: Path) -> None:
        self.server, self.subscriber, self._truth = server, subscriber, truth

    def check(self) -> dict[str, Counter[Any]]:
        """Wait until the subscriber believes what is true; what that is."""
        wait_until(self._truth.exists)
        wait_until(lambda: self._believed() == self._expected())
        return self._believed()

    def reset(self) -> None:
        """Empty the GPU's cache and the CPU tier."""
        url = f"http://127.0.0.1:{self.server.port}/reset_prefix_cache?reset_external=true"

        def done() -> bool:
            request = urllib.request.Request(url, method="POST")
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bool(json.load(answer)["success"])

        wait_until(done)  # not while stores are under way

    def _believed(self) -> dict[str, Counter[Any]]:
        there = self.subscriber.hear().there
        return {medium: Counter(there[medium]) for medium in ("CPU", "STORAGE")}

    def _expected(self) -> dict[str, Counter[Any]]:
        """All blocks of each page, as far as they could be told, each once."""
        chunks = self.subscriber.follower.chunks
        expected: dict[str, Counter[Any]] = {}
        for medium, keys in json.loads(self._truth.read_text()).items():
            lasts = [maybe_convert_block_hash(BlockHash(bytes.fromhex(key)[:-4])) for key in keys]
            told = [chunks[medium].get(last, [last]) for last in lasts]
            expected[medium] = Counter(itertools.chain.from_iterable(told))
        return expected


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def telling(llama: Path, root: Path, folder: Path, name: str) -> Iterator[Told]:
    """A server on the root, heard from its first word on."""
    events, replay = free_port(), free_port()
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events}",
        "replay_endpoint": f"tcp://*:{replay}",
    }
    tier = {"type": "fs", "root_dir": str(root), "max_bytes": BUDGET}
    offload = connector(
        cpu_bytes_to_use=MEMORY,
        blocks_per_chunk=2,
        self_describing_kv_events=True,
        secondary_tiers=[tier],
    )
    subscriber = Subscriber(events, replay)
    try:
        with serving(
            llama,
            folder / f"{name}.log",
            kv_transfer_config=offload,
            site="truth",
            arguments=[f"--kv-events-config={json.dumps(config)}"],
            KVSTRATA_TRUTH=str(folder / f"{name}.json"),
            VLLM_SERVER_DEV_MODE="1",
        ) as server:
            yield Told(server, subscriber, folder / f"{name}.json")
    finally:
        subscriber.close()


def test_who_adds_up_the_events_knows_what_is_where(llama: Path, tmp_path: Path) -> None:
    root, choose = tmp_path / "kv", random.Random(7)

    def serve(*servers: Told, requests: int) -> None:
        for _ in range(requests):
            seed = choose.randrange(PROMPTS)
            text = prompt(seed, 32 + 64 * (seed % 5) + 64)
            choose.choice(servers).server.ask(text, max_tokens=1)

    with ExitStack() as first_and_rest, telling(llama, root, tmp_path, "first") as first:
        second = first_and_rest.enter_context(telling(llama, root, tmp_path, "second"))
        for _ in range(4):
            serve(first, second, requests=REQUESTS // 5)
            for each in (first, second):
                believed = each.check()
                assert believed["CPU"] and believed["STORAGE"]
            choose.choice((first, second)).reset()
        first_and_rest.close()
        with telling(llama, root, tmp_path, "again") as again:
            serve(again, requests=1)
            assert len(again.check()["STORAGE"]) > len(again.check()["CPU"]), "pages of before"
            serve(first, again, requests=REQUESTS // 5)
            for each in (first, again):
                each.check()
                once_more = Follower()
                for number, (seq, batch) in enumerate(each.subscriber.replay(0)):
                    assert seq == number
                    once_more.hear(each.subscriber._decode(batch).events)
                assert once_more.there == each.subscriber.follower.there, "nothing was lost"
                assert once_more.twice.keys() <= {"GPU"}
                assert once_more.removed.keys() >= {"CPU", "STORAGE"}, "pages were evicted"
