"""Eviction: which files go, and whether they are deleted or kept to be overwritten."""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections import Counter, deque
from contextlib import suppress

from kvstrata.tiers.fs.budget.admission import spare_cost, spare_costs
from kvstrata.tiers.fs.budget.keeper.inventory import Inventory
from kvstrata.tiers.fs.budget.ledger import Books
from kvstrata.tiers.fs.budget.limits import HIGH, LOW, Limits, Usage, spares_wanted
from kvstrata.tiers.fs.files import nofollow

_CLAIM_FILES = 16  # renamed at once under the lock: some milliseconds
_UNLINK_FILES = 64  # 2 MiB files take up to 4 ms each
_MOST_AGES = 256  # of evictions, for who tells how old the pages were
_MAX_TOLD = 2**16  # evictions that nobody was told of yet


class Eviction:
    """Keeps the use below the limits. One thread only.

    Its methods block on the disk, and raise OSError where the books cannot be read or written.

    Attributes:
        files, nbytes: what was evicted.
        ages: seconds since it was used last, of each of the latest evictions.
        told: namespace and key of what was evicted, to be taken by whoever spreads the news.
        limits: those that counted last.
        by_others: the limits by which something was evicted that this member's own would have
            let stay; None if that was not so yet.
    """

    def __init__(self, inventory: Inventory, own: Limits) -> None:
        """`own`: the limits of this member."""
        self.files = self.nbytes = 0
        self.ages: deque[float] = deque(maxlen=_MOST_AGES)
        self.told: deque[tuple[str, bytes]] = deque(maxlen=_MAX_TOLD)
        self.limits = Limits()
        self.by_others: Limits | None = None
        self._own = own
        self._inventory = inventory
        self._ledger = inventory.ledger
        self._left: list[str] = []  # directories that victims were taken from

    def make_room(self) -> bool:
        """Claim and delete a batch of files if that is needed; True if more is."""
        doomed: list[bytes] = []
        self._left.clear()
        claimed = self.files
        with self._ledger.locked() as books:
            if books.keeper != self._ledger.member or not books.known:
                return False
            pressed = 0
            for row in books.rows.values():
                pressed, row.pressed = pressed + row.pressed, 0
            limits, usage = books.limits(), books.usage(self._ledger.root)
            self.limits = limits
            pages = {row.wanted or row.page for row in books.rows.values() if not row.dead} - {0}
            ahead = max(max(pages, default=0), spares_wanted(usage))
            nbytes, files = pressed, 0
            taken = books.taken(self._ledger.root)
            if limits.room(taken).is_passed:
                low = limits.room(taken, LOW)
                nbytes, files = max(nbytes, -low.nbytes), max(0, -low.files)
            elif limits.room(usage).is_passed and not nbytes:
                return False  # too much is reserved: it is given back now, or booked soon
            soft = limits.room_to_write(usage, HIGH)
            spares = Counter(spare_costs(self._ledger.spares) if books.spare_files > 0 else ())
            if nbytes > 0 or files > 0:
                freed = self._drop_spares(books, spares, pages, nbytes, files)
                doomed = self._choose(nbytes - freed[0], files - freed[1])
            elif soft.nbytes < ahead or soft.files < 1 + limits.max_files // 50:
                doomed = self._claim_spares(books, spares, pages, ahead)
            else:
                return False
            if self.by_others is None and limits != self._own:
                self._note_others(limits, usage, ahead)
        claimed = self.files - claimed
        for directory in self._left:
            _remove_empty(directory)
        return self._unlink(doomed) or claimed > 0

    def _note_others(self, limits: Limits, usage: Usage, ahead: int) -> None:
        """Note if what happens here is for the limits of other members only."""
        own = self._own.room_to_write(usage, HIGH)
        if own.nbytes >= ahead and own.files >= 1 + self._own.max_files // 50:
            self.by_others = limits

    def _drop_spares(
        self, books: Books, spares: Counter[int], pages: set[int], nbytes: int, files: int
    ) -> tuple[int, int]:
        """Delete spares: those that nobody can use, or all if nothing else is left."""
        freed, count = 0, 0
        for name in nofollow.listdir(self._ledger.spares) if spares else ():
            cost = spare_cost(name) or 0
            if (freed >= nbytes and count >= files) or count >= _CLAIM_FILES:
                break
            if cost in pages and len(self._inventory.catalog):
                continue
            with suppress(OSError):
                nofollow.unlink(os.path.join(self._ledger.spares, name))
                books.add_spare(-cost, -1)
                freed, count = freed + cost, count + 1
        return freed, count

    def _choose(self, nbytes: int, files: int) -> list[bytes]:
        """Victims that take so many bytes and files, at most `_UNLINK_FILES`; still there."""
        catalog = self._inventory.catalog
        chosen: list[bytes] = []
        while (nbytes > 0 or files > 0) and len(chosen) < _UNLINK_FILES:
            # where a limit was passed it comes before any promise: a lost page is a miss
            name = self._victim(chosen) or catalog.take_victim(chosen.__contains__)
            if name is None:
                break
            chosen.append(name)
            nbytes, files = nbytes - catalog.cost(name), files - 1
        return chosen

    def _claim_spares(
        self, books: Books, spares: Counter[int], pages: set[int], ahead: int
    ) -> list[bytes]:
        """Turn victims into spares until each kind of page has enough of them.

        Returns the victims that fit none, to be deleted: they make room instead.
        """
        nofollow.make_directories(self._ledger.spares, self._ledger.root, self._ledger.dir_mode)
        short = {cost for cost in pages if spares[cost] * cost < ahead}
        doomed: list[bytes] = []
        room_made = claimed = 0
        while short and room_made < ahead and claimed + len(doomed) < _CLAIM_FILES:
            name = self._victim(doomed)
            if name is None:
                break
            cost = self._inventory.catalog.cost(name)
            if cost in short and self._is_plain(name):
                claimed += 1
                with suppress(OSError):  # no room for one more name, or no directory for it
                    if self._claim(name, cost, books):
                        spares[cost] += 1
                        short = {each for each in short if spares[each] * each < ahead}
                    continue
            doomed.append(name)
            room_made += cost
        return doomed

    def _is_plain(self, name: bytes) -> bool:
        """Whether a regular file is there, or nothing."""
        with suppress(OSError):
            return stat.S_ISREG(nofollow.lstat(self._inventory.path(name)).st_mode)
        return True

    def _claim(self, name: bytes, cost: int, books: Books) -> bool:
        target = os.path.join(self._ledger.spares, f"{cost}-{secrets.token_hex(8)}")
        try:
            path = self._inventory.path(name)
            nofollow.rename(path, target)
        except FileNotFoundError:
            self._inventory.forget(name, books)
            return False
        books.add_spare(cost, 1)
        self._book(name, books)
        self._left.append(os.path.dirname(path))
        return True

    def _unlink(self, doomed: list[bytes]) -> bool:
        gone: list[tuple[bytes, bool]] = []
        for name in doomed:
            try:
                path = self._inventory.path(name)
                try:
                    nofollow.unlink(path)
                except IsADirectoryError:
                    nofollow.rmdir(path)
                gone.append((name, True))
                _remove_empty(os.path.dirname(path))
            except FileNotFoundError:
                gone.append((name, False))
            except OSError:
                # it cannot be deleted: do not choose it again soon
                self._inventory.catalog.use(name, self._inventory.stamps.next())
        if gone:
            with self._ledger.locked() as books:
                if books.keeper != self._ledger.member:
                    return False
                for name, ours in gone:
                    (self._book if ours else self._inventory.forget)(name, books)
        return bool(gone)

    def _book(self, name: bytes, books: Books) -> None:
        """The file lost its name through us."""
        if name in self._inventory.catalog:
            self.ages.append(max(0, time.time_ns() - self._inventory.catalog.stamp(name)) / 1e9)
        cost = self._inventory.remove(name)
        books.add_base(-cost, -1)
        namespace = self._inventory.names.namespace(name)
        if namespace is not None:
            self.told.append((namespace, name[2:]))
        self.files += 1
        self.nbytes += cost

    def _victim(self, chosen: list[bytes]) -> bytes | None:
        now = time.monotonic()
        protected = self._inventory.protected
        return self._inventory.catalog.take_victim(
            lambda name: name in chosen or protected.get(name[2:], 0.0) > now
        )


def _remove_empty(leaf: str) -> None:
    """Remove a leaf directory and its parent if nothing is in them."""
    with suppress(OSError):
        nofollow.rmdir(leaf)
        nofollow.rmdir(os.path.dirname(leaf))
