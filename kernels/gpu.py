"""The pipeline where KV caches lie on a GPU: packing kernels in short bursts, and large DMAs.

Stores, loads and expedited loads have a lane each and do not wait for each other. What happens to
blocks is ordered against the model: stores read them after the work that was queued on the compute
stream before, loads write them after it; `fence` lets later work follow. The host never waits in
between, but where a lane's ring of block ids is full.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from kvstrata.kernels.batches import Batch, Part
from kvstrata.kernels.device import Device, Event, Pieces, Stream
from kvstrata.kernels.lanes import Lane
from kvstrata.kernels.pack import Copy
from kvstrata.kernels.pipeline import (
    Finished,
    Groups,
    GroupWork,
    check_region,
    check_work,
    elected,
)
from kvstrata.kernels.plan import RowLayout, split
from kvstrata.kernels.transport import (
    FEW_BYTES,
    FEW_PAGES,
    Choice,
    Transport,
    Trial,
    choose,
)

logger = logging.getLogger("kvstrata.kernels")

# Large enough for a DMA to reach its speed (about 150 us on PCIe 5), small enough for three lanes
# to go unnoticed in GPU memory. Larger shards are split.
STAGING_BYTES = 8 << 20
# One is filled, one is moved, and one evens out the difference.
STAGING_SLOTS = 3
MAX_BATCH = 256  # pages: keeps the arrays of one batch small
# A ring holds the ids of so many times all blocks: what can be under way, and as much again.
RING_ROUNDS = 2
_TRIAL = -1  # no job of vLLM's has this id


@dataclass
class _Job:
    """`released`: the blocks are the model's again. `nbytes`: moved by this worker."""

    submitted: Event
    start: Event
    released: Event
    end: Event
    nbytes: int = 0

    def events(self) -> tuple[Event, ...]:
        return (self.submitted, self.start, self.released, self.end)


