"""A tier behind a slow link: another tier whose results are held back.

Loads and stores have a link each, and a link moves one byte after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvstrata.tiers.base import Job, JobResult, TierConfigError, TierContext
from kvstrata.tiers.faults import TierWrapper
from kvstrata.tiers.options import check_keys
from kvstrata.tiers.registry import tier_class, tier_options

_LATENCY, _SPEED, _INNER = "latency_s", "bytes_per_second", "tier"


class ThrottledTier(TierWrapper):
    """Options: `tier`, an entry of `secondary_tiers`; `latency_s`; `bytes_per_second`."""

    medium = "STORAGE"

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`."""
        check_keys("throttled tier", options, {_LATENCY, _SPEED, _INNER})
        for name, least in ((_LATENCY, 0.0), (_SPEED, 1.0)):
            value = options.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise TierConfigError(f"{name}={value!r}: use a number of at least {least:g}")
        inner = options.get(_INNER)
        if not isinstance(inner, Mapping):
            raise TierConfigError(f'{_INNER}={inner!r}: use an object such as {{"type": "memory"}}')
        tier_class(inner).check_options(tier_options(inner))

    def __init__(
        self,
        options: Mapping[str, Any],
        context: TierContext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `SecondaryTier.__init__`."""
        self.check_options(options)
        inner = options[_INNER]
        super().__init__(tier_class(inner)(tier_options(inner), context))
        self._latency_s = float(options[_LATENCY])
        self._bytes_per_second = float(options[_SPEED])
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
