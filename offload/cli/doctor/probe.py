"""Pages that a tier is tried with: stored by one of it, and found and loaded by another."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from kvstrata.offload.cli.doctor.ground import PROBE_KEYS, Ground, namespace_of
from kvstrata.offload.cli.doctor.machine import OK, PROBLEM, WARNING, Check
from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageKey,
    PageLayout,
    PageRegion,
    RequestView,
    SecondaryTier,
    TensorSpec,
    TierContext,
    layouts_to_json,
)
from kvstrata.tiers.options import TierConfigError, format_bytes
from kvstrata.tiers.page.form import ALIGNMENT

_PAGE_BYTES = 2**21
_BURST = len(PROBE_KEYS) - 1  # pages that are moved at once, for the speed
_WITHIN_S = 120.0  # tiers have deadlines of their own
_TOLD_WITHIN_S = 2.0  # I/O processes tell of evictions some time after them
_POLL_S = 0.0002
_REQUEST = RequestView("doctor")
_NO_ROOM = ("budget", "no-space")  # causes of pages that were not stored
_BETWEEN_ENGINES = "its pages come from other engines, which requests name: there is none here"


def probe_context() -> TierContext:
    """A model that is none: its namespace lacks the fields of engines, and has one of its own."""
    layouts = {0: PageLayout((TensorSpec("kv", "U8", (1, _PAGE_BYTES)),), tokens=16)}
    fields = {"kvstrata doctor": secrets.token_hex(16), "pages": layouts_to_json(layouts)}
    return TierContext("kvstrata-doctor", fields, layouts)


class _Memory:
    """Pages in shared memory, as an engine has them."""

    def __init__(self, tail_bytes: int) -> None:
        slot_bytes = -(-(_PAGE_BYTES + tail_bytes) // ALIGNMENT) * ALIGNMENT
        self.fd = os.memfd_create("kvstrata-doctor")
        os.ftruncate(self.fd, (1 + _BURST) * slot_bytes)
        self.region = PageRegion(self.fd, 0, slot_bytes, 1 + _BURST)
        self.map = mmap.mmap(self.fd, 0)

    def view(self, key: PageKey, slot: int) -> memoryview:
        start = slot * self.region.slot_bytes
        return memoryview(self.map)[start : start + _PAGE_BYTES]


class _Failed(Exception):
    """A step did not do what it is for; the text says what happened."""


class Probe:
    """Tries one tier, opened twice as two engines would.

    Args:
        cls: the tier's class.
        ground: where the probe lies.
        context: what `probe_context` made.
    """

    def __init__(self, cls: type[SecondaryTier], ground: Ground, context: TierContext) -> None:
        self._cls, self._ground = cls, ground
        self._memory = _Memory(cls.tail_bytes)
        self._context = TierContext(
            context.model, context.namespace, context.layouts, self._memory.region
        )
        self._first, self._burst = PROBE_KEYS[:1], PROBE_KEYS[1:]
        self._data = [os.urandom(_PAGE_BYTES) for _ in range(1 + _BURST)]
        self._jobs = 0
        self._said: list[str] = []

    def checks(self) -> Iterator[Check]:
        """One step after the other, until one fails; the tier is shut down in any case."""
        name, opened = "connect", list[SecondaryTier]()
        handler = _Listener(self._said)
        logger = logging.getLogger("kvstrata")
        logger.addHandler(handler)
        try:
            started = time.monotonic()
            opened.append(self._open())
            yield Check("connect", OK, _seconds(time.monotonic() - started))
            if opened[0].serves:
                yield Check("store", WARNING, "not tried", _BETWEEN_ENGINES)
                return
            name = "store"
            yield self._store(opened[0])
            opened.append(self._open())
            name = "look up"
            check = self._look_up(opened)
            yield check
            name = "load"
            # a tier that keeps pages in its process alone loads what it stored itself
            yield self._load(opened[1 if check.status == OK else 0])
            name = "list"
            yield from self._list()
            if not self._ground.removed:
                name = "delete"
                yield self._reject(opened[0])
        except (TierConfigError, _Failed) as error:
            detail = f" ({'; '.join(self._said)})" if self._said else ""
            yield Check(name, PROBLEM, "failed", f"{error}{detail}")
        finally:
            logger.removeHandler(handler)
            for tier in opened:
                tier.shutdown(_WITHIN_S)
            os.close(self._memory.fd)

    def _open(self) -> SecondaryTier:
        return self._cls(self._ground.options, self._context)

    def _store(self, tier: SecondaryTier) -> Check:
        for slot, data in enumerate(self._data):
            self._memory.view(b"", slot)[:] = data
        return self._timed("store", tier, tier.submit_store)

    def _look_up(self, opened: Sequence[SecondaryTier]) -> Check:
        tier, started, slowest = opened[1], time.monotonic(), 0.0
        for key in (*self._first, *self._burst):
            while (found := tier.lookup(key, _REQUEST)) is Lookup.RETRY:
                if time.monotonic() - started > _WITHIN_S:
                    raise _Failed("no answer")
                tier.on_step_end()
                time.sleep(_POLL_S)
            slowest = slowest or time.monotonic() - started
            if found is Lookup.MISS:
                why = _no_room(opened)
                if not why and self._cls.medium == "CPU":
                    meaning = "no other engine finds what is stored"
                    return Check("look up", WARNING, "missing", meaning)
                raise _Failed(why or "another engine does not find what was stored")
        return Check("look up", OK, _seconds(slowest), "another engine finds what was stored")

    def _load(self, tier: SecondaryTier) -> Check:
        for slot in range(1 + _BURST):
            self._memory.view(b"", slot)[:] = bytes(_PAGE_BYTES)
        check = self._timed("load", tier, tier.submit_load)
        if any(self._memory.view(b"", slot) != data for slot, data in enumerate(self._data)):
            raise _Failed("a page came back with other bytes")
        return check

    def _list(self) -> Iterator[Check]:
        wrong: list[tuple[str, str]] = []
        places, name = self._ground.places, namespace_of(self._context)
        found = sum(
            1 for place in places for _ in place.keys(name, None, lambda *each: wrong.append(each))
        )
        if places and (found != len(PROBE_KEYS) or wrong):
            strange = "".join(f"; {where}: {what}" for where, what in wrong)
            raise _Failed(f"{found} of {len(PROBE_KEYS)} pages are listed{strange}")
        if places:
            yield Check("list", OK, f"{found} pages")

    def _reject(self, tier: SecondaryTier) -> Check:
        """The only way in which every tier can be asked to let a page go."""
        for slot, key in enumerate((*self._first, *self._burst)):
            if not tier.submit_reject(self._job([key], slot), distrust=False):
                size = format_bytes((1 + _BURST) * _PAGE_BYTES)
                why = (
                    f"the tier cannot: {size} of pages that nobody reads stay until it evicts them"
                )
                return Check("delete", WARNING, "not done", why)
            self._finish(tier)
        return Check("delete", OK, "rejected", "what the tier does with pages that it rejects")

    def _timed(self, name: str, tier: SecondaryTier, submit: Callable[[Job], None]) -> Check:
        latency = self._move(tier, submit, self._first, 0)
        seconds = self._move(tier, submit, self._burst, 1)
        speed = _BURST * _PAGE_BYTES / seconds / 1e9
        size = format_bytes(_PAGE_BYTES)
        return Check(name, OK, f"{speed:.3g} GB/s", f"a page of {size} takes {_seconds(latency)}")

    def _move(
        self,
        tier: SecondaryTier,
        submit: Callable[[Job], None],
        keys: Sequence[PageKey],
        first: int,
    ) -> float:
        """How long it took in seconds."""
        started = time.monotonic()
        submit(self._job(keys, first))
        result = self._finish(tier)
        seconds = time.monotonic() - started
        if result.failed:
            causes = ", ".join(sorted(set(result.failed.values())))
            raise _Failed(f"{len(result.failed)} of {len(keys)} pages: {causes}")
        return seconds

    def _job(self, keys: Sequence[PageKey], first: int) -> Job:
        self._jobs += 1
        slots = range(first, first + len(keys))
        return Job(self._jobs, keys, slots, [0] * len(keys), _REQUEST, self._memory.view)

    def _finish(self, tier: SecondaryTier) -> JobResult:
        deadline = time.monotonic() + _WITHIN_S
        while time.monotonic() < deadline:
            tier.on_step_end()
            for result in tier.get_finished():
                return result
            time.sleep(_POLL_S)
        raise _Failed(f"no result within {_WITHIN_S:.0f} s")


def _no_room(opened: Sequence[SecondaryTier]) -> str:
    """What the tiers tell of pages that they had no room for, soon after; else nothing."""
    told, deadline = Counter[str](), time.monotonic() + _TOLD_WITHIN_S
    while not told and time.monotonic() < deadline:
        for tier in opened:
            tier.on_step_end()
            stats = tier.stats()
            told["pages evicted again"] += stats.counters.get("evicted_pages", 0)
            for cause in _NO_ROOM:
                told[cause] += stats.failures.get(cause, 0)
        told = +told  # without those that are 0
        time.sleep(_POLL_S)
    said = ", ".join(f"{cause}: {number}" for cause, number in told.items())
    return f"no room: {said}; free some, or raise the limits of the tier" if said else ""


class _Listener(logging.Handler):
    """Keeps what the tier warns of, in place of stderr."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
