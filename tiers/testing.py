"""For the tests of tiers, also those of others: one suite for all.

class TestMyTier(TierContract):
    @pytest.fixture
    def make_tier(self, tmp_path): ...   # Callable[[TierContext], SecondaryTier]
    @pytest.fixture
    def medium(self): ...                # Medium
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    TierConfigError,
    TierContext,
    key_group,
    layouts_to_json,
)


class Medium(Protocol):
    """A tier's medium, reached without the tier's own methods."""

    def put(self, tier: SecondaryTier, context: TierContext, key: PageKey, data: bytes) -> None:
        """Place a page so that the tier can find and load it."""

    def get(self, tier: SecondaryTier, context: TierContext, key: PageKey) -> bytes | None:
        """The page's bytes, or None if it is not there."""


MakeTier = Callable[[TierContext], SecondaryTier]

REQUEST = RequestView("request")

_FILL = 0xEE
_GUARD = 4096


class _Memory:
    """Shared memory for small pages, with a guard at the end of each slot."""

    SLOTS, SLOT_BYTES = 4096, 256 * 1024  # takes only the memory that is touched

    def __init__(self) -> None:
        fd = os.memfd_create("kvstrata-test-pages")
        self.region = PageRegion(fd, _GUARD, self.SLOT_BYTES, self.SLOTS)
        os.ftruncate(fd, _GUARD + self.SLOTS * self.SLOT_BYTES)
        self.map = mmap.mmap(fd, 0)
        self.view = memoryview(self.map)
        self.free = list(reversed(range(self.SLOTS)))


_MEMORY = _Memory()

# One tensor with a size that is no multiple of 512, two tensors, and whole 4096-byte blocks.
_LAYOUTS = {
    0: PageLayout((TensorSpec("kv", "F16", (4, 3, 16, 7)),), tokens=16),
    1: PageLayout(
        (TensorSpec("kv", "BF16", (2, 2, 16, 64)), TensorSpec("kv1", "U8", (1, 1, 16, 5))),
        tokens=16,
    ),
    2: PageLayout((TensorSpec("kv", "U8", (1, 8192)),), tokens=16),
}
CONTEXT = TierContext(
    model="org/model",
    namespace={"test": 1, "groups": ["a", "b", "c"], "pages": layouts_to_json(_LAYOUTS)},
    layouts=_LAYOUTS,
    region=_MEMORY.region,
)


def make_key(number: int, group: int = 0) -> PageKey:
    """An offload key with a 32-byte hash."""
    return number.to_bytes(8, "big").ljust(32, b"\x5a") + group.to_bytes(4, "big")


def make_data(number: int, nbytes: int) -> bytes:
    """Bytes that differ by number and by position."""
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(nbytes)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Slots:
    """Some slots of `CONTEXT.region`, for pages of `nbytes` bytes, with guards around them.

    The slots are free for others when this object is gone.
    """

    nbytes: int
    numbers: tuple[int, ...]

    @classmethod
    def make(cls, count: int, nbytes: int) -> Slots:
        """`count` slots of `nbytes` bytes; everything is set to 0xEE."""
        assert nbytes <= _Memory.SLOT_BYTES - _GUARD, "the pages of tests are small"
        numbers = tuple(_MEMORY.free.pop() for _ in range(count))
        slots = cls(nbytes, numbers)
        weakref.finalize(slots, _MEMORY.free.extend, numbers)
        for index in range(count):
            slots._guarded(index)[:] = bytes([_FILL]) * (nbytes + 2 * _GUARD)
        return slots

    def view(self, index: int) -> memoryview:
        """The bytes of the page in the slot."""
        return self._guarded(index)[_GUARD : _GUARD + self.nbytes]

    def check_guards(self) -> None:
        """Assert that nothing around the pages was written."""
        for index in range(len(self.numbers)):
            guarded = bytes(self._guarded(index))
            assert guarded[:_GUARD] == guarded[-_GUARD:] == bytes([_FILL]) * _GUARD

    def _guarded(self, index: int) -> memoryview:
        """The page with a guard before it, at the end of the slot before, and one after it."""
        start = self.numbers[index] * _Memory.SLOT_BYTES
        return _MEMORY.view[start : start + self.nbytes + 2 * _GUARD]


def make_job(
    job_id: int,
    keys: Sequence[PageKey],
    slots: Slots,
    context: TierContext,
    *,
    first: int = 0,
    request: RequestView = REQUEST,
) -> Job:
    """A job that moves `keys[i]` from or to slot `first + i`; the keys are of one group."""
    layouts = [context.layouts.get(key_group(key)) for key in keys]
    assert all(layout is None or slots.nbytes == layout.nbytes for layout in layouts)
    numbers = slots.numbers[first : first + len(keys)]

    def view(key: PageKey, slot: int) -> memoryview:
        return slots.view(slots.numbers.index(slot))

    return Job(job_id, keys, numbers, [0] * len(keys), request, view)


