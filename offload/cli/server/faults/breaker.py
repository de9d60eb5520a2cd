"""A tier that is left alone since it failed, and why."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import causes, count
from kvstrata.offload.metering.names import (
    BREAKER_OPEN,
    BREAKER_OPENINGS,
    FAILURES,
    PROCESS_RESTARTS,
)

_REMEDIES = {
    "missing": "the tier's directory or store is gone: mount it again",
    "unreadable": "give the servers' user the permissions on root_dir",
    "io-error": "look at the disk (dmesg) or the network to it",
    "late": "look at how busy the medium is: it does not answer in time",
}
_ANY = "look at the first warning of the tier in the server's log, and at its medium"


def breaker(look: Look) -> Iterator[Finding]:
    """Out now, or between the reads; of earlier times it only tells."""
    for tier in look.tiers():
        openings = look.total(BREAKER_OPENINGS, tier=tier)
        is_open = bool(look.gauge(BREAKER_OPEN, tier=tier))
        if not (openings or is_open):
            continue
        operation, cause = _last(look, tier)
        lately = look.grew(BREAKER_OPENINGS, tier=tier)
        failures = causes(look.after.by("cause", FAILURES, tier=tier))
        now = "is left alone" if is_open else "was left alone, and is in use again,"
        yield Finding(
            "breaker",
            tier,
            f"the tier {now} since {operation or 'call'}s failed ({cause or 'unknown'}), "
            f"{count(max(openings, 1))} times since the start; failures: {failures or 'none'}",
            _REMEDIES.get(cause, _ANY) + "; kvstrata tries the tier again by itself",
            wrong=is_open or lately > 0,
        )


def restarts(look: Look) -> Iterator[Finding]:
    """I/O processes that were replaced since they hung or died."""
    for tier in look.tiers():
        if lately := look.grew(PROCESS_RESTARTS, tier=tier):
            yield Finding(
                "I/O processes restart",
                tier,
                f"{count(lately)} I/O processes of the tier were replaced while this looked "
                f"({count(look.total(PROCESS_RESTARTS, tier=tier))} since the start)",
                "they hang or die: look at the disk and the machine's memory (dmesg), and at the "
                "server's log",
            )


def _last(look: Look, tier: str) -> tuple[str, str]:
    """Operation and cause of the openings that came between the reads, else of most of them."""
    before = {_key(s.labels): s.value for s in look.before.matching(BREAKER_OPENINGS, tier=tier)}
    found = [
        (each.value - before.get(_key(each.labels), 0.0), each.value, *_key(each.labels))
        for each in look.after.matching(BREAKER_OPENINGS, tier=tier)
    ]
    _, _, operation, cause = max(found, default=(0.0, 0.0, "", ""))
    return operation, cause


def _key(labels: dict[str, str]) -> tuple[str, str]:
    return labels.get("operation", ""), labels.get("cause", "")
