"""GB/s and CPU seconds of many pages at once, and the time of one page alone."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator

from tests.bench.fs.figures import Figure
from tests.bench.fs.transfers import cpu_seconds
from tests.bench.jobs import Memory, WrongBytes
from tests.bench.tiers.contestants import PER_JOB, Ours, Raw
from tests.bench.tiers.media import Medium

PAGES = 64  # of a round
_ALONE = 16  # of which so many are moved one by one as well
AT_ONCE, ALONE = f"{PAGES} at once, jobs of {PER_JOB}", "one by one"


def measure(name: str, medium: Medium, page_bytes: int, repeat: int) -> Iterator[Figure]:
    """The tier's figures and its loop's; the contestants take turns."""
    memory = Memory(page_bytes, PAGES)
    contestants = (Ours(medium, memory), Raw(medium, memory))
    walls: dict[tuple[str, str], list[float]] = defaultdict(list)
    cpus: dict[tuple[str, str], list[float]] = defaultdict(list)
    alone: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(repeat + 1):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            many, few = _keys(PAGES), _keys(_ALONE)
            for operation in ("store", "load"):
                store = operation == "store"
                case = contestant.name, f"{name}: {operation}"
                noise = b"" if store else _forget(memory)
                contestant.prepare(store, many)
                pids = [os.getpid(), *contestant.pids()]
                before = cpu_seconds(pids)
                wall = contestant.together(store, many)
                cpu = cpu_seconds(pids) - before
                if not store and memory.view != noise:
                    raise WrongBytes(f"{case}: other bytes came back")
                contestant.prepare(store, few)
                seconds = contestant.one_by_one(store, few)
                if number:  # the first repetition warms up
                    walls[case].append(wall)
                    cpus[case].append(cpu)
                    alone[case] += seconds
            medium.clear()
    for contestant in contestants:
        contestant.close()
    memory.close()
    gigabytes = PAGES * page_bytes / 1e9
    for (who, what), found in walls.items():
        pages = sorted(alone[who, what])
        for shape, metric, value in (
            (AT_ONCE, "GB/s", gigabytes / statistics.median(found)),
            (AT_ONCE, "CPU s/GB", statistics.median(cpus[who, what]) / gigabytes),
            (ALONE, "p50 ms", 1000 * statistics.median(pages)),
            (ALONE, "p99 ms", 1000 * pages[len(pages) * 99 // 100]),
        ):
            yield Figure(who, what, shape, "", page_bytes, metric, value)


def _forget(memory: Memory) -> bytes:
    """What the memory held, which is all zeros now."""
    noise = bytes(memory.view)
    memory.view[:] = bytes(len(noise))
    return noise


def _keys(count: int) -> list[bytes]:
    return [os.urandom(32) + bytes(4) for _ in range(count)]
