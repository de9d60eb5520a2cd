"""The speed of the link: `cudaMemcpyAsync` of one large pinned buffer."""

import statistics
import time
from collections.abc import Iterator

import torch

from kvstrata.kernels.bench.results.cases import BOTH, CEILING, LOAD, SPEED, STORE, Case, Result
from kvstrata.kernels.gpu.device import cuda

CEILING_BYTES = 256 << 20
_ROUNDS = 7


def measure(model: str, device: torch.device) -> Iterator[Result]:
    """GB/s of each direction and of both at once; the first round only warms up.

    model: before whose cases this is measured, since links drift.
    """
    host = [_pinned(CEILING_BYTES) for _ in range(2)]
    there = [torch.zeros(CEILING_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [cuda.Stream(device) for _ in range(2)]
    pairs = {STORE: (host[0], there[0]), LOAD: (there[1], host[1])}  # (to, from)
    seconds: dict[str, list[float]] = {STORE: [], LOAD: [], BOTH: []}
    for _ in range(_ROUNDS):
        for operation, times in seconds.items():
            cuda.synchronize(device)
            start = time.perf_counter()
            for direction, stream in zip(pairs, streams, strict=True):
                if operation in (direction, BOTH):
                    to, source = pairs[direction]
                    with cuda.stream(stream):
                        to.copy_(source, non_blocking=True)
            cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    for operation, times in seconds.items():
        moved = CEILING_BYTES * (2 if operation == BOTH else 1)
        speed = moved / 1e9 / statistics.median(times[1:])
        yield Result(Case(model, "", operation), CEILING, SPEED, speed, "GB/s")


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
