"""Shapes of pages, normal forms of caches, plans, and what each of them refuses."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import Model, Rank

from kvstrata.kernels.geometry import (
    DTYPE_BYTES,
    HEAD_SLABS,
    OPAQUE,
    TOKEN_MAJOR,
    GeometryError,
    LayerShape,
    head_slabs,
    opaque,
    segment_shapes,
    split_kernel_blocks,
    token_major,
)
from kvstrata.kernels.plan import LocalLayer, RowLayout, Shard, plan

FULL = LayerShape("full", TOKEN_MAJOR, "BF16", 8, 16, 256)


def test_segments_follow_the_layers_first_appearance() -> None:
    latent = LayerShape("latent", TOKEN_MAJOR, "F8_E4M3", 1, 16, 576)
    layers = [FULL, latent, replace(FULL, name="full2"), replace(latent, name="latent2")]
    first, second = segment_shapes(layers, 4)
    assert (first.shape, first.dtype) == ((8, 2, 64, 256), "BF16")
    assert first.layers == ("full", "full2")
    assert (second.shape, second.dtype) == ((1, 2, 64, 576), "F8_E4M3")
    assert (first.offset, first.nbytes) == (0, 8 * 2 * 64 * 256 * 2)
    assert (second.offset, second.nbytes) == (first.nbytes, 2 * 64 * 576)


def test_shapes_of_slabs_and_opaque_bytes() -> None:
    slab = LayerShape("a", HEAD_SLABS, "U8", 4, 1, 1000)
    state = LayerShape("b", OPAQUE, "U8", 2, 1, 333)
    slabs, states = segment_shapes([slab, state, replace(state, name="c")], 3)
    assert slabs.shape == (4, 1, 3, 1000)
    assert states.shape == (2, 2 * 3 * 333)
    assert states.offset == 4 * 3 * 1000 and states.nbytes == 2 * 2 * 3 * 333


@given(
    st.lists(st.tuples(st.sampled_from(["F32", "U8"]), st.integers(1, 3), st.integers(1, 5))),
    st.integers(1, 4),
)
def test_segments_cover_the_page_without_gaps(kinds: list, blocks: int) -> None:
    layers = [
        LayerShape(str(i), TOKEN_MAJOR, dtype, heads, 2, width)
        for i, (dtype, heads, width) in enumerate(kinds)
    ]
    segments = segment_shapes(layers, blocks)
    end = 0
    for segment in segments:
        assert segment.offset == end
        end += segment.nbytes
        assert segment.nbytes == DTYPE_BYTES[segment.dtype] * torch.Size(segment.shape).numel()
    assert sorted(n for s in segments for n in s.layers) == sorted(x.name for x in layers)
    assert end == sum(blocks * x.heads * x.block_bytes for x in layers)


def test_layer_shapes_travel_as_json() -> None:
    there = LayerShape(**json.loads(json.dumps(asdict(FULL))))
    assert there == FULL and segment_shapes([there], 2) == segment_shapes([FULL], 2)


@pytest.mark.parametrize(
    "layer",
    [
        replace(FULL, dtype="F7"),
        replace(FULL, heads=0),
        replace(FULL, tokens=-1),
        replace(FULL, width=0),
        replace(FULL, width=1.5),
        replace(FULL, content=OPAQUE),
        LayerShape("slab", HEAD_SLABS, "U8", 1, 2, 8),
    ],
)
def test_bad_layers_are_refused_by_name(layer: LayerShape) -> None:
    with pytest.raises(GeometryError, match=layer.name):
        segment_shapes([layer], 1)


def test_bad_lists_are_refused() -> None:
    with pytest.raises(GeometryError, match="twice"):
        segment_shapes([FULL, FULL], 1)
    with pytest.raises(GeometryError, match="blocks_per_chunk"):
        segment_shapes([FULL], 0)
    assert segment_shapes([], 1) == ()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_dtypes_and_shapes_of_caches(dtype: torch.dtype) -> None:
    memory = torch.zeros(6, 2, 4, 10, dtype=dtype)
    cache = split_kernel_blocks(token_major("x", memory), 3)
    assert (cache.num_blocks, cache.kernel_blocks) == (3, 2)
    shape = cache.shape(8)
    assert (shape.heads, shape.tokens, shape.width) == (8, 8, 10)
    assert shape.block_bytes == 8 * 10 * dtype.itemsize
    slabs = split_kernel_blocks(head_slabs("x", memory), 3).shape(8)
    assert slabs == LayerShape("x", HEAD_SLABS, "U8", 8, 1, 2 * 40 * dtype.itemsize)
    assert opaque("x", memory).shape(4) == LayerShape("x", OPAQUE, "U8", 4, 1, 80 * dtype.itemsize)


def test_views_that_are_not_what_they_claim() -> None:
    memory = torch.zeros(4, 2, 4, 16)
    bad = {
        "axes": lambda: token_major("x", memory[0]),
        "empty": lambda: token_major("x", memory[:0]),
        "not supported": lambda: token_major("x", memory.to(torch.complex64)),
        "last axis": lambda: token_major("x", memory[..., ::2]),
        "overlaps": lambda: token_major("x", memory[:, :1].expand(4, 2, 4, 16)),
        "contiguous run": lambda: head_slabs("x", memory[..., :8]),
        "strided": lambda: opaque("x", torch.zeros(4, 4, 4, 6)[:, :2, :2, :4:2]),
        "make no": lambda: split_kernel_blocks(token_major("x", memory), 3),
        "no 0 blocks": lambda: split_kernel_blocks(token_major("x", memory), 0),
    }
    for message, make in bad.items():
        with pytest.raises(GeometryError, match=message):
            make()


def test_shards_tile_the_page() -> None:
    """The ranges of all workers of any split are disjoint and cover the segment."""
    model = Model(layers=3)
    for tp in (1, 2, 4):
        for stages in ((range(3),), (range(1), range(1, 3))):
            page = torch.zeros(model.page_bytes, dtype=torch.int64)
            for r in range(tp):
                for layers in stages:
                    (segment,) = Rank(model, "LBHNC", tp=tp, rank=r, layers=layers).segments
                    shard = segment.shard
                    assert shard.count == 1 or len(stages) > 1
                    for i in range(shard.count):
                        start = shard.offset + i * shard.pitch
                        page[start : start + shard.length] += 1
            assert (page == 1).all()


def test_numbers_of_a_plan() -> None:
    model = Model(layers=3, heads=4, tokens=2, dim=8, size=2)
    (segment,) = Rank(model, "LBHNC", tp=2, rank=1).segments
    slab, head = 2 * 2 * 32, 3 * 2 * 2 * 32
    assert segment.shard == Shard(2 * head, 2 * head, 2 * head, 1)
    assert segment.in_page == RowLayout(2 * head, head)
    assert segment.packed(5) == RowLayout(5, head)
    (layers,) = segment.sets
    assert (layers.rows, layers.planes, layers.plane_bytes) == (1, 1, 2 * 32), (
        "tokens were not joined"
    )
    assert segment.word_bytes == 16
    (segment,) = Rank(model, "LBHNC", tp=8, rank=5, layers=range(1, 3)).segments
    assert (segment.first_head, segment.replicas, segment.replica) == (2, 2, 1)
    assert segment.shard == Shard(2 * head + slab, 2 * slab, head, 1)


@pytest.mark.parametrize(("shift", "word"), [(0, 16), (1, 1), (2, 2), (4, 4), (8, 8)])
def test_alignment_is_proven_from_addresses(shift: int, word: int) -> None:
    (segment,) = Rank(Model(size=1, dim=16), "LBNHC", shift=shift).segments
    assert segment.word_bytes == word


def test_the_second_segments_offset_counts_for_alignment() -> None:
    small = token_major("small", torch.zeros(2, 1, 1, 3, dtype=torch.uint8))
    large = token_major("large", torch.zeros(2, 1, 1, 32, dtype=torch.uint8))
    shapes = [small.shape(1), large.shape(1)]
    local = {c.name: LocalLayer(c, 0) for c in (small, large)}
    assert [s.word_bytes for s in plan(shapes, local, 2)] == [1, 2]
    only = plan(shapes, {"large": local["large"]}, 2)
    assert [(s.names, s.page_offset) for s in only] == [(("large",), 6)]


def test_plans_that_cannot_be() -> None:
    memory = torch.zeros(4, 2, 2, 8)
    cache = token_major("l0", memory)
    more = [token_major(f"l{i}", torch.zeros(4, 2, 2, 8)) for i in range(3)]
    shapes = [c.shape(4) for c in more]
    good = LocalLayer(cache, 0)

    def held(*layers: LocalLayer) -> dict[str, LocalLayer]:
        return {layer.cache.name: layer for layer in layers}

    def l1(tensor: torch.Tensor) -> LocalLayer:
        return LocalLayer(token_major("l1", tensor), 0)

    bad = {
        "not among": held(LocalLayer(token_major("other", memory), 0)),
        "not neighbours": held(LocalLayer(more[0], 0), LocalLayer(more[2], 0)),
        "do not fit": held(LocalLayer(cache, 3)),
        "from -1": held(LocalLayer(cache, -1)),
        "replica 2 of 2": held(LocalLayer(cache, 0, 2, 2)),
        "first head": held(good, LocalLayer(more[1], 2)),
        "replica is": held(good, LocalLayer(more[1], 0, 2, 1)),
        "number of blocks": held(good, l1(torch.zeros(5, 2, 2, 8))),
        "heads is": held(good, l1(torch.zeros(4, 1, 2, 8))),
        "tokens is": held(good, l1(torch.zeros(4, 2, 3, 8))),
        "width is": held(good, l1(torch.zeros(4, 2, 2, 6))),
        "dtype is": held(good, l1(torch.zeros(4, 2, 2, 8).half())),
        "content is": held(good, LocalLayer(head_slabs("l1", memory), 0)),
        "device is": held(good, l1(torch.zeros(4, 2, 2, 8, device="meta"))),
    }
    for message, local in bad.items():
        with pytest.raises(GeometryError, match=message):
            plan(shapes, local, 2)
