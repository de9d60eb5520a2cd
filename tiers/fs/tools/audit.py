"""The books of a root from outside: what they say, and what is wrong with them.

Nothing is changed here. While a member lives its keeper tends the books, and what looks wrong
may be its work in progress, so damage is sought only where no member lives.
"""

from __future__ import annotations

import enum
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.admission import spare_costs
from kvstrata.tiers.fs.budget.journal import Positions, journal_name, journals, read_on
from kvstrata.tiers.fs.budget.lease import Watch, dead_leases
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, LEDGER_NAME, SPARE_NAME, Books, lock
from kvstrata.tiers.fs.files import nofollow

_LOCK_WITHIN_S = 5.0


class Remedy(enum.Enum):
    """What puts a damage right."""

    BOOK = "a scan by a keeper"
    REMOVE = "the file is of no use"
    BOOK_AND_REMOVE = "a keeper reads what can be read, then the file is of no use"


class Damage(NamedTuple):
    """Something wrong with the books: which file, what, and the remedy.

    With `remains` it is what every member leaves that is killed, and no damage: the next start
    puts it right.
    """

    path: str
    reason: str
    remedy: Remedy
    remains: bool = False


@dataclass(frozen=True, slots=True)
class Audit:
    """What the books say.

    Attributes:
        books: what the ledger says; None where there are no books, or something in their way.
        living: the members in the ledger that live.
        damage: what is wrong; empty while a member lives.
    """

    books: Books | None
    living: frozenset[bytes]
    damage: tuple[Damage, ...]


def audit(root: str) -> Audit:
    """Read the books of `root`.

    Raises:
        OSError: they cannot be read, or the ledger stays locked for seconds.
    """
    directory = os.path.join(os.path.realpath(root), BOOKS_NAME)
    if not nofollow.lexists(directory):
        return Audit(None, frozenset(), ())
    ledger, spare = (os.path.join(directory, name) for name in (LEDGER_NAME, SPARE_NAME))
    damage: list[Damage] = []
    for path, right, what in ((ledger, stat.S_ISREG, "ledger"), (spare, stat.S_ISDIR, "spare")):
        with suppress(FileNotFoundError):
            if not right(nofollow.lstat(path).st_mode):
                damage.append(Damage(path, f"{what}: something else is there", Remedy.REMOVE))
    if damage:
        return Audit(None, frozenset(), tuple(damage))
    books, damaged, costs = Books(), False, list[int]()
    with suppress(FileNotFoundError), _locked(ledger) as raw:
        books, costs = Books.decode(raw), spare_costs(spare)
        damaged = raw != b"" and books.encode() != raw
    watch = Watch(directory)
    living = frozenset(s for s, row in books.rows.items() if not watch.is_dead(s, row.beat))
    if living:
        return Audit(books, living, ())
    if damaged:
        damage.append(Damage(ledger, "ledger: damaged", Remedy.BOOK))
    damage += _leases(directory, books)
    damage += _journals(directory, watch)
    found, known = (len(costs), sum(costs)), (books.spare_files, books.spare_bytes)
    if books.known and found != known:
        reason = "spare: {} files of {} bytes, the ledger has {} of {}".format(*found, *known)
        damage.append(Damage(spare, reason, Remedy.BOOK, True))
    if not snapshot.load(directory)[-1]:
        path = os.path.join(directory, snapshot.SNAPSHOT_NAME)
        damage.append(Damage(path, "snapshot: damaged", Remedy.BOOK))
    return Audit(books, living, tuple(damage))


@contextmanager
def _locked(path: str) -> Iterator[bytes]:
    """The ledger's content; it does not change meanwhile."""
    with os.fdopen(nofollow.open(path, os.O_RDONLY), "rb") as file:
        lock(file.fileno(), path, fcntl.LOCK_SH, _LOCK_WITHIN_S)
        yield file.read(2**20)


def _leases(directory: str, books: Books) -> Iterator[Damage]:
    """Locks of members that were killed."""
    for member, path in dead_leases(directory, books.rows):
        known = member in books.rows
        what, remedy = ("was killed", Remedy.BOOK) if known else ("nobody knows", Remedy.REMOVE)
        yield Damage(path, f"lease: of a member that {what}", remedy, True)


def _journals(directory: str, watch: Watch) -> Iterator[Damage]:
    """Journals of dead members that cannot be read to their end, which a keeper never drops."""
    for member, number in journals(directory):
        path = os.path.join(directory, journal_name(member, number))
        if (
            watch.is_dead(member, 0)
            and (whole := _is_whole(directory, member, number)) is not True
            and nofollow.lexists(path)
        ):
            reason = "journal: damaged" if whole is False else "journal: its end is cut off"
            yield Damage(path, reason, Remedy.BOOK_AND_REMOVE, whole is None)


def _is_whole(directory: str, member: bytes, number: int) -> bool | None:
    """Whether a journal has a header, and after it sound records and nothing else.

    None if all that is wrong is that its last record is cut off, as a kill may leave it.
    """
    read: Positions = {}
    while piece := read_on(directory, member, number, read):
        if piece.rest < 0:
            return None
        if piece.namespace is None or None in piece.records:
            return False
        if piece.is_last:
            return True if piece.rest == 0 else None
        read[member] = piece.end
    return False
