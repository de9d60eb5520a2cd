"""The pages of a Mooncake pool: each is one value, `<namespace>:<key, hex>`.

It holds what a page's file holds, header and data one behind the other, but they come from two
places and go to two, so that the data is not copied on its way.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise

from kvstrata.tiers.base import PageKey, TierContext
from kvstrata.tiers.mooncake.client import ABSENT, FULL, GONE, NOT_READY, Client
from kvstrata.tiers.mooncake.config import MooncakeOptions
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Host, Medium, Outcome, PageRef, attempt

_HEADERS_BYTES = 2**20  # of the memory for headers that a thread has at least
_MISSING = Outcome("missing", gone=True)


class MooncakeMedium(Medium):
    """A namespace's pages; all threads share one client. The process of the writes lends memory."""

    def __init__(
        self, options: MooncakeOptions, context: TierContext, host: Host, reader: bool
    ) -> None:
        self._form = PageForm(context)
        self._client = Client(options, segment=0 if reader else options.segment)
        self._own = threading.local()
        try:
            self._client.connect()
        except OSError as error:  # it was there when the engine started; the next call tries again
            host.report("io-error", str(error))

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        """In one call."""
        return self._client.exist(self._names(keys))

    def store_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        """Those that are not there, in one call, straight from the views."""
        return _in_rounds(self._store, pages, views)

    def load_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        """In one call, straight into the views."""
        return _in_rounds(self._load, pages, views)

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """See `Medium.store`."""
        return self.store_many([page], [view], access)[0]

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """See `Medium.load`."""
        return self.load_many([page], [view], access)[0]

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """Remove it."""
        self._client.remove(self._names([page.key]))
        return Outcome(gone=True)

    def close(self) -> None:
        """See `Medium.close`."""
        self._client.close()

    def _store(self, pages: Sequence[PageRef], views: Sequence[memoryview]) -> list[Outcome]:
        if spoilt := [page.key for page in pages if page.rewrite]:
            self._client.remove(self._names(spoilt))
        found = self._client.exist(self._names([page.key for page in pages]))
        wanted = [index for index, there in enumerate(found) if not there]
        outcomes = [Outcome()] * len(pages)
        if not wanted:
            return outcomes
        keys = [pages[index].key for index in wanted]
        values = list(zip(self._headers(keys), [views[index] for index in wanted], strict=True))
        for key, (header, view) in zip(keys, values, strict=True):
            header[:] = self._form.header(key, view)
        codes = self._client.put(self._names(keys), values, pages[0].pin_s)
        for index, code in zip(wanted, codes, strict=True):
            outcomes[index] = self._stored(code)
        return outcomes

    def _load(self, pages: Sequence[PageRef], views: Sequence[memoryview]) -> list[Outcome]:
        keys = [page.key for page in pages]
        headers = self._headers(keys)
        codes = self._client.get(self._names(keys), list(zip(headers, views, strict=True)))
        return [
            attempt(self._loaded, *each) for each in zip(keys, headers, views, codes, strict=True)
        ]

    def _stored(self, code: int) -> Outcome:
        if code >= 0:
            return Outcome(moved=True)
        return Outcome(
            "no-space" if code == FULL else "io-error", detail=self._client.describe(code)
        )

    def _loaded(self, key: PageKey, header: memoryview, view: memoryview, code: int) -> Outcome:
        if code == len(header) + len(view):
            self._form.verify(key, bytes(header), view)
            return Outcome(moved=True)
        if code in (ABSENT, NOT_READY, GONE):
            return _MISSING
        (name,) = self._names([key])
        size = self._client.size(name)
        if size == ABSENT:
            return _MISSING
        if size >= 0 and size != self._form.size(key):  # that is why
            start = self._client.start(name, min(size, len(header)))
            raise self._form.blame(key, start, size)
        return Outcome("io-error", detail=self._client.describe(code))

    def _names(self, keys: Sequence[PageKey]) -> list[str]:
        return [f"{self._form.namespace}:{key.hex()}" for key in keys]

    def _headers(self, keys: Sequence[PageKey]) -> list[memoryview]:
        """Room for the headers of these pages, in memory of this thread's own."""
        ends = [0]
        for key in keys:
            ends.append(ends[-1] + self._form.header_size(key))
        area: memoryview | None = getattr(self._own, "area", None)
        if area is None or len(area) < ends[-1]:
            area = self._own.area = memoryview(mmap.mmap(-1, max(ends[-1], _HEADERS_BYTES)))
        return [area[start:end] for start, end in pairwise(ends)]


def _in_rounds(
    move: Callable[[Sequence[PageRef], Sequence[memoryview]], list[Outcome]],
    pages: Sequence[PageRef],
    views: Sequence[memoryview],
) -> list[Outcome]:
    """What `move` says of the pages, which are given to it so that no call names a page twice.

    The library would move it once, and say that it did so twice.
    """
    rounds: list[dict[PageKey, int]] = []  # the places of the pages, by their keys
    for place, page in enumerate(pages):
        free = next((each for each in rounds if page.key not in each), None)
        if free is None:
            rounds.append(free := {})
        free[page.key] = place
    outcomes = [Outcome()] * len(pages)
    for places in (each.values() for each in rounds):
        found = move([pages[place] for place in places], [views[place] for place in places])
        for place, outcome in zip(places, found, strict=True):
            outcomes[place] = outcome
    return outcomes
