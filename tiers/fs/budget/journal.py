"""Journals: what a member did to files, appended by it alone and read by all.

    <root>/.kvstrata/<member, 32 hex digits>.<number>.journal

A file is a header with the member's namespace and then records of `RECORD_BYTES`, each with a
checksum; a record that does not fit it is passed over. When a file is long enough the member
begins the next. The file is opened for each batch and closed after it, which is what makes
its content visible to other hosts over NFS.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from kvstrata.tiers.fs.budget.names import NAMESPACE
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.page.identity import MAX_HASH_BYTES

_DIGEST_BYTES = 6  # of a namespace
_MAX_KEY = MAX_HASH_BYTES + 4 + _DIGEST_BYTES
_BODY = struct.Struct(f"<BBIQI{_MAX_KEY}s")
_RECORD = struct.Struct(f"{_BODY.size}sI")
RECORD_BYTES = _RECORD.size
_HEADER = struct.Struct("<8s160s")
HEADER_BYTES = _HEADER.size
_MAGIC = b"kvjourn1"
_NAME = re.compile(r"([0-9a-f]{32})\.([0-9]{8})\.journal")
_MAX_JOURNAL = 2**28  # bytes; a member begins the next one long before
_READ_BYTES = 2**16 - 2**16 % RECORD_BYTES  # at once: the keeper books them under the lock

Positions = dict[bytes, tuple[int, int]]  # by member: number and length of the journal read


class Op(enum.IntEnum):
    """What happened to a file."""

    STORED = 1
    USED = 2
    GONE = 3
    QUARANTINED = 4  # a bad file was moved to the quarantine of the namespace
    PROMISED = 5  # used, and about to be loaded
    EVICTED = 6  # by the keeper


class Record(NamedTuple):
    """One entry.

    Attributes:
        op: what happened.
        key: the page's offload key, that of `evicted_key` for EVICTED; empty for QUARANTINED.
        blocks: cost of the file in units of `BLOCK`; 0 where it does not matter.
        access: number that the pages of one access share, below 2**64; see `stamps`.
        depth: end token of the page, 0 if unknown.
    """

    op: int
    key: bytes
    blocks: int = 0
    access: int = 0
    depth: int = 0

    def encode(self) -> bytes:
        """`RECORD_BYTES` bytes."""
        body = _BODY.pack(self.op, len(self.key), self.blocks, self.access, self.depth, self.key)
        return _RECORD.pack(body, zlib.crc32(body))


def evicted_key(namespace: str, key: bytes) -> bytes:
    """What EVICTED has in place of a key: the keeper evicts from all namespaces."""
    return bytes.fromhex(namespace[-2 * _DIGEST_BYTES :]) + key


def decode(raw: bytes) -> Iterator[Record | None]:
    """The whole records in `raw`; None for one that is damaged."""
    whole = len(raw) - len(raw) % RECORD_BYTES
    for body, checksum in _RECORD.iter_unpack(raw[:whole]):
        if zlib.crc32(body) != checksum:
            yield None
            continue
        op, length, blocks, access, depth, key = _BODY.unpack(body)
        yield Record(op, key[:length], blocks, access, depth) if length <= _MAX_KEY else None


def journal_name(member: bytes, number: int) -> str:
    """The file's name."""
    return f"{member.hex()}.{number:08d}.journal"


def parse_name(name: str) -> tuple[bytes, int] | None:
    """(member, number) of a journal's name, None for another file's."""
    match = _NAME.fullmatch(name)
    return (bytes.fromhex(match[1]), int(match[2])) if match else None


def read_namespace(header: bytes) -> str | None:
    """The namespace in a journal's first `HEADER_BYTES`; None if there is none to be believed."""
    if len(header) < HEADER_BYTES:
        return None
    magic, raw = _HEADER.unpack_from(header)
    namespace = raw.rstrip(b"\0").decode("ascii", "replace")
    return namespace if magic == _MAGIC and NAMESPACE.fullmatch(namespace) else None


