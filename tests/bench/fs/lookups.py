"""Lookups: their time on the calling thread, and the memory of what they are answered from."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from kvstrata.tiers.process.index import Index
from tests.bench.fs.contestants import Ours, Tier, tiers
from tests.bench.fs.figures import Figure
from tests.bench.jobs import Memory

KEYS = 2048  # of a repetition
INDEXED = 1_000_000  # files
_PAGE_BYTES = 4096
_REPEATED = 20


def measure_time(root: Path, repeat: int) -> Iterator[Figure]:
    """Microseconds per key, the first time and again.

    The first time includes sending the keys off at the end of a step, and taking the answers
    in a later one. The tier has read its books. All keys are found, but for the unknown ones.
    """
    memory = Memory(_PAGE_BYTES, KEYS)
    keys = [os.urandom(32) + bytes(4) for _ in range(KEYS)]
    for tier in tiers(root, memory):
        tier.move(True, keys, KEYS)
        tier.close()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(repeat + 1):
        for tier in tiers(root, memory):
            tier.learn(len(keys))
            first, repeated = ask(tier, keys)
            unknown, _ = ask(tier, [os.urandom(32) + bytes(4) for _ in keys], found=False)
            if number:  # the first repetition warms up
                found[tier.name, "lookup, first"].append(first)
                found[tier.name, "lookup, unknown"].append(unknown)
                found[tier.name, "lookup, repeated"].append(repeated)
            tier.close()
    memory.close()
    for (name, operation), seconds in found.items():
        value = 1e6 * statistics.median(seconds) / KEYS
        yield Figure(name, operation, f"{KEYS} keys", "idle", 0, "us/key", value)


def measure_memory() -> Iterator[Figure]:
    """Bytes per file that our index takes, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        value = process.submit(_index_bytes, INDEXED).result() / INDEXED
    yield Figure(Ours.name, "index", f"{INDEXED} files", "idle", 0, "bytes/file", value)


def ask(tier: Tier, keys: Sequence[bytes], found: bool = True) -> tuple[float, float]:
    """Seconds of the calling thread for all keys: the first time, and again."""
    lookup, request = tier.lookup, tier.request
    answer = tier.hit if found else tier.miss

    def ask_all() -> None:
        for key in keys:
            lookup(key, request)

    first = _seconds(ask_all) + _seconds(tier.end_step)
    answered = lookup(keys[-1], request) is answer
    while not answered:
        time.sleep(0.05)
        first += _seconds(tier.end_step)
        answered = lookup(keys[-1], request) is answer
    time.sleep(0.05)
    first += _seconds(tier.end_step)  # whatever still comes
    return first, statistics.median(_seconds(ask_all) for _ in range(_REPEATED))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _index_bytes(files: int) -> int:
    index = Index(max_present=files)
    before = _resident_bytes()
    for _ in range(files):
        index.add(os.urandom(32) + bytes(4))
    return _resident_bytes() - before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
