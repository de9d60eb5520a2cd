"""Copies between KV cache blocks and pages: the Triton kernel, its launcher and its torch oracle.

All copies take the same arguments and move the same bytes. The one for CPUs is in `pack_cpu.py`,
so triton is needed only where a GPU is. The one for GPUs is prepared once (`Prepare`) for each
segment, and is left with a launch.

    segment: the plan; the caches are `segment.sets[...].views`.
    layout: where the worker's shard of the segment lies in a row of `pages`.
    pages: uint8 [rows, pitch], last stride 1.
    rows: int64 [n], the row of each page.
    block_ids: int64 [n, blocks_per_chunk]; -1 is a missing block, of which packing writes zeros
        and unpacking leaves everything alone.
    unpack: False copies blocks to pages, True copies pages to blocks.

Ids and rows are not looked at here: the caller has checked that they exist.
"""

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, Protocol

import torch

from kvstrata.kernels.plan import LayerSet, RowLayout, Segment

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only vLLM brings no triton
    triton = None


class Prepared(Protocol):
    """A copy of which only these arguments are open. They are not looked at.

    stream: handle of the stream to launch on, of the current device; None for the current stream.
    """

    def __call__(
        self,
        pages: torch.Tensor,
        rows: torch.Tensor,
        block_ids: torch.Tensor,
        stream: int | None = None,
    ) -> None: ...


class Prepare(Protocol):
    """Settles all that is the same in every copy of one segment in one direction.

    pitch: bytes from one row of pages to the next.
    alignment: bytes; divides the address of the first row.
    """

    def __call__(
        self, segment: Segment, layout: RowLayout, pitch: int, alignment: int, *, unpack: bool
    ) -> Prepared: ...


# Launch configuration: reasoned from the figures named here, not yet measured on hardware.
#
# The copy must outrun the link that its bytes travel over, with as little of the GPU as will do.
# By Little's law its rate is the bytes in flight over the time of one tile: MAX_PROGRAMS x
# TILE_BYTES = 256 KiB over an assumed 1 us (two memory accesses that wait for each other, block id
# and data, and the stores) is some 260 GB/s. A PCIe 5.0 x16 link moves 54 GB/s in runs of 128 KiB
# and more (vLLM's blog on its KV offloading connector, H100), so that a batch is packed in about a
# quarter of the time that its DMA takes. The same blog saw a copy kernel lose to DMA end to end
# because it held SMs that the model needed: hence short bursts on few SMs.

