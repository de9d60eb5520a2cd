"""The ledger: one small file below the root that all its members change under a lock.

It says how much is used, how much each member has reserved, which limits each has, and who
the keeper is, that is, who keeps the books and evicts for all. Whoever reads or changes it
holds `flock` on it for some microseconds, so a reservation is exact between processes and,
where the NFS server supports locks, between hosts.

A byte is in exactly one place: in `base` (files), in `spare` (files that were claimed from
their keys and wait to be overwritten), or in a member's `reserved` (being written, or written
and not yet booked by the keeper).
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import xxhash

from kvstrata.tiers.fs.budget.limits import Limits, Usage, smallest
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.machine.disk import UNBOUNDED, disk_at

MAX_ROWS = 512
BOOKS_NAME = ".kvstrata"  # below the root: the directory of ledger, journals, snapshot and spares
LEDGER_NAME = "ledger"  # in it
SPARE_NAME = "spare"  # in it, too: files `<cost>-<16 hex digits>` to overwrite
_MAGIC = b"kvledge1"
_HEADER = struct.Struct("<8s16sB12sqqqqI")
_ROW = struct.Struct("<16s12sQB" + "Q" * 3 + "qq" + "qqq" + "IQ")
_LOCK_WITHIN_S = 2.0
# Between two tries to lock, which another process does for some 20 us as a rule.
_PAUSE_S, _MOST_PAUSE_S = 20e-6, 500e-6


class LedgerBusy(OSError):
    """Another process has held the lock for seconds; no use to wait for it now."""


def lock(fd: int, path: str, how: int, within_s: float) -> None:
    """`flock` the open file of that path, as `how` says.

    Raises:
        LedgerBusy: another process does not let go of it in time.
    """
    deadline, pause = time.monotonic() + within_s, _PAUSE_S
    while True:
        try:
            return fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LedgerBusy(f"{path} is locked") from None
            time.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE_S)


@dataclass(slots=True)
class Row:
    """One member.

    Attributes:
        host: machine and pid namespace, as in the names of temporaries.
        beat: counts up while it lives.
        dead: the keeper found it dead; its limits count no more, its reservations do until
            a scan has seen what they became.
        reserved_bytes, reserved_files: see the module's text.
        wanted: cost of a store that waits for room, or 0.
        pressed: bytes that a full disk refused although the budget had room.
        page: cost of the file that was stored last; spares of this cost are of use.
        booked: sequence number and length of its journal up to which the ledger was changed.
    """

    host: bytes
    limits: Limits
    beat: int = 0
    dead: bool = False
    reserved_bytes: int = 0
    reserved_files: int = 0
    wanted: int = 0
    pressed: int = 0
    page: int = 0
    booked: tuple[int, int] = (0, 0)

    def release(self, nbytes: int, files: int) -> None:
        """So much is reserved no longer."""
        self.reserved_bytes = max(0, self.reserved_bytes - nbytes)
        self.reserved_files = max(0, self.reserved_files - files)


@dataclass(slots=True)
class Books:
    """What the ledger says.

    Attributes:
        keeper: id of the member that keeps the books; zeros at first.
        known: `base` was counted; until then nothing may be reserved.
        boot: the boot of the machine that counted; after a crash of it, count anew.
        rows: members by id.
    """

    keeper: bytes = bytes(16)
    known: bool = False
    boot: bytes = bytes(12)
    base_bytes: int = 0
    base_files: int = 0
    spare_bytes: int = 0
    spare_files: int = 0
    rows: dict[bytes, Row] = field(default_factory=dict)

    def add_base(self, nbytes: int, files: int) -> None:
        """There is so much more in files, or less."""
        self.base_bytes += nbytes
        self.base_files += files

    def add_spare(self, nbytes: int, files: int) -> None:
        """There is so much more in spares, or less."""
        self.spare_bytes += nbytes
        self.spare_files += files

    def limits(self) -> Limits:
        """The smallest of the living members' limits."""
        return smallest(row.limits for row in self.rows.values() if not row.dead)

    def taken(self, root: str) -> Usage:
        """What the files take that are booked; OSError where the file system cannot be asked."""
        nbytes, files = self.base_bytes + self.spare_bytes, self.base_files + self.spare_files
        return Usage(nbytes, files, disk_at(root).free)

    def usage(self, root: str) -> Usage:
        """The same, reservations included."""
        reserved = sum(row.reserved_bytes for row in self.rows.values())
        files = sum(row.reserved_files for row in self.rows.values())
        nbytes, taken, free = self.taken(root)
        if free != UNBOUNDED:
            free -= reserved
        return Usage(nbytes + reserved, taken + files, free)

    def encode(self) -> bytes:
        """The file's content."""
        content = _HEADER.pack(
            *(_MAGIC, self.keeper, self.known, self.boot, self.base_bytes, self.base_files),
            *(self.spare_bytes, self.spare_files, len(self.rows)),
        )
        content += b"".join(
            _ROW.pack(
                *(member, row.host, row.beat, row.dead, *row.limits),
                *(row.reserved_bytes, row.reserved_files),
                *(row.wanted, row.pressed, row.page, *row.booked),
            )
            for member, row in self.rows.items()
        )
        return content + xxhash.xxh3_64_digest(content)

    @classmethod
    def decode(cls, raw: bytes) -> Books:
        """The books; empty and unknown where the file is new, torn or not ours."""
        content = raw[:-8]
        if len(content) < _HEADER.size or xxhash.xxh3_64_digest(content) != raw[-8:]:
            return cls()
        magic, keeper, known, boot, *counts, n_rows = _HEADER.unpack_from(content)
        if magic != _MAGIC or len(content) != _HEADER.size + n_rows * _ROW.size:
            return cls()
        books = cls(keeper, bool(known), boot, *counts)
        for values in _ROW.iter_unpack(content[_HEADER.size :]):
            member, host, beat, dead, *rest, number, length = values
            row = Row(host, Limits(*rest[:3]), beat, bool(dead), *rest[3:])
            row.booked = number, length
            books.rows[member] = row
        return books


