"""How vLLM's runs of blocks fall into pages, against a model that sees the block table."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import GPULoadStoreSpec  # noqa: E402

from kvstrata.offload.vllm_plugin.transfer import (  # noqa: E402
    MISSING,
    NULL_BLOCK,
    PageSlots,
    incomplete,
    work_of,
)


def rows(
    block_ids: Sequence[int], first: int, slots: Sequence[int], per_chunk: int, *, store: bool
) -> list[list[int]]:
    """One group's table of pages."""
    blocks = GPULoadStoreSpec(list(block_ids), [len(block_ids)], [first])
    pages = PageSlots(1, slots, [0] * len(slots))
    (work,) = work_of(pages, blocks, [0], per_chunk, store=store)
    assert work.group == 0 and work.slots.tolist() == list(slots)
    assert work.slots.dtype == work.block_ids.dtype == np.int64
    return work.block_ids.tolist()


def test_full_store() -> None:
    assert rows([5, 6, 7, 8], 0, [3, 1], 2, store=True) == [[5, 6], [7, 8]]


def test_store_of_chunks_that_do_not_follow_each_other() -> None:
    """Chunks 1 and 4: vLLM gives the index of the first block only."""
    assert rows([5, 6, 7, 8], 2, [3, 1], 2, store=True) == [[5, 6], [7, 8]]


def test_store_with_a_leading_gap() -> None:
    table = rows([6, 7, 8], 5, [3, 1], 2, store=True)
    assert table == [[MISSING, 6], [7, 8]]


@pytest.mark.parametrize(
    ("block_ids", "first"),
    [
        ([6, 8], 3),  # [[-, 6], [-, 8]], but [[-, 6], [8, -]] would look the same
        ([5, 7, 8], 2),  # a gap in one of the pages, no telling in which
        ([8], 3),
    ],
)
def test_ambiguous_store_is_incomplete(block_ids: list[int], first: int) -> None:
    assert rows(block_ids, first, [3, 1], 2, store=True) == [[MISSING] * 2] * 2


def test_load_that_starts_and_ends_inside_a_page() -> None:
    assert rows([5, 6, 7, 8], 1, [9, 8, 7], 2, store=False) == [
        [MISSING, 5],
        [6, 7],
        [8, MISSING],
    ]
    assert rows([5], 4, [9], 3, store=False) == [[MISSING, 5, MISSING]]


def test_load_skips_null_blocks() -> None:
    assert rows([NULL_BLOCK, 6], 2, [9], 2, store=False) == [[MISSING, 6]]


@pytest.mark.parametrize(
    ("block_ids", "first", "pages"),
    [([5, 6, 7], 0, 1), ([5], 0, 2), ([5, 6], 1, 1), ([], 0, 1)],
)
def test_load_that_does_not_fit_its_pages(block_ids: list[int], first: int, pages: int) -> None:
    with pytest.raises(ValueError, match="do not end in the last of"):
        rows(block_ids, first, list(range(pages)), 2, store=False)


def test_incomplete_pages() -> None:
    blocks = GPULoadStoreSpec([6, 7, 8], [3], [5])
    (work,) = work_of(PageSlots(1, [3, 1], [0, 0]), blocks, [0], 2, store=True)
    assert incomplete(work) == [3]


def test_groups_without_pages_are_left_out() -> None:
    blocks = GPULoadStoreSpec([5, 6, 7], [2, 0, 1], [0, 0, 9])
    work = work_of(PageSlots(1, [4, 2, 8], [1, 1, 7]), blocks, [1, 3, 7], 1, store=True)
    assert [(w.group, w.slots.tolist(), w.block_ids.tolist()) for w in work] == [
        (1, [4, 2], [[5], [6]]),
        (7, [8], [[7]]),
    ]


def test_no_pages_at_all() -> None:
    assert work_of(PageSlots(1, [], []), GPULoadStoreSpec([], [0], [0]), [0], 2, store=False) == []


def test_page_slots_survive_the_way_to_the_workers() -> None:
    sent = pickle.loads(pickle.dumps(PageSlots(7, [2**40, 0], [0, 1])))
    assert (sent.ticket, sent.slots.tolist(), sent.groups.tolist()) == (7, [2**40, 0], [0, 1])
    assert "ticket=7" in repr(sent)


# -- against a model --------------------------------------------------------------


@dataclass
class Group:
    """A request's block table in one group, 0 for blocks it does not have, and its pages."""

    table: list[int]
    chunks: list[int]

    def truth(self, chunk: int, per_chunk: int) -> list[int]:
        row = self.table[chunk * per_chunk : (chunk + 1) * per_chunk]
        return [block or MISSING for block in row]


@st.composite
def stores(draw: st.DrawFn) -> tuple[int, list[Group]]:
    """As `_build_store_jobs` of vLLM's scheduler makes them: each chunk has its last block."""
    per_chunk = draw(st.integers(1, 4))
    groups = []
    for number in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 5))
        blocks = st.one_of(st.integers(1, 99), st.integers(1, 99), st.just(0))
        table = draw(st.lists(blocks, min_size=count * per_chunk, max_size=count * per_chunk))
        table = [block and block + 100 * number for block in table]
        chunks = [n for n in range(count) if table[(n + 1) * per_chunk - 1] and draw(st.booleans())]
        groups.append(Group(table, chunks))
    return per_chunk, groups


@given(stores())
def test_a_stored_page_is_right_or_incomplete(job: tuple[int, list[Group]]) -> None:
    per_chunk, groups = job
    ids: list[int] = []
    sizes: list[int] = []
    firsts: list[int] = []
    for group in groups:
        wanted = [
            (n * per_chunk + i, group.table[n * per_chunk + i])
            for n in group.chunks
            for i in range(per_chunk)
            if group.table[n * per_chunk + i]
        ]
        ids += [block for _, block in wanted]
        sizes.append(len(wanted))
        firsts.append(wanted[0][0] if wanted else 0)
    numbers = [2 * index for index in range(len(groups))]  # vLLM's indices may have gaps
    owners = [number for number, group in zip(numbers, groups, strict=True) for _ in group.chunks]
    pages = PageSlots(1, list(range(50, 50 + len(owners))), owners)
    work = {
        part.group: part
        for part in work_of(
            pages, GPULoadStoreSpec(ids, sizes, firsts), numbers, per_chunk, store=True
        )
    }
    slot = 50
    for number, group in zip(numbers, groups, strict=True):
        truth = [group.truth(chunk, per_chunk) for chunk in group.chunks]
        if not truth:
            assert number not in work
            continue
        found = work[number].block_ids.tolist()
        missing = incomplete(work[number])
        flat = [block for row in truth for block in row]
        lead = next(place for place, block in enumerate(flat) if block != MISSING)
        if MISSING not in flat[lead:]:
            assert found == truth, "nothing is ambiguous"
        for row, right in zip(found, truth, strict=True):
            assert (slot in missing) == (MISSING in row)
            assert row == right or slot in missing
            slot += 1


@given(st.integers(1, 4), st.integers(0, 12), st.integers(1, 12), st.data())
def test_a_load_reaches_every_block_once(
    per_chunk: int, first: int, count: int, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
    chunks = range(first // per_chunk, -(-(first + count) // per_chunk))
    table = rows(ids, first, list(chunks), per_chunk, store=False)
    for chunk, row in zip(chunks, table, strict=True):
        for place, block in enumerate(row):
            index = chunk * per_chunk + place - first
            expected = ids[index] if 0 <= index < count and ids[index] else MISSING
            assert block == expected
