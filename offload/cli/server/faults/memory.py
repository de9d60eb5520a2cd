"""Memory of the CPU tier that is missing, or too little for what comes in."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count, share
from kvstrata.offload.metering.names import (
    INCOMPLETE_PAGES,
    NO_ROOM_PAGES,
    PRIMARY,
    READ_PAGES,
    SLOTS,
    WRITTEN_PAGES,
)

# A page in ten that found no room is a prefix in ten that was cut short.
_MUCH = 0.1
_LEAST_PAGES = 100


def not_ready(look: Look) -> Iterator[Finding]:
    """Slots whose memory is not there, and does not come either."""
    missing = look.total(SLOTS, state="not_ready")
    if not missing:
        return
    slots = missing + sum(look.total(SLOTS, state=state) for state in ("free", "idle", "busy"))
    stands = missing >= look.before.total(SLOTS, state="not_ready")
    yield Finding(
        "memory missing",
        PRIMARY,
        f"the memory of {count(missing)} of {count(slots)} slots ({share(missing, slots)}) "
        + ("could not be reserved" if stands else "is still being reserved"),
        "the server's log says why: give the machine or the container more memory and /dev/shm, or "
        "lower cpu_bytes_to_use",
        wrong=stands,
    )


def no_room(look: Look) -> Iterator[Finding]:
    """Pages that a tier had, and that could not be promoted."""
    refused = look.total(NO_ROOM_PAGES)
    loaded = sum(look.total(READ_PAGES, tier=tier) for tier in look.tiers())
    if refused < _LEAST_PAGES or refused < _MUCH * (refused + loaded):
        return
    yield Finding(
        "no room to load",
        PRIMARY,
        f"{count(refused)} pages that tiers had found no room in the CPU tier and were computed "
        f"({count(loaded)} were loaded)",
        "raise cpu_bytes_to_use, or promotion_fraction",
    )


def incomplete(look: Look) -> Iterator[Finding]:
    """Pages that the workers could not fill."""
    dropped, stored = look.total(INCOMPLETE_PAGES), look.total(WRITTEN_PAGES, tier=PRIMARY)
    if dropped < _LEAST_PAGES or dropped < _MUCH * (dropped + stored):
        return
    yield Finding(
        "pages not filled",
        PRIMARY,
        f"the workers could not fill {count(dropped)} of {count(dropped + stored)} pages "
        f"({share(dropped, dropped + stored)}), which were dropped",
        "lower blocks_per_chunk: a page that lacks one block, which a sliding window has passed, "
        "is dropped whole; if it is 1 already, report it with the workers' log",
    )
