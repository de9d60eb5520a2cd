"""All copies against a naive page, over layouts, topologies, sizes, alignments and gaps."""

from functools import partial
from pathlib import Path

import pytest
import torch
from copies import Copy, copy_triton, split_kv
from kernel_worlds import DEVICE, LAYOUTS, SPLIT, Model, guarded_pages, some_blocks
from kernel_worlds import Rank as AnyRank

from kvstrata.kernels.geometry import (
    head_slabs,
    opaque,
    segment_shapes,
    token_major,
)
from kvstrata.kernels.pack import MAX_PROGRAMS, TILE_BYTES, copy_torch
from kvstrata.kernels.pack_cpu import copy_cpu
from kvstrata.kernels.plan import LocalLayer, RowLayout, plan

Rank = partial(AnyRank, device=DEVICE)
arange = partial(torch.arange, device=DEVICE)
zeros = partial(torch.zeros, dtype=torch.uint8, device=DEVICE)
COPIES = pytest.mark.parametrize(
    "copy", [copy_torch, copy_triton, *([copy_cpu] if DEVICE.type == "cpu" else [])]
)
ALL = (*LAYOUTS, *SPLIT)


def pack_all(copy: Copy, ranks: list[Rank], ids: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """Pages [chunks, page bytes] that the ranks pack together; checks the bytes around them."""
    model = ranks[0].model
    rows = arange(model.chunks).flip(0) * 2 + 1  # neither in order nor next to each other
    buffer, pages = guarded_pages(2 * model.chunks + 1, model.page_bytes, shift)
    for rank in ranks:
        for segment in rank.segments:
            copy(segment, segment.in_page, pages, rows, ids, unpack=False)
    packed = pages[rows, : model.page_bytes]
    pages[rows, : model.page_bytes] = 0xA5
    assert (buffer == 0xA5).all(), "bytes outside the pages were written"
    return packed


def check_unpack(
    copy: Copy, rank: Rank, empty: Rank, pages: torch.Tensor, ids: torch.Tensor
) -> None:
    """Unpack into `rank`; `empty` is its twin, which then gets the content element by element."""
    rows = arange(len(pages))
    for segment in rank.segments:
        copy(segment, segment.in_page, pages, rows, ids, unpack=True)
    torch.testing.assert_close(rank.buffer, empty.write(ids).buffer, rtol=0, atol=0)


@COPIES
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("layout", ALL)
def test_every_topology_and_layout_reads_the_pages_of_every_other(
    copy: Copy, layout: str, tp: int
) -> None:
    model = Model()
    ids = some_blocks(model)
    ranks = [Rank(model, layout, tp=tp, rank=r).write(ids) for r in range(tp)]
    pages = pack_all(copy, ranks, ids)
    assert torch.equal(pages, model.naive_pages(ids))

    other_ids = some_blocks(model, seed=1)
    for i, other_tp in enumerate((1, 2, 4)):
        if copy is copy_triton and other_tp != tp:
            continue  # interpreted it takes long, and every layout is another one's reader
        other = ALL[(ALL.index(layout) + tp + i) % len(ALL)]
        assert other != layout
        for r in range(other_tp):
            rank = Rank(model, other, tp=other_tp, rank=r)
            empty = Rank(model, other, tp=other_tp, rank=r)
            check_unpack(copy, rank, empty, pages, other_ids)


SHAPES = {
    "1-byte elements, head size 7": Model(layers=1, heads=2, dim=7, size=1),
    "2-byte elements, head size 20": Model(layers=1, heads=2, dim=20, size=2),
    "4-byte elements, head size 33": Model(layers=1, heads=2, dim=33, size=4),
    "16-byte words": Model(layers=1, heads=2, tokens=4, dim=32, size=2),
}


@COPIES
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("layout", ["LBNHC", "BHLNC", "split-inner"])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_sizes_and_misaligned_addresses(
    copy: Copy, shape: str, layout: str, shift: int
) -> None:
    model = SHAPES[shape]
    ids = some_blocks(model)
    pages = pack_all(copy, [Rank(model, layout, shift=shift).write(ids)], ids, shift)
    assert torch.equal(pages, model.naive_pages(ids))
    other = Rank(model, "LHBNC", shift=shift)
    check_unpack(copy, other, Rank(model, "LHBNC", shift=shift), pages, ids)


@COPIES
@pytest.mark.parametrize("missing", [[0], [1], [2], [0, 1], [0, 1, 2], [0, 2]])
def test_missing_blocks_are_zeros_in_the_page_and_left_alone_in_the_cache(
    copy: Copy, missing: list[int]
) -> None:
    model = Model(layers=1, heads=2, blocks_per_chunk=3)
    ids = some_blocks(model)
    rank = Rank(model, "LBNHC").write(ids)
    ids[0, missing] = -1
    pages = pack_all(copy, [rank], ids)
    assert torch.equal(pages, model.naive_pages(ids))
    check_unpack(copy, Rank(model, "BLHNC"), Rank(model, "BLHNC"), pages, ids)


@COPIES
def test_repeated_ids(copy: Copy) -> None:
    """One block in several pages, and several times in one page."""
    model = Model()
    ids = some_blocks(model)
    rank = Rank(model, "LBHNC").write(ids)
    (segment,) = rank.segments
    repeated = ids[0, :1].expand(3, 2).contiguous()
    pages = zeros(3, model.page_bytes)
    copy(segment, segment.in_page, pages, arange(3), repeated, unpack=False)
    sizes = (3, model.heads, model.layers, model.blocks_per_chunk, -1)
    parts = pages.view(sizes)
    wanted = model.naive_pages(ids).view(2, *sizes[1:])[:1, :, :, :1]
    assert torch.equal(parts, wanted.expand_as(parts))

    empty = Rank(model, "LBHNC")
    copy(empty.segments[0], segment.in_page, pages, arange(3), repeated, unpack=True)
    only = ids.clone()
    only[0, 1:], only[1:] = -1, -1
    assert torch.equal(empty.buffer, Rank(model, "LBHNC").write(only).buffer)


@COPIES
def test_more_jobs_than_programs_and_more_tiles_than_one(copy: Copy) -> None:
    model = Model(layers=3, heads=3, tokens=32, dim=24, size=4, chunks=3, blocks_per_chunk=2)
    block_bytes = model.page_bytes // model.layers // model.blocks_per_chunk
    assert block_bytes > 2 * TILE_BYTES and block_bytes % TILE_BYTES
    assert model.layers * model.chunks * 2 * 3 > MAX_PROGRAMS
    ids = some_blocks(model)
    pages = pack_all(copy, [Rank(model, "LHBNC").write(ids)], ids)
    assert torch.equal(pages, model.naive_pages(ids))
    check_unpack(copy, Rank(model, "BLNHC"), Rank(model, "BLNHC"), pages, ids)


@COPIES
@pytest.mark.parametrize("layout", ALL)
def test_kernel_blocks_follow_each_other_in_a_block(copy: Copy, layout: str) -> None:
    model = Model(heads=2, tokens=4)
    ids = some_blocks(model)
    pages = pack_all(copy, [Rank(model, layout, kernel_blocks=2).write(ids)], ids)
    assert torch.equal(pages, model.naive_pages(ids))
    check_unpack(
        copy,
        Rank(model, layout, kernel_blocks=4),
        Rank(model, layout, kernel_blocks=4),
        pages,
        ids,
    )


@COPIES
def test_pipeline_ranks_write_their_layers_of_every_head(copy: Copy) -> None:
    model = Model(layers=5)
    ids = some_blocks(model)
    stages = (range(0, 2), range(2, 5))
    ranks = [
        Rank(model, layout, tp=2, rank=r, layers=stage).write(ids)
        for r, layout in enumerate(("LBHNC", "BLNHC"))
        for stage in stages
    ]
    pages = pack_all(copy, ranks, ids)
    assert torch.equal(pages, model.naive_pages(ids))
    for stage in stages:
        rank, empty = (Rank(model, "LHBNC", layers=stage) for _ in range(2))
        check_unpack(copy, rank, empty, pages, ids)


@COPIES
def test_a_part_alone_is_the_shard_of_the_page(copy: Copy) -> None:
    """What is staged for DMA, without the rest of the page, has the shard's bytes in order."""
    model = Model(layers=4)
    ids = some_blocks(model)
    for layers in (range(4), range(1, 3)):
        rank = Rank(model, "LBNHC", tp=2, rank=1, layers=layers).write(ids)
        (segment,) = rank.segments
        staged = zeros(2, 16 + segment.shard_bytes)
        copy(segment, segment.packed(16), staged, arange(2), ids, unpack=False)
        shard = segment.shard
        ranges = [
            model.naive_pages(ids)[:, start : start + shard.length]
            for start in range(shard.offset, shard.offset + shard.count * shard.pitch, shard.pitch)
        ]
        assert torch.equal(staged[:, 16:], torch.cat(ranges, dim=1))
        assert shard.count == (1 if layers == range(4) else 2)


@COPIES
def test_layers_with_different_strides_share_a_segment(copy: Copy) -> None:
    model = Model(layers=3)
    ids = some_blocks(model)
    ranks = [
        Rank(model, layout, layers=range(i, i + 1)).write(ids)
        for i, layout in enumerate(("LBHNC", "LBNHC", "LBHNC"))
    ]
    held = {}
    for rank in ranks:
        (segment,) = rank.segments
        held[segment.names[0]] = LocalLayer(rank.caches[0], 0)
    (segment,) = plan(model.shapes(), held, model.blocks_per_chunk)
    assert [s.positions for s in segment.sets] == [(0, 2), (1,)]
    pages = zeros(2, model.page_bytes)
    copy(segment, segment.in_page, pages, arange(2), ids, unpack=False)
    assert torch.equal(pages, model.naive_pages(ids))
    written = [rank.buffer.clone() for rank in ranks]
    for layers in segment.sets:
        for view in layers.views:
            view[ids.flatten()] = 0
    copy(segment, segment.in_page, pages, arange(2), ids, unpack=True)
    assert all(torch.equal(rank.buffer, b) for rank, b in zip(ranks, written, strict=True))


@COPIES
@pytest.mark.parametrize("kind", ["mla", "slabs", "opaque"])
def test_other_contents(copy: Copy, kind: str) -> None:
    """MLA rows, head slabs and opaque bytes, two layers, two ranks where there are ranks."""
    blocks, chunk = 5, torch.tensor([[3, 1]], device=DEVICE)
    generator = torch.Generator().manual_seed(0)

    def memory(*sizes: int) -> torch.Tensor:
        numbers = torch.randint(0, 2**15, sizes, generator=generator, dtype=torch.int16)
        return numbers.to(DEVICE)

    if kind == "mla":  # [B, N, C] of one latent head, both layers in one allocation
        raw = memory(blocks, 2, 4, 9)
        made = [[token_major(f"l{i}", raw[:, i].unsqueeze(1)) for i in range(2)]]
        wanted = [raw[[3, 1], i] for i in range(2)]
        shapes = [c.shape(1) for c in made[0]]
    elif kind == "slabs":
        ranks = [memory(2, blocks, 2, 3, 5) for _ in range(2)]
        made = [[head_slabs(f"l{i}", raw[i]) for i in range(2)] for raw in ranks]
        wanted = [raw[i][[3, 1], head] for raw in ranks for head in range(2) for i in range(2)]
        shapes = [c.shape(4) for c in made[0]]
        assert segment_shapes(shapes, 2)[0].shape == (4, 2, 2, 30)
    else:  # bytes of a block in two strided runs
        ranks = [memory(2, 3, blocks, 4, 8)[..., :6] for _ in range(2)]
        made = [[opaque(f"l{i}", raw[i].transpose(0, 1)) for i in range(2)] for raw in ranks]
        wanted = [raw[i][:, [3, 1]].transpose(0, 1) for raw in ranks for i in range(2)]
        shapes = [c.shape(2) for c in made[0]]
        assert segment_shapes(shapes, 2)[0].shape == (2, 2 * 2 * 3 * 4 * 6 * 2)
    page = torch.cat([w.contiguous().view(torch.uint8).flatten() for w in wanted])
    pages = zeros(1, page.numel())
    segments = []
    for rank, caches in enumerate(made):
        first = rank * caches[0].view.shape[1]
        (segment,) = plan(shapes, {c.name: LocalLayer(c, first) for c in caches}, 2)
        segments.append((segment, caches))
        copy(segment, segment.in_page, pages, arange(1), chunk, unpack=False)
    assert torch.equal(pages[0], page)

    for segment, caches in segments:
        before = [c.view.clone() for c in caches]
        for cache in caches:
            cache.view[[3, 1]] = 0
        copy(segment, segment.in_page, pages, arange(1), chunk, unpack=True)
        assert all(torch.equal(c.view, b) for c, b in zip(caches, before, strict=True))


@COPIES
def test_offsets_beyond_two_to_the_31(copy: Copy, tmp_path: Path) -> None:
    """Blocks, heads, V and pages lie more than 2^31 words of one byte apart, in a sparse file."""
    gap = (2 << 30) + 16
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(gap * 9)
    memory = torch.from_file(str(path), shared=True, size=gap * 9, dtype=torch.uint8)
    if DEVICE.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 2 * memory.nbytes:
            pytest.skip("needs 40 GiB of GPU memory")
        memory = torch.empty_like(memory, device=DEVICE)
    # [B=2, H=2, N=2, 2, D=16]: V is 4 gaps after K, block 1 is 2 gaps after block 0
    key = memory.as_strided((2, 2, 2, 16), (2 * gap, gap, 16, 1), 1)
    value = memory.as_strided((2, 2, 2, 16), (2 * gap, gap, 16, 1), 1 + 4 * gap)
    cache = split_kv("layer", key, value)
    (segment,) = plan([cache.shape(2)], {"layer": LocalLayer(cache, 0)}, 2)
    assert segment.word_bytes == 1
    pages = memory.as_strided((2, 256), (gap, 1), 1 << 20)
    content = torch.randint(0, 256, (2, 2, 2, 2, 16), dtype=torch.uint8)  # [J, H, N, K/V, D]
    content = content.to(DEVICE)
    key.copy_(content[:, :, :, 0])
    value.copy_(content[:, :, :, 1])
    row, ids = arange(1, 2), arange(2).view(1, 2)
    copy(segment, segment.in_page, pages, row, ids, unpack=False)
    assert torch.equal(pages[1], content.transpose(0, 1).flatten())
    key.zero_()
    value.zero_()
    copy(segment, segment.in_page, pages, row, ids, unpack=True)
    assert torch.equal(key, content[:, :, :, 0]) and torch.equal(value, content[:, :, :, 1])


@COPIES
def test_arguments_that_do_not_fit_are_refused(copy: Copy) -> None:
    (segment,) = Rank(Model(), "LBHNC").segments
    size = Model().page_bytes
    pages = zeros(3, size)
    rows, ids = arange(2), zeros(2, 2, dtype=torch.int64)
    good = (segment, segment.in_page, pages, rows, ids)
    bad = {
        "too short": (*good[:2], pages[:, :-1], rows, ids),
        "not bytes": (*good[:2], pages.view(torch.int16), rows, ids),
        "one column less": (*good[:4], ids[:, :1]),
        "one row less": (*good[:4], ids[:1]),
        "32-bit ids": (*good[:4], ids.int()),
        "32-bit rows": (*good[:3], rows.int(), ids),
        "before the page": (segment, RowLayout(-1, size), *good[2:]),
        "overlapping heads": (segment, RowLayout(0, 16), *good[2:]),
    }
    for what, arguments in bad.items():
        with pytest.raises(ValueError):
            copy(*arguments, unpack=False)
        assert not pages.any(), what
    copy(*good[:3], rows[:0], ids[:0], unpack=False)
    assert not pages.any()
