"""Pages in shared memory, and what moves them in jobs: kvstrata's tiers, whichever they are."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence

from kvstrata.tiers.base import (
    Job,
    PageLayout,
    PageRegion,
    RequestView,
    TensorSpec,
    TierContext,
    layouts_to_json,
)
from kvstrata.tiers.process.tier import ProcessTier

REQUEST = "bench"
POLL_S = 0.0001


class WrongBytes(Exception):
    """A contestant failed, or loaded something else than what was stored."""


class Memory:
    """Shared memory of `slots` pages, filled with noise."""

    def __init__(self, page_bytes: int, slots: int) -> None:
        self._fd = os.memfd_create("kvstrata-bench")
        os.ftruncate(self._fd, slots * page_bytes)
        self.view = memoryview(mmap.mmap(self._fd, 0))
        for slot in range(slots):
            self.page(slot, page_bytes)[:] = os.urandom(page_bytes)
        self.region = PageRegion(self._fd, 0, page_bytes, slots)

    @property
    def path(self) -> str:
        """Where other processes can open it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def page(self, slot: int, page_bytes: int | None = None) -> memoryview:
        """The bytes of a slot."""
        size = page_bytes or self.region.slot_bytes
        return self.view[slot * size : (slot + 1) * size]

    def close(self) -> None:
        """Give it back, once nobody uses it."""
        os.close(self._fd)


def context(memory: Memory) -> TierContext:
    """Of an engine whose pages are the slots of the memory."""
    layout = PageLayout((TensorSpec("kv", "U8", (1, memory.region.slot_bytes)),), 16)
    namespace = {"pages": layouts_to_json({0: layout})}
    return TierContext(REQUEST, namespace, {0: layout}, memory.region)


class TierJobs:
    """A tier of kvstrata with I/O processes, given its work as the manager gives it."""

    name = "kvstrata"

    def __init__(self, tier: ProcessTier, memory: Memory) -> None:
        self._tier, self._memory = tier, memory

    def move(self, store: bool, keys: Sequence[bytes], per_job: int) -> list[float]:
        """Seconds from the beginning to the end of each job."""
        return in_jobs(len(keys), per_job, self.submitter(store, keys), self.finished)

    def submitter(self, store: bool, keys: Sequence[bytes]) -> Callable[[int, range], None]:
        """What submits a job by its number and its slots; key i has slot i."""
        submit_job = self._tier.submit_store if store else self._tier.submit_load
        request = RequestView(REQUEST)

        def submit(job_id: int, slots: range) -> None:
            chosen = [keys[slot] for slot in slots]
            submit_job(Job(job_id, chosen, slots, [0] * len(slots), request, self._view))

        return submit

    def finished(self) -> list[bool]:
        """Of each job that ended meanwhile, whether all its pages were moved."""
        return [not result.failed for result in self._tier.get_finished()]

    def pids(self) -> list[int]:
        """Its I/O processes."""
        return [pid for each in self._tier.processes for pid in each.pids()]

    def close(self) -> None:
        """End it."""
        self._tier.shutdown(60.0)

    def _view(self, key: bytes, slot: int) -> memoryview:
        return self._memory.page(slot)


def in_jobs(
    pages: int,
    per_job: int,
    submit: Callable[[int, range], None],
    finished: Callable[[], list[bool]],
) -> list[float]:
    """Submit all jobs at once and wait for them, as an engine does between its steps."""
    times: list[float] = []
    start = time.perf_counter()
    firsts = range(0, pages, per_job)
    for job_id, first in enumerate(firsts):
        submit(job_id, range(first, min(first + per_job, pages)))
    while len(times) < len(firsts):
        ended = finished()
        if not all(ended):
            raise WrongBytes("a job failed")
        times += [time.perf_counter() - start] * len(ended)
        time.sleep(POLL_S)
    return times
