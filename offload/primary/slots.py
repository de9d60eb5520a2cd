"""Book-keeping of the primary tier: which slot holds which page, and who is using it.

No bytes are touched here. An `Entry` is one page in one slot. A slot goes back to the
free list only when its entry is no longer known by key AND nobody reads or writes it any
more, so that two owners can never write one slot.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvstrata.offload.primary.eviction.line import Use
from kvstrata.offload.primary.eviction.policy import EvictionPolicy


class Writer(enum.Enum):
    """Who is filling a page that is not ready yet."""

    GPU = enum.auto()
    TIER = enum.auto()


_GPU, _TIER = Writer.GPU, Writer.TIER  # in Python 3.11 each `Writer.GPU` is a call


@dataclass(slots=True, eq=False)
class Entry:
    """One page in one slot.

    `end_token` is the chunk's end in the request that brought it, in tokens. `writer` is
    None once the page is ready. `gpu_reads` and `tier_reads` count the transfers out of
    the slot. `attached`: the key still leads here. `offered` has a bit for each secondary tier
    that need not be given the page: it has it or is getting it. `cascades`: how many are
    getting it. `source`: name of the tier that it was promoted from. `awaited_since`: when a
    request first waited for the GPU to fill it. `late`: nobody waits any more until it is ready.
    """

    key: bytes
    slot: int
    end_token: int
    writer: Writer | None
    gpu_reads: int = 0
    tier_reads: int = 0
    attached: bool = True
    offered: int = 0
    cascades: int = 0
    source: str | None = None
    awaited_since: float | None = None
    late: bool = False

    @property
    def ready(self) -> bool:
        """The page is complete and may be read."""
        return self.writer is None

    @property
    def busy(self) -> bool:
        """Somebody reads or writes the slot."""
        return bool(self.writer or self.gpu_reads or self.tier_reads)

    @property
    def gpu_busy(self) -> bool:
        """A GPU transfer reads or writes the slot."""
        return self.writer is _GPU or self.gpu_reads > 0


class PrimaryTier:
    """The CPU pages by key.

    Args:
        slots: number of slots that can be used, at least 1; `add_slots` adds others.
        policy: order of eviction, empty.
    """

    def __init__(self, slots: int, policy: EvictionPolicy) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}: the primary tier needs at least one slot")
        self.slots = slots
        self._policy = policy
        self._entries: dict[bytes, Entry] = {}
        # The entry that a key leads to, ready or not. Called for every chunk, so not a method.
        self.get: Callable[[bytes], Entry | None] = self._entries.get
        self._free = list(range(slots - 1, -1, -1))
        self._promoting = 0  # slots that tiers are filling, attached or not

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
    def promoting(self) -> int:
        """Slots that secondary tiers are filling."""
        return self._promoting

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
        entries: list[Entry] = []
        for key, end_token in keys:
            if not free:
                victim_key = policy.evict(key, end_token, use, must=must)
                if victim_key is None:
                    break
                self._evicted(victim_key)
                evicted.append(victim_key)
            known[key] = entry = Entry(key, free.pop(), end_token, writer)
            policy.insert(key, end_token, use)
            entries.append(entry)
        if writer is _TIER:
            self._promoting += len(entries)
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
            self._evicted(victim_key)
            evicted.append(victim_key)
        self._promoting += writer is _TIER
        return Entry(key, self._free.pop(), end_token, writer, attached=False), evicted

    def drop(self, entry: Entry) -> None:
        """Forget a page that its key leads to; the slot comes free when nobody uses it."""
        self._policy.remove(entry.key)
        self._detach(entry)

    def finish_writes(self, entries: Iterable[Entry], *, good: bool) -> None:
        """The writers are done: the pages become ready, or are dropped if not `good`."""
        unpin = self._policy.unpin
        for entry in entries:
            if entry.writer is _TIER:
                self._promoting -= 1
            entry.writer = None
            if not entry.attached:
                if not entry.busy:
                    self._release(entry)
            elif not good:
                self._policy.remove(entry.key)
                self._detach(entry)
            elif not (entry.gpu_reads or entry.tier_reads):
                unpin(entry.key)

    def begin_reads(self, entries: Iterable[Entry], *, gpu: bool) -> None:
        """Hold pages while they are copied to the GPU or to a secondary tier.

        Those copied to a secondary tier may be held just before they become ready.
        """
        pin = self._policy.pin
        for entry in entries:
            if entry.attached and not (entry.writer or entry.gpu_reads or entry.tier_reads):
                pin(entry.key)
            if gpu:
                entry.gpu_reads += 1
            else:
                entry.tier_reads += 1

    def hold(self, entry: Entry) -> None:
        """`begin_reads` of one page, not for the GPU."""
        if entry.attached and not (entry.writer or entry.gpu_reads or entry.tier_reads):
            self._policy.pin(entry.key)
        entry.tier_reads += 1

    def end_reads(self, entries: Iterable[Entry], *, gpu: bool) -> None:
        """Let go of pages held by `begin_reads`."""
        unpin = self._policy.unpin
        for entry in entries:
            if gpu:
                entry.gpu_reads -= 1
            else:
                entry.tier_reads -= 1
            if entry.writer or entry.gpu_reads or entry.tier_reads:  # busy, without the call
                continue
            if entry.attached:
                unpin(entry.key)
            else:
                self._release(entry)

    def reset(self) -> list[Entry]:
        """Forget all keys.

        Returns:
            The entries that GPU transfers still use. Their slots stay taken until
            `end_gpu` is called for them; those that tiers use come free when they end.
        """
        entries = list(self._entries.values())
        self._entries.clear()
        self._policy.clear()
        for entry in entries:
            entry.attached = False
            if not entry.busy:
                self._release(entry)
        return [entry for entry in entries if entry.gpu_busy]

    def end_gpu(self, entry: Entry) -> None:
        """No GPU transfer touches this forgotten entry any more."""
        entry.gpu_reads = 0
        if entry.writer is _GPU:
            entry.writer = None
        if not entry.busy:
            self._release(entry)

    def _evicted(self, key: bytes) -> None:
        victim = self._entries.pop(key)
        victim.attached = False
        self._free.append(victim.slot)

    def _detach(self, entry: Entry) -> None:
        del self._entries[entry.key]
        entry.attached = False
        if not entry.busy:
            self._release(entry)

    def _release(self, entry: Entry) -> None:
        self._free.append(entry.slot)
