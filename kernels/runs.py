"""CPU memory as numpy arrays of runs: items of so many bytes without a type, moved whole.

numpy moves such an item with one memmove, and keeps the GIL for less than 500 items: letting go
of it between the pieces of one page costs more than a short piece.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Runs = np.ndarray[Any, np.dtype[np.void]]


class _Interface:
    """Memory in numpy's array interface protocol."""

    def __init__(self, **interface: object) -> None:
        self.__array_interface__ = {"version": 3, **interface}


def runs_at(address: int, run_bytes: int, shape: Sequence[int], strides: Sequence[int]) -> Runs:
    """The runs at an address, as an array that does not keep the memory alive.

    strides: in bytes.
    """
    described = _Interface(
        data=(address, False),
        typestr=f"|V{run_bytes}",
        shape=tuple(shape),
        strides=tuple(strides),
    )
    return np.asarray(described)


def runs_from(*arrays: Runs) -> Runs:
    """A run at every byte from the first run of the arrays to the last; what lies between the runs
    of the arrays must not be touched.

    Writing what lies inside that range makes numpy copy it twice: right, but slower. Page regions
    are mapped after the KV caches and lie between two of them only by accident.
    """
    firsts = [array.ctypes.data for array in arrays]
    lasts = [
        first + sum((n - 1) * stride for n, stride in zip(a.shape, a.strides, strict=True))
        for first, a in zip(firsts, arrays, strict=True)
    ]
    return runs_at(min(firsts), arrays[0].itemsize, (max(lasts) - min(firsts) + 1,), (1,))


def places(shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """int64 of that shape: the distance in bytes of each element from the first."""
    total = np.zeros((), dtype=np.int64)
    for size, stride in zip(shape, strides, strict=True):
        total = total[..., None] + np.arange(size) * stride
    return total


class CacheRuns(NamedTuple):
    """The caches of a set of layers in CPU memory.

    layers: each layer's runs, [kernel blocks, H, N, P].
    memory: see `runs_from`, of all layers.
    starts: int64 [H, layers, 1, N, P], where in `memory` the runs of kernel block 0 are.
    """

    layers: tuple[Runs, ...]
    memory: Runs
    starts: np.ndarray


def cache_runs(layers: Sequence[Runs]) -> CacheRuns:
    """The same for layers of equal shape and strides."""
    addresses = np.array([layer.ctypes.data for layer in layers])
    inside = places(layers[0].shape[1:], layers[0].strides[1:])
    starts = (addresses - addresses.min())[:, None, None, None] + inside[:, None, None]
    return CacheRuns(tuple(layers), runs_from(*layers), starts)
