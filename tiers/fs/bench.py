"""`python -m kvstrata.tiers.fs.bench --root DIR`: this tier against stock vLLM's, side by side.

Both store and load the same pages from the same shared memory, in turns, so that a device
whose speed drifts treats both alike. Stock is what its FileSystemTierManager does with a job:
one task of vLLM's C extension on its thread pool. "busy" means that a Python thread spins in
the calling process, as vLLM's engine does. All figures are medians.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kvstrata.tiers.base import (
    Job,
    Page,
    PageLayout,
    PageRegion,
    RequestView,
    TensorSpec,
    TierContext,
)
from kvstrata.tiers.fs.tier import FsTier

KIB = 1024
SIZES = (128 * KIB, 512 * KIB, 2048 * KIB, 5120 * KIB)
PAGES = 64  # of a round
SHAPES = {"one job of 64": 64, "16 jobs of 4": 4}  # pages per job
_TICKS = os.sysconf("SC_CLK_TCK")


class Row(NamedTuple):
    """One measurement, as it stands in the CSV file."""

    machine: str
    python: str
    tier: str
    engine: str
    size: int
    shape: str
    operation: str
    gb_s: float
    cpu_s_per_gb: float
    job_p50_ms: float
    job_p99_ms: float


class Memory:
    """Shared memory for the pages of a round, filled with noise."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("kvstrata-bench")
        os.ftruncate(self.fd, PAGES * size)
        self.view = memoryview(mmap.mmap(self.fd, 0))
        for slot in range(PAGES):
            self.view[slot * size : (slot + 1) * size] = os.urandom(size)
        self.region = PageRegion(self.fd, 0, size, PAGES)

    def page(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        size = self.region.slot_bytes
        return self.view[slot * size : (slot + 1) * size]

    def close(self) -> None:
        """Give the memory back, once nobody uses it."""
        os.close(self.fd)


class Contestant(Protocol):
    """A tier under test."""

    name: str

    def submit(self, job_id: int, store: bool, keys: Sequence[bytes], first_slot: int) -> None:
        """Start a job over the slots from `first_slot` on."""

    def finished(self) -> list[int]:
        """Jobs that ended; AssertionError if one failed."""

    def pids(self) -> list[int]:
        """Its processes besides this one."""

    def close(self) -> None:
        """End it."""


class Ours:
    """kvstrata's tier."""

    name = "kvstrata"

    def __init__(self, root: Path, memory: Memory) -> None:
        size = memory.region.slot_bytes
        layout = PageLayout((TensorSpec("kv", "U8", (1, size)),), 16)
        context = TierContext("bench", {"size": size}, {0: layout}, memory.region)
        self._tier = FsTier({"root_dir": str(root / "kvstrata")}, context)
        self._memory = memory

    def submit(self, job_id: int, store: bool, keys: Sequence[bytes], first_slot: int) -> None:
        pages = tuple(
            Page(key, 0, 0, slot, self._memory.page(slot))
            for slot, key in enumerate(keys, start=first_slot)
        )
        submit = self._tier.submit_store if store else self._tier.submit_load
        submit(Job(job_id, pages, RequestView("bench")))

    def finished(self) -> list[int]:
        results = self._tier.get_finished()
        assert not any(result.failed for result in results), results
        return [result.job_id for result in results]

    def pids(self) -> list[int]:
        return list(self._tier.roots[0].processes.pids())

    def close(self) -> None:
        self._tier.shutdown(60.0)


class Stock:
    """vLLM's filesystem tier: its pool and its C extension."""

    name = "stock"

    def __init__(self, root: Path, memory: Memory) -> None:
        from vllm.v1.kv_offload.tiering.fs import io
        from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

        assert io._HAS_FSIO_C, "vLLM's C extension is missing"
        self._io: Any = io
        self._root = root / "stock"
        self._root.mkdir(exist_ok=True)
        self._direct = io.probe_o_direct(str(self._root))
        self._pool: Any = DualQueueThreadPool(16, 16)
        self._memory = memory

    def submit(self, job_id: int, store: bool, keys: Sequence[bytes], first_slot: int) -> None:
        size = self._memory.region.slot_bytes
        paths = [
            f"{self._root}/{key.hex()[:3]}/{key.hex()[3:5]}_g0/{key.hex()}.bin" for key in keys
        ]
        offsets = [(first_slot + index) * size for index in range(len(keys))]
        move = self._io.batch_store_block if store else self._io.batch_load_block
        enqueue = self._pool.enqueue_store if store else self._pool.enqueue_load

        def task() -> None:
            move(paths, self._memory.view, offsets, size, self._direct)

        enqueue(job_id, 1, [task])

    def finished(self) -> list[int]:
        results = self._pool.get_finished()
        assert all(success for _, success, _ in results), results
        return [job_id for job_id, _, _ in results]

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        self._pool.shutdown()


MAKERS: list[Callable[[Path, Memory], Contestant]] = [Ours, Stock]


@contextmanager
def engine(busy: bool) -> Iterator[None]:
    """With `busy`, a Python thread spins meanwhile."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    if busy:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if busy:
            thread.join()


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that the processes took so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def move(tier: Contestant, store: bool, keys: Sequence[bytes], per_job: int) -> list[float]:
    """Move all pages in jobs of `per_job`; seconds until the end of each job."""
    start, left = time.perf_counter(), PAGES // per_job
    times: list[float] = []
    for job_id in range(left):
        first = job_id * per_job
        tier.submit(job_id, store, keys[first : first + per_job], first)
    while len(times) < left:
        times += [time.perf_counter() - start] * len(tier.finished())
        time.sleep(0.0001)
    return times


def each_file(root: Path, action: Callable[[int], object]) -> None:
    """Open all files below `root` one after the other and do something with them."""
    for directory, _, names in os.walk(root):
        for name in names:
            fd = os.open(os.path.join(directory, name), os.O_RDONLY)
            action(fd)
            os.close(fd)


def drop(fd: int) -> None:
    """Take the file out of the page cache."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def warm(fd: int) -> None:
    """Bring the file into the page cache."""
    while os.read(fd, 2**20):
        pass


def round_of(
    tier: Contestant, root: Path, per_job: int, busy: bool
) -> Iterator[tuple[str, list[float], float]]:
    """Store, load cold, load warm: operation, seconds per job, CPU seconds."""
    keys = [os.urandom(32) + bytes(4) for _ in range(PAGES)]
    for operation, prepare in (("store", None), ("load cold", drop), ("load warm", warm)):
        if prepare is not None:
            each_file(root, prepare)
        pids = [os.getpid(), *tier.pids()]
        with engine(busy):
            before, start = cpu_seconds(pids), time.perf_counter()
            times = move(tier, operation == "store", keys, per_job)
            spun = time.perf_counter() - start if busy else 0.0
            yield operation, times, cpu_seconds(pids) - before - spun


def measure(root: Path, sizes: Sequence[int], repeat: int) -> list[Row]:
    """All rows; the tiers take turns in every repetition."""
    rows = []
    machine = f"{platform.node()} {os.cpu_count()} cores Linux {platform.release()}"
    for size in sizes:
        memory = Memory(size)
        tiers = [make(root, memory) for make in MAKERS]
        for busy, (shape, per_job) in itertools.product((False, True), SHAPES.items()):
            found: dict[tuple[str, str], list[tuple[list[float], float]]] = defaultdict(list)
            for number in range(repeat + 1):
                for tier in tiers if number % 2 else tiers[::-1]:
                    for operation, times, cpu in round_of(tier, root, per_job, busy):
                        if number:  # the first round warms up
                            found[tier.name, operation].append((times, cpu))
                    for path in (root / tier.name).glob("**/*_g0"):
                        shutil.rmtree(path)
            gigabytes = PAGES * size / 1e9
            for (name, operation), runs in found.items():
                every = sorted(t for times, _ in runs for t in times)
                rows.append(
                    Row(
                        *(machine, platform.python_version(), name, "busy" if busy else "idle"),
                        *(size, shape, operation),
                        round(gigabytes / statistics.median(max(t) for t, _ in runs), 3),
                        round(statistics.median(cpu for _, cpu in runs) / gigabytes, 3),
                        round(1000 * statistics.median(every), 3),
                        round(1000 * every[min(len(every) - 1, len(every) * 99 // 100)], 3),
                    )
                )
        for tier in tiers:
            tier.close()
        memory.close()
    return rows


def report(rows: Sequence[Row]) -> None:
    """Print ours against stock."""
    by_case: dict[tuple[str, int, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_case[row.engine, row.size, row.shape, row.operation][row.tier] = row
    print(f"{'':38}{'ours':>8}{'stock':>8}{'ratio':>7}{'CPU s/GB':>16}")
    for (state, size, shape, operation), pair in by_case.items():
        ours, stock = pair[Ours.name], pair[Stock.name]
        case = f"{state} {size // KIB:>4} KiB {shape} {operation}"
        speed = f"{ours.gb_s:8.2f}{stock.gb_s:8.2f}{ours.gb_s / stock.gb_s:7.2f}"
        print(f"{case:38}{speed}{ours.cpu_s_per_gb:9.2f}{stock.cpu_s_per_gb:7.2f}")


def targets(rows: Sequence[Row]) -> str:
    """The targets that were met and missed, in one line."""
    speed = {(r.tier, r.engine, r.size, r.shape, r.operation): r.gb_s for r in rows}
    met, missed = 0, []
    for (tier, state, size, shape, operation), value in speed.items():
        if tier != Ours.name:
            continue
        least = 1.0 if state == "busy" else 0.95
        if operation == "load warm":
            if size < 512 * KIB:
                continue
            least = 4.0
        ratio = value / speed[Stock.name, state, size, shape, operation]
        if ratio >= least:
            met += 1
        else:
            missed.append(f"{state} {size // KIB}K {shape} {operation} {ratio:.2f}<{least:g}")
    return f"targets: {met} met, {len(missed)} missed{': ' if missed else ''}{'; '.join(missed)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="a directory on the disk to measure")
    parser.add_argument("--csv", help="append the figures to this file")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kib", type=int, nargs="+", default=[size // KIB for size in SIZES])
    options = parser.parse_args(arguments)
    Path(options.root).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.root) as root:
        rows = measure(Path(root), [kib * KIB for kib in options.kib], options.repeat)
    if options.csv:
        new = not os.path.exists(options.csv)
        with open(options.csv, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(Row._fields)
            writer.writerows(rows)
    report(rows)
    print(targets(rows))


if __name__ == "__main__":
    main()
