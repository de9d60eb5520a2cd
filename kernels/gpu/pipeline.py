"""The pipeline where KV caches lie on a GPU: packing kernels in short bursts, and large DMAs.

Stores, loads and expedited loads have a channel each and do not wait for each other. What happens
to blocks is ordered against the model: stores read them after the work that was queued on the
compute stream before, loads write them after it; `fence` lets later work follow. The host never
waits in between, but where a channel's ring of block ids is full.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvstrata.kernels.gpu.batches import Batch, Subshard
from kvstrata.kernels.gpu.device import Device, Event
from kvstrata.kernels.gpu.mover import Mover
from kvstrata.kernels.gpu.staging import Channel
from kvstrata.kernels.gpu.transport import FEW_BYTES, FEW_PAGES, Transport, Trial
from kvstrata.kernels.gpu.trials import Trials
from kvstrata.kernels.pack import Prepare
from kvstrata.kernels.pipeline import (
    Finished,
    Groups,
    GroupWork,
    check_region,
    check_work,
)
from kvstrata.kernels.plan import split

logger = logging.getLogger("kvstrata.kernels")

# Bytes of a staging slot. The first is large enough for a DMA to reach its speed (about 150 us on
# PCIe 5) and small enough for three channels to go unnoticed in GPU memory; larger shards are
# split. The second, with which the host has half as much to queue, is taken where it is faster in
# a trial.
STAGING_SIZES = (8 << 20, 16 << 20)
# One is filled, one is moved, and one evens out the difference.
STAGING_SLOTS = 3
MAX_BATCH = 256  # pages: keeps the arrays of one batch small
# A ring holds the ids of so many times all blocks: what can be under way, and as much again.
RING_ROUNDS = 2

_REMEDY = "use a smaller cpu_bytes_to_use, or a higher limit of locked memory (ulimit -l)"


@dataclass
class _Job:
    """`released`: the blocks are the model's again. `start` and `end` are timed. `nbytes`: moved
    by this worker."""

    submitted: Event
    released: Event
    start: Event
    end: Event
    nbytes: int = 0


class GpuPipeline:
    """See the module and `Pipeline`.

    groups: this worker's segments by group, with caches on the device.
    region: uint8 [slots, slot bytes] in CPU memory; what is pinned stays so until `shutdown`. Where
        the driver refuses that, pages move all the same, slower, with one warning.
    device, prepare: what runs it; all kernels are compiled before the constructor returns.
    transport: of everything; None compares all with the oracle, times those that may pay, and takes
        the best for each segment.
    scratch: slots that no other worker uses now, for these trials; all, unless given. They and the
        blocks are as before when the constructor returns or raises.
    ready: how many slots, from the first on, are pinned now, the others when `pin` is called; all,
        unless given. Kernels are given the address of the first.
    Raises TransportError when pages cannot be moved right.
    """

    def __init__(
        self,
        groups: Groups,
        region: torch.Tensor,
        device: Device,
        prepare: Prepare,
        transport: Transport | None = None,
        scratch: range | None = None,
        ready: int | None = None,
    ) -> None:
        check_region(groups, region)
        self._groups = groups
        self._region = region
        self._device = device
        self._jobs: dict[int, _Job] = {}
        self._spare_events: dict[bool, list[Event]] = {False: [], True: []}  # timed ones
        self._subshards = {
            group: [
                [
                    Subshard(subshard, region, prepare, MAX_BATCH)
                    for subshard in split(s, STAGING_SIZES[0])
                ]
                for s in segments
            ]
            for group, segments in groups.items()
        }
        segments = [
            pair
            for group in groups
            for pair in zip(groups[group], self._subshards[group], strict=True)
        ]
        subshards = [subshard for _, some in segments for subshard in some]
        self._mover = Mover(region, device, subshards, MAX_BATCH)
        least = max(subshard.pitch for subshard in subshards)
        tried = STAGING_SIZES if transport is None else STAGING_SIZES[:1]
        sizes = sorted({max(least, size) for size in tried})
        longest = max(1 + subshard.segment.blocks_per_chunk for subshard in subshards) * MAX_BATCH
        blocks = sum(segment.num_blocks for segment, _ in segments)
        numbers = max(longest, RING_ROUNDS * 2 * blocks)
        channels = self._store, self._load, self._expedited = [
            Channel(device, STAGING_SLOTS, sizes[-1], numbers) for _ in range(3)
        ]
        self._pinning = True  # until the driver refuses once
        self.pin(range(len(region) if ready is None else ready))
        device.drain()  # what was written to the buffers comes before all use of them
        slots = range(len(region)) if scratch is None else scratch
        trials = Trials(segments, self._mover, device, channels, region, slots, transport)
        try:
            with device.current():
                reached = self._pinning and device.reaches_host()
                trials.run(MAX_BATCH, sizes, kernels_reach_region=reached)
        except BaseException:
            device.unpin()
            raise
        self._times = trials.times

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        channel = self._store
        with self._open(job_id, work) as job:
            channel.kernels.wait_event(job.submitted)
            job.start.record(channel.kernels)
            direct = False
            for batch, transport in self._batches(work, channel, store=True):
                direct = direct or transport is Transport.DIRECT
                self._mover.start(channel, batch, transport, job.submitted, store=True)
                job.nbytes += batch.nbytes
            if not direct:
                job.released.record(channel.kernels)
            gathered = self._event()
            gathered.record(channel.kernels)
            channel.dma.wait_event(gathered)
            self._reuse(gathered)
            if direct:
                job.released.record(channel.dma)
            job.end.record(channel.dma)

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        channel = self._expedited if expedited else self._load
        with self._open(job_id, work) as job:
            job.start.record(channel.dma)
            # The model may still use the blocks' former content, but staging is nobody's.
            channel.kernels.wait_event(job.submitted)
            channel.kernels.wait_event(job.start)
            for batch, transport in self._batches(work, channel, store=False):
                self._mover.start(channel, batch, transport, job.submitted, store=False)
                job.nbytes += batch.nbytes
            job.released.record(channel.kernels)
            job.end.record(channel.kernels)

    def finished(self) -> list[Finished]:
        done = []
        for job_id, job in list(self._jobs.items()):
            if job.end.query():
                seconds = job.start.elapsed_time(job.end) / 1000
                done.append(Finished(job_id, job.nbytes, seconds))
                self._reuse(job.submitted, job.released)
                self._reuse(job.start, job.end, timed=True)
                del self._jobs[job_id]
        return done

    def fence(self, job_ids: Collection[int]) -> None:
        """See `Pipeline`. The device waits, and not the host."""
        for job_id in job_ids:
            if job_id in self._jobs:
                compute = self._device.compute_stream()
                compute.wait_event(self._jobs[job_id].released)

    def wait(self, job_ids: Collection[int]) -> None:
        for job_id in job_ids:
            if job_id in self._jobs:
                self._jobs[job_id].end.synchronize()

    def describe(self) -> str:
        slots = f"staging slots of {self._store.slot_bytes / (1 << 20):g} MiB"
        return "; ".join([slots, *self._choices()])

    def pin(self, slots: range) -> None:
        """See `Pipeline`. Once the driver refuses, these slots and later ones stay pageable; it is
        an error only where pages move by zero-copy already, which needs pinned ones."""
        if not self._pinning:
            return
        try:
            self._device.pin(self._region[slots.start : slots.stop])
        except RuntimeError as error:
            if self._zero_copies():
                raise RuntimeError(f"{error}, and zero-copy needs that: {_REMEDY}") from error
            self._pinning = False
            logger.warning(
                "kvstrata: %s; pages move unpinned from slot %d on, which is slower and makes the "
                "model's thread wait: %s",
                error,
                slots.start,
                _REMEDY,
            )

    def shutdown(self) -> None:
        self.wait(list(self._jobs))
        self._device.unpin()

    @contextmanager
    def _open(self, job_id: int, work: Sequence[GroupWork]) -> Iterator[_Job]:
        """A job to be queued; none, if that fails."""
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} is still under way")
        check_work(self._groups, self._region, work)
        events = [self._event(timed=timed) for timed in (False, False, True, True)]
        job = self._jobs[job_id] = _Job(*events)
        job.submitted.record(self._device.compute_stream())
        try:
            with self._device.current():
                yield job
        except BaseException:
            del self._jobs[job_id]  # its events are not used again: some are not recorded
            raise

    def _event(self, *, timed: bool = False) -> Event:
        spare = self._spare_events[timed]
        return spare.pop() if spare else self._device.event(timed=timed)

    def _reuse(self, *events: Event, timed: bool = False) -> None:
        self._spare_events[timed] += events

    def _zero_copies(self) -> bool:
        """Whether zero-copy is chosen for anything."""
        return any(
            Transport.ZERO_COPY in choice
            for of in self._subshards.values()
            for some in of
            for subshard in some
            for choice in subshard.choices.values()
        )

    def _choices(self) -> Iterator[str]:
        return (
            f"{some[0].segment.names[0]} and alike: {way} "
            f"{choice.few} up to {FEW_PAGES} pages and {FEW_BYTES >> 20} MiB, else {choice.many}"
            f"{_brackets(self._times.get((some[0].segment.names[0], way), []))}"
            for of in self._subshards.values()
            for some in of
            for way, choice in zip(("store", "load"), some[0].choices.values(), strict=True)
        )

    def _batches(
        self, work: Sequence[GroupWork], channel: Channel, *, store: bool
    ) -> Iterator[tuple[Batch, Transport]]:
        for group, slots, block_ids in work:
            for subshards in self._subshards[group]:
                yield from self._mover.batches(subshards, slots, block_ids, channel, store=store)


def _brackets(trials: Sequence[Trial]) -> str:
    return f" ({', '.join(map(str, trials))})" if trials else ""
