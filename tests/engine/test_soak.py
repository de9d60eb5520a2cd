"""Hundreds of requests over tiers that are too small and fail: not one wrong token, no leak.

The same traffic runs on an engine without offload first. Then nothing may differ, and every
path must have been taken: `make test-soak SEED=...` repeats a run.
"""

import contextlib
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.fs.tools.scan import check_root
from tests.engine.driver import Engine, connector
from tests.engine.soak_trace import Batch, Trace

pytestmark = pytest.mark.vllm

MEMORY = 5 * 2**20  # bytes: forty pages, and the region's header
BUDGET = 8 * 2**20  # bytes: eighty pages
BLOCKS = 26  # of the GPU cache, of which the longest request takes 18
MORE_MEMORY = 64 * 2**20  # bytes that the engine may have more of than one without offload
MORE_FILES = 24  # open


def test_soak(llama: Path, tmp_path: Path, is_long: bool, seed: int | None) -> None:
    if seed is None:
        seed = random.SystemRandom().getrandbits(32) if is_long else 0
    print(f"make test-soak SEED={seed}")
    with Engine(
        llama, tmp_path / "reference.log", kv_transfer_config=None, blocks=BLOCKS
    ) as engine:
        batches = reference(engine, seed, requests=300 if is_long else 60)
        plain = engine.resources()

    root = tmp_path / "kv"
    damage = random.Random(seed)
    with Engine(
        llama, tmp_path / "log", kv_transfer_config=configuration(root, seed), blocks=BLOCKS
    ) as engine:
        engine.slow_transfers(0, 3, seed)
        for number, batch in enumerate(batches):
            answers = engine.run(batch.requests, batch.events)
            check_tokens(number, batch, answers)
            assert disk_usage(root) <= BUDGET
            if damage.random() < 0.2:
                spoil(root, damage)
        check_that_all_was_hit(engine.counters(), is_long)
        check_that_nothing_is_held(engine)
        used = engine.resources()
        assert used["rss"] < plain["rss"] + MORE_MEMORY
        assert used["files"] < plain["files"] + MORE_FILES
        assert engine.end() == [], "processes were left behind"
    report = check_root(root)
    assert (report.temporary, report.abandoned) == (0, [])
    assert disk_usage(root) <= BUDGET


def reference(engine: Engine, seed: int, requests: int) -> list[Batch]:
    """The traffic, with the answers of an engine without offload."""
    trace = Trace(seed)
    batches: list[Batch] = []
    while sum(len(batch.requests) for batch in batches) < requests:
        batch = trace.next()
        answers = [answer["tokens"] for answer in engine.run(batch.requests) if answer is not None]
        trace.learn(batch, answers)
        batches.append(batch)
    return batches


def configuration(root: Path, seed: int) -> dict[str, Any]:
    """Forty pages in memory and eighty on the disk, for traffic of many more."""
    tier = {
        "type": "SoakTier",
        "module_path": "tests.engine.soak_tier",
        "seed": seed,
        "root_dir": str(root),
        "max_bytes": BUDGET,
        "n_read_threads": 2,
        "n_write_threads": 2,
    }
    return connector(
        cpu_bytes_to_use=MEMORY,
        eviction_policy=random.Random(seed).choice(("lru", "arc")),
        offload_prompt_only=False,
        lookup_deadline_s=0.1,
        promotion_deadline_s=0.2,
        secondary_tiers=[tier],
    )


def check_tokens(number: int, batch: Batch, answers: list[dict[str, Any] | None]) -> None:
    """Each answer is the reference's; only requests that were to be aborted may have none."""
    aborted = {event["request"] for event in batch.events if event["do"] == "abort"}
    for index, (tokens, answer) in enumerate(zip(batch.answers, answers, strict=True)):
        if answer is None:
            assert index in aborted
        else:
            assert answer["tokens"] == tokens, f"batch {number}, request {index}"


def check_that_all_was_hit(counters: dict[str, Any], is_long: bool) -> None:
    """The run is worth something only if each path was taken."""
    totals = Counter({name: n for name, n in counters.items() if isinstance(n, int)})
    failures = Counter(counters["failures"]["SoakTier"])
    taken = {
        "stores": totals["stored_pages"],
        "loads": totals["loaded_pages"],
        "hits in memory": totals["primary_hits"],
        "evictions from memory": totals["evicted_pages"],
        "cascades": totals["cascaded_pages:SoakTier"],
        "promotions": totals["promoted_pages:SoakTier"],
        "promotions that failed": totals["promoted_failed:SoakTier"],
        "stores that failed": failures["injected-store"],
        "evictions from the disk": counters["tiers"]["SoakTier"]["evicted_pages"],
        "wrong wishes": totals["wrong_wishes"],
    }
    if is_long:
        taken |= {
            "preemptions": totals["preemptions"],
            "bad files": failures["checksum"],
            "exceptions": failures["raised-in-lookup"],
            "deadlines": totals["lookup_timeouts"] + totals["promotion_timeouts"],
        }
    assert all(taken.values()), taken


def check_that_nothing_is_held(engine: Engine) -> None:
    """Every slot can be used, and nothing is remembered; what hung or was pinned has its time."""
    engine.settle()
    deadline = time.monotonic() + 30
    while (counters := engine.counters())["unused"] < counters["slots"]:
        assert time.monotonic() < deadline, f"{counters['unused']} of {counters['slots']} slots"
        engine.ask("a", max_tokens=4)
    held = engine.held()
    assert not any(held.values()), held


def page_files(root: Path) -> list[Path]:
    """All page files below the root; some may be evicted meanwhile, with their directories."""
    return [
        Path(directory, name)
        for directory, _, names in os.walk(root)
        for name in names
        if name.endswith(".safetensors")
    ]


def disk_usage(root: Path) -> int:
    """Bytes that page files take on the disk."""
    total = 0
    for path in page_files(root):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def spoil(root: Path, choose: random.Random) -> None:
    """Damage some page files, as a bad disk does."""
    paths = sorted(page_files(root))
    for path in choose.sample(paths, min(3, len(paths))):
        with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
