"""A tier that is filled and hardly read."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.faults.eviction import come_again
from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import share
from kvstrata.offload.metering.names import (
    CAPACITY,
    PRIMARY,
    READ_BYTES,
    SHED_PAGES,
    WRITTEN_BYTES,
)
from kvstrata.tiers.options import format_bytes

# Of what is stored. Where every page that is stored has one chance in fifty to be read, storing
# costs more transfers than hits save.
_HARDLY = 0.02


def unused(look: Look) -> Iterator[Finding]:
    """Judged once as much was stored as the tier may hold, or the CPU tier where that is no limit:
    before that what was stored may still be read. Where many evicted pages come again, prompts do
    share beginnings, and the tier is too small for them or loses them."""
    limits = {tier: look.gauge(CAPACITY, tier=tier) for tier in (PRIMARY, *look.tiers())}
    for tier, limit in limits.items():
        room = limit or limits[PRIMARY]
        written, loaded = (look.total(name, tier=tier) for name in (WRITTEN_BYTES, READ_BYTES))
        if not room or written < room or loaded >= _HARDLY * written:
            continue
        if come_again(look, tier):
            continue
        if look.total(SHED_PAGES, tier=tier, reason="threshold"):
            remedy = "raise store_threshold, or make the tier smaller: its pages are not asked for"
        else:
            remedy = (
                "set store_threshold to 2, so that a page is stored only when it is asked for a "
                "second time; if hits stay away then, too, the prompts share no beginnings"
            )
        if tier != PRIMARY:
            remedy = f"in the tier's entry, unless other servers load what is stored here: {remedy}"
        yield Finding(
            "hardly used",
            tier,
            f"{format_bytes(int(written))} were stored in it since the start, and "
            f"{format_bytes(int(loaded))} ({share(loaded, written)}) were loaded from it",
            remedy,
        )
