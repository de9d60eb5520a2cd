"""GuardedTier: keeps a tier's exceptions out of the engine.

The contract says that a tier never raises once it is open. This wrapper makes it true
for every tier, third parties' included: an exception becomes a miss or a failed result,
is counted, and is logged once per method.
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
        self._raised: Counter[str] = Counter()
        self._refused: list[JobResult] = []
        self.locality = tier.locality

    @property
    def inner(self) -> SecondaryTier:
        """The tier behind the guard."""
        return self._tier

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        return self._call("lookup", Lookup.MISS, lambda: self._tier.lookup(key, request))

    def submit_store(self, job: Job) -> None:
        self._submit("submit_store", self._tier.submit_store, job)

    def submit_load(self, job: Job) -> None:
        self._submit("submit_load", self._tier.submit_load, job)

    def get_finished(self) -> Sequence[JobResult]:
        refused, self._refused = self._refused, []
        done: Sequence[JobResult] = self._call("get_finished", (), self._tier.get_finished)
        return [*refused, *done]

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        self._call("touch", None, lambda: self._tier.touch(keys, request))

    def on_new_request(self, request: RequestView) -> None:
        self._call("on_new_request", None, lambda: self._tier.on_new_request(request))

    def on_request_finished(self, request: RequestView) -> None:
        self._call("on_request_finished", None, lambda: self._tier.on_request_finished(request))

    def on_step_end(self) -> None:
        self._call("on_step_end", None, self._tier.on_step_end)

    def take_removed(self) -> Iterable[bytes]:
        nothing: Iterable[bytes] = ()
        return self._call("take_removed", nothing, self._tier.take_removed)

    def drain(self, timeout_s: float) -> bool:
        return self._call("drain", False, lambda: self._tier.drain(timeout_s))

    def shutdown(self, timeout_s: float) -> bool:
        return self._call("shutdown", False, lambda: self._tier.shutdown(timeout_s))

    def stats(self) -> TierStats:
        stats = self._call("stats", TierStats(), self._tier.stats)
        for method, times in self._raised.items():
            stats.failures[f"raised-in-{method}"] = times
        return stats

    def _submit(self, method: str, submit: Callable[[Job], None], job: Job) -> None:
        try:
            submit(job)
        except Exception:
            self._note(method)
            cause = dict.fromkeys((page.key for page in job.pages), f"raised-in-{method}")
            self._refused.append(JobResult(job.job_id, cause))

    def _call(self, method: str, otherwise: T, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception:
            self._note(method)
            return otherwise

    def _note(self, method: str) -> None:
        if not self._raised[method]:
            logger.exception("tier %s raised in %s", self._name, method)
        self._raised[method] += 1
