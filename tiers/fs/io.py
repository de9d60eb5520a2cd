"""Vectored file I/O straight from and to the page, without the page cache where that works.

O_DIRECT wants memory, offset and length at multiples of the device's block. Pages and
headers are aligned to 4096; a tail that is no multiple goes through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstrata.tiers.fs.codec import ALIGNMENT
from kvstrata.tiers.fs.temporary import temporary_name

logger = logging.getLogger("kvstrata.tiers.fs")

_Call = Callable[[int, Sequence[memoryview], int], int]


def aligned_buffer(size: int) -> memoryview:
    """Zeroed memory of `size` bytes at a page boundary."""
    return memoryview(mmap.mmap(-1, size))


def probe_direct(directory: str) -> bool:
    """Whether files in `directory` can be written with O_DIRECT; writes and removes one.

    Raises:
        OSError: the directory cannot be written at all.
    """
    path = os.path.join(directory, temporary_name())
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        block = aligned_buffer(ALIGNMENT)
        if os.pwrite(fd, block, 0) != ALIGNMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT))
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            return os.pwrite(fd, block, 0) == ALIGNMENT
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
    finally:
        os.close(fd)
        with suppress(OSError):
            os.unlink(path)


class FileIO:
    """Opens, reads and writes whole files; `direct` says whether O_DIRECT is in use."""

    def __init__(self, direct: bool) -> None:
        self.direct = direct
        self._local = threading.local()

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """`os.open` without following a link, blocking on a FIFO, or inheritance.

        Raises:
            OSError: as `os.open`.
        """
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if self.direct:
            try:
                return os.open(path, flags | os.O_DIRECT, mode)
            except OSError as error:
                # directories and special files know no O_DIRECT; fstat tells them apart later
                if error.errno != errno.EINVAL:
                    raise
        return os.open(path, flags, mode)

    def header_buffer(self, size: int) -> memoryview:
        """Aligned memory for a header, one per thread, overwritten by its next use."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.nbytes < size:
            buffer = self._local.buffer = aligned_buffer(size)
        return buffer[:size]

    def read(self, fd: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from the start of the file.

        Raises:
            EOFError: the file is shorter.
            OSError: the file system failed.
        """
        self._move(os.preadv, fd, buffers)

    def write(self, fd: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, from the start of the file.

        Raises:
            OSError: the file system failed.
        """
        try:
            self._move(os.pwritev, fd, buffers)
        except EOFError:
            raise OSError(errno.EIO, "nothing was written") from None

    def read_start(self, fd: int, size: int) -> bytes:
        """The first `size` bytes, or what there is of them, through the page cache.

        Raises:
            OSError: the file system failed.
        """
        _leave_direct(fd)
        return os.pread(fd, size, 0)

    def _move(self, call: _Call, fd: int, buffers: Sequence[memoryview]) -> None:
        total = sum(buffer.nbytes for buffer in buffers)
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        position = 0
        while position < total:
            if direct and (position % ALIGNMENT or total - position < ALIGNMENT):
                direct = _leave_direct(fd)
            end = total - (total - position) % ALIGNMENT if direct else total
            pieces = _between(buffers, position, end)
            try:
                moved = call(fd, pieces, position)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = _leave_direct(fd)
                if self.direct:
                    self.direct = False
                    logger.warning("O_DIRECT was refused (%s); using buffered I/O", error)
                continue
            finally:
                for piece in pieces:
                    piece.release()
            if moved == 0:
                raise EOFError
            position += moved


def _leave_direct(fd: int) -> bool:
    """Switch the descriptor to buffered I/O; returns the new state of O_DIRECT."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return False


def _between(buffers: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """Slices of the buffers, seen as one, from byte `start` to byte `end`."""
    pieces, base = [], 0
    for buffer in buffers:
        low, high = max(start - base, 0), min(end - base, buffer.nbytes)
        if low < high:
            pieces.append(buffer[low:high])
        base += buffer.nbytes
    return pieces
