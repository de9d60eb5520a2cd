"""`kvstrata doctor --server` beside real servers that have the faults it is to name."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.offload.cli.server.judging import LEAST_CHUNKS
from kvstrata.offload.cli.server.scrape import read
from kvstrata.offload.metering.names import CAPACITY_TOKENS, LATENCY, QUERY_CHUNKS
from tests.engine.driver import Server, connector, prompt, serving
from tests.engine.sick_tiers import CAUSE
from tests.offload.cli.cli_world import outcome, run_json
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

TOKENS = 320  # of a prompt
PAGE = 3 * 4 * 64 * 32 * 4  # bytes: layers, heads, K and V, tokens, float32
HEADER = 1 << 20  # of the CPU tier
XXHASH = "--prefix-caching-hash-algo=xxhash"


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def faults(*servers: Server) -> dict[str, dict[str, Any]]:
    """What is wrong, by fault and what it is about."""
    named = [word for server in servers for word in ("--server", url(server))]
    found = run_json("doctor", *named, "--for", "0s", exit_code=1)
    of_engines = [each for server in found["servers"] for each in server["findings"]]
    return {f"{f['fault']}, {f['about']}": f for f in of_engines + found["across"] if f["wrong"]}


def broken(name: str) -> dict[str, Any]:
    return {"type": name, "module_path": "tests.engine.sick_tiers"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def thrashing(llama: Path, logs: Path) -> Iterator[Server]:
    """Forty prompts fit into its CPU tier, twenty onto its disk, and another tier is broken."""
    files = {"type": "fs", "root_dir": str(logs / "kv"), "max_bytes": 20 * 10 * (PAGE + 8192)}
    config = connector(
        cpu_bytes_to_use=HEADER + 40 * 10 * PAGE,
        eviction_policy="lru",
        secondary_tiers=[files, broken("BrokenTier")],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "1")
        with serving(
            llama, logs / "thrashing.log", kv_transfer_config=config, arguments=(XXHASH,)
        ) as server:
            yield server


def test_a_server_without_traffic_is_not_judged(thrashing: Server) -> None:
    command = ("doctor", "--server", url(thrashing), "--for", "0s")
    code, _, error = outcome(*command)
    assert (code, "has told nothing of its tiers yet" in error) == (2, True)
    thrashing.ask(prompt(0), max_tokens=1)

    def is_told() -> bool:
        """The statistics of an engine's last step come after the answer."""
        return "too little traffic" in outcome(*command)[1]

    wait_until(is_told)


def test_thrashing(thrashing: Server) -> None:
    """Prompts that are asked for in turn, and together are a little larger than the CPU tier."""
    thrashing.ask(prompt(0), max_tokens=1)
    fit = read(url(thrashing)).total(CAPACITY_TOKENS) / TOKENS
    assert 39 < fit < 41
    prompts = [prompt(seed) for seed in range(int(fit) + 2)]
    for text in prompts * 2:
        thrashing.ask(text, max_tokens=1)
    found = faults(thrashing)
    assert found.keys() >= {
        "thrashing, primary",
        "budget evicts before reuse, fs",
        "breaker, BrokenTier",
    }
    assert not any(fault.startswith("hardly used") for fault in found)
    assert f"stores failed ({CAUSE})" in found["breaker, BrokenTier"]["found"]
    assert "cpu_bytes_to_use" in found["thrashing, primary"]["remedy"]


def test_a_small_cpu_tier_and_another_seed(llama: Path, logs: Path, thrashing: Server) -> None:
    """A disk as small as the CPU tier does not help, and lets others' pages be used."""
    files = {"type": "fs", "root_dir": str(logs / "small"), "max_bytes": 16 * PAGE}
    config = connector(cpu_bytes_to_use=HEADER + 16 * PAGE, secondary_tiers=[files])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "2")
        with serving(
            llama, logs / "small.log", kv_transfer_config=config, arguments=(XXHASH,)
        ) as server:
            server.ask(prompt(0), max_tokens=1)
            alone, together = faults(server), faults(server, thrashing)
    assert alone.keys() == {"CPU tier too small, primary"}
    assert together.keys() >= {"CPU tier too small, primary", "hash seeds differ, model"}


def test_wrong_pages_that_come_slowly(llama: Path, logs: Path) -> None:
    """Six prompts are asked for in turn, of which two or three are in the CPU tier."""
    config = connector(
        cpu_bytes_to_use=HEADER + 25 * PAGE,
        eviction_policy="lru",
        audit_fraction=1.0,
        secondary_tiers=[broken("WrongTier")],
    )
    seeds = itertools.cycle(range(6))
    with serving(llama, logs / "wrong.log", kv_transfer_config=config) as server:

        def is_timed() -> bool:
            server.ask(prompt(next(seeds)), max_tokens=1)
            latency = read(url(server)).largest(LATENCY, tier="WrongTier", direction="read")
            return latency is not None

        wait_until(is_timed)

        def is_named() -> bool:
            """What the tier has is computed, and compared with what it has."""
            for _ in range(6):
                server.ask(prompt(next(seeds)), max_tokens=1, params={"kv_load_tiers": []})
            if read(url(server)).total(QUERY_CHUNKS, tier="primary") < LEAST_CHUNKS:
                return False
            return faults(server).keys() >= {
                "audits differ, audits",
                "distrusted, WrongTier",
                "slower than computing, WrongTier",
            }

        wait_until(is_named)
