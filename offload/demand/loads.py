"""Loads: pages of the primary tier go to the GPU; hits and misses are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvstrata.offload.demand.demand import Demand
from kvstrata.offload.events import Report
from kvstrata.offload.primary.holds import Holds
from kvstrata.offload.primary.slots import Entry, Hold, PrimaryTier
from kvstrata.offload.request.request import RequestState
from kvstrata.tiers.base import PageLayout, key_group


@dataclass(slots=True, eq=False)
class Loads:
    """The loads under way, and what was hit."""

    _primary: PrimaryTier
    _holds: Holds  # has what requests were answered
    _demand: Demand  # is told of what is loaded
    _layouts: Mapping[int, PageLayout]  # by group
    _windows: Mapping[int, int]  # groups of which the end is looked for only
    _report: Report
    # By request: pages of its load to which their keys led no more when it began
    _late: dict[str, dict[bytes, Entry]] = field(default_factory=dict)

    def prepare(self, keys: Sequence[bytes], state: RequestState) -> list[int]:
        """See `TieringManager.prepare_load`."""
        name = state.view.req_id
        held = self._holds.of(name) if name in self._holds.outlived else None
        entries = []
        for key in keys:
            entry = self._primary.get(key)
            if held is not None or entry is None or entry.writer is not None:
                if held is None:
                    held = self._holds.of(name)
                entry = held.get(key)
                if entry is None:
                    raise KeyError(f"page {key.hex()} is not ready to be loaded")
            entries.append(entry)
        state.waits = False
        self._primary.hold(entries, Hold.LOAD)
        self._holds.loads(name)
        self._demand.ask({entry.key: entry.end_token for entry in entries}, state)
        self._count_hits(entries, state)
        here = entries
        if held is not None:  # what is not here any more may be of earlier weights
            here = [entry for entry in entries if entry.attached]
            self._late[name] = {entry.key: entry for entry in entries if not entry.attached}
        self._demand.meet(here, state)
        return [entry.slot for entry in entries]

    def complete(self, keys: Collection[bytes], req_id: str | None) -> None:
        """See `TieringManager.complete_load`."""
        late = self._late.pop(req_id, None) if req_id is not None else None
        entries = self._primary.find(keys if late is None else [k for k in keys if k not in late])
        if late is not None:
            entries += late.values()
        assert len(entries) == len(keys), "a page held by prepare_load cannot leave"
        self._primary.let_go(entries, Hold.LOAD)

    def reset(self) -> list[Entry]:
        """Forget the loads; their pages to which no key leads."""
        late = dict.fromkeys(entry for late in self._late.values() for entry in late.values())
        self._late.clear()
        return list(late)

    def missed(
        self, key: bytes, end_token: int, ends: dict[bytes, int], state: RequestState, step: int
    ) -> None:
        """See `TieringManager.missed`."""
        missing = state.missing
        if missing[0] == step and missing[1] <= end_token:
            return
        group = key_group(key)
        if group not in self._windows:  # of those it looks for the end only
            last = next(reversed(ends.values()), end_token)
            pages = max(0, last - end_token) // self._layouts[group].tokens + 1
            state.missing = step, end_token, pages

    def count_misses(self, state: RequestState) -> None:
        """The request computes what it looked up in vain."""
        self._report.counters["misses"] += state.missing[2]
        state.missing = (-1, 0, 0)

    def _count_hits(self, entries: Sequence[Entry], state: RequestState) -> None:
        """The request loads pages; what lies behind them, and was looked up in vain, it computes.

        Each page is one hit, in the tier where it was found.
        """
        counters = self._report.counters
        counters["loaded_pages"] += len(entries)
        hits: dict[str | None, int] = {None: len(entries)}
        if state.sources:
            hits = Counter(state.sources.get(entry.key) for entry in entries)
        for name, pages in hits.items():
            counters["primary_hits" if name is None else f"promoted_hits:{name}"] += pages
        if state.missing[1] > max((entry.end_token for entry in entries), default=0):
            self.count_misses(state)
        state.missing = (-1, 0, 0)
