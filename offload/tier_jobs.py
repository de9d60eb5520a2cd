"""The secondary tiers and the jobs under way at them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvstrata.offload.primary import Entry
from kvstrata.tiers.base import Job, JobResult, Page, RequestView, SecondaryTier, key_group

logger = logging.getLogger("kvstrata.manager")

# A tier gets this long to end its jobs at a reset or shutdown; then it is left behind.
STOP_TIMEOUT_S = 5.0
# A store that takes longer no longer keeps an otherwise idle engine stepping.
STORE_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class NamedTier:
    """A secondary tier and the name it has in requests, logs and metrics."""

    name: str
    tier: SecondaryTier
    medium: str | None = None  # vLLM's word: "CPU", "STORAGE", or None for anything else


@dataclass(frozen=True, slots=True)
class Running:
    """A job under way at a tier: a promotion into the primary tier, or a cascade out of it."""

    tier: NamedTier
    entries: Mapping[bytes, Entry]
    promotion: bool
    started: float
    request: RequestView


class TierJobs:
    """Opens and stops the tiers, hands them jobs, and takes the results.

    Args:
        open_tiers: makes the secondary tiers.
        view: (slot, group) -> the page's bytes.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        open_tiers: Callable[[], Sequence[NamedTier]],
        view: Callable[[int, int], memoryview],
        clock: Callable[[], float],
    ) -> None:
        self._open_tiers = open_tiers
        self._view = view
        self._clock = clock
        self.tiers = tuple(open_tiers())
        self._running: dict[int, Running] = {}
        self._next_job = 0
        self._cascading: Counter[NamedTier] = Counter()
        self._left_behind: list[NamedTier] = []  # did not stop in time; may still end jobs

    def __len__(self) -> int:
        return len(self._running)

    def submit(
        self, tier: NamedTier, entries: Sequence[Entry], request: RequestView, *, promotion: bool
    ) -> None:
        """Start one job; its result comes from `results`."""
        job_id = self._next_job
        self._next_job += 1
        by_key = {entry.key: entry for entry in entries}
        self._running[job_id] = Running(tier, by_key, promotion, self._clock(), request)
        job = Job(job_id, tuple(self._page(entry) for entry in entries), request)
        if promotion:
            tier.tier.submit_load(job)
        else:
            self._cascading[tier] += len(entries)
            tier.tier.submit_store(job)

    def results(self) -> Iterator[tuple[Running, JobResult]]:
        """The jobs that ended since the last call."""
        for named in (*self.tiers, *self._left_behind):
            for result in named.tier.get_finished():
                job = self._running.pop(result.job_id)
                if not job.promotion:
                    self._cascading[named] -= len(job.entries)
                yield job, result

    def cascading(self, tier: NamedTier) -> int:
        """How many pages the tier is storing."""
        return self._cascading[tier]

    def any_in_time(self, promotion_deadline_s: float) -> bool:
        """Whether a job is under way that has not outrun its time."""
        now = self._clock()
        return any(
            now - job.started < (promotion_deadline_s if job.promotion else STORE_PATIENCE_S)
            for job in self._running.values()
        )

    def drain(self) -> None:
        """Wait for the jobs under way, each tier at most `STOP_TIMEOUT_S`."""
        for named in self.tiers:
            if not named.tier.drain(STOP_TIMEOUT_S):
                logger.warning("tier %s did not drain within %g s", named.name, STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Stop the tiers, each within `STOP_TIMEOUT_S`; one that hangs is left behind."""
        for named in self.tiers:
            if not named.tier.shutdown(STOP_TIMEOUT_S):
                logger.warning("tier %s did not stop within %g s", named.name, STOP_TIMEOUT_S)
                self._left_behind.append(named)

    def reopen(self) -> None:
        """Open the tiers anew after `stop`; if that fails, go on without them."""
        try:
            self.tiers = tuple(self._open_tiers())
        except Exception:  # the engine goes on, whatever a medium does
            logger.exception("secondary tiers cannot be opened again: they are off")
            self.tiers = ()

    def _page(self, entry: Entry) -> Page:
        group = key_group(entry.key)
        return Page(entry.key, group, entry.end_token, entry.slot, self._view(entry.slot, group))
