"""What moves together: a subshard of a segment, and some pages of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from math import gcd
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kvstrata.kernels.gpu.transport import LEAST_RUN, Choice, Fragments, Transport
from kvstrata.kernels.pack import Prepare, Prepared
from kvstrata.kernels.plan import RowLayout, Segment

# Pieces of one direct copy: keeps its arrays small.
MAX_PIECES = 1 << 16
# Divides the addresses of staging slots and, for 16-byte accesses, of the pages in them.
STAGED_ALIGNMENT = 16


# A copy from blocks to pages, and one back.
Kernels: TypeAlias = tuple[Prepared, Prepared]


class Subshard:
    """A segment, or some heads of it, that moves as one: what its transports need, made once.

    pitch: bytes from one staged page to the next.
    in_region: uint8 [slots, bytes], the region from where this subshard begins in each page.
    runs: of which the subshard consists in a page, contiguous each.
    staged_at: int64 [most_pages * runs], where these are in staged pages, in bytes.
    sizes: int64 [most_pages * runs], in bytes.
    choices: the transports, of stores (True) and of loads.
    """

    def __init__(
        self, segment: Segment, region: torch.Tensor, prepare: Prepare, most_pages: int
    ) -> None:
        """region: uint8 [slots, slot bytes]. most_pages: of one batch."""
        self.segment = segment
        self.shard_bytes = segment.shard_bytes
        self.pitch = segment.shard_bytes + (-segment.shard_bytes) % STAGED_ALIGNMENT
        self.fragments = Fragments(segment, segment.in_page)
        staged = Choice(Transport.STAGED, Transport.STAGED)
        self.choices = {True: staged, False: staged}

        self._prepare = prepare
        self.in_region = region[:, segment.in_page.offset :]

        # one run per page, or one per page and head where pipeline parallelism, or a shard that
        # was split, gives some layers of each head
        shard, self.runs = segment.shard, segment.shard.count
        runs = np.arange(self.runs)
        self._shard_at = region.data_ptr() + shard.offset + runs * shard.pitch
        pitches = np.arange(most_pages)[:, None] * self.pitch
        self.staged_at = (pitches + runs * shard.length).ravel()
        self.sizes = np.full(self.staged_at.size, shard.length)

    def shards(self, slots: np.ndarray) -> np.ndarray:
        """Addresses of the subshard's runs in these slots, int64 [slots * runs]."""
        pages = (slots * self.in_region.stride(0))[:, None]
        addresses: np.ndarray = pages + self._shard_at
        return addresses.ravel()

    @cached_property
    def staged(self) -> Kernels:
        """The kernels between blocks and staged pages, compiled at the first use."""
        return self._kernels(self.segment.packed(0), self.pitch, STAGED_ALIGNMENT)

    @cached_property
    def zero_copy(self) -> Kernels:
        """The kernels between blocks and `in_region`, likewise."""
        # rows that begin at the subshard: its offset is no constant of the kernel
        layout = RowLayout(0, self.segment.in_page.head_pitch)
        alignment = gcd(STAGED_ALIGNMENT, self.in_region.data_ptr())
        return self._kernels(layout, self.in_region.stride(0), alignment)

    def _kernels(self, layout: RowLayout, pitch: int, alignment: int) -> Kernels:
        prepare = partial(self._prepare, self.segment, layout, pitch, alignment)
        return prepare(unpack=False), prepare(unpack=True)

    def pages(self, transport: Transport, slot_bytes: int, count: int) -> int:
        """How many of `count` pages one batch takes; slot_bytes: of a staging slot."""
        if transport is Transport.STAGED:
            return slot_bytes // self.pitch
        if transport is Transport.DIRECT:
            return max(1, MAX_PIECES // (self.fragments.per_block * self.segment.blocks_per_chunk))
        return count

    def may_pay(self, transport: Transport) -> bool:
        """Whether it is worth a trial."""
        return transport is not Transport.DIRECT or self.fragments.mean_bytes >= LEAST_RUN


class Pages(NamedTuple):
    """Pages to be moved.

    slots, block_ids: int64 [n] and [n, blocks_per_chunk]; there_*: the same on the device.
    """

    slots: np.ndarray
    block_ids: np.ndarray
    there_slots: torch.Tensor
    there_ids: torch.Tensor


@dataclass(slots=True)
class Batch:
    """One subshard of some of these pages, which moves at once.

    first, count: which. shards: int64 [pages * runs], addresses of the subshard in the region, of
        all pages.
    """

    subshard: Subshard
    pages: Pages
    first: int
    count: int
    shards: np.ndarray

    @property
    def of(self) -> slice:
        """The pages among all."""
        return slice(self.first, self.first + self.count)

    @property
    def nbytes(self) -> int:
        """Bytes that this worker moves."""
        return self.count * self.subshard.shard_bytes
