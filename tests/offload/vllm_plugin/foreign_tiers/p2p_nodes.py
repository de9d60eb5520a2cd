"""Two managers of ours with vLLM's own `p2p`, which move pages over NIXL; prints what came of it.

    python -m tests.offload.vllm_plugin.foreign_tiers.p2p_nodes

A program of its own: where there is no GPU, NIXL 1.5 ends its process with a segmentation fault.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash

from kvstrata.offload.finding.lookup import Answer
from kvstrata.tiers.base import RequestView
from tests.offload.manager_world import chunk, content
from tests.offload.vllm_plugin.foreign_tiers.region_world import RegionWorld
from tests.waiting import wait_until

HOST = "127.0.0.1"
PAGES = [chunk(0, index) for index in range(3)]

Found = Sequence[str]


def node(namespace: Mapping[str, Any]) -> RegionWorld:
    with socket.socket() as one:
        one.bind((HOST, 0))
        port = one.getsockname()[1]
    return RegionWorld({"type": "p2p", "host": HOST, "port": port}, namespace=namespace)


def address(world: RegionWorld, name: str) -> dict[str, Any]:
    """How a request says from whom its pages come."""
    host, port = world.foreign[0]._local_id.split(":")
    return {"kv_request_id": name, "remote_host": host, "remote_port": int(port)}


def found(world: RegionWorld, other: RegionWorld, request: RequestView) -> Found:
    """What becomes of the pages on one node, while both go on: "right", "wrong" or "miss"."""
    answers: list[Answer] = []

    def is_settled() -> bool:
        answers[:] = [world.lookup(page, request) for page in PAGES]
        world.step()
        other.step()
        return all(answer in (Answer.HIT, Answer.MISS) for answer in answers)

    wait_until(is_settled)
    words = {True: "right", False: "wrong"}
    return [
        words[world.loaded(page, request) == content(page[0])] if answer is Answer.HIT else "miss"
        for page, answer in zip(PAGES, answers, strict=True)
    ]


def from_a_peer(source: RegionWorld, sink: RegionWorld) -> Found:
    """A request says that a peer may have its pages."""
    source.store(PAGES[:2], source.request("source"))
    request = sink.request("sink", remote_kv_source=address(source, "one"))
    return found(sink, source, request)


def from_a_prefiller(source: RegionWorld, sink: RegionWorld) -> Found:
    """A request says who computes its pages; the first one was stored there for another request."""
    source.store(PAGES[:1], source.request("other"))
    source.step(2)
    first = source.request("prefill", remote_decoder={"kv_request_id": "one"})
    source.store(PAGES, first)
    source.manager.on_request_finished(first)
    request = sink.request("decode", remote_prefiller=address(source, "one"))
    return found(sink, source, request)


def returned(source: RegionWorld, sink: RegionWorld) -> Found:
    """What a peer was lent comes back."""
    from_a_peer(source, sink)
    sink.manager.on_request_finished(RequestView("sink"))
    wait_until(lambda: (source.step(), sink.step(), not len(source.manager._jobs))[-1])
    return [str(source.tiers[0].stats().counters["lent_pages"])]


def run(does: Callable[[RegionWorld, RegionWorld], Found], *namespaces: Mapping[str, Any]) -> Found:
    source, sink = [node(namespace) for namespace in namespaces]
    try:
        return does(source, sink)
    finally:
        source.manager.shutdown()
        sink.manager.shutdown()


if __name__ == "__main__":
    os.environ["UCX_TLS"] = "tcp,self"
    init_none_hash(sha256)
    same, another = {"a": 1}, {"a": 2}
    result = {
        "peer": run(from_a_peer, same, same),
        "prefiller": run(from_a_prefiller, same, same),
        "returned": run(returned, same, same),
        "another namespace": run(from_a_peer, same, another),
    }
    print(json.dumps(result), flush=True)
    os._exit(0)
