"""The driver's copy functions, which torch does not offer: many pieces with one call.

Addresses go to the driver as arrays, so that a call costs the same to Python for one piece and
for ten thousand. (cuda-bindings takes lists and converts each element.)
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

# Numbers of cuda.h; tests/kernels/gpu/test_cuda_header.py compares them with it.
STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
ANY_ORDER = 3  # CU_MEMCPY_SRC_ACCESS_ORDER_ANY
OVERLAP = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
HOST_ADDRESSES = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_HIP_DEFAULT = 4  # hipMemcpyDefault: the addresses tell the direction


class Memcpy(Protocol):
    """Queues copies of pieces.

    to, source: addresses, int64 [n], contiguous and writable. sizes: bytes, likewise. stream: a
        handle.
    to_host: the sources are device memory, which is read in the stream's order. Sources in host
        memory may be read at any time until the copy is done.
    Returns at once; raises RuntimeError when the driver refuses.
    """

    def __call__(
        self, to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int, *, to_host: bool
    ) -> None: ...


class Driver(NamedTuple):
    """How this machine copies. name: of the function."""

    name: str
    copy: Memcpy


class Attributes(ctypes.Structure):
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


def host_addresses_work(device: int) -> bool:
    """Whether kernels on the device with this index reach registered memory by the host's own
    addresses; on ROCm they do.

    Raises OSError when the driver's library is not there.
    """
    if torch.version.hip:
        return True
    cuda = ctypes.CDLL("libcuda.so.1")
    handle, works = ctypes.c_int(), ctypes.c_int()
    error = cuda.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(device))
    attribute = ctypes.c_int(HOST_ADDRESSES)
    return not (
        error or cuda.cuDeviceGetAttribute(ctypes.byref(works), attribute, handle)
    ) and bool(works.value)


def _batched(function: Callable[..., int]) -> Memcpy:
    """`function`: cuMemcpyBatchAsync of CUDA 12.8; it rejects the legacy default stream."""
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    # so that a call takes plain numbers
    function.argtypes = [  # type: ignore[attr-defined]
        *(pointer, pointer, pointer, size),
        *(pointer, pointer, size, pointer),
        pointer,
    ]
    first, failed = size(0), size()
    constants = {}
    for to_host, order in ((True, STREAM_ORDER), (False, ANY_ORDER)):
        attributes = Attributes(source_order=order, flags=OVERLAP)
        constants[to_host] = (
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            ctypes.byref(failed),
        )

    def copy(
        to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int, *, to_host: bool
    ) -> None:
        if len(sizes):
            arrays = _address(to), _address(source), _address(sizes)
            _check(function(*arrays, len(sizes), *constants[to_host], stream))

    return copy


def _one_by_one(function: Callable[..., int], kind: list[int]) -> Memcpy:
    def copy(
        to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int, *, to_host: bool
    ) -> None:
        for piece in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            address, origin, nbytes = piece
            pointers = ctypes.c_void_p(address), ctypes.c_void_p(origin)
            _check(function(*pointers, ctypes.c_size_t(nbytes), *kind, ctypes.c_void_p(stream)))

    return copy


def _address(array: np.ndarray) -> int:
    """In a third of the time that `array.ctypes.data` takes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"the driver refused a copy (error {error})")
