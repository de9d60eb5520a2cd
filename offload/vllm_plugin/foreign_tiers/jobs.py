"""Jobs: those under way at a foreign tier, with sealed pages on the way there, and verified ones
on the way back.

A page is sealed in a thread before the tier is given it, and looked at in a thread once the tier
says that it has loaded it. The rest happens on the scheduler's thread, in `poll`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.base import JobResult as ForeignResult
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager, TransferJob

from kvstrata.offload.vllm_plugin.foreign_tiers.seal import Seals
from kvstrata.tiers.base import Job, JobResult, PageKey

logger = logging.getLogger("kvstrata.tiers")

_THREADS = 2  # each reads some 10 GB/s
# The slots of a load that may still be written to after it failed, by a peer that woke up or by a
# tier that raised, are nobody's for so long.
LATE_WRITE_S = 60.0


@dataclass(slots=True, eq=False)
class _Move:
    """A job of ours, and what has become of it."""

    job: Job
    context: ReqContext
    loading: bool
    started: float = field(default_factory=time.monotonic)
    failed: dict[PageKey, str] = field(default_factory=dict)
    nbytes: int = 0  # moved
    lent: bool = False  # the tier asked for the pages, for others
    maybe_written: bool = False  # the tier may still write to slots of pages that failed


@dataclass(slots=True, eq=False)
class _Part:
    """Pages of a job of ours that are one job of the tier's."""

    move: _Move
    keys: Sequence[PageKey]
    slots: Sequence[int]

    def chosen(self, choose: Callable[[PageKey], bool]) -> _Part:
        """Those of them, in their order."""
        pairs = zip(self.keys, self.slots, strict=True)
        chosen = [(key, slot) for key, slot in pairs if choose(key)]
        return _Part(self.move, [key for key, _ in chosen], [slot for _, slot in chosen])


