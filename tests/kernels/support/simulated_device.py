"""A device that runs queued work in any order that its streams and events allow."""

import ctypes
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from random import Random

import torch

from kvstrata.kernels.gpu.device import Pieces


class SimEvent:
    """As torch.cuda.Event, on a simulated device."""

    def __init__(self, device: "SimulatedDevice", timed: bool) -> None:
        self.device = device
        self.timed = timed
        self.recorded = 0  # how often
        self.happened: set[int] = set()  # which of these; a later one may be the first
        self.time = 0

    def record(self, stream: "SimStream") -> None:
        self.recorded += 1
        number = self.recorded

        def happen() -> None:
            self.happened.add(number)
            self.time = self.device.clock

        stream.queue.append(happen)

    def query(self) -> bool:
        return self.recorded == 0 or self.recorded in self.happened

    def synchronize(self) -> None:
        while not self.query():
            assert self.device.step(), "the streams wait for each other"

    def elapsed_time(self, end: "SimEvent") -> float:
        assert self.happened and end.happened, "timed before it happened"
        assert self.timed and end.timed
        return 1000.0 * (end.time - self.time)


class SimStream:
    """As torch.cuda.Stream, on a simulated device."""

    def __init__(self, speed: float) -> None:
        self.speed = speed  # how often it is chosen
        self.queue: deque[tuple[SimEvent, int] | Callable[[], object]] = deque()

    def wait_event(self, event: SimEvent) -> None:
        self.queue.append((event, event.recorded))

    def runnable(self) -> bool:
        if not self.queue:
            return False
        head = self.queue[0]
        return callable(head) or head[1] == 0 or head[1] in head[0].happened


class SimulatedDevice:
    """Satisfies `kvstrata.kernels.gpu.device.Device`; memory comes filled with garbage."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.clock = 0
        self.streams: list[SimStream] = []
        self.compute = self.stream(urgent=False)
        self.sealed = False  # set when nothing may be allocated any more
        self.pinned: list[torch.Tensor] = []

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def stream(self, *, urgent: bool) -> SimStream:
        self.streams.append(SimStream(self.random.choice([1, 10])))
        return self.streams[-1]

    def compute_stream(self) -> SimStream:
        return self.compute

    def event(self, *, timed: bool = False) -> SimEvent:
        return SimEvent(self, timed)

    def launch(
        self, stream: SimStream, kernel: Callable[..., None], *tensors: torch.Tensor
    ) -> None:
        stream.queue.append(partial(kernel, *tensors))

    def copy(self, stream: SimStream, pieces: Pieces, *, to_host: bool) -> None:
        each = list(zip(*(column.tolist() for column in pieces), strict=True))
        self.random.shuffle(each)  # a batch has no order
        for device, host, nbytes in each:
            to, source = (host, device) if to_host else (device, host)
            stream.queue.append(partial(ctypes.memmove, to, source, nbytes))

    def drain(self) -> None:
        while self.step():
            pass

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        assert not self.sealed
        return torch.full((numel,), 0x5B, dtype=dtype)

    def allocate_pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self.allocate(numel, dtype)

    def pin(self, region: torch.Tensor) -> None:
        self.pinned.append(region)

    def reaches_host(self) -> bool:
        return True

    def unpin(self) -> None:
        self.pinned.clear()

    def is_pinned(self, start: int, nbytes: int) -> bool:
        """Whether this host memory lies in one pinned run."""
        return any(
            run.data_ptr() <= start and start + nbytes <= run.data_ptr() + run.nbytes
            for run in self.pinned
        )

    def step(self) -> bool:
        """Run one piece of work; False when there is none that may run."""
        choices = [stream for stream in self.streams if stream.runnable()]
        if not choices:
            return False
        self.clock += 1
        speeds = [stream.speed for stream in choices]
        (stream,) = self.random.choices(choices, speeds)
        work = stream.queue.popleft()
        if callable(work):
            work()
        return True
