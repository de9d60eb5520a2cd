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

from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.residency import is_cached
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.page.form import ALIGNMENT

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
    fd = nofollow.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        block = aligned_buffer(ALIGNMENT)
        if os.pwrite(fd, block, 0) != ALIGNMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        try:
            os.close(nofollow.open(path, os.O_WRONLY | os.O_DIRECT))
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            return os.pwrite(fd, block, 0) == ALIGNMENT
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
    finally:
        os.close(fd)
        with suppress(OSError):
            nofollow.unlink(path)


class FileIO:
    """Opens, reads and writes whole files; `direct` says whether O_DIRECT is in use.

    With `cached_first`, a file that the page cache holds is read from there.
    """

    def __init__(self, direct: bool, cached_first: bool = False) -> None:
        self.direct = direct
        self._cached_first = direct and cached_first
        self._local = threading.local()

    def open(self, path: str, flags: int, **more: int) -> int:
        """`nofollow.open`, with O_DIRECT where that is to be used from the start.

        Raises:
            OSError: as `nofollow.open`.
        """
        if self.direct and not (self._cached_first and flags & os.O_ACCMODE == os.O_RDONLY):
            try:
                return nofollow.open(path, flags | os.O_DIRECT, **more)
            except OSError as error:
                # directories and special files know no O_DIRECT; fstat tells them apart later
                if error.errno != errno.EINVAL:
                    raise
        return nofollow.open(path, flags, **more)

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
        if not self._cached_first:
            self._move(os.preadv, fd, buffers, 0, _is_direct(fd))
            return
        position = self._read_cached(fd, buffers) if is_cached(fd, _size(buffers)) else 0
        if position < _size(buffers):
            self._move(os.preadv, fd, buffers, position, _enter_direct(fd))

    def write(self, fd: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, from the start of the file.

        Raises:
            OSError: the file system failed.
        """
        try:
            self._move(os.pwritev, fd, buffers, 0, _is_direct(fd))
        except EOFError:
            raise OSError(errno.EIO, "nothing was written") from None

    def read_start(self, fd: int, size: int) -> bytes:
        """The first `size` bytes, or what there is of them, through the page cache.

        Raises:
            OSError: the file system failed.
        """
        _leave_direct(fd)
        return os.pread(fd, size, 0)

    def _read_cached(self, fd: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers from the page cache; up to which multiple of 4096, or the end.

        That is not always the end, since pages may leave the cache meanwhile.
        """
        total, position = _size(buffers), 0
        try:
            position = os.preadv(fd, buffers, 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._cached_first = False  # not on this file system
        return position if position == total else position - position % ALIGNMENT

    def _move(
        self, call: _Call, fd: int, buffers: Sequence[memoryview], position: int, direct: bool
    ) -> None:
        total = _size(buffers)
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


def _size(buffers: Sequence[memoryview]) -> int:
    return sum(buffer.nbytes for buffer in buffers)


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _enter_direct(fd: int) -> bool:
    """Switch a descriptor of `FileIO.open` to O_DIRECT; False if its file does not know it."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
    except OSError:
        return False
    return True


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
