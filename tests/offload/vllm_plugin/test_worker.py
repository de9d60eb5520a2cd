"""The worker's side of vLLM's calls: tickets, watermark, incomplete pages."""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import GPULoadStoreSpec, TransferResult  # noqa: E402

from kvstrata.kernels.pipeline import Finished, GroupWork  # noqa: E402
from kvstrata.offload.vllm_plugin.transfer import PageSlots  # noqa: E402
from kvstrata.offload.vllm_plugin.worker import KVStrataWorker  # noqa: E402

RANK = 1


class FakePipeline:
    """Transfers end when, and in the order in which, the test says."""

    def __init__(self) -> None:
        self.stores: dict[int, Sequence[GroupWork]] = {}
        self.loads: dict[int, bool] = {}
        self.ended: list[Finished] = []
        self.waited: list[set[int]] = []
        self.fenced: list[set[int]] = []
        self.open = True

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        self.stores[job_id] = work

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        self.loads[job_id] = expedited

    def end(self, *job_ids: int) -> None:
        self.ended += [Finished(job_id, 100, 0.5) for job_id in job_ids]

    def finished(self) -> list[Finished]:
        ended, self.ended = self.ended, []
        return ended

    def describe(self) -> str:
        return ""

    def fence(self, job_ids: Collection[int]) -> None:
        self.fenced.append(set(job_ids))

    def wait(self, job_ids: Collection[int]) -> None:
        self.waited.append(set(job_ids))

    def shutdown(self) -> None:
        self.open = False


class FakeReserver:
    """Stops only while the pipeline, which it pins for, is open."""

    def __init__(self, pipeline: FakePipeline) -> None:
        self._pipeline = pipeline
        self.stopped = False

    def stop(self) -> None:
        assert self._pipeline.open
        self.stopped = True


class FakeRegion:
    def __init__(self) -> None:
        self.watermarks: list[int] = []
        self.incomplete: dict[int, bool] = {}
        self.open = True

    def set_watermark(self, rank: int, ticket: int) -> None:
        assert rank == RANK
        self.watermarks.append(ticket)

    def set_incomplete(self, slot: int, missing: bool) -> None:
        self.incomplete[slot] = missing

    def close(self) -> None:
        self.open = False


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def region() -> FakeRegion:
    return FakeRegion()


@pytest.fixture
def reserver(pipeline: FakePipeline) -> FakeReserver:
    return FakeReserver(pipeline)


@pytest.fixture
def worker(pipeline: FakePipeline, region: Any, reserver: Any) -> KVStrataWorker:
    return KVStrataWorker(
        pipeline, region, reserver, RANK, [0], blocks_per_chunk=2, overwrites_before_flush=False
    )


def blocks(*ids: int, first: int = 0) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(ids), group_sizes=[len(ids)], block_indices=[first])


def submit(worker: KVStrataWorker, job_id: int, ticket: int, *, store: bool) -> None:
    pages = PageSlots(ticket, [ticket], [0])
    if store:
        assert worker.submit_store(job_id, blocks(5, 6), pages)
    else:
        assert worker.submit_load(job_id, pages, blocks(5, 6))


def test_watermark_waits_for_the_first_gap(
    worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    for ticket in range(1, 6):
        submit(worker, 100 + ticket, ticket, store=ticket % 2 == 0)
    pipeline.end(103, 105)
    assert [result.job_id for result in worker.get_finished()] == [103, 105]
    assert region.watermarks[-1] == 0
    pipeline.end(101)
    worker.get_finished()
    assert region.watermarks[-1] == 1
    pipeline.end(102)
    worker.get_finished()
    assert region.watermarks[-1] == 3
    assert worker.get_finished() == [] and region.watermarks[-1] == 3
    pipeline.end(104)
    worker.get_finished()
    assert region.watermarks[-1] == 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(1, 5))), ids=str)
