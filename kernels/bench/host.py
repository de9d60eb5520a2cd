"""What one staging slot costs the host, with everything but the driver's own calls.

No GPU is needed: kernels are compiled for one that is not there (`absent_gpu`), launches end before
the driver, streams and events do nothing, and copies call a C function that does nothing. The main
program runs this as a process of its own: `python -m kvstrata.kernels.bench.host` writes a line of
JSON for each result.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

from kvstrata.kernels.bench.absent_gpu import HANDLE, AbsentGpu
from kvstrata.kernels.bench.models import MODELS, Model, rank_caches
from kvstrata.kernels.bench.results.cases import HOST, LARGE_BYTES, LOAD, OURS, STORE, Case, Result
from kvstrata.kernels.gpu.batches import Subshard
from kvstrata.kernels.gpu.device import CudaDevice, Event, Stream
from kvstrata.kernels.gpu.memcpy import Driver, _batched
from kvstrata.kernels.gpu.mover import Mover
from kvstrata.kernels.gpu.pipeline import MAX_BATCH, STAGING_SIZES, STAGING_SLOTS
from kvstrata.kernels.gpu.staging import Channel
from kvstrata.kernels.pack import prepare_triton

MOVED_BYTES = LARGE_BYTES  # in a round
_LAYOUT = "LBHNC"  # what the host does is the same in every one
_MODELS = MODELS[:2]  # pages of four to a slot, and of 25
# On a core that another virtual machine slows down everything takes up to 1.7 times as long, for
# seconds on end: only rounds count in which a fixed piece of Python took little more than at best.
_UNDISTURBED = 1.1


def _nothing(*arguments: object) -> None:
    pass


class Idle(CudaDevice):
    """A device whose driver does nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        # compares its first two arguments, the addresses of two arrays, and says 0: not equal
        self.driver = Driver("nothing", _batched(ctypes.CDLL(None).pthread_equal))
        self._stream = SimpleNamespace(cuda_stream=HANDLE, wait_event=_nothing)
        self._event = SimpleNamespace(record=_nothing, query=lambda: True, synchronize=_nothing)

    def stream(self, *, urgent: bool) -> Stream:
        return self._stream

    def event(self, *, timed: bool = False) -> Event:
        return self._event

    def allocate_pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype)


def measure(rounds: int) -> Iterator[Result]:
    """Microseconds of CPU time per slot, for each model's first group: medians of the rounds in
    which the core ran at full speed.

    Triton must not be interpreted, and `absent_gpu` be installed.
    """
    cases: dict[Case, Callable[[], int]] = {}
    for model in _MODELS:
        move, blocks, nbytes = _mover(model)
        for operation in (STORE, LOAD):
            case = Case(model.name, _LAYOUT, operation, 1, blocks, nbytes)
            cases[case] = partial(move, store=operation == STORE)
    slots = {case: move() for case, move in cases.items()}  # compiles
    times: list[tuple[float, Case, float]] = []  # of the fixed work around a case, and of the case
    before = _spent(_fixed_work)
    for _ in range(rounds):
        for case, move in cases.items():
            taken = _spent(move)
            after = _spent(_fixed_work)
            times.append((before + after, case, taken))
            before = after
    most = _UNDISTURBED * min(fixed for fixed, *_ in times)
    for case, count in slots.items():
        undisturbed = [taken for fixed, of, taken in times if of == case and fixed <= most]
        result = 1e6 * median(undisturbed) / count if undisturbed else math.nan
        yield Result(case, OURS, HOST, result, "us per slot")


def _spent(work: Callable[[], object]) -> float:
    """Seconds of CPU time."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _fixed_work() -> None:
    last: dict[int, int] = {}
    for number in range(3000):
        last[number & 63] = last.get(number & 31, 0) + 1


def _mover(model: Model) -> tuple[Callable[..., int], int, int]:
    """What queues full slots and tells how many these were; the blocks and bytes in them."""
    group = model.groups[0]
    pages = MOVED_BYTES // (group.token_bytes * group.block_tokens // model.tp)
    # on the CPU: the driver is what would look where memory is
    (segment,) = rank_caches(
        group, _LAYOUT, num_blocks=pages, blocks_per_chunk=1, tp=model.tp, device="cpu"
    )
    region = torch.empty(pages, segment.heads * segment.head_bytes, dtype=torch.uint8)
    subshard = Subshard(segment, region, prepare_triton, MAX_BATCH)
    device = Idle()
    mover = Mover(region, device, [subshard], MAX_BATCH)
    channel = Channel(device, STAGING_SLOTS, STAGING_SIZES[0], 4 * MAX_BATCH)
    slots, ids = np.arange(pages), np.arange(pages).reshape(-1, 1)

    def move(*, store: bool) -> int:
        count = 0
        for batch, way in mover.batches([subshard], slots, ids, channel, store=store):
            mover.start(channel, batch, way, None, store=store)
            count += 1
        return count

    return move, pages, pages * subshard.shard_bytes


def measured(rounds: int) -> Iterator[Result]:
    """The same, in a process of its own.

    Raises CalledProcessError when that fails; what it said is on stderr.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, str(rounds)]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for line in run.stdout.splitlines():
        case, *result = json.loads(line)
        yield Result(Case(*case), *result)


if __name__ == "__main__":
    AbsentGpu().install()
    for result in measure(int(sys.argv[1])):
        print(json.dumps(result))
