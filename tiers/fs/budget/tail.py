"""The tail of the journals: what the other members on a root stored and what was evicted.

Read from the same journals that the keeper reads, by each member for itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Set
from contextlib import suppress
from operator import itemgetter

from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.journal import Op, Piece, Positions, evicted_key, journals, unread
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.process.medium import News

_MOST_KNOWN = 2**19  # pages told at the start: those used last


class Tail:
    """The news for one member of one namespace. One thread only; blocks on the disk.

    Attributes:
        at_end: what the books said at the last call is told.
        whole: nothing was missing or damaged in what was read.
    """

    def __init__(self, directory: str, member: bytes, namespace: str) -> None:
        self._directory = directory
        self._member = member
        self._namespace = namespace
        self._digest = evicted_key(namespace, b"")
        self._read: Positions = {}
        self._backlog: deque[bytes] | None = None  # what the snapshot holds and was not told
        self._snapshot: tuple[int, int] | None = None  # inode and mtime, as last seen
        self._covered: Positions = {}  # by it
        self.at_end = self.whole = False

    def begin_anew(self) -> None:
        """Tell of everything once more, beginning with the snapshot as it is now."""
        self._backlog, self.at_end, self.whole = None, False, False

    def news(self, most: int) -> list[News]:
        """About `most` pages that came or went since the last call, in their order.

        Raises:
            OSError: the books cannot be read.
        """
        if self._backlog is None:
            self._backlog = self._start()
        self.at_end = not self._backlog
        if self._backlog:
            count = min(most, len(self._backlog))
            return [(self._backlog.popleft(), True) for _ in range(count)]
        found: list[News] = []
        listed = [each for each in journals(self._directory) if each[0] != self._member]
        if self._has_missed(set(listed)):
            self.begin_anew()
            return []
        for member, piece in unread(self._directory, listed, self._read):
            self._read[member] = piece.end
            self.whole &= piece.namespace is not None and None not in piece.records
            self.at_end &= piece.is_last
            found += self._news_of(piece)
            if len(found) >= most:
                self.at_end = False
                break
        for member in self._read.keys() - self._covered.keys() - {member for member, _ in listed}:
            del self._read[member]
        return found

    def _start(self) -> deque[bytes]:
        """The keys of the snapshot, in the order of their use."""
        there = nofollow.lexists(os.path.join(self._directory, snapshot.SNAPSHOT_NAME))
        catalog, names, self._read, whole = snapshot.load(self._directory)
        prefix = names.prefix(self._namespace)
        ours = [(name, stamp) for name, stamp in catalog.uses() if name[:2] == prefix]
        ours.sort(key=itemgetter(1))
        self.whole = there and whole and len(ours) <= _MOST_KNOWN
        return deque(name[2:] for name, _ in ours[-_MOST_KNOWN:])

    def _has_missed(self, listed: Set[tuple[bytes, int]]) -> bool:
        """Whether journals were deleted before they were read to the end: the snapshot has them."""
        if (seen := self._look_at_snapshot()) != self._snapshot:
            self._snapshot, self._covered = seen, snapshot.covered(self._directory)
        for member, end in self._covered.items():
            read = self._read.get(member, (1, 0))
            if member != self._member and end > read and (member, read[0]) not in listed:
                return True
        return False

    def _look_at_snapshot(self) -> tuple[int, int] | None:
        with suppress(FileNotFoundError):
            found = nofollow.lstat(os.path.join(self._directory, snapshot.SNAPSHOT_NAME))
            return found.st_ino, found.st_mtime_ns
        return None

    def _news_of(self, piece: Piece) -> Iterator[News]:
        ours = piece.namespace == self._namespace
        for record in filter(None, piece.records):
            if record.op == Op.EVICTED and record.key.startswith(self._digest):
                yield record.key[len(self._digest) :], False
            elif ours and record.op in (Op.STORED, Op.GONE):
                yield record.key, record.op == Op.STORED