def finish(tier: SecondaryTier, count: int = 1, timeout_s: float = 60.0) -> list[JobResult]:
    """Poll until `count` results came."""
    results: list[JobResult] = []
    deadline = time.monotonic() + timeout_s
    while len(results) < count:
        assert time.monotonic() < deadline, f"{len(results)} of {count} results came"
        tier.on_step_end()
        results.extend(tier.get_finished())
        time.sleep(0.0005)
    return results


def settle(
    tier: SecondaryTier, key: PageKey, request: RequestView = REQUEST, timeout_s: float = 60.0
) -> Lookup:
    """Look a key up until the answer is not RETRY."""
    deadline = time.monotonic() + timeout_s
    while (found := tier.lookup(key, request)) is Lookup.RETRY:
        assert time.monotonic() < deadline, "RETRY without end"
        tier.on_step_end()
        time.sleep(0.0005)
    return found


def find(tier: SecondaryTier, key: PageKey, timeout_s: float = 60.0) -> None:
    """Look a key up, each time for another request, until it is a HIT.

    A page that came without the tier's knowledge may be a MISS at first.
    """
    deadline, number = time.monotonic() + timeout_s, 0
    while settle(tier, key, RequestView(f"find {number}")) is not Lookup.HIT:
        assert time.monotonic() < deadline, "the page is not found"
        number += 1
        tier.on_step_end()
        time.sleep(0.0005)


def store(tier: SecondaryTier, data: Mapping[PageKey, bytes], job_id: int = 1) -> JobResult:
    """Store pages of one size and wait for the result."""
    slots = Slots.make(len(data), len(next(iter(data.values()))))
    for slot, page in enumerate(data.values()):
        slots.view(slot)[:] = page
    tier.submit_store(make_job(job_id, list(data), slots, CONTEXT))
    (result,) = finish(tier)
    assert result.job_id == job_id
    return result


def load(
    tier: SecondaryTier, keys: Sequence[PageKey], job_id: int = 2
) -> tuple[JobResult, dict[PageKey, bytes]]:
    """Load pages of one group; the result, and the bytes of the pages that arrived."""
    slots = Slots.make(len(keys), CONTEXT.layouts[int.from_bytes(keys[0][-4:], "big")].nbytes)
    tier.submit_load(make_job(job_id, keys, slots, CONTEXT))
    (result,) = finish(tier)
    assert result.job_id == job_id
    _check_around(tier, slots)
    arrived = {k: bytes(slots.view(i)) for i, k in enumerate(keys) if k not in result.failed}
    return result, arrived


def _check_around(tier: SecondaryTier, slots: Slots) -> None:
    """Assert that nothing around the pages was written, where that is not the tier's."""
    if not tier.tail_bytes:
        slots.check_guards()


