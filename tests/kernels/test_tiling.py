"""Tiles that cut each axis of a block, with and without a rest: tiles of 16 words of 4 bytes."""

from dataclasses import replace

import pytest
import torch
from copies import copy_triton
from kernel_worlds import DEVICE, Model, Rank, some_blocks

from kvstrata.kernels import pack

MODEL = Model(layers=1, heads=4, size=4)
# what is cut -> model, layout, words that are cut, words of a tile
CASES = {
    "nothing": (replace(MODEL, heads=3, tokens=1, dim=2), "LBHNC", 12, 12),
    "a run": (replace(MODEL, tokens=4, dim=4), "LBHNC", 32, 16),
    "a run, with a rest": (replace(MODEL, tokens=5, dim=4), "LBHNC", 40, 16),
    "K and V": (replace(MODEL, dim=12), "split-inner", 24, 12),
    "tokens": (replace(MODEL, tokens=4, dim=4), "LBNHC", 32, 16),
    "tokens, with a rest": (replace(MODEL, tokens=5, dim=3), "LBNHC", 30, 12),
    "tokens of K and V": (replace(MODEL, tokens=5, dim=3), "split-outer", 30, 12),
    "heads": (replace(MODEL, tokens=1, dim=4), "LHBNC", 32, 16),
    "heads, with a rest": (replace(MODEL, heads=3, tokens=3, dim=1), "LHBNC", 18, 12),
    "heads of strided tokens": (replace(MODEL, heads=5, tokens=3, dim=1), "BLNHC", 30, 12),
}


@pytest.mark.parametrize("what", CASES)
def test_every_word_is_copied_once_to_its_place(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, extent, step = CASES[what]
    monkeypatch.setattr(pack, "TILE_BYTES", 64)
    monkeypatch.setattr(pack, "MIN_TILE_WORDS", 1)
    ids = some_blocks(model)
    ids[1, 0] = -1
    rank = Rank(model, layout, device=DEVICE).write(ids)
    (segment,) = rank.segments
    (layers,) = segment.sets
    constants = pack.kernel_constants(segment, layers, segment.in_page, 4, unpack=False)
    assert (constants["EXTENT"], constants["STEP"]) == (extent, step)

    rows = torch.arange(model.chunks, device=DEVICE)
    # one word more than a page: alignment 4, and room for a stray write
    pages = torch.full((model.chunks, model.page_bytes + 4), 0xA5, dtype=torch.uint8, device=DEVICE)
    copy_triton(segment, segment.in_page, pages, rows, ids, unpack=False)
    assert torch.equal(pages[:, :-4], model.naive_pages(ids))
    assert (pages[:, -4:] == 0xA5).all()

    other = Rank(model, layout, device=DEVICE)
    copy_triton(other.segments[0], segment.in_page, pages, rows, ids, unpack=True)
    assert torch.equal(other.buffer, rank.buffer)
