"""The primary tier's book-keeping against a model of plain sets."""

import gc
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.primary.eviction.policies import policy_class
from kvstrata.offload.primary.eviction.policy import LRU
from kvstrata.offload.primary.slots import HOLDS, Entry, Hold, PrimaryTier, Writer


def tier(slots: int) -> PrimaryTier:
    return PrimaryTier(slots, LRU(slots, {}))


def fill(primary: PrimaryTier, *keys: bytes) -> list[Entry]:
    """Store the keys, complete, each for a request of its own."""
    entries = []
    for key in keys:
        entries += take(primary, key)
    primary.finish_writes(entries, good=True)
    return entries


def take(primary: PrimaryTier, *keys: bytes, writer: Writer = Writer.GPU) -> list[Entry]:
    """Slots for the pages of one request."""
    return primary.allocate([(key, 32) for key in keys], writer, Use(), must=False)[0]


@pytest.mark.parametrize("slots", [0, -1])
def test_no_slots(slots: int) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        PrimaryTier(slots, LRU(1, {}))


def test_slots_that_come_later() -> None:
    primary = tier(2)
    fill(primary, b"a", b"b")
    primary.add_slots(3)
    assert (primary.slots, primary.free) == (5, 3)
    pages = [(b"x", 32), (b"y", 64), (b"z", 96)]
    assert primary.allocate(pages, Writer.GPU, Use(), must=False)[1] == []
    assert {entry.slot for entry in primary} == {0, 1, 2, 3, 4}


def test_a_page_being_written_is_not_ready() -> None:
    primary = tier(2)
    (entry,), evicted = primary.allocate([(b"a", 32)], Writer.GPU, Use(), must=False)
    assert (entry.key, entry.end_token, entry.ready, entry.busy) == (b"a", 32, False, True)
    assert primary.get(b"a") is entry and evicted == [] and primary.free == 1
    primary.finish_writes((entry,), good=True)
    assert entry.ready and not entry.busy and primary.idle == 1


def test_as_many_of_the_first_as_there_is_room_for() -> None:
    primary = tier(3)
    fill(primary, b"a", b"b")
    busy = primary.get(b"a")
    assert busy is not None
    primary.hold((busy,), Hold.LOAD)
    pages = [(b"x", 32), (b"y", 64), (b"z", 96)]
    entries, evicted = primary.allocate(pages, Writer.GPU, Use(), must=True)
    assert [entry.key for entry in entries] == [b"x", b"y"] and evicted == [b"b"]


def test_a_request_does_not_give_up_its_beginning_for_its_end() -> None:
    primary, use = tier(2), Use()
    entries, _ = primary.allocate([(b"x", 32), (b"y", 64)], Writer.GPU, use, must=False)
    primary.finish_writes(entries, good=True)
    assert primary.allocate([(b"z", 96)], Writer.GPU, use, must=False) == ([], [])
    assert primary.allocate([(b"w", 16)], Writer.GPU, use, must=False)[1] == [b"y"]


def test_a_failed_write_frees_its_slot() -> None:
    primary = tier(1)
    (entry,) = take(primary, b"a", writer=Writer.TIER)
    assert primary.promoting == 1
    primary.finish_writes((entry,), good=False)
    assert primary.get(b"a") is None
    assert (primary.free, primary.idle, primary.promoting) == (1, 0, 0)


def test_a_forgotten_page_keeps_its_slot_until_its_transfer_ends() -> None:
    primary = tier(1)
    (entry,) = fill(primary, b"a")
    primary.hold((entry,), Hold.LOAD)
    primary.hold((entry,), Hold.CASCADE)
    assert primary.reset() == [entry]
    assert not take(primary, b"b")
    primary.end_gpu(entry)
    assert not take(primary, b"b"), "a tier still reads it"
    primary.let_go((entry,), Hold.CASCADE)
    assert take(primary, b"b")


@pytest.mark.parametrize("reason", HOLDS)
def test_slots_are_counted_by_what_holds_them(reason: int) -> None:
    primary = tier(2)
    one, two = fill(primary, b"a", b"b")
    primary.hold((one, two), reason)
    primary.hold((one,), reason)
    assert primary.held[reason] == 2 and one.is_held(reason)
    assert sum(primary.held.values()) == 2 and not any(
        one.is_held(r) for r in HOLDS if r is not reason
    )
    primary.let_go((one, two), reason)
    assert primary.held[reason] == 1 and one.is_held(reason) and primary.idle == 1
    primary.let_go((one,), reason)
    assert not any(primary.held.values()) and not one.is_held(reason) and primary.idle == 2


