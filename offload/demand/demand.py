"""Demand: what requests ask for, and what of it they load; hits and misses are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvstrata.offload.context import Context
from kvstrata.offload.demand.cascade import Cascades
from kvstrata.offload.primary.slots import Entry, Hold
from kvstrata.offload.request.request import RequestState
from kvstrata.tiers.base import RequestView, key_group


@dataclass(slots=True, eq=False)
class Demand:
    """Tells the tiers who asks for which pages, and brings them to the GPU."""

    _context: Context
    _cascades: Cascades
    # By request: pages of its load to which their keys led no more when it began
    _late: dict[str, dict[bytes, Entry]] = field(default_factory=dict)

    def ask(self, ends: Mapping[bytes, int], state: RequestState) -> None:
        """A request asks for pages, perhaps once more; their end tokens by key."""
        use = state.use
        use.renew()
        seen = use.seen
        pages = {key: end for key, end in ends.items() if key not in seen} if seen else dict(ends)
        if pages:
            self._context.primary.ask(pages, use)
        if state.coming:
            came = {key: end for key, end in ends.items() if key in state.coming}
            state.coming -= came.keys()
            pages |= came
        if pages:
            self._context.reuse.count(pages)
            for link in self._context.jobs.links:
                link.asked.count(pages)

    def meet(self, entries: Sequence[Entry], state: RequestState) -> None:
        """A request has, or is about to have, ready pages: tiers that lack them may want them now,
        and it may want to keep them."""
        self._cascades.give(entries, state)
        if state.parameters.pin_seconds > 0.0:
            refused = self._context.holds.pin(entries, state.parameters.pin_seconds)
            self._context.report.counters["pins_refused"] += refused

    def touch_tiers(self, keys: Collection[bytes], request: RequestView) -> None:
        """Tell the tiers that the pages, in prefix order, were used."""
        for link in self._context.jobs.links if keys else ():
            if link.breaker.closed:
                link.tier.touch(keys, request)

    def load(self, keys: Sequence[bytes], state: RequestState) -> list[int]:
        """See `TieringManager.prepare_load`."""
        name, primary, holds = state.view.req_id, self._context.primary, self._context.holds
        here = entries = primary.find(keys)
        ready = len(entries) == len(keys) and not any([entry.writer for entry in entries])
        if not ready or name in holds.outlived:
            held = holds.of(name)
            for key in keys:
                if key not in held:
                    raise KeyError(f"page {key.hex()} is not ready to be loaded")
            entries = [held[key] for key in keys]
            # What is not here any more may be of earlier weights
            here = [entry for entry in entries if entry.attached]
            self._late[name] = {entry.key: entry for entry in entries if not entry.attached}
        self._context.waits.load(state)
        primary.load(entries)
        holds.loads(name)
        ends = {entry.key: entry.end_token for entry in entries}
        self.ask(ends, state)
        self._context.found.loaded(ends, state.sources)
        self._count_hits(entries, state)
        self.meet(here, state)
        return [entry.slot for entry in entries]

    def loaded(self, keys: Collection[bytes], req_id: str | None) -> None:
        """See `TieringManager.complete_load`."""
        late = self._late.pop(req_id, None) if req_id is not None else None
        primary = self._context.primary
        entries = primary.find([key for key in keys if key not in late] if late else keys)
        if late:
            entries += late.values()
        assert len(entries) == len(keys), "a page held by prepare_load cannot leave"
        primary.let_go(entries, Hold.LOAD)

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
        if group not in self._context.windows:  # of those it looks for the end only
            last = next(reversed(ends.values()), end_token)
            pages = max(0, last - end_token) // self._context.layouts[group].tokens + 1
            state.missing = step, end_token, pages

    def computes(self, state: RequestState, until: int) -> int:
        """Tokens of its prompt that a request computes up to there, having looked them up in vain;
        0 if that is not known."""
        _, end_token, pages = state.missing
        return max(0, until - end_token + self._context.found.chunk_tokens) if pages else 0

    def count_misses(self, state: RequestState) -> None:
        """The request computes what it looked up in vain."""
        if missing := state.missing[2]:
            self._context.report.counters["misses"] += missing
            self._context.found.missed(missing)
        state.missing = (-1, 0, 0)

    def _count_hits(self, entries: Sequence[Entry], state: RequestState) -> None:
        """The request loads pages; what lies behind them, and was looked up in vain, it computes.

        Each page is one hit, in the tier where it was found.
        """
        counters = self._context.report.counters
        counters["loaded_pages"] += len(entries)
        hits: dict[str | None, int] = {None: len(entries)}
        if state.sources:
            hits = Counter(state.sources.get(entry.key) for entry in entries)
        for name, pages in hits.items():
            counters["primary_hits" if name is None else f"promoted_hits:{name}"] += pages
        beyond = state.missing[1]
        if beyond > 0 and all(entry.end_token < beyond for entry in entries):
            self.count_misses(state)
        state.missing = (-1, 0, 0)
