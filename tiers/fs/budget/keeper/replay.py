"""Booking: the keeper takes what the journals say into its catalog and into the ledger."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress

from kvstrata.tiers.fs.budget.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    Op,
    Record,
    decode,
    journal_name,
    parse_name,
    read_namespace,
)
from kvstrata.tiers.fs.budget.keeper.inventory import Holdings
from kvstrata.tiers.fs.budget.ledger import Books, Row
from kvstrata.tiers.fs.budget.limits import BLOCK, file_cost
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import QUARANTINE_NAME

_MAX_JOURNAL = 2**28  # bytes; a server begins the next one long before
_FOLD_BYTES = 2**18 - 2**18 % RECORD_BYTES  # read at once under the lock: some milliseconds
PROTECT_S = 5.0  # a page that somebody was told is here is not evicted for so long


class Booking:
    """Reads all journals below a root. One thread only; blocks on the disk.

    Attributes:
        lost: a record could not be read, so the ledger is not to be believed until a scan
            that begins after it has ended.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.lost = False
        self._holdings = holdings
        self._place = holdings.place
        self._damaged: set[str] = set()  # namespaces whose quarantines changed
        self._quarantined: dict[str, set[bytes]] = {}

    def fold(self) -> bool:
        """Book what the journals say; True if there is more.

        Raises:
            OSError: the books cannot be read or written.
        """
        more = False
        for server, numbers in self._journals().items():
            for number in numbers:
                known, start = self._holdings.read.get(server, (0, 0))
                if number >= known:
                    more |= self._fold_file(server, number, start if number == known else 0)
        while self._damaged and self._holdings.complete:
            self._look_into_quarantine(self._damaged.pop())
        return more

    def note_quarantined(self, name: bytes) -> None:
        """A scan found the file in a quarantine."""
        path = self._holdings.names.path(name)
        if path is not None:
            self._quarantined.setdefault(path.split("/")[0], set()).add(name)

    def length(self) -> int:
        """Bytes of all journals."""
        return sum(
            _size(self._path(server, number))
            for server, numbers in self._journals().items()
            for number in numbers
        )

    def delete_covered(self, rows: set[bytes]) -> None:
        """Delete the journals that a snapshot just saved covers; `rows` are servers that go on."""
        read = self._holdings.read
        for server, numbers in self._journals().items():
            number_read, end = read.get(server, (0, 0))
            for number in numbers:
                path = self._path(server, number)
                rest = _size(path) - max(HEADER_BYTES, end if number == number_read else 0)
                over = server not in rows and number >= number_read and rest < RECORD_BYTES
                if number < number_read or over:
                    with suppress(OSError):
                        nofollow.unlink(path)
        for server in read.keys() - rows - self._journals().keys():
            del read[server]

    def _path(self, server: bytes, number: int) -> str:
        return os.path.join(self._place.directory, journal_name(server, number))

    def _journals(self) -> dict[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for name in sorted(nofollow.listdir(self._place.directory)):
            parsed = parse_name(name)
            if parsed is not None:
                found.setdefault(parsed[0], []).append(parsed[1])
        return found

    def _fold_file(self, server: bytes, number: int, start: int) -> bool:
        try:
            fd = nofollow.open(self._path(server, number), os.O_RDONLY)
        except OSError:
            return False  # another keeper deleted it, or it is none
        try:
            status = os.fstat(fd)
            size = status.st_size
            start = max(start, HEADER_BYTES)
            plain = stat.S_ISREG(status.st_mode) and size <= _MAX_JOURNAL
            if size - start < RECORD_BYTES or not plain:
                return False
            namespace = read_namespace(os.pread(fd, HEADER_BYTES, 0))
            raw = os.pread(fd, _FOLD_BYTES, start)
        finally:
            os.close(fd)
        prefix = self._holdings.names.prefix(namespace) if namespace else None
        end = start
        with self._place.ledger.locked() as books:
            if books.keeper != self._place.server:
                return False
            row = books.rows.get(server)
            for record in decode(raw):
                end += RECORD_BYTES
                fresh = row if row and (number, end) > row.booked else None
                if record is not None and prefix is not None:
                    if record.op == Op.QUARANTINED and namespace is not None:
                        self._damaged.add(namespace)
                    self._apply(record, prefix + record.key, books, fresh)
                elif fresh is not None:
                    self.lost, books.known = True, False
            if row is not None:
                row.booked = max(row.booked, (number, end))
        self._holdings.read[server] = (number, end)
        return size - end >= RECORD_BYTES

    def _apply(self, record: Record, name: bytes, books: Books, row: Row | None) -> None:
        """Book one record; `row` is None where the ledger knows of it already."""
        holdings = self._holdings
        if record.op == Op.STORED:
            cost = record.blocks * BLOCK
            stamp = holdings.stamps.of(record.access)
            holdings.add(name, cost, stamp, record.depth, books if row else None)
            if row is not None:
                row.reserved_bytes = max(0, row.reserved_bytes - cost)
                row.reserved_files = max(0, row.reserved_files - 1)
        elif record.op == Op.USED:
            holdings.protected.pop(record.key, None)
            holdings.use(name, holdings.stamps.of(record.access), record.depth)
        elif record.op == Op.PROMISED:
            holdings.protected[record.key] = time.monotonic() + PROTECT_S
            holdings.use(name, holdings.stamps.of(record.access), record.depth)
        elif record.op == Op.GONE:
            holdings.protected.pop(record.key, None)
            if not holdings.exists(name):
                holdings.forget(name, books)

    def _look_into_quarantine(self, namespace: str) -> None:
        """Book what is in the quarantine now: files were moved there and the oldest deleted."""
        names, catalog = self._holdings.names, self._holdings.catalog
        parts = [f"{namespace}_r0", QUARANTINE_NAME]
        there: set[bytes] = set()
        with self._place.ledger.locked() as books:
            if books.keeper != self._place.server:
                return
            before = catalog.nbytes, len(catalog)
            with (
                suppress(OSError),
                nofollow.scandir(os.path.join(self._place.root, *parts)) as entries,
            ):
                for entry in entries:
                    name = names.name([*parts, entry.name])
                    with suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        if name is not None and not entry.is_dir(follow_symlinks=False):
                            catalog.seen(name, file_cost(status.st_size), status.st_mtime_ns)
                            there.add(name)
            for name in self._quarantined.get(parts[0], set()) - there:
                catalog.remove(name)
            self._quarantined[parts[0]] = there
            books.base_bytes += catalog.nbytes - before[0]
            books.base_files += len(catalog) - before[1]


def _size(path: str) -> int:
    with suppress(OSError):
        return nofollow.lstat(path).st_size
    return 0
