"""LoadQueue: pages reserved for a tier's loads that the tier was not given yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.costs import Timing


class Run(NamedTuple):
    """Pages that were asked for together, their sizes in bytes, and their time."""

    entries: Sequence[Entry]
    sizes: Sequence[int]
    timing: Timing


class Waiting:
    """The pages that wait for one request, in prefix order, all groups together, and their bytes.

    What comes first is of use only with the pages of all groups, and pages that another request
    had reserved may come between those that are here.
    """

    def __init__(self, state: RequestState) -> None:
        self.state = state
        self.runs: deque[Run] = deque()
        self.nbytes = 0

    def sort(self) -> None:
        """Put the pages in the order of their ends."""
        loads = [
            (entry, size, timing)
            for entries, sizes, timing in self.runs
            for entry, size in zip(entries, sizes, strict=True)
        ]
        loads.sort(key=lambda load: load[0].end_token)
        self.runs.clear()
        for _, together in groupby(loads, key=lambda load: id(load[2])):
            entries, sizes, timings = zip(*together, strict=True)
            self.runs.append(Run(entries, sizes, timings[0]))


class LoadQueue:
    """Of one tier. Requests take turns, job by job, so that a short prefix passes a long one.

    A request that shares the beginning of its prefix uses its turn for that: the pages reserved
    for the other come before its own.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}  # by request, who is next first
        self._nbytes = 0

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def pages(self, req_id: str) -> int:
        """Pages that wait for a request."""
        waiting = self._waiting.get(req_id)
        return sum(len(run.entries) for run in waiting.runs) if waiting is not None else 0

    def ahead(self, req_id: str, nbytes: int) -> int:
        """Bytes that are loaded until so many more of the request are, others' included."""
        waiting = self._waiting.get(req_id)
        own = waiting.nbytes if waiting is not None else 0
        others = len(self._waiting) - (waiting is not None)
        total = own + nbytes
        return total + min(self._nbytes - own, total * others)

    def add(
        self, state: RequestState, entries: Sequence[Entry], sizes: Sequence[int], timing: Timing
    ) -> None:
        """Put pages among those of the request, in the order of their ends."""
        waiting = self._waiting.get(state.view.req_id)
        if waiting is None:
            waiting = self._waiting[state.view.req_id] = Waiting(state)
        runs = waiting.runs
        behind = not runs or runs[-1].entries[-1].end_token <= entries[0].end_token
        runs.append(Run(entries, sizes, timing))
        if not behind or len(state.groups) > 1:
            waiting.sort()
        self._grow(waiting, sum(sizes))

    def take(self, most: int) -> tuple[RequestState, Sequence[Entry], Timing]:
        """The next job, of at most so many pages that were asked for together."""
        turn = next(iter(self._waiting))
        self._waiting[turn] = self._waiting.pop(turn)  # as the last one
        own = self._waiting[turn]
        waiting = self._waiting.get(own.state.needs, own)
        entries, sizes, timing = waiting.runs.popleft()
        if len(entries) > most:
            waiting.runs.appendleft(Run(entries[most:], sizes[most:], timing))
            entries, sizes = entries[:most], sizes[:most]
        self._grow(waiting, -sum(sizes))
        if not waiting.runs:
            del self._waiting[waiting.state.view.req_id]
        return waiting.state, entries, timing

    def drop(self, drops: Callable[[RequestState], bool]) -> list[tuple[RequestState, Entry]]:
        """Take out all pages of the requests for which `drops` says so."""
        return self._drop([each for each in self._waiting.values() if drops(each.state)], None)

    def drop_pages(
        self, drops: Callable[[RequestState, Entry], bool]
    ) -> list[tuple[RequestState, Entry]]:
        """Take out the pages for which `drops` says so."""
        return self._drop(list(self._waiting.values()), drops)

    def _drop(
        self, chosen: Sequence[Waiting], drops: Callable[[RequestState, Entry], bool] | None
    ) -> list[tuple[RequestState, Entry]]:
        dropped = []
        for waiting in chosen:
            state, runs = waiting.state, waiting.runs
            waiting.runs = deque()
            for entries, sizes, timing in runs:
                stay = []
                for entry, nbytes in zip(entries, sizes, strict=True):
                    if drops is not None and not drops(state, entry):
                        stay.append((entry, nbytes))
                        continue
                    timing.drop(nbytes)
                    self._grow(waiting, -nbytes)
                    dropped.append((state, entry))
                if stay:
                    entries, sizes = zip(*stay, strict=True)
                    waiting.runs.append(Run(entries, sizes, timing))
            if not waiting.runs:
                del self._waiting[state.view.req_id]
        return dropped

    def _grow(self, waiting: Waiting, nbytes: int) -> None:
        waiting.nbytes += nbytes
        self._nbytes += nbytes
