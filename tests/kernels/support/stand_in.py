"""A pytest plugin: a GPU that is not there, for the tests that need one.

`make test-gpu STAND_IN=1`. Device tensors are CPU tensors that refuse to meet others where CUDA
does; streams are done at once, but for those that sleep; Triton compiles for real, and a launch
does in numpy what the kernel does, with the arguments that a GPU would get; the driver's functions
are C functions. What is not seen: races, speed, and what the machine code does.
"""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kvstrata.kernels import pack
from kvstrata.kernels import plan as plan_module
from kvstrata.kernels.bench.absent_gpu import AbsentGpu
from kvstrata.kernels.gpu import memcpy
from kvstrata.kernels.runs import runs_at

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


# -- tensors ------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """CPU memory that plays device memory."""

    device, is_cuda = CUDA, True


class Tensors(TorchFunctionMode):
    """Every function of torch, with regard to where its tensors are."""

    allocations = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        refuse_mixed(name, args, kwargs)
        there = any(isinstance(one, OnDevice) for one in tensors([args, kwargs]))
        wanted = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("to", "cpu"):
                result, wanted = moved(name, wanted, *args, **kwargs)
            else:
                result = function(*args, **kwargs)
            if wanted is not None:
                there = torch.device(wanted).type == "cuda"
                self.allocations += there
            return placed(result, there)


