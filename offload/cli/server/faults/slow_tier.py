"""A tier from which loading takes as long as computing."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count, span
from kvstrata.offload.metering.names import (
    BANDWIDTH,
    DECLINED_REQUESTS,
    LATENCY,
    PREFILL_SPEED,
    PROMOTION_SECONDS,
    READ_BYTES,
    READ_PAGES,
    READ_SECONDS,
)
from kvstrata.tiers.options import format_bytes

# A prefix that is worth keeping; of shorter ones the latency of a tier says more than its speed.
_TOKENS = 4096


def slow_tier(look: Look) -> Iterator[Finding]:
    """Loading a long prefix against computing it, as the engine measured both."""
    speed, per_token = look.gauge(PREFILL_SPEED), look.bytes_per_token()
    for tier in look.tiers():
        if not (speed and per_token):
            continue
        expected = _expected(look, tier, _TOKENS * per_token)
        if expected is None:
            continue
        (loading, latency), computing = expected, _TOKENS / speed
        if loading < computing:
            continue
        declined = look.total(DECLINED_REQUESTS, tier=tier)
        yield Finding(
            "slower than computing",
            tier,
            f"{count(_TOKENS)} tokens take {span(loading)} to load from the tier "
            f"({format_bytes(int(_TOKENS * per_token))}, {span(latency)} of it at any size) "
            f"and {span(computing)} to compute ({count(speed)} tokens a second); "
            + (
                f"{count(declined)} requests computed what the tier had"
                if declined
                else f"{count(look.total(READ_PAGES, tier=tier))} pages were loaded all the same"
            ),
            (
                "give the tier a faster disk or larger pages (blocks_per_chunk), or take it out: "
                "what is stored there is hardly loaded"
                if declined
                else 'set "load_or_recompute": true, so that a prefix is computed where that is '
                "sooner; or give the tier a faster disk, or larger pages (blocks_per_chunk)"
            ),
        )


def _expected(look: Look, tier: str, nbytes: float) -> tuple[float, float] | None:
    """Seconds for so many bytes, and how many of these any load takes; None if not measured.

    The engine's estimate counts the latency as bandwidth where jobs are small and alike. So the
    jobs' own speed, after as long as a load takes in the mean, is held against it.
    """
    latency, bandwidth = (
        look.gauge(name, tier=tier, direction="read") for name in (LATENCY, BANDWIDTH)
    )
    if latency is None:
        return None
    # where bytes make no difference yet, there is no bandwidth
    estimate = (latency + (nbytes / bandwidth if bandwidth else 0.0), latency)
    read, seconds = (look.total(name, tier=tier) for name in (READ_BYTES, READ_SECONDS))
    if not (read and seconds):
        return estimate
    waiting = look.after.histogram(PROMOTION_SECONDS, tier=tier).mean
    return min(estimate, (waiting + nbytes * seconds / read, waiting))
