"""What the scheduler tells the workers of a transfer, and how blocks fall into pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec

from kvstrata.kernels.pipeline import GroupWork

NULL_BLOCK = 0  # vLLM's placeholder block, which holds nothing
MISSING = -1


class PageSlots(LoadStoreSpec):
    """The host side of a transfer.

    Attributes:
        ticket: number of the transfer, from 1; the scheduler hands them out without gaps.
        slots: int64 [n], in the order of the groups and of the chunks inside a group.
        groups: int32 [n], the KV cache group index of each slot.
    """

    def __init__(self, ticket: int, slots: Sequence[int], groups: npt.ArrayLike) -> None:
        self.ticket = ticket
        self.slots = np.array(slots, dtype=np.int64)
        self.groups = np.array(groups, dtype=np.int32)

    def __repr__(self) -> str:
        return f"PageSlots(ticket={self.ticket}, slots={self.slots.tolist()})"


def work_of(
    pages: PageSlots,
    blocks: GPULoadStoreSpec,
    group_ids: Sequence[int],
    blocks_per_chunk: int,
    *,
    store: bool,
) -> list[GroupWork]:
    """Distribute the GPU's blocks over the pages.

    vLLM names the blocks of each group in order and gives the index of the first. A load
    fills a run of chunks without gaps, and may begin and end inside a page. A store has
    chunks that need not follow each other, each with its last block, and leaves out
    blocks that a request no longer has: only a gap before the first block is certain;
    otherwise all pages of the group are marked as missing their blocks.

    Args:
        pages: the host side.
        blocks: the GPU side, one run of blocks per group in the order of `group_ids`.
        group_ids: vLLM's index of each configured group.
        blocks_per_chunk: blocks in a page.
        store: whether this is a store.

    Returns:
        For each group with pages the slots and block ids int64 [pages, blocks_per_chunk],
        -1 where a page has no block.

    Raises:
        ValueError: the blocks of a load do not fit its pages; loading nothing instead would
            leave the request with wrong content.
    """
    work: list[GroupWork] = []
    start = 0
    for index, group in enumerate(group_ids):
        count = blocks.group_sizes[index]
        ids = blocks.block_ids[start : start + count].astype(np.int64)
        start += count
        slots = pages.slots[pages.groups == group]
        if not len(slots):
            continue
        room = len(slots) * blocks_per_chunk
        table = np.full(room, MISSING, dtype=np.int64)
        lead = blocks.block_indices[index] % blocks_per_chunk
        end = lead + count
        if not store and not room - blocks_per_chunk < end <= room:
            raise ValueError(
                f"group {group}: {count} blocks from block {blocks.block_indices[index]} on "
                f"do not end in the last of {len(slots)} pages"
            )
        if end == room or not store:
            table[lead:end] = ids
            table[table == NULL_BLOCK] = MISSING
        work.append(GroupWork(group, slots, table.reshape(len(slots), blocks_per_chunk)))
    return work


def incomplete(work: GroupWork) -> list[int]:
    """The slots whose pages miss a block."""
    slots: list[int] = work.slots[(work.block_ids == MISSING).any(axis=1)].tolist()
    return slots
