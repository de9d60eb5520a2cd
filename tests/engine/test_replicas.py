"""Engines that live side by side over one directory: each hits what the others stored."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import (
    Engine,
    Server,
    connector,
    prompt,
    region_files,
    serving,
    vllm_wants_numa_nodes,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

PAGES = 10  # per prompt: 320 tokens in blocks of 32
HIT = 288  # cached tokens of a full hit: vLLM computes at least the last block again


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the engines share."""
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def server(llama: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two data-parallel replicas."""
    if vllm_wants_numa_nodes() and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("vLLM binds each data-parallel replica to cores of its own: there is only one")
    log = tmp_path_factory.mktemp("logs") / "server.log"
    config = with_files(root)
    with serving(llama, log, kv_transfer_config=config, replicas=2) as server:
        yield server


def with_files(root: Path) -> dict[str, Any]:
    """The configuration of the shared directory."""
    return connector(secondary_tiers=[{"type": "fs", "root_dir": str(root)}])


def stored(root: Path, ask: Callable[[], Any]) -> Any:
    """The answer to a new prompt, once its pages are files."""
    wanted = len(pages(root)) + PAGES
    answer = ask()
    wait_until(lambda: len(pages(root)) >= wanted)
    return answer


def pages(root: Path) -> list[Path]:
    """All page files below the root."""
    return list(root.glob("*_r0/*/*/*.safetensors"))


def promoted(server: Server, replica: int) -> float:
    """How many pages the replica has read from files."""
    name = f'kvstrata_tier_events_total{{engine="{replica}",event="promoted_pages"'
    lines = [line for line in server.metrics().splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0)])
def test_data_parallel_replicas_share_their_files(
    server: Server, root: Path, first: int, second: int
) -> None:
    text = prompt(10 + first)
    cold = stored(root, lambda: server.ask(text, replica=first))
    assert cold["cached"] == 0
    hit = server.ask(text, replica=second)
    assert hit["cached"] >= HIT
    assert hit["text"] == cold["text"]
    # The statistics of an engine's last step come after the answer.
    wait_until(lambda: promoted(server, second) >= PAGES - 1)


def test_two_servers_share_their_files(
    llama: Path, server: Server, root: Path, tmp_path: Path
) -> None:
    with Engine(llama, tmp_path / "log", kv_transfer_config=with_files(root)) as engine:
        assert region_files() == []
        mine, theirs = prompt(20), prompt(21)
        cold = stored(root, lambda: engine.ask(mine))
        hit = server.ask(mine)
        assert hit["cached"] >= HIT
        assert hit["text"] == "".join(map(chr, cold["tokens"]))
        answer = stored(root, lambda: server.ask(theirs, replica=1))
        hit = engine.ask(theirs)
        assert hit["cached"] >= HIT
        assert "".join(map(chr, hit["tokens"])) == answer["text"]
