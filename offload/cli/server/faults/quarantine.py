"""Pages that are not what they must be."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import causes, count
from kvstrata.offload.metering.names import QUARANTINED

# Fewer, long ago, are what a crash leaves; a disk that fails makes more of them.
_SEVERAL = 10
_COPIED = ("key", "namespace")


def quarantine(look: Look) -> Iterator[Finding]:
    """Many since the start, or any while this looked."""
    for tier in look.tiers():
        by_cause = look.after.by("cause", QUARANTINED, tier=tier)
        total, lately = sum(by_cause.values()), look.grew(QUARANTINED, tier=tier)
        if not total:
            continue
        if next(iter(by_cause)) in _COPIED:
            remedy = "find out who copies or renames files below root_dir"
        else:
            remedy = (
                "look at the disk (smartctl, dmesg) and at the quarantine (kvstrata inspect); "
                'after power cuts set "durability": "fsync"'
            )
        yield Finding(
            "quarantined pages",
            tier,
            f"{count(total)} pages were put aside since the start ({causes(by_cause)}), "
            f"{count(lately)} of them while this looked; they were computed instead",
            remedy,
            wrong=total >= _SEVERAL or lately > 0,
        )
