"""A secondary tier that costs nothing: it remembers keys and no pages.

It is vLLM's `ExampleSecondaryTierManager` in our terms, so that ours and stock are
measured in front of equal tiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class InstantTier(SecondaryTier):
    """Knows each key that was stored; every job has ended when it was submitted."""

    medium = "CPU"

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """There are none."""

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        self._keys: dict[bytes, bool] = {}
        self._finished: list[JobResult] = []

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        return Lookup.HIT if key in self._keys else Lookup.MISS

    def submit_store(self, job: Job) -> None:
        for key in job.keys:
            self._keys[key] = True
        self._finished.append(JobResult(job.job_id))

    def submit_load(self, job: Job) -> None:
        missing = {key: "missing" for key in job.keys if key not in self._keys}
        self._finished.append(JobResult(job.job_id, missing))

    def get_finished(self) -> Sequence[JobResult]:
        finished, self._finished = self._finished, []
        return finished

    def drain(self, timeout_s: float) -> bool:
        return True

    def shutdown(self, timeout_s: float) -> bool:
        return True

    def stats(self) -> TierStats:
        return TierStats()
