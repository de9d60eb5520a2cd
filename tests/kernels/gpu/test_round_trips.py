"""The staged pipeline on a real device; its order is tested on a simulated one."""

import numpy as np
import pytest
import torch
from kernel_worlds import DEVICE, Model, Rank, some_blocks

from kvstrata.kernels.gpu import GpuPipeline
from kvstrata.kernels.pipeline import GroupWork, open_pipeline

pytestmark = pytest.mark.gpu
MODEL = Model(layers=4, tokens=16, dim=64, chunks=40)
BLOCKS = 100


@pytest.mark.parametrize("expedited", [False, True])
def test_round_trip_without_any_allocation(expedited: bool) -> None:
    region = torch.zeros(MODEL.chunks, MODEL.page_bytes + 4096, dtype=torch.uint8)
    ids = some_blocks(MODEL, blocks=BLOCKS)
    slots = np.random.default_rng(0).permutation(MODEL.chunks)
    work = [GroupWork(0, slots, ids.cpu().numpy())]
    for tp in (1, 2):
        for r in range(tp):
            rank = Rank(MODEL, "LBNHC", blocks=BLOCKS, tp=tp, rank=r, device=DEVICE).write(ids)
            writer = open_pipeline({0: rank.segments}, region)
            assert isinstance(writer, GpuPipeline)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            writer.submit_store(0, work)
            writer.wait({0})
            (done,) = writer.finished()
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            assert done.nbytes == MODEL.page_bytes * MODEL.chunks // tp and done.seconds > 0
            writer.shutdown()
        pages = region[torch.from_numpy(slots), : MODEL.page_bytes]
        assert torch.equal(pages, MODEL.naive_pages(ids.cpu()))

        other = Rank(MODEL, "BLHNC", blocks=BLOCKS, tp=2, rank=1, device=DEVICE)
        wanted = Rank(MODEL, "BLHNC", blocks=BLOCKS, tp=2, rank=1, device=DEVICE).write(ids)
        reader = open_pipeline({0: other.segments}, region)
        reader.submit_load(1, work, expedited=expedited)
        reader.wait({1})
        assert torch.equal(other.buffer, wanted.buffer)
        reader.shutdown()
        region.zero_()
