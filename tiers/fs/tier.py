"""The filesystem tier: every page a safetensors file.

The scheduler's thread only touches dicts and sends packets; files are the business of the I/O
processes, which map the page region themselves. What they did is taken from them by the next
call on the scheduler's thread, so there are no other threads here and no locks.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xxhash import xxh3_64_intdigest

from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    RequestView,
    SecondaryTier,
    TierConfigError,
    TierContext,
    TierStats,
    key_group,
)
from kvstrata.tiers.fs.budget.messages import first_access
from kvstrata.tiers.fs.cold_start import explain_cold_start
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files.failures import Failures
from kvstrata.tiers.fs.files.layout import NamespacePaths, is_key
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.ground import Ground
from kvstrata.tiers.fs.startup import (
    check_budget,
    check_trust,
    make_root,
    open_books,
    open_namespace,
    say_limits,
)
from kvstrata.tiers.process.index import Index
from kvstrata.tiers.process.messages import MOST_PAGES, Kind, Outcome, PageRef, Setup
from kvstrata.tiers.process.supervisor import IoProcesses, Task
from kvstrata.tiers.process.survival import is_worthwhile

logger = logging.getLogger("kvstrata.tiers.fs")

# A job is cut into tasks of about so many bytes: small enough that one long prefix keeps many
# threads busy, large enough that small pages do not cost a packet each.
_TASK_BYTES = 2**20
_KEYS_PER_CHECK = 256  # a long prefix is checked by several threads
_MAX_REMOVED = 2**16
# What a dead disk or server says, and not a wrong option. With a list of disks one goes on.
_LOST = (
    *(errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE, errno.EUCLEAN),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO),
)
# The first look-up may come at once and has its own deadline, so the start waits so long for
# the I/O processes, which take a third of a second, or some on a loaded machine.
_READY_WITHIN_S = 10.0
_GIVE_UP_S = 10.0  # for the other directories, if one cannot be opened


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """One of the directories, and who works there; `seed` stands for its path."""

    paths: NamespacePaths
    processes: IoProcesses
    seed: int


@dataclass(slots=True)
class _OpenJob:
    """A job under way: what is known of its pages so far."""

    kind: Kind
    pending: int
    failed: dict[bytes, str] = field(default_factory=dict)
    nbytes: int = 0
    start: float = float("inf")
    end: float = 0.0


class FsTier(SecondaryTier):
    """Pages as files below the directories in `root_dir`; for the options see `FsConfig`.

    A page lies in one of the directories, by its hash. Each has I/O processes of its own, so
    that a disk which hangs or dies takes nothing but its pages with it.
    """

    medium = "STORAGE"
    Options = FsConfig

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`."""
        FsConfig.parse(options)

    @classmethod
    def directories(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """See `SecondaryTier.directories`."""
        return tuple(config.root_dir for config in FsConfig.parse(options))

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        configs = FsConfig.parse(options)
        if context.region is None:
            raise TierConfigError(
                "fs tier: the pages are not in shared memory, which the I/O processes need; "
                "give it a TierContext with a region"
            )
        self._layouts = dict(context.layouts)
        self._region = replace(context.region, fd=os.dup(context.region.fd))
        self._index = Index()
        self._jobs: dict[int, _OpenJob] = {}
        self._finished: list[JobResult] = []
        self._arrived: dict[int, list[bytes]] = {}  # of loads under way, since they were told
        self._removed: deque[bytes] = deque(maxlen=_MAX_REMOVED)
        self._lookups = self._hits = 0
        self._counters: Counter[str] = Counter()
        self._failures = Failures()
        self._closed = False
        self._doubted = False  # until the disk says so
        # An access is a job, a touch or the lookups of a step; its pages count as used
        # together.
        self._access = first_access()
        self._promised: dict[bytes, None] = {}  # in this step
        # The loads and stores of a request are one access, in however many jobs they come: the
        # deepest pages go first. 0: none yet
        self._accesses: dict[str, int] = {}
        self.roots: list[Root] = []
        try:
            for config in configs:
                try:
                    self.roots.append(self._open_root(config, context))
                except TierConfigError as error:
                    lost = isinstance(error.__cause__, OSError) and error.__cause__.errno in _LOST
                    if not lost or (config is configs[-1] and not self.roots):
                        raise
                    logger.warning("kvstrata fs tier: %s; going on without that disk", error)
            explain_cold_start([root.paths for root in self.roots], context.namespace)
            deadline = time.monotonic() + _READY_WITHIN_S
            for root in self.roots:
                root.processes.wait_ready(deadline - time.monotonic())
        except BaseException:
            self.shutdown(_GIVE_UP_S)
            raise

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        """HIT and MISS from memory; RETRY while the disk is being asked."""
        self._lookups += 1
        if self._closed:
            return Lookup.MISS
        if self._index.is_present(key):  # so it is a key of this model
            self._hits += 1
            self._promised[key] = None
            return Lookup.HIT
        if self._layout_nbytes(key) is None:
            return Lookup.MISS
        if self._index.is_unsent(key):
            self._send_checks()
        found = self._index.lookup(key, request.req_id, time.monotonic())
        if found is Lookup.HIT:
            self._hits += 1
            self._promised[key] = None
        return found

    def submit_store(self, job: Job) -> None:
        """See `SecondaryTier.submit_store`."""
        self._submit(job, Kind.STORE)

    def submit_load(self, job: Job) -> None:
        """See `SecondaryTier.submit_load`."""
        self._submit(job, Kind.LOAD)

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        """See `SecondaryTier.submit_reject`; the namespace is marked on the disk."""
        self._doubted = self._doubted or distrust
        self._submit(job, Kind.DISTRUST if distrust else Kind.REJECT)
        return True

    @property
    def trusted(self) -> bool:  # type: ignore[override]
        """See `SecondaryTier.trusted`: no namespace is marked, by whomever."""
        return not self._doubted and all(root.processes.trusted for root in self.roots)

    def how_to_trust(self) -> str:
        """See `SecondaryTier.how_to_trust`."""
        names = " and ".join(
            f"`kvstrata trust {root.paths.root} {root.paths.name}`" for root in self.roots
        )
        return (
            f"Pages that differed are in {self.roots[0].paths.quarantine} beside those that the "
            f"model computed. Then run {names}, which all servers hear within seconds."
        )

    def get_finished(self) -> Sequence[JobResult]:
        """See `SecondaryTier.get_finished`."""
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def get_arrived(self) -> Mapping[int, Collection[bytes]]:
        """The pages of the tasks that ended, as `get_finished` saw it."""
        arrived, self._arrived = self._arrived, {}
        return arrived

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        """Keep the keys in the index of known pages, and their files on the disk."""
        if known := self._index.touch(keys):
            self._note(Kind.USE, known)

    def on_new_request(self, request: RequestView) -> None:
        """Its loads and stores will be one access."""
        self._accesses[request.req_id] = 0

    def on_request_finished(self, request: RequestView) -> None:
        """Forget the negative answers given to the request, and its access."""
        self._index.forget_request(request.req_id)
        self._accesses.pop(request.req_id, None)

    def on_step_end(self) -> None:
        """Ask the disk for the keys that were looked up in this step, and spare those found."""
        self._collect()
        self._send_checks()
        if self._promised:
            self._note(Kind.PROMISE, self._promised)
            self._promised.clear()

    def take_removed(self) -> Iterable[bytes]:
        """Keys whose files were evicted, or found gone or bad."""
        removed = list(self._removed)
        self._removed.clear()
        return removed

    def drain(self, timeout_s: float) -> bool:
        """See `SecondaryTier.drain`."""
        self._send_checks()
        deadline = time.monotonic() + timeout_s
        return all(root.processes.wait_idle(deadline - time.monotonic()) for root in self.roots)

    def shutdown(self, timeout_s: float) -> bool:
        """See `SecondaryTier.shutdown`."""
        self._closed = True
        deadline = time.monotonic() + timeout_s
        for root in self.roots:
            root.processes.stop()
        ends = [root.processes.close(max(0, deadline - time.monotonic())) for root in self.roots]
        stopped = all(ends)
        if stopped and self._region.fd >= 0:
            os.close(self._region.fd)
            self._region = replace(self._region, fd=-1)
        return stopped

    def stats(self) -> TierStats:
        """See `SecondaryTier.stats`."""
        self._collect()
        every = [root.processes for root in self.roots]
        reads, writes = map(sum, zip(*(each.unfinished() for each in every), strict=True))
        upkeep = sum((each.upkeep for each in every), Counter())
        return TierStats(
            counters={
                "lookups": self._lookups,
                "hits": self._hits,
                **self._counters,
                "evicted_files": upkeep["evicted_files"],
                "evicted_bytes": upkeep["evicted_bytes"],
                "swept_temporaries": upkeep["swept"],
                "restarted_processes": sum(each.restarts for each in every),
            },
            failures=self._failures.totals(),
            gauges={
                "read_queue": float(reads),
                "write_queue": float(writes),
                "jobs": float(len(self._jobs)),
                "indexed_keys": float(len(self._index)),
            },
        )

    def _open_root(self, config: FsConfig, context: TierContext) -> Root:
        seed = xxh3_64_intdigest(os.fsencode(config.root_dir))
        config = make_root(config)
        fields = dict(context.namespace)
        paths = namespace_paths(config.root_dir, context.model, fields)
        check_budget(config, context)
        direct = open_namespace(config, paths, fields)
        limits = open_books(config)
        if limits is not None:
            say_limits(config, limits)
        setup = Setup(
            config,
            TierContext(context.model, fields, self._layouts),
            paths,
            direct,
            limits,
            self._region,
            readers=True,
            threads=1,
            engine=os.getpid(),
            outlives=is_worthwhile(fields),
            ground=Ground.of(config.root_dir),
            trusted=check_trust(paths),
        )
        counts = config.n_read_threads, config.n_write_threads
        try:
            processes = IoProcesses(setup, *counts, self._failures)
            return Root(paths, processes, seed)
        except OSError as error:
            raise TierConfigError(f"fs tier: no I/O process can be started ({error})") from error

    def _by_root(self, pages: Iterable[PageRef]) -> Iterable[tuple[Root, list[PageRef]]]:
        """The roots and which of the pages belong there, in their order.

        Rendezvous hashing (Thaler and Ravishankar, 1998): without one of the roots the pages
        of the others stay where they are.
        """
        if len(self.roots) == 1:
            return [(self.roots[0], list(pages))]
        parts: dict[Root, list[PageRef]] = {root: [] for root in self.roots}
        for page in pages:
            key = page.key
            parts[max(parts, key=lambda root: xxh3_64_intdigest(key, root.seed))].append(page)
        return parts.items()

    def _note(self, kind: Kind, keys: Iterable[bytes]) -> None:
        access = self._next_access()
        for root, pages in self._by_root(map(PageRef, keys)):
            root.processes.note(kind, pages, access)

    def _layout_nbytes(self, key: bytes) -> int | None:
        """Size of the key's page; None if it is none of this model's keys."""
        layout = self._layouts.get(key_group(key)) if is_key(key) else None
        return None if layout is None else layout.nbytes

    def _unfit(self, key: bytes, slot: int) -> str | None:
        """Why the page cannot be here; None if it can."""
        nbytes = self._layout_nbytes(key)
        if nbytes is None:
            return "key"
        fits = nbytes <= self._region.slot_bytes
        return None if fits and 0 <= slot < self._region.slots else "shape"

    def _submit(self, job: Job, kind: Kind) -> None:
        """Note the job, and send off those of its pages that can be here at all."""
        opened = self._jobs[job.job_id] = _OpenJob(kind, len(job.keys))
        good = []
        for key, slot, end_token in zip(job.keys, job.slots, job.end_tokens, strict=True):
            if cause := self._unfit(key, slot):
                self._failures.count(cause, f"page {key.hex()} is none of this model")
                opened.failed[key] = cause
                opened.pending -= 1
            else:
                rewrite = kind is Kind.STORE and self._index.is_refused(key)
                good.append(PageRef(key, slot, end_token, rewrite))
        self._finish_if_over(job.job_id, opened)
        access = self._next_access()
        if (first := self._accesses.get(job.request.req_id)) is not None:
            access = self._accesses[job.request.req_id] = first or access
        for root, pages in self._by_root(good):
            root.processes.submit(self._tasks(kind, pages, job.job_id, access))

    def _next_access(self) -> int:
        self._access += 1
        return self._access

    def _tasks(
        self, kind: Kind, pages: Iterable[PageRef], job_id: int, access: int
    ) -> Iterator[Task]:
        """The pages in order, cut into tasks."""
        refs: list[PageRef] = []
        nbytes = 0
        for page in pages:
            size = self._layouts[key_group(page.key)].nbytes
            if refs and (nbytes + size > _TASK_BYTES or len(refs) == MOST_PAGES):
                yield Task(kind, refs, job_id, access)
                refs, nbytes = [], 0
            refs.append(page)
            nbytes += size
        if refs:
            yield Task(kind, refs, job_id, access)

    def _send_checks(self) -> None:
        for root, refs in self._by_root(map(PageRef, self._index.take_unsent())):
            batches = [refs[i : i + _KEYS_PER_CHECK] for i in range(0, len(refs), _KEYS_PER_CHECK)]
            root.processes.submit(Task(Kind.CHECK, batch) for batch in batches)

    def _collect(self) -> None:
        """Take what the I/O processes did since the last call."""
        for root in self.roots:
            self._collect_from(root.processes)

    def _collect_from(self, processes: IoProcesses) -> None:
        now = time.monotonic()
        for ended in processes.collect():
            pairs = list(zip(ended.task.pages, ended.outcomes, strict=True))
            if ended.task.kind is Kind.CHECK:
                for page, outcome in pairs:
                    self._index.answer(page.key, outcome.moved, now)
                continue
            job = self._jobs[ended.task.job_id]
            for page, outcome in pairs:
                self._count(job, page.key, outcome)
            job.start, job.end = min(job.start, ended.start), max(job.end, ended.end)
            job.pending -= len(ended.outcomes)
            good = [page.key for page, outcome in pairs if outcome.cause is None]
            if job.kind is Kind.LOAD and good:
                self._arrived.setdefault(ended.task.job_id, []).extend(good)
            self._finish_if_over(ended.task.job_id, job)
        if not processes.trusted:
            self._doubted = False  # from now on the operator's word counts
        for key, present in processes.take_news():
            if present:
                if self._layout_nbytes(key) is not None:  # journals are anybody's work
                    self._index.hear(key)
            elif self._index.discard(key):
                self._removed.append(key)

    def _finish_if_over(self, job_id: int, job: _OpenJob) -> None:
        if job.pending == 0:
            del self._jobs[job_id]
            self._arrived.pop(job_id, None)
            seconds = max(0.0, job.end - job.start)
            self._finished.append(JobResult(job_id, job.failed, job.nbytes, seconds))

    def _count(self, job: _OpenJob, key: bytes, outcome: Outcome) -> None:
        if outcome.cause is not None:
            job.failed[key] = outcome.cause
            if outcome.gone and self._index.lose(key):
                self._removed.append(key)
            if outcome.stuck:
                self._index.refuse(key)
            return
        if job.kind is not Kind.LOAD and job.kind is not Kind.STORE:
            if self._index.lose(key):
                self._removed.append(key)
            if outcome.stuck:
                self._index.refuse(key)
            self._counters["rejected_pages"] += 1
            return
        if job.kind is Kind.STORE:
            self._index.accept(key)
        nbytes = self._layouts[key_group(key)].nbytes if outcome.moved else 0
        job.nbytes += nbytes
        word = "stored" if job.kind is Kind.STORE else "loaded"
        self._counters[f"{word}_pages"] += 1
        self._counters[f"{word}_bytes"] += nbytes
