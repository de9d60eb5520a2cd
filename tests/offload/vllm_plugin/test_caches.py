"""Which heads a rank may claim of a layer, and what is claimed of nothing."""

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstrata.offload.vllm_plugin.caches import _heads_of, _is_plain, _Rank  # noqa: E402


def full(heads: int, head_size: int = 8) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=16, num_kv_heads=heads, head_size=head_size, dtype=torch.float32
    )


def rank(tp: int, tp_rank: int, heads: int, *, context_parallel: bool = False) -> _Rank:
    return _Rank(tp, tp_rank, heads, context_parallel, ranks=tp, rank=tp_rank)


@pytest.mark.parametrize(
    ("tp", "model_heads", "local", "expected"),
    [
        (1, 4, 4, [(4, 0, 1, 0)]),
        (2, 4, 2, [(4, 0, 1, 0), (4, 2, 1, 0)]),
        # more ranks than heads: a head is held by several ranks, side by side
        (4, 2, 1, [(2, 0, 2, 0), (2, 0, 2, 1), (2, 1, 2, 0), (2, 1, 2, 1)]),
        (2, 1, 1, [(1, 0, 2, 0), (1, 0, 2, 1)]),
        # layers with more heads than the model says shard the same way
        (2, 4, 4, [(8, 0, 1, 0), (8, 4, 1, 0)]),
        # fewer: they may be replicated, and nothing says how
        (2, 4, 1, [None, None]),
        (3, 2, 1, [None, None, None]),
    ],
)
def test_heads(
    tp: int, model_heads: int, local: int, expected: list[tuple[int, int, int, int] | None]
) -> None:
    found = [_heads_of(full(local), rank(tp, tp_rank, model_heads)) for tp_rank in range(tp)]
    assert found == expected


def test_latent_rows_are_one_head_on_all_ranks() -> None:
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert [_heads_of(spec, rank(2, n, 16)) for n in range(2)] == [(1, 0, 2, 0), (1, 0, 2, 1)]


def test_context_parallel_interleaves_tokens() -> None:
    assert _heads_of(full(4), rank(1, 0, 4, context_parallel=True)) is None


def test_plain_views() -> None:
    view = torch.zeros(10, 2, 16, 16)  # [B, H, N, K then V of 8]
    assert _is_plain(full(2), view, 10)
    assert _is_plain(full(2), view.view(20, 2, 8, 16), 10), "kernel blocks of half the size"
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=64
    )
    assert _is_plain(window, view, 10)


@pytest.mark.parametrize(
    "shape",
    [(10, 2, 16, 8), (10, 4, 16, 16), (10, 2, 8, 16), (11, 2, 16, 16), (10, 16, 2, 16), (10, 512)],
    ids=str,
)
def test_other_views_are_not(shape: tuple[int, ...]) -> None:
    assert not _is_plain(full(2), torch.zeros(shape), 10)


def test_other_kinds_of_specs_are_not() -> None:
    class Other(FullAttentionSpec):
        """A kind of attention that we do not know."""

    spec = Other(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    assert not _is_plain(spec, torch.zeros(10, 2, 16, 16), 10)
