"""The table of real models: their published sizes, and caches that are what the layouts say."""

import pytest
import torch

from kvstrata.kernels.bench.models import LAYOUTS, MODELS, Group, rank_caches
from kvstrata.kernels.selftest import check_round_trip

# KiB of KV cache per token over all ranks, in bf16, as the models' makers and users quote it
KIB_PER_TOKEN = {
    "Llama-3-8B TP1": 128,
    "Llama-3-70B TP8": 320,
    "Qwen3-32B TP4": 256,
    "DeepSeek-V3 MLA": 68.625,
    "gpt-oss-20b": 48,
}


def test_bytes_per_token() -> None:
    found = {m.name: sum(group.token_bytes for group in m.groups) / 1024 for m in MODELS}
    assert found == KIB_PER_TOKEN


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_its_heads_of_every_layer(layout: str, model) -> None:
    for group in model.groups:
        (segment,) = rank_caches(
            group, layout, num_blocks=3, blocks_per_chunk=4, tp=model.tp, rank=model.tp - 1
        )
        assert (segment.local_layers, segment.heads) == (group.layers, group.heads)
        assert segment.first_head + segment.local_heads == group.heads
        assert segment.slab_bytes == 4 * group.block_tokens * group.width * 2
        assert segment.shard_bytes * model.tp == group.token_bytes * group.block_tokens * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_the_order_of_the_strides(layout: str) -> None:
    group = Group(layers=3, heads=4, width=8, block_tokens=2)
    segments = rank_caches(group, layout, num_blocks=5, blocks_per_chunk=2, tp=2, rank=1)
    check_round_trip(segments)
    (segment,) = segments
    (layers,) = segment.sets
    first, second = (view.data_ptr() for view in layers.views[:2])
    normal = layers.views[0].view(torch.bfloat16)
    strides = {"L": (second - first) // 2, **dict(zip("BHN", normal.stride(), strict=False))}
    assert sorted("LBHN", key=lambda axis: -strides[axis]) == list(layout[:-1])


def test_ranks_that_share_a_head_take_turns() -> None:
    group = Group(layers=1, heads=2, width=8)
    ranks = [
        rank_caches(group, "LBHNC", num_blocks=1, blocks_per_chunk=1, tp=4, rank=rank)[0]
        for rank in range(4)
    ]
    assert [(s.first_head, s.replicas, s.replica) for s in ranks] == [
        (0, 2, 0),
        (0, 2, 1),
        (1, 2, 0),
        (1, 2, 1),
    ]


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="NHD"):
        rank_caches(Group(1, 1, 8), "NHD", num_blocks=1, blocks_per_chunk=1)
