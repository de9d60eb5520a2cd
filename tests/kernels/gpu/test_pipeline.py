"""The staged pipeline on a simulated device, against the CPU pipeline as its model.

Whatever order the device chooses, the region and the caches must end as if every job had run at
once when it was submitted.
"""

import itertools
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from copies import prepare_plainly
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from kernel_worlds import Model
from simulated_device import SimulatedDevice
from traffic import Side

from kvstrata.kernels import compare
from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.gpu import device as device_module
from kvstrata.kernels.gpu import pipeline as gpu
from kvstrata.kernels.gpu import trials
from kvstrata.kernels.gpu.device import CudaDevice
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Choice, Transport
from kvstrata.kernels.gpu.trials import TransportError
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.pipeline import GroupWork

PLAIN = prepare_plainly(copy_torch)
BLOCKS, SLOTS = 12, 10
MODEL = Model(layers=3, heads=2, tokens=1, dim=2, size=1, blocks_per_chunk=2)
WORLDS = {
    "one worker": {},
    "half of the heads": {"tp": 2, "rank": 1},
    "shares its head": {"tp": 4, "rank": 1},
    "some layers": {"layers": range(1, 3)},
}


@pytest.fixture(autouse=True, scope="module")
def small_buffers():
    """One or two pages per staging slot, and few id slots: every buffer is reused all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STAGING_SIZES", (96, 192))
        patch.setattr(gpu, "MAX_BATCH", 2)
        patch.setattr(gpu, "STAGING_SLOTS", 1)
        patch.setattr(gpu, "RING_ROUNDS", 0)
        patch.setattr(compare, "MOST_PAGES", 1)  # test_compare.py has more
        patch.setattr(trials, "time", trials.time)
        yield


class AnyOrder(RuleBasedStateMachine):
    """Blocks and slots of jobs under way are left alone, as vLLM and the primary tier do."""

    @initialize(
        world=st.sampled_from(sorted(WORLDS)),
        seed=st.integers(0, 2**32),
        batch=st.integers(1, 2),
        staging=st.sampled_from([96, 24, 8]),  # two pages, one head, one layer of one head
        slots=st.integers(1, 3),
        transport=st.sampled_from([None, *Transport]),
    )
    def start(
        self,
        world: str,
        seed: int,
        batch: int,
        staging: int,
        slots: int,
        transport: Transport | None,
    ) -> None:
        # the fixture puts them back
        gpu.MAX_BATCH, gpu.STAGING_SLOTS = batch, slots
        gpu.STAGING_SIZES = (staging, 2 * staging)
        self.random = Random(seed)
        self.device = SimulatedDevice(self.random)
        # transports are chosen by this clock: by the real one, a seed would not repeat its history
        trials.time = SimpleNamespace(perf_counter=lambda: self.device.clock)
        self.real, self.model = (Side(MODEL, BLOCKS, SLOTS, **WORLDS[world]) for _ in range(2))
        self.staged = GpuPipeline(self.real.groups, self.real.region, self.device, PLAIN, transport)
        self.device.sealed = True
        assert not any(stream.queue for stream in self.device.streams), "kernels not warm yet"
        region = self.real.region
        assert self.device.is_pinned(region.data_ptr(), region.nbytes)
        assert torch.equal(self.real.region, self.model.region), "the region is as it was"
        for real, model in zip(self.real.ranks, self.model.ranks, strict=True):
            assert torch.equal(real.buffer, model.buffer), "the caches are as they were"
        self.direct = CpuPipeline(self.model.groups, self.model.region)
        self.jobs: dict[int, tuple[set, set]] = {}  # blocks (group, id) and slots of each
        self.next_job = self.writes = 0

    def free(self, count: int, which: int, of: list) -> list:
        busy = set().union(*(job[which] for job in self.jobs.values())) if self.jobs else set()
        left = [one for one in of if one not in busy]
        return self.random.sample(left, min(count, len(left)))

    @rule(count=st.integers(1, 4), group=st.integers(0, 1))
    def model_runs(self, count: int, group: int) -> None:
        self.run_model(count, group)

    def run_model(self, count: int, group: int) -> None:
        """The model reads some blocks and then overwrites them, some time later."""
        for _, block in self.free(count, 0, [(group, i) for i in range(BLOCKS)]):
            self.writes += 1
            for real, model in zip(self.real.views(group), self.model.views(group), strict=True):
                old = model[block].clone()
                new = torch.full_like(old, self.writes % 251)
                model[block] = new

                def run(real=real, block=block, old=old, new=new) -> None:
                    assert torch.equal(real[block], old), "overwritten under the running model"
                    real[block] = new

                self.device.compute.queue.append(run)

    @rule(
        group=st.integers(0, 1),
        count=st.integers(0, 5),
        kind=st.sampled_from(["store", "load", "expedited"]),
    )
    def submit(self, group: int, count: int, kind: str) -> None:
        self.run_model(self.random.choice([0, 6]), group)
        slots = self.free(count, 1, list(range(SLOTS)))
        blocks = [i for _, i in self.free(2 * len(slots), 0, [(group, i) for i in range(BLOCKS)])]
        slots = slots[: len(blocks) // 2]
        ids = np.array(blocks[: 2 * len(slots)], dtype=np.int64).reshape(len(slots), 2)
        gaps = [self.random.random() < 0.2 for _ in ids.flat]
        ids[np.array(gaps, dtype=bool).reshape(ids.shape)] = -1
        work = [GroupWork(group, np.array(slots, dtype=np.int64), ids)]
        for pipeline in (self.direct, self.staged):
            if kind == "store":
                pipeline.submit_store(self.next_job, work)
            else:
                pipeline.submit_load(self.next_job, work, expedited=kind == "expedited")
        self.jobs[self.next_job] = ({(group, i) for i in blocks}, set(slots))
        self.next_job += 1

    @rule(steps=st.integers(1, 40))
    def time_passes(self, steps: int) -> None:
        for _ in range(steps):
            self.device.step()

    @precondition(lambda self: self.jobs)
    @rule(seed=st.integers(0, 3))
    def fence_some(self, seed: int) -> None:
        """The model may use the blocks of jobs under way from now on."""
        some = self.random.sample(sorted(self.jobs), min(1 + seed, len(self.jobs)))
        self.staged.fence({*some, 10**6})
        for job_id in some:
            self.jobs[job_id] = (set(), self.jobs[job_id][1])
        for group in (0, 1):
            self.run_model(BLOCKS, group)

    @precondition(lambda self: self.jobs)
    @rule()
    def wait_for_one(self) -> None:
        job = self.random.choice(list(self.jobs))
        self.staged.wait({job, 10**6})
        assert job in self.collect()

    @invariant()
    def poll(self) -> None:
        if hasattr(self, "staged"):
            self.collect()

    def collect(self) -> set[int]:
        """Take the finished jobs and look at what they left."""
        done = {f.job_id: f for f in self.staged.finished()}
        assert done.keys() <= self.jobs.keys()
        self.expected = getattr(self, "expected", {}) | {
            f.job_id: f.nbytes for f in self.direct.finished()
        }
        for job_id, result in done.items():
            assert result.nbytes == self.expected[job_id] and result.seconds >= 0
            blocks, slots = self.jobs.pop(job_id)
            for slot in slots:
                assert torch.equal(self.real.region[slot], self.model.region[slot])
            for group, block in blocks:
                views = zip(self.real.views(group), self.model.views(group), strict=True)
                assert all(torch.equal(real[block], model[block]) for real, model in views)
        return done.keys()

    def teardown(self) -> None:
        if not hasattr(self, "staged"):
            return
        self.staged.shutdown()
        self.staged.shutdown()
        self.collect()
        assert not self.jobs and not self.device.pinned
        while self.device.step():
            pass
        assert torch.equal(self.real.region, self.model.region)
        for real, model in zip(self.real.ranks, self.model.ranks, strict=True):
            assert torch.equal(real.buffer, model.buffer)


TestAnyOrder = AnyOrder.TestCase
# Not shrunk: that takes minutes, since any other order may fail or not.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
TestAnyOrder.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, phases=PHASES
)


def test_a_job_id_under_way_is_refused() -> None:
    side = Side(MODEL, BLOCKS, SLOTS)
    pipeline = GpuPipeline(side.groups, side.region, SimulatedDevice(Random(0)), PLAIN)
    work = [GroupWork(0, np.array([1]), np.array([[1, 2]]))]
    pipeline.submit_store(7, work)
    with pytest.raises(ValueError, match="job 7"):
        pipeline.submit_load(7, work)


@pytest.mark.parametrize("transport", list(Transport))
def test_everything_is_used_once_before_the_first_job(transport: Transport) -> None:
    side, device = Side(MODEL, BLOCKS, SLOTS), SimulatedDevice(Random(0))
    made, stream, launched, copied = [], device.stream, set(), set()
    launch, copy = device.launch, device.copy
    device.stream = lambda *, urgent: made.append((stream(urgent=urgent), urgent)) or made[-1][0]  # type: ignore[method-assign]
    device.launch = lambda on, *a: launched.add(on) or launch(on, *a)  # type: ignore[method-assign]
    device.copy = lambda on, *a, to_host: copied.add((on, to_host)) or copy(on, *a, to_host=to_host)  # type: ignore[method-assign]
    GpuPipeline(side.groups, side.region, device, PLAIN, transport)
    assert [urgent for _, urgent in made] == [True, False] * 3, "kernels before the model's"
    kernels, dma = made[::2], made[1::2]
    assert {(on, to_host) for on, _ in dma for to_host in (False, True)} <= copied
    if transport is not Transport.DIRECT:
        assert {on for on, _ in kernels} <= launched


def test_the_trials_of_one_direction_leave_the_other_as_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, load = (Choice(Transport.STAGED, Transport.DIRECT), Choice(*[Transport.ZERO_COPY] * 2))
    chosen = itertools.cycle([store, load])

    def choose(seconds, candidates, most_pages, page_bytes):
        for transport in candidates:
            seconds(transport, 1)
        return next(chosen), []

    monkeypatch.setattr(trials, "choose", choose)
    side = Side(MODEL, BLOCKS, SLOTS)
    pipeline = GpuPipeline(side.groups, side.region, SimulatedDevice(Random(0)), PLAIN)
    slots, *lines = pipeline.describe().split("; ")
    assert slots.startswith("staging slots of ")
    assert lines and all("staged up to" in line and "else direct" in line for line in lines[::2])
    assert all("zero-copy up to" in line and "else zero-copy" in line for line in lines[1::2])


@pytest.mark.parametrize("submit", ["submit_store", "submit_load"])
def test_a_job_that_was_refused_is_none(submit: str) -> None:
    side, device = Side(MODEL, BLOCKS, SLOTS), SimulatedDevice(Random(0))
    pipeline = GpuPipeline(side.groups, side.region, device, PLAIN, Transport.STAGED)
    work = [GroupWork(0, np.array([1]), np.array([[1, 2]]))]
    copy = device.copy

    def refuse(*arguments: object, to_host: bool) -> None:
        raise RuntimeError("refused")

    pipeline.submit_store(1, work)
    pipeline.wait({1})
    assert [job.job_id for job in pipeline.finished()] == [1]
    device.copy = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="refused"):
        getattr(pipeline, submit)(2, work)
    device.copy = copy  # type: ignore[method-assign]
    assert pipeline.finished() == []
    getattr(pipeline, submit)(2, work)
    pipeline.wait({2})
    assert [job.job_id for job in pipeline.finished()] == [2]


def test_zero_copy_is_left_out_where_kernels_cannot_reach_the_region(
    caplog: pytest.LogCaptureFixture,
) -> None:
    side = Side(MODEL, BLOCKS, SLOTS)

    def copy(segment, layout, pages, rows, block_ids, *, unpack):
        if pages.untyped_storage().data_ptr() == side.region.data_ptr():
            raise ValueError("cpu tensor?")
        copy_torch(segment, layout, pages, rows, block_ids, unpack=unpack)

    class AtOnce(SimulatedDevice):
        """Launches, as a real device does, when it is told to."""

        def launch(self, stream, kernel, *tensors):
            self.drain()
            kernel(*tensors)

    pipeline = GpuPipeline(side.groups, side.region, AtOnce(Random(0)), prepare_plainly(copy))
    assert "zero-copy is left out: cpu tensor?" in caplog.text
    assert "zero-copy" not in pipeline.describe()
    with pytest.raises(ValueError, match="cpu tensor"):
        GpuPipeline(
            side.groups, side.region, AtOnce(Random(0)), prepare_plainly(copy), Transport.ZERO_COPY
        )


class FakeRuntime:
    """Counts cudaHostRegister calls; refuses from the `limit`-th on."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.pinned) >= self.limit:
            return 2
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