class Piece(NamedTuple):
    """Some of a journal.

    Attributes:
        namespace: the member's; None if there is none to be believed.
        records: in their order; None for one that is damaged.
        end: the journal's number, and the position behind the last of the records.
        rest: bytes that follow; fewer than none where the header is cut off.
        mtime: when the journal was written last, in seconds since the epoch.
    """

    namespace: str | None
    records: Sequence[Record | None]
    end: tuple[int, int]
    rest: int
    mtime: float

    @property
    def is_last(self) -> bool:
        """Whether no whole record follows."""
        return self.rest < RECORD_BYTES


def journals(directory: str) -> list[tuple[bytes, int]]:
    """Member and number of each journal, sorted.

    Raises:
        OSError: the directory cannot be read.
    """
    return sorted(filter(None, map(parse_name, nofollow.listdir(directory))))


def read_on(
    directory: str, member: bytes, number: int, read: Mapping[bytes, tuple[int, int]]
) -> Piece | None:
    """What a journal says behind the position in `read`, or the beginning of that.

    None if `read` is in a later journal of the member already, or this one cannot be read.
    """
    known, start = read.get(member, (0, 0))
    if number < known:
        return None
    path = os.path.join(directory, journal_name(member, number))
    with suppress(OSError):
        fd = nofollow.open(path, os.O_RDONLY)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_JOURNAL:
                raise OSError(errno.EINVAL, "no journal", path)
            namespace = read_namespace(os.pread(fd, HEADER_BYTES, 0))
            start = max(HEADER_BYTES, min(start, status.st_size) if number == known else 0)
            records = list(decode(os.pread(fd, _READ_BYTES, start)))
        finally:
            os.close(fd)
        end = start + len(records) * RECORD_BYTES
        return Piece(namespace, records, (number, end), status.st_size - end, status.st_mtime)
    return None


def unread(
    directory: str, listed: Iterable[tuple[bytes, int]], read: Mapping[bytes, tuple[int, int]]
) -> Iterator[tuple[bytes, Piece]]:
    """Member and next piece of each of the listed journals that `read` does not cover.

    Whoever takes a piece in puts its `end` into `read`. A member's next journal is not begun
    before the one in front of it was read to its end.
    """
    behind: set[bytes] = set()
    for member, number in listed:
        piece = None if member in behind else read_on(directory, member, number, read)
        if piece is not None and piece.records:
            if not piece.is_last:
                behind.add(member)
            yield member, piece


class Journal:
    """The journal of one member. One thread only; blocks on the disk."""

    def __init__(
        self, directory: str, member: bytes, namespace: str, mode: int, rotate_bytes: int
    ) -> None:
        self._directory = directory
        self._member = member
        self._header = _HEADER.pack(_MAGIC, namespace.encode("ascii"))
        self._mode = mode
        self._rotate_bytes = rotate_bytes
        self._number = 1
        self._length = 0

    @property
    def end(self) -> tuple[int, int]:
        """Number of the last file, and its length in bytes."""
        return self._number, self._length

    def append(self, records: Iterable[Record]) -> None:
        """Add records; after an error none of them was added, and one may try again.

        Raises:
            OSError: they could not be written.
        """
        content = b"".join(record.encode() for record in records)
        if not content:
            return
        if self._length >= self._rotate_bytes:
            self._rotate()
        fd = self._open()
        try:
            if self._length == 0:
                content = self._header + content
            position = self._length
            while content:
                written = os.pwrite(fd, content, position)
                content, position = content[written:], position + written
        finally:
            os.close(fd)
        self._length = position

    def _rotate(self) -> None:
        self._number, self._length = self._number + 1, 0

    def _open(self) -> int:
        """The last file, or the next one where somebody deleted that or cut it off."""
        if self._length:
            path = self._path()
            with suppress(FileNotFoundError):
                if nofollow.lstat(path).st_size >= self._length:
                    # not made anew: an empty one in its place would pass for damaged
                    return nofollow.open(path, os.O_WRONLY)
            self._rotate()
        return nofollow.open_or_create(self._path(), os.O_WRONLY, self._mode)

    def _path(self) -> str:
        return os.path.join(self._directory, journal_name(self._member, self._number))
