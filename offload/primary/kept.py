"""Pages of the primary tier that requests count on between look-up and load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from kvstrata.offload.primary.slots import Entry, PrimaryTier


class KeptPages:
    """Pages that must not be evicted: answers to look-ups, and what has just arrived.

    What a request was answered HIT stays until it loads, goes on without a load, is looked up anew
    or ends, even through a reset. It may be some steps until the load: while the request waits for
    the rest of its prefix (two prefixes could push each other out for ever), and in vLLM 0.33 while
    steps under way may still use the blocks that it goes to. What arrived from a tier stays for
    this step and the next. Whatever is let go of is so when a step ends, unless the request ends.
    """

    def __init__(self, primary: PrimaryTier) -> None:
        self._primary = primary
        # To be let go of at the end of this step, and of the next
        self._leaving: list[dict[Entry, None]] = []
        self._staying: list[dict[Entry, None]] = []
        # By request: what it was answered in the last step in which it was looked up; and, of
        # those that are looked up in this step, what they were answered before and not again.
        self._found: dict[str, dict[Entry, None]] = {}
        self._earlier: dict[str, dict[Entry, None]] = {}
        self._asking: str | None = None  # the request of the last answer, and its two:
        self._again: dict[Entry, None] = {}
        self._not_again: dict[Entry, None] = {}
        self.outlived: set[str] = set()  # requests not looked up since a reset, if they have pages

    def __len__(self) -> int:
        return sum(map(len, self._parts()))

    def __iter__(self) -> Iterator[Entry]:
        return chain.from_iterable(self._parts())

    def keep(self, entry: Entry, req_id: str) -> None:
        """The request is answered HIT."""
        if req_id != self._asking:
            self._ask(req_id)
        if entry in self._again:
            return
        self._again[entry] = None
        if entry in self._not_again:
            del self._not_again[entry]
        else:
            self._primary.hold(entry)

    def arrived(self, entries: Iterable[Entry]) -> None:
        """Hold ready pages for this step and the next."""
        held = dict.fromkeys(entries)
        self._primary.begin_reads(held, gpu=False)
        self._staying.append(held)

    def of(self, req_id: str) -> dict[bytes, Entry]:
        """What the request was answered HIT, by key, though the key may lead there no more."""
        return {entry.key: entry for entry in self._found.get(req_id, ())}

    def loads(self, req_id: str) -> None:
        """The request's load holds what it needs."""
        if req_id in self._found:
            self._staying += self._take(req_id)

    def computes(self, req_id: str) -> None:
        """The request goes on without a load."""
        if req_id in self._found:
            self._leaving += self._take(req_id)

    def drop(self, req_id: str) -> None:
        """The request ended, or will load nothing of it."""
        if req_id in self._found:
            for entries in self._take(req_id):
                self._primary.end_reads(entries, gpu=False)

    def drop_outlived(self, req_id: str) -> None:
        """The request is looked up, and will load nothing from before the reset."""
        if req_id in self.outlived:
            self.drop(req_id)

    def end_step(self) -> None:
        """A step ended."""
        leaving = (*self._leaving, *self._earlier.values())
        self._leaving, self._staying = self._staying, []
        self._earlier.clear()
        self._asking = None
        for entries in leaving:
            self._primary.end_reads(entries, gpu=False)

    def reset(self) -> None:
        """Keep only what requests were answered in steps that have ended: vLLM may be about to
        load it."""
        for req_id in list(self._earlier):
            self.drop(req_id)
        self.end_step()
        self.end_step()
        self.outlived = {req_id for req_id, entries in self._found.items() if entries}

    def _ask(self, req_id: str) -> None:
        if req_id not in self._earlier:
            self._earlier[req_id] = self._found.get(req_id, {})
            self._found[req_id] = {}
            self.outlived.discard(req_id)
        self._asking = req_id
        self._again, self._not_again = self._found[req_id], self._earlier[req_id]

    def _take(self, req_id: str) -> tuple[dict[Entry, None], dict[Entry, None]]:
        if self._asking == req_id:
            self._asking = None
        self.outlived.discard(req_id)
        return self._found.pop(req_id), self._earlier.pop(req_id, {})

    def _parts(self) -> tuple[dict[Entry, None], ...]:
        by_request = (*self._found.values(), *self._earlier.values())
        return (*self._leaving, *self._staying, *by_request)
