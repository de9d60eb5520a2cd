"""The copy between KV cache blocks and pages in CPU memory, close to the speed of one memcpy.

Arguments: see `pack.py`, whose torch copy is the oracle. Every byte is moved once, in the longest
runs that are whole on both sides. Reading the blocks one by one, all heads of a layer with one
call, is the fastest way to pack. To unpack, one call per page finds the place of every run by its
address, so that the page is read from the beginning to the end.
"""

import numpy as np
import torch

from kvstrata.kernels.pack import check_arguments, kernel_block_ids
from kvstrata.kernels.plan import LayerSet, RowLayout, Segment
from kvstrata.kernels.runs import Runs, runs_at


def copy_cpu(
    segment: Segment,
    layout: RowLayout,
    pages: torch.Tensor,
    rows: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    unpack: bool,
) -> None:
    """The copy where caches and pages lie in CPU memory.

    Raises ValueError for arguments that do not fit the segment.
    """
    check_arguments(segment, layout, pages, rows, block_ids)
    copy = _unpack if unpack else _pack
    for layers in segment.sets:
        ids = kernel_block_ids(block_ids, layers.kernel_blocks)
        copy(layers, _page_runs(segment, layers, layout, pages), rows.tolist(), ids.numpy())


def _page_runs(segment: Segment, layers: LayerSet, layout: RowLayout, pages: torch.Tensor) -> Runs:
    """The runs of all pages, [rows, H, local layers, kernel blocks, N, P]."""
    _, heads, *_ = layers.views[0].shape
    kernel_blocks = segment.blocks_per_chunk * layers.kernel_blocks
    row = layers.parts * layers.part_bytes
    return runs_at(
        pages.data_ptr() + layout.offset,
        layers.part_bytes,
        (len(pages), heads, segment.local_layers, kernel_blocks, layers.rows, layers.parts),
        (
            pages.stride(0),
            layout.head_pitch,
            segment.slab_bytes,
            layers.rows * row,
            row,
            layers.part_bytes,
        ),
    )


def _pack(layers: LayerSet, pages: Runs, rows: list[int], ids: np.ndarray) -> None:
    zeros = np.zeros((), pages.dtype)
    by_block = pages.transpose(0, 3, 2, 1, 4, 5)
    caches = tuple(zip(layers.positions, layers.runs.layers, strict=True))
    for row, blocks in zip(rows, ids.tolist(), strict=True):
        for block, page in zip(blocks, by_block[row], strict=True):
            if block < 0:
                page[list(layers.positions)] = zeros
            else:
                for position, cache in caches:
                    page[position] = cache[block]


def _unpack(layers: LayerSet, pages: Runs, rows: list[int], ids: np.ndarray) -> None:
    first, count = layers.positions[0], len(layers.positions)
    neighbours = layers.positions[-1] - first + 1 == count
    # a list copies what it picks, a slice does not
    pick = slice(first, first + count) if neighbours else list(layers.positions)
    present = ids >= 0
    whole: list[bool] = np.all(present, axis=1).tolist()
    memory, starts = layers.runs.memory, layers.runs.starts
    places = starts + (ids * layers.strides[0])[:, None, None, :, None, None]
    for i, row in enumerate(rows):
        page = pages[row][:, pick]
        if whole[i]:
            memory[places[i]] = page
        else:
            memory[places[i][:, :, present[i]]] = page[:, :, present[i]]
