"""A disk as a secondary tier that moves nothing: it keeps books, and time passes.

What is on it and what leaves first is decided by the filesystem tier's own catalog and limits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from kvstrata.offload.simulate.clock import Clock
from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageKey,
    RequestView,
    SecondaryTier,
    TierStats,
)
from kvstrata.tiers.fs.budget.catalog import Catalog
from kvstrata.tiers.fs.budget.limits import HIGH, Limits, Usage, file_cost, spares_wanted
from kvstrata.tiers.machine.disk import UNBOUNDED

_HEADER = 4096  # bytes of a page file before the page


@dataclass(slots=True)
class _Lane:
    """One direction of the disk: jobs one after the other, `rate` bytes/s.

    A job ends `latency_s` after its last byte, and does not hold up the next one meanwhile.
    """

    rate: float
    latency_s: float
    free_at: float = 0.0
    jobs: deque[tuple[float, Job, int]] = field(default_factory=deque)  # end, job, bytes

    def add(self, job: Job, nbytes: int, now: float) -> None:
        self.free_at = max(now, self.free_at) + nbytes / self.rate
        self.jobs.append((self.free_at + self.latency_s, job, nbytes))

    def ended(self, now: float) -> Iterator[tuple[float, Job, int]]:
        while self.jobs and self.jobs[0][0] <= now:
            yield self.jobs.popleft()


class ModelledDisk(SecondaryTier):
    """The filesystem tier on a disk that is a model.

    Args:
        max_bytes: its budget, as the tier's option; 0: none.
        page_bytes: of each page.
        read, write: bytes/s.
        latency_s: of a job.
        clock: of the replay.

    Attributes:
        written, read_bytes: bytes moved.
        evicted: pages.
    """

    medium: ClassVar[str | None] = "STORAGE"

    def __init__(
        self,
        max_bytes: int,
        page_bytes: int,
        *,
        read: float,
        write: float,
        latency_s: float,
        clock: Clock,
    ) -> None:
        self.written = self.read_bytes = self.evicted = 0
        self._limits = Limits(max_bytes)
        self._page_bytes = page_bytes
        self._cost = file_cost(page_bytes + _HEADER)
        self._clock = clock
        self._catalog = Catalog()
        self._reads, self._writes = _Lane(read, latency_s), _Lane(write, latency_s)
        self._access = 0
        self._accesses: dict[str, int] = {}  # of requests, for their loads and stores
        self._coming: set[PageKey] = set()  # being written
        self._promised: dict[PageKey, int] = {}  # loads that wait for the page

    def __len__(self) -> int:
        """Pages that it has."""
        return len(self._catalog)

    @property
    def next_end(self) -> float:
        """When the next job ends; infinite if none is under way."""
        return min(
            (lane.jobs[0][0] for lane in (self._reads, self._writes) if lane.jobs), default=math.inf
        )

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        return Lookup.HIT if key in self._catalog else Lookup.MISS

    def submit_store(self, job: Job) -> None:
        new = [key for key in job.keys if key not in self._catalog and key not in self._coming]
        self._coming.update(new)
        self._writes.add(job, len(new) * self._page_bytes, self._clock.now)

    def submit_load(self, job: Job) -> None:
        for key in job.keys:
            self._promised[key] = self._promised.get(key, 0) + 1
        self._reads.add(job, len(job.keys) * self._page_bytes, self._clock.now)

    def get_finished(self) -> Sequence[JobResult]:
        now = self._clock.now
        done = [self._stored(job, nbytes) for _, job, nbytes in self._writes.ended(now)]
        done += [self._loaded(job) for _, job, _ in self._reads.ended(now)]
        return done

    def touch(self, keys: Collection[PageKey], request: RequestView) -> None:
        stamp = self._next()
        for key in keys:
            self._catalog.use(key, stamp)

    def on_new_request(self, request: RequestView) -> bool:
        self._accesses[request.req_id] = 0
        return False

    def on_request_finished(self, request: RequestView) -> None:
        self._accesses.pop(request.req_id, None)

    def drain(self, timeout_s: float) -> bool:
        return True

    def shutdown(self, timeout_s: float) -> bool:
        return True

    def stats(self) -> TierStats:
        return TierStats()

    def _stored(self, job: Job, nbytes: int) -> JobResult:
        """The job's pages are there: those that were before were used."""
        stamp, failed = self._stamp(job), {}
        for key, depth in zip(job.keys, job.end_tokens, strict=True):
            if key in self._catalog:
                self._catalog.use(key, stamp, depth)
            elif self._make_room():
                self._catalog.add(key, self._cost, stamp, depth)
                self.written += self._page_bytes
            else:
                failed[key] = "budget"
            self._coming.discard(key)
        return JobResult(job.job_id, failed, nbytes)

    def _loaded(self, job: Job) -> JobResult:
        stamp, failed = self._stamp(job), {}
        for key, depth in zip(job.keys, job.end_tokens, strict=True):
            if self._promised[key] > 1:
                self._promised[key] -= 1
            else:
                del self._promised[key]
            if key in self._catalog:
                self._catalog.use(key, stamp, depth)
            else:
                failed[key] = "missing"
        nbytes = (len(job.keys) - len(failed)) * self._page_bytes
        self.read_bytes += nbytes
        return JobResult(job.job_id, failed, nbytes)

    def _make_room(self) -> bool:
        """Evict until one page more fits below the high mark, with what the keeper claims ahead."""
        while not self._limits.room(usage := self._usage(), HIGH).holds(
            max(self._cost, spares_wanted(usage)) if self._limits else self._cost
        ):
            victim = self._catalog.take_victim(self._promised.__contains__)
            if victim is None:
                return self._limits.room(self._usage()).holds(self._cost)
            self._catalog.remove(victim)
            self.evicted += 1
        return True

    def _usage(self) -> Usage:
        return Usage(self._catalog.nbytes, len(self._catalog), UNBOUNDED)

    def _stamp(self, job: Job) -> int:
        """The same for all loads and stores of a request."""
        first = self._accesses.get(job.request.req_id)
        if first is None:
            return self._next()
        if not first:
            first = self._accesses[job.request.req_id] = self._next()
        return first

    def _next(self) -> int:
        self._access += 1
        return self._access
