"""Copies between KV cache blocks and pages: the Triton kernel, its launcher and its torch oracle.

All copies take the same arguments and move the same bytes. The one for CPUs is in `pack_cpu.py`,
so triton is needed only where a GPU is.

    segment: the plan; the caches are `segment.sets[...].views`.
    layout: where the worker's part of the segment lies in a row of `pages`.
    pages: uint8 [rows, pitch], last stride 1.
    rows: int64 [n], the row of each page.
    block_ids: int64 [n, blocks_per_chunk]; -1 is a missing block, of which packing writes zeros
        and unpacking leaves everything alone.
    unpack: False copies blocks to pages, True copies pages to blocks.

Ids and rows are not looked at here: the caller has checked that they exist.
"""

from math import gcd
from typing import Any, Protocol

import torch

from kvstrata.kernels.plan import LayerSet, RowLayout, Segment

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only vLLM brings no triton
    triton = None


class Copy(Protocol):
    """What all copies are, for who calls any of them. Arguments: see the module."""

    def __call__(
        self,
        segment: Segment,
        layout: RowLayout,
        pages: torch.Tensor,
        rows: torch.Tensor,
        block_ids: torch.Tensor,
        *,
        unpack: bool,
    ) -> None: ...


# Starting values after the design's compiler study; a tile is what one program copies at a time:
# 64 bytes per thread, about 32 registers.
TILE_BYTES = 8192
MIN_TILE_WORDS = 512  # one 16-byte access per thread
NUM_WARPS = 4
MAX_PROGRAMS = 32  # few enough to leave the SMs to the model


def copy_torch(
    segment: Segment,
    layout: RowLayout,
    pages: torch.Tensor,
    rows: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    unpack: bool,
) -> None:
    """The copy in torch, on any device. Arguments: see the module.

    Raises ValueError for arguments that do not fit the segment.
    """
    check_arguments(segment, layout, pages, rows, block_ids)
    if rows.numel() == 0:
        return
    alignment = _word_bytes(segment, layout, pages)
    for layers in segment.sets:
        ids = kernel_block_ids(block_ids, layers.kernel_blocks)
        page, block = (ids >= 0).nonzero(as_tuple=True)
        present = ids[page, block]
        normal = layers.views[0]
        word = gcd(alignment, normal.shape[-1], *normal.stride()[:-1])
        dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(word, torch.int64)
        size = dtype.itemsize
        page_words = pages.view(dtype)
        for position, cache in zip(layers.positions, layers.views, strict=True):
            blocks = cache.view(dtype)
            tokens, parts, width = blocks.shape[2:]
            # this layer in every page: [rows, kernel blocks, H, N, P, E]
            start = (layout.offset + position * segment.slab_bytes) // size
            target = page_words.as_strided(
                (len(pages), ids.shape[1], *blocks.shape[1:]),
                (
                    page_words.stride(0),
                    tokens * parts * width,
                    layout.head_pitch // size,
                    parts * width,
                    width,
                    1,
                ),
                page_words.storage_offset() + start,
            )
            if unpack:
                blocks[present] = target[rows[page], block]
            else:
                if present.numel() < ids.numel():
                    target[rows] = 0
                target[rows[page], block] = blocks[present]


def check_arguments(
    segment: Segment,
    layout: RowLayout,
    pages: torch.Tensor,
    rows: torch.Tensor,
    block_ids: torch.Tensor,
) -> None:
    """Raise ValueError for arguments of a copy that do not fit the segment."""
    if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.stride(1) != 1:
        raise ValueError("pages must be uint8 [rows, pitch] with last stride 1")
    length = segment.local_layers * segment.slab_bytes
    end = layout.offset + (segment.local_heads - 1) * layout.head_pitch + length
    if layout.offset < 0 or layout.head_pitch < length or end > pages.shape[1]:
        raise ValueError(f"{layout} does not fit into rows of {pages.shape[1]} bytes")
    if rows.dtype != torch.int64 or block_ids.dtype != torch.int64:
        raise ValueError("rows and block_ids must be int64")
    if block_ids.shape != (rows.numel(), segment.blocks_per_chunk) or rows.ndim != 1:
        raise ValueError(
            f"rows {tuple(rows.shape)} and block_ids {tuple(block_ids.shape)} do not fit "
            f"{segment.blocks_per_chunk} blocks per chunk"
        )


