"""A CPU tier that holds no more than the GPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count
from kvstrata.offload.metering.names import CAPACITY, PRIMARY
from kvstrata.tiers.options import format_bytes

# What to give at least: half again as much as the GPU holds is the least that is worth its room.
_WORTH_IT = 1.5


def cpu_size(look: Look) -> Iterator[Finding]:
    """Each page is stored as soon as it is computed, so the tiers hold what the GPU holds, and more
    only by as much as they are larger."""
    gpu, per_token = look.gpu_tokens(), look.bytes_per_token()
    if not (gpu and per_token):
        return
    for tier in (PRIMARY, *look.tiers()):
        room = look.gauge(CAPACITY, tier=tier)
        if not room or room / per_token > gpu:  # no limit, or one that is large enough
            return
    cpu = look.total(CAPACITY, tier=PRIMARY) / per_token
    yield Finding(
        "CPU tier too small",
        PRIMARY,
        f"the CPU tier has room for {count(cpu)} tokens, the GPU's cache for {count(gpu)}: pages "
        "are stored as soon as they are computed, so nearly all that it holds the GPU has as well",
        f"raise cpu_bytes_to_use above {format_bytes(int(_WORTH_IT * gpu * per_token))}, or add a "
        "tier in secondary_tiers that is larger than the GPU's cache",
    )
