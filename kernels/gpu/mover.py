"""How a GPU moves batches of pages, each by one transport; jobs and channels are the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from kvstrata.kernels.gpu.batches import Batch, Pages, Subshard
from kvstrata.kernels.gpu.device import Device, Event, Pieces, Stream
from kvstrata.kernels.gpu.staging import Channel, StagingSlot
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pipeline import elected


class Mover:
    """Queues what moves pages between blocks and the region.

    region: uint8 [slots, slot bytes] in CPU memory, pinned by the caller.
    subshards: all that will be moved. most_pages: of one batch.
    """

    def __init__(
        self,
        region: torch.Tensor,
        device: Device,
        subshards: list[Subshard],
        most_pages: int,
    ) -> None:
        self._region = region
        self._device = device
        self._most_pages = most_pages
        rows = device.allocate(most_pages, torch.int64)
        rows.copy_(torch.arange(most_pages))
        self._rows = [rows[:count] for count in range(most_pages + 1)]
        self._zeros = device.allocate(max(s.fragments.most_bytes for s in subshards), torch.uint8)
        self._zeros.zero_()

    def batches(
        self,
        subshards: list[Subshard],
        slots: np.ndarray,
        ids: np.ndarray,
        channel: Channel,
        *,
        store: bool,
    ) -> Iterator[tuple[Batch, Transport]]:
        """Pages of one segment's subshards in batches that fit a staging slot, each with its
        transport; their block ids are on the way. Of replicas, each stores its share."""
        mine = elected(subshards[0].segment, slots) if store else slice(None)
        slots, ids = slots[mine], ids[mine]
        nbytes = sum(subshard.shard_bytes for subshard in subshards)
        for i in range(0, len(slots), self._most_pages):
            some = slice(i, i + self._most_pages)
            pages, block_ids = slots[some], ids[some]
            count = len(pages)
            there = channel.ring.put(np.concatenate((pages, block_ids.ravel())))
            every = Pages(pages, block_ids, there[:count], there[count:].view(block_ids.shape))
            for subshard in subshards:
                transport = subshard.choices[store].of(count, count * nbytes)
                step = subshard.pages(transport, channel.slot_bytes, count)
                shards = subshard.shards(pages)
                for first in range(0, count, step):
                    taken = min(step, count - first)
                    yield Batch(subshard, every, first, taken, shards), transport

    def start(
        self, channel: Channel, batch: Batch, way: Transport, submitted: Event, *, store: bool
    ) -> None:
        """Queue the move. submitted: the model's work before the job, which a load's writes and a
        store's reads of blocks come after; the channel's kernels wait for it already."""
        device, kernels, dma = self._device, channel.kernels, channel.dma
        if way is Transport.ZERO_COPY:
            self.zero_copy(kernels, batch, unpack=not store)
        elif way is Transport.DIRECT and store:
            dma.wait_event(submitted)
            device.copy(dma, self._fragments(batch, store=True), to_host=True)
        elif way is Transport.DIRECT:
            # beside the kernels, so that it holds no staged copy back while it waits for compute
            device.copy(kernels, self._fragments(batch, store=False), to_host=False)
        else:
            slot = channel.next_slot()
            pack = kernels, partial(self.pack, kernels, batch, slot, unpack=not store)
            move = dma, partial(device.copy, dma, self._shards(batch, slot), to_host=store)
            (first, fill), (last, empty) = (pack, move) if store else (move, pack)
            first.wait_event(slot.free)
            fill()
            slot.filled.record(first)
            last.wait_event(slot.filled)
            empty()
            slot.free.record(last)

    def pack(self, stream: Stream, batch: Batch, slot: StagingSlot, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and staged pages."""
        subshard = batch.subshard
        pages, ids = slot.pages(subshard.pitch), batch.pages.there_ids[batch.of]
        self._device.launch(stream, subshard.staged[unpack], pages, self._rows[batch.count], ids)

    def zero_copy(self, stream: Stream, batch: Batch, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and the region."""
        subshard, pages, of = batch.subshard, batch.pages, batch.of
        slots, ids = pages.there_slots[of], pages.there_ids[of]
        self._device.launch(stream, subshard.zero_copy[unpack], subshard.in_region, slots, ids)

    def _fragments(self, batch: Batch, *, store: bool) -> Pieces:
        """The pieces that are contiguous on both sides."""
        zeros = self._zeros.data_ptr() if store else None
        slots, ids = batch.pages.slots[batch.of], batch.pages.block_ids[batch.of]
        at = self._region.data_ptr() + slots * self._region.stride(0)
        return batch.subshard.fragments.pieces(at, ids, zeros)

    def _shards(self, batch: Batch, slot: StagingSlot) -> Pieces:
        """The runs of the subshard in each page, there and in staging."""
        subshard, runs = batch.subshard, batch.subshard.runs
        count = batch.count * runs
        host = batch.shards[batch.first * runs :][:count]
        return Pieces(subshard.staged_at[:count] + slot.address, host, subshard.sizes[:count])