class GpuPipeline:
    """See the module and `Pipeline`.

    groups: this worker's segments by group, with caches on the device.
    region: uint8 [slots, slot bytes] in CPU memory; pinned until `shutdown`.
    device, copy: what runs it; all kernels are compiled before the constructor returns.
    transport: of everything; None tries all that may pay, and takes the best for each segment.
        Trials copy blocks to the region's first pages and back, so both must be unused.
    """

    def __init__(
        self,
        groups: Groups,
        region: torch.Tensor,
        device: Device,
        copy: Copy,
        transport: Transport | None = None,
    ) -> None:
        check_region(groups, region)
        self._groups = groups
        self._region = region
        self._device = device
        self._copy = copy
        self._jobs: dict[int, _Job] = {}
        self._spare_events: list[Event] = []
        self._parts = {
            group: [[Part(part) for part in split(s, STAGING_BYTES)] for s in segments]
            for group, segments in groups.items()
        }
        parts = [part for of in self._parts.values() for some in of for part in some]
        self._rows = device.allocate(MAX_BATCH, torch.int64)
        self._rows.copy_(torch.arange(MAX_BATCH))
        self._zeros = device.allocate(max(p.fragments.most_bytes for p in parts), torch.uint8)
        self._zeros.zero_()
        slot_bytes = max([STAGING_BYTES, *(part.pitch for part in parts)])
        longest = max(1 + part.segment.blocks_per_chunk for part in parts) * MAX_BATCH
        blocks = sum(some[0].segment.num_blocks for of in self._parts.values() for some in of)
        numbers = max(longest, RING_ROUNDS * 2 * blocks)
        self._store, self._load, self._expedited = (
            Lane(device, STAGING_SLOTS, slot_bytes, numbers, urgent=urgent)
            for urgent in (False, False, True)
        )
        device.pin(region)
        self._await_buffers()
        self._ways = list(Transport) if transport is None else [transport]
        self._warm_up(parts)
        self.trials: dict[tuple[str, str], list[Trial]] = {}
        for of in self._parts.values():
            for some in of:
                self._decide(some, transport)

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        """See `Pipeline`."""
        lane, device = self._store, self._device
        with self._open(job_id, work) as job:
            device.hold(lane.kernels, job.submitted)
            device.record(job.start, lane.kernels)
            direct = False
            for batch, transport in self._batches(work, lane, store=True):
                direct = direct or transport is Transport.DIRECT
                self._store_batch(lane, batch, transport, job)
                job.nbytes += batch.nbytes
            if not direct:
                device.record(job.released, lane.kernels)
            gathered = self._event()
            device.record(gathered, lane.kernels)
            device.hold(lane.dma, gathered)
            self._spare_events.append(gathered)
            if direct:
                device.record(job.released, lane.dma)
            device.record(job.end, lane.dma)

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        """See `Pipeline`."""
        lane, device = self._expedited if expedited else self._load, self._device
        with self._open(job_id, work) as job:
            device.record(job.start, lane.dma)
            # The model may still use the blocks' former content, but staging is nobody's.
            device.hold(lane.kernels, job.submitted)
            device.hold(lane.kernels, job.start)
            for batch, transport in self._batches(work, lane, store=False):
                self._load_batch(lane, batch, transport)
                job.nbytes += batch.nbytes
            device.record(job.released, lane.kernels)
            device.record(job.end, lane.kernels)

    def finished(self) -> list[Finished]:
        """See `Pipeline`."""
        done = []
        for job_id, job in list(self._jobs.items()):
            if self._device.reached(job.end):
                seconds = self._device.seconds(job.start, job.end)
                done.append(Finished(job_id, job.nbytes, seconds))
                self._spare_events += job.events()
                del self._jobs[job_id]
        return done

    def fence(self, job_ids: Collection[int]) -> None:
        """See `Pipeline`. The device waits, and not the host."""
        for job_id in job_ids:
            if job_id in self._jobs:
                compute = self._device.compute_stream()
                self._device.hold(compute, self._jobs[job_id].released)

    def wait(self, job_ids: Collection[int]) -> None:
        """See `Pipeline`."""
        for job_id in job_ids:
            if job_id in self._jobs:
                self._device.synchronize(self._jobs[job_id].end)

    def describe(self) -> str:
        """See `Pipeline`."""
        return "; ".join(
            f"{some[0].segment.names[0]} and alike: {way} "
            f"{choice.few} up to {FEW_PAGES} pages and {FEW_BYTES >> 20} MiB, else {choice.many}"
            f"{_brackets(self.trials.get((some[0].segment.names[0], way), []))}"
            for of in self._parts.values()
            for some in of
            for way, choice in (("store", some[0].store), ("load", some[0].load))
        )

    def shutdown(self) -> None:
        """See `Pipeline`."""
        self.wait(list(self._jobs))
        self._device.unpin()

    @contextmanager
    def _open(self, job_id: int, work: Sequence[GroupWork]) -> Iterator[_Job]:
        """A job to be queued; none, if that fails."""
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} is still under way")
        check_work(self._groups, self._region, work)
        job = self._jobs[job_id] = _Job(*(self._event() for _ in range(4)))
        self._device.record(job.submitted, self._device.compute_stream())
        try:
            yield job
        except BaseException:
            del self._jobs[job_id]  # its events are not used again: some are not recorded
            raise

    def _event(self) -> Event:
        return self._spare_events.pop() if self._spare_events else self._device.event()

    def _batches(
        self, work: Sequence[GroupWork], lane: Lane, *, store: bool
    ) -> Iterator[tuple[Batch, Transport]]:
        """The work in batches that fit a staging slot; their block ids are on the way."""
        for group, slots, block_ids in work:
            for parts in self._parts[group]:
                mine = elected(parts[0].segment, slots) if store else slice(None)
                pages, ids = slots[mine], block_ids[mine]
                for i in range(0, len(pages), MAX_BATCH):
                    some = slice(i, i + MAX_BATCH)
                    yield from self._upload(parts, pages[some], ids[some], lane, store=store)

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

    def _store_batch(self, lane: Lane, batch: Batch, transport: Transport, job: _Job) -> None:
        device = self._device
        if transport is Transport.DIRECT:
            device.hold(lane.dma, job.submitted)
            device.copy(lane.dma, self._fragments(batch, store=True), to_host=True)
        elif transport is Transport.ZERO_COPY:
            self._zero_copy(lane.kernels, batch, unpack=False)
        else:
            slot = lane.next_slot()
            pages = self._staged_pages(slot.memory, batch)
            device.hold(lane.kernels, slot.free)
            self._pack(lane.kernels, batch, pages, unpack=False)
            device.record(slot.filled, lane.kernels)
            device.hold(lane.dma, slot.filled)
            device.copy(lane.dma, self._shards(batch, pages), to_host=True)
            device.record(slot.free, lane.dma)

    def _load_batch(self, lane: Lane, batch: Batch, transport: Transport) -> None:
        device = self._device
        if transport is Transport.DIRECT:
            # beside the kernels, so that it holds no staged copy back while it waits for compute
            device.copy(lane.kernels, self._fragments(batch, store=False), to_host=False)
        elif transport is Transport.ZERO_COPY:
            self._zero_copy(lane.kernels, batch, unpack=True)
        else:
            slot = lane.next_slot()
            pages = self._staged_pages(slot.memory, batch)
            device.hold(lane.dma, slot.free)
            device.copy(lane.dma, self._shards(batch, pages), to_host=False)
            device.record(slot.filled, lane.dma)
            device.hold(lane.kernels, slot.filled)
            self._pack(lane.kernels, batch, pages, unpack=True)
            device.record(slot.free, lane.kernels)

    def _staged_pages(self, memory: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Staging as uint8 [pages, pitch]."""
        count, pitch = len(batch.slots), batch.part.pitch
        return memory[: count * pitch].view(count, pitch)

    def _pack(self, stream: Stream, batch: Batch, pages: torch.Tensor, *, unpack: bool) -> None:
        """Queue the kernel between the blocks and staged pages."""
        segment, rows = batch.part.segment, self._rows[: len(pages)]
        layout = segment.packed(0)

        def launch() -> None:
            self._copy(segment, layout, pages, rows, batch.there_ids, unpack=unpack)

        self._device.run(stream, launch)

    def _zero_copy(self, stream: Stream, batch: Batch, *, unpack: bool) -> None:
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

    # -- before the first job ---------------------------------------------------------

    def _await_buffers(self) -> None:
        """What was written to the buffers so far comes before all use of them."""
        written = self._event()
        self._device.record(written, self._device.compute_stream())
        self._device.synchronize(written)
        self._spare_events.append(written)

    def _warm_up(self, parts: Sequence[Part]) -> None:
        """Compile and launch every kernel once, on blocks that are all missing, and copy once."""
        lane, device, done = self._store, self._device, self._event()
        for part in parts:
            width = part.segment.blocks_per_chunk
            slots, ids = np.zeros(1, np.int64), np.full((1, width), -1)
            there = lane.ring.put(np.concatenate((slots, ids.ravel())))
            batch = Batch(part, slots, ids, there[:1], there[1:].view(1, -1))
            pages = self._staged_pages(lane.next_slot().memory, batch)
            for unpack in (False, True):
                if Transport.STAGED in self._ways:
                    self._pack(lane.kernels, batch, pages, unpack=unpack)
                if Transport.ZERO_COPY in self._ways:
                    self._warm_up_zero_copy(lane.kernels, batch, unpack=unpack)
        device.record(done, lane.kernels)
        device.synchronize(done)
        staged = lane.next_slot().memory.data_ptr()
        host = self._region.data_ptr() + parts[0].segment.in_page.offset
        piece = Pieces(np.array([staged]), np.array([host]), np.ones(1, np.int64))
        for to_host in (False, True):  # a byte goes there and back
            device.copy(lane.dma, piece, to_host=to_host)
        device.record(done, lane.dma)
        device.synchronize(done)
        self._spare_events.append(done)

    def _warm_up_zero_copy(self, stream: Stream, batch: Batch, *, unpack: bool) -> None:
        try:
            self._zero_copy(stream, batch, unpack=unpack)
        except (RuntimeError, ValueError) as error:  # Triton's, where host memory has no address
            self._ways.remove(Transport.ZERO_COPY)
            if not self._ways:
                raise
            logger.warning("kvstrata: transport zero-copy is left out: %s", error)

    def _decide(self, parts: list[Part], transport: Transport | None) -> None:
        """Choose the transports of one segment, whose parts are alike."""
        first = parts[0]
        for store in (True, False):  # stores first: loads bring back what they stored
            if transport is not None:
                choice = Choice(transport, transport)
            else:
                blocks = first.segment.num_blocks // first.segment.blocks_per_chunk
                choice, trials = choose(
                    partial(self._try, first, store),
                    [way for way in self._ways if first.may_pay(way)],
                    min(MAX_BATCH, len(self._region), blocks),
                    first.shard_bytes,
                )
                self.trials[first.segment.names[0], "store" if store else "load"] = trials
            for part in parts:
                part.choose(choice, store=store)

    def _try(self, part: Part, store: bool, transport: Transport, pages: int) -> float:
        """Seconds to move the first blocks to the first pages, or back."""
        part.choose(Choice(transport, transport), store=store)
        width = part.segment.blocks_per_chunk
        ids = np.arange(pages * width).reshape(pages, width)
        ids[ids >= part.segment.num_blocks] = -1
        lane = self._store if store else self._load
        start = time.perf_counter()
        with self._open(_TRIAL, []) as job:
            self._device.hold(lane.kernels, job.submitted)
            for batch, way in self._upload([part], np.arange(pages), ids, lane, store=store):
                if store:
                    self._store_batch(lane, batch, way, job)
                else:
                    self._load_batch(lane, batch, way)
            for stream in (lane.kernels, lane.dma):
                self._device.record(job.end, stream)
                self._device.synchronize(job.end)
        seconds = time.perf_counter() - start
        self._spare_events += self._jobs.pop(_TRIAL).events()
        return seconds


def _brackets(trials: Sequence[Trial]) -> str:
    return f" ({', '.join(map(str, trials))})" if trials else ""
