"""What a foreign tier has of a page: the row, sealed by somebody else."""

import os

from kvstrata.offload.vllm_plugin.foreign_tiers.rows import Rows
from kvstrata.offload.vllm_plugin.foreign_tiers.seal import Seals
from kvstrata.tiers.base import PageRegion, TierContext


def make_region(slots: int, slot_bytes: int = 4096) -> PageRegion:
    """Shared memory with no more than the slots."""
    fd = os.memfd_create("kvstrata-test-rows")
    os.ftruncate(fd, slots * slot_bytes)
    return PageRegion(fd, 0, slot_bytes, slots)


def row_of(context: TierContext, key: bytes, data: bytes) -> bytes:
    """The row with the page and its seal."""
    assert context.region is not None
    region = make_region(1, context.region.slot_bytes)
    rows = Rows(region)
    os.close(region.fd)
    rows.page(0, len(data))[:] = data
    Seals(context, rows).put([key], [0])
    return bytes(rows.page(0, region.slot_bytes))
