"""Tiers that evict pages shortly before they are asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count, share, span
from kvstrata.offload.metering.names import (
    CAPACITY,
    DISK_USED,
    EVICTED_PAGES,
    EVICTION_AGE,
    HIT_CHUNKS,
    PRIMARY,
    REUSE_GAP,
)
from kvstrata.tiers.options import format_bytes

# Fewer gaps tell nothing of the next ones.
LEAST_SEEN = 50
# Where fewer of the evicted pages come again, those that were evicted were the right ones.
_LEAST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class _Returns:
    """Evicted pages that came again.

    Attributes:
        evicted, came: how many pages were evicted, and how many of them, or more, came again.
        gap, late: seconds after which half, and three of four, of these came again.
        age: seconds for which pages had not been used when they were evicted, by the median.
    """

    evicted: float
    came: float
    gap: float
    late: float
    age: float

    @property
    def factor(self) -> float:
        """How many times as large the tier should be to have kept three of four of them."""
        return (self.age + self.late) / self.age

    def __str__(self) -> str:
        return (
            f"of {count(self.evicted)} evicted pages {count(self.came)} or more "
            f"({share(self.came, self.evicted)}) came again, half of them within {span(self.gap)}, "
            f"while pages had been unused for {span(self.age)} when they left"
        )


def thrashing(look: Look) -> Iterator[Finding]:
    """The CPU tier: what it evicts is needed again sooner than it had been kept."""
    seen = _returns(look, PRIMARY)
    if seen is None or seen.gap >= seen.age:
        return
    size = (look.gauge(CAPACITY, tier=PRIMARY) or 0.0) * seen.factor
    yield Finding(
        "thrashing",
        PRIMARY,
        f"the CPU tier evicts pages that are soon needed again: {seen}",
        f"raise cpu_bytes_to_use to {seen.factor:.1f} times what it is{_about(size)}, which would "
        "have kept three of four of them, or give what is evicted a larger tier in secondary_tiers",
    )


def budget(look: Look) -> Iterator[Finding]:
    """A secondary tier: more pages come again after it let them go than are found there, or
    they come soon."""
    for tier in look.tiers():
        seen, hits = _returns(look, tier), look.total(HIT_CHUNKS, tier=tier)
        if seen is None or (seen.gap >= seen.age and seen.came <= hits):
            continue
        used = look.gauge(DISK_USED, tier=tier) or look.gauge(CAPACITY, tier=tier) or 0.0
        yield Finding(
            "budget evicts before reuse",
            tier,
            f"the tier's budget evicts pages that are needed again: {seen}; {count(hits)} chunks "
            "were found in it",
            f"raise max_bytes of the tier to {seen.factor:.1f} times what it uses"
            f"{_about(used * seen.factor)}, on a disk that has the room, or store less: "
            "store_threshold: 2 in its entry",
        )


def come_again(look: Look, tier: str) -> bool:
    """Whether many of the pages that left the tier were needed again."""
    came = look.after.histogram(REUSE_GAP, tier=tier).count
    return came >= max(LEAST_SEEN, _LEAST_SHARE * look.total(EVICTED_PAGES, tier=tier))


def _returns(look: Look, tier: str) -> _Returns | None:
    """None where too few pages came again to tell anything, or hardly any of those that left.

    Where more came than were evicted, the tier lost pages otherwise, and its size is not why.
    """
    gaps = look.after.histogram(REUSE_GAP, tier=tier)
    ages = look.after.histogram(EVICTION_AGE, tier=tier)
    evicted = look.total(EVICTED_PAGES, tier=tier)
    gap, late, age = gaps.quantile(0.5), gaps.quantile(0.75), ages.quantile(0.5)
    if gap is None or late is None or not age or ages.count < LEAST_SEEN:
        return None
    if not come_again(look, tier) or gaps.count > evicted:
        return None
    return _Returns(evicted, gaps.count, gap, late, age)


def _about(nbytes: float) -> str:
    return f", about {format_bytes(int(nbytes))}" if nbytes else ""
