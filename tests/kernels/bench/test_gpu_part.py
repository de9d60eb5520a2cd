"""What the benchmark does on a GPU, on a simulated one and with tiny models."""

import ctypes
import sys
from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import simulated_cuda
import torch
from copies import prepare_plainly
from simulated_device import SimulatedDevice

import kvstrata.kernels.bench.__main__ as command
from kvstrata.kernels.bench import (
    ceiling,
    contestants,
    fragment_kernel,
    neighbours,
    transfers,
)
from kvstrata.kernels.bench.contestants import gather, scatter
from kvstrata.kernels.bench.models import LAYOUTS, Group, Model
from kvstrata.kernels.bench.results import cases
from kvstrata.kernels.bench.results.cases import BESIDE, OPERATIONS, SHARE, SLOWDOWN, SPEED, SUBMIT
from kvstrata.kernels.bench.scene import Contestant, Scene, WrongBytes, region_bytes
from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.gpu import pipeline as gpu
from kvstrata.kernels.gpu.device import Pieces
from kvstrata.kernels.pack import copy_torch

CPU = torch.device("cpu")
TINY = Model("tiny TP2", "", 2, (Group(3, 4, 8, block_tokens=2), Group(2, 4, 8, block_tokens=2)))
BLOCKS = 12


def move(pieces: Pieces, *, to_host: bool) -> None:
    for device, host, nbytes in zip(*(column.tolist() for column in pieces), strict=True):
        ctypes.memmove(*((host, device) if to_host else (device, host)), nbytes)


