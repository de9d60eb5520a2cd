"""The keeper: of all servers on a root the one that holds the lease, keeps the books and evicts."""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress

from kvstrata.tiers.fs import nofollow
from kvstrata.tiers.fs.space import snapshot
from kvstrata.tiers.fs.space.admission import SPARE_NAME, spare_cost
from kvstrata.tiers.fs.space.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    Op,
    Record,
    decode,
    journal_name,
    parse_name,
    read_namespace,
)
from kvstrata.tiers.fs.space.ledger import Books, Ledger, Row
from kvstrata.tiers.fs.space.limits import (
    BLOCK,
    HIGH,
    LOW,
    Limits,
    room,
    rotate_bytes,
    spares_wanted,
)
from kvstrata.tiers.fs.space.presence import Watch, presence_path
from kvstrata.tiers.fs.space.walk import Walked, walk

RESCAN_S = 600.0  # between two scans for what was changed by others
_FOLD_BYTES = 2**18  # journal read at once under the lock: some milliseconds
_MAX_JOURNAL = 2**28  # bytes; a server begins the next one long before
_CLAIM_FILES = 16  # renamed at once under the lock: some milliseconds
_UNLINK_FILES = 64  # 2 MiB files take up to 4 ms each
_MAX_TOLD = 2**16  # evictions that nobody was told of yet
# Accesses whose pages may still arrive: those of one are written by two processes.
_MOST_ACCESSES = 2**12
PROTECT_S = 5.0  # a page that somebody was told is here is not evicted for so long


