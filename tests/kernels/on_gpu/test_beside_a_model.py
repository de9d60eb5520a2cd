"""Jobs beside a model that runs: order, many jobs at once, and no wait where none is due."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from device_checks import (
    CPU,
    check_loads_under_a_running_model,
    check_stores_under_a_running_model,
    new_region,
    real,
)
from kernel_worlds import DEVICE, FULL_SIZE, Model, Rank, some_blocks
from traffic import Traffic
from triton import knobs

from kvstrata.kernels.gpu import pipeline as gpu
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.opening import open_pipeline
from kvstrata.kernels.pipeline import GroupWork

pytestmark = pytest.mark.gpu
ANY = pytest.mark.parametrize("transport", [None, *Transport])
# the default stream has rules of its own in CUDA
STREAMS = pytest.mark.parametrize("own_stream", [False, True])
LAYERS, JOBS = (16, 10_000) if FULL_SIZE else (2, 300)
MODEL = Model(LAYERS, heads=8, tokens=16, dim=128, size=1, chunks=16, blocks_per_chunk=2)
SMALL = Model(layers=4, heads=2, tokens=4, dim=16, size=2, blocks_per_chunk=2)  # 4 KiB pages
VERY_LONG = 2_000_000_000  # clock cycles, about a second


def compute_stream(own: bool) -> AbstractContextManager[object]:
    return torch.cuda.stream(torch.cuda.Stream(DEVICE)) if own else nullcontext()


@ANY
@STREAMS
@pytest.mark.parametrize("layout", ["LBHNC", "BHLNC"])
def test_blocks_are_read_before_they_are_overwritten(
    transport: Transport | None, own_stream: bool, layout: str
) -> None:
    with compute_stream(own_stream):
        check_stores_under_a_running_model(real(), MODEL, layout, transport, rounds=20)


@ANY
@STREAMS
@pytest.mark.parametrize("expedited", [False, True])
def test_blocks_are_written_after_they_were_read(
    transport: Transport | None, own_stream: bool, expedited: bool
) -> None:
    with compute_stream(own_stream):
        check_loads_under_a_running_model(
            real(), MODEL, "LBNHC", transport, rounds=20, expedited=expedited
        )


@ANY
def test_ten_thousand_jobs(transport: Transport | None) -> None:
    """Nobody waits for one of them before all are submitted: the blocks and slots suffice."""
    traffic = Traffic(real(), SMALL, blocks=6 * JOBS, slots=4 * JOBS)
    traffic.run(JOBS, transport)


@ANY
@pytest.mark.parametrize("slots", [1, 2])
def test_staging_and_ring_hold_next_to_nothing(
    transport: Transport | None, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page, or one layer of one head, per slot; the ring holds two uploads."""
    monkeypatch.setattr(gpu, "STAGING_SLOTS", slots)
    monkeypatch.setattr(gpu, "RING_ROUNDS", 0)
    monkeypatch.setattr(gpu, "MAX_BATCH", 2)
    for staging in (SMALL.page_bytes, SMALL.page_bytes // SMALL.layers // SMALL.heads):
        monkeypatch.setattr(gpu, "STAGING_SIZES", (staging,))
        traffic = Traffic(real(), SMALL, blocks=600, slots=300, seed=staging)
        traffic.run(JOBS // 10, transport)


@pytest.mark.parametrize("transport", Transport)
def test_submit_neither_allocates_nor_waits(transport: Transport) -> None:
    """Of little enough that the driver's own queues, of about 1,000 entries, take it."""
    world = replace(MODEL, blocks_per_chunk=1)
    blocks = 2 * world.chunks
    rank = Rank(world, "BHLNC", blocks=blocks, device=DEVICE)
    region = new_region(world, 3 * world.chunks)
    ids = some_blocks(world, blocks, device=CPU).numpy()
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        pipeline = open_pipeline({0: rank.segments}, region, transport)
        assert isinstance(pipeline, GpuPipeline)
        torch.cuda.synchronize(DEVICE)
        before = torch.cuda.memory_stats(DEVICE)
        torch.cuda._sleep(VERY_LONG)
        model = torch.cuda.Event()
        model.record()
        for job in range(3):
            slots = np.arange(world.chunks) + job * world.chunks
            work = [GroupWork(0, slots, ids)]
            if job == 0:
                pipeline.submit_store(job, work)
            else:
                pipeline.submit_load(job, work, expedited=job == 2)
            pipeline.fence({job})
        assert not model.query(), "submit waited for the model"
        assert pipeline.finished() == []
        after = torch.cuda.memory_stats(DEVICE)
        for what in ("allocation", "segment"):
            key = f"{what}.all.allocated"
            assert after[key] == before[key], key
        pipeline.wait({0, 1, 2})
        assert model.query()
        done = pipeline.finished()
        assert sorted(job.job_id for job in done) == [0, 1, 2]
        assert all(job.seconds > 0 for job in done)
        pipeline.shutdown()


@ANY
def test_nothing_is_compiled_after_the_start(
    transport: Transport | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is moved: few pages and many, missing blocks, in every channel."""
    compiled: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **of: compiled.append(of))
    # a geometry of its own, so that no other test has its kernels
    world = replace(SMALL, tokens=6, dim=11 + 2 * len(transport or ""), chunks=12)
    rank = Rank(world, "LBHNC", blocks=40, device=DEVICE)
    ids = some_blocks(world, 40, device=CPU).numpy()
    region = new_region(world, world.chunks)
    with real().open({0: rank.segments}, region, transport) as pipeline:
        assert transport is Transport.DIRECT or compiled, "the hook is called"
        compiled.clear()
        for job, pages in enumerate((1, 2, 3, 5, 12)):
            work = [GroupWork(0, np.arange(pages), np.where(ids == 3, -1, ids)[:pages])]
            pipeline.submit_store(3 * job, work)
            pipeline.submit_load(3 * job + 1, work)
            pipeline.submit_load(3 * job + 2, work, expedited=True)
        pipeline.wait(range(15))
    assert compiled == []