def test_pages_are_nothing_to_the_garbage_collector() -> None:
    """A full collection stops the engine, and there are millions of them."""
    primary = tier(2)
    (entry,) = fill(primary, b"a")
    primary.hold((entry,), Hold.LOAD)
    assert not gc.is_tracked(entry) and not gc.is_tracked(primary._entries)
    assert not gc.is_tracked(cast(LRU, primary._policy)._pages.home)


KEYS = [bytes([n]) for n in range(8)]


@dataclass
class Held:
    """What the model knows of one entry: who fills it, and what holds it."""

    entry: Entry
    writer: Writer | None
    holds: Counter[int] = field(default_factory=Counter)

    @property
    def busy(self) -> bool:
        return self.writer is not None or self.holds.total() > 0

    @property
    def gpu_busy(self) -> bool:
        return self.holds[Hold.LOAD] > 0 or self.writer is Writer.GPU


class PrimaryMachine(RuleBasedStateMachine):
    """`known`: key -> page. `orphans`: pages forgotten while in use."""

    policy = ""

    @initialize(slots=st.integers(1, 5))
    def start(self, slots: int) -> None:
        self.primary = PrimaryTier(slots, policy_class(self.policy)(slots, {}))
        self.slots = slots
        self.known: dict[bytes, Held] = {}
        self.orphans: list[Held] = []
        self.requests = [Use() for _ in range(3)]

    def uses(self) -> list[Held]:
        return [*self.known.values(), *self.orphans]

    def drop_idle_orphans(self) -> None:
        self.orphans = [use for use in self.orphans if use.busy]

    @rule(
        keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4),
        writer=st.sampled_from(Writer),
        request=st.integers(0, 2),
        must=st.booleans(),
    )
    def allocate(self, keys: list[bytes], writer: Writer, request: int, must: bool) -> None:
        new = sorted(key for key in keys if key not in self.known)
        evictable = {key for key, use in self.known.items() if not use.busy}
        free = self.slots - len(self.uses())
        use = self.requests[request]
        entries, evicted = self.primary.allocate(
            [(key, 10 * key[0]) for key in new], writer, use, must=must
        )
        most = min(len(new), free + len(evictable))
        assert len(entries) == most if must else len(entries) <= most
        new = new[: len(entries)]
        assert [entry.key for entry in entries] == new
        assert [entry.end_token for entry in entries] == [10 * key[0] for key in new]
        assert all(entry.writer is writer for entry in entries)
        assert set(evicted) <= evictable and len(set(evicted)) == len(evicted)
        assert len(evicted) == max(0, len(new) - free), "only as many as needed"
        for key in evicted:
            assert not self.known.pop(key).entry.attached
        for entry in entries:
            self.known[entry.key] = Held(entry, writer)

    @precondition(lambda self: any(use.writer for use in self.uses()))
    @rule(data=st.data(), good=st.booleans())
    def finish_write(self, data: st.DataObject, good: bool) -> None:
        # After a reset nobody reports the end of a GPU write: `end_gpu` stands for it.
        writing = [use for use in self.known.values() if use.writer]
        writing += [use for use in self.orphans if use.writer is Writer.TIER]
        if not writing:
            return
        use = data.draw(st.sampled_from(writing))
        self.primary.finish_writes((use.entry,), good=good)
        use.writer = None
        if use in self.orphans:
            self.orphans.remove(use)
        elif not good:
            del self.known[use.entry.key]

    @precondition(lambda self: any(not use.writer for use in self.known.values()))
    @rule(data=st.data(), reason=st.sampled_from(HOLDS))
    def hold(self, data: st.DataObject, reason: int) -> None:
        ready = [use for use in self.known.values() if not use.writer]
        use = data.draw(st.sampled_from(ready))
        self.primary.hold((use.entry,), reason)
        use.holds[reason] += 1

    @precondition(lambda self: any(use.holds.total() for use in self.uses()))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        held = [(use, reason) for use in self.uses() for reason in +use.holds]
        # After a reset nobody reports the end of a load: `end_gpu` stands for it.
        held = [
            (use, reason) for use, reason in held if reason != Hold.LOAD or use not in self.orphans
        ]
        if not held:
            return
        use, reason = data.draw(st.sampled_from(held))
        self.primary.let_go((use.entry,), reason)
        use.holds[reason] -= 1
        self.drop_idle_orphans()

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), request=st.integers(0, 2))
    def ask(self, keys: list[bytes], request: int) -> None:
        self.primary.ask({key: 10 * key[0] for key in keys}, self.requests[request])

    @rule(request=st.integers(0, 2))
    def end_request(self, request: int) -> None:
        self.primary.ended(self.requests[request])
        self.requests[request] = Use()

    @rule()
    def reset(self) -> None:
        held = self.primary.reset()
        in_gpu = [use for use in self.known.values() if use.gpu_busy]
        assert Counter(map(id, held)) == Counter(id(use.entry) for use in in_gpu)
        self.orphans += self.known.values()
        self.known.clear()
        self.drop_idle_orphans()

    @precondition(lambda self: any(use.gpu_busy for use in self.orphans))
    @rule(data=st.data())
    def end_gpu(self, data: st.DataObject) -> None:
        left = [use for use in self.orphans if use.gpu_busy]
        use = data.draw(st.sampled_from(left))
        self.primary.end_gpu(use.entry)
        use.holds[Hold.LOAD] = 0
        if use.writer is Writer.GPU:
            use.writer = None
        self.drop_idle_orphans()

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "primary"):
            return
        uses = self.uses()
        slots = [use.entry.slot for use in uses]
        assert len(set(slots)) == len(slots), "two live pages in one slot"
        assert all(0 <= slot < self.slots for slot in slots)
        assert self.primary.free == self.slots - len(slots)
        free = set(self.primary._free)
        assert len(free) == self.primary.free and not free & set(slots)
        assert self.primary.idle == sum(not use.busy for use in self.known.values())
        assert self.primary.promoting == sum(use.writer is Writer.TIER for use in uses)
        for reason in HOLDS:
            assert self.primary.held[reason] == sum(use.holds[reason] > 0 for use in uses)
        assert len(self.primary) == len(self.known)
        assert {entry.key: entry for entry in self.primary} == {
            key: use.entry for key, use in self.known.items()
        }
        for key in KEYS:
            use = self.known.get(key)
            assert self.primary.get(key) is (use and use.entry)
        for use in uses:
            assert use.entry.ready == (use.writer is None)
            assert use.entry.busy == use.busy

    def teardown(self) -> None:
        """Nothing leaks: when everything ended, all slots can be taken again."""
        if not hasattr(self, "primary"):
            return
        self.reset()
        for use in list(self.orphans):
            self.primary.end_gpu(use.entry)
            use.holds[Hold.LOAD] = 0
            for reason in use.holds.elements():
                self.primary.let_go((use.entry,), reason)
            if use.writer is Writer.TIER:
                self.primary.finish_writes((use.entry,), good=False)
        assert self.primary.free == self.slots and self.primary.promoting == 0
        entries = take(self.primary, *(b"new%d" % n for n in range(self.slots)))
        assert sorted(entry.slot for entry in entries) == list(range(self.slots))


