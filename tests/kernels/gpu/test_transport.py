"""The pieces of a direct copy against the oracle's bytes, and the choice of a transport."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAYOUTS, SPLIT, Model, Rank, some_blocks

from kvstrata.kernels.geometry import token_major
from kvstrata.kernels.gpu.device import Pieces
from kvstrata.kernels.gpu.transport import (
    FEW_BYTES,
    FEW_PAGES,
    TRIAL_BYTES,
    Choice,
    Fragments,
    Transport,
    choose,
    fastest,
)
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.plan import LocalLayer, plan

CPU = torch.device("cpu")
MODEL = Model(layers=3, heads=4, dim=4)
STAGED, DIRECT, ZERO_COPY = Transport

WORLDS = st.fixed_dictionaries(
    {
        "layout": st.sampled_from([*LAYOUTS, *SPLIT]),
        "topology": st.sampled_from([(1, 0), (2, 0), (2, 1), (8, 1)]),
        "layers": st.sampled_from([range(3), range(1, 3)]),
        "kernel_blocks": st.sampled_from([1, 2]),
        "shift": st.integers(0, 1),
    }
)


def apply(pieces: Pieces, *, to_host: bool) -> None:
    for device, host, nbytes in zip(*(column.tolist() for column in pieces), strict=True):
        ctypes.memmove(*((host, device) if to_host else (device, host)), nbytes)


@given(
    world=WORLDS,
    blocks_per_chunk=st.integers(1, 3),
    gaps=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_the_pieces_are_what_the_oracle_copies(
    world: dict, blocks_per_chunk: int, gaps: list[bool]
) -> None:
    tp, r = world.pop("topology")
    model = replace(MODEL, blocks_per_chunk=blocks_per_chunk, chunks=2)
    ids = some_blocks(model, device=CPU)
    rank = Rank(model, tp=tp, rank=r, **world).write(ids)
    ids[torch.tensor(gaps[: ids.numel()]).view(ids.shape)] = -1
    (segment,) = rank.segments
    fragments = Fragments(segment, segment.in_page)
    page, slots = model.page_bytes + 32, np.array([2, 0])
    wanted, region = torch.full((2, 3, page), 0xA5, dtype=torch.uint8)
    at = region.data_ptr() + slots * page
    rows = torch.from_numpy(slots)

    zeros = torch.zeros(fragments.most_bytes, dtype=torch.uint8)
    pieces = fragments.pieces(at, ids.numpy(), zeros.data_ptr())
    assert all(column.dtype == np.int64 and column.flags.carray for column in pieces)
    assert pieces.sizes.max() == fragments.most_bytes
    assert pieces.sizes.mean() == pytest.approx(fragments.mean_bytes)
    assert pieces.sizes.sum() == 2 * segment.shard_bytes
    apply(pieces, to_host=True)
    copy_torch(segment, segment.in_page, wanted, rows, ids, unpack=False)
    assert torch.equal(region, wanted)

    device, host, sizes = (column.reshape(-1, fragments.per_block) for column in pieces)
    joined = (host[:, :-1] + sizes[:, :-1] == host[:, 1:]) & (
        device[:, :-1] + sizes[:, :-1] == device[:, 1:]
    )
    assert not joined[(ids >= 0).flatten().numpy()].any(), "pieces that are one run"

    region.random_(generator=torch.Generator().manual_seed(1))
    twin = Rank(model, tp=tp, rank=r, **world)
    twin.buffer.copy_(rank.buffer)
    (same,) = twin.segments
    apply(fragments.pieces(at, ids.numpy(), None), to_host=False)
    copy_torch(same, same.in_page, region, rows, ids, unpack=True)
    assert torch.equal(rank.buffer, twin.buffer)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_shard_that_lies_in_the_cache_as_in_the_page_is_one_piece(tp: int) -> None:
    model = replace(MODEL, blocks_per_chunk=1)
    (segment,) = Rank(model, "BHLNC", tp=tp, rank=tp - 1).segments
    fragments = Fragments(segment, segment.in_page)
    assert (fragments.per_block, fragments.most_bytes) == (1, segment.shard_bytes)
    longer = replace(model, blocks_per_chunk=4)
    (segment,) = Rank(longer, "BHLNC", tp=tp).segments
    assert Fragments(segment, segment.in_page).per_block == 12 // tp, "other blocks lie between"


def test_latent_rows_are_one_piece_per_layer_and_block() -> None:
    memory = torch.zeros(5, 9, 1, 16, 12, dtype=torch.int16)  # LBHNC
    caches = [token_major(f"layer.{i}", view) for i, view in enumerate(memory)]
    shapes = [cache.shape(1) for cache in caches]
    (segment,) = plan(shapes, {c.name: LocalLayer(c, 0) for c in caches}, 4)
    fragments = Fragments(segment, segment.in_page)
    assert fragments.per_block == 5 and fragments.mean_bytes == 16 * 12 * 2


def test_neighbours_in_the_first_block_alone_are_two_pieces() -> None:
    memory = torch.arange(80, dtype=torch.int16)
    caches = [
        token_major("a", memory.as_strided((3, 1, 2, 4), (16, 8, 4, 1))),
        token_major("b", memory.as_strided((3, 1, 2, 4), (32, 8, 4, 1), 8)),
    ]
    local = {cache.name: LocalLayer(cache, 0) for cache in caches}
    (segment,) = plan([cache.shape(1) for cache in caches], local, 1)
    page = torch.zeros(1, 16, dtype=torch.int16)
    at = np.array([page.data_ptr()])
    apply(Fragments(segment, segment.in_page).pieces(at, np.array([[1]]), None), to_host=True)
    assert page.tolist() == [[*range(16, 24), *range(40, 48)]]


# -- the choice ---------------------------------------------------------------------

SECONDS = st.floats(1e-6, 1.0)
TIMES = st.tuples(SECONDS, SECONDS)  # of one page and of many


def chosen(times: dict[Transport, tuple[float, float]], most_pages: int = 256) -> Choice:
    def seconds(transport: Transport, pages: int) -> float:
        assert pages in (1, most_pages)
        return times[transport][pages > 1]

    choice, trials = choose(seconds, list(times), most_pages, 1000)
    assert [t.transport for t in trials] == 2 * list(times)
    assert [t.pages for t in trials] == [1] * len(times) + [most_pages] * len(times)
    return choice


@given(staged=TIMES, direct=TIMES, zero_copy=TIMES)
def test_nothing_slower_than_a_plain_batch_copy_is_chosen(
    staged: tuple[float, float], direct: tuple[float, float], zero_copy: tuple[float, float]
) -> None:
    times = {STAGED: staged, ZERO_COPY: zero_copy, DIRECT: direct}
    for size, transport in enumerate(chosen(times)):
        best = min(time[size] for time in times.values())
        assert times[transport][size] <= 1.051 * direct[size]
        if size == 0:
            assert times[transport][0] <= 1.051 * best


def test_equal_ways_are_taken_in_order_of_what_they_cost_the_model() -> None:
    assert chosen({STAGED: (1, 1), ZERO_COPY: (1, 1), DIRECT: (1, 1)}) == (DIRECT, DIRECT)
    assert chosen({STAGED: (1, 1), ZERO_COPY: (1, 1)}) == (STAGED, STAGED)
    nearly = {STAGED: (1.04, 1.06), ZERO_COPY: (1, 2), DIRECT: (1.06, 1)}
    assert chosen(nearly) == (STAGED, DIRECT)


def test_zero_copy_of_many_pages_must_be_much_faster() -> None:
    times = {STAGED: (2.0, 2.0), ZERO_COPY: (1.5, 1.5)}
    assert chosen(times) == (ZERO_COPY, STAGED)
    assert chosen(times, FEW_PAGES) == (ZERO_COPY, ZERO_COPY), "that is not many"
    assert chosen({STAGED: (2.0, 2.0), ZERO_COPY: (1.2, 1.2)}) == (ZERO_COPY, ZERO_COPY)


def test_few_pages_that_are_large_are_many() -> None:
    choice = Choice(ZERO_COPY, STAGED)
    assert choice.of(FEW_PAGES, FEW_BYTES) is ZERO_COPY
    assert choice.of(FEW_PAGES + 1, 1) is choice.of(1, FEW_BYTES + 1) is STAGED
    times = {STAGED: 2.0, ZERO_COPY: 1.5}
    choice, _ = choose(lambda way, pages: times[way], list(times), 1, FEW_BYTES + 1)
    assert choice.many is STAGED


@pytest.mark.parametrize("last", [1, 256])
def test_a_transport_that_fails_is_left_out(last: int, caplog: pytest.LogCaptureFixture) -> None:
    def seconds(transport: Transport, pages: int) -> float:
        if transport is DIRECT and pages == last:
            raise RuntimeError("refused")
        return 1.0 if transport is DIRECT else 2.0

    choice, trials = choose(seconds, [STAGED, DIRECT], 256, 1000)
    assert choice == (STAGED, STAGED) and "direct is left out: refused" in caplog.text
    assert [t.transport for t in trials if t.pages == last] == [STAGED]
    with pytest.raises(RuntimeError, match="refused"):
        choose(seconds, [DIRECT], 256, 1000)


def test_a_larger_size_must_be_faster() -> None:
    def fastest_of(times: dict[int, float]) -> int:
        return fastest(times.__getitem__, sorted(times))

    assert fastest_of({8: 1.0, 16: 0.96}) == 8
    assert fastest_of({8: 1.0, 16: 0.9}) == 16
    assert fastest_of({8: 1.0, 16: 1.1}) == 8


def test_trials_are_bounded_and_disturbances_are_ignored() -> None:
    seen = []

    def slow_once(transport: Transport, pages: int) -> float:
        seen.append(pages)
        return 100.0 if len(seen) % 5 == 0 else {STAGED: 1.0, ZERO_COPY: 2.0}[transport]

    for page_bytes, most, many in (
        (TRIAL_BYTES + 1, 256, 1),
        (TRIAL_BYTES // 8, 256, 8),
        (1, 7, 7),
    ):
        seen.clear()
        choice, trials = choose(slow_once, [STAGED, ZERO_COPY], most, page_bytes)
        assert choice == (STAGED, STAGED)
        assert {trial.pages for trial in trials} == {1, many} == set(seen)
        assert {trial.seconds for trial in trials} == {1.0, 2.0}
    choice, trials = choose(slow_once, [STAGED], 1, 1)
    assert choice == (STAGED, STAGED) and [trial.pages for trial in trials] == [1, 1]
