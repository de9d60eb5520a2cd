"""Copying the pages of a namespace from one medium to another: each verified, none twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

from kvstrata.tiers.base import PageKey
from kvstrata.tiers.fs.files.direct_io import aligned_buffer
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Medium, Outcome, PageRef, failed

_THREADS = 16  # each waits for one disk or network at a time, and holds one page
_AT_ONCE = 32  # pages that the target is asked for, before any of them is read
_NO_ROOM = ("budget", "no-space", "too-large")

Advance = Callable[[int], None] | None  # is told of bytes that were dealt with


@dataclass(slots=True)
class Copied:
    """What became of pages.

    Attributes:
        pages, bytes: that were copied, with their headers.
        there: pages that were at the target already.
        gone: that went away before they were read, as evicted ones do.
        bad: path and reason of what was not copied.
        private: namespaces that were left out, since none but their own engine reads them.
        stopped: why the copy ended before it was through; None if it did not.
        full: whether that was for want of room.
    """

    pages: int = 0
    bytes: int = 0
    there: int = 0
    gone: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    stopped: str | None = None
    full: bool = False


class Copying:
    """Copies pages of one namespace.

    Args:
        source, target: of the namespace; any thread calls them.
        form: of its pages, and of `keys` alone.
        page_causes: what is wrong with a page of the source, and no reason to stop.
        where: the path of a page of the source.
        done: what is counted.
        advance: is told of each page's bytes when the page was dealt with.
    """

    def __init__(
        self,
        source: Medium,
        target: Medium,
        form: PageForm,
        page_causes: frozenset[str],
        where: Callable[[PageKey], str],
        done: Copied,
        advance: Advance,
    ) -> None:
        self._source, self._target, self._form = source, target, form
        self._page_causes, self._where = page_causes, where
        self._done, self._advance = done, advance
        self._lock, self._of_thread = threading.Lock(), threading.local()

    def run(self, keys: Sequence[PageKey]) -> None:
        """Copy the pages until all are copied, or the source or the target fails."""
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for start in range(0, len(keys), _AT_ONCE * _THREADS):
                    some = keys[start : start + _AT_ONCE * _THREADS]
                    parts = [some[at : at + _AT_ONCE] for at in range(0, len(some), _AT_ONCE)]
                    missing = list(chain.from_iterable(pool.map(self._missing, parts)))
                    list(pool.map(self._copy, missing))
            except BaseException:  # Ctrl-C
                self._done.stopped = "interrupted"
                raise

    def _missing(self, keys: Sequence[PageKey]) -> list[PageKey]:
        """Those that are not at the target; none once the copy has ended."""
        if self._done.stopped is not None:
            return []
        try:
            there = self._target.exists(keys)
        except Exception as error:
            self._stop("TO", failed(error))
            return []
        missing = [key for key, is_there in zip(keys, there, strict=True) if not is_there]
        self._count(there=len(keys) - len(missing))
        if self._advance is not None:
            self._advance(sum(map(self._form.size, keys)) - sum(map(self._form.size, missing)))
        return missing

    def _copy(self, key: PageKey) -> None:
        if self._done.stopped is not None:
            return
        self._move(key)
        if self._advance is not None:
            self._advance(self._form.size(key))

    def _move(self, key: PageKey) -> None:
        page, view = PageRef(key), self._view(key)
        (found,) = self._source.load_many([page], [view], 0)
        if found.cause == "missing":
            self._count(gone=1)
        elif found.cause in self._page_causes:
            with self._lock:
                self._done.bad.append((self._where(key), f"{found.cause}: {found.detail}"))
        elif found.cause is not None:
            self._stop("FROM", found)
        else:
            (kept,) = self._target.store_many([page], [view], 0)
            if kept.cause is not None:
                self._stop("TO", kept)
            elif kept.moved:
                self._count(pages=1, nbytes=self._form.size(key))
            else:
                self._count(there=1)

    def _view(self, key: PageKey) -> memoryview:
        """Memory of this thread for the page, overwritten by its next one."""
        size = self._form.layout(key).nbytes
        buffer: memoryview | None = getattr(self._of_thread, "buffer", None)
        if buffer is None or buffer.nbytes < size:
            buffer = self._of_thread.buffer = aligned_buffer(size)
        return buffer[:size]

    def _stop(self, place: str, outcome: Outcome) -> None:
        with self._lock:
            if self._done.stopped is None:
                self._done.stopped = f"{place} failed: {outcome.cause}: {outcome.detail}"
                self._done.full = place == "TO" and outcome.cause in _NO_ROOM

    def _count(self, pages: int = 0, nbytes: int = 0, there: int = 0, gone: int = 0) -> None:
        with self._lock:
            done = self._done
            done.pages, done.bytes = done.pages + pages, done.bytes + nbytes
            done.there, done.gone = done.there + there, done.gone + gone
