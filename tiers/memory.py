"""The smallest correct tier: pages as bytes in this process.

For tests, examples and as a model for new tiers. It copies on the caller's thread.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.tiers.base import (
    Changes,
    Job,
    JobResult,
    Lookup,
    Page,
    PageKey,
    RequestView,
    SecondaryTier,
    TierContext,
    TierStats,
)
from kvstrata.tiers.options import option, parse_bytes, parse_options


@dataclass(frozen=True)
class MemoryOptions:
    """Options of the memory tier, checked."""

    max_bytes: int | None = option(
        parse_bytes,
        "most bytes; the least recently used pages go",
        None,
        shown="none",
    )


class MemoryTier(SecondaryTier):
    """Pages in a dict."""

    medium = "CPU"
    tells_changes = True
    Options = MemoryOptions

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        self._max_bytes = parse_options(MemoryOptions, options, "memory tier").max_bytes
        self.locality = "LOCAL"
        self._layouts = context.layouts
        self._pages: OrderedDict[PageKey, bytes] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._finished: list[JobResult] = []
        self._changes = Changes()
        self._counters: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._closed = False

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """HIT or MISS, never RETRY."""
        hit = not self._closed and key in self._pages
        self._counters["lookups"] += 1
        self._counters["hits"] += hit
        return Lookup.HIT if hit else Lookup.MISS

    def submit_store(self, job: Job) -> None:
        """Copy the pages in."""
        self._run(job, self._store, "stored")

    def submit_load(self, job: Job) -> None:
        """Copy the pages out."""
        self._run(job, self._load, "loaded")

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        """Forget the page."""
        self.trusted = self.trusted and not distrust
        self._run(job, self._forget, "rejected")
        return True

    def get_finished(self) -> Sequence[JobResult]:
        """See `SecondaryTier.get_finished`."""
        finished, self._finished = self._finished, []
        return finished

    def touch(self, keys: Collection[PageKey], request: RequestView) -> None:
        """Make the pages the most recently used, the first one most."""
        for key in reversed(list(keys)):
            if key in self._pages:
                self._pages.move_to_end(key)

    def take_changes(self, most: int, *, anew: bool = False) -> Iterable[tuple[PageKey, bool]]:
        """Stored and evicted keys."""
        return self._changes.take(most, self._pages, anew=anew)

    def drain(self, timeout_s: float) -> bool:
        """Always True: no job outlives its submission."""
        return True

    def shutdown(self, timeout_s: float) -> bool:
        """Forget all pages."""
        self._closed = True
        self._pages.clear()
        self._bytes = 0
        return True

    def stats(self) -> TierStats:
        """See `SecondaryTier.stats`."""
        gauges = {"pages": float(len(self._pages)), "bytes": float(self._bytes)}
        if self._max_bytes is not None:
            gauges["capacity_bytes"] = float(self._max_bytes)
        return TierStats(dict(self._counters), dict(self._failures), gauges=gauges)

    def _run(self, job: Job, move: Callable[[Page], str | None], done: str) -> None:
        """Move each page, and count and report what happened; `move` returns a cause or None."""
        start = time.monotonic()
        failed: dict[PageKey, str] = {}
        moved = 0
        for page in job.pages:
            cause = "shutdown" if self._closed else self._check(page) or move(page)
            if cause:
                failed[page.key] = cause
                self._failures[cause] += 1
            else:
                moved += page.view.nbytes
                self._counters[f"{done}_pages"] += 1
                self._counters[f"{done}_bytes"] += page.view.nbytes
        self._finished.append(JobResult(job.job_id, failed, moved, time.monotonic() - start))

    def _check(self, page: Page) -> str | None:
        layout = self._layouts.get(page.group)
        return "key" if layout is None or len(page.key) <= 4 else None

    def _store(self, page: Page) -> str | None:
        size = page.view.nbytes
        if page.key in self._pages:
            self._pages.move_to_end(page.key)
            return None
        if self._max_bytes is not None:
            if size > self._max_bytes:
                return "too-large"
            while self._bytes + size > self._max_bytes:
                key, data = self._pages.popitem(last=False)
                self._bytes -= len(data)
                self._counters["evicted_pages"] += 1
                self._counters["evicted_bytes"] += len(data)
                self._changes.note(key, False)
        self._pages[page.key] = bytes(page.view)
        self._bytes += size
        self._changes.note(page.key, True)
        return None

    def _forget(self, page: Page) -> str | None:
        if (data := self._pages.pop(page.key, None)) is not None:
            self._bytes -= len(data)
            self._changes.note(page.key, False)
        return None

    def _load(self, page: Page) -> str | None:
        data = self._pages.get(page.key)
        if data is None:
            return "missing"
        page.view[:] = data
        self._pages.move_to_end(page.key)
        return None
