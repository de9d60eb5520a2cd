"""Stores that fail, and stores that are left out since a tier does not keep up."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import causes, count, share
from kvstrata.offload.metering.names import (
    BANDWIDTH,
    CAPACITY,
    DISK_FREE,
    DISK_USED,
    FAILURES,
    SHED_PAGES,
    STORES_FAILING,
    WRITTEN_PAGES,
)
from kvstrata.tiers.options import format_bytes

# Causes by which a tier says that there is no room (tiers/base.py, page_causes).
_NO_ROOM = ("no-space", "budget")
# A tier that gets fewer of the pages loses most prefixes: one that lacks a page ends there.
_MUCH = 0.2
_LEAST_PAGES = 100


def stores_fail(look: Look) -> Iterator[Finding]:
    """Nothing of the last store was stored, or pages find no room now."""
    for tier in look.tiers():
        lately = {
            cause: grown
            for cause in look.after.by("cause", FAILURES, tier=tier)
            if (grown := look.grew(FAILURES, tier=tier, cause=cause))
        }
        failing = bool(look.gauge(STORES_FAILING, tier=tier))
        full = {cause: lately[cause] for cause in _NO_ROOM if cause in lately}
        if failing and not full:
            seen = lately or look.after.by("cause", FAILURES, tier=tier)
            yield Finding(
                "stores fail",
                tier,
                f"nothing of the tier's last store was stored; failures: {causes(seen) or 'none'}",
                "look at the first warning of the tier in the server's log: a disk that may not be "
                "written, or a store that is away",
            )
        elif full:
            yield Finding("disk full", tier, _room(look, tier, full), _MORE_ROOM)


def behind(look: Look) -> Iterator[Finding]:
    """Pages that a tier is not given, as its queue is too long."""
    for tier in look.tiers():
        shed = look.total(SHED_PAGES, tier=tier, reason="behind")
        offered = shed + look.total(WRITTEN_PAGES, tier=tier)
        if offered < _LEAST_PAGES or shed < _MUCH * offered:
            continue
        speed = look.gauge(BANDWIDTH, tier=tier, direction="write")
        measured = f" (it writes {format_bytes(int(speed))} a second)" if speed else ""
        yield Finding(
            "does not keep up",
            tier,
            f"{count(shed)} of {count(offered)} pages ({share(shed, offered)}) were not stored, "
            f"since the tier was behind or out of service{measured}",
            "give the tier a faster disk, or less to do: store_threshold: 2 in its entry; a larger "
            "cpu_bytes_to_use bridges short bursts",
        )


_MORE_ROOM = (
    "free room on the disk, or let the budget bound the files earlier: a smaller max_bytes or a "
    "larger min_free_bytes of the tier"
)


def _room(look: Look, tier: str, full: dict[str, float]) -> str:
    figures = [
        f"{format_bytes(int(value))} {word}"
        for name, word in ((DISK_USED, "used"), (CAPACITY, "allowed"), (DISK_FREE, "free"))
        if (value := look.gauge(name, tier=tier)) is not None
    ]
    return f"pages find no room ({causes(full)} while this looked); {', '.join(figures)}"
