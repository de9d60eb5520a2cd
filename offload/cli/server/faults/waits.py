"""Requests that wait for tiers in vain, or longer than it is worth."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import causes, count, share, span
from kvstrata.offload.metering.names import (
    DEADLINE_MISSES,
    PREFILL_SPEED,
    SAVED_SECONDS,
    WAIT_SECONDS,
)

_REQUESTS = "vllm:request_success"
# A request in a hundred that waits in vain shows in the 99th percentile.
_LEAST_SHARE = 0.01
_LEAST_MISSES = 10
# Less is not worth a word, whatever it saved.
_LEAST_WAIT_S = 10.0


def deadlines(look: Look) -> Iterator[Finding]:
    """Waits that ended at their deadline, and the request computed."""
    misses, requests = look.total(DEADLINE_MISSES), look.total(_REQUESTS)
    if misses < _LEAST_MISSES or misses < _LEAST_SHARE * requests:
        return
    yield Finding(
        "deadlines missed",
        "waits",
        f"{count(misses)} waits in {count(requests)} requests ({share(misses, requests)}) ended at "
        f"their deadline ({causes(look.after.by('wait', DEADLINE_MISSES))}), "
        f"{count(look.grew(DEADLINE_MISSES))} of them while this looked: they waited in vain",
        'set "load_or_recompute": true, so that nobody waits for what comes too late; or find out '
        "why the tier is slow; promotion_deadline_s and lookup_deadline_s bound the waits, also in "
        "a tier's entry",
    )


def net(look: Look) -> Iterator[Finding]:
    """All in all: what was waited against what was saved."""
    waited, saved = look.total(WAIT_SECONDS), look.total(SAVED_SECONDS)
    if waited < _LEAST_WAIT_S or waited < saved or not look.gauge(PREFILL_SPEED):
        return
    yield Finding(
        "costs more than it saves",
        "waits",
        f"requests waited {span(waited)} for tiers, which saved them {span(saved)} of computing",
        'set "load_or_recompute": true; of a tier that is slow lower lookup_deadline_s and '
        "promotion_deadline_s in its entry, or take it out",
    )
