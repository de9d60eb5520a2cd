"""What a transfer costs the model beside it: a loop of GEMMs, and one that reads memory."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from kvstrata.kernels.bench.contestants import Piped
from kvstrata.kernels.bench.results.cases import BESIDE, LARGE_BYTES, SLOWDOWN, Case, Result
from kvstrata.kernels.bench.scene import Contestant, Scene
from kvstrata.kernels.gpu.device import Event, cuda
from kvstrata.kernels.pipeline import GroupWork

GEMM, DECODE = "GEMM loop", "decode-like loop"
_SIZE = 4096  # of the GEMM's matrices
_ROWS, _COLUMNS = 16384, 32768  # of a matrix times a vector, as in decoding: reads 1 GiB
_PER_STEP = 8  # about 2 ms on an H100 in either loop: a forward pass of a small model
_STEPS = 50
_AHEAD = 2  # steps that the host queues before it waits, so that transfers are spread over all
_UNDER_WAY = 4  # jobs of each direction: as much as the link moves in three steps


def measure(
    scene: Scene, contestants: Sequence[Contestant], blocks: int, repeat: int
) -> Iterator[Result]:
    """How many times longer the loops take while batches of 64 MiB are stored and loaded.

    blocks: at most in a batch.
    """
    most = blocks // scene.per_chunk
    pages = max(1, min(most, LARGE_BYTES // scene.nbytes(scene.stores(1))))
    stores, loads = scene.stores(pages), scene.loads(pages)
    for name, make in ((GEMM, _gemm), (DECODE, _decode)):
        step = make(scene.device)
        case = Case(scene.model.name, scene.layout, name, scene.per_chunk)
        for contestant in contestants:
            if isinstance(contestant, Piped):
                for metric, value, unit in _beside(step, contestant, stores, loads, repeat):
                    yield Result(case, contestant.name, metric, value, unit)


def _beside(
    step: Callable[[], None],
    contestant: Piped,
    stores: list[GroupWork],
    loads: list[GroupWork],
    repeat: int,
) -> Iterator[tuple[str, float, str]]:
    """Metric, value, unit."""

    def submit() -> int:
        done = contestant.reap()
        while len(contestant.under_way) < 2 * _UNDER_WAY:
            contestant.submit(stores, loads)
        return done

    alone, beside, speeds = [], [], []
    for turn in range(repeat + 1):  # the first warms up
        seconds, _ = _loop(step, lambda: 0)
        longer, nbytes = _loop(step, submit)
        contestant.wait()
        if turn:
            alone.append(seconds)
            beside.append(longer)
            speeds.append(nbytes / 1e9 / longer)
    yield SLOWDOWN, statistics.median(beside) / statistics.median(alone), ""
    yield BESIDE, statistics.median(speeds), "GB/s"


def _loop(step: Callable[[], None], between: Callable[[], int]) -> tuple[float, int]:
    """Seconds of all steps on the device, and the sum of what `between` returned."""
    cuda.synchronize()
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    queued: deque[Event] = deque()
    total = 0
    start.record()
    for _ in range(_STEPS):
        for _ in range(_PER_STEP):
            step()
        mark = cuda.Event()
        mark.record()
        queued.append(mark)
        total += between()
        if len(queued) > _AHEAD:
            queued.popleft().synchronize()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000, total


def _gemm(device: torch.device) -> Callable[[], None]:
    a, b = (torch.randn(_SIZE, _SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, b, out=out)

    return step


def _decode(device: torch.device) -> Callable[[], None]:
    weights = torch.ones(_ROWS, _COLUMNS, device=device, dtype=torch.bfloat16)
    state = torch.ones(_COLUMNS, device=device, dtype=torch.bfloat16)
    out = torch.empty(_ROWS, device=device, dtype=torch.bfloat16)

    def step() -> None:
        torch.mv(weights, state, out=out)

    return step
