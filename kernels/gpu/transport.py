"""Which way pages go between a GPU and the region, found out by trying.

- staged: a kernel packs pages into device memory, one DMA each moves them; loads the other way.
- direct: one DMA per piece that is contiguous in both the KV cache and the page. A single one per
  page where the cache already has the page's order (BHLNC with one block per chunk).
- zero-copy: a kernel reads or writes the pages in host memory itself. No DMA to start, so it is
  soonest done with little; but it occupies the GPU's multiprocessors for as long as the link takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from statistics import median
from typing import NamedTuple

import numpy as np

from kvstrata.kernels.gpu.device import Pieces
from kvstrata.kernels.plan import LayerSet, RowLayout, Segment

logger = logging.getLogger("kvstrata.kernels")


class Transport(StrEnum):
    """See the module."""

    STAGED = "staged"
    DIRECT = "direct"
    ZERO_COPY = "zero-copy"


class Choice(NamedTuple):
    """The transports of one direction: of few pages, and of more."""

    few: Transport
    many: Transport

    def of(self, pages: int, nbytes: int) -> Transport:
        """The transport of so many pages, with so many bytes of this worker's in all."""
        return self.few if pages <= FEW_PAGES and nbytes <= FEW_BYTES else self.many


class Trial(NamedTuple):
    """One measurement: `pages` of `page_bytes` each took `seconds` (median)."""

    transport: Transport
    pages: int
    page_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.pages * self.page_bytes / self.seconds / 1e9 if self.seconds else 0.0
        return f"{self.transport} {self.pages} x {self.page_bytes} B: {rate:.2f} GB/s"


# Few are so many pages at most, which is between the two sizes that are tried, and so many bytes,
# which take 20 us on a PCIe 5 link: about what it costs to start a pack and a DMA.
FEW_PAGES = 4
FEW_BYTES = 1 << 20
TRIAL_BYTES = 64 << 20  # many pages: about 1 ms on a PCIe 5 link
_ROUNDS = 5
# Below this the 0.5 us that a driver takes per piece (docs/transfers.md) is most of the time.
LEAST_RUN = 4096
# Equally fast ways are taken in this order: no kernel, then a short one.
_PREFERRED = (Transport.DIRECT, Transport.STAGED, Transport.ZERO_COPY)
_EQUAL = 1.05
# Zero-copy of many pages holds multiprocessors during the whole transfer, which a model beside it
# pays for: only a link so fast that DMA cannot follow (C2C) makes up for that.
_HOLDS_SMS = 1.5


