"""The wrappers keep the contract when told to do nothing, and misbehave as told."""

from collections.abc import Iterator

import pytest

from kvstrata.tiers.base import Lookup, SecondaryTier, TierContext
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    MakeTier,
    Slots,
    TierContract,
    finish,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)
from tests.tiers.faults import FaultyTier, SlowTier

SIZE = CONTEXT.layouts[0].nbytes


class InnerDict:
    """The dict inside a wrapped memory tier."""

    def _pages(self, tier: SecondaryTier) -> dict[bytes, bytes]:
        assert isinstance(tier, FaultyTier | SlowTier) and isinstance(tier.inner, MemoryTier)
        return tier.inner._pages

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        self._pages(tier)[key] = data

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        return self._pages(tier).get(key)


class WrapperContract(TierContract):
    @pytest.fixture
    def medium(self) -> InnerDict:
        return InnerDict()


class TestFaultyTier(WrapperContract):
    @pytest.fixture
    def make_tier(self) -> Iterator[MakeTier]:
        yield lambda context: FaultyTier(MemoryTier({}, context), lambda operation, key: None)


class TestSlowTier(WrapperContract):
    @pytest.fixture(params=[(0, 0.0), (3, 0.0), (0, 0.005)])
    def make_tier(self, request: pytest.FixtureRequest) -> Iterator[MakeTier]:
        polls, seconds = request.param
        yield lambda context: SlowTier(MemoryTier({}, context), polls, seconds)


def test_faults_are_injected_per_operation_and_key() -> None:
    faults = {("store", make_key(1)): "no-space", ("load", make_key(2)): "io-error"}
    faults["lookup", make_key(3)] = "lost"
    tier = FaultyTier(MemoryTier({}, CONTEXT), lambda operation, key: faults.get((operation, key)))
    data = {make_key(n): make_data(n, SIZE) for n in range(4)}
    assert store(tier, data).failed == {make_key(1): "no-space"}
    result, arrived = load(tier, list(data))
    assert result.failed == {make_key(1): "missing", make_key(2): "io-error"}
    assert arrived == {make_key(n): data[make_key(n)] for n in (0, 3)}
    found = [settle(tier, key) for key in data]
    assert found == [Lookup.HIT, Lookup.MISS, Lookup.HIT, Lookup.MISS]
    assert tier.stats().failures == {"no-space": 1, "io-error": 1, "lost": 1, "missing": 1}


def test_slow_by_polls() -> None:
    tier = SlowTier(MemoryTier({}, CONTEXT), polls=2)
    slots = Slots.make(1, SIZE)
    tier.submit_store(make_job(1, [make_key(1)], slots, CONTEXT))
    assert list(tier.get_finished()) == []
    slots.view(0)[:] = make_data(9, SIZE)  # the page is read late
    assert [r.job_id for r in tier.get_finished()] == [1]
    assert load(SlowTier(tier.inner), [make_key(1)])[1] == {make_key(1): make_data(9, SIZE)}


def test_hanging_ends_with_release() -> None:
    tier = SlowTier(MemoryTier({}, CONTEXT))
    data = {make_key(1): make_data(1, SIZE)}
    store(tier, data)
    tier.hang()
    slots = Slots.make(1, SIZE)
    tier.submit_load(make_job(2, [make_key(1)], slots, CONTEXT))
    assert tier.lookup(make_key(1), REQUEST) is Lookup.RETRY
    assert list(tier.get_finished()) == []
    assert not tier.drain(0.0) and not tier.shutdown(0.0)
    assert bytes(slots.view(0)) == b"\xee" * SIZE
    tier.release()
    finish(tier)
    assert bytes(slots.view(0)) == data[make_key(1)]


def test_shutdown_fails_what_was_held() -> None:
    tier = SlowTier(MemoryTier({}, CONTEXT), polls=5)
    slots = Slots.make(1, SIZE)
    tier.submit_store(make_job(2, [make_key(1)], slots, CONTEXT))
    assert tier.shutdown(1.0)
    (result,) = tier.get_finished()
    assert result.failed == {make_key(1): "shutdown"}
