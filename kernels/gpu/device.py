"""The few device operations that the staged pipeline is made of.

They are a seam: tests put a simulated device here that runs the queued work in any order that
the streams and events allow.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from kvstrata.kernels.gpu.memcpy import Driver, drivers, host_addresses_work
from kvstrata.kernels.plan import persistent

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
    """Streams run what is queued on them in order; events order streams among each other. Both are
    torch's, or do as those: `wait_event` of the one; `record`, `query`, `synchronize` and
    `elapsed_time` of the other."""

    def current(self) -> AbstractContextManager[object]:
        """Inside, launches and copies go to this device. All calls of `launch` and `copy` are."""

    def stream(self, *, urgent: bool) -> Stream:
        """A new stream; kernels of urgent ones start before those of others."""

    def compute_stream(self) -> Stream:
        """The stream on which the model runs."""

    def event(self, *, timed: bool = False) -> Event:
        """A new event. Waiting for one that was never recorded does nothing.

        timed: `elapsed_time` will be asked.
        """

    def launch(self, stream: Stream, kernel: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Queue a prepared copy (`pack.Prepared`) of these pages, rows and block ids."""

    def copy(self, stream: Stream, pieces: Pieces, *, to_host: bool) -> None:
        """Queue copies between device and host memory. Those to the device may read the host's
        side at any time from now on.

        Raises RuntimeError when the driver refuses.
        """

    def drain(self) -> None:
        """Return when all queued work has happened, on every stream."""

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Device memory [numel]."""

    def allocate_pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory [numel] that the device copies from without the host's help."""

    def pin(self, region: torch.Tensor) -> None:
        """Make host memory [slots, slot bytes] what `allocate_pinned` gives, for kernels too where
        `reaches_host`.

        Raises RuntimeError when the driver refuses; what was pinned before stays so.
        """

    def reaches_host(self) -> bool:
        """Whether kernels reach pinned memory by the addresses that the host uses."""

    def unpin(self) -> None:
        """Undo all `pin`. Callable twice."""


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
                    nbytes = np.array([host.nbytes])
                    driver.copy(to, source, nbytes, stream.cuda_stream, to_host=False)
                stream.synchronize()
                return driver
            except RuntimeError as error:
                refusals.append(f"{driver.name}: {error}")
        raise RuntimeError("; ".join(refusals))

    def current(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = cuda.device(self._device)
        return context

    def stream(self, *, urgent: bool) -> Stream:
        return cuda.Stream(self._device, priority=-1 if urgent else 0)

    def compute_stream(self) -> Stream:
        return cuda.current_stream(self._device)

    def event(self, *, timed: bool = False) -> Event:
        return cuda.Event(enable_timing=timed)

    def launch(self, stream: Stream, kernel: Callable[..., None], *tensors: torch.Tensor) -> None:
        kernel(*tensors, stream.cuda_stream)

    def copy(self, stream: Stream, pieces: Pieces, *, to_host: bool) -> None:
        ends = (pieces.host, pieces.device) if to_host else (pieces.device, pieces.host)
        self.driver.copy(*ends, pieces.sizes, stream.cuda_stream, to_host=to_host)

    def drain(self) -> None:
        cuda.synchronize(self._device)

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
                    self.unpin(before)
                    self._forget_error()
                    raise RuntimeError(
                        f"CUDA could not pin the CPU pages (error {error} for {run.nbytes} of "
                        f"{region.nbytes} bytes)"
                    )
                self._pinned.append(run.data_ptr())

    def reaches_host(self) -> bool:
        return host_addresses_work(self._device.index or 0)

    def _forget_error(self) -> None:
        """CUDA's last error stays until somebody asks, and torch asks after its next launch."""
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def unpin(self, left: int = 0) -> None:
        """left: keep so many, of the first."""
        while len(self._pinned) > left:
            cuda.cudart().cudaHostUnregister(self._pinned.pop())