def _word_bytes(segment: Segment, layout: RowLayout, pages: torch.Tensor) -> int:
    numbers = (pages.data_ptr(), pages.storage_offset(), *pages.stride()[:1], *pages.shape[1:])
    return gcd(segment.word_bytes, *numbers, *layout)


def kernel_block_ids(block_ids: torch.Tensor, kernel_blocks: int) -> torch.Tensor:
    """int64 [n, blocks_per_chunk * kernel_blocks]: each block's kernel blocks in order."""
    if kernel_blocks == 1:
        return block_ids
    inner = torch.arange(kernel_blocks, device=block_ids.device)
    ids = block_ids.unsqueeze(2) * kernel_blocks + inner
    return ids.where(block_ids.unsqueeze(2) >= 0, -1).flatten(1)


if triton is not None:

    @triton.jit(do_not_specialize=["table", "pages", "rows", "ids", "jobs", "pitch"])  # type: ignore[untyped-decorator]
    def _copy_kernel(  # type: ignore[no-untyped-def]
        table,  # int64 [LAYERS, 2]: address of the cache, bytes from a head's start to the layer
        pages,  # words [rows, pitch]
        rows,  # int64 [n]
        ids,  # int64 [n, BLOCKS]
        jobs,  # n * LAYERS * BLOCKS * KERNEL_BLOCKS * tiles
        pitch,  # words
        LAYERS: tl.constexpr,
        BLOCKS: tl.constexpr,  # blocks per chunk
        KERNEL_BLOCKS: tl.constexpr,  # kernel blocks per block
        HEADS: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
        PART: tl.constexpr,  # words of one part; so are all that follow but the last three
        BLOCK_STRIDE: tl.constexpr,
        HEAD_STRIDE: tl.constexpr,
        ROW_STRIDE: tl.constexpr,
        PART_STRIDE: tl.constexpr,
        OFFSET: tl.constexpr,
        HEAD_PITCH: tl.constexpr,
        TILE: tl.constexpr,
        WORD_BYTES: tl.constexpr,
        ALIGNMENT: tl.constexpr,  # bytes that divide every address of a part
        UNPACK: tl.constexpr,
    ):
        # Counts and addresses are not specialised, so that no call after the first compiles.
        SLAB: tl.constexpr = ROWS * PARTS * PART  # one kernel block of one head
        TILES: tl.constexpr = (HEADS * SLAB + TILE - 1) // TILE
        INNER: tl.constexpr = BLOCKS * KERNEL_BLOCKS
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            tile = job % TILES
            block = (job // TILES) % INNER
            layer = (job // (TILES * INNER)) % LAYERS
            page = job // (TILES * INNER * LAYERS)
            block_id = tl.load(ids + page * BLOCKS + block // KERNEL_BLOCKS)
            row = tl.load(rows + page)
            in_head = tl.load(table + 2 * layer + 1) // WORD_BYTES + block * SLAB

            # Every index comes straight from the word's number: the compiler does not see that
            # words stay neighbours through a remainder of a remainder.
            word = tile * TILE + tl.arange(0, TILE)
            inside = word < HEADS * SLAB
            head = (word // SLAB).to(tl.int64)
            page_base = tl.multiple_of(pages + row * pitch + (OFFSET + in_head), ALIGNMENT)
            page_words = page_base + (head * HEAD_PITCH + word % SLAB)
            if block_id >= 0:
                # 64 bits: strides pass 2^31 where layers or K and V lie outside the blocks
                part = ((word // PART) % PARTS).to(tl.int64)
                token = ((word // (PART * PARTS)) % ROWS).to(tl.int64)
                cache = tl.load(table + 2 * layer).to(pages.dtype)
                kernel_block = block_id * KERNEL_BLOCKS + block % KERNEL_BLOCKS
                cache_base = tl.multiple_of(cache + kernel_block * BLOCK_STRIDE, ALIGNMENT)
                outer = head * HEAD_STRIDE + token * ROW_STRIDE + part * PART_STRIDE
                cache_words = cache_base + (outer + word % PART)
                if UNPACK:
                    tl.store(cache_words, tl.load(page_words, mask=inside), mask=inside)
                else:
                    tl.store(page_words, tl.load(cache_words, mask=inside), mask=inside)
            else:
                if not UNPACK:
                    zeros = tl.zeros([TILE], dtype=pages.dtype.element_ty)
                    tl.store(page_words, zeros, mask=inside)


def kernel_constants(
    segment: Segment, layers: LayerSet, layout: RowLayout, alignment: int, *, unpack: bool
) -> dict[str, Any]:
    """The compile-time arguments of the kernel for one set of layers.

    alignment: 16, 8, 4, 2 or 1; divides every address, stride and offset involved, in bytes.
    """
    size = min(alignment, 4)  # bytes of a word; wider accesses are vectors of words
    words = segment.local_heads * layers.rows * layers.parts * layers.part_bytes // size
    block, head, row, part = (stride // size for stride in layers.strides)
    return {
        "LAYERS": len(layers.positions),
        "BLOCKS": segment.blocks_per_chunk,
        "KERNEL_BLOCKS": layers.kernel_blocks,
        "HEADS": segment.local_heads,
        "ROWS": layers.rows,
        "PARTS": layers.parts,
        "PART": layers.part_bytes // size,
        "BLOCK_STRIDE": block,
        "HEAD_STRIDE": head,
        "ROW_STRIDE": row,
        "PART_STRIDE": part,
        "OFFSET": layout.offset // size,
        "HEAD_PITCH": layout.head_pitch // size,
        "TILE": min(TILE_BYTES // size, max(MIN_TILE_WORDS, 1 << (words - 1).bit_length())),
        "WORD_BYTES": size,
        "ALIGNMENT": alignment,
        "UNPACK": unpack,
    }


def copy_triton(
    segment: Segment,
    layout: RowLayout,
    pages: torch.Tensor,
    rows: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    unpack: bool,
) -> None:
    """The copy as kernel launches on the current stream, one per set of layers.

    Everything must lie on the segment's device. Arguments: see the module.
    Raises ValueError for arguments that do not fit the segment.
    """
    check_arguments(segment, layout, pages, rows, block_ids)
    if rows.numel() == 0:
        return
    if not (rows.is_contiguous() and block_ids.is_contiguous()):
        raise ValueError("rows and block_ids must be contiguous")
    alignment = _word_bytes(segment, layout, pages)
    dtype = {1: torch.uint8, 2: torch.int16}.get(alignment, torch.int32)
    for layers in segment.sets:
        constants = kernel_constants(segment, layers, layout, alignment, unpack=unpack)
        slab = constants["ROWS"] * constants["PARTS"] * constants["PART"]
        tiles = -(-constants["HEADS"] * slab // constants["TILE"])
        jobs = tiles * len(layers.positions) * block_ids.numel() * layers.kernel_blocks
        if jobs >= 2**31:
            raise ValueError(f"{rows.numel()} pages are too many for one launch")
        _copy_kernel[(min(MAX_PROGRAMS, jobs),)](
            layers.table,
            pages.view(dtype),
            rows,
            block_ids,
            jobs,
            pages.stride(0) // dtype.itemsize,
            **constants,
            num_warps=NUM_WARPS,
            num_stages=1,
        )


def copy_for(device: torch.device) -> Copy:
    """The copy that is used in production for caches on `device`."""
    from kvstrata.kernels.pack_cpu import copy_cpu

    return copy_cpu if device.type == "cpu" else copy_triton
