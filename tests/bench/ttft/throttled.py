"""A tier behind a slow link: another tier whose results are held back.

Loads and stores have a link each, and a link moves one byte after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kvstrata.tiers.base import Job, JobResult, TierContext
from kvstrata.tiers.options import WrongValue, option, parse_number, parse_options
from kvstrata.tiers.registry import tier_class, tier_options
from tests.tiers.faults import TierWrapper


def _parse_tier(key: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WrongValue(key, value, 'an object such as {"type": "memory"}')
    tier_class(value).check_options(tier_options(value))
    return value


@dataclass(frozen=True)
class Throttled:
    """A link and what lies behind it."""

    tier: Mapping[str, Any] = option(_parse_tier, "the entry of `secondary_tiers` behind the link")
    latency_s: float = option(
        partial(parse_number, most=3600.0, zero=True), "the time that each job takes more"
    )
    bytes_per_second: float = option(
        partial(parse_number, most=1e12), "the speed of the link, each way"
    )


class ThrottledTier(TierWrapper):
    """The tier of `Throttled.tier`, behind the link."""

    medium = "STORAGE"
    Options = Throttled

    def __init__(
        self,
        options: Mapping[str, Any],
        context: TierContext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `SecondaryTier.__init__`."""
        link = parse_options(Throttled, options, "throttled tier")
        super().__init__(tier_class(link.tier)(tier_options(link.tier), context))
        self._latency_s, self._bytes_per_second = link.latency_s, link.bytes_per_second
        self._clock = clock
        self._free = {"load": 0.0, "store": 0.0}  # when each link will have moved what it has
        self._started: dict[int, tuple[float, float]] = {}  # job -> when it began, when it is due
        self._ended: list[JobResult] = []  # of the tier behind the link

    def submit_store(self, job: Job) -> None:
        """See `SecondaryTier.submit_store`."""
        self._start(job, "store")
        self.inner.submit_store(job)

    def submit_load(self, job: Job) -> None:
        """See `SecondaryTier.submit_load`."""
        self._start(job, "load")
        self.inner.submit_load(job)

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        """See `SecondaryTier.submit_reject`."""
        self._start(job, "store")
        return self.inner.submit_reject(job, distrust=distrust)

    def get_finished(self) -> Sequence[JobResult]:
        """The results that the link has let through."""
        self._ended += self.inner.get_finished()
        now = self._clock()
        finished = [result for result in self._ended if self._started[result.job_id][1] <= now]
        self._ended = [result for result in self._ended if self._started[result.job_id][1] > now]
        return [self._with_time(result) for result in finished]

    def get_arrived(self) -> Mapping[int, Collection[bytes]]:
        """Nothing: a job comes through the link as a whole."""
        return {}

    def drain(self, timeout_s: float) -> bool:
        """See `SecondaryTier.drain`."""
        end = self._clock() + timeout_s
        if not self.inner.drain(timeout_s):
            return False
        due = max((due for _, due in self._started.values()), default=0.0)
        time.sleep(max(0.0, min(due, end) - self._clock()))
        return due <= end

    def shutdown(self, timeout_s: float) -> bool:
        """Stop the tier behind the link; what it holds back is let through."""
        stopped = self.inner.shutdown(timeout_s)
        self._started = {job_id: (start, 0.0) for job_id, (start, _) in self._started.items()}
        return stopped

    def _start(self, job: Job, link: str) -> None:
        now = self._clock()
        nbytes = sum(page.view.nbytes for page in job.pages)
        start = max(now, self._free[link])
        self._free[link] = start + nbytes / self._bytes_per_second
        self._started[job.job_id] = (start, self._free[link] + self._latency_s)

    def _with_time(self, result: JobResult) -> JobResult:
        start, _ = self._started.pop(result.job_id)
        return replace(result, seconds=max(result.seconds, self._clock() - start))
