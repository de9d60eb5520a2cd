"""The jobs that vLLM's manager gives to a tier of ours, and their results as it wants them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import OpenTiers, TierJobs
from kvstrata.tiers.base import PageKey, PageLayout, RequestView

# As behind our own manager: so much of the CPU tier may wait for the medium, and a queue of stores
# that takes longer gets no more.
MOST_STORING, LONGEST_QUEUE_S = 0.75, 10.0
_PAUSE_S = 0.01

# Called with the tier, for a load the request's id, what went well, and what failed.
OnEnd = Callable[[TierLink, str | None, list[PageKey], list[PageKey]], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """As vLLM gave it: its number and its keys; `whole`: all were taken that are wanted."""

    number: int
    keys: Sequence[PageKey]
    whole: bool = True


class StockJobs:
    """Hands jobs to the tier and takes their results. All calls return at once but the last two.

    Args:
        open_tiers: opens the tier, or none where it is off.
        rows: int8 [chunks, bytes of a row], vLLM's CPU tier.
        layouts: of a row, by KV cache group.
        deadline_s: a tier whose loads make no progress for so long fails.
        on_end: is told of each job that ended.

    Attributes:
        skipped: pages that were not stored since the tier was behind, or out.
    """

    def __init__(
        self,
        open_tiers: OpenTiers,
        rows: memoryview,
        layouts: Mapping[int, PageLayout],
        deadline_s: float,
        on_end: OnEnd,
    ) -> None:
        """Open the tier.

        Raises:
            TierConfigError: it cannot be used.
        """
        assert rows.shape is not None and rows.strides is not None
        self._slots, self._row_bytes = rows.shape[0], rows.strides[0]
        self._bytes = rows.cast("B")
        self._on_end = on_end
        self._ended: list[JobResult] = []
        self.skipped = 0
        try:
            self._jobs = TierJobs(open_tiers, self._view, layouts, deadline_s, time.monotonic)
        except BaseException:
            self._bytes.release()
            raise

    @property
    def link(self) -> TierLink | None:
        """The tier; None where it is off."""
        links = self._jobs.links
        return links[0] if links else None

    @property
    def usable(self) -> TierLink | None:
        """The tier, unless it is off, sick, or not to be believed."""
        link = self.link
        return link if link and link.breaker.closed and link.tier.trusted else None

    def store(self, given: TransferJob, request: RequestView) -> None:
        """Store what is wanted, if the tier keeps up; else the job fails."""
        link, keys = self.link, list(given.keys)
        entries = _entries(given)
        if link is None or not link.may_store:
            entries = []
        elif link.asked.counts:
            link.asked.count(keys)
            wanted = set(link.asked.wanted(keys))
            entries = [entry for entry in entries if entry.key in wanted]
        taken = entries if entries and self._keeps_up(entries) else []
        self.skipped += len(entries) - len(taken)
        self._submit(_Job(given.job_id, keys, len(taken) == len(entries)), taken, given, request)

    def load(self, given: TransferJob, request: RequestView) -> None:
        """Load into the rows, verified before the result."""
        entries = _entries(given) if self.usable else []
        self._submit(_Job(given.job_id, list(given.keys), bool(entries)), entries, given, request)

    def finished(self) -> list[JobResult]:
        """The jobs that ended since the last call."""
        self._collect()
        ended, self._ended = self._ended, []
        return ended

    def drain(self, *, reopen: bool) -> None:
        """Wait until no row is touched any more: for a while, then by force.

        A process that even the kernel does not end is waited for: it may still write.

        Args:
            reopen: open the tier anew, in any case.
        """
        self._jobs.drain()
        self._collect()
        if reopen or len(self._jobs):
            self._jobs.stop()
            self._collect()
            self._jobs.reopen()
        while len(self._jobs):
            time.sleep(_PAUSE_S)
            self._collect()

    def close(self) -> None:
        """Let the tier end what is under way, and stop it; bounded."""
        self._jobs.drain()
        self._jobs.stop()
        self._collect()
        self._bytes.release()  # vLLM unmaps them

    # -- inside --------------------------------------------------------------------

    def _keeps_up(self, entries: Sequence[Entry]) -> bool:
        """Whether the tier may be given so much: rows that wait for it cannot be evicted."""
        link = self.usable
        if link is None:
            return False
        stores = link.stores
        if stores.pages + len(entries) > MOST_STORING * self._slots:
            return False
        seconds = stores.cost.seconds(stores.nbytes + self._jobs.nbytes(entries))
        return not stores.pages or seconds <= LONGEST_QUEUE_S

    def _submit(
        self, job: _Job, entries: list[Entry], given: TransferJob, request: RequestView
    ) -> None:
        link = self.link
        if link is None or not entries:
            self._end(job, [] if job.whole else job.keys, load=given.is_promotion)
        else:
            self._jobs.submit(link, entries, request, promotion=given.is_promotion, tag=job)

    def _collect(self) -> None:
        for running, result in self._jobs.results():
            job, link = running.tag, running.link
            assert isinstance(job, _Job)
            failed = list(result.failed)
            # of a load's pages those are left that had not arrived before
            keys = job.keys if running.promotion else [entry.key for entry in running.entries]
            good = [key for key in keys if key not in result.failed]
            loader = running.request.req_id if running.promotion else None
            self._on_end(link, loader, good, failed)
            moved = {"transfer_time": result.seconds, "transfer_bytes": result.nbytes}
            self._end(job, failed, load=running.promotion, **moved)
        for _ in self._jobs.arrivals():
            pass  # vLLM takes pages with their job; that they come says that the tier is well

    def _end(self, job: _Job, failed: Sequence[PageKey], *, load: bool, **says: Any) -> None:
        if load and failed:
            lost = set(failed)
            says["successful_keys"] = tuple(key for key in job.keys if key not in lost)
        self._ended.append(JobResult(job.number, job.whole and not failed, **says))

    def _view(self, slot: int, nbytes: int) -> memoryview:
        start = slot * self._row_bytes
        return self._bytes[start : start + nbytes]


def _entries(job: TransferJob) -> list[Entry]:
    end_of, slots = job.req_context.get_offload_key_position, job.chunk_ids.tolist()
    return [Entry(k, slot, end_of(k) or 0, None) for k, slot in zip(job.keys, slots, strict=True)]
