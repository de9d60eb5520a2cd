"""The copy between KV cache blocks and pages in CPU memory, close to the speed of one memcpy.

Arguments: see `pack.py`, whose torch copy is the oracle. Every byte is moved once, in the longest
runs that are whole on both sides, to places that are computed for all runs at once. A processor
reads fastest in order and is less particular about where it writes. So packing goes layer by
layer in the order of the block ids, with one call for blocks that are neighbours; unpacking reads
each page from its beginning to its end with one call.
"""

import numpy as np
import torch

from kvstrata.kernels.pack import check_arguments, kernel_block_ids
from kvstrata.kernels.plan import LayerSet, RowLayout, Segment
from kvstrata.kernels.runs import Runs, places, runs_at, runs_from


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
    row = layers.planes * layers.plane_bytes
    return runs_at(
        pages.data_ptr() + layout.offset,
        layers.plane_bytes,
        (len(pages), heads, segment.local_layers, kernel_blocks, layers.rows, layers.planes),
        (
            pages.stride(0),
            layout.head_pitch,
            segment.slab_bytes,
            layers.rows * row,
            row,
            layers.plane_bytes,
        ),
    )


def _pack(layers: LayerSet, pages: Runs, rows: list[int], ids: np.ndarray) -> None:
    absent = ids < 0
    for i in np.flatnonzero(absent.any(axis=1)):
        for position in layers.positions:
            pages[rows[i], :, position][:, absent[i]] = np.zeros((), pages.dtype)

    order = np.argsort(ids, axis=None)[np.count_nonzero(absent) :]
    blocks = ids.ravel()[order]
    starts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    neighbours = list(
        zip(
            starts.tolist(),
            np.append(starts, len(blocks))[1:].tolist(),
            blocks[starts].tolist(),
            strict=True,
        )
    )
    page, block = np.divmod(order, ids.shape[1])
    pitch, head, layer, inner, *row = pages.strides
    begin = np.array(rows)[page] * pitch + block * inner
    inside = begin[:, None, None, None] + places((pages.shape[1], *pages.shape[4:]), (head, *row))
    targets = np.array(layers.positions)[:, None, None, None, None] * layer + inside
    memory = runs_from(pages)
    for here, cache in zip(targets, layers.runs.layers, strict=True):
        for start, end, first in neighbours:
            memory[here[start:end]] = cache[first : first + end - start]


def _unpack(layers: LayerSet, pages: Runs, rows: list[int], ids: np.ndarray) -> None:
    first, count = layers.positions[0], len(layers.positions)
    neighbours = layers.positions[-1] - first + 1 == count
    # a list copies what it picks, a slice does not
    pick = slice(first, first + count) if neighbours else list(layers.positions)
    present = ids >= 0
    whole: list[bool] = np.all(present, axis=1).tolist()
    memory, starts = layers.runs.memory, layers.runs.starts
    targets = starts + (ids * layers.strides[0])[:, None, None, :, None, None]
    for i, row in enumerate(rows):
        page = pages[row][:, pick]
        if whole[i]:
            memory[targets[i]] = page
        else:
            memory[targets[i][:, :, present[i]]] = page[:, :, present[i]]
