"""The subshards of a large shard together are the shard."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAYOUTS, SPLIT, Model, Rank, some_blocks

from kvstrata.kernels.gpu.transport import Fragments
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.plan import split

CPU = torch.device("cpu")
MODEL = Model(layers=3, heads=4, dim=4)
SLAB = MODEL.page_bytes // (MODEL.layers * MODEL.heads)  # one layer of one head

WORLDS = st.fixed_dictionaries(
    {
        "layout": st.sampled_from([*LAYOUTS, *SPLIT]),
        "topology": st.sampled_from([(1, 0), (2, 1)]),
        "layers": st.sampled_from([range(3), range(1, 3)]),
        "kernel_blocks": st.sampled_from([1, 2]),
    }
)


@given(world=WORLDS, most=st.integers(1, MODEL.page_bytes + 1))
def test_the_parts_together_are_the_segment(world: dict, most: int) -> None:
    tp, r = world.pop("topology")
    world |= {"tp": tp, "rank": r}
    ids = some_blocks(MODEL, device=CPU)
    rank = Rank(MODEL, **world).write(ids)
    (segment,) = rank.segments
    subshards = split(segment, most)
    assert sum(subshard.shard_bytes for subshard in subshards) == segment.shard_bytes
    assert all(subshard.shard_bytes <= max(most, SLAB) for subshard in subshards)

    whole, together = torch.full((2, 2, MODEL.page_bytes), 0xA5, dtype=torch.uint8)
    rows = torch.arange(2)
    copy_torch(segment, segment.in_page, whole, rows, ids, unpack=False)
    for subshard in subshards:
        copy_torch(subshard, subshard.in_page, together, rows, ids, unpack=False)
        packed = torch.zeros(2, subshard.shard_bytes, dtype=torch.uint8)
        copy_torch(subshard, subshard.packed(0), packed, rows, ids, unpack=False)
        shard = subshard.shard
        runs = [shard.offset + i * shard.pitch for i in range(shard.count)]
        pieces = [whole[:, run : run + shard.length] for run in runs]
        assert torch.equal(packed, torch.cat(pieces, 1)), (
            "a staged subshard is its runs of the page"
        )
    assert torch.equal(together, whole)

    together.fill_(0xA5)
    pages = together.data_ptr() + np.arange(2) * MODEL.page_bytes
    for subshard in subshards:
        runs = Fragments(subshard, subshard.in_page).pieces(pages, ids.numpy(), None)
        for piece in zip(
            runs.host.tolist(), runs.device.tolist(), runs.sizes.tolist(), strict=True
        ):
            ctypes.memmove(*piece)
    assert torch.equal(together, whole), "the subshards' addresses"

    empty = Rank(MODEL, **world)
    for subshard in split(empty.segments[0], most):
        copy_torch(subshard, subshard.in_page, together, rows, ids, unpack=True)
    assert torch.equal(empty.buffer, rank.buffer)


@pytest.mark.parametrize(
    ("most", "heads", "layers"),
    [
        (MODEL.page_bytes, [4], [3]),
        (MODEL.page_bytes - 1, [3, 1], [3]),
        (2 * 3 * SLAB, [2, 2], [3]),
        (3 * SLAB, [1, 1, 1, 1], [3]),
        (3 * SLAB - 1, [1, 1, 1, 1], [2, 1]),
        (1, [1, 1, 1, 1], [1, 1, 1]),
    ],
)
def test_heads_are_split_first_and_layers_where_one_head_is_too_large(
    most: int, heads: list[int], layers: list[int]
) -> None:
    subshards = split(Rank(MODEL, "LBHNC").segments[0], most)
    found = [(subshard.local_heads, subshard.local_layers) for subshard in subshards]
    assert found == [(h, n) for h in heads for n in layers]
    names = [name for subshard in subshards[: len(layers)] for name in subshard.names]
    assert names == ["layer.0", "layer.1", "layer.2"]
    if len(layers) == 1:
        assert all(subshard.shard.count == 1 for subshard in subshards), (
            "each is one range of the page"
        )
