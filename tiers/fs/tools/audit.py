"""The books of a root from outside: what they say, and what is wrong with them.

Nothing is changed here. While a server lives its keeper tends the books, and what looks wrong
may be its work in progress, so damage is sought only where no server lives.
"""

from __future__ import annotations

import enum
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.admission import SPARE_NAME, spare_cost
from kvstrata.tiers.fs.budget.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    decode,
    parse_name,
    read_namespace,
)
from kvstrata.tiers.fs.budget.keeper.walk import BOOKS_NAME
from kvstrata.tiers.fs.budget.lease import Watch, dead_leases
from kvstrata.tiers.fs.budget.ledger import LEDGER_NAME, Books, LedgerBusy
from kvstrata.tiers.fs.files import nofollow

_LOCK_WITHIN_S = 5.0


class Remedy(enum.Enum):
    """What puts a damage right."""

    BOOK = "a scan by a keeper"
    REMOVE = "the file is of no use"
    BOOK_AND_REMOVE = "a keeper reads what can be read, then the file is of no use"


class Damage(NamedTuple):
    """Something wrong with the books: which file, what, and the remedy.

    With `remains` it is what every server leaves that is killed, and no damage: the next start
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
        living: the servers in the ledger that live.
        damage: what is wrong; empty while a server lives.
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
    books, damaged, spares = Books(), False, (0, 0)
    with suppress(FileNotFoundError), _locked(ledger) as raw:
        books, spares = Books.decode(raw), _spares(spare)
        damaged = raw != b"" and books.encode() != raw
    watch = Watch(directory)
    living = frozenset(s for s, row in books.rows.items() if not watch.is_dead(s, row.beat))
    if living:
        return Audit(books, living, ())
    if damaged:
        damage.append(Damage(ledger, "ledger: damaged", Remedy.BOOK))
    damage += _leases(directory, books)
    damage += _journals(directory, watch)
    counted = (books.spare_bytes, books.spare_files)
    if books.known and spares != counted:
        reason = "spare: {1} files of {0} bytes, the ledger has {3} of {2}".format(
            *spares, *counted
        )
        damage.append(Damage(spare, reason, Remedy.BOOK, True))
    if not snapshot.is_sound(directory):
        path = os.path.join(directory, snapshot.SNAPSHOT_NAME)
        damage.append(Damage(path, "snapshot: damaged", Remedy.BOOK))
    return Audit(books, living, tuple(damage))


@contextmanager
def _locked(path: str) -> Iterator[bytes]:
    """The ledger's content; it does not change meanwhile."""
    fd = nofollow.open(path, os.O_RDONLY)
    with os.fdopen(fd, "rb") as file:
        deadline = time.monotonic() + _LOCK_WITHIN_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LedgerBusy(f"{path} is locked") from None
                time.sleep(0.0005)
        yield file.read(2**20)


def _spares(directory: str) -> tuple[int, int]:
    """Bytes and files in the directory of spares, as the keeper counts them."""
    with suppress(FileNotFoundError):
        costs = [spare_cost(name) or 0 for name in nofollow.listdir(directory)]
        return sum(costs), len(costs)
    return 0, 0


def _leases(directory: str, books: Books) -> Iterator[Damage]:
    """Locks of servers that were killed."""
    for server, path in dead_leases(directory, books.rows):
        if server in books.rows:
            yield Damage(path, "lease: of a server that was killed", Remedy.BOOK, True)
        else:
            yield Damage(path, "lease: of a server that nobody knows", Remedy.REMOVE, True)


def _journals(directory: str, watch: Watch) -> Iterator[Damage]:
    """Journals of dead servers that cannot be read to their end, which a keeper never drops."""
    for name in sorted(nofollow.listdir(directory)):
        parsed = parse_name(name)
        if parsed is None or not watch.is_dead(parsed[0], 0):
            continue
        path = os.path.join(directory, name)
        with suppress(FileNotFoundError):
            if (whole := _is_whole(path)) is not True:
                reason = "journal: damaged" if whole is False else "journal: its end is cut off"
                yield Damage(path, reason, Remedy.BOOK_AND_REMOVE, whole is None)


def _is_whole(path: str) -> bool | None:
    """Whether a journal has a header, and after it sound records and nothing else.

    None if all that is wrong is that its last record is cut off, as a kill may leave it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        fd = nofollow.open(path, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            header, raw = file.read(HEADER_BYTES), file.read()
    except FileNotFoundError:
        raise
    except OSError:
        return False
    if len(header) < HEADER_BYTES:
        return None
    sound = all(record is not None for record in decode(raw))
    if read_namespace(header) is None or not sound:
        return False
    return True if len(raw) % RECORD_BYTES == 0 else None
