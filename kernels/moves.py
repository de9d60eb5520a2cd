"""How a GPU moves batches of pages, each by one transport; jobs and lanes are the caller's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvstrata.kernels.batches import Batch, Part
from kvstrata.kernels.device import Device, Event, Pieces, Stream
from kvstrata.kernels.lanes import Lane
from kvstrata.kernels.pack import Copy
from kvstrata.kernels.pipeline import elected
from kvstrata.kernels.plan import RowLayout
from kvstrata.kernels.transport import Transport


class Mover:
    """Queues what moves pages between blocks and the region.

    region: uint8 [slots, slot bytes] in CPU memory, pinned by the caller.
    parts: all that will be moved. most_pages: of one batch.
    """

    def __init__(
        self,
        region: torch.Tensor,
        device: Device,
        copy: Copy,
        parts: list[Part],
        most_pages: int,
    ) -> None:
        self._region = region
        self._device = device
        self._copy = copy
        self._most_pages = most_pages
        self._rows = device.allocate(most_pages, torch.int64)
        self._rows.copy_(torch.arange(most_pages))
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
        there_pages, there_ids = there[:count], there[count:].view(ids.shape)
        nbytes = count * sum(part.shard_bytes for part in parts)
        for part in parts:
            transport = part.choice(store=store).of(count, nbytes)
            step = part.pages(transport, lane.slot_bytes, count)
            for i in range(0, count, step):
                some = slice(i, i + step)
                batch = Batch(part, pages[some], ids[some], there_pages[some], there_ids[some])
                yield batch, transport

    def _store(self, lane: Lane, batch: Batch, transport: Transport, submitted: Event) -> None:
        device = self._device
        if transport is Transport.DIRECT:
            device.hold(lane.dma, submitted)
            device.copy(lane.dma, self._fragments(batch, store=True), to_host=True)
        elif transport is Transport.ZERO_COPY:
            self.zero_copy(lane.kernels, batch, unpack=False)
        else:
            slot = lane.next_slot()
            pages = self.staged_pages(slot.memory, batch)
            device.hold(lane.kernels, slot.free)
            self.pack(lane.kernels, batch, pages, unpack=False)
            device.record(slot.filled, lane.kernels)
            device.hold(lane.dma, slot.filled)
            device.copy(lane.dma, self._shards(batch, pages), to_host=True)
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
            pages = self.staged_pages(slot.memory, batch)
            device.hold(lane.dma, slot.free)
            device.copy(lane.dma, self._shards(batch, pages), to_host=False)
            device.record(slot.filled, lane.dma)
            device.hold(lane.kernels, slot.filled)
            self.pack(lane.kernels, batch, pages, unpack=True)
            device.record(slot.free, lane.kernels)

    def staged_pages(self, memory: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Staging as uint8 [pages, pitch]."""
        count, pitch = len(batch.slots), batch.part.pitch
        return memory[: count * pitch].view(count, pitch)

    def pack(self, stream: Stream, batch: Batch, pages: torch.Tensor, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and staged pages."""
        segment, rows = batch.part.segment, self._rows[: len(pages)]
        layout = segment.packed(0)

        def launch() -> None:
            self._copy(segment, layout, pages, rows, batch.there_ids, unpack=unpack)

        self._device.run(stream, launch)

    def zero_copy(self, stream: Stream, batch: Batch, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and the region."""
        segment = batch.part.segment
        # rows that begin at the part: its offset is no constant of the kernel
        offset, head_pitch = segment.in_page
        pages, layout = self._region[:, offset:], RowLayout(0, head_pitch)

        def launch() -> None:
            self._copy(segment, layout, pages, batch.there_slots, batch.there_ids, unpack=unpack)

        self._device.run(stream, launch)

    def _pages_at(self, batch: Batch) -> np.ndarray:
        """Addresses of the pages, int64 [n]."""
        addresses: np.ndarray = self._region.data_ptr() + batch.slots * self._region.stride(0)
        return addresses

    def _fragments(self, batch: Batch, *, store: bool) -> Pieces:
        zeros = self._zeros.data_ptr() if store else None
        return batch.part.fragments.pieces(self._pages_at(batch), batch.block_ids, zeros)

    def _shards(self, batch: Batch, pages: torch.Tensor) -> Pieces:
        """One run per staged page, or one per page and head where pipeline parallelism, or a
        shard that was split, gives some layers of each head."""
        shard = batch.part.segment.shard
        runs = np.arange(shard.count)
        host = self._pages_at(batch)[:, None] + shard.offset + runs * shard.pitch
        staged = pages.data_ptr() + np.arange(len(pages)) * pages.stride(0)
        device = staged[:, None] + runs * shard.length
        return Pieces(device.ravel(), host.ravel(), np.full(host.size, shard.length))
