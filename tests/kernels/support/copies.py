"""What the kernels' tests make of the product's parts: copies of one form, and split K/V caches."""

from math import gcd
from typing import Protocol

import torch

from kvstrata.kernels.geometry import TOKEN_MAJOR, LayerCache, _normal
from kvstrata.kernels.pack import Prepare, Prepared, check_arguments, prepare_triton
from kvstrata.kernels.plan import RowLayout, Segment


class Copy(Protocol):
    """What all copies are, for who calls any of them. Arguments: see `pack.py`."""

    def __call__(
        self,
        segment: Segment,
        layout: RowLayout,
        pages: torch.Tensor,
        rows: torch.Tensor,
        block_ids: torch.Tensor,
        *,
        unpack: bool,
    ) -> None: ...


def copy_triton(
    segment: Segment,
    layout: RowLayout,
    pages: torch.Tensor,
    rows: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    unpack: bool,
) -> None:
    """The copy as kernel launches on the current stream, one per set of layers."""
    check_arguments(segment, layout, pages, rows, block_ids)
    if rows.numel() == 0:
        return
    pitch, alignment = pages.stride(0), gcd(16, pages.data_ptr())
    prepare_triton(segment, layout, pitch, alignment, unpack=unpack)(pages, rows, block_ids)


def prepare_plainly(copy: Copy) -> Prepare:
    """Preparing for a copy where there is nothing to prepare."""

    def prepare(
        segment: Segment, layout: RowLayout, pitch: int, alignment: int, *, unpack: bool
    ) -> Prepared:
        def prepared(
            pages: torch.Tensor,
            rows: torch.Tensor,
            block_ids: torch.Tensor,
            stream: int | None = None,
        ) -> None:
            copy(segment, layout, pages, rows, block_ids, unpack=unpack)

        return prepared

    return prepare


def split_kv(name: str, key: torch.Tensor, value: torch.Tensor) -> LayerCache:
    """A token-major cache with K and V in separate places; a page holds K then V per token.

    key, value: `[B, H, N, D]`, last stride 1, views of one storage with equal strides, K first.
    """
    distance = value.storage_offset() - key.storage_offset()
    *outer, last = key.stride()
    shape = (*key.shape[:3], 2, key.shape[3])
    return _normal(name, TOKEN_MAJOR, key.as_strided(shape, (*outer, distance, last)))