def test_watermark_in_every_order(
    order: Sequence[int], worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    """At all times it is the largest ticket that has ended with all before it."""
    for ticket in range(1, 5):
        submit(worker, ticket, ticket, store=True)
    ended: set[int] = set()
    for ticket in order:
        pipeline.end(ticket)
        worker.get_finished()
        ended.add(ticket)
        assert region.watermarks[-1] == min({1, 2, 3, 4, 5} - ended) - 1


def test_tickets_are_not_job_ids(
    worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    submit(worker, 1, 2, store=True)
    submit(worker, 2, 1, store=False)
    pipeline.end(1)
    worker.get_finished()
    assert region.watermarks[-1] == 0
    pipeline.end(2)
    worker.get_finished()
    assert region.watermarks[-1] == 2


def test_results_are_the_pipelines(worker: KVStrataWorker, pipeline: FakePipeline) -> None:
    submit(worker, 7, 1, store=True)
    assert worker.get_finished() == []
    pipeline.end(7)
    assert worker.get_finished() == [TransferResult(7, True, 100, 0.5)]


def test_stores_say_which_pages_miss_a_block(
    worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    worker.submit_store(1, blocks(3, 4, 5, first=1), PageSlots(1, [8, 9], [0, 0]))
    assert region.incomplete == {8: True}
    [work] = pipeline.stores[1]
    assert work.slots.tolist() == [8, 9] and work.block_ids.tolist() == [[-1, 3], [4, 5]]
    # ranks are not in step: none takes back what another has said of the same transfer
    worker.submit_store(2, blocks(3, 4), PageSlots(2, [8], [0]))
    assert region.incomplete == {8: True}


def test_loads_leave_the_marks_and_may_be_expedited(
    worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    worker.submit_load(1, PageSlots(1, [8], [0]), blocks(3, first=1))
    worker.submit_load(2, PageSlots(2, [8], [0]), blocks(3, 4), expedited=True)
    assert pipeline.loads == {1: False, 2: True} and region.incomplete == {}


@pytest.fixture
def late(pipeline: FakePipeline, region: Any, reserver: Any) -> KVStrataWorker:
    """The worker where vLLM overwrites blocks before it flushes their stores."""
    return KVStrataWorker(
        pipeline, region, reserver, RANK, [0], blocks_per_chunk=2, overwrites_before_flush=True
    )


def test_pages_whose_blocks_may_be_overwritten_are_incomplete(
    late: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    """Stores that were submitted in the same step, and those of a step before that go on."""
    submit(late, 1, 1, store=True)
    submit(late, 2, 2, store=True)
    submit(late, 3, 3, store=True)
    submit(late, 4, 4, store=False)
    pipeline.end(1)
    late.get_finished()
    submit(late, 5, 5, store=True)
    late.wait({1, 3, 4, 5, 99})
    assert region.incomplete == {3: True, 5: True}
    assert pipeline.fenced == [{1, 3, 4, 5, 99}], "blocks must not be given away earlier for that"


def test_what_was_not_flushed_keeps_its_pages(
    late: KVStrataWorker, worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion
) -> None:
    submit(late, 1, 1, store=True)
    late.wait(set())
    pipeline.end(1)
    late.get_finished()
    late.wait({1})
    submit(worker, 2, 2, store=True)
    worker.wait({2})
    assert region.incomplete == {}


def test_it_is_said_once(
    late: KVStrataWorker, pipeline: FakePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvstrata")
    for number in (1, 2):
        submit(late, number, number, store=True)
        late.wait({number})
    assert caplog.text.count("incomplete_pages") == 1


def test_wait_and_shutdown(
    worker: KVStrataWorker, pipeline: FakePipeline, region: FakeRegion, reserver: FakeReserver
) -> None:
    worker.wait({1, 2})
    assert pipeline.fenced == [{1, 2}] and not pipeline.waited, "the engine waits"
    worker.shutdown()
    assert reserver.stopped and not pipeline.open and not region.open
