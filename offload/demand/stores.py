"""Stores: which of the pages that a request computed are stored, and where."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from kvstrata.offload.audit.audits import Audits
from kvstrata.offload.context import Context
from kvstrata.offload.demand.cascade import Cascades
from kvstrata.offload.demand.demand import Demand
from kvstrata.offload.primary.slots import Entry, Hold, Writer
from kvstrata.offload.request.request import RequestState

# So often in a row a request's stores wait for others' transfers: a step or two end them.
MOST_PUT_OFF = 2
_END_TOKEN = attrgetter("end_token")


class StorePlan(NamedTuple):
    """Where the GPU's pages go: `slots[i]` for `keys[i]`; `evicted` made room."""

    keys: list[bytes]
    slots: list[int]
    evicted: list[bytes]


@dataclass(slots=True, eq=False)
class Stores:
    """Takes slots for the GPU's pages, and what comes of them."""

    _context: Context
    _demand: Demand  # is told of what is stored
    _cascades: Cascades  # what they go through next
    _audits: Audits  # choose some
    _valid: Callable[[int], bool]  # slot -> whether the workers filled it completely

    def prepare(self, ends: dict[bytes, int], state: RequestState) -> StorePlan | None:
        """See `TieringManager.prepare_store`; `ends` are the end tokens by key."""
        self._context.waits.end(state)
        self._demand.ask(ends, state)
        primary, report = self._context.primary, self._context.report
        refused = self._audits.findings.refused
        present = [key for key in ends if primary.get(key) is not None]
        new = [key for key in ends if primary.get(key) is None] if present else list(ends)
        if refused:
            new = [key for key in new if key not in refused]
        wanted = self._context.reuse.wanted(new)
        report.counters["stores_skipped"] += len(new) - len(wanted)
        here = [entry for entry in primary.find(present) if entry.ready]
        primary.hold(here, Hold.KEPT)  # they stay
        taken = self._take(wanted, ends, state, len(here))
        primary.let_go(here, Hold.KEPT)
        if taken is None:
            report.counters["store_no_room"] += 1
            return None
        if here:  # vLLM found them in GPU memory
            self._demand.meet(here, state)
        entries, evicted = taken
        report.left(evicted)
        spare = self._audits.choose(ends, present, entries, state)
        if spare or self._context.several_groups:
            slots = {entry.key: entry for entry in (*entries, *spare)}
            entries = [slots[key] for key in ends if key in slots]
        if entries:
            state.open_stores += 1
        return StorePlan([e.key for e in entries], [e.slot for e in entries], evicted)

    def complete(self, keys: Collection[bytes], state: RequestState) -> None:
        """See `TieringManager.complete_store`."""
        valid, primary, report = self._valid, self._context.primary, self._context.report
        keys = self._audits.computed(keys, state.view.req_id, valid)
        stored = sorted(
            primary.find(keys), key=_place if self._context.several_groups else _END_TOKEN
        )
        if bad := [entry for entry in stored if not valid(entry.slot)]:
            stored = [entry for entry in stored if entry not in bad]
            report.given_up([entry.key for entry in bad])
            primary.finish_writes(bad, good=False)
            report.counters["incomplete_pages"] += len(bad)
        if stored:
            report.counters["stored_pages"] += len(stored)
            report.came([entry.key for entry in stored])
            # Held by the tiers before they become idle, they are not pinned twice.
            self._demand.meet(stored, state)
            primary.finish_writes(stored, good=True)
        self._audits.stored(keys, state.view)
        state.open_stores -= 1

    def _take(
        self, wanted: list[bytes], ends: dict[bytes, int], state: RequestState, staying: int
    ) -> tuple[list[Entry], list[bytes]] | None:
        """Slots for the first of the wanted pages, and what was evicted; None: no room now.

        `staying`: so many pages that are here are held meanwhile.
        """
        if self._context.several_groups:
            wanted.sort(key=ends.__getitem__)
        if state.stored_until is not None:
            if wanted and ends[wanted[0]] <= state.stored_until:
                state.stored_until = None
            else:  # without what comes before them they are worth nothing
                return [], []
        if self._is_put_off(len(wanted), staying, state):
            return None
        entries, evicted = self._context.primary.allocate(
            [(key, ends[key]) for key in wanted],
            Writer.GPU,
            state.use,
            must=self._cascades.wanted(state),
        )
        if len(entries) < len(wanted):
            if not (entries or self._context.primary.idle):
                return None
            state.stored_until = ends[wanted[len(entries)]]
            self._context.report.counters["stores_declined"] += len(wanted) - len(entries)
        return entries, evicted

    def _is_put_off(self, pages: int, staying: int, state: RequestState) -> bool:
        """Whether vLLM shall offer so many pages again in its next step, with those of that step:
        transfers to and from the GPU hold the slots, and end soon."""
        primary = self._context.primary
        missing = pages - primary.free - primary.idle
        soon = primary.slots - primary.free - primary.idle - primary.held_long - staying
        if not 0 < missing <= soon or state.put_off >= MOST_PUT_OFF:
            state.put_off = 0
            return False
        state.put_off += 1
        return True


def _place(entry: Entry) -> tuple[int, bytes]:
    return entry.end_token, entry.key[-4:]
