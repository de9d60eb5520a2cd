"""The filesystem tier: every page a safetensors file.

The scheduler's thread only touches dicts and queues; files are the pool's business. Workers
put what they did on deques, and the next call on the scheduler's thread takes it from there,
so the index and the jobs need no lock.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    RequestView,
    SecondaryTier,
    TierContext,
    TierStats,
)
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import Outcome, PageFiles
from kvstrata.tiers.fs.index import Index
from kvstrata.tiers.fs.pool import Pool
from kvstrata.tiers.fs.temporary import sweep

_KEYS_PER_CHECK = 256  # a long prefix is checked by several threads
_MAX_REMOVED = 2**16


@dataclass(slots=True)
class _OpenJob:
    """A job under way: what is known of its pages so far."""

    store: bool
    pending: int
    access: int
    depths: dict[bytes, int]
    failed: dict[bytes, str] = field(default_factory=dict)
    nbytes: int = 0
    start: float = float("inf")
    end: float = 0.0


@dataclass(frozen=True, slots=True)
class _Done:
    """One page of a job is done with; its view is touched no more."""

    job_id: int
    key: bytes
    outcome: Outcome
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class _PageTask:
    """Move one page on a thread of the pool."""

    job_id: int
    key: bytes
    move: Callable[[], Outcome]
    done: deque[_Done]

    def run(self) -> None:
        start = time.monotonic()
        outcome = self.move()
        self.done.append(_Done(self.job_id, self.key, outcome, start, time.monotonic()))

    def drop(self) -> None:
        self.end(Outcome("shutdown"))

    def end(self, outcome: Outcome) -> None:
        """The page was never moved."""
        now = time.monotonic()
        self.done.append(_Done(self.job_id, self.key, outcome, now, now))


@dataclass(frozen=True, slots=True)
class _CheckTask:
    """Ask the disk for some keys."""

    keys: Sequence[bytes]
    files: PageFiles
    answers: deque[tuple[bytes, bool]]

    def run(self) -> None:
        for key in self.keys:
            self.answers.append((key, self.files.exists(key)))

    def drop(self) -> None:
        self.answers.extend((key, False) for key in self.keys)


class FsTier(SecondaryTier):
    """Pages as files below `root_dir`; for the options see `FsConfig`."""

    medium = "STORAGE"

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`."""
        FsConfig.parse(options)

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        config = FsConfig.parse(options)
        self._files = PageFiles(config, context)
        self._space = self._files.space
        self._accesses = 0  # an access is a job or a touch; its pages count as used together
        self._index = Index()
        self._jobs: dict[int, _OpenJob] = {}
        self._finished: list[JobResult] = []
        self._removed: deque[bytes] = deque(maxlen=_MAX_REMOVED)
        self._counters: Counter[str] = Counter()
        self._done: deque[_Done] = deque()
        self._answers: deque[tuple[bytes, bool]] = deque()
        self._closed = threading.Event()
        self._pool = Pool(config.n_read_threads, config.n_write_threads)
        self._swept = 0
        self._sweeper = threading.Thread(target=self._sweep, name="kvstrata-fs-sweep", daemon=True)
        self._sweeper.start()

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        """HIT and MISS from memory; RETRY while the disk is being asked."""
        self._collect()
        self._counters["lookups"] += 1
        if self._closed.is_set() or self._files.fits(key):
            return Lookup.MISS
        if self._index.is_unsent(key):
            self._send_checks()
        found = self._index.lookup(key, request.req_id, time.monotonic())
        if found is Lookup.HIT:
            self._counters["hits"] += 1
            if self._space is not None:
                self._space.promised(key)
        return found

    def submit_store(self, job: Job) -> None:
        """See `SecondaryTier.submit_store`."""
        refused = self._index.is_refused
        moves = [
            partial(self._files.store, page.key, page.view, refused(page.key)) for page in job.pages
        ]
        self._pool.submit_writes(self._open(job, moves, store=True))

    def submit_load(self, job: Job) -> None:
        """See `SecondaryTier.submit_load`."""
        moves = [partial(self._files.load, page.key, page.view) for page in job.pages]
        if self._space is not None:
            for page in job.pages:
                self._space.wanted(page.key)
        self._pool.submit_reads(self._open(job, moves, store=False))

    def get_finished(self) -> Sequence[JobResult]:
        """See `SecondaryTier.get_finished`."""
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        """Keep the keys in the index of known pages, and their files on the disk."""
        known = self._index.touch(keys)
        if self._space is not None:
            self._accesses += 1
            for key in known:
                self._space.used(key, 0, self._accesses)

    def on_request_finished(self, request: RequestView) -> None:
        """Forget the negative answers given to the request."""
        self._index.forget_request(request.req_id)

    def on_step_end(self) -> None:
        """Ask the disk for the keys that were looked up in this step."""
        self._collect()
        self._send_checks()

    def take_removed(self) -> Iterable[bytes]:
        """Keys whose files were found gone or bad."""
        removed = list(self._removed)
        self._removed.clear()
        return removed

    def drain(self, timeout_s: float) -> bool:
        """See `SecondaryTier.drain`."""
        return self._pool.wait_idle(timeout_s)

    def shutdown(self, timeout_s: float) -> bool:
        """See `SecondaryTier.shutdown`."""
        self._closed.set()
        deadline = time.monotonic() + timeout_s
        stopped = self._pool.close(timeout_s)
        if self._space is not None:
            self._collect()
            stopped &= self._space.close(deadline - time.monotonic())
        return stopped

    def stats(self) -> TierStats:
        """See `SecondaryTier.stats`."""
        self._collect()
        reads, writes = self._pool.queued()
        return TierStats(
            counters={
                **self._counters,
                **(self._space.counters() if self._space is not None else {}),
                "swept_temporaries": self._swept,
            },
            failures=self._files.failures.totals(),
            gauges={
                "read_queue": float(reads),
                "write_queue": float(writes),
                "jobs": float(len(self._jobs)),
                "indexed_keys": float(len(self._index)),
            },
        )

    def _open(
        self, job: Job, moves: Sequence[Callable[[], Outcome]], store: bool
    ) -> list[_PageTask]:
        """Note the job; the tasks for those of its pages that can be here at all."""
        if not job.pages:
            self._finished.append(JobResult(job.job_id))
            return []
        depths = {page.key: page.end_token for page in job.pages}
        self._accesses += 1
        self._jobs[job.job_id] = _OpenJob(store, len(job.pages), self._accesses, depths)
        tasks = []
        for page, move in zip(job.pages, moves, strict=True):
            task = _PageTask(job.job_id, page.key, move, self._done)
            cause = self._files.fits(page.key, page.view.nbytes)
            if cause is None:
                tasks.append(task)
            else:
                self._files.failures.count(cause, f"page {page.key.hex()} is none of this model")
                task.end(Outcome(cause))
        return tasks

    def _send_checks(self) -> None:
        keys = self._index.take_unsent()
        batches = [keys[i : i + _KEYS_PER_CHECK] for i in range(0, len(keys), _KEYS_PER_CHECK)]
        self._pool.submit_reads(_CheckTask(b, self._files, self._answers) for b in batches)

    def _collect(self) -> None:
        """Take what the workers did since the last call."""
        while self._answers:
            key, present = self._answers.popleft()
            self._index.answer(key, present, time.monotonic())
        if self._space is not None:
            for key in self._space.take_evicted():
                if self._index.discard(key):
                    self._removed.append(key)
        while self._done:
            done = self._done.popleft()
            job = self._jobs[done.job_id]
            self._count(job, done)
            job.pending -= 1
            if job.pending == 0:
                del self._jobs[done.job_id]
                self._finished.append(
                    JobResult(done.job_id, job.failed, job.nbytes, job.end - job.start)
                )

    def _count(self, job: _OpenJob, done: _Done) -> None:
        outcome = done.outcome
        job.start, job.end = min(job.start, done.start), max(job.end, done.end)
        job.nbytes += outcome.nbytes
        if outcome.cause is not None:
            job.failed[done.key] = outcome.cause
            if outcome.gone and self._index.discard(done.key):
                self._removed.append(done.key)
            if outcome.stuck:
                self._index.refuse(done.key)
            return
        if self._space is not None:
            depth = job.depths.get(done.key, 0)
            if outcome.cost:
                self._space.stored(done.key, outcome.cost, depth, job.access)
            else:
                self._space.used(done.key, depth, job.access)
        if job.store:
            self._index.accept(done.key)
        word = "stored" if job.store else "loaded"
        self._counters[f"{word}_pages"] += 1
        self._counters[f"{word}_bytes"] += outcome.nbytes

    def _sweep(self) -> None:
        for directory in (self._files.paths.home, self._files.paths.pages):
            self._swept += sweep(directory, self._closed)