class LRUPrimaryMachine(PrimaryMachine):
    policy = "lru"


class ARCPrimaryMachine(PrimaryMachine):
    policy = "arc"


TestLRUPrimary = LRUPrimaryMachine.TestCase
TestARCPrimary = ARCPrimaryMachine.TestCase
TestLRUPrimary.settings = TestARCPrimary.settings = settings.default


@pytest.mark.parametrize("name", ["lru", "arc", "auto"])
def test_a_prefix_takes_the_place_of_what_its_own_window_left_behind(name: str) -> None:
    """Thirty chunks of two groups, one of which looks back three chunks; thirty-six slots."""
    primary = PrimaryTier(36, policy_class(name)(36, {1: 3 * 32}))
    use = Use()
    for first in range(0, 30, 3):
        pages = {
            bytes([1, at]) + group.to_bytes(4, "big"): 32 * (at + 1)
            for at in range(first, first + 3)
            for group in (0, 1)
        }
        primary.ask(pages, use)
        entries, _ = primary.allocate(pages.items(), Writer.GPU, use, must=False)
        assert len(entries) == len(pages)
        primary.finish_writes(entries, good=True)
    here = {entry.key[1:] for entry in primary}
    assert here >= {bytes([at, 0, 0, 0, 0]) for at in range(30)}
    assert here >= {bytes([at, 0, 0, 0, 1]) for at in range(27, 30)}
