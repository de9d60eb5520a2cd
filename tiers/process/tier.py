"""Any medium as a tier: the engine's side.

The scheduler's thread only touches dicts and sends packets; the medium is the business of the I/O
processes, which map the page region themselves. What they did is taken from them by the next
call on the scheduler's thread, so there are no other threads here and no locks.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from operator import itemgetter
from typing import ClassVar, TypeVar

from xxhash import xxh3_64_intdigest

from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageKey,
    RequestView,
    SecondaryTier,
    TierConfigError,
    TierContext,
    TierStats,
)
from kvstrata.tiers.page.identity import is_key
from kvstrata.tiers.process.failures import Failures
from kvstrata.tiers.process.index import Index
from kvstrata.tiers.process.medium import QUARANTINED, MediumSpec, Outcome
from kvstrata.tiers.process.messages import MOST_PAGES, Kind, Setup, Task
from kvstrata.tiers.process.supervisor import IoProcesses
from kvstrata.tiers.process.survival import is_worthwhile

# A job is cut into tasks of about so many bytes: small enough that one long prefix keeps many
# threads busy, large enough that small pages do not cost a packet each.
_TASK_BYTES = 2**20
_KEYS_PER_CHECK = 256  # a long prefix is checked by several threads
# The first look-up may come at once and has its own deadline, so the start waits so long for
# the I/O processes, which take a third of a second, or some on a loaded machine.
_READY_WITHIN_S = 10.0
# An engine that was idle hears what was told meanwhile before it says that a page is not there.
_LISTEN_EVERY_S = 0.25
_GIVE_UP_S = 10.0  # for the processes of other media, if those of one cannot be started

_Row = tuple[PageKey, int, int]  # key, slot and depth of a page of a job
_T = TypeVar("_T")


@dataclass(slots=True)
class _OpenJob:
    """A job under way: what is known of its pages so far."""

    kind: Kind
    pending: int
    failed: dict[PageKey, str] = field(default_factory=dict)
    nbytes: int = 0
    start: float = float("inf")
    end: float = 0.0


class ProcessTier(SecondaryTier):
    """A tier whose medium, or media, may block: each works in two I/O processes of its own.

    With several media a page lies on one of them, by its hash, and one that hangs or dies takes
    nothing but its pages with it. A subclass checks the options and says how the media are made.
    """

    name: ClassVar[str]  # of the type, for the log
    rejects: ClassVar[bool] = False  # whether its medium has `Medium.reject`
    tells_changes = True

    def __init__(
        self,
        context: TierContext,
        media: Sequence[MediumSpec],
        n_read_threads: int = 16,
        n_write_threads: int = 16,
        first_access: int = 0,
    ) -> None:
        """Start the processes, and wait a moment for them.

        Args:
            context: as the tier was given it.
            media: at least one.
            n_read_threads, n_write_threads: of the two processes of each medium.
            first_access: where the numbers of accesses begin (`Medium.store`).

        Raises:
            TierConfigError: there is no region, or a process cannot be started.
        """
        if context.region is None:
            raise TierConfigError(
                f"{self.name} tier: the pages are not in shared memory, which the I/O processes "
                "need; give it a TierContext with a region"
            )
        self._sizes = {
            group.to_bytes(4, "big"): each.nbytes
            for group, each in context.layouts.items()
            if each.nbytes <= context.region.slot_bytes
        }
        self._region = replace(context.region, fd=os.dup(context.region.fd))
        self._index = Index()
        self._jobs: dict[int, _OpenJob] = {}
        self._finished: list[JobResult] = []
        self._arrived: dict[int, list[PageKey]] = {}  # of loads under way, since they were told
        self._lookups = self._hits = 0
        self._counters: Counter[str] = Counter()
        self._failures = Failures(self.name)
        self._closed = False
        self._collected = 0.0  # when; monotonic
        self._doubted = False  # until the medium says so
        # An access is a job, a touch or the lookups of a step; its pages count as used
        # together.
        self._access_numbers = count(first_access + 1)
        self._promised: dict[PageKey, None] = {}  # in this step
        # The loads and stores of a request are one access, in however many jobs they come: the
        # deepest pages go first. 0: none yet
        self._accesses: dict[str, int] = {}
        self._seeds = [xxh3_64_intdigest(os.fsencode(each.name)) for each in media]
        self.processes: list[IoProcesses] = []  # in the order of the media
        try:
            for each in media:
                setup = Setup(
                    each,
                    replace(context, region=None),
                    self._region,
                    engine=os.getpid(),
                    outlives=is_worthwhile(context.namespace),
                )
                counts = n_read_threads, n_write_threads
                self.processes.append(IoProcesses(setup, *counts, self._failures))
            deadline = time.monotonic() + _READY_WITHIN_S
            for processes in self.processes:
                processes.wait_ready(deadline - time.monotonic())
        except BaseException as error:
            self.shutdown(_GIVE_UP_S)
            if not isinstance(error, OSError):
                raise
            raise TierConfigError(
                f"{self.name} tier: no I/O process can be started ({error})"
            ) from error

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """HIT and MISS from memory; RETRY while the medium is asked that did not tell of all."""
        if not self._closed and self._is_known(key):  # so it is a key of this model
            self._lookups += 1
            self._hits += 1
            self._promised[key] = None
            return Lookup.HIT
        if self._closed or self._nbytes(key) is None:
            self._lookups += 1
            return Lookup.MISS
        if self._index.is_awaited(key):
            self._send_checks()
        answer = self._index.lookup(key, request.req_id, time.monotonic())
        if answer is not Lookup.RETRY:  # else it is asked again
            self._lookups += 1
        return answer

    def submit_store(self, job: Job) -> None:
        """See `SecondaryTier.submit_store`."""
        self._submit(job, Kind.STORE)

    def submit_load(self, job: Job) -> None:
        """See `SecondaryTier.submit_load`."""
        self._submit(job, Kind.LOAD)

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        """See `SecondaryTier.submit_reject`."""
        self._doubted = self._doubted or distrust
        if self.rejects:
            self._submit(job, Kind.DISTRUST if distrust else Kind.REJECT)
        return self.rejects

    @property
    def trusted(self) -> bool:  # type: ignore[override]
        """See `SecondaryTier.trusted`: no medium says otherwise, by whomever it was told."""
        return not self._doubted and all(each.trusted for each in self.processes)

    def get_finished(self) -> Sequence[JobResult]:
        """See `SecondaryTier.get_finished`."""
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def get_arrived(self) -> Mapping[int, Collection[PageKey]]:
        """The pages of the tasks that ended, as `get_finished` saw it."""
        arrived, self._arrived = self._arrived, {}
        return arrived

    def touch(self, keys: Collection[PageKey], request: RequestView) -> None:
        """Keep the keys in the index of known pages, and their pages on the medium."""
        if known := self._index.touch(keys):
            self._note(Kind.USE, known)

    def on_new_request(self, request: RequestView) -> bool:
        """Its loads and stores will be one access."""
        self._accesses[request.req_id] = 0
        return False

    def on_request_finished(self, request: RequestView) -> None:
        """Forget the negative answers given to the request, and its access."""
        self._index.forget_request(request.req_id)
        self._accesses.pop(request.req_id, None)

    def on_step_end(self) -> None:
        """Ask for the keys that were looked up in this step, and spare those found."""
        self._collect()
        self._send_checks()
        if self._promised:
            self._note(Kind.PROMISE, self._promised)
            self._promised.clear()

    def take_changes(self, most: int, *, anew: bool = False) -> Iterable[tuple[PageKey, bool]]:
        """Keys that became known and those that no longer are, for whatever reason."""
        return self._index.take_changes(most, anew=anew)

    def drain(self, timeout_s: float) -> bool:
        """See `SecondaryTier.drain`."""
        self._send_checks()
        deadline = time.monotonic() + timeout_s
        return all(each.wait_idle(deadline - time.monotonic()) for each in self.processes)

    def shutdown(self, timeout_s: float) -> bool:
        """See `SecondaryTier.shutdown`."""
        self._closed = True
        deadline = time.monotonic() + timeout_s
        for each in self.processes:
            each.stop()
        ends = [each.close(max(0, deadline - time.monotonic())) for each in self.processes]
        stopped = all(ends)
        if stopped and self._region.fd >= 0:
            os.close(self._region.fd)
            self._region = replace(self._region, fd=-1)
        return stopped

    def stats(self) -> TierStats:
        """See `SecondaryTier.stats`; with the counters of `Host.upkeep`."""
        self._collect()
        reads, writes = map(sum, zip(*(each.unfinished() for each in self.processes), strict=True))
        done, gauges = Counter(self._counters), Counter[str]()
        samples: defaultdict[str, list[float]] = defaultdict(list)
        for each in self.processes:
            done.update(each.upkeep)
            gauges.update(each.gauges)
            for name, values in each.take_samples().items():
                samples[name] += values
        quarantined = {
            name.removeprefix(QUARANTINED): done.pop(name)
            for name in list(done)
            if name.startswith(QUARANTINED)
        }
        if rejected := done["rejected_pages"]:
            quarantined["audit"] = rejected
        return TierStats(
            counters={
                "lookups": self._lookups,
                "hits": self._hits,
                **done,
                "restarted_processes": sum(each.restarts for each in self.processes),
            },
            failures=self._failures.totals(),
            quarantined=quarantined,
            gauges={
                "read_queue": float(reads),
                "write_queue": float(writes),
                "jobs": float(len(self._jobs)),
                "pages": float(len(self._index)),
                "bytes": float(sum(self._sizes[g] * n for g, n in self._index.groups.items())),
                **gauges,
            },
            samples=samples,
        )

    # -- inside -------------------------------------------------------------------

    def _is_known(self, key: PageKey) -> bool:
        if self._index.is_present(key):
            return True
        if time.monotonic() - self._collected < _LISTEN_EVERY_S:
            return False
        self._collect()
        return self._index.is_present(key)

    def _by_medium(
        self, items: Iterable[_T], key_of: Callable[[_T], PageKey]
    ) -> Iterable[tuple[IoProcesses, list[_T]]]:
        """The processes and which of the items they get, in their order.

        Rendezvous hashing (Thaler and Ravishankar, 1998): without one of the media the pages
        of the others stay where they are.
        """
        if len(self.processes) == 1:
            return [(self.processes[0], list(items))]
        places = range(len(self.processes))
        parts: list[list[_T]] = [[] for _ in places]
        for item in items:
            key = key_of(item)
            parts[max(places, key=lambda i: xxh3_64_intdigest(key, self._seeds[i]))].append(item)
        return zip(self.processes, parts, strict=True)

    def _note(self, kind: Kind, keys: Iterable[PageKey]) -> None:
        access = next(self._access_numbers)
        for processes, ours in self._by_medium(keys, lambda key: key):
            processes.note(kind, ours, access)

    def _nbytes(self, key: PageKey) -> int | None:
        """Size of the key's page; None if it is none of this model's keys."""
        return self._sizes.get(key[-4:]) if is_key(key) else None

    def _submit(self, job: Job, kind: Kind) -> None:
        """Note the job, and send off those of its pages that can be here at all."""
        opened = self._jobs[job.job_id] = _OpenJob(kind, len(job.keys))
        slots = range(self._region.slots)
        good = []
        for row in zip(job.keys, job.slots, job.end_tokens, strict=True):
            key, slot, _ = row
            if self._nbytes(key) is not None and slot in slots:
                good.append(row)
                continue
            cause = "key" if self._nbytes(key) is None else "shape"
            self._failures.count(cause, f"page {key.hex()} is none of this model")
            opened.failed[key] = cause
            opened.pending -= 1
        self._finish_if_over(job.job_id, opened)
        access = next(self._access_numbers)
        if (first := self._accesses.get(job.request.req_id)) is not None:
            access = self._accesses[job.request.req_id] = first or access
        for processes, ours in self._by_medium(good, itemgetter(0)):
            processes.submit(self._task(kind, part, job, access) for part in self._parts(ours))

    def _parts(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """The pages in order, cut into tasks."""
        start = nbytes = 0
        for end, (key, _, _) in enumerate(rows):
            size = self._sizes[key[-4:]]
            if end > start and (nbytes + size > _TASK_BYTES or end - start == MOST_PAGES):
                yield rows[start:end]
                start, nbytes = end, 0
            nbytes += size
        if start < len(rows):
            yield rows[start:]

    def _task(self, kind: Kind, rows: list[_Row], job: Job, access: int) -> Task:
        keys, slots, depths = map(list, zip(*rows, strict=True))
        rewrites = list(map(self._index.is_refused, keys)) if kind is Kind.STORE else []
        pin_s = job.request.pin_s
        return Task(kind, keys, slots, depths, rewrites, access, job.job_id, pin_s=pin_s)

    def _send_checks(self) -> None:
        for processes, keys in self._by_medium(self._index.take_unsent(), lambda key: key):
            batches = [keys[i : i + _KEYS_PER_CHECK] for i in range(0, len(keys), _KEYS_PER_CHECK)]
            processes.submit(Task(Kind.CHECK, batch) for batch in batches)

    def _collect(self) -> None:
        """Take what the I/O processes did since the last call."""
        now = self._collected = time.monotonic()
        if not any([each.look() for each in self.processes]):
            return
        for ended in chain.from_iterable(each.take_ended() for each in self.processes):
            if ended.task.kind is Kind.CHECK:
                found = [outcome.moved for outcome in ended.outcomes]
                self._index.answer(ended.task.keys, found, now)
                continue
            pairs = list(zip(ended.task.keys, ended.outcomes, strict=True))
            job_id = ended.task.job_id
            job = self._jobs[job_id]
            self._count(job, pairs)
            job.start, job.end = min(job.start, ended.start), max(job.end, ended.end)
            job.pending -= len(pairs)
            if job.kind is Kind.LOAD:
                good = [key for key, outcome in pairs if outcome.cause is None]
                if good:
                    self._arrived.setdefault(job_id, []).extend(good)
            self._finish_if_over(job_id, job)
        if not all(each.trusted for each in self.processes):
            self._doubted = False  # from now on the operator's word counts
        for key, present in chain.from_iterable(each.take_news() for each in self.processes):
            if present:
                if self._nbytes(key) is not None:  # may be anybody's word
                    self._index.hear(key)
            else:
                self._index.discard(key)
        self._index.told = all(each.complete for each in self.processes)

    def _finish_if_over(self, job_id: int, job: _OpenJob) -> None:
        if job.pending == 0:
            del self._jobs[job_id]
            self._arrived.pop(job_id, None)
            seconds = max(0.0, job.end - job.start)
            self._finished.append(JobResult(job_id, job.failed, job.nbytes, seconds))

    def _count(self, job: _OpenJob, pairs: list[tuple[PageKey, Outcome]]) -> None:
        """What became of some pages of a job."""
        is_store, is_load = job.kind is Kind.STORE, job.kind is Kind.LOAD
        pages = nbytes = 0
        for key, outcome in pairs:
            if outcome.cause is not None:
                job.failed[key] = outcome.cause
            else:
                pages += 1
                if outcome.moved:
                    nbytes += self._sizes[key[-4:]]
                if is_store:
                    self._index.accept(key, written=outcome.moved)
            if outcome.gone or not (is_store or is_load):
                self._index.lose(key)
            if outcome.stuck:
                self._index.refuse(key)
        if not (is_store or is_load):
            self._counters["rejected_pages"] += pages
            return
        job.nbytes += nbytes
        word = "stored" if is_store else "loaded"
        self._counters[f"{word}_pages"] += pages
        self._counters[f"{word}_bytes"] += nbytes
