"""Recounting: what the disk holds, found by a scan that goes on a little at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

from kvstrata.tiers.fs.budget.admission import spare_cost
from kvstrata.tiers.fs.budget.keeper.inventory import Holdings
from kvstrata.tiers.fs.budget.keeper.replay import Booking
from kvstrata.tiers.fs.budget.keeper.walk import Walked, walk
from kvstrata.tiers.fs.budget.lease import dead_leases, presence_path
from kvstrata.tiers.fs.budget.ledger import Books
from kvstrata.tiers.fs.budget.limits import BLOCK
from kvstrata.tiers.fs.budget.names import is_page
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.temporary import is_abandoned, is_temporary


class Recount:
    """Makes the ledger's base exact. One thread only; blocks on the disk.

    Attributes:
        hosts: of all servers; what they are writing they have reserved.
        swept: temporaries of dead writers that were removed.
    """

    def __init__(self, holdings: Holdings, booking: Booking) -> None:
        self.hosts: set[str] = set()
        self.swept = 0
        self._holdings = holdings
        self._place = holdings.place
        self._booking = booking
        self._walked = Walked()
        self._scan: Iterator[None] | None = None
        self._books_size = (0, 0)  # bytes and files

    @property
    def running(self) -> bool:
        """Whether a scan is under way."""
        return self._scan is not None

    def begin(self) -> None:
        """Scan from the beginning."""
        self._walked = Walked()
        self._holdings.catalog.begin_scan()
        self._holdings.scanning = True
        self._scan = walk(
            self._place.root, self._holdings.names, self._walked, self._seen, self._is_writing
        )

    def abandon(self) -> None:
        """Forget the scan under way."""
        self._scan = None
        self._holdings.scanning = False

    def step(self, slice_s: float) -> bool:
        """Go on for about `slice_s` seconds; True if everything was seen."""
        end = time.monotonic() + slice_s
        for _ in self._scan or ():
            if time.monotonic() > end:
                return False
        self._scan = None
        return True

    def finish(self, dead: Collection[bytes]) -> None:
        """Everything was seen: correct the ledger. `dead` are those that were at the start.

        Raises:
            OSError: the books cannot be read or written.
        """
        while self._booking.fold():
            pass
        if self._booking.lost:
            return
        holdings = self._holdings
        self.swept += self._walked.swept
        holdings.catalog.end_scan()
        holdings.scanning = False
        self._sweep_books()
        with self._place.ledger.locked() as books:
            if books.keeper != self._place.server:
                return
            costs: list[int] = []
            with suppress(OSError):
                costs = [spare_cost(name) or 0 for name in nofollow.listdir(self._place.spares)]
            books.spare_bytes, books.spare_files = sum(costs), len(costs)
            self._books_size = books_size(self._place.directory, self._is_writing)
            other = self._walked.other_bytes, self._walked.other_files
            books.base_bytes = holdings.catalog.nbytes + other[0] + self._books_size[0]
            books.base_files = len(holdings.catalog) + other[1] + self._books_size[1]
            for server in dead:
                if server in books.rows and books.rows[server].dead:  # else it woke up
                    strike(books, server, self._place.directory)
            books.boot = boot_id()
            books.known = holdings.complete = True

    def book_books(self) -> None:
        """Book by how much the books themselves grew.

        Raises:
            OSError: the books cannot be read or written.
        """
        before = self._books_size
        self._books_size = books_size(self._place.directory, self._is_writing)
        if before != self._books_size:
            with self._place.ledger.locked() as books:
                if books.keeper == self._place.server:
                    books.base_bytes += self._books_size[0] - before[0]
                    books.base_files += self._books_size[1] - before[1]

    def _seen(self, name: bytes, cost: int, mtime: int) -> None:
        self._holdings.seen(name, cost, max(0, min(mtime, time.time_ns())))
        if not is_page(name):
            self._booking.note_quarantined(name)

    def _is_writing(self, name: str) -> bool:
        return name.split("-")[1] in self.hosts

    def _sweep_books(self) -> None:
        """Remove what the dead left among the books: claimed spares, snapshots, old leases."""
        with nofollow.scandir(self._place.directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    if is_temporary(entry.name) and is_abandoned(
                        entry.name, time.time() - entry.stat(follow_symlinks=False).st_mtime
                    ):
                        nofollow.unlink(os.path.join(self._place.directory, entry.name))
                        self.swept += 1
        with self._place.ledger.locked() as books:
            known = set(books.rows)
        for server, path in dead_leases(self._place.directory, known):
            if server not in known:  # else the keeper sees to it
                with suppress(OSError):
                    nofollow.unlink(path)


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


def strike(books: Books, server: bytes, directory: str) -> None:
    """Take a dead server out of the books."""
    del books.rows[server]
    with suppress(OSError):
        nofollow.unlink(presence_path(directory, server))


def boot_id() -> bytes:
    """12 bytes that stand for this boot of this machine."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(64).replace(b"-", b"")[:12]
