"""The driver's copy functions, called as C: what they are given, and what an error becomes.

The fakes have the signatures of CUDA 12.8's cuda.h and copy at once.
"""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from kvstrata.kernels.gpu.memcpy import Memcpy, _batched, _one_by_one

STREAM = 0x7F00_1234_5678  # a handle is a pointer: 64 bits
size_t, pointer = ctypes.c_size_t, ctypes.c_void_p


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", Location),
        ("dstLocHint", Location),
        ("flags", ctypes.c_uint),
    )


# dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, failIdx, hStream
BATCH = ctypes.CFUNCTYPE(
    ctypes.c_int, pointer, pointer, pointer, size_t, pointer, pointer, size_t, pointer, pointer
)
SINGLE = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, size_t, pointer)  # cuMemcpyAsync
HIP = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, size_t, ctypes.c_int, pointer)


def as_loaded(callback: object) -> Callable[..., int]:
    """The function as ctypes finds it in a library: argument types are not declared."""
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.cast(callback, pointer).value)


class Memory:
    """Pieces of different sizes in no order, the second half to be copied to from the first."""

    def __init__(self) -> None:
        self.bytes = np.random.default_rng(0).integers(1, 256, 2000, dtype=np.uint8)
        self.bytes[1000:] = 0
        starts = np.array([700, 0, 300, 50])
        self.sizes = np.array([300, 50, 1, 250])
        self.sources = self.bytes.ctypes.data + starts
        self.targets = self.sources + 1000
        self.wanted = self.bytes.copy()
        for start, size in zip(starts, self.sizes, strict=True):
            self.wanted[1000 + start : 1000 + start + size] = self.bytes[start : start + size]

    def move(self, copy: Memcpy, *, to_host: bool = True) -> None:
        copy(self.targets, self.sources, self.sizes, STREAM, to_host=to_host)


def test_one_call_copies_a_batch() -> None:
    calls = []

    def batch(to, source, sizes, count, attributes, indices, kinds, failed, stream) -> int:
        given = Attributes.from_address(attributes)
        calls.append(
            {
                "count": count,
                "order": given.srcAccessOrder,
                "hints": (given.srcLocHint.type, given.dstLocHint.type),
                "flags": given.flags,
                "attributes from": list((size_t * kinds).from_address(indices)),
                "stream": stream,
            }
        )
        size_t.from_address(failed).value = 2**64 - 1  # writable
        addresses = [(ctypes.c_uint64 * count).from_address(array) for array in (to, source)]
        for piece in zip(*addresses, (size_t * count).from_address(sizes), strict=True):
            ctypes.memmove(*piece)
        return 0

    callback = BATCH(batch)
    copy = _batched(as_loaded(callback))
    for to_host in (True, False):
        memory = Memory()
        memory.move(copy, to_host=to_host)
        assert (memory.bytes == memory.wanted).all()
    none = np.empty(0, dtype=np.int64)
    copy(none, none, none, STREAM, to_host=True)
    assert calls == [
        {
            "count": 4,
            "order": order,
            "hints": (0, 0),
            "flags": 1,  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
            "attributes from": [0],
            "stream": STREAM,
        }
        for order in (1, 3)  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, of device memory; _ANY
    ], "an empty batch is no call"


def test_without_batches_each_piece_is_a_call() -> None:
    streams = []

    def single(to, source, nbytes, stream) -> int:
        streams.append(stream)
        ctypes.memmove(to, source, nbytes)
        return 0

    def hip(to, source, nbytes, kind, stream) -> int:
        assert kind == 4  # hipMemcpyDefault
        return single(to, source, nbytes, stream)

    for callback, kind in ((SINGLE(single), []), (HIP(hip), [4])):
        memory = Memory()
        memory.move(_one_by_one(as_loaded(callback), kind))
        assert (memory.bytes == memory.wanted).all()
    assert streams == 8 * [STREAM]


def test_a_refused_copy_is_an_error() -> None:
    callbacks = BATCH(lambda *_: 1), SINGLE(lambda *_: 700)
    batch, single = map(as_loaded, callbacks)
    for copy, error in ((_batched(batch), 1), (_one_by_one(single, []), 700)):
        with pytest.raises(RuntimeError, match=f"error {error}"):
            Memory().move(copy)
