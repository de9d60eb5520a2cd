"""A recording of a real server, replayed: the simulator finds what the server found."""

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kvstrata.offload.cli.server.scrape import Scrape, read
from kvstrata.offload.metering.names import HIT_CHUNKS, PRIMARY, QUERY_CHUNKS, SLOTS
from kvstrata.offload.simulate.scheduler import Scheduler
from kvstrata.offload.simulate.setup import Engine, Speeds, build, parse_setup
from kvstrata.offload.simulate.traces import Trace, read_trace
from tests.engine.driver import BLOCK, GPU_BLOCKS, Server, connector, prompt, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

LRU = {"eviction_policy": "lru"}
FILES = {"type": "fs", "min_free_bytes": 0}
# What a request finds depends on nothing but the requests before it.
AT_ONCE = Speeds(prefill=math.inf, gpu=math.inf, read=math.inf, write=math.inf, latency=0.0)
REQUESTS = 40
Found = Mapping[str, tuple[float, float]]  # by tier: chunks asked for, and found


def prompts() -> Iterator[str]:
    """Some begin like others, and none is the beginning of another."""
    choose = random.Random(5)
    for seed in range(REQUESTS):
        begin = prompt(1000 + choose.randrange(6), choose.randint(3, 6) * BLOCK)
        yield begin + prompt(seed, choose.randint(1, 4) * BLOCK)


def metrics(server: Server) -> Scrape:
    return read(f"http://127.0.0.1:{server.port}")


def found_by(server: Server) -> Found:
    """What its metrics say."""
    told = metrics(server)
    return {
        tier: (told.total(QUERY_CHUNKS, tier=tier), told.total(HIT_CHUNKS, tier=tier))
        for tier in (PRIMARY, "fs")
    }


def found_in_replay(trace: Trace, slots: int) -> tuple[Found, int]:
    """What the simulator says, and how many pages left its CPU tier."""
    size = trace.bytes_per_chunk
    assert size is not None
    setup = parse_setup({**LRU, "cpu_bytes_to_use": slots * size, "secondary_tiers": [FILES]})
    # one of the GPU's blocks is vLLM's null block
    engine = Engine(BLOCK, size, gpu_bytes=(GPU_BLOCKS - 1) * size, speeds=AT_ONCE)
    world = build(setup, engine)
    Scheduler(world, engine).run(trace.requests)
    manager = world.manager
    found = {
        tier or PRIMARY: (float(each.query_chunks), float(each.hit_chunks))
        for tier, each in manager.found.takings.items()
    }
    return found, manager.counters["evicted_pages"]


def test_the_simulator_finds_what_the_server_found(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    config = connector(
        **LRU,
        cpu_bytes_to_use="6MiB",  # twice what the GPU holds, and a third of all
        record=str(file),
        secondary_tiers=[{**FILES, "root_dir": str(tmp_path / "kv")}],
    )
    with serving(llama, tmp_path / "server.log", kv_transfer_config=config) as server:
        for text in prompts():
            server.ask(text, max_tokens=1)
        wait_until(lambda: file.read_text().count("\n") == 1 + REQUESTS)
        trace = read_trace(str(file))
        expected, evicted = found_in_replay(trace, int(metrics(server).total(SLOTS)))
        assert all(hits for _, hits in expected.values()) and evicted

        def all_is_told() -> bool:  # that of a step may come with the next one
            server.ask("short", max_tokens=1)
            return found_by(server)[PRIMARY][0] >= expected[PRIMARY][0]

        wait_until(all_is_told)
        assert found_by(server) == expected
    assert read_trace(str(file)).requests[:REQUESTS] == trace.requests
