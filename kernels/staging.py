"""The pipeline where KV caches lie on a GPU: short packing kernels, then one large DMA per page.

A lane is a pair of streams, one for kernels and one for DMA, and two staging slots in device
memory between them, so that the kernel of one batch runs during the DMA of another. Stores, loads
and expedited loads have a lane each and do not wait for each other.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.device import Device, Event
from kvstrata.kernels.pack import Copy
from kvstrata.kernels.pipeline import (
    Finished,
    Groups,
    GroupWork,
    check_region,
    check_work,
    elected,
)
from kvstrata.kernels.plan import Segment

# Large enough for a DMA to reach its speed (about 150 us on PCIe 5), small enough for three
# lanes of two to go unnoticed in GPU memory.
STAGING_BYTES = 8 << 20
MAX_BATCH = 256  # pages; bounds the block ids of one batch
IDS_BYTES = 4 << 20  # pinned, per lane; the host waits when so many ids are queued


@dataclass
class _StagingSlot:
    """Device memory for one batch. `filled` and `free` say when it may be read and written."""

    memory: torch.Tensor
    filled: Event
    free: Event


@dataclass
class _IdsSlot:
    """Block ids of one batch, on the host and on the device; `sent` says when to reuse them."""

    host: torch.Tensor
    device: torch.Tensor
    sent: Event


@dataclass
class _Job:
    start: Event
    end: Event
    nbytes: int = 0


@dataclass(frozen=True)
class _Batch:
    """Pages that pass through one staging slot together."""

    segment: Segment
    slots: list[int]
    block_ids: torch.Tensor

    @property
    def nbytes(self) -> int:
        return len(self.slots) * self.segment.shard_bytes


class _Lane:
    """Two streams and the memory between them. Every buffer is made here, once."""

    def __init__(self, device: Device, segments: Sequence[Segment], *, urgent: bool) -> None:
        self.kernels = device.stream(urgent=urgent)
        self.dma = device.stream(urgent=urgent)
        self.computed = device.event()
        nbytes = max([STAGING_BYTES, *(_pitch(segment) for segment in segments)])
        memory = device.allocate(2 * nbytes, torch.uint8)
        self._staging = deque(
            _StagingSlot(part, device.event(), device.event()) for part in memory.view(2, nbytes)
        )
        longest = max(_batch_pages(s, nbytes) * s.blocks_per_chunk for s in segments)
        count = max(2, IDS_BYTES // (8 * longest))
        on_host = device.allocate_pinned(count * longest, torch.int64)
        on_device = device.allocate(count * longest, torch.int64)
        pairs = zip(on_host.view(count, -1), on_device.view(count, -1), strict=True)
        self._ids = deque(_IdsSlot(host, there, device.event()) for host, there in pairs)
        self.staging_bytes = nbytes

    def next_staging(self) -> _StagingSlot:
        self._staging.rotate(-1)
        return self._staging[-1]

    def next_ids(self) -> _IdsSlot:
        self._ids.rotate(-1)
        return self._ids[-1]


class StagedPipeline:
    """See the module and `Pipeline`.

    groups: this worker's segments by group, with caches on the device.
    region: uint8 [slots, slot bytes] in CPU memory; pinned until `shutdown`.
    device, copy: what runs it; all kernels are compiled before the constructor returns.
    """

    def __init__(self, groups: Groups, region: torch.Tensor, device: Device, copy: Copy) -> None:
        check_region(groups, region)
        self._groups = groups
        self._region = region
        self._device = device
        self._copy = copy
        self._jobs: dict[int, _Job] = {}
        self._spare_events: list[Event] = []
        segments = [segment for parts in groups.values() for segment in parts]
        self._rows = device.allocate(MAX_BATCH, torch.int64)
        self._rows.copy_(torch.arange(MAX_BATCH))
        self._store = _Lane(device, segments, urgent=False)
        self._load = _Lane(device, segments, urgent=False)
        self._expedited = _Lane(device, segments, urgent=True)
        device.pin(region)
        self._warm_up(segments)

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        self._check(job_id, work)
        lane, device = self._store, self._device
        job = self._jobs[job_id] = _Job(self._event(), self._event())
        device.record(lane.computed, device.compute_stream())
        device.hold(lane.kernels, lane.computed)
        device.record(job.start, lane.kernels)
        for batch in self._batches(work, lane, store=True):
            slot = lane.next_staging()
            pages = _pages(slot, batch.segment, len(batch.slots))
            device.hold(lane.kernels, slot.free)
            self._launch(lane, batch, pages, unpack=False)
            device.record(slot.filled, lane.kernels)
            device.hold(lane.dma, slot.filled)
            device.run(lane.dma, self._dma(batch, pages, to_host=True))
            device.record(slot.free, lane.dma)
            job.nbytes += batch.nbytes
        # A job without batches must not end before its start is reached.
        device.hold(lane.dma, job.start)
        device.record(job.end, lane.dma)

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        self._check(job_id, work)
        lane, device = self._expedited if expedited else self._load, self._device
        job = self._jobs[job_id] = _Job(self._event(), self._event())
        device.record(job.start, lane.dma)
        # The model may still use the blocks' former content, so only the kernels wait for it.
        device.record(lane.computed, device.compute_stream())
        device.hold(lane.kernels, lane.computed)
        device.hold(lane.kernels, job.start)
        for batch in self._batches(work, lane, store=False):
            slot = lane.next_staging()
            pages = _pages(slot, batch.segment, len(batch.slots))
            device.hold(lane.dma, slot.free)
            device.run(lane.dma, self._dma(batch, pages, to_host=False))
            device.record(slot.filled, lane.dma)
            device.hold(lane.kernels, slot.filled)
            self._launch(lane, batch, pages, unpack=True)
            device.record(slot.free, lane.kernels)
            job.nbytes += batch.nbytes
        device.record(job.end, lane.kernels)

    def finished(self) -> list[Finished]:
        done = []
        for job_id, job in list(self._jobs.items()):
            if self._device.reached(job.end):
                seconds = self._device.seconds(job.start, job.end)
                done.append(Finished(job_id, job.nbytes, seconds))
                self._spare_events += (job.start, job.end)
                del self._jobs[job_id]
        return done

    def wait(self, job_ids: Collection[int]) -> None:
        for job_id in job_ids:
            if job_id in self._jobs:
                self._device.synchronize(self._jobs[job_id].end)

    def shutdown(self) -> None:
        self.wait(list(self._jobs))
        self._device.unpin()

    def _check(self, job_id: int, work: Sequence[GroupWork]) -> None:
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} is still under way")
        check_work(self._groups, self._region, work)

    def _event(self) -> Event:
        return self._spare_events.pop() if self._spare_events else self._device.event()

    def _batches(self, work: Sequence[GroupWork], lane: _Lane, *, store: bool) -> Iterator[_Batch]:
        for group, slots, block_ids in work:
            for segment in self._groups[group]:
                mine = elected(segment, slots) if store else np.ones(len(slots), dtype=bool)
                pages, ids = slots[mine].tolist(), torch.from_numpy(block_ids[mine])
                step = _batch_pages(segment, lane.staging_bytes)
                for i in range(0, len(pages), step):
                    yield _Batch(segment, pages[i : i + step], ids[i : i + step])

    def _launch(self, lane: _Lane, batch: _Batch, pages: torch.Tensor, *, unpack: bool) -> None:
        """Queue the batch's ids and its kernel."""
        ids = lane.next_ids()
        self._device.synchronize(ids.sent)
        count = batch.block_ids.numel()
        ids.host[:count] = batch.block_ids.flatten()
        segment, layout = batch.segment, batch.segment.packed(0)
        rows, block_ids = self._rows[: len(pages)], ids.device[:count].view(len(pages), -1)

        def send() -> None:
            ids.device[:count].copy_(ids.host[:count], non_blocking=True)

        def launch() -> None:
            self._copy(segment, layout, pages, rows, block_ids, unpack=unpack)

        self._device.run(lane.kernels, send)
        self._device.record(ids.sent, lane.kernels)
        self._device.run(lane.kernels, launch)

    def _dma(self, batch: _Batch, pages: torch.Tensor, *, to_host: bool) -> Callable[[], None]:
        """Copies between the region and staged pages: one per page, or one per page and head
        where pipeline parallelism gives this worker only some layers of each head."""
        shard = batch.segment.shard
        region = self._region

        def copy() -> None:
            for row, slot in enumerate(batch.slots):
                for i in range(shard.count):
                    there = shard.offset + i * shard.pitch
                    host = region[slot, there : there + shard.length]
                    staged = pages[row, i * shard.length : (i + 1) * shard.length]
                    if to_host:
                        host.copy_(staged, non_blocking=True)
                    else:
                        staged.copy_(host, non_blocking=True)

        return copy

    def _warm_up(self, segments: Sequence[Segment]) -> None:
        """Compile and launch every kernel once, on blocks that are all missing."""
        done = self._event()
        for segment in segments:
            missing = torch.full((1, segment.blocks_per_chunk), -1)
            for unpack in (False, True):
                slot = self._store.next_staging()
                batch = _Batch(segment, [0], missing)
                pages = _pages(slot, segment, 1)
                self._launch(self._store, batch, pages, unpack=unpack)
        self._device.record(done, self._store.kernels)
        self._device.synchronize(done)
        self._spare_events.append(done)


def _pitch(segment: Segment) -> int:
    """Bytes from one staged page to the next: the worker's part, aligned for 16-byte accesses."""
    return segment.shard_bytes + (-segment.shard_bytes) % 16


def _batch_pages(segment: Segment, staging_bytes: int) -> int:
    return min(MAX_BATCH, staging_bytes // _pitch(segment))


def _pages(slot: _StagingSlot, segment: Segment, count: int) -> torch.Tensor:
    pitch = _pitch(segment)
    return slot.memory[: count * pitch].view(count, pitch)
