"""The driver's copy functions, which torch does not offer: many pieces with one call.

Addresses go to the driver as arrays, so that a call costs the same to Python for one piece and
for ten thousand. (cuda-bindings takes lists and converts each element.)
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

Copy = Callable[[np.ndarray, np.ndarray, np.ndarray, int], None]

_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, cuda.h
_OVERLAP = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
_HIP_DEFAULT = 4  # hipMemcpyDefault: the addresses tell the direction


class Driver(NamedTuple):
    """How this machine copies.

    name: of the function.
    copy: `copy(destinations, sources, sizes, stream)`: addresses and bytes as contiguous int64
        [n], and a stream's handle. Returns at once; raises RuntimeError when the driver refuses.
    """

    name: str
    copy: Copy


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h; the two locations (type, id) are hints that we do not give."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source", ctypes.c_int * 2),
        ("destination", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def drivers() -> Iterator[Driver]:
    """The ways of this machine's driver, the best first.

    CUDA 12.8 and later have `cuMemcpyBatchAsync`; else, and on ROCm, each piece is a call.
    Raises OSError when the driver's library is not there.
    """
    if torch.version.hip:
        hip = ctypes.CDLL("libamdhip64.so")
        yield Driver("hipMemcpyAsync", _one_by_one(hip.hipMemcpyAsync, [_HIP_DEFAULT]))
        return
    cuda = ctypes.CDLL("libcuda.so.1")
    batch = getattr(cuda, "cuMemcpyBatchAsync", None)
    if batch is not None:
        yield Driver("cuMemcpyBatchAsync", _batched(batch))
    yield Driver("cuMemcpyAsync", _one_by_one(cuda.cuMemcpyAsync, []))


def _batched(function: Callable[..., int]) -> Copy:
    """`function`: cuMemcpyBatchAsync of CUDA 12.8; it rejects the legacy default stream."""
    attributes = _Attributes(source_order=_STREAM_ORDER, flags=_OVERLAP)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t()
    constant = (ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1))

    def copy(to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        if len(sizes):
            arrays = [ctypes.c_void_p(array.ctypes.data) for array in (to, source, sizes)]
            count = ctypes.c_size_t(len(sizes))
            handle = ctypes.c_void_p(stream)
            _check(function(*arrays, count, *constant, ctypes.byref(failed), handle))

    return copy


def _one_by_one(function: Callable[..., int], kind: list[int]) -> Copy:
    def copy(to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        for piece in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            address, origin, nbytes = piece
            pointers = ctypes.c_void_p(address), ctypes.c_void_p(origin)
            _check(function(*pointers, ctypes.c_size_t(nbytes), *kind, ctypes.c_void_p(stream)))

    return copy


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"the driver refused a copy (error {error})")
