"""Bytes are compared before they are trusted: what a way of moving pages does, and what it should.

A pattern is moved between blocks and pages of the region, and blocks and pages are compared with
those that the oracle (`copy_torch`) makes of the same pattern in memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.plan import Segment

# Moves pages and returns when they are there: slots int64 [n], block ids int64 [n, width].
Move = Callable[[np.ndarray, np.ndarray], None]

# Enough for more pages than "few" of a choice (`transport.FEW_PAGES`), and soon done.
COMPARED_BYTES = 8 << 20
MOST_PAGES = 64
_GUARD_BYTES = 4096  # of a slot after the page: they must stay as they are
CPU = torch.device("cpu")


class Scratch:
    """Some blocks of a segment and some slots of the region, which are put back as they were.

    blocks: int64 [m], ids. slots: int64 [s]. drain: returns when no queued work can touch them.
    """

    def __init__(
        self,
        segment: Segment,
        region: torch.Tensor,
        blocks: np.ndarray,
        slots: np.ndarray,
        drain: Callable[[], None],
    ) -> None:
        self._segment = segment
        self._blocks = blocks
        self._slots = torch.from_numpy(slots)
        end = segment.page_offset + segment.heads * segment.head_bytes + _GUARD_BYTES
        self._region = region[:, : min(end, region.shape[1])]
        self._drain = drain

    def read(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What the blocks hold, for each layer of each set uint8 [m * kernel blocks, H, N, P, E] in
        CPU memory; and the pages, uint8 [s, bytes]."""
        caches = [view[index].to(CPU) for view, index in self._views()]
        return caches, self._region[self._slots]

    def write(self, caches: list[torch.Tensor], pages: torch.Tensor) -> None:
        """Let them hold this."""
        for (view, index), content in zip(self._views(), caches, strict=True):
            view[index] = content.to(view.device)
        self._region[self._slots] = pages

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put back, in any case, what is there now."""
        before = self.read()
        try:
            yield
        finally:
            self._drain()
            self.write(*before)

    def _views(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The layers' views, and the kernel blocks in them."""
        for layers in self._segment.sets:
            k = layers.kernel_blocks
            index = torch.from_numpy((self._blocks[:, None] * k + np.arange(k)).ravel())
            for view in layers.views:
                yield view, index.to(view.device)


class Comparison:
    """What ways of moving pages of one segment do."""

    def __init__(
        self,
        segment: Segment,
        region: torch.Tensor,
        slots: range,
        drain: Callable[[], None] = lambda: None,
    ) -> None:
        """region: uint8 [slots, slot bytes] in CPU memory. slots: of it, used by nobody
        else, one at least; the first ones are used. drain: see `Scratch`."""
        self._segment = segment
        width, blocks = segment.blocks_per_chunk, segment.num_blocks
        pages = max(1, min(COMPARED_BYTES // segment.shard_bytes, MOST_PAGES, blocks // width))
        # one slot and one block more, where there is one, that nothing is to touch
        mine = [slot for slot in slots if slot % segment.replicas == segment.replica]
        others = [slot for slot in slots if slot % segment.replicas != segment.replica]
        chosen = (mine + others)[: pages + 1]
        self._most = max(1, min(pages, len(chosen) - 1))
        self._slots = np.array(chosen, dtype=np.int64)
        count = min(blocks, self._most * width + 1)
        # neighbours, and the last block of all: the farthest in memory
        self._blocks = np.append(np.arange(count - 1), blocks - 1)
        self._random = np.random.default_rng(0)
        self._scratch = Scratch(segment, region, self._blocks, self._slots, drain)
        caches, pages_before = self._scratch.read()
        self._caches = [self._bytes(cache.shape) for cache in caches]
        self._pages = self._bytes(pages_before.shape)

    def difference(self, move: Move, *, store: bool) -> str | None:
        """What a way does otherwise than the oracle, in words; None if nothing.

        Blocks and pages are as before afterwards, also when `move` raises.
        """
        with self._scratch.kept():
            for count in sorted({1, self._most}):
                for gaps in (False, True):
                    found = self._move_and_compare(move, count, gaps=gaps, store=store)
                    if found:
                        what = "storing" if store else "loading"
                        with_gaps = " with missing blocks" if gaps else ""
                        return f"{what} {count} pages{with_gaps} {found}"
        return None

    def _move_and_compare(self, move: Move, count: int, *, gaps: bool, store: bool) -> str | None:
        segment = self._segment
        self._scratch.write(self._caches, self._pages)
        rows, places = self._work(count, gaps=gaps)
        slots = self._slots[rows]
        caches = [cache.clone() for cache in self._caches]
        pages = self._pages.clone()
        mine = slots % segment.replicas == segment.replica if store else slice(None)
        copy_torch(
            self._twin(caches),
            segment.in_page,
            pages,
            torch.from_numpy(rows[mine]),
            torch.from_numpy(places[mine]),
            unpack=not store,
        )
        move(slots, np.where(places < 0, -1, self._blocks[places]))
        found_caches, found_pages = self._scratch.read()
        return self._first_layer(found_caches, caches) or self._first_page(found_pages, pages)

    def _work(self, count: int, *, gaps: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [count] of the slots, and places int64 [count, width] among the blocks, both
        in no order, and -1 for missing blocks."""
        width = self._segment.blocks_per_chunk
        rows = np.arange(count) if count == 1 else self._random.permutation(self._most)
        free = min(len(self._blocks), self._most * width)
        places = np.full(count * width, -1, dtype=np.int64)
        # the last block and the ones before it: one of the first stays untouched
        some = self._random.permutation(np.arange(len(self._blocks))[::-1][:free])
        taken = some[: count * width]
        if len(self._blocks) - 1 not in taken:
            taken[0] = len(self._blocks) - 1
        places[: len(taken)] = taken
        table = places.reshape(count, width)
        if gaps:
            table[0, 0] = -1
            table[-1, -1] = -1
        return rows, table

    def _bytes(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self._random.integers(0, 256, shape, dtype=np.uint8))

    def _twin(self, caches: list[torch.Tensor]) -> Segment:
        """The segment with these caches, of the scratch blocks alone."""
        left = iter(caches)
        sets = tuple(
            replace(layers, views=tuple(next(left) for _ in layers.views))
            for layers in self._segment.sets
        )
        return replace(self._segment, device=CPU, num_blocks=len(self._blocks), sets=sets)

    def _first_layer(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> str | None:
        positions = (position for layers in self._segment.sets for position in layers.positions)
        for position, one, other in zip(positions, found, wanted, strict=True):
            if not torch.equal(one, other):
                return f"leaves other bytes in the blocks of layer {self._segment.names[position]}"
        return None

    def _first_page(self, found: torch.Tensor, wanted: torch.Tensor) -> str | None:
        if torch.equal(found, wanted):
            return None
        segment = self._segment
        one, other = (self._shard(pages) for pages in (found, wanted))
        for position, name in enumerate(segment.names):
            if not torch.equal(one[:, :, position], other[:, :, position]):
                return f"leaves other bytes of layer {name} in the pages"
        return "writes outside its part of the pages"

    def _shard(self, pages: torch.Tensor) -> torch.Tensor:
        """This worker's shard of the pages, [s, H, L, slab bytes]."""
        segment, layout = self._segment, self._segment.in_page
        shape = (len(pages), segment.local_heads, segment.local_layers, segment.slab_bytes)
        strides = (pages.stride(0), layout.head_pitch, segment.slab_bytes, 1)
        return pages.as_strided(shape, strides, layout.offset)
