"""Who is measured: kvstrata's tier, and the client's own loop in two processes."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from kvstrata.tiers.process.tier import ProcessTier
from kvstrata.tiers.registry import tier_class
from tests.bench.jobs import Memory, TierJobs, WrongBytes, context
from tests.bench.tiers import loops
from tests.bench.tiers.media import Medium

PER_JOB = 16  # pages


class Ours(TierJobs):
    """The tier."""

    def __init__(self, medium: Medium, memory: Memory) -> None:
        options = {key: value for key, value in medium.options.items() if key != "type"}
        tier = tier_class(medium.options)(options, context(memory))
        assert isinstance(tier, ProcessTier)
        super().__init__(tier, memory)
        self._before_load = medium.before_load

    def prepare(self, store: bool, keys: Sequence[bytes]) -> None:
        """Before a round."""
        if not store:
            self._before_load(self._tier, keys)

    def together(self, store: bool, keys: Sequence[bytes]) -> float:
        """Seconds until all pages were moved, in jobs that were submitted at once."""
        return max(self.move(store, keys, PER_JOB))

    def one_by_one(self, store: bool, keys: Sequence[bytes]) -> list[float]:
        """Seconds of each page, asked for when the one before was there."""
        submit, seconds = self.submitter(store, keys), []
        for slot in range(len(keys)):
            start = time.perf_counter()
            submit(slot, range(slot, slot + 1))
            while not (ended := self.finished()):
                time.sleep(0)
            seconds.append(time.perf_counter() - start)
            if not all(ended):
                raise WrongBytes(f"{self.name}: a page was not moved")
        return seconds


class Raw:
    """The client's own loop."""

    name = "raw"

    def __init__(self, medium: Medium, memory: Memory) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(2):
            ours, theirs = spawn.Pipe()
            place = (memory.path, memory.region.slot_bytes)
            arguments = (theirs, *place, medium.loop, medium.argument, medium.threads)
            self._processes.append(spawn.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)

    def prepare(self, store: bool, keys: Sequence[bytes]) -> None:
        """Before a round: nothing."""

    def together(self, store: bool, keys: Sequence[bytes]) -> float:
        """As `Ours.together`."""
        pages = _pages(keys)
        start = time.perf_counter()
        for number, pipe in enumerate(self._pipes):
            pipe.send((store, pages[number :: len(self._pipes)], False))
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - start

    def one_by_one(self, store: bool, keys: Sequence[bytes]) -> list[float]:
        """As `Ours.one_by_one`."""
        self._pipes[0].send((store, _pages(keys), True))
        seconds: list[float] = self._pipes[0].recv()
        return seconds

    def pids(self) -> list[int]:
        """Its processes besides this one."""
        return [process.pid for process in self._processes if process.pid]

    def close(self) -> None:
        """End it."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


def _pages(keys: Sequence[bytes]) -> list[tuple[str, int]]:
    return [(key.hex(), slot) for slot, key in enumerate(keys)]


def _serve(
    pipe: Connection, memory: str, page_bytes: int, loop: str, argument: Any, count: int
) -> None:
    """A process of `Raw`."""
    view = memoryview(mmap.mmap(os.open(memory, os.O_RDWR), 0))
    move = getattr(loops, loop)(argument, page_bytes)

    def timed(store: bool, name: str, slot: int) -> float:
        start = time.perf_counter()
        move(name, view[slot * page_bytes : (slot + 1) * page_bytes], store)
        return time.perf_counter() - start

    with ThreadPoolExecutor(count) as threads:
        while True:
            try:
                store, pages, one_by_one = pipe.recv()
            except EOFError:
                return
            if one_by_one:
                pipe.send([timed(store, *page) for page in pages])
            else:
                moves = [threads.submit(timed, store, *page) for page in pages]
                pipe.send([each.result() for each in moves])
