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


@dataclass(slots=True)
class Walked:
    """What a walk met that is no page and not in quarantine; `swept` counts removed temporaries."""

    other_bytes: int = 0
    other_files: int = 0
    swept: int = 0


class Rescan:
    """Makes the ledger's base exact. One thread only; blocks on the disk.

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
        self._walked = Walked()
        self._walk: Iterator[Evictable | None] | None = None
        self._books_size = (0, 0)  # bytes and files

    @property
    def running(self) -> bool:
        """Whether a scan is under way."""
        return self._walk is not None

    def begin(self) -> None:
        """Scan from the beginning."""
        self._walked = Walked()
        self._inventory.catalog.begin_scan()
        self._inventory.scanning = True
        self._walk = walk(self._ledger.root, self._inventory.names, self._walked, self._is_writing)

    def abandon(self) -> None:
        """Forget the scan under way."""
        self._walk = None
        self._inventory.scanning = False

    def step(self, slice_s: float) -> bool:
        """Go on for about `slice_s` seconds; True if everything was seen."""
        end = time.monotonic() + slice_s
        for found in self._walk or ():
            if found is not None:
                name, cost, mtime = found
                self._inventory.seen(name, cost, max(0, min(mtime, time.time_ns())))
                if not is_page(name):
                    self._replay.note_quarantined(name)
            if time.monotonic() > end:
                return False
        self._walk = None
        return True

    def finish(self, dead: Collection[bytes]) -> None:
        """Everything was seen: correct the ledger. `dead` are those that were at the start.

        Raises:
            OSError: the books cannot be read or written.
        """
        while self._replay.advance():
            pass
        if self._replay.lost:
            return
        catalog, walked = self._inventory.catalog, self._walked
        self.swept += walked.swept
        catalog.end_scan()
        self._inventory.scanning = False
        self._sweep_books()
        with self._ledger.locked() as books:
            if books.keeper != self._ledger.member:
                return
            costs = spare_costs(self._ledger.spares)
            books.spare_bytes, books.spare_files = sum(costs), len(costs)
            self._books_size = books_size(self._ledger.directory, self._is_writing)
            books.base_bytes = catalog.nbytes + walked.other_bytes + self._books_size[0]
            books.base_files = len(catalog) + walked.other_files + self._books_size[1]
            for member in dead:
                if member in books.rows and books.rows[member].dead:  # else it woke up
                    strike(books, member, self._ledger.directory)
            books.boot = boot_id()
            books.known = self._inventory.complete = True

    def book_books(self) -> None:
        """Book by how much the books themselves grew.

        Raises:
            OSError: the books cannot be read or written.
        """
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


def walk(
    root: str, names: Names, walked: Walked, is_writing: Callable[[str], bool]
) -> Iterator[Evictable | None]:
    """Each file below a root that can be evicted, and None for anything else that was met.

    The rest is added up in `walked`. Abandoned temporaries are removed; those for which
    `is_writing` holds are not counted, since their writers have reserved them. The books
    themselves are left out. Links are not followed; what cannot be read is passed over.
    """
    pending: list[list[str]] = [[]]
    while pending:
        parts = pending.pop()
        leaf = len(parts) == 3 and PAGES_DIR.fullmatch(parts[0]) is not None
        if not leaf:
            walked.other_bytes += BLOCK  # a leaf is in the cost of the files in it
        with suppress(OSError), nofollow.scandir(os.path.join(root, *parts)) as entries:
            for entry in entries:
                found, inner = None, [*parts, entry.name]
                with suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        found = _meet(root, entry, inner, names, walked, is_writing)
                    elif len(inner) <= _MAX_DEPTH and inner != [BOOKS_NAME]:
                        pending.append(inner)
                yield found


def _meet(
    root: str,
    entry: os.DirEntry[str],
    parts: list[str],
    names: Names,
    walked: Walked,
    is_writing: Callable[[str], bool],
) -> Evictable | None:
    status = entry.stat(follow_symlinks=False)
    if is_temporary(entry.name):
        if remove_abandoned(os.path.join(root, *parts)):
            walked.swept += 1
            return None
        if is_writing(entry.name):
            return None
    cost, name = file_cost(status.st_size), names.name(parts)
    if name is not None:
        return name, cost, status.st_mtime_ns
    walked.other_bytes += cost - BLOCK
    walked.other_files += 1
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
