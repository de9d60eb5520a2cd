"""The secondary tiers and the jobs under way at them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.secondary.breaker import LATE, Operation
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.tier import TierLink, Traffic
from kvstrata.tiers.base import Job, JobResult, PageLayout, RequestView

logger = logging.getLogger("kvstrata.manager")

_LOAD, _STORE = Operation.LOAD, Operation.STORE  # in Python 3.11 each `Operation.LOAD` is a call

# All tiers together get this long to end their jobs, and as long again to stop; what hangs
# is then left behind.
STOP_TIMEOUT_S = 5.0
# A store that takes longer no longer keeps an otherwise idle engine stepping, and counts as
# a failure of the tier.
STORE_PATIENCE_S = 60.0


# Called with the engine's `promotion_deadline_s`, for tiers that have none, and the clock.
OpenTiers: TypeAlias = Callable[[float, Callable[[], float]], Sequence[TierLink]]


@dataclass(slots=True, eq=False)
class Running:
    """A job under way at a tier: a promotion into the primary tier, or a cascade out of it.

    `entries` and `nbytes` are what has not arrived yet. `due`: when it is overdue (anew).
    """

    link: TierLink
    entries: Sequence[Entry]
    promotion: bool
    traffic: Traffic  # where it counts
    started: float
    request: RequestView
    nbytes: int
    due: float
    timing: Timing
    probe: bool = False
    on_end: Callable[[Running, JobResult], None] | None = None  # who takes the result
    tag: object = None  # the caller's own
    arrived: int = 0  # pages, before its end
    overdue: int = 0  # how often its time has passed

    @property
    def kind(self) -> Operation:
        """What a failure counts as."""
        return _LOAD if self.promotion else _STORE

    def parted(self, result: JobResult) -> tuple[Sequence[Entry], Sequence[Entry]]:
        """What went well, and what failed."""
        failed = result.failed
        if not failed:
            return self.entries, ()
        good = [entry for entry in self.entries if entry.key not in failed]
        return good, [entry for entry in self.entries if entry.key in failed]


class TierJobs:
    """Opens and stops the tiers, hands them jobs, and takes the results.

    Args:
        open_tiers: makes the secondary tiers.
        view: (slot, bytes) -> the beginning of the slot.
        layouts: page layout by group.
        promotion_deadline_s: the engine's; a tier whose promotions make no progress for longer, or
            than its own, fails.
        clock: seconds, monotonic.

    Attributes:
        links: the tiers.
        sources, sinks: those of them that pages are looked for in, and that are given pages.
    """

    def __init__(
        self,
        open_tiers: OpenTiers,
        view: Callable[[int, int], memoryview],
        layouts: Mapping[int, PageLayout],
        promotion_deadline_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._open_tiers = partial(open_tiers, promotion_deadline_s, clock)
        # By the last bytes of a key, which are cheaper to look up than to decode
        self._nbytes = {
            group.to_bytes(4, "big"): layout.nbytes for group, layout in layouts.items()
        }
        self._view = lambda key, slot: view(slot, self._nbytes[key[-4:]])
        sizes = {*self._nbytes.values()}
        self._one_size = sizes.pop() if len(sizes) == 1 else None
        self._clock = clock
        self._running: dict[int, Running] = {}  # oldest first
        self._next_job = 0
        self._left_behind: list[TierLink] = []  # did not stop in time; may still end jobs
        # (tier, kind, request) that failed since `results` was called last: the jobs of one
        # prefix that fail together are one failure
        self._blamed: set[tuple[TierLink, Operation, str]] = set()
        self._set_links(self._open_tiers())

    def __len__(self) -> int:
        return len(self._running)

    def submit(
        self,
        link: TierLink,
        entries: Sequence[Entry],
        request: RequestView,
        *,
        promotion: bool,
        timing: Timing | None = None,
        probe: bool = False,
        on_end: Callable[[Running, JobResult], None] | None = None,
        send: Callable[[Job], bool | None] | None = None,
        tag: object = None,
    ) -> bool:
        """Start one job; its result comes from `results`, or to `on_end`.

        Args:
            timing: of the pages it was asked for with, if there are others.
            tag: what comes back with the result.
            send: how to tell the tier, where the pages are neither loaded nor stored.

        Returns:
            Whether the tier took it.
        """
        job_id = self._next_job
        self._next_job += 1
        nbytes = self.nbytes(entries)
        traffic = link.traffic(promotion=promotion)
        traffic.jobs += 1
        traffic.pages += len(entries)
        traffic.nbytes += nbytes
        now = self._clock()
        due = now + _patience(link, promotion)
        timing = timing or Timing(now, traffic.nbytes, len(entries))
        self._running[job_id] = Running(
            *(link, entries, promotion, traffic, now, request, nbytes, due, timing, probe, on_end),
            tag,
        )
        keys = [each.key for each in entries]
        slots, ends = [each.slot for each in entries], [each.end_token for each in entries]
        job = Job(job_id, keys, slots, ends, request, self._view)
        if (send or (link.tier.submit_load if promotion else link.tier.submit_store))(job) is False:
            self._close_job(job_id)
            return False
        return True

    def reject(
        self,
        link: TierLink,
        entry: Entry,
        request: RequestView,
        *,
        distrust: bool,
        on_end: Callable[[Running, JobResult], None],
    ) -> bool:
        """Let a tier put a page aside; see `SecondaryTier.submit_reject`. Whether it can."""
        send = partial(link.tier.submit_reject, distrust=distrust)
        return self.submit(link, [entry], request, promotion=False, on_end=on_end, send=send)

    def _close_job(self, job_id: int) -> Running:
        job = self._running.pop(job_id)
        self._leave(job, len(job.entries), job.nbytes)
        job.traffic.jobs -= 1
        return job

    def _leave(self, job: Running, pages: int, nbytes: int) -> None:
        """So much of a job is no longer under way."""
        job.traffic.pages -= pages
        job.traffic.nbytes -= nbytes
        if job.promotion:
            job.link.pace.moved(pages)
        job.timing.pages -= pages

    def nbytes(self, entries: Sequence[Entry]) -> int:
        """Bytes of all pages together."""
        if self._one_size is not None:
            return self._one_size * len(entries)
        return sum(self.sizes(entries))

    def sizes(self, entries: Sequence[Entry]) -> list[int]:
        """Bytes of each page."""
        if self._one_size is not None:
            return [self._one_size] * len(entries)
        return [self._nbytes[entry.key[-4:]] for entry in entries]

    def results(self) -> Iterator[tuple[Running, JobResult]]:
        """The jobs that ended since the last call."""
        self._blamed.clear()
        if not self._running:
            return
        for link in (*self.links, *self._left_behind):
            for result in link.tier.get_finished():
                job = self._close_job(result.job_id)
                job.traffic.seconds += result.seconds
                self._judge(job, result)
                if job.on_end is not None:
                    job.on_end(job, result)
                else:
                    yield job, result
        if self._left_behind:
            busy = {job.link for job in self._running.values()}
            self._left_behind = [link for link in self._left_behind if link in busy]

    def arrivals(self) -> Iterator[tuple[Running, list[Entry]]]:
        """Pages of promotions under way that arrived since the last call; after `results`."""
        if not self._running:
            return
        for link in (*self.links, *self._left_behind):
            for job_id, told in link.tier.get_arrived().items():
                job, keys = self._running[job_id], set(told)
                if job.on_end is not None:
                    continue  # an audit's one page: its end will say so
                arrived = [entry for entry in job.entries if entry.key in keys]
                job.entries = [entry for entry in job.entries if entry.key not in keys]
                nbytes = self.nbytes(arrived)
                job.arrived += len(arrived)
                job.nbytes -= nbytes
                self._leave(job, len(arrived), nbytes)
                job.traffic.progress = self._clock()
                yield job, arrived
        self._look_for_overdue()

    def any_in_time(self) -> bool:
        """Whether a job that somebody counts on is under way and has not outrun its time."""
        self._look_for_overdue()
        return any(not job.overdue and not job.probe for job in self._running.values())

    def drain(self) -> None:
        """Wait for the jobs under way, at most `STOP_TIMEOUT_S` for all tiers together."""
        self._bounded("drain", lambda link, left: link.tier.drain(left))

    def stop(self) -> None:
        """Stop the tiers, within `STOP_TIMEOUT_S` in all; one that hangs is left behind."""
        self._left_behind += self._bounded("stop", lambda link, left: link.tier.shutdown(left))

    def reopen(self) -> None:
        """Open the tiers anew after `stop`; if that fails, go on without them."""
        try:
            self._set_links(self._open_tiers())
        except Exception:  # the engine goes on, whatever a medium does
            logger.exception("secondary tiers cannot be opened again: they are off")
            self._set_links(())

    def _set_links(self, links: Sequence[TierLink]) -> None:
        self.links = tuple(links)
        self.sources = tuple(link for link in links if link.may_load)
        self.sinks = tuple(link for link in links if link.may_store)

    def _bounded(self, verb: str, call: Callable[[TierLink, float], bool]) -> list[TierLink]:
        """Do something to every tier, healthy ones first; those that did not end in time."""
        deadline = self._clock() + STOP_TIMEOUT_S
        late = []
        for link in sorted(self.links, key=lambda link: not link.breaker.closed):
            if not call(link, max(0.0, deadline - self._clock())):
                logger.warning("tier %s did not %s in time", link.name, verb)
                late.append(link)
        return late

    def _look_for_overdue(self) -> None:
        """A job is overdue when its tier has made no progress in its direction for too long."""
        now = self._clock()
        for job in self._running.values():
            if now < job.due:
                continue
            patience = _patience(job.link, job.promotion)
            job.due = max(job.due, job.traffic.progress + patience)
            if now >= job.due:
                job.overdue += 1  # again and again: a single job that never ends counts too
                job.due += patience
                self._blame(job)
                self._note_overdue(job)

    def _blame(self, job: Running, cause: str = LATE) -> None:
        failure = job.link, job.kind, job.request.req_id
        if failure not in self._blamed:
            self._blamed.add(failure)
            job.link.breaker.failed(job.kind, cause)

    def _note_overdue(self, job: Running) -> None:
        link = job.link
        if not link.overdue_jobs:
            logger.warning(
                "tier %s: a %s of %d pages has not ended within %.3g s, and none of the others "
                "made progress; its slots stay taken until it ends (logged once; counted from now "
                "on as overdue_jobs)",
                link.name,
                "load" if job.promotion else "store",
                len(job.entries),
                self._clock() - job.started,
            )
        link.overdue_jobs += job.overdue == 1

    def _judge(self, job: Running, result: JobResult) -> None:
        """What the job says of the tier's health, and what it cost."""
        nothing = len(result.failed) == len(job.entries) and not job.arrived
        if not job.promotion and job.on_end is None:
            job.link.stores_failing = nothing
        if nothing:
            job.timing.sound = False
            if job.link.tier.page_causes.isdisjoint(result.failed.values()):
                if not job.overdue:  # else counted already
                    self._blame(job, next(iter(result.failed.values()), LATE))
                return
        now = job.traffic.progress = self._clock()
        if job.probe:  # also if it only found the disk full: loads may be well
            job.link.breaker.probe_succeeded()
        if nothing:
            return  # says nothing of the medium
        if not job.overdue:
            job.link.breaker.succeeded(job.kind)
        if job.timing.sound and not job.timing.pages:
            job.traffic.cost.add(job.timing.ahead, now - job.timing.started)


def _patience(link: TierLink, promotion: bool) -> float:
    return link.deadline_s if promotion else STORE_PATIENCE_S
