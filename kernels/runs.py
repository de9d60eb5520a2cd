"""CPU memory as numpy arrays of runs: items of so many bytes without a type, moved whole.

numpy moves such an item with one memmove, and keeps the GIL for less than 500 items: letting go
of it between the pieces of one page costs more than a short piece.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Runs = np.ndarray[Any, np.dtype[np.void]]


class _Interface:
    def __init__(self, **interface: object) -> None:
        self.__array_interface__ = {"version": 3, **interface}


def runs_at(address: int, run_bytes: int, shape: Sequence[int], strides: Sequence[int]) -> Runs:
    """The runs at an address, as an array that does not keep the memory alive.

    strides: in bytes.
    """
    return np.asarray(
        _Interface(
            data=(address, False),
            typestr=f"|V{run_bytes}",
            shape=tuple(shape),
            strides=tuple(strides),
        )
    )


class CacheRuns(NamedTuple):
    """The caches of a set of layers.

    layers: each layer's runs, [kernel blocks, H, N, P].
    memory: a run at every byte from the lowest cache to the highest; what lies between the caches
        is not ours.
    starts: int64 [H, layers, 1, N, P], where in `memory` the runs of kernel block 0 are.
    """

    layers: tuple[Runs, ...]
    memory: Runs
    starts: np.ndarray


def cache_runs(
    addresses: Sequence[int], run_bytes: int, shape: Sequence[int], strides: Sequence[int]
) -> CacheRuns:
    """The runs of caches in CPU memory.

    shape, strides: kernel blocks, H, N, P; in bytes.
    """
    lowest = min(addresses)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    _, heads, rows, parts = (
        np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)
    )
    inside = heads[:, None, None, None, None] + rows[:, None] + parts
    layers = np.array(addresses)[:, None, None, None] - lowest
    return CacheRuns(
        tuple(runs_at(address, run_bytes, shape, strides) for address in addresses),
        runs_at(lowest, run_bytes, (max(addresses) - lowest + reach + 1,), (1,)),
        inside + layers,
    )
