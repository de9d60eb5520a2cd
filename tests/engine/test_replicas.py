"""Engines that live side by side over a pool and a directory: each hits what the others stored."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.pool.place import pool_names, pool_path
from kvstrata.tiers.pool.tools import remove_pool
from tests.engine.driver import (
    RUN,
    Engine,
    Server,
    connector,
    prompt,
    region_files,
    serving,
    vllm_wants_numa_nodes,
)
from tests.sessions import session
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

PAGES = 10  # per prompt: 320 tokens in blocks of 32
HIT = 288  # cached tokens of a full hit: vLLM computes at least the last block again
# The tiers, in the order of the configuration, and the medium by which a request names them.
MEDIA = {"pool": "cpu", "fs": "storage"}
POOL = f"{RUN}-replicas"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the engines share."""
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def pool() -> Iterator[Path]:
    """The pool that they share, which outlives them."""
    yield Path(pool_path(POOL))
    remove_pool(POOL)
    assert POOL not in pool_names()


@pytest.fixture(scope="module")
def server(
    llama: Path, root: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with two data-parallel replicas."""
    if vllm_wants_numa_nodes() and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("vLLM binds each data-parallel replica to cores of its own: there is only one")
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with serving(llama, log, kv_transfer_config=sharing(root), replicas=2) as server:
        yield server


def sharing(root: Path) -> dict[str, Any]:
    """The configuration of an engine over the pool and the directory."""
    pool = {"type": "pool", "name": POOL, "max_bytes": "64MiB"}
    return connector(secondary_tiers=[pool, {"type": "fs", "root_dir": str(root)}])


def stored(places: tuple[Path, ...], ask: Callable[[], Any]) -> Any:
    """The answer to a new prompt, once its pages are in all these places."""
    wanted = [len(pages(place)) + PAGES for place in places]
    answer = ask()
    wait_until(lambda: all(len(pages(p)) >= n for p, n in zip(places, wanted, strict=True)))
    return answer


def pages(root: Path) -> list[Path]:
    """All page files below the root."""
    return list(root.glob("*_r0/*/*/*.safetensors"))


def promoted(server: Server, replica: int, tier: str) -> float:
    """How many pages the replica has read from the tier."""
    name = f'kvstrata_tier_events_total{{engine="{replica}",event="promoted_pages"'
    lines = [line for line in server.metrics().splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'tier="{tier}"' in line)


@pytest.mark.parametrize("tier", MEDIA)
@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0)])
def test_data_parallel_replicas_share_their_pages(
    server: Server, root: Path, pool: Path, first: int, second: int, tier: str
) -> None:
    text = prompt(10 + first + 2 * list(MEDIA).index(tier))
    before = promoted(server, second, tier)
    cold = stored((pool, root), lambda: server.ask(text, replica=first))
    assert cold["cached"] == 0
    only = {"kv_load_tiers": [{"medium": MEDIA[tier]}]}
    hit = server.ask(text, replica=second, params=only)
    assert hit["cached"] >= HIT
    assert hit["text"] == cold["text"]
    # The statistics of an engine's last step come after the answer.
    wait_until(lambda: promoted(server, second, tier) >= before + PAGES - 1)


def test_two_servers_share_their_pages_and_one_may_be_killed(
    llama: Path, server: Server, root: Path, pool: Path, tmp_path: Path
) -> None:
    with Engine(llama, tmp_path / "log", kv_transfer_config=sharing(root)) as engine:
        assert region_files() == []
        mine, theirs = prompt(20), prompt(21)
        cold = stored((pool, root), lambda: engine.ask(mine))
        hit = server.ask(mine)
        assert hit["cached"] >= HIT
        assert hit["text"] == "".join(map(chr, cold["tokens"]))
        answer = stored((pool, root), lambda: server.ask(theirs, replica=1))
        hit = engine.ask(theirs)
        assert hit["cached"] >= HIT
        assert "".join(map(chr, hit["tokens"])) == answer["text"]
        engine.kill()
    hit = server.ask(mine, replica=1)
    assert hit["cached"] >= HIT
    assert hit["text"] == "".join(map(chr, cold["tokens"]))


def test_the_next_version_hits_at_once_what_a_killed_one_stored(
    llama: Path, server: Server, root: Path, pool: Path, tmp_path: Path
) -> None:
    """With all of a node's engines gone, and nobody who kept the pool meanwhile."""
    text = prompt(30)
    cold = stored((pool, root), lambda: server.ask(text))
    processes = session(server.process.pid)
    server.kill()
    wait_until(lambda: not session(server.process.pid))
    assert len(processes) > 4, "two replicas with their I/O processes"
    with Engine(llama, tmp_path / "log", kv_transfer_config=sharing(root)) as engine:
        hit = engine.ask(text, params={"kv_load_tiers": [{"medium": "cpu"}]})
        assert hit["cached"] >= HIT
        assert "".join(map(chr, hit["tokens"])) == cold["text"]
