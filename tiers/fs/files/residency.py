"""Whether the page cache holds a file: asked of the kernel without reading, and without waiting.

A read that is allowed to find nothing (RWF_NOWAIT) starts to read what is missing. To take that
back, with POSIX_FADV_DONTNEED, makes the kernel empty the lists of pages of every CPU by a worker
that is bound to each (`lru_add_drain_all`, mm/fadvise.c and mm/swap.c of Linux), and a process that
spins on its CPU, as vLLM's do, keeps such a worker out for seconds. mincore(2) only looks.
"""

from __future__ import annotations

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_MAP_FAILED = ctypes.c_void_p(-1).value
_RESIDENT = bytes(byte & 1 for byte in range(256))  # only the lowest bit is defined


def is_cached(fd: int, size: int) -> bool:
    """Whether the first `size` bytes of an open file are all in the page cache.

    False where that cannot be told: since Linux 5.2 only to those who may write the file.
    """
    if not os.access(f"/proc/self/fd/{fd}", os.W_OK):
        return False
    start = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if start == _MAP_FAILED:
        return False
    try:
        pages = -(-size // mmap.PAGESIZE)
        found = ctypes.create_string_buffer(pages)
        if _libc.mincore(start, size, found):
            return False
        return found.raw.translate(_RESIDENT).count(1) == pages
    finally:
        _libc.munmap(start, size)
