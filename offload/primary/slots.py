"""Book-keeping of the primary tier: which slot has which page, and what holds it there.

No bytes are touched here. An `Entry` is one page in one slot. A slot goes back to the
free list only when its entry is no longer known by key AND nobody writes or holds it any
more, so that two owners can never write one slot.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from kvstrata.offload.metering.departures import Departures
from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.primary.eviction.policy import EvictionPolicy


class Writer(enum.Enum):
    """Who is filling a page that is not ready yet."""

    GPU = enum.auto()
    TIER = enum.auto()


_GPU, _TIER = Writer.GPU, Writer.TIER  # in Python 3.11 each `Writer.GPU` is a call

_BITS = 20  # a million holds for one reason: each is a request, a tier or an audit
_MOST = (1 << _BITS) - 1


class Hold:
    """Why a page must stay in its slot: numbers, of which each is one hold in `Entry.holds`."""

    KEPT = 1  # a request counts on it
    LOAD = 1 << _BITS  # it is copied to the GPU
    CASCADE = 1 << 2 * _BITS  # it is copied to a secondary tier
    PIN = 1 << 3 * _BITS  # a request asked for that
    AUDIT = 1 << 4 * _BITS  # it is compared


HOLDS = (Hold.KEPT, Hold.LOAD, Hold.CASCADE, Hold.PIN, Hold.AUDIT)
_KEPT = Hold.KEPT


class Awaited(msgspec.Struct, gc=False, eq=False):
    """Pages that were asked for together and are not ready: `since` when, and for how long they may
    be, in seconds, `req_id` for whom, and how many tiers are counted on to bring. `late`: nobody
    waits for them any more."""

    since: float
    deadline_s: float
    req_id: str = ""
    pages: int = 0
    late: bool = False


class Entry(msgspec.Struct, gc=False, eq=False):
    """One page in one slot.

    There are millions, and none is part of a cycle, so the garbage collector does not visit them.

    `end_token` is the chunk's end in the request that brought it, in tokens. `writer` is
    None once the page is ready. `holds` counts what holds it, for each `Hold` in bits of its own.
    `attached`: the key still leads here. `offered` has a bit for each secondary tier
    that need not be given the page: it has it or is getting it. `source`: name of the tier that it
    was promoted from. `awaited`: while it is not ready, since when it is, if anybody waited for the
    GPU to fill it, or a tier. `used`: when it got its slot, or was loaded last, in seconds.
    """

    key: bytes
    slot: int
    end_token: int
    writer: Writer | None
    holds: int = 0
    attached: bool = True
    offered: int = 0
    source: str | None = None
    awaited: Awaited | None = None
    used: float = 0.0

    @property
    def ready(self) -> bool:
        """The page is complete and may be read."""
        return self.writer is None

    @property
    def busy(self) -> bool:
        """Somebody writes the slot, or something holds it."""
        return bool(self.writer or self.holds)

    @property
    def gpu_busy(self) -> bool:
        """A GPU transfer reads or writes the slot."""
        return self.writer is _GPU or self.is_held(Hold.LOAD)

    def is_held(self, reason: int) -> bool:
        """Whether the page is held for this reason."""
        return self.holds & _MOST * reason > 0


class PrimaryTier:
    """The CPU pages by key.

    Args:
        slots: number of slots that can be used, at least 1; `add_slots` adds others.
        policy: order of eviction, empty.
        clock: seconds, monotonic.

    Attributes:
        held: slots held for each reason.
        promoting: slots that secondary tiers are filling, known by key or not.
        departures: what was evicted.
    """

    def __init__(
        self, slots: int, policy: EvictionPolicy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}: the primary tier needs at least one slot")
        self.slots = slots
        self._policy = policy
        self._entries: dict[bytes, Entry] = {}
        # The entry that a key leads to, ready or not. Called for every chunk, so not a method.
        self.get: Callable[[bytes], Entry | None] = self._entries.get
        self._free = list(range(slots - 1, -1, -1))
        self.promoting = 0
        self.held = dict.fromkeys(HOLDS, 0)
        self._clock = clock
        self.departures = Departures(clock)

    def find(self, keys: Iterable[bytes]) -> list[Entry]:
        """The entries that the keys lead to; keys that lead nowhere are left out."""
        return [entry for entry in map(self.get, keys) if entry is not None]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def add_slots(self, count: int) -> None:
        """So many more slots can be used: those that follow."""
        self._free.extend(range(self.slots, self.slots + count))
        self.slots += count

    @property
    def idle(self) -> int:
        """Pages that could be evicted now."""
        return self._policy.idle()

    @property
    def held_long(self) -> int:
        """Slots held by promotions, cascades and pins: by no transfer to or from the GPU."""
        return self.promoting + self.held[Hold.CASCADE] + self.held[Hold.PIN]

    def ask(self, pages: Mapping[bytes, int], use: Use) -> None:
        """A request asks for pages, for each the first time; their end tokens by key."""
        use.see(pages)
        self._policy.ask(pages, use)

    def ended(self, use: Use) -> None:
        """A request ended."""
        use.renew()
        self._policy.ended(use)

    def allocate(
        self, keys: Iterable[tuple[bytes, int]], writer: Writer, use: Use, *, must: bool
    ) -> tuple[list[Entry], list[bytes]]:
        """Take slots for new pages of a request, until there is none that may be taken.

        Args:
            keys: distinct keys of which none is present, each with its end token, in prefix order.
            writer: who will fill the pages.
            use: the request's.
            must: also for pages that are worth less than those that would leave for them.

        Returns:
            The entries of the first keys, and the keys evicted for them.
        """
        policy, free, known = self._policy, self._free, self._entries
        evicted: list[bytes] = []
        used: list[float] = []
        entries: list[Entry] = []
        now = self._clock()
        for key, end_token in keys:
            if not free:
                victim_key = policy.evict(key, end_token, use, must=must)
                if victim_key is None:
                    break
                evicted.append(victim_key)
                used.append(self._evicted(victim_key))
            known[key] = entry = Entry(key, free.pop(), end_token, writer, used=now)
            policy.insert(key, end_token, use)
            entries.append(entry)
        if writer is _TIER:
            self.promoting += len(entries)
        self.departures.came([entry.key for entry in entries])
        if evicted:
            self.departures.left(evicted, used)
        return entries, evicted

    def borrow(self, key: bytes, end_token: int, writer: Writer) -> tuple[Entry, list[bytes]]:
        """Take a slot for a page to which its key does not lead, and which leaves when it is idle.

        Returns:
            The entry, and the keys evicted for it.

        Raises:
            LookupError: no slot is free and no page is idle.
        """
        evicted: list[bytes] = []
        if not self._free:
            victim_key = self._policy.evict(key, end_token, Use(), must=True)
            if victim_key is None:
                raise LookupError("no idle page")
            evicted.append(victim_key)
            self.departures.left(evicted, [self._evicted(victim_key)])
        self.promoting += writer is _TIER
        return Entry(key, self._free.pop(), end_token, writer, attached=False), evicted

    def load(self, entries: Iterable[Entry]) -> None:
        """The GPU is about to read the pages: hold them until it has, and note their use."""
        now = self._clock()
        for entry in entries:
            entry.used = now
        self.hold(entries, Hold.LOAD)

    def drop(self, entry: Entry) -> None:
        """Forget a page that its key leads to; the slot comes free when nobody uses it."""
        self._policy.remove(entry.key)
        self._detach(entry)

    def finish_writes(self, entries: Iterable[Entry], *, good: bool, hold: int = 0) -> None:
        """The writers are done: the pages become ready, or are dropped if not `good`.

        `hold`: why those that become ready, and to which a key leads, are held from now on, if so.
        """
        unpin, mask, new, promoted = self._policy.unpin, _MOST * hold, 0, 0
        for entry in entries:
            if entry.writer is _TIER:
                promoted += 1
            entry.writer = entry.awaited = None
            if not entry.attached:
                if not entry.holds:
                    self._release(entry)
            elif not good:
                self._policy.remove(entry.key)
                self._detach(entry)
            elif hold:
                holds = entry.holds
                if not holds & mask:
                    new += 1
                entry.holds = holds + hold
            elif not entry.holds:
                unpin(entry.key)
        self.promoting -= promoted
        if hold:
            self.held[hold] += new

    def hold(self, entries: Iterable[Entry], reason: int) -> None:
        """Keep pages in their slots, also ones that are about to become ready."""
        pin, mask, new = self._policy.pin, _MOST * reason, 0
        for entry in entries:
            holds = entry.holds
            if not holds and entry.writer is None and entry.attached:
                pin(entry.key)
            new += not holds & mask
            entry.holds = holds + reason
        self.held[reason] += new

    def keep(self, entry: Entry) -> None:
        """`hold` a ready page for a request that counts on it; called for every hit."""
        holds = entry.holds
        if not holds and entry.attached:
            self._policy.pin(entry.key)
        if not holds & _MOST:
            self.held[_KEPT] += 1
        entry.holds = holds + _KEPT

    def let_go(self, entries: Iterable[Entry], reason: int) -> None:
        """Undo `hold`."""
        unpin, mask, last = self._policy.unpin, _MOST * reason, 0
        for entry in entries:
            holds = entry.holds = entry.holds - reason
            last += not holds & mask
            if holds or entry.writer is not None:
                continue
            if entry.attached:
                unpin(entry.key)
            else:
                self._release(entry)
        self.held[reason] -= last

    def reset(self) -> list[Entry]:
        """Forget all keys.

        Returns:
            The entries that GPU transfers still use. Their slots stay taken until
            `end_gpu` is called for them; those that tiers use come free when they end.
        """
        entries = list(self._entries.values())
        self._entries.clear()
        self._policy.clear()
        self.departures.forget()
        for entry in entries:
            entry.attached = False
            if not entry.busy:
                self._release(entry)
        return [entry for entry in entries if entry.gpu_busy]

    def end_gpu(self, entry: Entry) -> None:
        """No GPU transfer touches this forgotten entry any more."""
        loads = entry.holds & _MOST * Hold.LOAD
        entry.holds -= loads
        self.held[Hold.LOAD] -= loads > 0
        if entry.writer is _GPU:
            entry.writer = None
        if not entry.busy:
            self._release(entry)

    def _evicted(self, key: bytes) -> float:
        """Free the slot of a page; when that was used last."""
        victim = self._entries.pop(key)
        victim.attached = False
        self._free.append(victim.slot)
        return victim.used

    def _detach(self, entry: Entry) -> None:
        del self._entries[entry.key]
        entry.attached = False
        if not entry.busy:
            self._release(entry)

    def _release(self, entry: Entry) -> None:
        self._free.append(entry.slot)
