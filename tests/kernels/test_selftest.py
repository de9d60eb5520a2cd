"""The round trip passes on sound caches, leaves them as they were, and sees every broken one."""

from dataclasses import replace

import pytest
import torch
from copies import copy_triton
from kernel_worlds import DEVICE, LAYOUTS, SPLIT, Model, Rank

from kvstrata.kernels import selftest
from kvstrata.kernels.geometry import GeometryError, head_slabs, opaque, token_major
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.plan import LocalLayer, Segment, plan
from kvstrata.kernels.selftest import check_round_trip


@pytest.mark.parametrize("layout", [*LAYOUTS, *SPLIT])
def test_sound_caches_pass_and_keep_their_content(layout: str) -> None:
    rank = Rank(Model(tokens=4), layout, tp=2, rank=1, kernel_blocks=2)
    rank.buffer.copy_(torch.arange(rank.buffer.numel()))
    before = rank.buffer.clone()
    check_round_trip(rank.segments)
    assert torch.equal(rank.buffer, before)


def test_the_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "copy_torch", copy_triton)
    check_round_trip(Rank(Model(), "LBNHC", tp=2, rank=1, device=DEVICE).segments)


def test_other_contents_and_fewer_blocks_than_a_chunk_pass() -> None:
    memory = torch.zeros(3, 2, 4, 6, dtype=torch.int16)
    for cache, heads in ((head_slabs("l", memory), 4), (opaque("l", memory[..., :5]), 2)):
        for chunk in (1, 2, 5):
            check_round_trip(plan([cache.shape(heads)], {"l": LocalLayer(cache, 1)}, chunk))
    check_round_trip(())
    assert not memory.any()


def aliased(offset: int) -> tuple[Segment, ...]:
    """Two layers whose memory overlaps by all but `offset` elements."""
    memory = torch.zeros(2000, dtype=torch.int16)
    strides = (128, 64, 16, 1)
    caches = [
        token_major(f"layer.{i}", memory.as_strided((6, 2, 4, 16), strides, i * offset))
        for i in range(2)
    ]
    shapes = [cache.shape(2) for cache in caches]
    return plan(shapes, {c.name: LocalLayer(c, 0) for c in caches}, 2)


@pytest.mark.parametrize("offset", [0, 16, 512])
def test_layers_that_share_memory_are_named(offset: int) -> None:
    with pytest.raises(GeometryError, match=r"layer\.0"):
        check_round_trip(aliased(offset))


def wrong_strides(segment: Segment, change: dict) -> Segment:
    """The segment as the kernel sees it, with one number changed; the views stay right."""
    return replace(segment, sets=tuple(replace(layers, **change) for layers in segment.sets))


@pytest.mark.parametrize("axis", range(3))
def test_wrong_strides_of_a_copy(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "copy_torch", copy_triton)
    (segment,) = Rank(Model(), "LBNHC", device=DEVICE).segments
    strides = list(segment.sets[0].strides)
    strides[axis] //= 2
    with pytest.raises(GeometryError, match=r"layer\.0"):
        check_round_trip([wrong_strides(segment, {"strides": tuple(strides)})])


def test_a_copy_that_swaps_heads_or_misses_the_last_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (segment,) = Rank(Model(), "LBHNC").segments
    before = segment.sets[0].views[0].clone()

    def swapped(segment, layout, pages, rows, block_ids, *, unpack):
        views = tuple(view.flip(1) for view in segment.sets[0].views)
        layers = replace(segment.sets[0], views=views)
        copy_torch(replace(segment, sets=(layers,)), layout, pages, rows, block_ids, unpack=unpack)

    def lazy(segment, layout, pages, rows, block_ids, *, unpack):
        ids = block_ids.clone()
        if unpack:
            ids[-1, 0] = -1
        copy_torch(segment, layout, pages, rows, ids, unpack=unpack)

    for broken in (swapped, lazy):
        monkeypatch.setattr(selftest, "copy_torch", broken)
        with pytest.raises(GeometryError, match=r"layer\.0"):
            check_round_trip([segment])
        assert torch.equal(segment.sets[0].views[0], before), "not restored after a failure"


def test_a_copy_that_writes_outside_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def stray(segment, layout, pages, rows, block_ids, *, unpack):
        copy_torch(segment, layout, pages, rows, block_ids, unpack=unpack)
        if not unpack:
            pages[0, -1] = 0

    monkeypatch.setattr(selftest, "copy_torch", stray)
    with pytest.raises(GeometryError, match="outside"):
        check_round_trip(Rank(Model(), "LBHNC").segments)
