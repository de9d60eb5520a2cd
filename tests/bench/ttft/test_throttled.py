"""The throttled tier keeps the contract, and lets nothing through too early."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvstrata.tiers.base import SecondaryTier, TierConfigError, TierContext
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.testing import CONTEXT, MakeTier, Slots, TierContract, make_job, make_key
from tests.bench.ttft.throttled import ThrottledTier

SIZE = CONTEXT.layouts[0].nbytes
OPTIONS: dict[str, Any] = {
    "tier": {"type": "memory"},
    "latency_s": 0.0,
    "bytes_per_second": 1e12,
}


class InnerMedium:
    """The dict inside the memory tier behind the link."""

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        assert isinstance(tier, ThrottledTier) and isinstance(tier.inner, MemoryTier)
        tier.inner._pages[key] = data

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        assert isinstance(tier, ThrottledTier) and isinstance(tier.inner, MemoryTier)
        return tier.inner._pages.get(key)


class TestThrottledTier(TierContract):
    @pytest.fixture
    def make_tier(self) -> Iterator[MakeTier]:
        yield lambda context: ThrottledTier(OPTIONS, context)

    @pytest.fixture
    def medium(self) -> InnerMedium:
        return InnerMedium()


def test_results_are_due_after_latency_and_bytes_and_each_direction_has_its_link() -> None:
    now = 100.0
    options = OPTIONS | {"latency_s": 0.5, "bytes_per_second": SIZE}
    tier = ThrottledTier(options, CONTEXT, lambda: now)
    slots = Slots.make(2, SIZE)
    groups = [[make_key(0), make_key(1)], [make_key(2)], [make_key(3)]]
    tier.submit_store(make_job(1, groups[0], slots, CONTEXT))  # moves for 2 s
    tier.submit_store(make_job(2, groups[1], slots, CONTEXT))  # for 1 s, after it
    tier.submit_load(make_job(3, groups[2], slots, CONTEXT))
    seen = {}
    for now in (101.4, 101.5, 102.4, 102.5, 103.4, 103.5):
        seen |= {result.job_id: (now, result.seconds) for result in tier.get_finished()}
    assert seen == {3: (101.5, 1.5), 1: (102.5, 2.5), 2: (103.5, 1.5)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latency_s", -1),
        ("latency_s", None),
        ("latency_s", True),
        ("bytes_per_second", 0),
        ("bytes_per_second", float("nan")),
        ("bytes_per_second", "1GiB"),
        ("tier", "memory"),
        ("tier", {"type": "absent"}),
    ],
)
def test_wrong_options_are_named(name: str, value: object) -> None:
    with pytest.raises(TierConfigError, match=name if name != "tier" else "tier: |unknown type"):
        ThrottledTier.check_options({**OPTIONS, name: value})
