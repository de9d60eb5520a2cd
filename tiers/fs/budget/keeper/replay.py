"""Replay: the keeper takes what the journals say into its catalog and into the ledger."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from kvstrata.tiers.fs.budget.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    Op,
    Piece,
    Record,
    journal_name,
    journals,
    unread,
)
from kvstrata.tiers.fs.budget.keeper.inventory import Inventory
from kvstrata.tiers.fs.budget.ledger import Books, Row
from kvstrata.tiers.fs.budget.limits import BLOCK, file_cost
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import QUARANTINE_NAME

PROTECT_S = 5.0  # a page that somebody was told is here is not evicted for so long


class Replay:
    """Reads all journals below a root. One thread only.

    Its methods block on the disk, and raise OSError where the books cannot be read or written.

    Attributes:
        lost: a record could not be read, so the ledger is not to be believed until a scan
            that begins after it has ended.
    """

    def __init__(self, inventory: Inventory) -> None:
        self.lost = False
        self._inventory = inventory
        self._ledger = inventory.ledger
        self._damaged: set[str] = set()  # namespaces whose quarantines changed
        self._quarantined: dict[str, set[bytes]] = {}

    def advance(self) -> bool:
        """Take in what the journals say next; True if there is more."""
        more = False
        directory, read = self._ledger.directory, self._inventory.read
        for member, piece in unread(directory, journals(directory), read):
            if not self._take_in(member, piece):
                break
            read[member] = piece.end
            more |= not piece.is_last
        while self._damaged and self._inventory.complete:
            self._look_into_quarantine(self._damaged.pop())
        return more

    def note_quarantined(self, name: bytes) -> None:
        """A scan found the file in a quarantine."""
        path = self._inventory.names.path(name)
        if path is not None:
            self._quarantined.setdefault(path.split("/")[0], set()).add(name)

    def length(self) -> int:
        """Bytes of all journals."""
        return sum(self._size(*each) for each in journals(self._ledger.directory))

    def delete_covered(self, rows: set[bytes]) -> None:
        """Delete the journals that a snapshot just saved covers; `rows` are members that go on."""
        read = self._inventory.read
        for member, number in journals(self._ledger.directory):
            known, end = read.get(member, (0, 0))
            rest = self._size(member, number) - max(HEADER_BYTES, end if number == known else 0)
            over = member not in rows and number >= known and rest < RECORD_BYTES
            if number < known or over:
                with suppress(OSError):
                    nofollow.unlink(self._path(member, number))
        for member in read.keys() - rows - {m for m, _ in journals(self._ledger.directory)}:
            del read[member]

    def _path(self, member: bytes, number: int) -> str:
        return os.path.join(self._ledger.directory, journal_name(member, number))

    def _size(self, member: bytes, number: int) -> int:
        with suppress(OSError):
            return nofollow.lstat(self._path(member, number)).st_size
        return 0

    def _take_in(self, member: bytes, piece: Piece) -> bool:
        """Book the records of a piece; False if another is the keeper now."""
        namespace = piece.namespace
        prefix = self._inventory.names.prefix(namespace) if namespace else None
        number, end = piece.end
        end -= len(piece.records) * RECORD_BYTES
        with self._ledger.locked() as books:
            if books.keeper != self._ledger.member:
                return False
            row = books.rows.get(member)
            for record in piece.records:
                end += RECORD_BYTES
                fresh = row if row and (number, end) > row.booked else None
                if record is not None and prefix is not None:
                    if record.op == Op.QUARANTINED and namespace is not None:
                        self._damaged.add(namespace)
                    self._apply(record, prefix + record.key, books, fresh)
                elif fresh is not None:
                    self.lost, books.known = True, False
            if row is not None:
                row.booked = max(row.booked, piece.end)
        return True

    def _apply(self, record: Record, name: bytes, books: Books, row: Row | None) -> None:
        """Book one record; `row` is None where the ledger knows of it already."""
        inventory = self._inventory
        if record.op == Op.STORED:
            cost = record.blocks * BLOCK
            stamp = inventory.stamps.of(record.access)
            inventory.add(name, cost, stamp, record.depth, books if row else None)
            if row is not None:
                row.release(cost, 1)
        elif record.op in (Op.USED, Op.PROMISED):
            if record.op == Op.USED:
                inventory.protected.pop(record.key, None)
            else:
                inventory.protected[record.key] = time.monotonic() + PROTECT_S
            inventory.use(name, inventory.stamps.of(record.access), record.depth)
        elif record.op == Op.GONE:
            inventory.protected.pop(record.key, None)
            if not inventory.exists(name):
                inventory.forget(name, books)

    def _look_into_quarantine(self, namespace: str) -> None:
        """Book what is in the quarantine now: files were moved there and the oldest deleted."""
        names, catalog = self._inventory.names, self._inventory.catalog
        parts = [f"{namespace}_r0", QUARANTINE_NAME]
        there: set[bytes] = set()
        with self._ledger.locked() as books:
            if books.keeper != self._ledger.member:
                return
            before, path = (catalog.nbytes, len(catalog)), os.path.join(self._ledger.root, *parts)
            with suppress(OSError), nofollow.scandir(path) as entries:
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
            books.add_base(catalog.nbytes - before[0], len(catalog) - before[1])
