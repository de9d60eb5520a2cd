"""All faults, and whether there was enough traffic to judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvstrata.offload.cli.server.faults.audits import audits
from kvstrata.offload.cli.server.faults.breaker import breaker, restarts
from kvstrata.offload.cli.server.faults.cpu_size import cpu_size
from kvstrata.offload.cli.server.faults.eviction import budget, thrashing
from kvstrata.offload.cli.server.faults.memory import incomplete, no_room, not_ready
from kvstrata.offload.cli.server.faults.quarantine import quarantine
from kvstrata.offload.cli.server.faults.requests import no_lookups, wishes
from kvstrata.offload.cli.server.faults.slow_tier import slow_tier
from kvstrata.offload.cli.server.faults.stores import behind, stores_fail
from kvstrata.offload.cli.server.faults.unused import unused
from kvstrata.offload.cli.server.faults.waits import deadlines, net
from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count
from kvstrata.offload.metering.names import PRIMARY, QUERY_CHUNKS

Fault = Callable[[Look], Iterator[Finding]]

# What is so at once
PRESENT: tuple[Fault, ...] = (
    breaker,
    audits,
    stores_fail,
    quarantine,
    not_ready,
    restarts,
    cpu_size,
    no_lookups,
    wishes,
)
# What shows in the traffic since the start
HISTORY: tuple[Fault, ...] = (
    thrashing,
    budget,
    unused,
    slow_tier,
    behind,
    no_room,
    incomplete,
    deadlines,
    net,
)
# Chunks of prompts: some twenty prompts of ten chunks each. From fewer nothing can be told.
LEAST_CHUNKS = 200


def judge(look: Look) -> list[Finding]:
    """What is wrong at one engine, the worst first, and what cannot be judged."""
    found = [finding for fault in PRESENT for finding in fault(look)]
    chunks = look.total(QUERY_CHUNKS, tier=PRIMARY)
    if chunks >= LEAST_CHUNKS:
        found += [finding for fault in HISTORY for finding in fault(look)]
    elif not look.ours:
        found.append(
            Finding(
                "vLLM's own manager",
                "engine",
                "kvstrata's tiers run in vLLM's own manager: their failures are judged, but not "
                "sizes and reuse, which kvstrata's manager alone measures",
                "KVStrataSpec has both (docs/stock.md)",
                wrong=False,
            )
        )
    else:
        found.append(
            Finding(
                "too little traffic",
                "engine",
                f"requests needed {count(chunks)} chunks since the start; sizes, speed and reuse "
                f"are judged from {LEAST_CHUNKS} on",
                "look again when it has served more",
                wrong=False,
            )
        )
    return sorted(found, key=lambda finding: not finding.wrong)
