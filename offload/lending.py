"""Lender: pages of the primary tier for those whom a secondary tier serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstrata.offload.lookup import Answer
from kvstrata.offload.primary.slots import Hold, PrimaryTier
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running, TierJobs
from kvstrata.tiers.base import Job, JobResult, Lookup, PageKey, RequestView

if TYPE_CHECKING:
    from kvstrata.offload.manager import TieringManager


@dataclass(frozen=True, slots=True)
class Lender:
    """What one tier is given while it serves; see `PrimaryPages`.

    The other tiers are asked as for any request, and what they have is promoted.
    """

    link: TierLink
    _manager: TieringManager
    _primary: PrimaryTier
    _jobs: TierJobs

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """Whether the page is here, or may come from a tier other than this one."""
        if not self._manager.knows(request.req_id):
            others = frozenset(link.name for link in self._jobs.links if link is not self.link)
            self._manager.on_new_request(replace(request, tiers=others))
        answer = self._manager.lookup(key, 0, request)
        if answer is Answer.HIT:
            return Lookup.HIT
        return Lookup.MISS if answer is Answer.MISS else Lookup.RETRY

    def lend(self, keys: Sequence[PageKey], request: RequestView) -> Job:
        """Hold the pages until the tier ends the job."""
        entries = self._primary.find(keys)
        if len(entries) < len(keys) or not all(entry.ready for entry in entries):
            raise KeyError("a page is not here")
        self._primary.hold(entries, Hold.CASCADE)
        lent: list[Job] = []
        timing = Timing(0.0, 0, len(entries), sound=False)  # the others read when they like
        self._jobs.submit(
            self.link,
            entries,
            request,
            promotion=False,
            timing=timing,
            on_end=self._take_back,
            send=lent.append,
        )
        return lent[0]

    def over(self, request: RequestView) -> None:
        """Forget the request."""
        if self._manager.knows(request.req_id):
            self._manager.on_request_finished(request)

    def _take_back(self, job: Running, result: JobResult) -> None:
        self._primary.let_go(job.entries, Hold.CASCADE)
