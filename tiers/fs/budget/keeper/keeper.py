"""The keeper: of all members on a root the one that keeps the books and evicts."""

from __future__ import annotations

import time

from kvstrata.tiers.fs.budget.keeper.eviction import Eviction
from kvstrata.tiers.fs.budget.keeper.inventory import Inventory
from kvstrata.tiers.fs.budget.keeper.replay import Replay
from kvstrata.tiers.fs.budget.keeper.rescan import Rescan, strike
from kvstrata.tiers.fs.budget.lease import Watch
from kvstrata.tiers.fs.budget.ledger import Books, Ledger
from kvstrata.tiers.fs.budget.limits import Limits

RESCAN_S = 600.0  # between two scans for what was changed by others


class Keeper:
    """The keeper's work in the order in which it is done. One thread only.

    Its methods block on the disk, and raise OSError where the books cannot be read or written.
    """

    def __init__(self, ledger: Ledger, protected: dict[bytes, float], limits: Limits) -> None:
        """Take over from the last keeper. A scan begins with the first work.

        `limits` are those of this member, which count with those of the others.
        `protected` says by offload key until when, on the monotonic clock, a page is spared;
        what other members promised is added to it.
        """
        self._ledger = ledger
        self.inventory = Inventory(ledger, protected)
        self.replay = Replay(self.inventory)
        self.rescan = Rescan(self.inventory, self.replay)
        self.eviction = Eviction(self.inventory, limits)
        self._watch = Watch(ledger.directory)
        self._scan_due = 0.0
        self._saved_at = 0  # bytes of the journals at the last snapshot

    @property
    def scanning(self) -> bool:
        """Whether a scan is under way or due at once."""
        return self.rescan.running or self._scan_due == 0.0

    def work(self, slice_s: float) -> bool:
        """Do what is due, the scan for at most `slice_s` seconds; True if more is due."""
        try:
            more = self._book(slice_s)
        except OSError:
            self._count_anew()  # perhaps what was done is not in the ledger
            raise
        # writing a snapshot costs as much as it is long
        grown = self.replay.length() - self._saved_at
        if grown > max(self.eviction.limits.rotate_bytes, 64 * len(self.inventory.catalog)):
            self.save()
        return more

    def finish(self) -> None:
        """The member leaves: book what is there and write the snapshot."""
        while self.replay.advance():
            pass
        self.save()

    def save(self) -> None:
        """Write the snapshot and delete the journals that it covers."""
        with self._ledger.locked() as books:
            rows, ours = set(books.rows), books.keeper == self._ledger.member
        if ours:
            self.inventory.save()
            self.replay.delete_covered(rows)
            self._saved_at = self.replay.length()

    def judge(self, books: Books) -> None:
        """Find the members that died.

        What they reserved counts until a scan has seen what became of it.
        """
        for member, row in list(books.rows.items()):
            if member == self._ledger.member or row.dead:
                continue
            if self._watch.is_dead(member, row.beat):
                if row.reserved_bytes or row.reserved_files:
                    row.dead, self._scan_due = True, 0.0
                else:
                    strike(books, member, self._ledger.directory)
        self.rescan.hosts = {row.host.decode("ascii", "replace") for row in books.rows.values()}

    def _book(self, slice_s: float) -> bool:
        more = self.replay.advance()
        if self.inventory.complete:
            self.rescan.book_books()
        self._scan(slice_s)
        if self.replay.lost:
            self._count_anew()
        return self.eviction.make_room() or more

    def _scan(self, slice_s: float) -> None:
        if not self.rescan.running:
            now = time.monotonic()
            if now < self._scan_due:
                return
            with self._ledger.locked() as books:
                self.judge(books)
                dead = {member for member, row in books.rows.items() if row.dead}
            self._scan_due = now + RESCAN_S
            self.rescan.begin(dead)
        self.rescan.step(slice_s)

    def _count_anew(self) -> None:
        self.inventory.complete = False
        self.replay.lost = False
        self.rescan.abandon()
        self._scan_due = 0.0
