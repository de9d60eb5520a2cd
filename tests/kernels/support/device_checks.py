"""What a GPU pipeline must do, on whatever device: a real one at real sizes, a simulated one small.

Each check makes its caches and region, moves pages, and compares every byte with `copy_torch`.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from copies import prepare_plainly
from kernel_worlds import DEVICE, LAYOUTS, SPLIT, Model, Rank, some_blocks
from simulated_device import SimulatedDevice

from kvstrata.kernels.gpu.device import CudaDevice, Device
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pack import Prepare, copy_torch, prepare_triton
from kvstrata.kernels.pipeline import Groups, GroupWork
from kvstrata.kernels.plan import Segment

ALL = (*LAYOUTS, *SPLIT)
CPU = torch.device("cpu")
GUARD_BYTES = 4096  # after every page; nobody's
LONG = 5_000_000  # clock cycles, about 3 ms


@dataclass(frozen=True)
class Machine:
    """A device, where its memory is, and the kernels that it runs."""

    device: Device
    memory: torch.device
    prepare: Prepare

    @contextmanager
    def open(
        self, groups: Groups, region: torch.Tensor, transport: Transport | None
    ) -> Iterator[GpuPipeline]:
        pipeline = GpuPipeline(groups, region, self.device, self.prepare, transport)
        try:
            yield pipeline
        finally:
            pipeline.shutdown()

    def compute(self, action: Callable[[], object]) -> None:
        """Queue what the model does."""

        if isinstance(self.device, SimulatedDevice):
            self.device.compute.queue.append(action)
        else:
            with torch.cuda.stream(self.device.compute_stream()):
                action()

    def compute_long(self) -> None:
        """The model is busy for a while; a simulated device is slow at will."""
        if self.memory.type == "cuda":
            self.compute(lambda: torch.cuda._sleep(LONG))

    def finish(self) -> None:
        """Return when all queued work is done."""
        if isinstance(self.device, SimulatedDevice):
            while self.device.step():
                pass
        else:
            torch.cuda.synchronize(self.memory)


def real() -> Machine:
    return Machine(CudaDevice(DEVICE), DEVICE, prepare_triton)


def simulated(seed: int = 0) -> Machine:
    return Machine(SimulatedDevice(Random(seed)), CPU, prepare_plainly(copy_torch))


def fill(*tensors: torch.Tensor, seed: int) -> None:
    """The same random bytes in all of them, wherever they are."""
    first = tensors[0]
    generator = torch.Generator(first.device).manual_seed(seed)
    first.view(torch.uint8).random_(generator=generator)
    for other in tensors[1:]:
        other.copy_(first)


def new_region(model: Model, slots: int) -> torch.Tensor:
    """Whole memory pages, as in production: a driver registers no page twice."""
    width = model.page_bytes + GUARD_BYTES
    region = torch.frombuffer(mmap.mmap(-1, slots * width), dtype=torch.uint8)
    return region.fill_(0xA5).view(slots, width)


def check_round_trip(
    machine: Machine,
    model: Model,
    layout: str,
    transport: Transport,
    *,
    blocks: int,
    ids: torch.Tensor | None = None,
    tp: int = 1,
    expedited: bool = False,
    other: str | None = None,
    other_tp: int = 2,
    shift: int = 0,
) -> None:
    """All ranks store to one region; one rank of another layout and topology loads.

    ids: int64 [chunks, blocks_per_chunk]; random ones with gaps, unless given.
    other, other_tp: the layout that loads, the next one unless given, and its last rank.
    """
    if ids is None:
        ids = some_blocks(model, blocks, device=CPU)
        ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.05] = -1
    slots = np.random.default_rng(0).permutation(model.chunks)
    work = [GroupWork(0, slots, ids.numpy())]
    region = new_region(model, model.chunks + 1)
    pages = region.to(machine.memory, copy=True)
    rows, there = torch.from_numpy(slots).to(machine.memory), ids.to(machine.memory)

    def oracle(segment: Segment, *, unpack: bool) -> None:
        copy_torch(segment, segment.in_page, pages, rows, there, unpack=unpack)

    for r in range(tp):
        rank = Rank(model, layout, blocks=blocks, tp=tp, rank=r, shift=shift, device=machine.memory)
        fill(rank.buffer, seed=r)
        (segment,) = rank.segments
        with machine.open({0: rank.segments}, region, transport) as pipeline:
            pipeline.submit_store(r, work)
            pipeline.wait({r})
            (done,) = pipeline.finished()
        assert done.nbytes == segment.shard_bytes * model.chunks and done.seconds >= 0
        oracle(segment, unpack=False)
        del rank, segment, pipeline  # they may be large
    assert torch.equal(region.to(machine.memory), pages)

    loads = other or ALL[(ALL.index(layout) + 1) % len(ALL)]
    reader, twin = (
        Rank(
            model,
            loads,
            blocks=blocks,
            tp=other_tp,
            rank=other_tp - 1,
            shift=shift,
            device=machine.memory,
        )
        for _ in range(2)
    )
    fill(reader.buffer, twin.buffer, seed=99)
    with machine.open({0: reader.segments}, region, transport) as pipeline:
        assert torch.equal(region.to(machine.memory), pages), "the trials left something behind"
        pipeline.submit_load(1, work, expedited=expedited)
        pipeline.wait({1})
    oracle(twin.segments[0], unpack=True)
    assert torch.equal(reader.buffer, twin.buffer)
    assert torch.equal(region.to(machine.memory), pages), "a load wrote to pages"


def check_stores_under_a_running_model(
    machine: Machine, model: Model, layout: str, transport: Transport | None, rounds: int
) -> None:
    """The model writes blocks just before each store, and overwrites them right after its fence."""
    assert model.size == 1, "bytes, so that each round changes all of them"
    blocks = 2 * model.chunks * model.blocks_per_chunk
    ids = some_blocks(model, blocks, device=CPU)
    rank = Rank(model, layout, blocks=blocks, device=machine.memory)
    content = torch.empty_like(rank.buffer)
    fill(content, seed=0)
    region = new_region(model, rounds * model.chunks)
    with machine.open({0: rank.segments}, region, transport) as pipeline:
        for number in range(rounds):
            slots = np.arange(number * model.chunks, (number + 1) * model.chunks)
            machine.compute_long()
            machine.compute(lambda n=number: torch.bitwise_xor(content, n + 1, out=rank.buffer))
            pipeline.submit_store(number, [GroupWork(0, slots, ids.numpy())])
            pipeline.fence({number})
            machine.compute(lambda: rank.buffer.fill_(0))
        pipeline.wait(range(rounds))
        assert {f.job_id for f in pipeline.finished()} == set(range(rounds))
    machine.finish()
    rank.buffer.copy_(content)
    first = torch.zeros(model.chunks, model.page_bytes, dtype=torch.uint8, device=machine.memory)
    (segment,) = rank.segments
    rows = torch.arange(model.chunks, device=machine.memory)
    there = ids.to(machine.memory)
    copy_torch(segment, segment.in_page, first, rows, there, unpack=False)
    stored = region.view(rounds, model.chunks, -1)[:, :, : model.page_bytes]
    for number in range(rounds):
        assert torch.equal(stored[number].to(machine.memory), first ^ (number + 1)), number


def check_loads_under_a_running_model(
    machine: Machine,
    model: Model,
    layout: str,
    transport: Transport | None,
    rounds: int,
    *,
    expedited: bool,
) -> None:
    """The model reads the old content while a load is under way, and the new after its fence."""
    blocks = 2 * model.chunks * model.blocks_per_chunk
    ids = some_blocks(model, blocks, device=CPU)
    rank, twin = (Rank(model, layout, blocks=blocks, device=machine.memory) for _ in range(2))
    fill(rank.buffer, twin.buffer, seed=0)
    region = new_region(model, rounds * model.chunks)
    seen = [rank.buffer.clone() for _ in range(2 * rounds)]
    with machine.open({0: rank.segments}, region, transport) as pipeline:
        fill(region, seed=1)
        for number in range(rounds):
            slots = np.arange(number * model.chunks, (number + 1) * model.chunks)
            machine.compute_long()
            machine.compute(lambda to=seen[2 * number]: to.copy_(rank.buffer))
            pipeline.submit_load(number, [GroupWork(0, slots, ids.numpy())], expedited=expedited)
            pipeline.fence({number})
            machine.compute(lambda to=seen[2 * number + 1]: to.copy_(rank.buffer))
        pipeline.wait(range(rounds))
    machine.finish()
    (segment,) = twin.segments
    there = ids.to(machine.memory)
    pages = region.to(machine.memory)
    for number in range(rounds):
        assert torch.equal(seen[2 * number], twin.buffer), f"round {number}: too early"
        rows = torch.arange(model.chunks, device=machine.memory) + number * model.chunks
        copy_torch(segment, segment.in_page, pages, rows, there, unpack=True)
        assert torch.equal(seen[2 * number + 1], twin.buffer), f"round {number}: too late"
