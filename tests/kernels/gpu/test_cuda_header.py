"""What `memcpy.py` knows of the driver's functions, against the real cuda.h of CUDA 12.8 and 13.0.

`make install` puts the headers where this looks for them; a C compiler says whether it agrees.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kvstrata.kernels.gpu import memcpy
from kvstrata.kernels.gpu.memcpy import Attributes

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
HEADERS = Path(__file__).parents[3] / ".venv" / "cuda-headers"
VERSIONS = {"12.8": 12080, "13.0": 13000}

# The library's symbol keeps CUDA 12.8's signature; 13.0 declares it for itself alone, and gives
# everybody else a function of another name and without `failIdx`.
SOURCE = """
#define __CUDA_API_VERSION_INTERNAL
#include <stddef.h>
#include <cuda.h>
#define IS(what) _Static_assert(what, #what)
#define TYPE(function, type) IS(_Generic(&function, type: 1, default: 0))

IS(CUDA_VERSION == VERSION);
IS(sizeof(CUmemcpyAttributes) == SIZE);
IS(offsetof(CUmemcpyAttributes, srcAccessOrder) == SOURCE_ORDER);
IS(offsetof(CUmemcpyAttributes, srcLocHint) == SOURCE_HINT);
IS(offsetof(CUmemcpyAttributes, dstLocHint) == DESTINATION_HINT);
IS(offsetof(CUmemcpyAttributes, flags) == FLAGS);
IS(sizeof(CUmemLocation) == LOCATION);
IS(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == STREAM_ORDER);
IS(CU_MEMCPY_SRC_ACCESS_ORDER_ANY == ANY_ORDER);
IS(CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE == OVERLAP);
IS(CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM == HOST_ADDRESSES);
IS(sizeof(CUdeviceptr) == 8 && sizeof(size_t) == 8 && sizeof(CUdevice) == 4);

typedef CUresult batch(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *,
                       size_t *, size_t, size_t *, CUstream);
typedef CUresult batch_const(const CUdeviceptr *, const CUdeviceptr *, const size_t *, size_t,
                       const CUmemcpyAttributes *, const size_t *, size_t, size_t *, CUstream);
#undef cuMemcpyBatchAsync
IS(_Generic(&cuMemcpyBatchAsync, batch *: 1, batch_const *: 1, default: 0));
TYPE(cuMemcpyAsync, CUresult (*)(CUdeviceptr, CUdeviceptr, size_t, CUstream));
TYPE(cuDeviceGet, CUresult (*)(CUdevice *, int));
TYPE(cuDeviceGetAttribute, CUresult (*)(int *, CUdevice_attribute, CUdevice));
"""


def header(version: str) -> Path:
    """The folder with that version's cuda.h."""
    found = list((HEADERS / version).rglob("cuda.h"))
    if COMPILER is None or not found:
        pytest.skip("needs a C compiler, and cuda.h (make install)")
    return found[0].parent


def compiled(version: str, changes: dict[str, int]) -> subprocess.CompletedProcess[str]:
    numbers = {
        "VERSION": VERSIONS[version],
        "SIZE": ctypes.sizeof(Attributes),
        "SOURCE_ORDER": Attributes.source_order.offset,
        "SOURCE_HINT": Attributes.source.offset,
        "DESTINATION_HINT": Attributes.destination.offset,
        "FLAGS": Attributes.flags.offset,
        "LOCATION": Attributes.source.size,
        "STREAM_ORDER": memcpy.STREAM_ORDER,
        "ANY_ORDER": memcpy.ANY_ORDER,
        "OVERLAP": memcpy.OVERLAP,
        "HOST_ADDRESSES": memcpy.HOST_ADDRESSES,
    } | changes
    defined = [f"-D{name}={value}" for name, value in numbers.items()]
    command = [COMPILER, "-std=c11", "-fsyntax-only", "-I", str(header(version)), *defined]
    return subprocess.run([*command, "-x", "c", "-"], input=SOURCE, capture_output=True, text=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_structures_numbers_and_signatures_are_the_header_s(version: str) -> None:
    run = compiled(version, {})
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("wrong", ["SIZE", "FLAGS", "ANY_ORDER", "HOST_ADDRESSES"])
def test_another_number_is_an_error(wrong: str) -> None:
    run = compiled("13.0", {wrong: 7777})
    assert run.returncode and run.stderr.count("static assertion failed") == 1, run.stderr
