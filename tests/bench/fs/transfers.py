"""Speed: store, load cold and load warm, of one long job and of many small ones."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bench.fs.contestants import Contestant, contestants
from tests.bench.fs.figures import Figure
from tests.bench.jobs import Memory, WrongBytes

PAGES = 64  # of a round
SHAPES = {"one job of 64": 64, "16 jobs of 4": 4}  # pages per job
OPERATIONS = ("store", "load cold", "load warm")
# A round of small pages takes milliseconds, so it is repeated more often.
_FULL_BYTES = 2**21
_MOST_OFTEN = 4


class Run:
    """What one contestant did in one operation: all its repetitions."""

    def __init__(self) -> None:
        self.jobs: list[float] = []  # seconds to the end of each
        self.walls: list[float] = []  # seconds to the end of the last
        self.cpus: list[float] = []  # CPU seconds

    def figures(self, gigabytes: float) -> Iterator[tuple[str, float]]:
        """Metric and value."""
        yield "GB/s", gigabytes / statistics.median(self.walls)
        yield "CPU s/GB", statistics.median(self.cpus) / gigabytes
        if len(self.jobs) > len(self.walls):  # else a job is the round
            jobs = sorted(self.jobs)
            yield "job p50 ms", 1000 * statistics.median(jobs)
            yield "job p99 ms", 1000 * jobs[len(jobs) * 99 // 100]


def measure(root: Path, page_bytes: int, repeat: int) -> Iterator[Figure]:
    """All operations, shapes and states of the engine; the contestants take turns."""
    memory = Memory(page_bytes, PAGES)
    all_of_them = contestants(root, memory)
    rounds = repeat * min(_MOST_OFTEN, max(1, _FULL_BYTES // page_bytes))
    for busy, (shape, per_job) in itertools.product((False, True), SHAPES.items()):
        runs: dict[tuple[str, str], Run] = defaultdict(Run)
        for contestant in all_of_them:  # warms up, too
            verify(contestant, memory, per_job)
        for number in range(rounds):
            first = number % len(all_of_them)
            for contestant in all_of_them[first:] + all_of_them[:first]:
                for operation, jobs, cpu in _round(contestant, per_job, busy):
                    run = runs[contestant.name, operation]
                    run.jobs += jobs
                    run.walls.append(max(jobs))
                    run.cpus.append(cpu)
        for (name, operation), run in runs.items():
            for metric, value in run.figures(PAGES * page_bytes / 1e9):
                state = "busy" if busy else "idle"
                yield Figure(name, operation, shape, state, page_bytes, metric, value)
    for contestant in all_of_them:
        contestant.close()
    memory.close()


def _round(
    contestant: Contestant, per_job: int, busy: bool
) -> Iterator[tuple[str, list[float], float]]:
    """Operation, seconds per job, CPU seconds."""
    keys = new_keys()
    paths = contestant.paths(keys)
    for operation in OPERATIONS:
        _prepare(operation, paths)
        pids = [os.getpid(), *contestant.pids()]
        with _engine(busy) as spun:
            before = cpu_seconds(pids) - spun()
            jobs = contestant.move(operation == "store", keys, per_job)
            yield operation, jobs, cpu_seconds(pids) - spun() - before
    contestant.clear(keys)


def verify(contestant: Contestant, memory: Memory, per_job: int) -> None:
    """Store and load once and compare all bytes.

    Raises:
        WrongBytes: they differ.
    """
    keys, noise = new_keys(), bytes(memory.view)
    paths = contestant.paths(keys)
    for operation in OPERATIONS:
        _prepare(operation, paths)
        if operation != "store":
            memory.view[:] = bytes(len(noise))
        contestant.move(operation == "store", keys, per_job)
        if memory.view != noise:
            memory.view[:] = noise
            raise WrongBytes(f"{contestant.name}: {operation} changed the pages")
    contestant.clear(keys)


def new_keys() -> list[bytes]:
    """Keys for a round."""
    return [os.urandom(32) + bytes(4) for _ in range(PAGES)]


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that the processes took so far."""
    # the clock of a process, as clock_getcpuclockid(3) makes it on Linux
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


@contextmanager
def _engine(busy: bool) -> Iterator[Callable[[], float]]:
    """With `busy`, a Python thread spins meanwhile; yields what tells its CPU seconds."""
    if not busy:
        yield lambda: 0.0
        return
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    try:
        yield lambda: time.clock_gettime(clock)
    finally:
        stop.set()
        thread.join()


def _prepare(operation: str, paths: Sequence[str]) -> None:
    """Take the pages out of the page cache, or bring them in."""
    action = {"load cold": _drop, "load warm": _warm}.get(operation)
    if action:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            action(fd)
            os.close(fd)


def _drop(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _warm(fd: int) -> None:
    while os.read(fd, 2**20):
        pass