class Jobs:
    """See the module's text.

    Args:
        name: the tier's, for the log.
        tier: the foreign one.
        seals: of the slots.
        others_write: whether peers write to the slots of its loads.

    Attributes:
        counters, failures: as in `TierStats`.
    """

    def __init__(
        self, name: str, tier: SecondaryTierManager, seals: Seals, *, others_write: bool
    ) -> None:
        self._name, self._tier, self._seals = name, tier, seals
        self._others_write = others_write
        self._threads = ThreadPoolExecutor(_THREADS, f"kvstrata-seals-{name}")
        self._next = 0
        self._sealing: list[tuple[_Part, Future[None]]] = []
        self._at_tier: dict[int, _Part] = {}  # by the tier's job id
        self._verifying: list[tuple[_Part, _Part, Future[dict[PageKey, str]]]] = []
        self._held_back: list[tuple[float, _Move]] = []  # until when
        self._ended: list[JobResult] = []
        self.counters: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def __len__(self) -> int:
        """Jobs whose pages the tier, or a thread, may still touch."""
        return len(self._sealing) + len(self._at_tier) + len(self._verifying)

    def nbytes(self, key: PageKey) -> int | None:
        """The size of the key's page; None if there cannot be one."""
        return self._seals.nbytes(key)

    def store(self, job: Job, context: ReqContext) -> None:
        """Begin to seal the pages; `poll` gives them to the tier."""
        part = self._possible(_Move(job, context, loading=False))
        if part.keys:
            put = self._threads.submit(self._seals.put, part.keys, part.slots)
            self._sealing.append((part, put))

    def load(self, job: Job, context: ReqContext) -> None:
        """Have the tier load the pages, into slots without a seal."""
        part = self._possible(_Move(job, context, loading=True))
        if part.keys:
            self._seals.clear(part.slots)
            self._send(part)

    def lend(self, job: Job, context: ReqContext) -> TransferJob:
        """What the tier is to know of pages that it was lent, which are sealed here and now."""
        self._seals.put(job.keys, job.slots)
        return self._begin(_Part(_Move(job, context, False, lent=True), job.keys, job.slots))

    def refuse(self, job: Job) -> None:
        """End a job at once: the tier is closed."""
        move = _Move(job, ReqContext(job.request.req_id), loading=False)
        self._end(move, job.keys, "shutdown")

    def sealing(self, req_id: str) -> bool:
        """Whether the tier is yet to be given pages of the request."""
        return any(part.move.job.request.req_id == req_id for part, _ in self._sealing)

    def poll(self) -> None:
        """Go on with what is done: at the tier, or in a thread."""
        sealed = [each for each in self._sealing if each[1].done()]
        self._sealing = [each for each in self._sealing if each not in sealed]
        for part, put in sealed:
            put.result()
            self._send(part)
        for result in self._tier.get_finished_jobs():
            self._take(result)
        verified = [each for each in self._verifying if each[2].done()]
        self._verifying = [each for each in self._verifying if each not in verified]
        for part, came, check in verified:
            self._loaded(part, came, check.result())
        self._release()

    def close(self) -> None:
        """End all jobs: the tier has stopped, and touches no slot any more."""
        self._threads.shutdown()
        parts = [part for part, _ in self._sealing]
        parts += [part for part, *_ in self._verifying] + list(self._at_tier.values())
        self._sealing, self._verifying, self._at_tier = [], [], {}
        for part in parts:
            self._end(part.move, part.keys, "shutdown")

    def take_ended(self) -> Sequence[JobResult]:
        """Results since the last call."""
        self._release()
        ended, self._ended = self._ended, []
        return ended

    def _possible(self, move: _Move) -> _Part:
        """The pages that there can be; without any the job has ended."""
        every = _Part(move, move.job.keys, move.job.slots)
        part = every.chosen(lambda key: self._seals.nbytes(key) is not None)
        wrong = [key for key in every.keys if key not in part.keys]
        if part.keys:
            self._fail(move, wrong, "key")
        else:
            self._end(move, wrong, "key")
        return part

    def _begin(self, part: _Part) -> TransferJob:
        """A job of the tier's, under way from now on."""
        job_id, move = self._next, part.move
        self._next += 1
        self._at_tier[job_id] = part
        keys = [OffloadKey(key) for key in part.keys]
        return TransferJob(job_id, keys, np.array(part.slots, np.int32), move.loading, move.context)

    def _send(self, part: _Part) -> None:
        move, job = part.move, self._begin(part)
        try:
            (self._tier.submit_load if move.loading else self._tier.submit_store)(job)
        except Exception:
            self._at_tier.pop(job.job_id, None)
            if not self.failures["raised"]:
                logger.exception("tier %s raised when it was given a job", self._name)
            move.maybe_written = move.loading
            self._end(move, part.keys, "raised")

    def _take(self, result: ForeignResult) -> None:
        """A job of the tier's has ended."""
        part = self._at_tier.pop(result.job_id, None)
        if part is None:
            if not self.failures["unknown-result"]:
                logger.error("tier %s reported %r, which ends no job", self._name, result)
            self.failures["unknown-result"] += 1
        elif part.move.loading:
            said = set(part.keys if result.success else result.successful_keys or ())
            came = part.chosen(said.__contains__)
            check = self._threads.submit(self._seals.check, came.keys, came.slots)
            self._verifying.append((part, came, check))
        elif result.success or part.move.lent:
            self._count("lent" if part.move.lent else "stored", part.move, part.keys)
            self._end(part.move)
        else:
            self._end(part.move, part.keys, "store-failed")

    def _loaded(self, part: _Part, came: _Part, wrong: dict[PageKey, str]) -> None:
        """The tier has ended a load, and what it says to have loaded was looked at."""
        move = part.move
        self._fail(move, list(wrong), wrong)
        self._count("loaded", move, [key for key in came.keys if key not in wrong])
        there = set(came.keys)
        lost = part.chosen(lambda key: key not in there)
        if not lost.keys:
            self._end(move)
        elif self._others_write or not move.nbytes:
            move.maybe_written = self._others_write
            self._end(move, lost.keys, "load-failed")
        else:  # it stopped at a page that it does not have
            missing = lost.keys[0]
            self._fail(move, [missing], "missing")
            rest = lost.chosen(lambda key: key != missing)
            if rest.keys:
                self._send(rest)
            else:
                self._end(move)

    def _count(self, done: str, move: _Move, keys: Collection[PageKey]) -> None:
        nbytes = sum(self._seals.nbytes(key) or 0 for key in keys)
        move.nbytes += nbytes
        self.counters[f"{done}_pages"] += len(keys)
        self.counters[f"{done}_bytes"] += nbytes

    def _fail(self, move: _Move, keys: Collection[PageKey], why: str | dict[PageKey, str]) -> None:
        for key in keys:
            cause = move.failed[key] = why if isinstance(why, str) else why[key]
            self.failures[cause] += 1

    def _end(self, move: _Move, failed: Collection[PageKey] = (), cause: str = "") -> None:
        """Nothing more comes of a job; these pages of it have failed."""
        self._fail(move, failed, cause)
        if move.maybe_written:
            self._held_back.append((time.monotonic() + LATE_WRITE_S, move))
            return
        seconds = time.monotonic() - move.started
        self._ended.append(JobResult(move.job.job_id, move.failed, move.nbytes, seconds))

    def _release(self) -> None:
        """End the jobs whose slots may be given to others by now."""
        now = time.monotonic()
        while self._held_back and self._held_back[0][0] <= now:
            move = self._held_back.pop(0)[1]
            move.maybe_written = False
            self._end(move)
