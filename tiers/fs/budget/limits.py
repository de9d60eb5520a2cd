"""The limits of a disk budget, what a file costs, and how much room is left.

Between the low mark and the limit lie two bands: stores take new room up to the high mark
and recycle above it; what is left above the high mark is for pages that no recycled file
fits. Where the high mark was passed, eviction goes down to the low mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.machine.disk import UNBOUNDED
from kvstrata.tiers.options import format_bytes, parse_bytes

BLOCK = 4096  # bytes: what ext4, XFS and tmpfs allocate in
_MOST_BYTES = 2**40

# Shares of the limit. The gap must hold what is stored while the keeper sleeps (50 ms: at
# 2 GB/s 100 MB, 2 % of 5 GB) and what is evicted at once must stay a small part of the cache. The
# first stores after a rest may have to wait for a keeper elsewhere: it looks four times a second.
HIGH, LOW = Fraction(98, 100), Fraction(96, 100)
_LIMIT = Fraction(1)

_AHEAD_BYTES = 64 * 2**20
BOOKS_BYTES = 2**16  # of the disk that pages leave to the books, without which nothing is evicted

# What stays free where nothing else is asked for: a share of the disk, but not less than so many
# bytes, which programs on a small disk need as well; and so that a disk of a few GiB, or a tmpfs,
# is of use, not more than another share.
_FLOOR_SHARE, _FLOOR_BYTES, _MOST_FLOOR_SHARE = Fraction(1, 20), 2**30, Fraction(1, 10)

_SHARE = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?) ?%")


def file_cost(size: int) -> int:
    """What a page file of `size` bytes takes from the budget, in bytes.

    No file counts for more than 1 TiB, since a sparse one may claim any size.

    Its blocks, and one block for its directory: below some millions of files nearly each file
    has a directory of its own.
    """
    return -(-min(size, _MOST_BYTES) // BLOCK) * BLOCK + BLOCK


class Limits(NamedTuple):
    """Bounds on everything below a root; 0 is no bound.

    Attributes:
        max_bytes: most bytes that files may take.
        max_files: most files.
        min_free_bytes: least bytes that must stay free on the file system.
    """

    max_bytes: int = 0
    max_files: int = 0
    min_free_bytes: int = 0

    def __bool__(self) -> bool:
        return any(self)

    @property
    def counted(self) -> bool:
        """Whether one must know what is below the root; how much is free the kernel knows."""
        return bool(self.max_bytes or self.max_files)

    @property
    def rotate_bytes(self) -> int:
        """How long a journal may become: long where that is a small part of the budget."""
        return min(2**20, max(2**15, self.max_bytes // 1024)) if self.max_bytes else 2**20

    def room(self, usage: Usage, mark: Fraction = _LIMIT) -> Room:
        """What is left below `mark`, a share of each limit."""
        nbytes = files = UNBOUNDED
        if self.max_bytes:
            nbytes = int(self.max_bytes * mark) - usage.nbytes
        if self.min_free_bytes:
            nbytes = min(nbytes, usage.free_bytes - int(self.min_free_bytes * (2 - mark)))
        if self.max_files:
            files = int(self.max_files * mark) - usage.files
        return Room(nbytes, files)

    def room_to_write(self, usage: Usage, mark: Fraction = _LIMIT) -> Room:
        """What new files may take: what is left below `mark`, and on the disk."""
        left = self.room(usage, mark)
        return left._replace(nbytes=min(left.nbytes, usage.free_bytes - BOOKS_BYTES))

    def budget(self, usage: Usage) -> int:
        """Bytes that the files may take in all as things are; 0 if there is no limit."""
        left = self.room(usage).nbytes
        return 0 if left >= UNBOUNDED else max(0, usage.nbytes + left)

    def stricter_than(self, own: Limits) -> str:
        """In which of these values there is less room than with `own`, in words."""
        texts: tuple[Callable[[int], str], ...] = (format_bytes, str, format_bytes)
        return ", ".join(
            f"{name} {text(value)} ({text(ours) if ours else 'none'} here)"
            for name, value, ours, text in zip(self._fields, self, own, texts, strict=True)
            if value != ours
        )


def smallest(limits: Iterable[Limits]) -> Limits:
    """The limits that satisfy all."""
    found = list(limits)
    return Limits(
        min((each.max_bytes for each in found if each.max_bytes), default=0),
        min((each.max_files for each in found if each.max_files), default=0),
        max((each.min_free_bytes for each in found), default=0),
    )


def default_floor(total: int) -> int:
    """The default of `min_free_bytes` on a file system of `total` bytes."""
    least = max(int(total * _FLOOR_SHARE), _FLOOR_BYTES)
    return min(least, int(total * _MOST_FLOOR_SHARE))


def parse_space(key: str, value: object) -> int | Fraction:
    """Bytes, or the share of the file system that "10%" stands for.

    Raises:
        TierConfigError: neither a size nor a percentage above 0 and below 100.
    """
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return parse_bytes(key, value)
    match = _SHARE.fullmatch(value.strip())
    share = Fraction(match[1]) / 100 if match else Fraction(0)
    if share == 0:
        raise TierConfigError(
            f"{key}: {value!r} is no share of a disk; give more than 0% and less than 100%, "
            'for example "10%" or "2.5%"'
        )
    return share


class Usage(NamedTuple):
    """What is taken now: bytes and files of the budget, and the file system's free bytes.

    `free_bytes` has what was reserved taken off already.
    """

    nbytes: int
    files: int
    free_bytes: int


def spares_wanted(usage: Usage) -> int:
    """Bytes of victims to be claimed ahead of the stores that will overwrite them.

    While somebody stores the keeper looks every 50 ms, so 64 MiB feed 1.3 GB/s, also where it
    cannot be woken; in a small budget they are at most 5 % of what is there.
    """
    return min(_AHEAD_BYTES, usage.nbytes // 20)


class Room(NamedTuple):
    """What is left below a mark, in bytes and files; negative above it."""

    nbytes: int
    files: int

    @property
    def is_passed(self) -> bool:
        """Whether more is taken than that."""
        return self.nbytes < 0 or self.files < 0

    def holds(self, nbytes: int) -> bool:
        """Whether one more file of that cost fits."""
        return nbytes <= self.nbytes and self.files >= 1
