"""The CPU path: stores and loads of the pipeline against one memcpy of the same bytes.

One thread; LBHNC caches of one allocation per layer, as vLLM makes them, and a shared page region.
The caches hold four times the blocks that a round moves, so that no cache of the processor helps:
"scattered" takes any of them, "a run" takes neighbours, which vLLM hands out until its pool is
used up. Both come in random order, and so do the slots.
"""

import mmap
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from kvstrata.kernels.bench.results.cases import Case, Result
from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.geometry import head_slabs
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.pipeline import GroupWork
from kvstrata.kernels.plan import LocalLayer, Segment, plan

ROUND_BYTES = 128 << 20
OURS, MEMCPY = "kvstrata", "one memcpy"
RATIO = "ratio to one memcpy"


class WrongBytes(Exception):
    """A copy moved other bytes than the oracle."""


@dataclass(frozen=True)
class Shape:
    """A page: `layers` x `heads` x `blocks` slabs of `slab_bytes`."""

    layers: int
    heads: int
    blocks: int
    slab_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.layers * self.heads * self.blocks * self.slab_bytes


# 16 KiB: 32 tokens of head size 64 in float32, or of head size 128 in bfloat16
SHAPES = (
    Shape(4, 2, 1, 16 << 10),  # 128 KiB
    Shape(8, 4, 1, 16 << 10),  # 512 KiB
    Shape(8, 4, 4, 16 << 10),  # 2 MiB
    Shape(32, 8, 2, 16 << 10),  # 8 MiB, Llama-3-8B
)


class World:
    """Caches, region and one round of work, and a contiguous copy of the region's size."""

    def __init__(self, shape: Shape, scattered: bool, round_bytes: int) -> None:
        random = np.random.default_rng(0)
        pages = max(1, round_bytes // shape.page_bytes)
        moved = pages * shape.blocks
        sizes = (4 * moved, shape.heads, 1, shape.slab_bytes)
        self.views = [torch.zeros(sizes, dtype=torch.uint8) for _ in range(shape.layers)]
        for view in self.views:
            view.random_(0, 256)
        caches = [head_slabs(str(i), view) for i, view in enumerate(self.views)]
        held = {cache.name: LocalLayer(cache, 0) for cache in caches}
        self.segment: Segment
        (self.segment,) = plan([c.shape(shape.heads) for c in caches], held, shape.blocks)
        # shared memory, as the region of a server is
        self.region = torch.frombuffer(mmap.mmap(-1, pages * shape.page_bytes), dtype=torch.uint8)
        self.flat = torch.ones_like(self.region)
        self.region.fill_(1)
        self.pages = self.region.view(pages, -1)
        blocks = random.permutation(4 * moved if scattered else moved)[:moved]
        self.work = GroupWork(0, random.permutation(pages), blocks.reshape(pages, -1))
        self.pipeline = CpuPipeline({0: (self.segment,)}, self.pages)

    def store(self) -> None:
        self.pipeline.submit_store(0, [self.work])

    def load(self) -> None:
        self.pipeline.submit_load(0, [self.work])

    def verify(self) -> None:
        """Store and load once and compare all bytes with the oracle's.

        Raises WrongBytes when they differ.
        """
        wanted = torch.zeros_like(self.pages)
        rows, ids = torch.from_numpy(self.work.slots), torch.from_numpy(self.work.block_ids)
        copy_torch(self.segment, self.segment.in_page, wanted, rows, ids, unpack=False)
        self.store()
        if not torch.equal(self.pages, wanted):
            raise WrongBytes("the store wrote other pages")
        before = [view.clone() for view in self.views]
        for view in self.views:
            view[ids.flatten()] = 0
        self.load()
        if not all(torch.equal(v, b) for v, b in zip(self.views, before, strict=True)):
            raise WrongBytes("the load wrote other blocks")


def measure(
    repeat: int, shapes: tuple[Shape, ...] = SHAPES, round_bytes: int = ROUND_BYTES
) -> Iterator[Result]:
    """GB/s of both, and the median of the ratios of neighbouring rounds, for each shape."""
    for shape in shapes:
        for scattered in (False, True):
            # in a process of its own memory lies as in a worker that has just started
            with ProcessPoolExecutor(1, get_context("fork")) as process:
                case = process.submit(_measure, shape, scattered, round_bytes, repeat)
                yield from case.result()


def _measure(shape: Shape, scattered: bool, round_bytes: int, repeat: int) -> list[Result]:
    torch.set_num_threads(1)
    world = World(shape, scattered, round_bytes)
    world.verify()
    region, flat = world.region.numpy(), world.flat.numpy()
    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "store": (world.store, lambda: np.copyto(region, flat)),
        "load": (world.load, lambda: np.copyto(flat, region)),
    }
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(repeat):
        for operation, (ours, memcpy) in pairs.items():
            seconds[operation].append((_time(ours), _time(memcpy)))
    figures = []
    for operation, times in seconds.items():
        blocks = "scattered" if scattered else "a run"
        case = Case("", "", f"{operation}, {shape.page_bytes >> 10} KiB pages, blocks {blocks}")
        for contestant, medians in zip((OURS, MEMCPY), zip(*times, strict=True), strict=True):
            speed = region.nbytes / 1e9 / statistics.median(medians)
            figures.append(Result(case, contestant, "speed", speed, "GB/s"))
        ratio = statistics.median(memcpy / ours for ours, memcpy in times)
        figures.append(Result(case, OURS, RATIO, ratio, ""))
    return figures


def _time(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
