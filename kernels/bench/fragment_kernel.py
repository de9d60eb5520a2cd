"""How stock vLLM loads small pieces: a kernel on a few multiprocessors reads them in host memory.

vLLM chose it (#42212, H100) because `cuMemcpyBatchAsync` moves pieces below 28 KiB to a GPU at a
tenth of the link's speed. Larger pieces and all stores are left to that function.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvstrata.kernels.gpu.device import Pieces

# Of vLLM's v1/kv_offload/cpu/swap_blocks_triton.py
PROGRAMS = 12
LIMIT_BYTES = 28 << 10  # pieces of this size and more go by DMA
LEAST_PIECES = 16  # so do fewer pieces
_WORD = 8  # bytes; pieces of other sizes go by DMA
_TILE = 1024  # words


def takes(pieces: Pieces) -> bool:
    """Whether stock would load these by its kernel."""
    sizes = pieces.sizes
    return (
        len(sizes) >= LEAST_PIECES
        and sizes.max() < LIMIT_BYTES
        and not ((sizes | pieces.host | pieces.device) % _WORD).any()
    )


def load(pieces: Pieces, device: torch.device) -> None:
    """Queue the copy to the device on the current stream."""
    columns = (torch.from_numpy(one).to(device, non_blocking=True) for one in pieces)
    _load_pieces[(PROGRAMS,)](*columns, len(pieces.sizes), TILE=_TILE, WORD=_WORD)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _load_pieces(  # type: ignore[no-untyped-def]
    device,  # int64 [count], addresses to write to
    host,  # int64 [count], addresses to read
    sizes,  # int64 [count], bytes
    count,
    TILE: tl.constexpr,  # words
    WORD: tl.constexpr,  # bytes
):
    lane = tl.arange(0, TILE)
    for piece in range(tl.program_id(0), count, tl.num_programs(0)):
        to = tl.load(device + piece).to(tl.pointer_type(tl.int64))
        source = tl.load(host + piece).to(tl.pointer_type(tl.int64))
        words = tl.load(sizes + piece) // WORD
        for first in range(0, words, TILE):
            word = first + lane
            tl.store(to + word, tl.load(source + word, mask=word < words), mask=word < words)