# What one program copies at a time: 64 bytes per thread in flight, in four 16-byte accesses. They
# take 16 registers, the whole kernel at most 40 on NVIDIA as compiled (256 bytes per thread took
# 90, 1024 spilled). It is also one head's slab of 16 tokens of head size 128 in bf16.
TILE_BYTES = 8192
# One 16-byte access per thread: a smaller tile would leave threads without work.
MIN_TILE_WORDS = 512
# 128 threads: 2 KiB per access. More warps mean fewer bytes per thread for the same tile.
NUM_WARPS = 4
# At most a quarter of an H100's 132 SMs, and of each of those 4 of 64 warps and a twelfth of the
# registers: the rest stays with the model.
MAX_PROGRAMS = 32
# Triton would pipeline the loop through shared memory, which a model's kernels want for themselves.
NUM_STAGES = 1


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
            tokens, planes, width = blocks.shape[2:]
            # this layer in every page: [rows, kernel blocks, H, N, P, E]
            start = (layout.offset + position * segment.slab_bytes) // size
            target = page_words.as_strided(
                (len(pages), ids.shape[1], *blocks.shape[1:]),
                (
                    page_words.stride(0),
                    tokens * planes * width,
                    layout.head_pitch // size,
                    planes * width,
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

    @triton.jit  # type: ignore[untyped-decorator]
    def _offset(  # type: ignore[no-untyped-def]
        word,
        ROWS: tl.constexpr,
        PLANES: tl.constexpr,
        PLANE: tl.constexpr,
        HEAD_STRIDE: tl.constexpr,
        ROW_STRIDE: tl.constexpr,
        PLANE_STRIDE: tl.constexpr,
    ):
        """Where the words of [heads, ROWS, PLANES, PLANE], counted in that order, lie.

        Every index comes straight from the word's number: the compiler does not see that words
        stay neighbours through a remainder of a remainder. 64 bits: strides pass 2^31 where
        layers or K and V lie outside the blocks.
        """
        head = (word // (ROWS * PLANES * PLANE)).to(tl.int64)
        row = ((word // (PLANES * PLANE)) % ROWS).to(tl.int64)
        plane = ((word // PLANE) % PLANES).to(tl.int64)
        return head * HEAD_STRIDE + row * ROW_STRIDE + plane * PLANE_STRIDE + word % PLANE

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
        PLANES: tl.constexpr,
        PLANE: tl.constexpr,  # words of one plane; so are all that follow but the last three
        BLOCK_STRIDE: tl.constexpr,
        HEAD_STRIDE: tl.constexpr,
        ROW_STRIDE: tl.constexpr,
        PLANE_STRIDE: tl.constexpr,
        OFFSET: tl.constexpr,
        HEAD_PITCH: tl.constexpr,
        EXTENT: tl.constexpr,  # see `_tiling`
        STEP: tl.constexpr,
        TILE: tl.constexpr,
        WORD_BYTES: tl.constexpr,
        ALIGNMENT: tl.constexpr,  # bytes that divide every address of a plane
        UNPACK: tl.constexpr,
    ):
        # Counts and addresses are not specialised, so that no call after the first compiles.
        SLAB: tl.constexpr = ROWS * PLANES * PLANE  # one kernel block of one head
        STEPS: tl.constexpr = (EXTENT + STEP - 1) // STEP
        TILES: tl.constexpr = (HEADS * SLAB) // EXTENT * STEPS
        INNER: tl.constexpr = BLOCKS * KERNEL_BLOCKS
        # A tile cuts one axis at most, so a word lies where the tile's first word lies plus a
        # distance that is the same in every tile: nothing is divided per word in the loop.
        lane = tl.arange(0, TILE)
        in_cache = _offset(lane, ROWS, PLANES, PLANE, HEAD_STRIDE, ROW_STRIDE, PLANE_STRIDE)
        in_page = _offset(lane, 1, 1, SLAB, HEAD_PITCH, 0, 0)
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            number = tl.cast(job, tl.uint32)  # divided without a sign
            tile = number % TILES
            block = (number // TILES) % INNER
            layer = (number // (TILES * INNER)) % LAYERS
            page = number // (TILES * INNER * LAYERS)
            block_id = tl.load(ids + page * BLOCKS + block // KERNEL_BLOCKS)
            row = tl.load(rows + page)
            cache = tl.load(table + 2 * layer).to(pages.dtype)
            in_head = tl.load(table + 2 * layer + 1) // WORD_BYTES + block.to(tl.int64) * SLAB

            step = (tile % STEPS) * STEP
            first = (tile // STEPS) * EXTENT + step
            inside = lane < STEP
            if EXTENT % STEP != 0:
                inside = inside & (step + lane < EXTENT)
            page_start = OFFSET + in_head + _offset(first, 1, 1, SLAB, HEAD_PITCH, 0, 0)
            page_words = tl.multiple_of(pages + row * pitch + page_start, ALIGNMENT) + in_page
            kernel_block = block_id * KERNEL_BLOCKS + block % KERNEL_BLOCKS
            cache_start = kernel_block * BLOCK_STRIDE + _offset(
                first, ROWS, PLANES, PLANE, HEAD_STRIDE, ROW_STRIDE, PLANE_STRIDE
            )
            cache_words = tl.multiple_of(cache + cache_start, ALIGNMENT) + in_cache
            # a mask, not a branch: the address in the table need not wait for the block id
            present = inside & (tl.zeros([TILE], tl.int64) + block_id >= 0)
            if UNPACK:
                tl.store(cache_words, tl.load(page_words, mask=present), mask=present)
            else:
                tl.store(page_words, tl.load(cache_words, mask=present, other=0), mask=inside)


def _tiling(sizes: Sequence[int], limit: int) -> tuple[int, int]:
    """(extent, step) in words: how the words of one block of one layer are cut into tiles.

    sizes: of the axes, innermost first, of which the first is in words.
    limit: words of a tile at most.
    A tile is all of the inner axes and a run of the next one, so that it cuts one axis at most:
    of `extent` words each tile takes `step`, and the last one what is left.
    """
    inner = 1
    for size in sizes:
        if inner * size > limit:
            return inner * size, limit // inner * inner
        inner *= size
    return inner, inner


def kernel_constants(
    segment: Segment, layers: LayerSet, layout: RowLayout, alignment: int, *, unpack: bool
) -> dict[str, Any]:
    """The compile-time arguments of the kernel for one set of layers.

    alignment: 16, 8, 4, 2 or 1; divides every address, stride and offset involved, in bytes.
    """
    size = min(alignment, 4)  # bytes of a word; wider accesses are vectors of words
    plane_words = layers.plane_bytes // size
    extent, step = _tiling(
        (plane_words, layers.planes, layers.rows, segment.local_heads), TILE_BYTES // size
    )
    block, head, row, plane = (stride // size for stride in layers.strides)
    return {
        "LAYERS": len(layers.positions),
        "BLOCKS": segment.blocks_per_chunk,
        "KERNEL_BLOCKS": layers.kernel_blocks,
        "HEADS": segment.local_heads,
        "ROWS": layers.rows,
        "PLANES": layers.planes,
        "PLANE": plane_words,
        "BLOCK_STRIDE": block,
        "HEAD_STRIDE": head,
        "ROW_STRIDE": row,
        "PLANE_STRIDE": plane,
        "OFFSET": layout.offset // size,
        "HEAD_PITCH": layout.head_pitch // size,
        "EXTENT": extent,
        "STEP": step,
        "TILE": max(MIN_TILE_WORDS, 1 << (step - 1).bit_length()),
        "WORD_BYTES": size,
        "ALIGNMENT": alignment,
        "UNPACK": unpack,
    }


def prepare_triton(
    segment: Segment, layout: RowLayout, pitch: int, alignment: int, *, unpack: bool
) -> Prepared:
    """The copy as kernel launches, one per set of layers, of which all tensors lie on the current
    device, contiguous but for the pages. Kernels are compiled here.

    Triton's own launcher takes some 60 us of the host's time to find the kernel for its arguments;
    the kernel itself, which its `warmup` returns, is launched in a few.
    """
    alignment = gcd(segment.word_bytes, alignment, pitch, *layout)
    words = {1: torch.uint8, 2: torch.int16}.get(alignment, torch.int32)
    pitch_words = pitch // words.itemsize
    launches = []
    for layers in segment.sets:
        constants = kernel_constants(segment, layers, layout, alignment, unpack=unpack)
        options = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
        types = (torch.int64, words, torch.int64, torch.int64, 1, pitch_words)
        kernel = _copy_kernel.warmup(*types, grid=(1,), **constants, **options)
        if kernel is None:  # Triton's interpreter compiles nothing
            kernel = _Interpreted(words, options)
        in_order = [constants[name] for name in _copy_kernel.arg_names[len(types) :]]
        launches.append((kernel, layers.table, _jobs(layers, constants), in_order))

    def copy(
        pages: torch.Tensor,
        rows: torch.Tensor,
        block_ids: torch.Tensor,
        stream: int | None = None,
    ) -> None:
        count = rows.shape[0]
        for kernel, table, jobs_per_page, others in launches:
            jobs = jobs_per_page * count
            if jobs > 2**31 - MAX_PROGRAMS:  # the loop's counter passes `jobs` by a stride at most
                raise ValueError(f"{count} pages are too many for one launch")
            grid = (min(MAX_PROGRAMS, jobs), 1, 1)
            open_arguments = (table, pages, rows, block_ids, jobs, pitch_words)
            kernel[grid](*open_arguments, *others, stream=stream)

    return copy


def _jobs(layers: LayerSet, constants: dict[str, Any]) -> int:
    """Tiles of one page."""
    words = constants["HEADS"] * constants["ROWS"] * constants["PLANES"] * constants["PLANE"]
    extent, step = constants["EXTENT"], constants["STEP"]
    tiles: int = words // extent * -(-extent // step)
    return tiles * len(layers.positions) * int(constants["BLOCKS"]) * layers.kernel_blocks


class _Interpreted:
    """The kernel in Triton's interpreter, launched as a compiled one is."""

    def __init__(self, words: torch.dtype, options: dict[str, int]) -> None:
        self._words, self._options = words, options

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(
            table: torch.Tensor, pages: torch.Tensor, *others: Any, stream: int | None
        ) -> None:
            size = self._words.itemsize
            length = (len(pages) - 1) * pages.stride(0) + pages.shape[1]
            flat = pages.as_strided((length // size * size,), (1,)).view(self._words)
            _copy_kernel[grid](table, flat, *others, **self._options)

        return launch
