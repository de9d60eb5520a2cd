"""How a GPU moves batches of pages, each by one transport; jobs and lanes are the caller's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvstrata.kernels.gpu.batches import Batch, Pages, Part
from kvstrata.kernels.gpu.device import Device, Event, Pieces, Stream
from kvstrata.kernels.gpu.staging import Lane, StagingSlot
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pipeline import elected


class Mover:
    """Queues what moves pages between blocks and the region.

    region: uint8 [slots, slot bytes] in CPU memory, pinned by the caller.
    parts: all that will be moved. most_pages: of one batch.
    """

    def __init__(
        self,
        region: torch.Tensor,
        device: Device,
        parts: list[Part],
        most_pages: int,
    ) -> None:
        self._region = region
        self._device = device
        self._most_pages = most_pages
        rows = device.allocate(most_pages, torch.int64)
        rows.copy_(torch.arange(most_pages))
        self._rows = [rows[:count] for count in range(most_pages + 1)]
        self._zeros = device.allocate(max(p.fragments.most_bytes for p in parts), torch.uint8)
        self._zeros.zero_()

    def batches(
        self, parts: list[Part], slots: np.ndarray, ids: np.ndarray, lane: Lane, *, store: bool
    ) -> Iterator[tuple[Batch, Transport]]:
        """Pages of one segment's parts in batches that fit a staging slot, each with its transport;
        their block ids are on the way. Of replicas, each stores its share."""
        mine = elected(parts[0].segment, slots) if store else slice(None)
        slots, ids = slots[mine], ids[mine]
        for i in range(0, len(slots), self._most_pages):
            some = slice(i, i + self._most_pages)
            yield from self._upload(parts, slots[some], ids[some], lane, store=store)

    def start(
        self, lane: Lane, batch: Batch, way: Transport, submitted: Event, *, store: bool
    ) -> None:
        """Queue the move. submitted: the model's work before the job, which a load's writes and a
        store's reads of blocks come after; the lane's kernels wait for it already."""
        if store:
            self._store(lane, batch, way, submitted)
        else:
            self._load(lane, batch, way)

    def _upload(
        self, parts: list[Part], pages: np.ndarray, ids: np.ndarray, lane: Lane, *, store: bool
    ) -> Iterator[tuple[Batch, Transport]]:
        count = len(pages)
        there = lane.ring.put(np.concatenate((pages, ids.ravel())))
        every = Pages(pages, ids, there[:count], there[count:].view(ids.shape))
        nbytes = count * sum(part.shard_bytes for part in parts)
        for part in parts:
            transport = part.choice(store=store).of(count, nbytes)
            step = part.pages(transport, lane.slot_bytes, count)
            shards = part.shards(pages)
            for i in range(0, count, step):
                yield Batch(part, every, i, min(step, count - i), shards), transport

    def _store(self, lane: Lane, batch: Batch, transport: Transport, submitted: Event) -> None:
        device = self._device
        if transport is Transport.DIRECT:
            device.hold(lane.dma, submitted)
            device.copy(lane.dma, self._fragments(batch, store=True), to_host=True)
        elif transport is Transport.ZERO_COPY:
            self.zero_copy(lane.kernels, batch, unpack=False)
        else:
            slot = lane.next_slot()
            device.hold(lane.kernels, slot.free)
            self.pack(lane.kernels, batch, slot, unpack=False)
            device.record(slot.filled, lane.kernels)
            device.hold(lane.dma, slot.filled)
            device.copy(lane.dma, self._shards(batch, slot), to_host=True)
            device.record(slot.free, lane.dma)

    def _load(self, lane: Lane, batch: Batch, transport: Transport) -> None:
        device = self._device
        if transport is Transport.DIRECT:
            # beside the kernels, so that it holds no staged copy back while it waits for compute
            device.copy(lane.kernels, self._fragments(batch, store=False), to_host=False)
        elif transport is Transport.ZERO_COPY:
            self.zero_copy(lane.kernels, batch, unpack=True)
        else:
            slot = lane.next_slot()
            device.hold(lane.dma, slot.free)
            device.copy(lane.dma, self._shards(batch, slot), to_host=False)
            device.record(slot.filled, lane.dma)
            device.hold(lane.kernels, slot.filled)
            self.pack(lane.kernels, batch, slot, unpack=True)
            device.record(slot.free, lane.kernels)

    def pack(self, stream: Stream, batch: Batch, slot: StagingSlot, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and staged pages."""
        part = batch.part
        pages, ids = slot.pages(part.pitch), batch.pages.there_ids[batch.of]
        self._device.launch(stream, part.staged[unpack], pages, self._rows[batch.count], ids)

    def zero_copy(self, stream: Stream, batch: Batch, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and the region."""
        part, pages, of = batch.part, batch.pages, batch.of
        slots, ids = pages.there_slots[of], pages.there_ids[of]
        self._device.launch(stream, part.zero_copy[unpack], part.in_region, slots, ids)

    def _fragments(self, batch: Batch, *, store: bool) -> Pieces:
        """The pieces that are contiguous on both sides."""
        zeros = self._zeros.data_ptr() if store else None
        slots, ids = batch.pages.slots[batch.of], batch.pages.block_ids[batch.of]
        at = self._region.data_ptr() + slots * self._region.stride(0)
        return batch.part.fragments.pieces(at, ids, zeros)

    def _shards(self, batch: Batch, slot: StagingSlot) -> Pieces:
        """The runs of the part in each page, there and in staging."""
        part, runs = batch.part, batch.part.runs
        count = batch.count * runs
        host = batch.shards[batch.first * runs :][:count]
        return Pieces(part.staged_at[:count] + slot.address, host, part.sizes[:count])