class Ledger:
    """The ledger file, as a member uses it. Threads of one process share an object; it blocks.

    Attributes:
        root: to which the limits apply.
        directory: of the books, below it.
        spares: of the spares, below that.
        file_mode, dir_mode: permission bits of what is created.
        member: the member's own id; zeros for who only looks.
    """

    def __init__(self, root: str, file_mode: int, dir_mode: int, member: bytes = bytes(16)) -> None:
        """The file, and its directory, are created by the first use where they are missing."""
        self.root = root
        self.directory = os.path.join(root, BOOKS_NAME)
        self.spares = os.path.join(self.directory, SPARE_NAME)
        self.file_mode = file_mode
        self.dir_mode = dir_mode
        self.member = member
        self._path = os.path.join(self.directory, LEDGER_NAME)
        self._thread_lock = threading.Lock()
        self._fd = -1
        self._busy_until = 0.0

    def close(self) -> None:
        """Close the file; not while it is locked."""
        with self._thread_lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    @contextmanager
    def locked(self) -> Iterator[Books]:
        """The books, alone; what was changed is written at the end.

        Raises:
            LedgerBusy: another process does not let go of the lock.
            OSError: the file cannot be opened, or the file system failed.
        """
        if not self._thread_lock.acquire(timeout=_LOCK_WITHIN_S):
            raise LedgerBusy(f"{self._path} is locked")
        try:
            self._lock()
            try:
                raw = os.pread(self._fd, _HEADER.size + MAX_ROWS * _ROW.size + 8, 0)
                books = Books.decode(raw)
                yield books
                changed = books.encode()
                if changed != raw:
                    os.pwrite(self._fd, changed, 0)
                    if len(changed) < len(raw):
                        os.ftruncate(self._fd, len(changed))
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def _lock(self) -> None:
        while True:
            if self._fd < 0:
                self._fd = self._open()
            hangs = time.monotonic() < self._busy_until
            try:
                lock(self._fd, self._path, fcntl.LOCK_EX, 0.0 if hangs else _LOCK_WITHIN_S)
            except LedgerBusy:
                # whoever holds it hangs: the next ones do not wait for it, for a while
                self._busy_until = time.monotonic() + _LOCK_WITHIN_S
                raise
            try:
                with suppress(FileNotFoundError):  # is it the one that others find under its name?
                    if os.path.samestat(nofollow.lstat(self._path), os.fstat(self._fd)):
                        return
            except OSError:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
                raise
            # somebody deleted the file: begin a new one, as everybody will
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        try:
            return nofollow.open_or_create(self._path, os.O_RDWR, self.file_mode)
        except FileNotFoundError:
            with suppress(FileExistsError):
                nofollow.mkdir(self.directory, self.dir_mode)
            return nofollow.open_or_create(self._path, os.O_RDWR, self.file_mode)
