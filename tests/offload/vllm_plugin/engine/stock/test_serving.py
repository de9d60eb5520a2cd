"""Requests of vLLM's scheduler, served by vLLM's own manager over tiers of ours.

The engine compares each block that a request reads without having computed it.
"""

import os
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from tests.engine.conftest import CHECKPOINTS  # noqa: E402
from tests.models import tiny_llama  # noqa: E402
from tests.offload.vllm_plugin.block_engine import BLOCK, KINDS, Model  # noqa: E402
from tests.offload.vllm_plugin.engine.stock.stock_world import (  # noqa: E402
    ROW_BYTES,
    StartEngine,
    changed,
    entry,
    files_of,
)
from tests.offload.vllm_plugin.traces import trace  # noqa: E402
from tests.spoiling import flip  # noqa: E402
from tests.tiers.valkey.server import Server  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

CHUNKS = 10  # of a prompt; the last token is computed in any case, and with it the last block


def prompt(number: int) -> list[int]:
    return [8 + (number * 7919 + place) % 190 for place in range(CHUNKS * BLOCK + 1)]


def bytes_below(root: Path) -> int:
    """Of the disk; files may go meanwhile."""
    used = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):
                used += os.stat(os.path.join(folder, name)).st_blocks * 512
    return used


def test_what_the_cpu_tier_evicted_comes_back(start: StartEngine, tmp_path: Path) -> None:
    engine = start(entry("KVStrataFs", root_dir=str(tmp_path)))
    prompts = [prompt(number) for number in range(6)]
    assert engine.run(*prompts) == 0
    assert len(files_of(tmp_path)) == 6 * CHUNKS  # of which the CPU tier has 24
    assert engine.run(*prompts) == 6 * CHUNKS
    assert engine.total("loaded_pages") >= 6 * CHUNKS - 24


def test_another_start_finds_the_pages(start: StartEngine, tmp_path: Path) -> None:
    tier = entry("KVStrataFs", root_dir=str(tmp_path))
    first = start(tier)
    first.run(prompt(1))
    first.close()
    second = start(tier)
    assert second.run(prompt(1), prompt(2)) == CHUNKS
    assert second.total("loaded_pages") == CHUNKS


def test_a_flipped_byte_is_a_miss(start: StartEngine, tmp_path: Path) -> None:
    tier = entry("KVStrataFs", root_dir=str(tmp_path))
    first = start(tier)
    first.run(prompt(1), prompt(2))
    first.close()
    files = files_of(tmp_path)
    for path in files:
        flip(path)
    second = start(tier)
    assert second.run(prompt(1), prompt(2)) == 0
    assert second.total("checksum") == 2 * CHUNKS
    assert second.total("loaded_pages") == 0
    second.close()
    third = start(tier)
    assert third.run(prompt(1), prompt(2)) == 2 * CHUNKS, "they were not stored anew"


def test_one_bad_page_costs_the_pages_behind_it(start: StartEngine, tmp_path: Path) -> None:
    tier = entry("KVStrataFs", root_dir=str(tmp_path))
    first = start(tier)
    first.run(prompt(1))
    first.close()
    bad = max(files_of(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    flip(bad)
    second = start(tier)
    assert 0 < second.run(prompt(1)) < CHUNKS
    assert second.total("checksum") == 1


def test_the_disk_budget_is_kept(start: StartEngine, tmp_path: Path) -> None:
    most = 40 * (ROW_BYTES + 4096)
    engine = start(entry("KVStrataFs", root_dir=str(tmp_path), max_bytes=most))
    for number in range(30):
        engine.run(prompt(number))
        assert bytes_below(tmp_path) <= most
    wait_until(lambda: engine.total("evicted_pages") > 0)
    assert engine.run(prompt(29)) == CHUNKS


def test_pages_of_other_weights_are_not_found(
    start: StartEngine, model: Model, tmp_path: Path
) -> None:
    tier = entry("KVStrataFs", root_dir=str(tmp_path))
    first = start(tier)
    first.run(prompt(1))
    first.close()
    weights = str(tiny_llama(CHECKPOINTS, kv_heads=8))
    other = start(tier, config=changed(model.config, model_weights="", model=weights))
    assert other.run(prompt(1)) == 0
    assert len([path for path in tmp_path.iterdir() if path.name.endswith("_r0")]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_random_requests(kind: str, start: StartEngine, tmp_path: Path) -> None:
    """Preempted and aborted ones too, with groups that need the end of a prefix only."""
    model = Model(kind, 56 * len(KINDS[kind]))
    tier = entry("KVStrataFs", root_dir=str(tmp_path), max_files=200 * len(KINDS[kind]))
    slots = 24 * len(KINDS[kind])
    rounds = trace(seed=3)
    engine = start(tier, slots, model=model)
    engine.play(rounds[:12])
    engine.close()
    again = start(tier, slots, model=model)
    again.play(rounds[12:24])
    assert again.total("loaded_pages") > 0 and again.loaded > 0
    for failure in ("internal", "key", "shape"):
        assert engine.total(failure) == again.total(failure) == 0


def test_pages_in_memory(start: StartEngine) -> None:
    engine = start(entry("KVStrataMemory"))
    prompts = [prompt(number) for number in range(6)]
    assert engine.run(*prompts) == 0
    assert engine.run(*prompts) == 6 * CHUNKS


def test_pages_in_a_valkey_server(start: StartEngine, server: Server) -> None:
    tier = entry("KVStrataValkey", url=server.url)
    first = start(tier)
    first.run(prompt(1))
    first.close()
    second = start(tier)
    assert second.run(prompt(1)) == CHUNKS
    second.close()
    for key in server.ask("KEYS", "*:data"):
        server.ask("SETRANGE", key, 7, "?")
    third = start(tier)
    assert third.run(prompt(1)) == 0
    assert third.total("checksum") == CHUNKS


def test_pages_in_a_bucket(start: StartEngine, directory: Path) -> None:
    tier = entry("KVStrataObject", url="s3://pages", n_read_threads=2, n_write_threads=2)
    first = start(tier)
    first.run(prompt(1))
    first.close()
    assert len(files_of(directory)) == CHUNKS
    second = start(tier)
    assert second.run(prompt(1)) == CHUNKS


def test_a_pool_outlives_its_server(start: StartEngine) -> None:
    from tests.tiers.pool.pool_world import own_shm

    with own_shm():
        tier = entry("KVStrataPool", name=f"stock-{os.getpid()}", max_bytes="1MiB")
        first = start(tier)
        first.run(prompt(1))
        first.close()
        second = start(tier)
        assert second.run(prompt(1)) == CHUNKS
        second.close()
