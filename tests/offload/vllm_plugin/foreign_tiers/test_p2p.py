"""vLLM's own `p2p` between two of our managers: pages go from one CPU tier into another's.

Over NIXL and UCX, which need no GPU: `pip install --no-deps nixl nixl-cu12`.
"""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("nixl", reason="pip install --no-deps nixl nixl-cu12")
pytestmark = pytest.mark.vllm

from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import init_none_hash  # noqa: E402

from kvstrata.offload.lookup import Answer  # noqa: E402
from tests.offload.manager_world import chunk, content  # noqa: E402
from tests.offload.vllm_plugin.foreign_tiers.region_world import RegionWorld  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

HOST = "127.0.0.1"
PAGES = [chunk(0, index) for index in range(3)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RegionWorld, RegionWorld]]:
    """Two managers that know of each other by their ports only."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    init_none_hash(sha256)
    made = tuple(RegionWorld({"type": "p2p", "host": HOST, "port": free_port()}) for _ in range(2))
    yield made  # type: ignore[misc]
    for world in made:
        world.manager.shutdown()


def address(world: RegionWorld, name: str) -> dict[str, Any]:
    host, port = world.foreign[0]._local_id.split(":")
    return {"kv_request_id": name, "remote_host": host, "remote_port": int(port)}


def settle(world: RegionWorld, other: RegionWorld, request: Any) -> list[Answer]:
    """Look the pages up on the one, while both go on, until all are here or will not come."""
    answers: list[Answer] = []

    def is_settled() -> bool:
        answers[:] = [world.lookup(page, request) for page in PAGES]
        world.step()
        other.step()
        return all(answer in (Answer.HIT, Answer.MISS) for answer in answers)

    wait_until(is_settled)
    return answers


def test_a_peer_finds_what_this_one_has(nodes: tuple[RegionWorld, RegionWorld]) -> None:
    source, sink = nodes
    source.store(PAGES, source.request("source"))
    request = sink.request("sink", remote_kv_source=address(source, "one"))
    assert settle(sink, source, request) == [Answer.HIT] * 3
    assert [sink.loaded(page, request) for page in PAGES] == [content(key) for key, _ in PAGES]
    wait_until(lambda: source.step() or not source.tiers[0].inner._jobs._at_tier)  # type: ignore
    assert source.tiers[0].stats().counters["lent_pages"] == 3
    sink.manager.on_request_finished(request)
    again = sink.request("again", remote_kv_source=address(source, "two"))
    unknown = [chunk(5, 0)]
    wait_until(
        lambda: (source.step(), sink.step(), sink.lookup(unknown[0], again))[2] is Answer.MISS
    )


def test_prefill_on_one_decode_on_the_other(nodes: tuple[RegionWorld, RegionWorld]) -> None:
    prefiller, decoder = nodes
    other = prefiller.request("other")
    prefiller.store(PAGES[:1], other)  # which needs no store for the next request
    prefiller.step(2)
    first = prefiller.request("p", remote_decoder={"kv_request_id": "one"})
    prefiller.store(PAGES, first)
    prefiller.manager.on_request_finished(first)
    request = decoder.request("d", remote_prefiller=address(prefiller, "one"))
    assert settle(decoder, prefiller, request) == [Answer.HIT] * 3
    assert [decoder.loaded(page, request) for page in PAGES] == [content(k) for k, _ in PAGES]


def test_a_peer_of_another_namespace_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    init_none_hash(sha256)
    worlds = [
        RegionWorld({"type": "p2p", "host": HOST, "port": free_port()}, namespace={"a": number})
        for number in range(2)
    ]
    source, sink = worlds
    source.store(PAGES, source.request("source"))
    request = sink.request("sink", remote_kv_source=address(source, "one"))
    assert settle(sink, source, request) == [Answer.MISS] * 3
    for world in worlds:
        world.manager.shutdown()
