"""Transports are compared before they are trusted: a wrong one is left out, and leaves no trace."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from copies import prepare_plainly
from kernel_worlds import Model, Rank
from simulated_device import SimStream, SimulatedDevice

from kvstrata.kernels import compare, cpu
from kvstrata.kernels.compare import Comparison
from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.geometry import GeometryError
from kvstrata.kernels.gpu import pipeline as gpu
from kvstrata.kernels.gpu import transport
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.gpu.trials import TransportError
from kvstrata.kernels.opening import open_pipeline
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.pack_cpu import copy_cpu
from kvstrata.kernels.pipeline import GroupWork

# pages of 16 KiB, in pieces that are worth a direct copy
MODEL = Model(layers=2, heads=2, tokens=16, dim=64, size=1, blocks_per_chunk=2)
BLOCKS, SLOTS = 14, 8
WORLDS = [{}, {"tp": 2, "rank": 1}, {"tp": 4, "rank": 3}, {"layers": range(1, 2)}]


@pytest.fixture(autouse=True)
def few_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Still more than a choice calls few."""
    monkeypatch.setattr(compare, "MOST_PAGES", transport.FEW_PAGES + 1)
    monkeypatch.setattr(transport, "_ROUNDS", 1)


class World:
    """A worker's caches and a region full of what must stay, on a simulated device."""

    def __init__(self, layout: str = "BHLNC", **world: Any) -> None:
        self.rank = Rank(MODEL, layout, blocks=BLOCKS, **world)
        generator = torch.Generator().manual_seed(0)
        self.rank.buffer.random_(generator=generator)
        self.region = torch.empty(SLOTS, MODEL.page_bytes + 4096, dtype=torch.uint8)
        self.region.random_(generator=generator)
        self.before = self.rank.buffer.clone(), self.region.clone()

    def check_untouched(self) -> None:
        assert torch.equal(self.rank.buffer, self.before[0]), "blocks"
        assert torch.equal(self.region, self.before[1]), "region"


def is_zero_copy(world, pages: torch.Tensor) -> bool:
    return pages.untyped_storage().data_ptr() == world.region.untyped_storage().data_ptr()


def wrong_byte(world, segment, layout, pages, rows, ids, **way) -> None:
    """One byte of the last page, or of the last block, is another one."""
    copy_torch(segment, layout, pages, rows, ids, **way)
    if not way["unpack"]:
        end = layout.offset + segment.local_layers * segment.slab_bytes - 1
        pages[rows[-1], end] ^= 1
    elif (ids >= 0).any():
        segment.sets[0].views[0][ids.max()].view(-1)[-1:] ^= 1


def stale_gaps(world, segment, layout, pages, rows, ids, *, unpack) -> None:
    """Missing blocks keep what was there, and are loaded from it."""
    before = pages.clone()
    some = torch.where(ids < 0, ids.max(), ids) if unpack else ids
    copy_torch(segment, layout, pages, rows, some, unpack=unpack)
    if not unpack and (ids < 0).any():
        pages[pages == 0] = before[pages == 0]


def swapped_heads(world, segment, layout, pages, rows, ids, *, unpack) -> None:
    sets = tuple(replace(s, views=tuple(v.flip(1) for v in s.views)) for s in segment.sets)
    if unpack:  # a flip is a copy
        for one, other in zip(sets, segment.sets, strict=True):
            copy_torch(replace(segment, sets=(one,)), layout, pages, rows, ids, unpack=True)
            for wrong, view in zip(one.views, other.views, strict=True):
                view.copy_(wrong.flip(1))
    else:
        copy_torch(replace(segment, sets=sets), layout, pages, rows, ids, unpack=False)


def beyond_the_page(world, segment, layout, pages, rows, ids, *, unpack) -> None:
    copy_torch(segment, layout, pages, rows, ids, unpack=unpack)
    if not unpack:
        pages[rows[0], MODEL.page_bytes + 3] ^= 1


def another_page(world, segment, layout, pages, rows, ids, *, unpack) -> None:
    """The page after the last one."""
    copy_torch(segment, layout, pages, rows, ids, unpack=unpack)
    if not unpack:
        pages[(rows.max() + 1) % len(pages), layout.offset] ^= 1


