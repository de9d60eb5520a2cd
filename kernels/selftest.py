"""The byte round trip on the real KV caches, made once before any request."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvstrata.kernels.geometry import GeometryError
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.plan import Segment

_UNTOUCHED = 0xA5  # what scratch pages hold before the copy


def check_round_trip(segments: Sequence[Segment]) -> None:
    """Pack and unpack a pattern through one group's caches, which are left as they were found.

    segments: the plan of one group on this worker. Two pages are tried: one of the caches' first
        blocks and one of the last block alone. All layers of the group are written before any is
        read, by the oracle: the pipelines compare their own copies with it.
    Raises GeometryError, naming the layer, when bytes arrive elsewhere or layers share memory.
    """
    trips = [_RoundTrip(segment, seed) for seed, segment in enumerate(segments)]
    saved = [[block.clone() for *_, block in trip.blocks()] for trip in trips]
    try:
        for trip in trips:
            trip.write(trip.pattern)
        for trip in trips:
            trip.check_pack()
        for trip in trips:
            trip.write(~trip.pattern)
        for trip in trips:
            trip.unpack()
        for trip in trips:
            trip.check_blocks()
    finally:
        for trip, contents in zip(trips, saved, strict=True):
            for (*_, block), content in zip(trip.blocks(), contents, strict=True):
                block.copy_(content)


class _RoundTrip:
    """One segment's blocks, and the bytes they must hold."""

    def __init__(self, segment: Segment, seed: int) -> None:
        self.segment = segment
        blocks = segment.blocks_per_chunk
        first = list(range(min(blocks, segment.num_blocks)))
        ids = [first] if segment.num_blocks <= blocks else [first, [segment.num_blocks - 1]]
        padded = [row + [-1] * (blocks - len(row)) for row in ids]
        device = segment.device
        self.ids = torch.tensor(padded, dtype=torch.int64, device=device)
        self.rows = torch.arange(len(ids), device=device)
        sizes = (len(ids), segment.local_heads, segment.local_layers, blocks, segment.block_bytes)
        random = np.random.default_rng(seed).integers(0, 256, sizes, dtype=np.uint8)
        self.pattern = torch.from_numpy(random).to(device)
        self.layout = segment.in_page

    def blocks(self) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """(page, layer, index in the page, the block's kernel blocks [k, H, N, P, E])."""
        for layers in self.segment.sets:
            k = layers.kernel_blocks
            for layer, view in zip(layers.positions, layers.views, strict=True):
                for page, row in enumerate(self.ids.tolist()):
                    for index, block in enumerate(row):
                        if block >= 0:
                            yield page, layer, index, view[block * k : block * k + k]

    def write(self, pattern: torch.Tensor) -> None:
        for page, layer, index, block in self.blocks():
            block.copy_(self._as_block(pattern[page, :, layer, index], block))

    def _as_block(self, content: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`content` [H, block bytes] in the shape [k, H, N, P, E]."""
        kernel_blocks, heads, *inner = like.shape
        return content.reshape(heads, kernel_blocks, *inner).transpose(0, 1)

    def _scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(pages, this segment's shard of them, in the pattern's shape)."""
        segment, layout = self.segment, self.layout
        layers_bytes = segment.local_layers * segment.slab_bytes
        end = layout.offset + (segment.local_heads - 1) * layout.head_pitch + layers_bytes
        pitch = end + (-end) % 16 + 16  # room for a stray write after the shard
        pages = torch.full(
            (len(self.rows), pitch), _UNTOUCHED, dtype=torch.uint8, device=segment.device
        )
        strides = (pitch, layout.head_pitch, segment.slab_bytes, segment.block_bytes, 1)
        return pages, pages.as_strided(self.pattern.shape, strides, layout.offset)

    def check_pack(self) -> None:
        pages, shard = self._scratch()
        copy_torch(self.segment, self.layout, pages, self.rows, self.ids, unpack=False)
        present = (self.ids >= 0).view(len(self.ids), 1, -1, 1)
        for layer, name in enumerate(self.segment.names):
            wanted = self.pattern[:, :, layer] * present
            if not torch.equal(shard[:, :, layer], wanted):
                raise GeometryError(
                    f"layer {name}: packing its blocks gave other bytes; does it share memory "
                    "with another layer?"
                )
        shard.fill_(_UNTOUCHED)
        if not bool((pages == _UNTOUCHED).all()):
            raise GeometryError(f"layer {self.segment.names[0]}: packing wrote outside its pages")

    def unpack(self) -> None:
        pages, shard = self._scratch()
        shard.copy_(self.pattern)
        copy_torch(self.segment, self.layout, pages, self.rows, self.ids, unpack=True)

    def check_blocks(self) -> None:
        for page, layer, index, block in self.blocks():
            if not torch.equal(block, self._as_block(self.pattern[page, :, layer, index], block)):
                raise GeometryError(
                    f"layer {self.segment.names[layer]}: unpacking gave its blocks other bytes"
                )