class Keeper:
    """The catalog of a root and what follows from it. One thread only; blocks on the disk."""

    def __init__(
        self,
        root: str,
        directory: str,
        server: bytes,
        ledger: Ledger,
        file_mode: int,
        dir_mode: int,
        protected: dict[bytes, float],
    ) -> None:
        """Take over from the last keeper: read its snapshot. A scan begins with the first work.

        `protected` says by offload key until when, on the monotonic clock, a page is spared;
        what other servers promised is added to it.
        """
        self.evicted_files = 0
        self.evicted_bytes = 0
        self.swept = 0
        self.complete = False  # a scan has seen everything, so the ledger's base is exact
        self.evicted: deque[tuple[str, bytes]] = deque(maxlen=_MAX_TOLD)  # namespace and key
        self._protected = protected
        self._root = root
        self._directory = directory
        self._spares = os.path.join(directory, SPARE_NAME)
        self._server = server
        self._ledger = ledger
        self._file_mode = file_mode
        self._dir_mode = dir_mode
        self._catalog, self._names, self._read = snapshot.load(directory)
        self._stamp = self._catalog.newest()
        self._accesses: OrderedDict[int, int] = OrderedDict()  # recent ones and their stamps
        self._walked = Walked()
        self._scan: Iterator[None] | None = None
        self._scan_due = 0.0
        self._dead_at_scan: set[bytes] = set()
        self._other = (0, 0)  # bytes and files that cannot be evicted; the books not among them
        self._moved = (0, 0)  # the part of it that came after the scan began
        self._meta = (0, 0)  # bytes and files of the books
        self._watch = Watch(directory)
        self._saved_at = 0  # bytes of the journals at the last snapshot
        self._hosts: set[str] = set()
        self._limits = Limits()
        self._left: list[str] = []  # directories that victims were taken from

    def __len__(self) -> int:
        return len(self._catalog)

    def work(self, slice_s: float) -> bool:
        """Do what is due, the scan for at most `slice_s` seconds; True if more is due.

        Raises:
            OSError: the books cannot be read or written.
        """
        more = self._fold()
        self._scan_some(slice_s)
        more |= self._make_room()
        self._save_if_due()
        return more

    @property
    def scanning(self) -> bool:
        """Whether a scan is under way or due at once."""
        return self._scan is not None or self._scan_due == 0.0

    def finish(self) -> None:
        """The server leaves: book what is there and write the snapshot.

        Raises:
            OSError: the books cannot be read or written.
        """
        while self._fold():
            pass
        self.save()

    def save(self) -> None:
        """Write the snapshot and delete the journals that it covers.

        Raises:
            OSError: it could not be written.
        """
        snapshot.save(self._directory, self._catalog, self._names, self._read, self._file_mode)
        with self._ledger.locked() as books:
            rows = set(books.rows)
        for server, numbers in self._journals().items():
            read = self._read.get(server, (0, 0))
            for number in numbers:
                path = os.path.join(self._directory, journal_name(server, number))
                last = number == read[0] and server not in rows and _size(path) <= read[1]
                if number < read[0] or last:
                    with suppress(OSError):
                        nofollow.unlink(path)
            if server not in rows and not self._journals().get(server):
                self._read.pop(server, None)
        self._saved_at = self._journal_bytes()

    def judge(self, books: Books) -> None:
        """Mark the servers that died; their reservations stay until a scan has ended."""
        for server, row in books.rows.items():
            if server != self._server and not row.dead:
                row.dead = self._watch.is_dead(server, row.beat)
                if row.dead:
                    self._scan_due = 0.0
        self._hosts = {row.host.decode("ascii", "replace") for row in books.rows.values()}

    # -- journals

    def _fold(self) -> bool:
        """Book what the journals say; True if there is more."""
        more = False
        for server, numbers in self._journals().items():
            for number in numbers:
                known, start = self._read.get(server, (0, 0))
                if number >= known:
                    more |= self._fold_file(server, number, start if number == known else 0)
        if self.complete:
            self._book_meta()
        return more

    def _fold_file(self, server: bytes, number: int, start: int) -> bool:
        path = os.path.join(self._directory, journal_name(server, number))
        try:
            fd = nofollow.open(path, os.O_RDONLY)
        except OSError:
            return False  # another keeper deleted it, or it is none
        try:
            found = os.fstat(fd)
            size = found.st_size
            start = max(start, HEADER_BYTES)
            plain = stat.S_ISREG(found.st_mode) and size <= _MAX_JOURNAL
            if size - start < RECORD_BYTES or not plain:
                return False
            namespace = read_namespace(os.pread(fd, HEADER_BYTES, 0))
            raw = os.pread(fd, _FOLD_BYTES - _FOLD_BYTES % RECORD_BYTES, start)
        finally:
            os.close(fd)
        prefix = self._names.prefix(namespace) if namespace else None
        position = start
        with self._ledger.locked() as books:
            if books.keeper != self._server:
                return False
            row = books.rows.get(server)
            for record in decode(raw):
                position += RECORD_BYTES
                fresh = row if row and (number, position) > row.booked else None
                if record is None or prefix is None:
                    if fresh is not None:
                        self._count_anew(books)
                else:
                    self._apply(record, prefix + record.key, books, fresh)
            self._read[server] = (number, position)
            if row is not None:
                row.booked = max(row.booked, (number, position))
        return size - position >= RECORD_BYTES

    def _apply(self, record: Record, name: bytes, books: Books, row: Row | None) -> None:
        """Book one record; `row` is None where the ledger knows of it already."""
        cost = record.blocks * BLOCK
        if record.op == Op.STORED:
            known = name in self._catalog
            grew = self._catalog.add(name, cost, self._stamp_of(record), record.depth)
            if row is not None:
                row.reserved_bytes = max(0, row.reserved_bytes - cost)
                row.reserved_files = max(0, row.reserved_files - 1)
                books.base_bytes += grew
                books.base_files += not known
        elif record.op == Op.USED:
            self._protected.pop(record.key, None)
            self._catalog.use(name, self._stamp_of(record), record.depth)
        elif record.op == Op.PROMISED:
            self._protected[record.key] = time.monotonic() + PROTECT_S
            self._catalog.use(name, self._stamp_of(record))
        elif record.op == Op.GONE:
            self._protected.pop(record.key, None)
            path = self._names.path(name)
            if path is not None and not nofollow.lexists(os.path.join(self._root, path)):
                self._forget(name, books)
        elif record.op == Op.QUARANTINED and row is not None:
            self._moved = (self._moved[0] + cost, self._moved[1] + 1)
            self._other = (self._other[0] + cost, self._other[1] + 1)
            books.base_bytes += cost
            books.base_files += 1

    def _count_anew(self, books: Books) -> None:
        """What a server did cannot be read: let nothing in until a scan has seen it."""
        books.known = self.complete = False
        self._scan, self._scan_due = None, 0.0

    def _forget(self, name: bytes, books: Books) -> None:
        """The file is not there any more, and not through us."""
        known = name in self._catalog
        cost = self._catalog.remove(name)
        if known and self.complete:  # before that the ledger may know already
            books.base_bytes -= cost
            books.base_files -= 1

    def _stamp_of(self, record: Record) -> int:
        """The order of arrival is the order of use, whatever the clocks do."""
        stamp = self._accesses.get(record.access)
        if stamp is None:
            stamp = self._stamp = max(self._stamp + 1, time.time_ns())
            self._accesses[record.access] = stamp
            if len(self._accesses) > _MOST_ACCESSES:
                self._accesses.popitem(last=False)
        return stamp

    def _journals(self) -> dict[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for name in sorted(nofollow.listdir(self._directory)):
            parsed = parse_name(name)
            if parsed is not None:
                found.setdefault(parsed[0], []).append(parsed[1])
        return found

    def _journal_bytes(self) -> int:
        return sum(
            _size(os.path.join(self._directory, journal_name(server, number)))
            for server, numbers in self._journals().items()
            for number in numbers
        )

    def _save_if_due(self) -> None:
        # writing a snapshot costs as much as it is long
        grown = self._journal_bytes() - self._saved_at
        if grown > max(rotate_bytes(self._limits), 64 * len(self._catalog)):
            self.save()

    # -- scans

    def _scan_some(self, slice_s: float) -> None:
        now = time.monotonic()
        if self._scan is None:
            if now < self._scan_due:
                return
            with self._ledger.locked() as books:
                self.judge(books)
                self._dead_at_scan = {server for server, row in books.rows.items() if row.dead}
            self._walked, self._moved = Walked(), (0, 0)
            self._catalog.begin_scan()
            self._scan = walk(self._root, self._names, self._walked, self._seen, self._is_writing)
            self._scan_due = now + RESCAN_S
        for _ in self._scan:
            if time.monotonic() - now > slice_s:
                return
        self._scan = None
        if not self._fold():
            self._end_scan()
        else:
            self._scan_due = 0.0

    def _seen(self, name: bytes, cost: int, mtime: int) -> None:
        self._catalog.seen(name, cost, max(0, min(mtime, time.time_ns())))

    def _is_writing(self, name: str) -> bool:
        return name.split("-")[1] in self._hosts

    def _end_scan(self) -> None:
        self.swept += self._walked.swept
        self._catalog.end_scan()
        self._other = (
            self._walked.other_bytes + self._moved[0],
            self._walked.other_files + self._moved[1],
        )
        self._meta = self._measure_meta()
        with self._ledger.locked() as books:
            if books.keeper != self._server:
                return
            costs: list[int] = []
            with suppress(OSError):
                costs = [spare_cost(name) or 0 for name in nofollow.listdir(self._spares)]
            books.spare_bytes, books.spare_files = sum(costs), len(costs)
            books.base_bytes = self._catalog.nbytes + self._other[0] + self._meta[0]
            books.base_files = len(self._catalog) + self._other[1] + self._meta[1]
            for server in self._dead_at_scan:
                books.rows.pop(server, None)
                with suppress(OSError):
                    nofollow.unlink(presence_path(self._directory, server))
            books.boot = boot_id()
            books.known = self.complete = True

    def _measure_meta(self) -> tuple[int, int]:
        """What the books take, without the spares."""
        nbytes = files = 0
        with nofollow.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    nbytes += -(-entry.stat(follow_symlinks=False).st_size // BLOCK) * BLOCK
                    files += 1
        return nbytes, files

    def _book_meta(self) -> None:
        before, self._meta = self._meta, self._measure_meta()
        if before != self._meta:
            with self._ledger.locked() as books:
                if books.keeper == self._server:
                    books.base_bytes += self._meta[0] - before[0]
                    books.base_files += self._meta[1] - before[1]

    # -- eviction

    def _make_room(self) -> bool:
        """Claim and delete a batch of files if that is needed; True if more is."""
        doomed: list[bytes] = []
        self._left.clear()
        claimed = self.evicted_files
        with self._ledger.locked() as books:
            if books.keeper != self._server or not books.known:
                return False
            pressed = 0
            for row in books.rows.values():
                pressed, row.pressed = pressed + row.pressed, 0
            limits, usage = books.limits(), books.usage(self._root)
            self._limits = limits
            pages = {row.wanted or row.page for row in books.rows.values()} - {0}
            largest = max(pages, default=0)
            ahead = max(largest, spares_wanted(usage))
            nbytes, files = pressed, 0
            full = room(limits, usage)
            if full.nbytes < 0 or full.files < 0:
                low = room(limits, usage, LOW)
                nbytes, files = max(nbytes, -low.nbytes), max(0, -low.files)
            soft = room(limits, usage, HIGH)
            spares = self._count_spares(books)
            if nbytes > 0 or files > 0:
                freed = self._drop_spares(books, spares, pages, nbytes, files)
                nbytes, files = nbytes - freed[0], files - freed[1]
                doomed = self._choose(nbytes, files)
            elif soft.nbytes < ahead or soft.files < 1 + (limits.max_files or 0) // 50:
                doomed = self._claim_spares(books, spares, pages, ahead)
            else:
                return False
        claimed = self.evicted_files - claimed
        for directory in self._left:
            _remove_empty(directory)
        return self._unlink(doomed) or claimed > 0

    def _count_spares(self, books: Books) -> Counter[int]:
        if books.spare_files <= 0:
            return Counter()
        with suppress(OSError):
            return Counter(spare_cost(name) or 0 for name in nofollow.listdir(self._spares))
        return Counter()

    def _drop_spares(
        self, books: Books, spares: Counter[int], pages: set[int], nbytes: int, files: int
    ) -> tuple[int, int]:
        """Delete spares: those that nobody can use, or all if nothing else is left."""
        freed, count = 0, 0
        for name in nofollow.listdir(self._spares) if spares else ():
            cost = spare_cost(name) or 0
            if (freed >= nbytes and count >= files) or count >= _CLAIM_FILES:
                break
            if cost not in pages or not len(self._catalog):
                with suppress(OSError):
                    nofollow.unlink(os.path.join(self._spares, name))
                books.spare_bytes -= cost
                books.spare_files -= 1
                freed, count = freed + cost, count + 1
        return freed, count

    def _choose(self, nbytes: int, files: int) -> list[bytes]:
        """Victims that take so many bytes and files, at most `_UNLINK_FILES`; still there."""
        chosen: list[bytes] = []
        while (nbytes > 0 or files > 0) and len(chosen) < _UNLINK_FILES:
            # where a limit was passed it comes before any promise: a lost page is a miss
            name = self._victim(chosen) or self._catalog.take_victim(chosen.__contains__)
            if name is None:
                break
            chosen.append(name)
            nbytes, files = nbytes - self._catalog.cost(name), files - 1
        return chosen

    def _claim_spares(
        self, books: Books, spares: Counter[int], pages: set[int], ahead: int
    ) -> list[bytes]:
        """Turn victims into spares until each kind of page has enough of them.

        Returns the victims that fit none, to be deleted: they make room instead.
        """
        nofollow.make_directories(self._spares, self._root, self._dir_mode)
        short = {cost for cost in pages if spares[cost] * cost < ahead}
        doomed: list[bytes] = []
        room_made = claimed = 0
        while short and room_made < ahead and claimed + len(doomed) < _CLAIM_FILES:
            name = self._victim(doomed)
            if name is None:
                break
            cost = self._catalog.cost(name)
            if cost not in short or not self._is_plain(name):
                doomed.append(name)
                room_made += cost
                continue
            try:
                found = self._claim(name, cost, books)
            except OSError:  # the spares are no directory any more, say: delete it instead
                doomed.append(name)
                room_made += cost
                continue
            claimed += 1
            if found:
                spares[cost] += 1
                short = {each for each in short if spares[each] * each < ahead}
        return doomed

    def _is_plain(self, name: bytes) -> bool:
        """Whether a regular file is there, or nothing."""
        path = self._names.path(name)
        with suppress(OSError):
            found = nofollow.lstat(os.path.join(self._root, path)) if path else None
            return found is None or stat.S_ISREG(found.st_mode)
        return True

    def _claim(self, name: bytes, cost: int, books: Books) -> bool:
        path = self._names.path(name)
        target = os.path.join(self._spares, f"{cost}-{secrets.token_hex(8)}")
        try:
            if path is None:
                raise FileNotFoundError
            path = os.path.join(self._root, path)
            nofollow.rename(path, target)
        except FileNotFoundError:
            self._forget(name, books)
            return False
        self._catalog.remove(name)
        books.base_bytes -= cost
        books.base_files -= 1
        books.spare_bytes += cost
        books.spare_files += 1
        self._count(name, cost)
        self._left.append(os.path.dirname(path))
        return True

    def _unlink(self, doomed: list[bytes]) -> bool:
        gone: list[tuple[bytes, bool]] = []
        for name in doomed:
            path = self._names.path(name)
            try:
                if path is None:
                    raise FileNotFoundError
                path = os.path.join(self._root, path)
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
                self._stamp = max(self._stamp + 1, time.time_ns())
                self._catalog.use(name, self._stamp)
        if gone:
            with self._ledger.locked() as books:
                if books.keeper != self._server:
                    return False
                for name, ours in gone:
                    if not ours:
                        self._forget(name, books)
                        continue
                    cost = self._catalog.remove(name)
                    books.base_bytes -= cost
                    books.base_files -= 1
                    self._count(name, cost)
        return bool(gone)

    def _count(self, name: bytes, cost: int) -> None:
        namespace = self._names.namespace(name)
        if namespace is not None:
            self.evicted.append((namespace, name[2:]))
        self.evicted_files += 1
        self.evicted_bytes += cost

    def _victim(self, chosen: list[bytes]) -> bytes | None:
        now = time.monotonic()
        return self._catalog.take_victim(
            lambda name: name in chosen or self._protected.get(name[2:], 0.0) > now
        )


def boot_id() -> bytes:
    """12 bytes that stand for this boot of this machine."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(64).replace(b"-", b"")[:12]


def _size(path: str) -> int:
    with suppress(OSError):
        return nofollow.lstat(path).st_size
    return 0


def _remove_empty(leaf: str) -> None:
    """Remove a leaf directory and its parent if nothing is in them."""
    with suppress(OSError):
        nofollow.rmdir(leaf)
        nofollow.rmdir(os.path.dirname(leaf))
