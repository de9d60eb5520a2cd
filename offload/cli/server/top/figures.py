"""What `top` shows, from two reads of a server; its engines are added up."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.offload.cli.server.look import Look
from kvstrata.offload.cli.server.scrape import Scrape
from kvstrata.offload.metering.names import (
    BREAKER_OPEN,
    BYTES,
    CAPACITY,
    DISK_FREE,
    DISK_USED,
    DISTRUSTED,
    HIT_CHUNKS,
    HIT_TOKENS,
    PRIMARY,
    QUERY_CHUNKS,
    READ_BYTES,
    SAVED_NET,
    STORES_FAILING,
    WAIT_SECONDS,
    WRITTEN_BYTES,
)

_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_ENDED = "vllm:request_success"
_STATES = (
    (BREAKER_OPEN, "left alone"),
    (DISTRUSTED, "distrusted"),
    (STORES_FAILING, "stores fail"),
)


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One tier.

    Attributes:
        hit_rate_now: chunks found of those looked for since the read before; None of none.
        hit_rate: the same since the start.
        read_rate, write_rate: bytes a second, since the read before.
        held, capacity: bytes; a capacity of 0 is no limit. None where the tier does not tell.
        disk_used, disk_free: bytes; None without a disk.
        state: what is wrong, in words; empty if nothing is.
    """

    name: str
    hit_rate_now: float | None
    hit_rate: float | None
    read_rate: float
    write_rate: float
    held: float | None
    capacity: float | None
    disk_used: float | None
    disk_free: float | None
    state: str


@dataclass(frozen=True, slots=True)
class Figures:
    """The server.

    Attributes:
        hit_rate_now: chunks found in any tier of those needed since the read before; None of none.
        served, serving: tokens from tiers since the start, and a second since the read before.
        saved_net: seconds of prefill saved since the start, less those waited.
        waited, waits: seconds that requests waited for tiers since the start, and in a second.
        running, waiting: requests now.
        ended: requests a second, since the read before.
    """

    tiers: tuple[TierFigures, ...]
    hit_rate_now: float | None
    served: float
    serving: float
    saved_net: float
    waited: float
    waits: float
    running: float
    waiting: float
    ended: float


def figures(before: Scrape, after: Scrape) -> Figures:
    """What is so at `after`, and how fast things go since `before`."""
    look = Look(before, after)
    pause = max(look.seconds, 1e-3)
    return Figures(
        tiers=tuple(_tier(look, name, pause) for name in (PRIMARY, *look.tiers())),
        # the primary tier is asked for all of them
        hit_rate_now=_rate(look.grew(HIT_CHUNKS), look.grew(QUERY_CHUNKS, tier=PRIMARY)),
        served=look.total(HIT_TOKENS),
        serving=look.grew(HIT_TOKENS) / pause,
        saved_net=look.total(SAVED_NET),
        waited=look.total(WAIT_SECONDS),
        waits=look.grew(WAIT_SECONDS) / pause,
        running=look.total(_RUNNING),
        waiting=look.total(_WAITING),
        ended=look.grew(_ENDED) / pause,
    )


def _tier(look: Look, tier: str, pause: float) -> TierFigures:
    return TierFigures(
        name=tier,
        hit_rate_now=_rate(look.grew(HIT_CHUNKS, tier=tier), look.grew(QUERY_CHUNKS, tier=tier)),
        hit_rate=_rate(look.total(HIT_CHUNKS, tier=tier), look.total(QUERY_CHUNKS, tier=tier)),
        read_rate=look.grew(READ_BYTES, tier=tier) / pause,
        write_rate=look.grew(WRITTEN_BYTES, tier=tier) / pause,
        held=_present(look, BYTES, tier),
        capacity=_present(look, CAPACITY, tier),
        disk_used=look.gauge(DISK_USED, tier=tier),
        disk_free=look.gauge(DISK_FREE, tier=tier),
        state=", ".join(word for name, word in _STATES if look.gauge(name, tier=tier)),
    )


def _present(look: Look, name: str, tier: str) -> float | None:
    """Each engine has a CPU tier of its own; other tiers they may share."""
    largest = look.gauge(name, tier=tier)
    return look.total(name, tier=tier) if largest is not None and tier == PRIMARY else largest


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None
