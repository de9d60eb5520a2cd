"""The shared page region: one file in /dev/shm, mapped by the scheduler and all workers.

Layout: an 8-byte magic, the length of a JSON text (8 bytes, little-endian) and the text;
then a cache line per worker: its watermark (int64: all GPU transfers up to that ticket have
ended) and how far it is with the slots' memory (see progress.py); then one byte per slot, 1 if
the workers could not fill it completely; then, from a multiple of 4096, the slots.

The file has its full length from the start, but the slots have no memory until `reserve` gives
it to them: the workers do, while the engine serves from those that have it (see reserver.py).

Rank 0 creates the file, the other ranks and the scheduler open it, and the scheduler
unlinks it, so that no kill leaves memory behind. A file whose exclusive lock can be had
belongs to nobody: it was left by an engine killed before that, and is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.offload.primary.progress import Progress
from kvstrata.tiers.base import PageRegion
from kvstrata.tiers.machine.disk import disk_at
from kvstrata.tiers.machine.memory import SHM, available_memory
from kvstrata.tiers.options import format_bytes

ALIGNMENT = 4096  # of slots and of the first slot; the unit of O_DIRECT
# Bound of the header's JSON text: names and shapes of a hundred layers take about 20 KiB.
HEADER_TEXT_BYTES = 1 << 20
_MAGIC = b"kvstrat1"
_PREFIX = struct.Struct("<8sQ")
_CACHE_LINE = 64
_MADV_POPULATE_WRITE = 23  # since Linux 5.14, on every architecture; madvise(2)

# Not mmap.madvise: that holds the interpreter's lock until all is done.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class RegionError(RuntimeError):
    """The region cannot be had; the message says why and what to do."""


def round_up(value: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


_MARKS_AT = round_up(_PREFIX.size + HEADER_TEXT_BYTES, ALIGNMENT)


def count_slots(total_bytes: int, slot_bytes: int, workers: int) -> int:
    """How many slots of `slot_bytes` fit, with the header, into `total_bytes`."""
    fixed = _MARKS_AT + workers * _CACHE_LINE
    slots = max(0, (total_bytes - fixed) // (slot_bytes + 1))  # a slot has a byte in the header
    if slots and _header_bytes(workers, slots) + slots * slot_bytes > total_bytes:
        slots -= 1  # rounding up the header costs less than a slot
    return slots


def _header_bytes(workers: int, slots: int) -> int:
    return round_up(_MARKS_AT + workers * _CACHE_LINE + slots, ALIGNMENT)


class Region:
    """The mapped region. Made by `create_region` or `open_region`.

    Attributes:
        fields: what rank 0 wrote into the header.
        slots: number of slots.
        slot_bytes: size of a slot in bytes, a multiple of 4096.
        pages: uint8 array [slots, slot_bytes], the pages themselves.
        progress: which slots have memory, and may be used.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._map = mmap.mmap(fd, 0)
        magic, length = _PREFIX.unpack_from(self._map)
        if magic != _MAGIC:
            raise RegionError("it is not of this version of kvstrata")
        self.fields: Mapping[str, Any] = json.loads(self._map[_PREFIX.size : _PREFIX.size + length])
        self.slots = int(self.fields["slots"])
        self.slot_bytes = int(self.fields["slot_bytes"])
        workers = int(self.fields["workers"])
        whole = np.frombuffer(self._map, np.uint8)
        start = _MARKS_AT + workers * _CACHE_LINE
        marks = whole[_MARKS_AT:start].view(np.int64).reshape(workers, _CACHE_LINE // 8)
        self._marks = marks[:, 0]
        self.progress = Progress(marks[:, 1:], self.slots, self.slot_bytes)
        self._incomplete = memoryview(self._map)[start : start + self.slots]
        start = self._first_slot = _header_bytes(workers, self.slots)
        self._bytes = memoryview(self._map)[start : start + self.slots * self.slot_bytes]
        self.pages = whole[start : start + self.slots * self.slot_bytes].reshape(
            self.slots, self.slot_bytes
        )

    def reserve(self, slots: range) -> None:
        """Give slots that nobody uses yet memory, on the NUMA node where this thread's memory is.

        Other threads go on meanwhile.

        Raises:
            RegionError: there is too little.
        """
        nbytes = len(slots) * self.slot_bytes
        directory = self.path.parent
        # The kernel would rather kill a process than refuse memory.
        _check_memory(nbytes, directory, "another ")
        pages = self.pages[slots.start : slots.stop].reshape(-1)
        outside = pages.ctypes.data % mmap.PAGESIZE
        if not _madvise(pages.ctypes.data - outside, nbytes + outside, _MADV_POPULATE_WRITE):
            return
        error = ctypes.get_errno()
        if error == errno.EINVAL:  # an older kernel
            error = self._reserve_and_touch(pages, self._first_slot + slots.start * self.slot_bytes)
        if error:
            raise RegionError(_too_small(directory, nbytes, None, "another "))

    def _reserve_and_touch(self, pages: np.ndarray, offset: int) -> int:
        """Without MADV_POPULATE_WRITE; 0 or the number of the error, where touching would kill."""
        try:
            os.posix_fallocate(self._fd, offset, pages.nbytes)
        except OSError as error:
            return error.errno or errno.EIO
        pages[:: mmap.PAGESIZE] = 0
        return 0

    def page_region(self) -> PageRegion:
        """Where the slots lie in the file, for other processes; valid until `close`."""
        return PageRegion(self._fd, self._first_slot, self.slot_bytes, self.slots)

    def view(self, slot: int, nbytes: int) -> memoryview:
        """The first `nbytes` of a slot, writable and without a copy."""
        start = slot * self.slot_bytes
        return self._bytes[start : start + nbytes]

    def set_incomplete(self, slot: int, incomplete: bool) -> None:
        """Say whether the workers could not fill the slot.

        The scheduler says False before a transfer; a rank that knows better says True before it
        reports the transfer's end. Ranks are not in step, so none takes back another's word.
        """
        self._incomplete[slot] = incomplete

    def is_complete(self, slot: int) -> bool:
        """Whether the last transfer into the slot filled it."""
        return not self._incomplete[slot]

    def set_watermark(self, rank: int, ticket: int) -> None:
        """All transfers up to `ticket` have ended on worker `rank`."""
        self._marks[rank] = ticket

    def watermark(self) -> int:
        """The ticket up to which all workers have ended their transfers."""
        return int(self._marks.min())

    def unlink(self) -> None:
        """Remove the name; the memory lives until the last process lets go of it."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        """Close the file; memory and lock stay until nothing points into the mapping."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def region_path(engine_id: str, directory: Path = SHM) -> Path:
    """The region's name for an engine of this user."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", engine_id)
    return directory / f"kvstrata_{os.getuid()}_{safe}"


def create_region(engine_id: str, fields: Mapping[str, Any], *, directory: Path = SHM) -> Region:
    """Create the engine's region (rank 0). Its slots have no memory yet.

    Args:
        engine_id: vLLM's engine id, distinct per engine on this host.
        fields: JSON-serialisable; must have `slots`, `slot_bytes` (bytes) and `workers`.
        directory: where regions live.

    Raises:
        RegionError: the engine id is in use, or memory is too small, and by how much.
    """
    path = region_path(engine_id, directory)
    text = json.dumps(fields).encode()
    if len(text) > HEADER_TEXT_BYTES:
        raise RegionError(
            f"the region's header takes {len(text)} bytes, {HEADER_TEXT_BYTES} were kept"
        )
    workers, slots = int(fields["workers"]), int(fields["slots"])
    size = _header_bytes(workers, slots) + slots * int(fields["slot_bytes"])
    _remove_abandoned(directory)
    _check_memory(size, directory)
    fd = _create_locked(engine_id, path)
    try:
        # Memory that is touched before it is reserved kills the engine with SIGBUS in a shortage.
        os.posix_fallocate(fd, 0, _header_bytes(workers, slots))
        os.ftruncate(fd, size)
        os.pwrite(fd, _PREFIX.pack(_MAGIC, len(text)) + text, 0)
        return Region(path, fd)
    except OSError as error:
        path.unlink()
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise RegionError(_too_small(directory, size, None)) from None
        raise RegionError(f"cannot create {path}: {error}") from error


def open_region(engine_id: str, directory: Path = SHM) -> Region:
    """Open the region that rank 0 created.

    Raises:
        RegionError: there is none, or it is not one.
    """
    path = region_path(engine_id, directory)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise RegionError(
            f"cannot open the page region {path} that worker 0 creates: {error}; "
            "scheduler and workers must run on one host and share /dev/shm"
        ) from error
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        return Region(path, fd)
    except (RegionError, ValueError, KeyError, struct.error) as error:  # foreign or cut short
        os.close(fd)
        raise RegionError(f"cannot use the page region {path}: {error}") from error


def _create_locked(engine_id: str, path: Path) -> int:
    """A new file under a shared lock; RegionError if the path is taken or cannot be made."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            if _gone(path):
                continue
            raise RegionError(
                f"engine_id {engine_id!r} is in use: a living process holds {path}; "
                "give this engine another engine_id in --kv-transfer-config"
            ) from None
        except OSError as error:
            raise RegionError(f"cannot create {path}: {error}") from error
        fcntl.flock(fd, fcntl.LOCK_SH)
        if _leads_to(path, fd):
            return fd
        # Another engine that starts now found it before it was locked, and removed it.
        os.close(fd)


def _gone(path: Path) -> bool:
    """Whether the file is gone, once another engine that may be removing it is done."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # owners share it; a remover lets go at once
        return not _leads_to(path, fd)
    finally:
        os.close(fd)


def _leads_to(path: Path, fd: int) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _remove_abandoned(directory: Path) -> None:
    """Remove regions of this user that no living process holds."""
    for path in directory.glob(f"kvstrata_{os.getuid()}_*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The name may lead to a new file by now. While we hold the lock on the file
            # that it leads to, nobody else removes it.
            if _leads_to(path, fd):
                path.unlink()
        except OSError:
            pass  # held by a living engine
        finally:
            os.close(fd)


def _check_memory(size: int, directory: Path, more: str = "") -> None:
    space = disk_at(directory).free
    if size > space:
        raise RegionError(_too_small(directory, size, space, more))
    memory = available_memory()
    if size > memory:
        raise RegionError(_too_small("RAM", size, memory, more))


def _too_small(what: object, size: int, space: int | None, more: str = "") -> str:
    have = "too little is" if space is None else f"{format_bytes(space)} are"
    missing = "" if space is None else f", {format_bytes(size - space)} are missing"
    return (
        f"the CPU tier needs {more}{format_bytes(size)} of {what} but {have} free{missing}: "
        "lower cpu_bytes_to_use or make it larger (containers: --shm-size)"
    )
