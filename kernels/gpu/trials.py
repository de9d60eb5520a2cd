"""Before a GPU pipeline's first job: kernels are compiled, transports compared, and then timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from kvstrata.kernels.compare import Comparison, Scratch
from kvstrata.kernels.gpu.batches import Batch, Pages, Subshard
from kvstrata.kernels.gpu.device import Device, Pieces
from kvstrata.kernels.gpu.mover import Mover
from kvstrata.kernels.gpu.staging import Channel
from kvstrata.kernels.gpu.transport import TRIAL_BYTES, Choice, Transport, Trial, choose, fastest
from kvstrata.kernels.plan import Segment

logger = logging.getLogger("kvstrata.kernels")

# Pages that are timed are kept so long: a copy of this size, for some milliseconds.
_KEPT_BYTES = 256 << 20


class TransportError(RuntimeError):
    """A transport that cannot be done without moves other bytes than it should."""


class Trials:
    """Tries transports on some blocks and on slots of the region that nobody else uses; both are
    as they were after each call, also after a failure.

    segments: of this worker, with the subshards that each is moved in.
    channels: of stores, of loads, and others. slots: of the region, one at least.
    transport: the only one there is to be; None for all.
    """

    def __init__(
        self,
        segments: Sequence[tuple[Segment, list[Subshard]]],
        mover: Mover,
        device: Device,
        channels: Sequence[Channel],
        region: torch.Tensor,
        slots: range,
        transport: Transport | None,
    ) -> None:
        self._segments = segments
        self._mover = mover
        self._device = device
        self._channels = channels
        self._region = region
        self._slots = slots
        self._forced = transport is not None
        self._ways = list(Transport) if transport is None else [transport]
        self._submitted, self._done = device.event(), device.event()
        self.times: dict[tuple[str, str], list[Trial]] = {}

    def run(
        self, most_pages: int, slot_sizes: Sequence[int], *, kernels_reach_region: bool
    ) -> None:
        """Choose the transports of every subshard and the size of the channels' staging slots.

        most_pages: of one batch. slot_sizes: bytes, ascending; the channels have slots of the last.
        kernels_reach_region: whether zero-copy is possible.
        Raises TransportError where bytes are moved wrong and there is no other way.
        """
        if not kernels_reach_region and Transport.ZERO_COPY in self._ways:
            if self._forced:
                raise TransportError(
                    "transport zero-copy needs pinned CPU pages and a GPU that uses the host's "
                    'addresses; remove "transport" from the configuration'
                )
            self._ways.remove(Transport.ZERO_COPY)
        for segment, subshards in self._segments:
            with self._scratch(segment, np.empty(0, np.int64), self._slots[:2]).kept():
                self._launch(subshards)
        self._compare()
        if len(slot_sizes) > 1:
            self._size_slots(slot_sizes, most_pages)
        for segment, subshards in self._segments:
            self._choose(segment, subshards, most_pages)

    def _scratch(self, segment: Segment, blocks: np.ndarray, slots: Sequence[int]) -> Scratch:
        of = np.array(slots, dtype=np.int64)
        return Scratch(segment, self._region, blocks, of, self._device.drain)

    # -- warm-up --------------------------------------------------------------------

    def _launch(self, subshards: Sequence[Subshard]) -> None:
        """In every channel, launch every kernel once, on blocks that are all missing, and copy a
        byte once."""
        for channel in self._channels:
            for subshard in subshards:
                self._launch_subshard(channel, subshard)
            self._device.drain()
            staged = channel.next_slot().address
            host = self._region[self._slots[0]].data_ptr() + subshards[0].segment.in_page.offset
            piece = Pieces(np.array([staged]), np.array([host]), np.ones(1, np.int64))
            for to_host in (False, True):
                self._device.copy(channel.dma, piece, to_host=to_host)

    def _launch_subshard(self, channel: Channel, subshard: Subshard) -> None:
        first, ids = np.array(self._slots[:1]), np.full((1, subshard.segment.blocks_per_chunk), -1)
        there = channel.ring.put(np.concatenate((first, ids.ravel())))
        pages = Pages(first, ids, there[:1], there[1:].view(1, -1))
        batch = Batch(subshard, pages, 0, 1, subshard.shards(first))
        for unpack in (False, True):
            if Transport.STAGED in self._ways:
                self._mover.pack(channel.kernels, batch, channel.next_slot(), unpack=unpack)
            if Transport.ZERO_COPY in self._ways:
                try:
                    self._mover.zero_copy(channel.kernels, batch, unpack=unpack)
                except (RuntimeError, ValueError) as error:  # Triton's: no address for it
                    if self._forced:
                        raise
                    self._leave_out(Transport.ZERO_COPY, error)

    # -- comparison -----------------------------------------------------------------

    def _compare(self) -> None:
        """Leave out every transport that moves other bytes than the oracle, by one line."""
        for way in list(self._ways):
            found = self._difference(way)
            if found and (self._forced or way is Transport.STAGED):
                raise TransportError(
                    f"transport {way} {found}; "
                    + (
                        'remove "transport" from the configuration, so that another one is chosen'
                        if self._forced and way is not Transport.STAGED
                        else "pages cannot be trusted with this GPU, its driver and this Triton"
                    )
                )
            if found:
                self._leave_out(way, found)

    def _difference(self, way: Transport) -> str | None:
        for segment, subshards in self._segments:
            if self._forced or subshards[0].may_pay(way):
                comparison = Comparison(segment, self._region, self._slots, self._device.drain)
                for store in (True, False):
                    move = partial(self._move, subshards, way, store)
                    try:
                        found = comparison.difference(move, store=store)
                    except Exception as error:  # a driver's, Triton's or torch's
                        found = f"fails: {error}"
                    if found:
                        return found
        return None

    def _leave_out(self, way: Transport, reason: object) -> None:
        self._ways.remove(way)
        logger.warning("kvstrata: transport %s is left out: %s", way, reason)

    # -- measurement ----------------------------------------------------------------

    def _choose(self, segment: Segment, subshards: list[Subshard], most_pages: int) -> None:
        """The transports of one segment: of its first subshard, and the others are alike."""
        if self._forced:
            for store in (True, False):
                _choose_all(subshards, Choice(*self._ways * 2), store=store)
            return
        first = subshards[0]
        ways = [way for way in self._ways if first.may_pay(way)]
        with self._timed_slots(segment, first, most_pages) as slots:
            for store in (True, False):  # stores first: loads bring back what they stored

                def seconds(way: Transport, count: int, store: bool = store) -> float:
                    return self._seconds(first, way, store, slots[:count])

                choice, times = choose(seconds, ways, len(slots), first.shard_bytes)
                _choose_all(subshards, choice, store=store)
                self.times[segment.names[0], "store" if store else "load"] = times

    def _size_slots(self, sizes: Sequence[int], most_pages: int) -> None:
        """Have staging slots of the size with which the largest segment's pages are there soonest:
        of the smaller one, unless the other is faster."""
        segment, subshards = max(self._segments, key=lambda one: one[0].shard_bytes)
        with self._timed_slots(segment, subshards[0], most_pages) as slots:

            def seconds(size: int) -> float:
                for channel in self._channels:
                    channel.slot_bytes = size
                return sum(
                    self._seconds(subshards[0], Transport.STAGED, store, slots)
                    for store in (True, False)
                )

            best = sizes[0]
            if len(slots) * subshards[0].pitch > best:  # else one slot takes them all
                best = fastest(seconds, sizes)
        for channel in self._channels:
            channel.stage(best)

    @contextmanager
    def _timed_slots(
        self, segment: Segment, subshard: Subshard, most_pages: int
    ) -> Iterator[list[int]]:
        """Slots for many pages of a subshard; they and the first blocks are put back afterwards."""
        slots = [slot for slot in self._slots if slot % segment.replicas == segment.replica]
        slots = slots or list(self._slots)
        page_bytes = segment.page_offset + segment.heads * segment.head_bytes
        width = segment.blocks_per_chunk
        most = min(
            most_pages, len(slots), segment.num_blocks // width, max(1, _KEPT_BYTES // page_bytes)
        )
        pages = max(1, min(most, TRIAL_BYTES // subshard.shard_bytes))
        blocks = np.arange(min(pages * width, segment.num_blocks))
        with self._scratch(segment, blocks, slots[:pages]).kept():
            yield slots[:pages]

    def _seconds(self, subshard: Subshard, way: Transport, store: bool, slots: list[int]) -> float:
        """How long it takes to move the first blocks to these slots, or back."""
        width = subshard.segment.blocks_per_chunk
        ids = np.arange(len(slots) * width).reshape(-1, width)
        ids[ids >= subshard.segment.num_blocks] = -1
        start = time.perf_counter()
        self._move([subshard], way, store, np.array(slots), ids)
        return time.perf_counter() - start

    def _move(
        self,
        subshards: list[Subshard],
        way: Transport,
        store: bool,
        slots: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        """Move pages as a job does, and wait until they are there."""
        device, channel = self._device, self._channels[0 if store else 1]
        _choose_all(subshards, Choice(way, way), store=store)
        self._submitted.record(device.compute_stream())
        channel.kernels.wait_event(self._submitted)
        for batch, transport in self._mover.batches(subshards, slots, ids, channel, store=store):
            self._mover.start(channel, batch, transport, self._submitted, store=store)
        for stream in (channel.kernels, channel.dma):
            self._done.record(stream)
            self._done.synchronize()


def _choose_all(subshards: Sequence[Subshard], choice: Choice, *, store: bool) -> None:
    for subshard in subshards:
        subshard.choices[store] = choice
