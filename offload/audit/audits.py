"""Audits: pages that the engine computed although a tier holds them are compared with the tier's.

Whatever a namespace leaves out, and whatever goes wrong between a GPU and a disk, shows here: a
page that would have been served is not what the model computes. Most audits cost next to nothing,
since servers that share a directory, and heads that were evicted, make vLLM compute what is stored;
where too few come of themselves, the last page of a hit prefix is answered MISS (see `Probe`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from kvstrata.offload.audit.comparer import Compared, Comparer
from kvstrata.offload.audit.findings import Findings
from kvstrata.offload.audit.probe import Probe
from kvstrata.offload.audit.schedule import MOST_AT_ONCE, Schedule
from kvstrata.offload.context import Report
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.primary.slots import Entry, Hold, PrimaryTier, Writer
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running, TierJobs
from kvstrata.tiers.base import JobResult, Lookup, PageKey, PageLayout, RequestView, key_group

# A spare slot is taken only while so many others could be had: requests come first.
_LEAST_FREE = 2 * MOST_AT_ONCE
_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Audit:
    """One page that is computed and compared."""

    key: PageKey
    forced: bool  # the engine would not have computed it of itself
    computed: Entry  # where the GPU's page goes: a spare slot, or the page's own
    # Where the page is that would have been served: its own slot, or a spare one; None until the
    # tier is asked for it
    served: Entry | None
    link: TierLink | None  # that it is from; None: the primary tier, where the GPU had stored it
    dropped: bool = False  # a reset came in between: the slots are given back, nothing is compared


@dataclass(slots=True, eq=False)
class Audits:
    """Chooses pages and has them compared; `findings` draws the consequences."""

    _schedule: Schedule  # says when
    _primary: PrimaryTier
    _jobs: TierJobs
    _comparer: Comparer
    _layouts: Mapping[int, PageLayout]  # by group
    _view: Callable[[int, int], memoryview]  # (slot, bytes) -> the beginning of the slot
    _report: Report
    findings: Findings = field(init=False)
    intervenes: bool = False  # some look-ups are not answered as usual
    _probing: RequestState | None = None
    _probe: Probe = field(default_factory=Probe)
    # By request and key, until it is stored
    _open: dict[tuple[str, PageKey], Audit] = field(default_factory=dict)
    _under_way: set[Audit] = field(default_factory=set)
    _comparing: deque[tuple[Audit, Future[Compared]]] = field(default_factory=deque)  # in order

    def __post_init__(self) -> None:
        self.findings = Findings(self._primary, self._jobs, self._report)

    @property
    def comparing(self) -> bool:
        """Whether the result of a comparison is to be taken some time soon."""
        return bool(self._comparing)

    # -- look-up and load ---------------------------------------------------------

    def begin(self, state: RequestState) -> None:
        """A request arrived: its last hit may be computed again. One group of full attention is
        needed for that, see `Probe`; of other models only what comes of itself is audited."""
        if self._probing is None and len(self._layouts) == 1:
            (layout,) = self._layouts.values()
            if self._schedule.is_due(layout.tokens) and self._has_room():
                self._probing, self._probe = state, Probe()
                self._note_intervention()

    def end(self, state: RequestState) -> None:
        """No more look-ups come from the request."""
        if self._probing is state:
            self._probing = None
            self._note_intervention()

    def answer(
        self, key: PageKey, end_token: int, state: RequestState, natural: Answer, step: int
    ) -> Answer:
        """What to tell vLLM of a page, in place of the `natural` answer in this step."""
        if state is not self._probing:
            return natural
        probe = self._probe
        answer = probe.answer(key, natural, step)
        if key == probe.target:
            if not probe.withheld:
                probe.withheld = True
                self._schedule.forced(self._layouts[key_group(key)].tokens)
                self._report.counters["audits_forced"] += 1
            state.missed(end_token, step)
        return answer

    def served(self, pages: int) -> None:
        """A request loads so many pages."""
        self._schedule.served(pages)

    # -- store --------------------------------------------------------------------

    def choose(
        self,
        ends: Mapping[PageKey, int],
        present: Sequence[PageKey],
        new: Sequence[Entry],
        state: RequestState,
    ) -> list[Entry]:
        """Choose among the pages that a request offers those to audit.

        Args:
            ends: end token of each page.
            present: those that the primary tier holds.
            new: those for which it took a slot just now.
            state: of the request.

        Returns:
            Spare slots into which pages that are present are to be stored all the same.
        """
        schedule = self._schedule
        if not schedule.on:
            return []
        if new:
            schedule.computed(len(new) * self._layouts[key_group(new[0].key)].tokens)
        # Pages before the first miss came from GPU memory, perhaps loaded: they prove nothing.
        first = state.missed_from
        room = MOST_AT_ONCE - len(self._under_way)
        if first is None or room <= 0 or not schedule.has_time():
            return []
        name = state.view.req_id
        again = [k for k in present if ends[k] >= first and (name, k) not in self._open]
        spare = [self._again(key, state) for key in _some(again, room)]
        fresh = [e for e in new if e.end_token >= first and (name, e.key) not in self._open]
        if fresh and not spare and schedule.may_ask():
            found = [self._fresh(entry, state) for entry in _some(fresh, room)]
            if not any(found):
                schedule.found_none()
        return [entry for entry in spare if entry is not None]

    def computed(
        self, keys: Collection[PageKey], req_id: str, valid: Callable[[int], bool]
    ) -> Collection[PageKey]:
        """The GPU's pages have arrived: compare those in spare slots; the keys of the others."""
        if not self._open:
            return keys
        others = []
        for key in keys:
            audit = self._open.get((req_id, key))
            if audit is None or audit.served is None:
                others.append(key)
                continue
            del self._open[req_id, key]
            good = valid(audit.computed.slot)
            self._primary.hold((audit.computed,), Hold.AUDIT)
            self._primary.finish_writes((audit.computed,), good=True)
            if good:
                self._compare(audit, audit.served)
            else:
                self._end(audit)
        return others

    def stored(self, keys: Iterable[PageKey], request: RequestView) -> None:
        """New pages of one plan are ready, or were discarded: ask the tiers for theirs."""
        if not self._open:
            return
        for key in keys:
            audit = self._open.pop((request.req_id, key), None)
            if audit is None:
                continue
            entry, link = audit.computed, audit.link
            if link is None or not self._may_load(link) or not (entry.attached and entry.ready):
                self._under_way.discard(audit)
                continue
            self._primary.hold((entry,), Hold.AUDIT)  # the spare slot must not be its own
            audit.served = spare = self._borrow(key, entry.end_token, Writer.TIER)
            if spare is None:
                self._end(audit)
                continue
            end = partial(self._arrived, audit, spare)
            self._jobs.submit(link, [spare], request, promotion=True, on_end=end)

    # -- steps and resets ---------------------------------------------------------

    def settle(self) -> None:
        """Take what the comparisons found."""
        if not self._comparing:
            return
        while self._comparing and self._comparing[0][1].done():
            audit, future = self._comparing.popleft()
            comparison, seconds = future.result()
            self._schedule.ended(seconds, forced=audit.forced)
            if comparison is not None and not audit.dropped:
                self.findings.judge(audit.key, audit.computed, audit.link, comparison)
            self._end(audit)
        self._note_intervention()

    def end_step(self) -> None:
        """A step ended."""
        self.findings.end_step()
        self._note_intervention()

    def clear(self) -> list[Entry]:
        """A reset: drop all audits. The spare slots that the GPU may still be writing."""
        writing = []
        for audit in self._open.values():  # the GPU has not stored them yet
            self._under_way.discard(audit)
            if audit.served is not None:  # else the slot is the page's own
                self._primary.let_go((audit.served,), Hold.AUDIT)
                writing.append(audit.computed)
        self._open.clear()
        self.drop()
        self._probing = None
        self.findings.clear()
        self._note_intervention()
        return writing

    def drop(self) -> None:
        """The pages that are being compared say nothing of what the tiers hold from now on."""
        for audit in self._under_way:
            audit.dropped = True

    def stop(self, timeout_s: float) -> None:
        """Wait so long for the comparisons under way."""
        wait([future for _, future in self._comparing], timeout_s)

    # -- inside -------------------------------------------------------------------

    def _again(self, key: PageKey, state: RequestState) -> Entry | None:
        """A spare slot for a page that is present."""
        served = self._primary.get(key)
        if served is None or not served.ready:
            return None
        self._primary.hold((served,), Hold.AUDIT)
        spare = self._borrow(key, served.end_token, Writer.GPU)
        if spare is None:
            self._primary.let_go((served,), Hold.AUDIT)
            return None
        link = next((link for link in self._jobs.links if link.name == served.source), None)
        self._note(Audit(key, self._is_forced(key, state), spare, served, link), state)
        return spare

    def _fresh(self, entry: Entry, state: RequestState) -> bool:
        """Audit a new page if a tier holds it already."""
        for link in self._jobs.links:
            if self._may_load(link) and link.tier.lookup(entry.key, state.view) is Lookup.HIT:
                entry.offered |= link.bit  # the tier must not replace what is to be compared
                forced = self._is_forced(entry.key, state)
                self._note(Audit(entry.key, forced, entry, None, link), state)
                return True
        return False

    def _may_load(self, link: TierLink) -> bool:
        """Whether the tier is in service; one of before a reset may not be."""
        return link in self._jobs.links and link.breaker.closed and not link.trust.lost

    def _has_room(self) -> bool:
        """Whether one more page could be compared now."""
        enough = self._primary.free + self._primary.idle >= _LEAST_FREE
        return enough and len(self._under_way) < MOST_AT_ONCE and self._schedule.has_time()

    def _borrow(self, key: PageKey, end_token: int, writer: Writer) -> Entry | None:
        if self._primary.free + self._primary.idle < _LEAST_FREE:
            return None
        entry, evicted = self._primary.borrow(key, end_token, writer)
        self._report.left(evicted)
        return entry

    def _is_forced(self, key: PageKey, state: RequestState) -> bool:
        return state is self._probing and key == self._probe.target

    def _note(self, audit: Audit, state: RequestState) -> None:
        self._open[state.view.req_id, audit.key] = audit
        self._under_way.add(audit)

    def _arrived(self, audit: Audit, served: Entry, job: Running, result: JobResult) -> None:
        """A tier's page is in a spare slot."""
        self._primary.hold((served,), Hold.AUDIT)
        self._primary.finish_writes((served,), good=True)
        if result.failed or audit.dropped:
            self._end(audit)
        else:
            self._compare(audit, served)

    def _compare(self, audit: Audit, served: Entry) -> None:
        group = key_group(audit.key)
        nbytes = self._layouts[group].nbytes
        views = [self._view(entry.slot, nbytes) for entry in (audit.computed, served)]
        self._comparing.append((audit, self._comparer.submit(group, *views)))

    def _end(self, audit: Audit) -> None:
        """Give both slots back."""
        self._under_way.discard(audit)
        held = [entry for entry in (audit.computed, audit.served) if entry is not None]
        self._primary.let_go(held, Hold.AUDIT)

    def _note_intervention(self) -> None:
        self.intervenes = self._probing is not None or self.findings.block_some


def _some(items: Sequence[_T], most: int) -> list[_T]:
    """At most so many of them, at random, in their order."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in sorted(random.sample(range(len(items)), most))]
