"""What the keeper knows of the files below a root, between the journals and the disk."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from contextlib import suppress

from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.ledger import Books, Ledger
from kvstrata.tiers.fs.budget.stamps import Stamps
from kvstrata.tiers.fs.files import nofollow

_MOST_STRAYS = 2**14  # names remembered because a record of theirs came too early


class Inventory:
    """The catalog, and the changes of it that touch the ledger's base as well.

    Attributes:
        complete: a scan has seen everything, so the base is what the catalog and the rest add
            up to. Until then the base is only lowered by what is deleted here.
        scanning: a scan is under way; what is booked meanwhile, it may not see.
        saved: there is a whole snapshot.
        protected: by offload key until when, on the monotonic clock, a page is spared.
        read: by member the number and length of the journal that was read.
    """

    def __init__(self, ledger: Ledger, protected: dict[bytes, float]) -> None:
        """Take over from the last keeper: read its snapshot."""
        self.ledger = ledger
        there = nofollow.lexists(os.path.join(ledger.directory, snapshot.SNAPSHOT_NAME))
        self.catalog, self.names, self.read, whole = snapshot.load(ledger.directory)
        self.saved = there and whole
        self.stamps = Stamps(self.catalog.newest())
        self.protected = protected
        self.complete = False
        self.scanning = False
        self._used_early: OrderedDict[bytes, int] = OrderedDict()
        self._gone_early: OrderedDict[bytes, None] = OrderedDict()

    def save(self) -> None:
        """Write the snapshot.

        Raises:
            OSError: it could not be written.
        """
        mode = self.ledger.file_mode
        snapshot.save(self.ledger.directory, self.catalog, self.names, self.read, mode)
        self.saved = True

    def path(self, name: bytes) -> str:
        """Where the file is.

        Raises:
            FileNotFoundError: the name is one that nobody here made.
        """
        path = self.names.path(name)
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "no file has this name", repr(name))
        return os.path.join(self.ledger.root, path)

    def exists(self, name: bytes) -> bool:
        """Whether anything is there."""
        with suppress(FileNotFoundError):
            return nofollow.lexists(self.path(name))
        return False

    def add(self, name: bytes, cost: int, stamp: int, depth: int, books: Books | None) -> None:
        """The file was stored; the books are changed if they are given."""
        if self.scanning or name in self._gone_early:
            if not self.exists(name):
                return
            self._gone_early.pop(name, None)
        known = name in self.catalog
        grew = self.catalog.add(name, cost, stamp, depth)
        self.catalog.use(name, self._used_early.pop(name, 0))
        if books is not None:
            # before a scan has ended, what is known may have been evicted long ago
            known &= self.complete
            books.add_base(grew if self.complete else cost, not known)

    def seen(self, name: bytes, cost: int, mtime: int) -> None:
        """A scan found the file."""
        self.catalog.seen(name, cost, mtime)
        self.catalog.use(name, self._used_early.pop(name, 0))

    def use(self, name: bytes, stamp: int, depth: int) -> None:
        """The file was used; perhaps it is heard of only later that it is there."""
        if name in self.catalog:
            self.catalog.use(name, stamp, depth)
            return
        self._used_early[name] = max(stamp, self._used_early.get(name, 0))
        if len(self._used_early) > _MOST_STRAYS:
            self._used_early.popitem(last=False)

    def forget(self, name: bytes, books: Books) -> None:
        """The file is not there any more, and not through us."""
        known = name in self.catalog
        cost = self.remove(name)
        if known and self.complete:  # before that the ledger may know already
            books.add_base(-cost, -1)

    def remove(self, name: bytes) -> int:
        """Take the file out of the catalog only; its cost, 0 if it was unknown."""
        # that it was stored may be heard of only later
        self._gone_early[name] = None
        if len(self._gone_early) > _MOST_STRAYS:
            self._gone_early.popitem(last=False)
        return self.catalog.remove(name)
