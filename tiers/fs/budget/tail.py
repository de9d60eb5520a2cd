"""News of pages: what the other servers on a root stored and what was evicted.

Read from the same journals that the keeper reads, by each server for itself.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress

from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    Op,
    decode,
    evicted_key,
    journal_name,
    parse_name,
    read_namespace,
)
from kvstrata.tiers.fs.files import nofollow

_READ_BYTES = 2**16 - 2**16 % RECORD_BYTES  # of one journal at once
_MOST_KNOWN = 2**19  # pages told at the start: those used last

News = tuple[bytes, bool]  # an offload key, and whether its page is there now


class Follower:
    """The news for one server of one namespace. One thread only; blocks on the disk."""

    def __init__(self, directory: str, server: bytes, namespace: str) -> None:
        self._directory = directory
        self._server = server
        self._namespace = namespace
        self._digest = evicted_key(namespace, b"")
        self._read: dict[bytes, tuple[int, int]] = {}
        self._backlog: deque[bytes] | None = None  # what the snapshot holds and was not told

    def news(self, most: int) -> list[News]:
        """About `most` pages that came or went since the last call, in their order.

        Raises:
            OSError: the books cannot be read.
        """
        if self._backlog is None:
            self._backlog = self._start()
        if self._backlog:
            count = min(most, len(self._backlog))
            return [(self._backlog.popleft(), True) for _ in range(count)]
        found: list[News] = []
        journals = sorted(filter(None, map(parse_name, nofollow.listdir(self._directory))))
        behind: set[bytes] = {self._server}
        for server, number in journals:
            if server in behind:
                continue
            if len(found) >= most or self._follow(server, number, found):
                behind.add(server)
        for server in self._read.keys() - {server for server, _ in journals}:
            del self._read[server]
        return found

    def _start(self) -> deque[bytes]:
        """The keys of the snapshot, in the order of their use."""
        catalog, names, self._read = snapshot.load(self._directory)
        prefix = names.prefix(self._namespace)
        keys: list[bytes] = []
        stamps: list[int] = []
        for chunk, when, _, _ in catalog.chunks(2**14):
            for name, stamp in zip(chunk, when, strict=True):
                if name[:2] == prefix:
                    keys.append(name[2:])
                    stamps.append(stamp)
        order = sorted(range(len(keys)), key=stamps.__getitem__)
        return deque(keys[position] for position in order[-_MOST_KNOWN:])

    def _follow(self, server: bytes, number: int, found: list[News]) -> bool:
        """Read on in a journal; True if that was not all of it."""
        known, start = self._read.get(server, (0, 0))
        if number < known:
            return False
        if number > known:
            start = 0
        with suppress(OSError):  # the keeper deletes what its snapshot covers
            path = os.path.join(self._directory, journal_name(server, number))
            fd = nofollow.open(path, os.O_RDONLY)
            try:
                start = max(start, HEADER_BYTES)
                size = os.fstat(fd).st_size
                if size - start < RECORD_BYTES:
                    return False
                ours = read_namespace(os.pread(fd, HEADER_BYTES, 0)) == self._namespace
                raw = os.pread(fd, _READ_BYTES, start)
            finally:
                os.close(fd)
            end = start + len(raw) - len(raw) % RECORD_BYTES
            self._read[server] = (number, end)
            for record in decode(raw):
                if record is None:
                    continue
                if record.op == Op.EVICTED and record.key.startswith(self._digest):
                    found.append((record.key[len(self._digest) :], False))
                elif ours and record.op in (Op.STORED, Op.GONE):
                    found.append((record.key, record.op == Op.STORED))
            return size - end >= RECORD_BYTES
        return False