def late_when_many(world, segment, layout, pages, rows, ids, *, unpack) -> None:
    """More than four pages: the last one is forgotten."""
    keep = slice(0, 4) if len(rows) > 4 else slice(None)
    copy_torch(segment, layout, pages, rows[keep], ids[keep], unpack=unpack)


def another_block(world, segment, layout, pages, rows, ids, *, unpack) -> None:
    copy_torch(segment, layout, pages, rows, ids, unpack=unpack)
    if unpack and (ids >= 0).any():
        segment.sets[0].views[0][0] ^= 1


FAULTS = [another_block, wrong_byte, stale_gaps, swapped_heads, another_page, late_when_many]


def open_faulty(
    world: World,
    fault: Callable[..., None] | None,
    *,
    staged: bool = False,
    way: Transport | None = None,
    device: SimulatedDevice | None = None,
) -> GpuPipeline:
    """The kernels of staged, or those of zero-copy, do what `fault` does."""

    def copy(segment, layout, pages, rows, ids, *, unpack) -> None:
        bad = fault is not None and is_zero_copy(world, pages) != staged
        do = partial(fault, world) if fault is not None and bad else copy_torch
        do(segment, layout, pages, rows, ids, unpack=unpack)

    device = device or SimulatedDevice(Random(1))
    return GpuPipeline({0: world.rank.segments}, world.region, device, prepare_plainly(copy), way)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_sound_transports_are_all_tried_and_leave_no_trace(
    world: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    here = World(**world)
    found = open_faulty(here, None)
    here.check_untouched()
    assert "left out" not in caplog.text
    assert all(way in found.describe() for way in ("staged", "zero-copy"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_is_left_out(
    fault: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    here = World()
    found = open_faulty(here, fault)
    here.check_untouched()
    [line] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert ("transport zero-copy is left out: " in line and "layer" in line) or "outside" in line
    assert "zero-copy" not in found.describe()


@pytest.mark.parametrize("fault", FAULTS[:4])
def test_staged_that_is_wrong_refuses_the_start(fault: Callable[..., None]) -> None:
    here = World()
    device = SimulatedDevice(Random(0))
    with pytest.raises(TransportError, match=r"transport staged (storing|loading) .* layer"):
        open_faulty(here, fault, staged=True, device=device)
    here.check_untouched()
    assert not device.pinned


@pytest.mark.parametrize("fault", FAULTS[:4])
def test_a_transport_that_was_asked_for_and_is_wrong_refuses_the_start(
    fault: Callable[..., None],
) -> None:
    here = World()
    with pytest.raises(TransportError, match=r'zero-copy .*remove "transport"'):
        open_faulty(here, fault, way=Transport.ZERO_COPY)
    here.check_untouched()


class WrongCopies(SimulatedDevice):
    """Batches of more than one piece, which direct copies are, go wrong in some way."""

    def __init__(self, fault: str, to_host: bool) -> None:
        super().__init__(Random(2))
        self.fault, self.to_host = fault, to_host
        self.slow: SimStream = self.stream(urgent=False)
        self.slow.speed = 1e-12

    def copy(self, stream: SimStream, pieces: Any, *, to_host: bool) -> None:
        if to_host is not self.to_host or len(pieces.sizes) < 2:
            super().copy(stream, pieces, to_host=to_host)
            return
        if self.fault == "raises":
            first = type(pieces)(*(column[:1] for column in pieces))
            super().copy(stream, first, to_host=to_host)
            raise RuntimeError("refused")
        device, host, sizes = (column.copy() for column in pieces)
        to, source = (host, device) if to_host else (device, host)
        if self.fault == "swapped":
            source[:2] = source[1::-1]
        elif self.fault == "short":
            sizes[-1] -= 1
        elif self.fault == "long":
            sizes[0] += 1
        elif self.fault == "late":
            sizes[-1] -= 1
            last = (int(to[-1] + sizes[-1]), int(source[-1] + sizes[-1]), 1)
            self.slow.queue.append(partial(ctypes.memmove, *last))
        super().copy(stream, type(pieces)(device, host, sizes), to_host=to_host)


@pytest.mark.parametrize(
    ("fault", "to_host"),
    # a longer load writes the byte that another piece writes, and is right
    [("long", True), *product(["swapped", "short", "late", "raises"], [True, False])],
)
def test_a_driver_that_moves_pieces_wrong_costs_direct_copies(
    fault: str, to_host: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # split K and V: pieces of a head, whose pages staging moves as one
    here = World("LBHNC")
    device = WrongCopies(fault, to_host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STAGING_SIZES", (MODEL.page_bytes,))
        patch.setattr("kvstrata.kernels.gpu.batches.LEAST_RUN", 1)
        found = open_faulty(here, None, device=device)
    device.drain()
    here.check_untouched()
    assert caplog.text.count("left out") == 1 and "transport direct is left out" in caplog.text
    assert "direct" not in found.describe()


def test_a_part_of_a_shard_that_is_wrong_is_seen() -> None:
    """Of a shard that is split, every subshard is moved and not only the first."""
    here = World()

    def copy(segment, layout, pages, rows, ids, *, unpack) -> None:
        copy_torch(segment, layout, pages, rows, ids, unpack=unpack)
        if segment.first_head == 1 and not unpack:
            pages[rows, layout.offset] ^= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STAGING_SIZES", (MODEL.page_bytes // 2,))
        with pytest.raises(TransportError, match="staged storing"):
            device = SimulatedDevice(Random(0))
            GpuPipeline({0: here.rank.segments}, here.region, device, prepare_plainly(copy))
    here.check_untouched()


def test_workers_use_slots_of_their_own() -> None:
    here = World()
    used = set()

    def copy(segment, layout, pages, rows, ids, *, unpack) -> None:
        if is_zero_copy(here, pages):
            used.update(rows.tolist())
        copy_torch(segment, layout, pages, rows, ids, unpack=unpack)

    device = SimulatedDevice(Random(0))
    GpuPipeline(
        {0: here.rank.segments}, here.region, device, prepare_plainly(copy), None, range(4, 7)
    )
    assert used and used <= {4, 5, 6}


# -- on the CPU ---------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("slots", [range(SLOTS), range(3, 4)], ids=str)
def test_the_cpus_copy_is_compared_and_leaves_no_trace(world: dict[str, Any], slots: range) -> None:
    here = World("LBNHC", **world)
    found = open_pipeline({0: here.rank.segments}, here.region, None, slots)
    assert isinstance(found, CpuPipeline)
    here.check_untouched()


@pytest.mark.parametrize("fault", [*FAULTS, beyond_the_page])
def test_a_wrong_copy_on_the_cpu_refuses_the_start(
    fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = World()
    monkeypatch.setattr(cpu, "copy_cpu", partial(fault, here))
    with pytest.raises(GeometryError, match=r"the copy on the CPU (storing|loading)"):
        open_pipeline({0: here.rank.segments}, here.region)
    here.check_untouched()


def test_a_pipeline_that_takes_another_slot_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through the region counts, not the copy alone."""
    here = World()

    def shifted(segment, layout, pages, rows, ids, *, unpack) -> None:
        copy_cpu(segment, layout, pages, (rows + 1) % len(pages), ids, unpack=unpack)

    monkeypatch.setattr(cpu, "copy_cpu", shifted)
    with pytest.raises(GeometryError, match="pages"):
        open_pipeline({0: here.rank.segments}, here.region, None, range(2))


@pytest.mark.parametrize(("blocks", "width"), [(1, 1), (1, 2), (2, 2), (3, 2), (5, 1)])
def test_few_blocks_are_enough(blocks: int, width: int) -> None:
    model = replace(MODEL, blocks_per_chunk=width)
    rank = Rank(model, "LBHNC", blocks=blocks)
    region = torch.zeros(3, model.page_bytes, dtype=torch.uint8)
    moved: list[np.ndarray] = []
    cpu = CpuPipeline({0: rank.segments}, region)

    def store(slots: np.ndarray, ids: np.ndarray) -> None:
        moved.append(ids)
        cpu.submit_store(0, [GroupWork(0, slots, ids)])

    assert Comparison(rank.segments[0], region, range(3)).difference(store, store=True) is None
    assert blocks - 1 in np.concatenate([ids.ravel() for ids in moved]), "the farthest block"
    assert any((ids < 0).any() for ids in moved)
