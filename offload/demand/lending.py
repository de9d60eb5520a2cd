"""Lender: pages of the primary tier for those whom a secondary tier serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstrata.offload.context import Context
from kvstrata.offload.primary.slots import Hold
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running
from kvstrata.tiers.base import Job, JobResult, Lookup, PageKey, RequestView


@dataclass(frozen=True, slots=True)
class Lender:
    """What one tier is given while it serves; see `PrimaryPages`.

    `find` looks a page up for a request of the tier's, and `over` ends that request.
    """

    _context: Context
    _link: TierLink
    find: Callable[[TierLink, PageKey, RequestView], Lookup]
    over: Callable[[RequestView], None]

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """Whether the page is here, or may come from a tier other than this one."""
        return self.find(self._link, key, request)

    def lend(self, keys: Sequence[PageKey], request: RequestView) -> Job:
        """Hold the pages until the tier ends the job."""
        entries = self._context.primary.find(keys)
        if len(entries) < len(keys) or not all(entry.ready for entry in entries):
            raise KeyError("a page is not here")
        self._context.primary.hold(entries, Hold.CASCADE)
        lent: list[Job] = []
        timing = Timing(0.0, 0, len(entries), sound=False)  # the others read when they like
        self._context.jobs.submit(
            self._link,
            entries,
            request,
            promotion=False,
            timing=timing,
            on_end=self._take_back,
            send=lent.append,
        )
        return lent[0]

    def _take_back(self, job: Running, result: JobResult) -> None:
        self._context.primary.let_go(job.entries, Hold.CASCADE)
