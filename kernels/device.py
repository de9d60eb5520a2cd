"""The few device operations that the staged pipeline is made of.

They are a seam: tests put a simulated device here that runs the queued work in any order that
the streams and events allow.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from kvstrata.kernels.driver import Driver, drivers

Stream = Any
Event = Any
cuda: Any = torch.cuda  # its classes are untyped

# Drivers refuse very large registrations; vLLM splits at the same size.
_MAX_PINNED_RUN = 64 << 30
_PORTABLE_AND_MAPPED = 3  # cudaHostRegister: kernels may use the addresses


class Pieces(NamedTuple):
    """Contiguous pieces of device and host memory that belong together.

    device, host: addresses, int64 [n]. sizes: bytes, int64 [n].
    """

    device: np.ndarray
    host: np.ndarray
    sizes: np.ndarray


class Device(Protocol):
    """Streams run what is queued on them in order; events order streams among each other."""

    def stream(self, *, urgent: bool) -> Stream:
        """A new stream; urgent ones are served before others."""

    def compute_stream(self) -> Stream:
        """The stream on which the model runs."""

    def event(self) -> Event:
        """A new event. Waiting for one that was never recorded does nothing."""

    def run(self, stream: Stream, action: Callable[[], None]) -> None:
        """Queue what `action` does."""

    def copy(self, stream: Stream, pieces: Pieces, *, to_host: bool) -> None:
        """Queue copies between device and pinned host memory.

        Raises RuntimeError when the driver refuses.
        """

    def record(self, event: Event, stream: Stream) -> None:
        """The event now means: all that is queued on the stream so far is done."""

    def hold(self, stream: Stream, event: Event) -> None:
        """What is queued on the stream from now on waits for what the event means now."""

    def reached(self, event: Event) -> bool:
        """Whether it has happened."""

    def synchronize(self, event: Event) -> None:
        """Return when it has happened."""

    def drain(self) -> None:
        """Return when all queued work has happened, on every stream."""

    def seconds(self, start: Event, end: Event) -> float:
        """Time between two events that have happened."""

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Device memory [numel]."""

    def allocate_pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory [numel] that the device copies from without the host's help."""

    def pin(self, region: torch.Tensor) -> None:
        """Make host memory [slots, slot bytes] what `allocate_pinned` gives, for kernels too.

        Raises RuntimeError when the driver refuses; what was pinned before stays so.
        """

    def unpin(self) -> None:
        """Undo all `pin`. Callable twice."""


def persistent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, in memory that stays while vLLM sleeps.

    vLLM registers KV caches inside its sleep-mode memory pool, whose memory it takes away later.
    Pools apply to the thread that entered them; a thread of our own is outside.
    """

    def move() -> torch.Tensor:
        moved = tensor.to(device)
        if moved.is_cuda:
            cuda.current_stream(device).synchronize()  # any stream may read it
        return moved

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(move).result()


class CudaDevice:
    """A CUDA (or ROCm) device through torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: list[int] = []  # addresses

    @cached_property
    def driver(self) -> Driver:
        """What copies: the first of the machine's ways that works here.

        Raises RuntimeError when none does, OSError without the driver's library.
        """
        host, there = self.allocate_pinned(1, torch.int64), self.allocate(1, torch.int64)
        to, source = (np.array([end.data_ptr()]) for end in (there, host))
        stream = self.stream(urgent=False)
        refusals = []
        for driver in drivers():
            try:
                with cuda.device(self._device):
                    driver.copy(to, source, np.array([host.nbytes]), stream.cuda_stream)
                stream.synchronize()
                return driver
            except RuntimeError as error:
                refusals.append(f"{driver.name}: {error}")
        raise RuntimeError("; ".join(refusals))

    def stream(self, *, urgent: bool) -> Stream:
        return cuda.Stream(self._device, priority=-1 if urgent else 0)

    def compute_stream(self) -> Stream:
        return cuda.current_stream(self._device)

    def event(self) -> Event:
        return cuda.Event(enable_timing=True)

    def run(self, stream: Stream, action: Callable[[], None]) -> None:
        with cuda.stream(stream):
            action()

    def copy(self, stream: Stream, pieces: Pieces, *, to_host: bool) -> None:
        ends = (pieces.host, pieces.device) if to_host else (pieces.device, pieces.host)
        with cuda.device(self._device):
            self.driver.copy(*ends, pieces.sizes, stream.cuda_stream)

    def record(self, event: Event, stream: Stream) -> None:
        event.record(stream)

    def hold(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def reached(self, event: Event) -> bool:
        return bool(event.query())

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def drain(self) -> None:
        cuda.synchronize(self._device)

    def seconds(self, start: Event, end: Event) -> float:
        return float(start.elapsed_time(end)) / 1000

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return persistent(torch.zeros(numel, dtype=dtype), self._device)

    def allocate_pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, pin_memory=True)

    def pin(self, region: torch.Tensor) -> None:
        slots, slot_bytes = region.shape
        step = max(1, _MAX_PINNED_RUN // slot_bytes)  # whole slots: no copy spans two runs
        before = len(self._pinned)
        with cuda.device(self._device):
            for first in range(0, slots, step):
                run = region[first : first + step]
                flags = _PORTABLE_AND_MAPPED
                error = int(cuda.cudart().cudaHostRegister(run.data_ptr(), run.nbytes, flags))
                if error:
                    self._unpin(before)
                    raise RuntimeError(
                        f"CUDA could not pin the CPU pages (error {error} for {run.nbytes} of "
                        f"{region.nbytes} bytes): use a smaller cpu_bytes_to_use"
                    )
                self._pinned.append(run.data_ptr())

    def unpin(self) -> None:
        self._unpin(0)

    def _unpin(self, left: int) -> None:
        """Undo the last ones, until so many are left."""
        while len(self._pinned) > left:
            cuda.cudart().cudaHostUnregister(self._pinned.pop())
