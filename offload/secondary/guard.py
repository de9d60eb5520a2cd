"""GuardedTier: keeps a tier's mistakes out of the engine.

The contract says that a tier never raises once it is open and ends each job once. This
wrapper makes it true for every tier, third parties' included: an exception becomes a miss
or a failed result, a result that ends no job is dropped, and one with wrong fields is put
right; all are counted, and logged once per cause.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import TypeVar

from kvstrata.tiers.base import (
    LOCALITIES,
    MEDIA,
    Job,
    JobResult,
    Lookup,
    PrimaryPages,
    RequestView,
    SecondaryTier,
    TierConfigError,
    TierStats,
)
from kvstrata.tiers.options import MAX_BYTES

logger = logging.getLogger("kvstrata.tiers")
T = TypeVar("T")

_WRONG = "wrong-result"
_LONGEST_CAUSE = 100  # characters
_MOST_SAMPLES = 256  # of a kind at once


class GuardedTier(SecondaryTier):
    """Delegates to the tier behind it, `inner`; what that raises becomes a harmless answer."""

    def __init__(self, name: str, tier: SecondaryTier) -> None:
        self._name = name
        self._mistakes: Counter[str] = Counter()
        # keys of the jobs that the tier accepted and has not ended
        self._open: dict[int, Sequence[bytes]] = {}
        self._loading: set[int] = set()  # those of them that are loads
        self._refused: list[JobResult] = []
        self._trusted = True
        self._past = TierStats()  # of tiers that were guarded before
        self._guard(tier)

    def adopt(self, tier: SecondaryTier) -> None:
        """From now on guard this one; no job is under way at the one before."""
        self._past = self.stats()
        self._past.samples.clear()  # what was told is not told again
        self._mistakes.clear()
        self._guard(tier)

    def _guard(self, tier: SecondaryTier) -> None:
        self.inner = tier
        self.locality = tier.locality
        self.page_causes = frozenset(tier.page_causes)
        self.whole_loads, self.serves = tier.whole_loads, tier.serves
        self.tells_changes = tier.tells_changes

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        try:  # for every chunk: cheaper than `_call`
            return self.inner.lookup(key, request)
        except Exception:
            self._raised("lookup")
            return Lookup.MISS

    def submit_store(self, job: Job) -> None:
        self._submit("submit_store", self.inner.submit_store, job)

    def submit_load(self, job: Job) -> None:
        if self._submit("submit_load", self.inner.submit_load, job):
            self._loading.add(job.job_id)

    def get_finished(self) -> Sequence[JobResult]:
        refused, self._refused = self._refused, []
        nothing: list[JobResult] = []
        done = self._call("get_finished", nothing, lambda: list(self.inner.get_finished()))
        if done:
            refused += [ended for result in done if (ended := self._end(result)) is not None]
        return refused

    def get_arrived(self) -> Mapping[int, Collection[bytes]]:
        nothing: dict[int, list[bytes]] = {}
        told = self._call("get_arrived", nothing, lambda: _lists(self.inner.get_arrived()))
        taken = {job_id: self._take(job_id, keys) for job_id, keys in told.items()}
        return {job_id: keys for job_id, keys in taken.items() if keys}

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        self._open[job.job_id] = tuple(job.keys)
        taken = self._call(
            "submit_reject", False, lambda: self.inner.submit_reject(job, distrust=distrust)
        )
        if taken is not True:
            self._open.pop(job.job_id, None)
        return taken is True

    def how_to_trust(self) -> str:
        return self._call("how_to_trust", super().how_to_trust(), self.inner.how_to_trust)

    @property
    def trusted(self) -> bool:  # type: ignore[override]
        try:
            self._trusted = bool(self.inner.trusted)
        except Exception:
            self._raised("trusted")
        return self._trusted

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        self._call("touch", None, lambda: self.inner.touch(keys, request))

    def on_new_request(self, request: RequestView) -> bool:
        return self._call("on_new_request", False, lambda: bool(self.inner.on_new_request(request)))

    def on_request_finished(self, request: RequestView) -> None:
        self._call("on_request_finished", None, lambda: self.inner.on_request_finished(request))

    def on_step_end(self) -> None:
        self._call("on_step_end", None, self.inner.on_step_end)

    def serve(self, pages: PrimaryPages) -> None:
        self._call("serve", None, lambda: self.inner.serve(_Lent(pages, self._open)))

    def wants_steps(self) -> bool:
        return self._call("wants_steps", False, lambda: bool(self.inner.wants_steps()))

    def take_changes(self, most: int, *, anew: bool = False) -> Iterable[tuple[bytes, bool]]:
        nothing: list[tuple[bytes, bool]] = []
        return self._call(
            "take_changes", nothing, lambda: _changes(self.inner.take_changes(most, anew=anew))
        )

    def drain(self, timeout_s: float) -> bool:
        return self._call("drain", False, lambda: bool(self.inner.drain(timeout_s)))

    def shutdown(self, timeout_s: float) -> bool:
        return self._call("shutdown", False, lambda: bool(self.inner.shutdown(timeout_s)))

    def stats(self) -> TierStats:
        total = TierStats()
        _add(total, self._past)
        self._call("stats", None, lambda: _add(total, self.inner.stats()))
        _add(total, TierStats(failures=dict(self._mistakes)))
        return total

    def _submit(self, method: str, submit: Callable[[Job], None], job: Job) -> bool:
        """Whether the tier accepted the job."""
        keys = tuple(job.keys)  # a tier that took keys out would make failed pages pass for good
        try:
            submit(job)
        except Exception:
            self._refused.append(JobResult(job.job_id, dict.fromkeys(keys, self._raised(method))))
            return False
        self._open[job.job_id] = keys
        return True

    def _take(self, job_id: int, keys: Collection[bytes]) -> Collection[bytes]:
        """Of the keys said to have arrived, those that the job still waited for."""
        waiting = self._open[job_id] if job_id in self._loading else []
        told = set(keys)
        fresh = told.intersection(waiting)
        if strange := told - fresh:
            text = "tier %s said that %r arrived, which no load of it waits for"
            self._count("unknown-arrival", text, strange.pop())
        if fresh:  # the result may say nothing else of them
            self._open[job_id] = [key for key in waiting if key not in fresh]
        return fresh

    def _end(self, result: object) -> JobResult | None:
        """The job's end as the manager may see it; None if the result ends no job."""
        if (
            not isinstance(result, JobResult)
            or not isinstance(result.job_id, int)
            or (keys := self._open.pop(result.job_id, None)) is None
        ):
            self._count("unknown-result", "tier %s reported %r, which ends no job", result)
            return None
        self._loading.discard(result.job_id)
        try:
            right = result if _is_plain(result) else _put_right(result, keys)
            if right is result or right == result:
                return right
        except Exception:  # nobody can tell what arrived
            right = JobResult(result.job_id, dict.fromkeys(keys, _WRONG))
        self._count(_WRONG, "tier %s reported %r, which is no result of its job", result)
        return right

    def _count(self, cause: str, text: str, result: object) -> None:
        if not self._mistakes[cause]:
            logger.error(text, self._name, result)
        self._mistakes[cause] += 1

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


