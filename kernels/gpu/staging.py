"""What a GPU pipeline moves pages through: streams, staging slots and the ring for block ids.

A channel is a pair of streams, one for kernels and one for DMA, and staging slots in device memory
between them, so that the kernel of one batch runs during the DMA of another.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstrata.kernels.gpu.batches import STAGED_ALIGNMENT
from kvstrata.kernels.gpu.device import Device, Event, Pieces


@dataclass
class StagingSlot:
    """Device memory for one batch, uint8, at `address`. `filled` and `free` say when it may be
    read and written."""

    memory: torch.Tensor
    address: int
    filled: Event
    free: Event
    _views: dict[int, torch.Tensor] = field(default_factory=dict)

    def pages(self, pitch: int) -> torch.Tensor:
        """As many pages as fit, uint8 [n, pitch]."""
        view = self._views.get(pitch)
        if view is None:
            count = len(self.memory) // pitch
            view = self._views[pitch] = self.memory[: count * pitch].view(count, pitch)
        return view


@dataclass
class _Sent:
    """A piece of the ring, and when its host side has been read."""

    start: int
    stop: int
    event: Event


class MetadataRing:
    """Rows and block ids on their way to the device: pinned memory, used round and round.

    The device's side needs no guard: a piece of it is overwritten by the stream that reads it.
    """

    def __init__(self, device: Device, stream: object, capacity: int) -> None:
        """capacity: int64 numbers, and what one `put` takes at most; it waits for the device only
        when more are under way."""
        self.capacity = capacity
        self._device = device
        self._stream = stream
        self._host = device.allocate_pinned(capacity, torch.int64)
        self._there = device.allocate(capacity, torch.int64)
        self._numbers = self._host.numpy()
        self._ends = self._there.data_ptr(), self._host.data_ptr()
        self._sent: deque[_Sent] = deque()  # oldest first
        self._spare: list[Event] = []
        self._head = 0

    def put(self, numbers: np.ndarray) -> torch.Tensor:
        """Queue the upload of int64 [n]; what the stream does next may read the returned tensor."""
        start, stop = self._head, self._head + len(numbers)
        self._reclaim(lambda sent: sent.event.query())  # few events, not a ringful
        if stop > self.capacity:
            self._reclaim(lambda sent: sent.start >= start)  # what is left of the last round
            start, stop = 0, len(numbers)
        self._reclaim(lambda sent: sent.start < stop and sent.stop > start)
        self._head = stop
        self._numbers[start:stop] = numbers
        size = self._numbers.itemsize
        there, host = (np.array([end + start * size]) for end in self._ends)
        upload = Pieces(there, host, np.array([numbers.nbytes]))
        self._device.copy(self._stream, upload, to_host=False)
        event = self._spare.pop() if self._spare else self._device.event()
        event.record(self._stream)
        self._sent.append(_Sent(start, stop, event))
        return self._there[start:stop]

    def _reclaim(self, wanted: Callable[[_Sent], bool]) -> None:
        while self._sent and wanted(self._sent[0]):
            sent = self._sent.popleft()
            sent.event.synchronize()
            self._spare.append(sent.event)


class Channel:
    """Two streams and the memory between them.

    slot_bytes: how much of a staging slot is used; at most what was made.
    """

    def __init__(self, device: Device, slots: int, slot_bytes: int, numbers: int) -> None:
        """slots, slot_bytes: of staging. numbers: capacity of the ring."""
        self._device, self._slots = device, slots
        # Kernels run for some 30 us. Behind the model's in a queue they would hold the link up;
        # a DMA needs no multiprocessor, and so no precedence.
        self.kernels = device.stream(urgent=True)
        self.dma = device.stream(urgent=False)
        self.ring = MetadataRing(device, self.kernels, numbers)
        self.stage(slot_bytes)

    def stage(self, slot_bytes: int) -> None:
        """Make staging slots, in place of any that were there and that nobody uses."""
        self.slot_bytes = slot_bytes + (-slot_bytes) % STAGED_ALIGNMENT
        memory = self._device.allocate(self._slots * self.slot_bytes, torch.uint8)
        self._staging = deque(
            StagingSlot(slot, slot.data_ptr(), self._device.event(), self._device.event())
            for slot in memory.view(self._slots, self.slot_bytes).unbind()
        )

    def next_slot(self) -> StagingSlot:
        """The slot that was used longest ago."""
        self._staging.rotate(-1)
        return self._staging[-1]
