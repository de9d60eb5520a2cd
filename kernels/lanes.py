"""What a GPU pipeline moves pages through: streams, staging slots and the ring for block ids.

A lane is a pair of streams, one for kernels and one for DMA, and staging slots in device memory
between them, so that the kernel of one batch runs during the DMA of another. Every buffer is made
with the lane, none later.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.device import Device, Event


@dataclass
class StagingSlot:
    """Device memory for one batch, uint8. `filled` and `free` say when it may be read and
    written."""

    memory: torch.Tensor
    filled: Event
    free: Event


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
        """capacity: int64 numbers; `put` waits for the device only when more are under way."""
        self._device = device
        self._stream = stream
        self._host = device.allocate_pinned(capacity, torch.int64)
        self._there = device.allocate(capacity, torch.int64)
        self._numbers = self._host.numpy()
        self._sent: deque[_Sent] = deque()  # oldest first
        self._spare: list[Event] = []
        self._head = 0

    @property
    def capacity(self) -> int:
        """Numbers that one `put` takes at most."""
        return len(self._numbers)

    def put(self, numbers: np.ndarray) -> torch.Tensor:
        """Queue the upload of int64 [n]; what the stream does next may read the returned tensor."""
        start, stop = self._head, self._head + len(numbers)
        self._reclaim(lambda sent: self._device.reached(sent.event))  # few events, not a ringful
        if stop > self.capacity:
            self._reclaim(lambda sent: sent.start >= start)  # what is left of the last round
            start, stop = 0, len(numbers)
        self._reclaim(lambda sent: sent.start < stop and sent.stop > start)
        self._head = stop
        self._numbers[start:stop] = numbers
        host, there = self._host[start:stop], self._there[start:stop]

        def send() -> None:
            there.copy_(host, non_blocking=True)

        self._device.run(self._stream, send)
        event = self._spare.pop() if self._spare else self._device.event()
        self._device.record(event, self._stream)
        self._sent.append(_Sent(start, stop, event))
        return there

    def _reclaim(self, wanted: Callable[[_Sent], bool]) -> None:
        while self._sent and wanted(self._sent[0]):
            sent = self._sent.popleft()
            self._device.synchronize(sent.event)
            self._spare.append(sent.event)


class Lane:
    """Two streams and the memory between them."""

    def __init__(
        self, device: Device, slots: int, slot_bytes: int, numbers: int, *, urgent: bool
    ) -> None:
        """slots, slot_bytes: of staging. numbers: capacity of the ring."""
        self.kernels = device.stream(urgent=urgent)
        self.dma = device.stream(urgent=urgent)
        memory = device.allocate(slots * slot_bytes, torch.uint8).view(slots, slot_bytes)
        self._staging = deque(
            StagingSlot(part, device.event(), device.event()) for part in memory.unbind()
        )
        self.ring = MetadataRing(device, self.kernels, numbers)
        self.slot_bytes = slot_bytes

    def next_slot(self) -> StagingSlot:
        """The slot that was used longest ago."""
        self._staging.rotate(-1)
        return self._staging[-1]