class FakeCuda:
    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime

    def cudart(self) -> FakeRuntime:
        return self.runtime

    def device(self, device: torch.device):
        return torch.no_grad()  # any context manager


def test_pinning_covers_whole_slots_and_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(limit=10)
    monkeypatch.setattr(device_module, "cuda", FakeCuda(runtime))
    monkeypatch.setattr(device_module, "_MAX_PINNED_RUN", 250)
    region = torch.zeros(5, 100, dtype=torch.uint8)
    cuda_device = CudaDevice(torch.device("cuda", 0))
    cuda_device.pin(region)
    start = region.data_ptr()
    assert runtime.pinned == {start: 200, start + 200: 200, start + 400: 100}
    cuda_device.unpin()
    cuda_device.unpin()
    assert runtime.pinned == {}


def test_a_refused_pin_leaves_what_was_pinned_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine may be using it."""
    runtime = FakeRuntime(limit=3)
    monkeypatch.setattr(device_module, "cuda", FakeCuda(runtime))
    monkeypatch.setattr(device_module, "_MAX_PINNED_RUN", 100)
    asked = []
    monkeypatch.setattr(CudaDevice, "_forget_error", lambda self: asked.append(self))
    region = torch.zeros(5, 100, dtype=torch.uint8)
    cuda_device = CudaDevice(torch.device("cuda", 0))
    cuda_device.pin(region[:1])
    with pytest.raises(RuntimeError, match="could not pin"):
        cuda_device.pin(region[1:])
    assert runtime.pinned == {region.data_ptr(): 100}
    assert asked == [cuda_device], "CUDA's last error is left"
    cuda_device.unpin()
    assert runtime.pinned == {}


@pytest.mark.parametrize("transport", Transport)
def test_slots_are_pinned_as_they_become_ready(transport: Transport) -> None:
    """At start those that are ready, from the first on: kernels get its address, and no other."""
    side, device = Side(MODEL, BLOCKS, SLOTS), SimulatedDevice(Random(0))
    pipeline = GpuPipeline(side.groups, side.region, device, PLAIN, transport, range(1, 2), ready=2)
    start, slot = side.region.data_ptr(), side.region.stride(0)
    assert device.is_pinned(start, 2 * slot) and not device.is_pinned(start + 2 * slot, 1)
    pipeline.pin(range(2, 3))
    pipeline.submit_store(1, [GroupWork(0, np.array([2]), np.array([[1, 2]]))])
    pipeline.wait({1})
    assert [job.job_id for job in pipeline.finished()] == [1]
    assert not device.is_pinned(start + 3 * slot, 1)
    pipeline.shutdown()
    assert not device.pinned


class Unpinned(SimulatedDevice):
    """Refuses to pin more than so many times."""

    limit = 0

    def pin(self, region: torch.Tensor) -> None:
        if len(self.pinned) >= self.limit:
            raise RuntimeError("not so much")
        super().pin(region)


class Unreachable(SimulatedDevice):
    def reaches_host(self) -> bool:
        return False


@pytest.mark.parametrize("kind", [Unpinned, Unreachable])
def test_without_the_host_s_addresses_there_is_no_zero_copy(
    kind: type[SimulatedDevice], caplog: pytest.LogCaptureFixture
) -> None:
    side = Side(MODEL, BLOCKS, SLOTS)

    def copy(segment, layout, pages, rows, block_ids, *, unpack):
        assert pages.untyped_storage().data_ptr() != side.region.data_ptr()
        copy_torch(segment, layout, pages, rows, block_ids, unpack=unpack)

    device = kind(Random(0))
    pipeline = GpuPipeline(side.groups, side.region, device, prepare_plainly(copy), ready=2)
    assert "zero-copy" not in pipeline.describe()
    pipeline.pin(range(2, SLOTS))
    warnings = [record.getMessage() for record in caplog.records]
    if kind is Unpinned:
        (warning,) = warnings
        assert "not so much; pages move unpinned from slot 0 on" in warning
        assert "cpu_bytes_to_use" in warning
    else:
        assert warnings == []
    pipeline.submit_store(1, [GroupWork(0, np.array([1]), np.array([[1, 2]]))])
    pipeline.wait({1})
    with pytest.raises(TransportError, match='remove "transport"'):
        GpuPipeline(side.groups, side.region, device, PLAIN, Transport.ZERO_COPY)


@pytest.mark.parametrize("transport", Transport)
def test_slots_that_cannot_be_pinned_while_serving_are_pageable_but_for_zero_copy(
    transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    side, device = Side(MODEL, BLOCKS, SLOTS), Unpinned(Random(0))
    device.limit = 1
    pipeline = GpuPipeline(side.groups, side.region, device, PLAIN, transport, range(2), ready=2)
    later = [range(2, 3), range(3, SLOTS)]
    if transport is Transport.ZERO_COPY:  # kernels would reach for them: the caller leaves them out
        for slots in later:
            with pytest.raises(RuntimeError, match=r"zero-copy .* cpu_bytes_to_use"):
                pipeline.pin(slots)
        assert caplog.records == []
    else:
        for slots in later:
            pipeline.pin(slots)
            device.limit = 9  # it is not asked again
        (record,) = caplog.records
        assert "pages move unpinned from slot 2 on" in record.getMessage()
        pipeline.submit_store(1, [GroupWork(0, np.array([1, 2, 3]), np.arange(6).reshape(3, 2))])
        pipeline.wait({1})
        assert [job.job_id for job in pipeline.finished()] == [1]
    start, slot = side.region.data_ptr(), side.region.stride(0)
    assert device.is_pinned(start, 2 * slot) and not device.is_pinned(start + 2 * slot, 1)
    pipeline.shutdown()
    assert not device.pinned


def test_only_what_is_read_is_timed() -> None:
    side, device = Side(MODEL, BLOCKS, SLOTS), SimulatedDevice(Random(0))
    made, event = [], device.event
    device.event = lambda *, timed=False: made.append(timed) or event(timed=timed)  # type: ignore[method-assign]
    pipeline = GpuPipeline(side.groups, side.region, device, PLAIN)
    for job in range(20):
        work = [GroupWork(0, np.array([1]), np.array([[1, 2]]))]
        (pipeline.submit_load if job % 2 else pipeline.submit_store)(job, work)
        pipeline.wait({job})
        assert len(pipeline.finished()) == 1
    assert made.count(True) == 2, "start and end of a job, used again"


@pytest.mark.parametrize("best", [0, 1])
def test_larger_staging_slots_are_taken_where_they_are_faster(
    best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fastest(seconds, sizes):
        tried.extend(size for size in sizes if seconds(size) >= 0)
        return sizes[best]

    monkeypatch.setattr(trials, "fastest", fastest)
    monkeypatch.setattr(gpu, "STAGING_SIZES", (1 << 10, 1 << 19))
    model = Model(layers=2, heads=2, tokens=8, dim=8, size=1, blocks_per_chunk=1)
    monkeypatch.setattr(gpu, "MAX_BATCH", 20)
    side = Side(model, 40, 20)
    pipeline = GpuPipeline(side.groups, side.region, SimulatedDevice(Random(0)), PLAIN)
    assert tried == [1 << 10, 1 << 19]
    assert pipeline.describe().startswith(f"staging slots of {('0.000', '0.5 MiB')[best]}")
    forced = GpuPipeline(
        side.groups, side.region, SimulatedDevice(Random(0)), PLAIN, Transport.STAGED
    )
    assert forced.describe().startswith("staging slots of 0.000")
