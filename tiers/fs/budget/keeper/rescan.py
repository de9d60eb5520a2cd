"""Rescan: what the disk holds, found by a walk that goes on a little at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from kvstrata.tiers.fs.budget.admission import spare_costs
from kvstrata.tiers.fs.budget.keeper.inventory import Inventory
from kvstrata.tiers.fs.budget.keeper.replay import Replay
from kvstrata.tiers.fs.budget.lease import dead_leases, lease_path
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, Books
from kvstrata.tiers.fs.budget.limits import BLOCK, file_cost
from kvstrata.tiers.fs.budget.names import Names, is_page
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import PAGES_DIR
from kvstrata.tiers.fs.files.temporary import is_temporary, remove_abandoned

_MAX_DEPTH = 32

Evictable = tuple[bytes, int, int]  # name, cost in bytes, and mtime in nanoseconds


class Rescan:
    """Makes the ledger's base exact. One thread only.

    Its methods block on the disk, and raise OSError where the books cannot be read or written.

    Attributes:
        hosts: of all members; what they are writing they have reserved.
        swept: temporaries of dead writers that were removed.
    """

    def __init__(self, inventory: Inventory, replay: Replay) -> None:
        self.hosts: set[str] = set()
        self.swept = 0
        self._inventory = inventory
        self._ledger = inventory.ledger
        self._replay = replay
        self._dead: Collection[bytes] = ()
        self._walk = Walk(self._ledger.root, inventory.names, self._is_writing)
        self._files: Iterator[Evictable | None] | None = None  # of the walk under way
        self._books_size = (0, 0)  # bytes and files

    @property
    def running(self) -> bool:
        """Whether a scan is under way."""
        return self._files is not None

    def begin(self, dead: Collection[bytes]) -> None:
        """Scan from the beginning; the `dead` members are struck from the books at the end."""
        self._dead = dead
        self._inventory.catalog.begin_scan()
        self._inventory.scanning = True
        self._walk = Walk(self._ledger.root, self._inventory.names, self._is_writing)
        self._files = self._walk.files()

    def abandon(self) -> None:
        """Forget the scan under way."""
        self._files = None
        self._inventory.scanning = False

    def step(self, slice_s: float) -> None:
        """Go on for about `slice_s` seconds; where everything was seen, correct the ledger."""
        end = time.monotonic() + slice_s
        for found in self._files or ():
            if found is not None:
                name, cost, mtime = found
                self._inventory.seen(name, cost, max(0, min(mtime, time.time_ns())))
                if not is_page(name):
                    self._replay.note_quarantined(name)
            if time.monotonic() > end:
                return
        self._files = None
        self._finish()

    def _finish(self) -> None:
        while self._replay.advance():
            pass
        if self._replay.lost:
            return
        catalog, walk = self._inventory.catalog, self._walk
        self.swept += walk.swept
        catalog.end_scan()
        self._inventory.scanning = False
        self._sweep_books()
        with self._ledger.locked() as books:
            if books.keeper != self._ledger.member:
                return
            trusted = books.known and self._inventory.saved
        if not trusted:  # whoever sees that all is counted must find it in the books
            with suppress(OSError):  # else by checks
                self._inventory.save()
        with self._ledger.locked() as books:
            if books.keeper != self._ledger.member:
                return
            costs = spare_costs(self._ledger.spares)
            books.spare_bytes, books.spare_files = sum(costs), len(costs)
            self._books_size = books_size(self._ledger.directory, self._is_writing)
            books.base_bytes = catalog.nbytes + walk.other_bytes + self._books_size[0]
            books.base_files = len(catalog) + walk.other_files + self._books_size[1]
            for member in self._dead:
                if member in books.rows and books.rows[member].dead:  # else it woke up
                    strike(books, member, self._ledger.directory)
            books.boot = boot_id()
            books.known = self._inventory.complete = True

    def book_books(self) -> None:
        """Book by how much the books themselves grew."""
        before = self._books_size
        self._books_size = books_size(self._ledger.directory, self._is_writing)
        if before != self._books_size:
            with self._ledger.locked() as books:
                if books.keeper == self._ledger.member:
                    books.add_base(self._books_size[0] - before[0], self._books_size[1] - before[1])

    def _is_writing(self, name: str) -> bool:
        return name.split("-")[1] in self.hosts

    def _sweep_books(self) -> None:
        """Remove what the dead left among the books: claimed spares, snapshots, old leases."""
        directory = self._ledger.directory
        for name in filter(is_temporary, nofollow.listdir(directory)):
            self.swept += remove_abandoned(os.path.join(directory, name))
        with self._ledger.locked() as books:
            known = set(books.rows)
        for member, path in dead_leases(directory, known):
            if member not in known:  # else the keeper sees to it
                with suppress(OSError):
                    nofollow.unlink(path)


@dataclass(slots=True)
class Walk:
    """A walk through everything below a root but the books.

    Abandoned temporaries are removed; those for which `is_writing` holds are not counted, since
    their writers have reserved them. Links are not followed; what cannot be read is passed over.

    Attributes:
        other_bytes, other_files: what was met that is no page and not in quarantine.
        swept: temporaries that were removed.
    """

    root: str
    names: Names
    is_writing: Callable[[str], bool]
    other_bytes: int = 0
    other_files: int = 0
    swept: int = 0

    def files(self) -> Iterator[Evictable | None]:
        """Each file that can be evicted, and None for anything else that was met."""
        pending: list[list[str]] = [[]]
        while pending:
            parts = pending.pop()
            leaf = len(parts) == 3 and PAGES_DIR.fullmatch(parts[0]) is not None
            if not leaf:
                self.other_bytes += BLOCK  # a leaf is in the cost of the files in it
            with suppress(OSError), nofollow.scandir(os.path.join(self.root, *parts)) as entries:
                for entry in entries:
                    found, inner = None, [*parts, entry.name]
                    with suppress(OSError):
                        if not entry.is_dir(follow_symlinks=False):
                            found = self._meet(entry, inner)
                        elif len(inner) <= _MAX_DEPTH and inner != [BOOKS_NAME]:
                            pending.append(inner)
                    yield found

    def _meet(self, entry: os.DirEntry[str], parts: list[str]) -> Evictable | None:
        status = entry.stat(follow_symlinks=False)
        if is_temporary(entry.name):
            if remove_abandoned(os.path.join(self.root, *parts)):
                self.swept += 1
                return None
            if self.is_writing(entry.name):
                return None
        cost, name = file_cost(status.st_size), self.names.name(parts)
        if name is not None:
            return name, cost, status.st_mtime_ns
        self.other_bytes += cost - BLOCK
        self.other_files += 1
        return None


def books_size(directory: str, is_writing: Callable[[str], bool]) -> tuple[int, int]:
    """Bytes and files of the books, without spares and what was reserved to overwrite one.

    Raises:
        OSError: their directory cannot be read.
    """
    nbytes = files = 0
    with nofollow.scandir(directory) as entries:
        for entry in entries:
            if is_temporary(entry.name) and is_writing(entry.name):
                continue
            with suppress(OSError):
                size = entry.stat(follow_symlinks=False).st_size
                nbytes += -(-size // BLOCK) * BLOCK
                files += not entry.is_dir(follow_symlinks=False)
    return nbytes, files


def strike(books: Books, member: bytes, directory: str) -> None:
    """Take a dead member out of the books."""
    del books.rows[member]
    with suppress(OSError):
        nofollow.unlink(lease_path(directory, member))


def boot_id() -> bytes:
    """12 bytes that stand for this boot of this machine."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(64).replace(b"-", b"")[:12]
