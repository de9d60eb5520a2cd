"""Tiers that misbehave on purpose: wrap any tier to see what its user does about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageKey,
    RequestView,
    SecondaryTier,
    TierStats,
)


class _Inners:
    """What `inner` has under this name, method or not."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: TierWrapper | None, owner: type) -> Any:
        if wrapper is None:
            return self
        return getattr(wrapper.inner, self._name)


class TierWrapper(SecondaryTier):
    """Passes every call on to `inner`; subclasses change what they mean to.

    Wrappers are made in code and have no options.
    """

    locality, page_causes, trusted, whole_loads = _Inners(), _Inners(), _Inners(), _Inners()
    lookup, touch, how_to_trust = _Inners(), _Inners(), _Inners()
    tells_changes, take_changes = _Inners(), _Inners()
    submit_store, submit_load, submit_reject = _Inners(), _Inners(), _Inners()
    get_finished, get_arrived = _Inners(), _Inners()
    on_new_request, on_request_finished, on_step_end = _Inners(), _Inners(), _Inners()
    serve, wants_steps = _Inners(), _Inners()
    drain, shutdown, stats = _Inners(), _Inners(), _Inners()

    def __init__(self, inner: SecondaryTier) -> None:
        self.inner = inner


class FaultyTier(TierWrapper):
    """Fails what a predicate picks and passes the rest on.

    `fails(operation, key)` is asked for every key with operation "lookup", "store" or
    "load". It returns None, or the cause of the failure; a lookup that fails is a MISS.
    """

    def __init__(self, inner: SecondaryTier, fails: Callable[[str, PageKey], str | None]) -> None:
        super().__init__(inner)
        self._fails = fails
        self._failed: dict[int, dict[PageKey, str]] = {}
        self._counts: dict[str, int] = {}

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """MISS where the predicate says so."""
        if self._cause("lookup", key) is not None:
            return Lookup.MISS
        return self.inner.lookup(key, request)

    def submit_store(self, job: Job) -> None:
        """Store the pages that the predicate spares."""
        self.inner.submit_store(self._spared("store", job))

    def submit_load(self, job: Job) -> None:
        """Load the pages that the predicate spares."""
        self.inner.submit_load(self._spared("load", job))

    def get_finished(self) -> Sequence[JobResult]:
        """The inner tier's results with the injected failures added."""
        results = self.inner.get_finished()
        return [replace(r, failed={**r.failed, **self._failed.pop(r.job_id, {})}) for r in results]

    def stats(self) -> TierStats:
        """The inner tier's totals with the injected failures added."""
        stats = self.inner.stats()
        for cause, count in self._counts.items():
            stats.failures[cause] = stats.failures.get(cause, 0) + count
        return stats

    def _cause(self, operation: str, key: PageKey) -> str | None:
        cause = self._fails(operation, key)
        if cause is not None:
            self._counts[cause] = self._counts.get(cause, 0) + 1
        return cause

    def _spared(self, operation: str, job: Job) -> Job:
        failed = self._failed[job.job_id] = {}
        spared: list[int] = []
        for index, key in enumerate(job.keys):
            cause = self._cause(operation, key)
            if cause is None:
                spared.append(index)
            else:
                failed[key] = cause
        return replace(
            job,
            keys=[job.keys[index] for index in spared],
            slots=[job.slots[index] for index in spared],
            end_tokens=[job.end_tokens[index] for index in spared],
        )


class SlowTier(TierWrapper):
    """Starts jobs late, so that views are touched late too, and can hang.

    A job starts at the `polls`-th call of `get_finished` after its submission and not before
    `seconds` have passed. While the tier hangs no job starts, lookups answer RETRY, and
    `drain` and `shutdown` return False without having done anything.
    """

    def __init__(self, inner: SecondaryTier, polls: int = 0, seconds: float = 0.0) -> None:
        super().__init__(inner)
        self._polls = polls
        self._seconds = seconds
        self._poll = 0
        self._hanging = False
        self._held: list[tuple[int, float, Callable[[Job], None], Job]] = []

    def hang(self) -> None:
        """Stop making progress."""
        self._hanging = True

    def release(self) -> None:
        """Go on."""
        self._hanging = False

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """RETRY while hanging."""
        return Lookup.RETRY if self._hanging else self.inner.lookup(key, request)

    def submit_store(self, job: Job) -> None:
        """Hold the job back."""
        self._hold(self.inner.submit_store, job)

    def submit_load(self, job: Job) -> None:
        """Hold the job back."""
        self._hold(self.inner.submit_load, job)

    def get_finished(self) -> Sequence[JobResult]:
        """Start what is due; nothing while hanging."""
        if self._hanging:
            return ()
        self._poll += 1
        self._start(all_held=False)
        return self.inner.get_finished()

    def get_arrived(self) -> Mapping[int, Collection[PageKey]]:
        """Nothing while hanging."""
        return {} if self._hanging else self.inner.get_arrived()

    def drain(self, timeout_s: float) -> bool:
        """Start all that is held and drain the inner tier; False while hanging."""
        if self._hanging:
            return False
        self._start(all_held=True)
        return self.inner.drain(timeout_s)

    def shutdown(self, timeout_s: float) -> bool:
        """Shut the inner tier down, which then fails what is held; False while hanging."""
        if self._hanging:
            return False
        stopped = self.inner.shutdown(timeout_s)
        self._start(all_held=True)
        return stopped

    def _hold(self, submit: Callable[[Job], None], job: Job) -> None:
        due = time.monotonic() + self._seconds
        self._held.append((self._poll + self._polls, due, submit, job))
        if not self._hanging:
            self._start(all_held=False)

    def _start(self, all_held: bool) -> None:
        held, self._held = self._held, []
        now = time.monotonic()
        for poll, due, submit, job in held:
            if all_held or (poll <= self._poll and due <= now):
                submit(job)
            else:
                self._held.append((poll, due, submit, job))
