"""GuardedTier: keeps a tier's mistakes out of the engine.

The contract says that a tier never raises once it is open and ends each job once. This
wrapper makes it true for every tier, third parties' included: an exception becomes a miss
or a failed result, other results are dropped; both are counted, and logged once per cause.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    RequestView,
    SecondaryTier,
    TierStats,
)

logger = logging.getLogger("kvstrata.tiers")
T = TypeVar("T")


class GuardedTier(SecondaryTier):
    """Delegates to `tier`; what it raises becomes a harmless answer."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """A guard has no options of its own."""

    def __init__(self, name: str, tier: SecondaryTier) -> None:
        self._name = name
        self._tier = tier
        self._mistakes: Counter[str] = Counter()
        self._open: set[int] = set()  # jobs that the tier accepted and has not ended
        self._refused: list[JobResult] = []
        self.locality = tier.locality

    @property
    def inner(self) -> SecondaryTier:
        """The tier behind the guard."""
        return self._tier

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        try:  # for every chunk: cheaper than `_call`
            return self._tier.lookup(key, request)
        except Exception:
            self._raised("lookup")
            return Lookup.MISS

    def submit_store(self, job: Job) -> None:
        self._submit("submit_store", self._tier.submit_store, job)

    def submit_load(self, job: Job) -> None:
        self._submit("submit_load", self._tier.submit_load, job)

    def get_finished(self) -> Sequence[JobResult]:
        refused, self._refused = self._refused, []
        nothing: list[JobResult] = []
        done = self._call("get_finished", nothing, lambda: list(self._tier.get_finished()))
        return [*refused, *(result for result in done if self._ends_a_job(result))]

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        self._call("touch", None, lambda: self._tier.touch(keys, request))

    def on_new_request(self, request: RequestView) -> None:
        self._call("on_new_request", None, lambda: self._tier.on_new_request(request))

    def on_request_finished(self, request: RequestView) -> None:
        self._call("on_request_finished", None, lambda: self._tier.on_request_finished(request))

    def on_step_end(self) -> None:
        self._call("on_step_end", None, self._tier.on_step_end)

    def take_removed(self) -> Iterable[bytes]:
        nothing: list[bytes] = []
        return self._call("take_removed", nothing, lambda: list(self._tier.take_removed()))

    def drain(self, timeout_s: float) -> bool:
        return self._call("drain", False, lambda: bool(self._tier.drain(timeout_s)))

    def shutdown(self, timeout_s: float) -> bool:
        return self._call("shutdown", False, lambda: bool(self._tier.shutdown(timeout_s)))

    def stats(self) -> TierStats:
        total = TierStats()
        self._call("stats", None, lambda: _add(total, self._tier.stats()))
        _add(total, TierStats(failures=dict(self._mistakes)))
        return total

    def _submit(self, method: str, submit: Callable[[Job], None], job: Job) -> None:
        try:
            submit(job)
            self._open.add(job.job_id)
        except Exception:
            cause = self._raised(method)
            failed = dict.fromkeys((page.key for page in job.pages), cause)
            self._refused.append(JobResult(job.job_id, failed))

    def _ends_a_job(self, result: object) -> bool:
        if (
            isinstance(result, JobResult)
            and result.job_id in self._open
            and isinstance(result.failed, Mapping)
        ):
            self._open.remove(result.job_id)
            return True
        if not self._mistakes["unknown-result"]:
            logger.error("tier %s reported %r, which ends no job", self._name, result)
        self._mistakes["unknown-result"] += 1
        return False

    def _call(self, method: str, otherwise: T, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception:
            self._raised(method)
            return otherwise

    def _raised(self, method: str) -> str:
        """Count and log the exception being handled; its cause for results."""
        cause = f"raised-in-{method}"
        if not self._mistakes[cause]:
            logger.exception("tier %s raised in %s", self._name, method)
        self._mistakes[cause] += 1
        return cause


def _add(total: TierStats, stats: TierStats) -> None:
    total.counters.update(stats.counters)
    total.failures.update(stats.failures)
    total.gauges.update(stats.gauges)