def tensors(values: Any) -> list[torch.Tensor]:
    """All that are in a nest of arguments."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [t for v in values for t in tensors(v)] if isinstance(values, list | tuple) else []


def refuse_mixed(name: str, args: Any, kwargs: Any) -> None:
    """Raise where CUDA would."""
    every = tensors([args, kwargs])
    if name == "numpy" and isinstance(args[0], OnDevice):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if name in ("copy_", "to", "cpu"):
        return
    if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnDevice):
        indices = tensors(args[1])  # may lie on the CPU
        if name == "__setitem__" and not indices:
            return  # a copy
        every = [one for one in every if all(one is not index for index in indices)]
    kinds = {isinstance(one, OnDevice) for one in every if isinstance(one, OnDevice) or one.ndim}
    if len(kinds) > 1:
        raise RuntimeError(f"{name}: expected all tensors on the same device: cuda:0 and cpu")


def moved(
    name: str, device: Any, source: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """What `to` and `cpu` return, and the device that they name."""
    if name == "cpu":
        device = CPU
    for arg in args:
        if isinstance(arg, torch.device | str):
            device = arg
    others = [arg for arg in args if not isinstance(arg, torch.device | str)]
    kwargs.pop("non_blocking", None)
    away = device is not None and (torch.device(device).type == "cuda") != isinstance(
        source, OnDevice
    )
    result = source.to(*others, **kwargs) if others or kwargs.keys() - {"copy"} else source
    if result is source and (away or kwargs.get("copy")):
        result = source.clone()
    return result, device if away else None


class Generator(torch.Generator):
    """Of random numbers, on any device."""

    def __new__(cls, device: object = CPU) -> torch.Generator:  # type: ignore[misc]
        return cls.__base__.__new__(cls.__base__)


def placed(result: Any, there: bool) -> Any:
    """The same, on the device or off it."""
    if isinstance(result, list | tuple) and tensors(result):
        return type(result)(placed(one, there) for one in result)
    if not isinstance(result, torch.Tensor) or there == isinstance(result, OnDevice):
        return result
    return result.as_subclass(OnDevice if there else torch.Tensor)


# -- streams and events -------------------------------------------------------------


class Sleep:
    """Some time on a stream, which ends when the host waits for it."""

    over = False


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.after: set[Sleep] = set()

    def record(self, stream: "Stream | None" = None) -> None:
        self.after = set((stream or Stream.current).after)

    def query(self) -> bool:
        return all(sleep.over for sleep in self.after)

    def synchronize(self) -> None:
        for sleep in self.after:
            sleep.over = True

    def elapsed_time(self, end: "Event") -> float:
        assert self.timed and end.timed and self.query() and end.query()
        return 1.0


class Stream(Event):
    """As an event that is always recorded anew."""

    current: "Stream"
    handles = iter(range(100, 10**9))

    def __init__(self, device: object = None, priority: int = 0) -> None:
        super().__init__()
        self.cuda_stream = next(self.handles)

    def wait_event(self, event: Event) -> None:
        self.after |= event.after

    def wait_stream(self, other: "Stream") -> None:
        self.after |= other.after


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    yield
    Stream.current = before


class Inline:
    """A pool without threads, where the mode for tensors would not apply."""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, action: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(action())
        return future


# -- the driver and the kernel ------------------------------------------------------

PINNED: dict[int, int] = {}  # address: bytes


def host_register(address: int, nbytes: int, flags: int) -> int:
    assert flags == 3 and address % 4096 == 0, "portable and mapped, whole memory pages"
    if any(address < start + PINNED[start] and start < address + nbytes for start in PINNED):
        return 712  # already registered
    PINNED[address] = nbytes
    return 0


def host_unregister(address: int) -> int:
    del PINNED[address]
    return 0


def batch(
    to: int,
    source: int,
    sizes: int,
    n: int,
    attributes: int,
    _: int,
    k: int,
    fail: int,
    stream: int,
) -> int:
    given = memcpy.Attributes.from_address(attributes)
    assert k == 1 and stream and given.flags == memcpy.OVERLAP
    columns = [(ctypes.c_uint64 * n).from_address(array) for array in (to, source, sizes)]
    for piece in zip(*columns, strict=True):
        ctypes.memmove(*piece)
    return 0


def single(to: int, source: int, nbytes: int, stream: int) -> int:
    ctypes.memmove(to, source, nbytes)
    return 0


def device_get(device: Any, ordinal: int) -> int:
    device[0] = ordinal
    return 0


def attribute(value: Any, which: int, device: int) -> int:
    value[0] = which == memcpy.HOST_ADDRESSES
    return 0


size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
numbers = ctypes.POINTER(number)
FUNCTIONS = {
    "cuMemcpyBatchAsync": ctypes.CFUNCTYPE(
        number, *[pointer] * 3, size, pointer, pointer, size, pointer, pointer
    )(batch),
    "cuMemcpyAsync": ctypes.CFUNCTYPE(number, pointer, pointer, size, pointer)(single),
    "cuDeviceGet": ctypes.CFUNCTYPE(number, numbers, number)(device_get),
    "cuDeviceGetAttribute": ctypes.CFUNCTYPE(number, numbers, number, number)(attribute),
}


class Gpu(AbsentGpu):
    """Does in numpy what the copy kernel does."""

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        super().launcher_cls(src, metadata)
        names = src.fn.arg_names

        def launch(*arguments: Any) -> None:
            *_, stream = arguments[:4]
            assert stream
            copy_kernel(**dict(zip(names, arguments[9:], strict=True)))

        return launch

    def get_current_stream(self, device: int) -> int:
        return Stream.current.cuda_stream


def copy_kernel(
    table: Any, pages: Any, rows: Any, ids: Any, jobs: int, pitch: int, **constants: int
) -> None:
    """See `pack._copy_kernel`; block by block."""
    assert all(isinstance(one, OnDevice) for one in (table, rows, ids))
    start = pages.data_ptr()
    if not isinstance(pages, OnDevice) and not any(0 <= start - at < PINNED[at] for at in PINNED):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    c = SimpleNamespace(**constants)
    word, slab = c.WORD_BYTES, c.ROWS * c.PLANES * c.PLANE
    shape, run = (c.HEADS, c.ROWS, c.PLANES), c.PLANE * word
    in_cache = [stride * word for stride in (c.HEAD_STRIDE, c.ROW_STRIDE, c.PLANE_STRIDE)]
    in_page = [stride * word for stride in (c.HEAD_PITCH, c.PLANES * c.PLANE, c.PLANE)]
    inner = c.BLOCKS * c.KERNEL_BLOCKS
    tiles = c.HEADS * slab // c.EXTENT * -(-c.EXTENT // c.STEP)
    count = jobs // (tiles * c.LAYERS * inner)
    blocks = ids.flatten().tolist()
    for page, row in enumerate(rows.flatten().tolist()[:count]):
        for address, in_head in table.tolist():
            for i in range(inner):
                block = blocks[page * c.BLOCKS + i // c.KERNEL_BLOCKS]
                at = start + (row * pitch + c.OFFSET + i * slab) * word + in_head
                there = runs_at(at, run, shape, in_page)
                if block >= 0:
                    kernel_block = block * c.KERNEL_BLOCKS + i % c.KERNEL_BLOCKS
                    at = address + kernel_block * c.BLOCK_STRIDE * word
                    here = runs_at(at, run, shape, in_cache)
                    if c.UNPACK:
                        here[...] = there
                    else:
                        there[...] = here
                elif not c.UNPACK:
                    there[...] = np.zeros((), there.dtype)


# -- installed at import, before any test module asks whether there is a GPU ---------


def install() -> None:
    mode = Tensors()
    allocated = ("allocation.all.allocated", "segment.all.allocated")
    Stream.current = Stream()
    replaced = {
        "is_available": lambda: True,
        "current_stream": lambda device=None: Stream.current,
        "device": lambda device: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "synchronize": lambda device=None: None,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=host_register, cudaHostUnregister=host_unregister
        ),
        "_sleep": lambda cycles: Stream.current.after.add(Sleep()),
        "memory_stats": lambda device=None: dict.fromkeys(allocated, mode.allocations),
        "mem_get_info": lambda device=None: (0, 0),  # too little for the largest tests
        "empty_cache": lambda: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    library = ctypes.CDLL
    ctypes.CDLL = lambda name, *rest, **kw: (  # type: ignore[assignment,misc]
        SimpleNamespace(**FUNCTIONS) if name == "libcuda.so.1" else library(name, *rest, **kw)
    )
    plan_module.ThreadPoolExecutor = Inline  # type: ignore[assignment,misc]
    Gpu().install()
    assert pack.triton is not None
    mode.__enter__()


install()
