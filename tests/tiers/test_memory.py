from collections.abc import Iterator

import pytest

from kvstrata.tiers.base import Lookup, SecondaryTier, TierConfigError, TierContext
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    MakeTier,
    TierContract,
    load,
    make_data,
    make_key,
    settle,
    store,
)

SIZE = CONTEXT.layouts[0].nbytes


class DictMedium:
    """The dict inside a memory tier."""

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        assert isinstance(tier, MemoryTier)
        tier._pages[key] = data
        tier._changes.note(key, True)

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        assert isinstance(tier, MemoryTier)
        return tier._pages.get(key)


class TestMemoryTier(TierContract):
    @pytest.fixture
    def make_tier(self) -> Iterator[MakeTier]:
        yield lambda context: MemoryTier({}, context)

    @pytest.fixture
    def medium(self) -> DictMedium:
        return DictMedium()


def put(tier: MemoryTier, number: int) -> None:
    assert not store(tier, {make_key(number): make_data(number, SIZE)}).failed


def test_the_least_recently_used_page_goes_first() -> None:
    tier = MemoryTier({"max_bytes": 3 * SIZE}, CONTEXT)
    for number in range(3):
        put(tier, number)
    tier.touch([make_key(0)], REQUEST)
    load(tier, [make_key(1)])
    assert len(list(tier.take_changes(9))) == 3
    put(tier, 3)
    assert list(tier.take_changes(9)) == [(make_key(2), False), (make_key(3), True)]
    assert list(tier.take_changes(9)) == []
    found = [settle(tier, make_key(n)) for n in range(4)]
    assert found == [Lookup.HIT, Lookup.HIT, Lookup.MISS, Lookup.HIT]
    stats = tier.stats()
    assert stats.gauges == {"pages": 3, "bytes": 3 * SIZE, "capacity_bytes": 3 * SIZE}
    assert stats.counters["evicted_bytes"] == SIZE * stats.counters["evicted_pages"] > 0


def test_eviction_makes_room_for_pages_of_another_size() -> None:
    tier = MemoryTier({"max_bytes": CONTEXT.layouts[2].nbytes}, CONTEXT)
    put(tier, 1)
    put(tier, 2)
    assert len(list(tier.take_changes(9))) == 2
    store(tier, {make_key(3, group=2): make_data(3, CONTEXT.layouts[2].nbytes)})
    told = list(tier.take_changes(9))
    assert told == [(make_key(1), False), (make_key(2), False), (make_key(3, group=2), True)]


def test_a_page_above_max_bytes_fails_and_evicts_nothing() -> None:
    tier = MemoryTier({"max_bytes": SIZE}, CONTEXT)
    put(tier, 1)
    big = make_key(2, group=2)
    result = store(tier, {big: bytes(CONTEXT.layouts[2].nbytes)})
    assert result.failed == {big: "too-large"}
    assert settle(tier, make_key(1)) is Lookup.HIT


def test_max_bytes_takes_sizes_with_units() -> None:
    MemoryTier.check_options({"max_bytes": "8GiB"})
    with pytest.raises(TierConfigError, match=r"max_bytes: -1 is not positive"):
        MemoryTier.check_options({"max_bytes": -1})
    with pytest.raises(TierConfigError, match=r"'max_byte' \(did you mean 'max_bytes'\?\)"):
        MemoryTier({"max_byte": 1}, CONTEXT)
