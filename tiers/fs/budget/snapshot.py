"""The snapshot: the catalog as the keeper last wrote it, and how far it had read the journals.

    magic, length of the header, header (JSON), its checksum
    then pieces: count, length of the names, lengths, names, stamps, blocks, depths, checksum

A piece that is damaged ends the reading: what follows is found again by the scan.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
from array import array
from contextlib import suppress
from typing import BinaryIO

import xxhash

from kvstrata.tiers.fs.budget.catalog import Catalog
from kvstrata.tiers.fs.budget.journal import Positions
from kvstrata.tiers.fs.budget.names import NAMESPACE, Names
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.temporary import temporary_name

SNAPSHOT_NAME = "snapshot"

_MAGIC = b"kvsnaps1"
_START = struct.Struct("<8sI")
_PIECE = struct.Struct("<II")
# Files in one piece: small pieces let go of the interpreter lock between them.
_PIECE_FILES = 2**14
_MAX_HEADER = 2**24
_MAX_NAMES = _PIECE_FILES * 512
_MAX_STAMP = 2**62  # in the year 2116

# What a hostile file makes the parsing raise: an infinite number, nesting, a list for an object.
_UNREADABLE = (
    *(OSError, ValueError, struct.error, KeyError, TypeError, AttributeError),
    *(RecursionError, OverflowError),
)


def save(directory: str, catalog: Catalog, names: Names, read: Positions, mode: int) -> int:
    """Write the snapshot and put it in the place of the last one; returns its size in bytes.

    Raises:
        OSError: it could not be written; the last one is still there.
    """
    journals = {member.hex(): list(position) for member, position in read.items()}
    header = json.dumps({"namespaces": names.namespaces, "journals": journals}).encode()
    temporary = os.path.join(directory, temporary_name())
    fd = nofollow.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            _write(file, _START.pack(_MAGIC, len(header)) + header)
            for keys, *columns in catalog.chunks(_PIECE_FILES):
                lengths, joined = array("H", map(len, keys)), b"".join(keys)
                content = b"".join([lengths.tobytes(), joined, *(bytes(c) for c in columns)])
                _write(file, _PIECE.pack(len(keys), len(joined)) + content)
            size = file.tell()
        nofollow.rename(temporary, os.path.join(directory, SNAPSHOT_NAME))
    except BaseException:
        with suppress(OSError):
            nofollow.unlink(temporary)
        raise
    return size


def load(directory: str) -> tuple[Catalog, Names, Positions, bool]:
    """What the snapshot holds, and whether that is all of it; nothing where there is none."""
    catalog, names, read = Catalog(), Names(), Positions()
    try:
        fd = nofollow.open(os.path.join(directory, SNAPSHOT_NAME), os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            names, read = _read_header(file)
            while piece := file.read(_PIECE.size):
                _take_piece(file, piece, catalog)
    except FileNotFoundError:
        pass
    except _UNREADABLE:
        # cut off or hostile: what was read so far is well-formed
        return catalog, names, read, False
    return catalog, names, read, True


def covered(directory: str) -> Positions:
    """How far the snapshot covers the journals; nothing where none is to be believed."""
    with suppress(*_UNREADABLE):
        fd = nofollow.open(os.path.join(directory, SNAPSHOT_NAME), os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            return _read_header(file)[1]
    return {}


def _read_header(file: BinaryIO) -> tuple[Names, Positions]:
    start = file.read(_START.size)
    magic, length = _START.unpack(start)
    if magic != _MAGIC or length > _MAX_HEADER:
        raise ValueError("it is no snapshot")
    header = json.loads(_read(file, start, length))
    namespaces = header["namespaces"]
    if not all(NAMESPACE.fullmatch(name) for name in namespaces):
        raise ValueError("a namespace is none")
    journals = header["journals"].items()
    return Names(namespaces), {bytes.fromhex(m): (int(n), int(size)) for m, (n, size) in journals}


def _take_piece(file: BinaryIO, piece: bytes, catalog: Catalog) -> None:
    count, n_joined = _PIECE.unpack(piece)
    if not 0 < count <= _PIECE_FILES or n_joined > _MAX_NAMES:
        raise ValueError("a piece is too large")
    content = _read(file, piece, 2 * count + n_joined + 16 * count)
    lengths = array("H", content[: 2 * count])
    ends = list(itertools.accumulate(lengths))
    base = 2 * count + n_joined
    joined = content[2 * count : base]
    if ends[-1] != n_joined:
        raise ValueError("the names do not fill their place")
    keys = [joined[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    stamps = content[base : base + 8 * count]
    blocks = content[base + 8 * count : base + 12 * count]
    if len(set(keys)) != count or any(key in catalog for key in keys):
        raise ValueError("a name comes twice")
    if not 0 <= min(array("q", stamps)) <= max(array("q", stamps)) < _MAX_STAMP:
        raise ValueError("a stamp is no time")
    catalog.extend(keys, stamps, blocks, content[base + 12 * count :])


def _write(file: io.FileIO, content: bytes) -> None:
    view = memoryview(content + xxhash.xxh3_64_digest(content))
    while view:
        view = view[file.write(view) :]


def _read(file: BinaryIO, start: bytes, length: int) -> bytes:
    """`length` bytes, checked together with the `start` that came before them."""
    content = file.read(length)
    if xxhash.xxh3_64_digest(start + content) != file.read(8):
        raise ValueError("the checksum does not fit")
    return content
