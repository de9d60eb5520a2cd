"""The CPU pipeline: stores and loads, election among replicas, and bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_worlds import Model, Rank, some_blocks

from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.opening import open_pipeline
from kvstrata.kernels.pipeline import GroupWork

MODEL = Model()


def store_and_load(work_slots: list[int]) -> tuple[GroupWork, torch.Tensor]:
    ids = some_blocks(MODEL, device=torch.device("cpu"))
    return GroupWork(0, np.array(work_slots, dtype=np.int64), ids.numpy()), ids


def empty_region(slots: int = 4) -> torch.Tensor:
    return torch.full((slots, MODEL.page_bytes + 64), 0xA5, dtype=torch.uint8)


def test_a_store_and_a_load_report_what_they_moved() -> None:
    region = empty_region()
    work, ids = store_and_load([2, 0])
    pipeline = open_pipeline({0: Rank(MODEL, "LBHNC").write(ids).segments}, region)
    assert isinstance(pipeline, CpuPipeline)
    pipeline.submit_store(5, [work])
    pipeline.wait({5, 6})
    assert torch.equal(region[[2, 0], : MODEL.page_bytes], MODEL.naive_pages(ids))
    assert (region[[1, 3]] == 0xA5).all() and (region[:, MODEL.page_bytes :] == 0xA5).all()

    other = Rank(MODEL, "BLNHC")
    reader = open_pipeline({0: other.segments}, region)
    reader.submit_load(1, [work], expedited=True)
    reader.submit_load(2, [])
    assert torch.equal(other.buffer, Rank(MODEL, "BLNHC").write(ids).buffer)
    (stored,) = pipeline.finished()
    loaded, nothing = reader.finished()
    assert (stored.job_id, loaded.job_id, nothing.job_id) == (5, 1, 2)
    assert stored.nbytes == loaded.nbytes == 2 * MODEL.page_bytes and nothing.nbytes == 0
    assert reader.finished() == [] and stored.seconds >= 0
    pipeline.shutdown()
    pipeline.shutdown()


def test_replicas_take_turns_by_slot_and_all_report() -> None:
    """8 workers of 4 heads: each page is whole, and each byte is written by one worker."""
    work, ids = store_and_load([1, 2])
    together = empty_region()
    counts = torch.zeros_like(together, dtype=torch.int64)
    for r in range(8):
        segments = Rank(MODEL, "LBNHC", tp=8, rank=r).write(ids).segments
        alone = empty_region()
        for region in (together, alone):
            pipeline = open_pipeline({0: segments}, region)
            pipeline.submit_store(r, [work])
            (done,) = pipeline.finished()
            assert done.nbytes == MODEL.page_bytes // 4, "one of the two pages"
        mine = (1, 2) if r % 2 else (2, 1)
        assert (alone[mine[1]] == 0xA5).all() and (alone[mine[0]] != 0xA5).any()
        shard = segments[0].shard
        counts[mine[0], shard.offset : shard.offset + shard.length] += 1
    assert torch.equal(together[[1, 2], : MODEL.page_bytes], MODEL.naive_pages(ids))
    assert (counts[[1, 2], : MODEL.page_bytes] == 1).all()


def test_replicas_all_load_every_page() -> None:
    work, ids = store_and_load([3, 1])
    region = empty_region()
    region[[3, 1], : MODEL.page_bytes] = MODEL.naive_pages(ids)
    for r in range(8):
        rank = Rank(MODEL, "LHBNC", tp=8, rank=r)
        pipeline = open_pipeline({0: rank.segments}, region)
        pipeline.submit_load(0, [work])
        assert torch.equal(rank.buffer, Rank(MODEL, "LHBNC", tp=8, rank=r).write(ids).buffer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 1}, "group 1"),
        ({"slots": np.array([0, 4])}, "slots"),
        ({"slots": np.array([-1, 0])}, "slots"),
        ({"slots": np.array([0, 1], dtype=np.int32)}, "int64"),
        ({"slots": np.array([0])}, "block_ids"),
        ({"block_ids": np.array([[0, 1, 2], [0, 1, 2]])}, "block_ids"),
        ({"block_ids": np.array([[0, 1], [2, 9]])}, "blocks"),
        ({"block_ids": np.array([[0, 1], [2, -2]])}, "blocks"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_moves(change: dict, message: str) -> None:
    region = empty_region()
    rank = Rank(MODEL, "LBHNC")
    pipeline = open_pipeline({0: rank.segments}, region)
    good, _ = store_and_load([0, 1])
    for submit in (pipeline.submit_store, pipeline.submit_load):
        with pytest.raises(ValueError, match=message):
            submit(0, [good, good._replace(**change)])
    assert (region == 0xA5).all() and torch.equal(rank.buffer, Rank(MODEL, "LBHNC").buffer)
    assert pipeline.finished() == []


def test_regions_and_devices_that_do_not_fit() -> None:
    groups = {0: Rank(MODEL, "LBHNC").segments}
    for region in (
        torch.zeros(4, MODEL.page_bytes - 1, dtype=torch.uint8),
        torch.zeros(4, MODEL.page_bytes, dtype=torch.int16),
        torch.zeros(4 * MODEL.page_bytes, dtype=torch.uint8),
        torch.zeros(4, 2 * MODEL.page_bytes, dtype=torch.uint8)[:, ::2],
    ):
        with pytest.raises(ValueError):
            open_pipeline(groups, region)


def test_without_triton_the_cpu_path_works() -> None:
    """A CPU-only vLLM brings no triton."""
    code = """
import sys
sys.modules["triton"] = None
import numpy as np, torch
from kvstrata.kernels.geometry import token_major
from kvstrata.kernels.plan import LocalLayer, plan
from kvstrata.kernels.opening import open_pipeline
from kvstrata.kernels.pipeline import GroupWork
from kvstrata.kernels.selftest import check_round_trip
cache = token_major("l", torch.ones(3, 1, 2, 4))
segments = plan([cache.shape(1)], {"l": LocalLayer(cache, 0)}, 1)
check_round_trip(segments)
region = torch.zeros(2, 64, dtype=torch.uint8)
pipeline = open_pipeline({0: segments}, region)
pipeline.submit_store(0, [GroupWork(0, np.array([1]), np.array([[2]]))])
assert region[1, :32].view(torch.float32).tolist() == [1.0] * 8
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