class Device(SimulatedDevice):
    """Streams of simulated_cuda are done at once here too."""

    def copy(self, stream: Any, pieces: Pieces, *, to_host: bool) -> None:
        if isinstance(stream, simulated_cuda.Stream):
            move(pieces, to_host=to_host)
        else:
            super().copy(stream, pieces, to_host=to_host)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of CUDA, small, and as where vLLM is not installed."""
    for name in ("vllm", "vllm.v1.kv_offload.cpu"):  # other tests may have imported it
        monkeypatch.setitem(sys.modules, name, None)
    for module in (contestants, neighbours):
        monkeypatch.setattr(module, "cuda", simulated_cuda)
    monkeypatch.setattr(gpu, "STAGING_SIZES", (4096, 8192))
    monkeypatch.setattr(contestants, "prepare_triton", prepare_plainly(copy_torch))
    monkeypatch.setattr(contestants, "PinnedBefore", lambda _: Device(Random(0)))
    monkeypatch.setattr(fragment_kernel, "load", lambda pieces, _: move(pieces, to_host=False))
    monkeypatch.setattr(neighbours, "_SIZE", 8)
    monkeypatch.setattr(neighbours, "_ROWS", 8)
    monkeypatch.setattr(neighbours, "_COLUMNS", 8)
    monkeypatch.setattr(neighbours, "_STEPS", 4)
    monkeypatch.setattr(transfers, "_LOADS", 3)
    monkeypatch.setattr(ceiling, "CEILING_BYTES", 4096)
    monkeypatch.setattr(ceiling, "_pinned", lambda n: torch.zeros(n, dtype=torch.uint8))


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """A vLLM whose copy functions move at once; (store, largest piece) that were asked for."""
    asked = []

    def select(refs: list[list[Any]], gpu_to_cpu: bool) -> Callable[..., None]:
        asked.append((gpu_to_cpu, max(ref.page_size_bytes for some in refs for ref in some)))

        def copy(
            source: torch.Tensor,
            to: torch.Tensor,
            sizes: torch.Tensor,
            is_src_access_order_any: bool = False,
        ) -> None:
            assert is_src_access_order_any is not gpu_to_cpu
            assert source.dtype == to.dtype == sizes.dtype == torch.int64
            for piece in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
                ctypes.memmove(*piece)

        return copy

    package = ModuleType("vllm.v1.kv_offload.cpu")
    package.gpu_worker = ModuleType("gpu_worker")  # type: ignore[attr-defined]
    package.gpu_worker._select_swap_blocks_fn = select
    for name in ("vllm", "vllm.v1", "vllm.v1.kv_offload"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return asked


def a_scene(layout: str, per_chunk: int = 3) -> Scene:
    memory = torch.zeros(region_bytes(TINY, BLOCKS), dtype=torch.uint8)
    return Scene(TINY, layout, per_chunk, BLOCKS, memory, CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_contestants_move_the_right_bytes(layout: str, stock: list[tuple[bool, int]]) -> None:
    scene = a_scene(layout)
    found = contestants.contestants(scene)
    names = [contestant.name for contestant in found]
    assert sorted(names) == sorted([cases.OURS, cases.STAGED, *cases.BASELINES])
    for contestant in found:
        for pages in (1, 4):
            scene.verify(contestant, pages)
        contestant.close()
    assert {store for store, _ in stock} == {False, True}


LOAD_BY_KERNEL = fragment_kernel.load  # before it is replaced


@pytest.mark.parametrize("size", [8, 40, 8192, 8200, 24 << 10])
def test_stock_s_kernel_loads_pieces_of_every_size_that_it_takes(size: int) -> None:
    sizes = np.array([size, 8, size] * 6)
    host, there = torch.randint(256, (2, sizes.sum() + 64), dtype=torch.uint8)
    starts = np.cumsum(sizes) - sizes
    wanted = there.clone()
    wanted[: sizes.sum()] = host[: sizes.sum()]
    wanted[size : size + 8] = there[size : size + 8]  # but for one that is left out
    kept = np.arange(len(sizes)) != 1
    at = there.data_ptr() + starts, host.data_ptr() + starts, sizes
    pieces = Pieces(*(column[kept] for column in at))
    assert fragment_kernel.takes(pieces)
    LOAD_BY_KERNEL(pieces, CPU)
    assert torch.equal(there, wanted)


def test_stock_s_kernel_takes_many_small_pieces_of_whole_words() -> None:
    def takes(size: int, count: int, at: int = 0) -> bool:
        one = np.full(count, size)
        return bool(fragment_kernel.takes(Pieces(one * 0 + at, one * 0, one)))

    assert takes(8, 16) and takes((28 << 10) - 8, 16)
    assert not takes(28 << 10, 16) and not takes(8, 15)
    assert not takes(12, 16) and not takes(8, 16, at=4)


class Wrong:
    """Moves what another one moves, and then changes a byte."""

    name, per_fragment = "wrong", False

    def __init__(self, right: Contestant, spoil: Callable[[], None]) -> None:
        self.right, self.spoil = right, spoil
        self.submit, self.close = right.submit, right.close

    def wait(self) -> None:
        self.right.wait()
        self.spoil()


def test_a_contestant_that_moves_other_bytes_is_found_out() -> None:
    scene = a_scene("LBNHC")
    right = contestants.Indexed(scene)
    stored, loaded = scene.stores(2)[1], scene.loads(2)[1]
    (segment,) = scene.groups[1]

    def spoil_page() -> None:
        scene.region[stored.slots[1], segment.in_page.offset + segment.shard_bytes - 1] ^= 1

    def spoil_block() -> None:
        segment.sets[0].views[1][loaded.block_ids[1, 2], 1, 1, 0, 7] ^= 1

    scene.verify(right, 2)
    with pytest.raises(WrongBytes, match=r"wrong: tiny TP2, LBNHC, 2 pages.*the store"):
        scene.verify(Wrong(right, spoil_page), 2)
    with pytest.raises(WrongBytes, match="the load"):
        scene.verify(Wrong(right, spoil_block), 2)


def test_results_of_an_earlier_contestant_count_for_nobody() -> None:
    class Idle(Wrong):
        def __init__(self, right: Contestant) -> None:
            super().__init__(right, lambda: None)
            self.submit = lambda stores, loads: None  # type: ignore[method-assign]

    scene = a_scene("LBHNC")
    right = contestants.Indexed(scene)
    scene.verify(right, 4)
    with pytest.raises(WrongBytes):
        scene.verify(Idle(right), 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_scatter_are_the_oracle_s(layout: str) -> None:
    scene = a_scene(layout)
    (segment,) = scene.groups[0]
    ids = torch.from_numpy(scene.stores(4)[0].block_ids)
    rows = torch.arange(4)
    ours, theirs = (torch.zeros(4, segment.shard_bytes, dtype=torch.uint8) for _ in range(2))
    gather(segment, ids, ours)
    copy_torch(segment, segment.packed(0), theirs, rows, ids, unpack=False)
    assert torch.equal(ours, theirs)
    scatter(segment, ids, ours.random_())
    copy_torch(segment, segment.packed(0), theirs, rows, ids, unpack=False)
    assert torch.equal(ours, theirs)


def test_tiny_fragments_are_moved_in_part_by_who_pays_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = a_scene("LBNHC")
    # tokens x heads x layers x blocks of the larger group
    assert scene.fragments_per_page == 2 * 2 * 3 * 3
    assert scene.fragment_bytes == 8 * 2
    monkeypatch.setattr(transfers, "MOST_FRAGMENTS", 2 * scene.fragments_per_page)
    found = contestants.contestants(scene)
    moved = {c.name: len(transfers._works(scene, c, 4)["both"][1][0].slots) for c in found}
    each = (cases.PER_FRAGMENT, cases.AS_STOCK)
    assert moved == {name: 2 if name in each else 4 for name in moved}


def test_every_case_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []

    class Pinning:
        def __init__(self, _: torch.device) -> None:
            pass

        def pin(self, region: torch.Tensor) -> None:
            pinned.append(tuple(region.shape))

        def unpin(self) -> None:
            pinned.append(())

    monkeypatch.setattr(command, "CudaDevice", Pinning)
    monkeypatch.setattr(ceiling, "cuda", _without_waiting())
    results = list(command.measure_gpu([TINY], ["LBHNC", "BHLNC"], [1, 4], [1, 12], 1, CPU))
    assert pinned == [(1, region_bytes(TINY, 12)), ()]
    assert len({result[:3] for result in results}) == len(results)
    # nothing moves while the simulated device is not asked for
    assert all(result.value > 0 for result in results if result.metric != BESIDE)
    names = {cases.OURS, cases.STAGED, *cases.BASELINES} - {cases.STOCK}
    for metric in (SPEED, SHARE, SUBMIT):
        mine = [r for r in results if r.metric == metric and r.contestant != cases.CEILING]
        # 1 and 12 blocks as single ones, 12 as chunks of 4; in two layouts
        assert len(mine) == 3 * 2 * len(OPERATIONS) * len(names)
        assert {r.contestant for r in mine} == names
    shares = {r[:2]: r.value for r in results if r.metric == SHARE}
    links = {r.case.operation: r.value for r in results if r.contestant == cases.CEILING}
    for r in results:
        if r.metric == SPEED and r.contestant != cases.CEILING:
            assert shares[r[:2]] == pytest.approx(r.value / links[r.case.operation])
    latencies = [r for r in results if r.case.operation == cases.ONE_PAGE]
    assert len(latencies) == 2 * 2 * 4 * 2
    slow = [r for r in results if r.metric == SLOWDOWN]
    assert {r.case.operation for r in slow} == {neighbours.GEMM, neighbours.DECODE}
    assert len(slow) == 2 * 4
    assert len([r for r in results if r.metric == BESIDE]) == len(slow)


def test_what_was_moved_beside_a_loop_is_told() -> None:
    scene = a_scene("LBHNC")
    done_at_submit = contestants.Piped(cases.OURS, CpuPipeline(scene.groups, scene.region))
    results = list(neighbours.measure(scene, [done_at_submit], BLOCKS, 2))
    assert [r.metric for r in results] == [SLOWDOWN, BESIDE] * 2
    assert all(result.value > 0 for result in results)


def _without_waiting() -> ModuleType:
    """The ceiling has the device for itself, so its streams wait for nothing."""
    module = ModuleType("cuda")
    module.__dict__.update(vars(simulated_cuda), stream=lambda _: simulated_cuda.nullcontext())
    return module