class _Lent:
    """Passes on what the tier asks of the primary tier; what it is lent is an open job of it."""

    def __init__(self, pages: PrimaryPages, jobs: dict[int, Sequence[bytes]]) -> None:
        self._pages, self._jobs = pages, jobs
        self.lookup, self.over = pages.lookup, pages.over

    def lend(self, keys: Sequence[bytes], request: RequestView) -> Job:
        job = self._pages.lend(keys, request)
        self._jobs[job.job_id] = tuple(job.keys)
        return job


def check_words(name: str, tier: SecondaryTier) -> None:
    """Refuse a tier that describes itself in words that vLLM does not have.

    Raises:
        TierConfigError: naming the tier, its word and the remedy.
    """
    for attribute, value, known in (
        ("medium", type(tier).medium, MEDIA),
        ("locality", tier.locality, LOCALITIES),
    ):
        if value is not None and value not in known:
            words = " or ".join(f'"{word}"' for word in known)
            raise TierConfigError(
                f"tier {name}: its class {type(tier).__name__} has {attribute} = {value!r}; "
                f"use {words}, or None if it is neither"
            )
    causes = tier.page_causes
    if not isinstance(causes, Set) or not all(isinstance(each, str) for each in causes):
        raise TierConfigError(
            f"tier {name}: its class {type(tier).__name__} has page_causes = {causes!r}; use a "
            "frozenset of words"
        )


def _is_plain(result: JobResult) -> bool:
    """Whether nothing can be wrong with it, since nothing failed."""
    given, nbytes, seconds = result.failed, result.nbytes, result.seconds
    if type(result) is not JobResult or type(given) is not dict or given:
        return False
    plain = type(nbytes) is int and type(seconds) is float
    return plain and 0 <= nbytes <= MAX_BYTES and 0.0 <= seconds < math.inf


def _put_right(result: JobResult, keys: Collection[bytes]) -> JobResult:
    """The result with keys of its job, short causes and sound numbers only.

    Raises:
        Exception: `failed` is no mapping, or what the tier's own objects raise.
    """
    given, nbytes, seconds = result.failed, result.nbytes, result.seconds
    if not isinstance(given, Mapping):
        raise TypeError("not a mapping")
    if type(nbytes) is not int or not 0 <= nbytes <= MAX_BYTES:
        nbytes = 0
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:  # NaN is not
        seconds = 0.0
    failed = {key: _short(given[key]) for key in keys if key in given} if given else {}
    return JobResult(result.job_id, failed, nbytes, seconds)


def _short(cause: object) -> str:
    return (cause if isinstance(cause, str) else str(cause))[:_LONGEST_CAUSE]


def _keys(given: Iterable[bytes]) -> list[bytes]:
    keys = list(given)
    if not all(isinstance(key, bytes) for key in keys):
        raise TypeError("keys must be bytes")
    return keys


def _changes(given: Iterable[tuple[bytes, bool]]) -> list[tuple[bytes, bool]]:
    changes = [(key, bool(here)) for key, here in given]
    _keys([key for key, _ in changes])
    return changes


def _lists(arrived: Mapping[int, Collection[bytes]]) -> dict[int, list[bytes]]:
    lists = {job_id: _keys(keys) for job_id, keys in arrived.items()}
    if not all(type(job_id) is int for job_id in lists):
        raise TypeError("jobs are numbers")
    return lists


def _add(total: TierStats, stats: TierStats) -> None:
    for numbers in (stats.counters, stats.failures, stats.quarantined, stats.gauges):
        for name, value in numbers.items():
            if not isinstance(name, str) or not isinstance(value, int | float):
                raise TypeError(f"{name!r}: {value!r} is no name with a number")
    for sums, numbers in (
        (total.counters, stats.counters),
        (total.failures, stats.failures),
        (total.quarantined, stats.quarantined),
    ):
        for name, value in numbers.items():
            sums[name] = sums.get(name, 0) + value
    total.gauges.update(stats.gauges)
    for name, values in stats.samples.items():
        total.samples[name] = [float(value) for value in values[-_MOST_SAMPLES:]]
