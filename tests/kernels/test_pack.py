"""Both copies against a naive page, over layouts, topologies, sizes, alignments and gaps."""

import pytest
import torch
from kernel_worlds import LAYOUTS, SPLIT, Model, Rank, guarded_pages, some_blocks

from kvstrata.kernels.pack import Copy, copy_torch, copy_triton

COPIES = pytest.mark.parametrize("copy", [copy_torch, copy_triton])
ALL = (*LAYOUTS, *SPLIT)


def pack_all(copy: Copy, ranks: list[Rank], ids: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """Pages [chunks, page bytes] that the ranks pack together; checks the bytes around them."""
    model = ranks[0].model
    rows = torch.arange(model.chunks).flip(0) * 2 + 1  # neither in order nor next to each other
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
    rows = torch.arange(len(pages))
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
        other = ALL[(ALL.index(layout) + tp + i) % len(ALL)]
        assert other != layout
        for r in range(other_tp):
            rank = Rank(model, other, tp=other_tp, rank=r)
            empty = Rank(model, other, tp=other_tp, rank=r)
            check_unpack(copy, rank, empty, pages, other_ids)