def choose(
    seconds: Callable[[Transport, int], float],
    candidates: Sequence[Transport],
    most_pages: int,
    page_bytes: int,
) -> tuple[Choice, list[Trial]]:
    """The best transports of one direction.

    seconds: moves so many pages by a transport and tells how long that took.
    candidates: what is possible; one that raises RuntimeError is left out, with a warning.
    most_pages: how many pages a trial may take.
    Raises RuntimeError when none is left.
    """
    ways = list(candidates)
    many = max(1, min(most_pages, TRIAL_BYTES // page_bytes))
    trials = []
    best = []
    for pages in (1, many):
        times: dict[Transport, list[float]] = {transport: [] for transport in ways}
        for _ in range(_ROUNDS):  # in turns, so that a disturbance meets all
            for transport in list(ways):
                try:
                    times[transport].append(seconds(transport, pages))
                except RuntimeError as error:
                    ways.remove(transport)
                    if not ways:
                        raise
                    logger.warning("kvstrata: transport %s is left out: %s", transport, error)
        medians = {transport: median(times[transport]) for transport in ways}
        trials += [Trial(t, pages, page_bytes, value) for t, value in medians.items()]
        is_few = pages <= FEW_PAGES and pages * page_bytes <= FEW_BYTES
        if not is_few and Transport.ZERO_COPY in medians:
            medians[Transport.ZERO_COPY] *= _HOLDS_SMS
        best.append(medians)
    return Choice(*(_preferred(medians, ways) for medians in best)), trials


def fastest(seconds: Callable[[int], float], sizes: Sequence[int]) -> int:
    """The first of these sizes with which something takes no longer than with the others (5 %)."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(_ROUNDS):
        for size in sizes:
            times[size].append(seconds(size))
    medians = {size: median(times[size]) for size in sizes}
    return next(size for size in sizes if medians[size] <= min(medians.values()) * _EQUAL)


def _preferred(medians: dict[Transport, float], ways: Sequence[Transport]) -> Transport:
    """The fastest of these ways, or one that is as fast and preferred."""
    limit = min(medians[way] for way in ways) * _EQUAL
    return next(way for way in _PREFERRED if way in ways and medians[way] <= limit)


class Fragments:
    """The pieces of a segment's blocks that are contiguous in the KV caches and in the pages.

    This is also what a plain batch copy moves, without any packing.

    per_block: pieces of one block. mean_bytes, most_bytes: of a piece.
    """

    def __init__(self, segment: Segment, layout: RowLayout) -> None:
        """layout: where the segment's shard lies in a page."""
        by_set = [_pieces(segment, layout, layers) for layers in segment.sets]
        cache, page, sizes, strides = (
            np.concatenate(column) for column in zip(*by_set, strict=True)
        )
        order = np.argsort(page, kind="stable")
        cache, page, sizes, strides = cache[order], page[order], sizes[order], strides[order]
        ends = (
            (cache[1:] != cache[:-1] + sizes[:-1])
            | (page[1:] != page[:-1] + sizes[:-1])
            | (strides[1:] != strides[:-1])
        )
        starts = np.flatnonzero(np.concatenate(([True], ends)))
        self._cache, self._page, self._strides = cache[starts], page[starts], strides[starts]
        self._sizes = np.add.reduceat(sizes, starts)
        self._block_bytes = segment.block_bytes
        self.per_block = len(starts)
        self.mean_bytes, self.most_bytes = float(self._sizes.mean()), int(self._sizes.max())

    def pieces(self, pages: np.ndarray, block_ids: np.ndarray, zeros: int | None) -> Pieces:
        """The pieces of some pages.

        pages: int64 [n], addresses of the pages. block_ids: int64 [n, blocks_per_chunk].
        zeros: address of device memory with `most_bytes` zeros, in place of missing blocks; None
            leaves these out.
        """
        offsets = np.arange(block_ids.shape[1]) * self._block_bytes
        host = (pages[:, None] + offsets)[:, :, None] + self._page
        cache = block_ids[:, :, None] * self._strides + self._cache
        sizes = np.broadcast_to(self._sizes, host.shape)
        missing = np.broadcast_to((block_ids < 0)[:, :, None], host.shape)
        if zeros is None:
            here = ~missing
            return Pieces(cache[here], host[here], sizes[here])
        cache = np.where(missing, zeros, cache)
        return Pieces(cache.ravel(), host.ravel(), sizes.flatten())


def _pieces(
    segment: Segment, layout: RowLayout, layers: LayerSet
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the first block of a page: addresses for block 0, offsets in the page, sizes, and bytes
    from one block to the next. int64 [pieces]."""
    block, head, row, plane = layers.strides
    table = layers.table.cpu().numpy()
    axes = [  # (positions, bytes apart in the cache, bytes apart in the page)
        (segment.local_heads, head, layout.head_pitch),
        (layers.kernel_blocks, block, segment.block_bytes // layers.kernel_blocks),
        (layers.rows, row, layers.planes * layers.plane_bytes),
        (layers.planes, plane, layers.plane_bytes),
    ]
    cache, page = table[:, 0], table[:, 1] + layout.offset
    for count, in_cache, in_page in axes:
        index = np.arange(count)
        cache = (cache[:, None] + index * in_cache).ravel()
        page = (page[:, None] + index * in_page).ravel()
    sizes = np.full(len(cache), layers.plane_bytes, dtype=np.int64)
    strides = np.full(len(cache), layers.kernel_blocks * block, dtype=np.int64)
    return cache, page, sizes, strides
