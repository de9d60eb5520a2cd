"""Tiers with one fault each, loaded by engines through `module_path`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvstrata.tiers.base import Job, JobResult, Page, TierContext
from kvstrata.tiers.memory import MemoryTier

CAUSE = "out-of-order"
PAGE_S = 0.1  # a tenth of it is what a page takes to compute


class BrokenTier(MemoryTier):
    """Stores nothing."""

    def _store(self, page: Page) -> str | None:
        return CAUSE


class WrongTier(MemoryTier):
    """Loads other pages than it stored, as of another model; and slowly, one after the other."""

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `MemoryTier.__init__`."""
        super().__init__(options, context)
        self._due: dict[int, float] = {}
        self._idle_from = 0.0

    def submit_load(self, job: Job) -> None:
        """The pages are there at once, and told later."""
        self._idle_from = max(self._idle_from, time.monotonic()) + PAGE_S * len(job.keys)
        self._due[job.job_id] = self._idle_from
        super().submit_load(job)

    def get_finished(self) -> Sequence[JobResult]:
        """What is due."""
        now = time.monotonic()
        ended, self._finished = self._finished, []
        for result in ended:
            if self._due.get(result.job_id, now) > now:
                self._finished.append(result)
        return [result for result in ended if result not in self._finished]

    def _load(self, page: Page) -> str | None:
        cause = super()._load(page)
        if cause is None:
            page.view[:] = bytes(255 - byte for byte in page.view)
        return cause