class TierContract:
    """What every tier must do. Subclasses supply the fixtures `make_tier` and `medium`.

    `make_tier(context)` makes a new, empty tier and sees to its shutdown.
    """

    def test_unknown_option_is_named(self, make_tier: MakeTier) -> None:
        try:
            type(make_tier(CONTEXT)).check_options({"no_such_option": 1})
        except TierConfigError as error:
            assert "no_such_option" in str(error)
        else:
            raise AssertionError("an unknown option was accepted")

    def test_store_then_load(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        for group, layout in CONTEXT.layouts.items():
            data = {make_key(n, group): make_data(n, layout.nbytes) for n in range(5)}
            stored = store(tier, data)
            assert not stored.failed and stored.seconds >= 0
            loaded, arrived = load(tier, list(data))
            assert not loaded.failed and arrived == data
            assert loaded.nbytes == 5 * layout.nbytes

    def test_store_reaches_the_medium(self, make_tier: MakeTier, medium: Medium) -> None:
        tier = make_tier(CONTEXT)
        for group, layout in CONTEXT.layouts.items():
            data = make_data(7, layout.nbytes)
            store(tier, {make_key(7, group): data})
            assert medium.get(tier, CONTEXT, make_key(7, group)) == data

    def test_load_takes_from_the_medium(self, make_tier: MakeTier, medium: Medium) -> None:
        tier = make_tier(CONTEXT)
        for group, layout in CONTEXT.layouts.items():
            key, data = make_key(8, group), make_data(8, layout.nbytes)
            medium.put(tier, CONTEXT, key, data)
            find(tier, key)
            assert load(tier, [key])[1] == {key: data}

    def test_lookup(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        assert settle(tier, make_key(1)) is Lookup.MISS
        store(tier, {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)})
        assert settle(tier, make_key(1), RequestView("another")) is Lookup.HIT
        assert settle(tier, make_key(1)) is Lookup.HIT
        assert settle(tier, make_key(1, group=1)) is Lookup.MISS
        assert settle(tier, make_key(2)) is Lookup.MISS

    def test_missing_page_fails_alone(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        size = CONTEXT.layouts[0].nbytes
        data = {make_key(n): make_data(n, size) for n in (0, 2)}
        store(tier, data)
        result, arrived = load(tier, [make_key(n) for n in range(4)])
        assert result.failed == {make_key(1): "missing", make_key(3): "missing"}
        assert arrived == data
        assert tier.stats().failures["missing"] == 2

    def test_impossible_pages_fail_alone(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        good = make_key(1)
        store(tier, {good: make_data(1, CONTEXT.layouts[0].nbytes)})
        slots = Slots.make(4, CONTEXT.layouts[0].nbytes)
        strange = [make_key(2, group=9), b"\0\0\0\0", b""]  # no such group, no hash, nothing
        for submit in (tier.submit_store, tier.submit_load):
            submit(make_job(5, [*strange, good], slots, CONTEXT))
            (result,) = finish(tier)
            assert set(result.failed) == set(strange)
        for key in strange:
            assert settle(tier, key) is Lookup.MISS

    def test_empty_job_ends(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        slots = Slots.make(0, CONTEXT.layouts[0].nbytes)
        tier.submit_store(make_job(1, (), slots, CONTEXT))
        tier.submit_load(make_job(2, (), slots, CONTEXT))
        results = finish(tier, 2)
        assert sorted(r.job_id for r in results) == [1, 2]
        assert not any(r.failed for r in results)

    def test_each_result_comes_once(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        slots = Slots.make(3, CONTEXT.layouts[0].nbytes)
        for job_id in range(20):
            keys = [make_key(job_id * 3 + n) for n in range(3)]
            tier.submit_store(make_job(job_id, keys, slots, CONTEXT))
        assert sorted(r.job_id for r in finish(tier, 20)) == list(range(20))
        assert tier.drain(60.0)
        assert list(tier.get_finished()) == []

    def test_storing_again_counts_as_stored(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        data = {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}
        assert not store(tier, data).failed
        assert not store(tier, data).failed
        assert load(tier, list(data))[1] == data

    def test_one_key_in_many_places(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        key, data = make_key(1), make_data(1, CONTEXT.layouts[0].nbytes)
        store(tier, {key: data})
        slots = Slots.make(4, len(data))
        tier.submit_load(make_job(11, [key] * 2, slots, CONTEXT))
        tier.submit_load(make_job(12, [key] * 2, slots, CONTEXT, first=2))
        assert not any(result.failed for result in finish(tier, 2))
        assert all(bytes(slots.view(slot)) == data for slot in range(4))
        _check_around(tier, slots)

    def test_views_are_free_after_the_result(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        key, data = make_key(1), make_data(1, CONTEXT.layouts[0].nbytes)
        slots = Slots.make(1, len(data))
        slots.view(0)[:] = data
        tier.submit_store(make_job(1, [key], slots, CONTEXT))
        finish(tier)
        slots.view(0)[:] = bytes(len(data))  # the slot's next owner
        assert load(tier, [key])[1] == {key: data}
        assert tier.drain(60.0)
        assert bytes(slots.view(0)) == bytes(len(data))

    def test_what_arrives_before_its_job_ends_is_whole(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        size = CONTEXT.layouts[1].nbytes
        data = {make_key(n, group=1): make_data(n, size) for n in range(60)}
        store(tier, data)
        missing = make_key(99, group=1)
        keys = [*data]
        keys.insert(30, missing)
        slots = Slots.make(len(keys), size)
        tier.submit_load(make_job(7, keys, slots, CONTEXT))
        early: set[PageKey] = set()
        results: list[JobResult] = []
        deadline = time.monotonic() + 60.0
        while not results:
            assert time.monotonic() < deadline, "the job did not end"
            tier.on_step_end()
            results += tier.get_finished()
            for job_id, arrived in tier.get_arrived().items():
                assert job_id == 7 and not results, "the job has ended"
                assert not early.intersection(arrived), "a page arrives once"
                for key in arrived:
                    assert bytes(slots.view(keys.index(key))) == data[key]
                early.update(arrived)
            time.sleep(0.0005)
        (result,) = results
        assert set(result.failed) == {missing} and missing not in early
        assert all(bytes(slots.view(keys.index(key))) == data[key] for key in data)
        assert not tier.get_arrived()

    def test_a_rejected_page_is_not_served(self, make_tier: MakeTier, medium: Medium) -> None:
        tier = make_tier(CONTEXT)
        size = CONTEXT.layouts[0].nbytes
        data = {make_key(n): make_data(n, size) for n in range(2)}
        store(tier, data)
        list(tier.take_changes(9))
        slots = Slots.make(1, size)
        if not tier.submit_reject(make_job(5, [make_key(0)], slots, CONTEXT), distrust=False):
            return  # the manager alone refuses the key
        (result,) = finish(tier)
        assert result.job_id == 5 and not result.failed
        assert tier.trusted
        assert settle(tier, make_key(0)) is Lookup.MISS
        assert medium.get(tier, CONTEXT, make_key(0)) is None
        assert list(tier.take_changes(9)) == [(make_key(0), False)] * tier.tells_changes
        assert load(tier, list(data))[1] == {make_key(1): data[make_key(1)]}

    def test_a_tier_may_lose_its_trust(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        assert tier.trusted
        slots = Slots.make(1, CONTEXT.layouts[0].nbytes)
        if tier.submit_reject(make_job(5, [make_key(0)], slots, CONTEXT), distrust=True):
            finish(tier)
        assert not tier.trusted
        assert tier.how_to_trust()

    def test_hooks_accept_anything(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        tier.touch([make_key(1), b""], REQUEST)
        tier.on_new_request(REQUEST)
        tier.on_request_finished(RequestView("never seen"))
        tier.on_step_end()
        assert list(tier.take_changes(9)) == []

    def test_each_change_is_told_once(self, make_tier: MakeTier, medium: Medium) -> None:
        tier = make_tier(CONTEXT)
        if not tier.tells_changes:
            return
        size = CONTEXT.layouts[0].nbytes
        data = {make_key(n): make_data(n, size) for n in range(3)}
        assert list(tier.take_changes(0)) == []
        store(tier, data)
        assert sorted(tier.take_changes(0)) == [(key, True) for key in data], "its own at once"
        store(tier, data)
        load(tier, list(data))
        assert list(tier.take_changes(9)) == []
        other = make_key(3)
        medium.put(tier, CONTEXT, other, make_data(3, size))
        find(tier, other)
        seen = [(key, True) for key in (*data, other)]
        told = [each for _ in range(4) for each in tier.take_changes(1)]
        assert told in ([(other, True)], []), "not of those of before"
        anew = [*tier.take_changes(1, anew=True)]
        assert len(anew) == 1, "the rest can wait"
        for _ in range(len(seen)):
            anew += tier.take_changes(1)
        assert sorted(anew) == seen, "each once"

    def test_drain(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        assert tier.drain(0.0)
        slots = Slots.make(1, CONTEXT.layouts[0].nbytes)
        tier.submit_store(make_job(1, [make_key(1)], slots, CONTEXT))
        assert tier.drain(60.0)
        assert [result.job_id for result in tier.get_finished()] == [1]

    def test_shutdown(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        key = make_key(1)
        store(tier, {key: make_data(1, CONTEXT.layouts[0].nbytes)})
        assert tier.shutdown(60.0)
        assert tier.shutdown(60.0)
        assert settle(tier, key) is Lookup.MISS
        slots = Slots.make(1, CONTEXT.layouts[0].nbytes)
        tier.submit_load(make_job(2, [key], slots, CONTEXT))
        tier.submit_store(make_job(3, [make_key(2)], slots, CONTEXT))
        failed = {result.job_id: dict(result.failed) for result in finish(tier, 2)}
        assert failed == {2: {key: "shutdown"}, 3: {make_key(2): "shutdown"}}
        assert bytes(slots.view(0)) == bytes([_FILL]) * slots.nbytes

    def test_stats_only_grow(self, make_tier: MakeTier) -> None:
        tier = make_tier(CONTEXT)
        key, data = make_key(1), make_data(1, CONTEXT.layouts[0].nbytes)
        before = tier.stats()
        store(tier, {key: data})
        load(tier, [key, make_key(2)])
        settle(tier, key)
        settle(tier, make_key(3))
        after = tier.stats()
        assert after.counters["stored_pages"] == after.counters["loaded_pages"] == 1
        assert after.counters["stored_bytes"] == after.counters["loaded_bytes"] == len(data)
        assert after.counters["hits"] == 1 and after.counters["lookups"] == 2, "RETRY is none"
        assert after.failures == {"missing": 1}
        for name, count in before.counters.items():
            assert after.counters[name] >= count
