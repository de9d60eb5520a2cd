"""The disk budget of a root, as the filesystem tier sees it.

What the scheduler's thread calls appends to a queue and returns. A thread of the space writes
that to the server's journal and, while this server is the keeper, keeps the books and evicts.
I/O threads ask for room through `admission`.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from contextlib import suppress

from kvstrata.tiers.fs.failures import Failures
from kvstrata.tiers.fs.space.admission import SPARE_NAME, Admission
from kvstrata.tiers.fs.space.journal import Journal, Op, Record
from kvstrata.tiers.fs.space.keeper import Keeper, boot_id
from kvstrata.tiers.fs.space.ledger import MAX_ROWS, Books, Ledger, Row
from kvstrata.tiers.fs.space.limits import BLOCK, Limits, room, rotate_bytes
from kvstrata.tiers.fs.space.presence import Presence, Watch
from kvstrata.tiers.fs.space.walk import BOOKS_NAME
from kvstrata.tiers.fs.temporary import host_name

TICK_S = 0.05
SLICE_S = 0.005  # of a scan; then the engine has the interpreter for as long, or four times so
PROTECT_S = 5.0  # a page that somebody was told is here is not evicted for so long
REPEAT_S = 1.0  # a page that is used again within this time is not noted again
_RELEASE = -1  # in place of the cost where a page was used or is gone
_BEAT_S = 1.0
_MAX_PENDING = 2**16  # records that could not be written yet; uses above that are dropped


class Space:
    """One server's part in the budget of a root."""

    def __init__(
        self,
        root: str,
        namespace: str | None,
        limits: Limits,
        file_mode: int,
        dir_mode: int,
        failures: Failures,
    ) -> None:
        """Open the books below `root`, which exists, and begin to work in the background.

        `namespace` is `<model>_<digest>` of the pages that this server stores, None if it
        stores none.

        Raises:
            OSError: they cannot be opened, or the file system knows no locks.
        """
        self._root = root
        self._directory = os.path.join(root, BOOKS_NAME)
        self._namespace = namespace
        self._limits = limits
        self._file_mode = file_mode
        self._dir_mode = dir_mode
        self._failures = failures
        self._server = secrets.token_bytes(16)
        self._events: deque[tuple[Op, bytes, int, int, int]] = deque()
        self._pending: list[Record] = []
        self._recent: set[bytes] = set()
        self._recent_since = 0.0
        self._protected: dict[bytes, float] = {}
        self._beat = 0
        self._beat_due = 0.0
        self._keeper: Keeper | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._make_directories()
        self._presence = Presence(self._directory, self._server, file_mode)
        self._ledger = Ledger(os.path.join(self._directory, "ledger"), file_mode, dir_mode)
        self._watch = Watch(self._directory)
        self._journal = (
            Journal(self._directory, self._server, namespace, file_mode, rotate_bytes(limits))
            if namespace
            else None
        )
        self.admission = Admission(
            self._ledger, self._server, root, self._directory, self._wake.set
        )
        self._join()
        self._thread = threading.Thread(target=self._run, name="kvstrata-fs-space", daemon=True)
        self._thread.start()

    # Called on the scheduler's thread or by I/O threads: one append or two each.

    def stored(self, key: bytes, cost: int, depth: int, access: int) -> None:
        """The page was written and renamed; `cost` is that of its grant."""
        self._events.append((Op.STORED, key, cost, depth, access))

    def used(self, key: bytes, depth: int, access: int) -> None:
        """The page was loaded, or used in another tier; it needs to be spared no longer."""
        self._events.append((Op.USED, key, _RELEASE, depth, access))

    def wanted(self, key: bytes) -> None:
        """The page is about to be read: it is spared until it was used, or for a while."""
        self._protected[key] = time.monotonic() + PROTECT_S

    def promised(self, key: bytes) -> None:
        """Somebody was told that the page is here: it counts as used and is spared for a while."""
        self._protected[key] = time.monotonic() + PROTECT_S
        self._events.append((Op.USED, key, 0, 0, 0))

    def gone(self, key: bytes) -> None:
        """The page's file is not there any more."""
        self._events.append((Op.GONE, key, _RELEASE, 0, 0))

    def quarantined(self, cost: int) -> None:
        """A file that took `cost` bytes was moved to the quarantine."""
        self._events.append((Op.QUARANTINED, b"", cost, 0, 0))

    def close(self, timeout_s: float) -> bool:
        """Note everything, leave the ledger and end the thread; True if that was in time."""
        self._stop.set()
        self._wake.set()
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def take_evicted(self) -> list[bytes]:
        """Keys of this server's namespace that it evicted since the last call."""
        keeper, keys = self._keeper, []
        while keeper is not None and keeper.evicted:
            namespace, key = keeper.evicted.popleft()
            if namespace == self._namespace:
                keys.append(key)
        return keys

    def counters(self) -> dict[str, int]:
        """Totals of this server's work as the keeper."""
        keeper = self._keeper
        if keeper is None:
            return {"evicted_files": 0, "evicted_bytes": 0}
        return {"evicted_files": keeper.evicted_files, "evicted_bytes": keeper.evicted_bytes}

    def usage(self) -> tuple[int, bool]:
        """Bytes taken by everything below the root, and whether all limits hold.

        Raises:
            OSError: the ledger cannot be read.
        """
        with self._ledger.locked() as books:
            limits, usage = books.limits(), books.usage(self._root)
        left = room(limits, usage)
        return usage.nbytes, left.nbytes >= 0 and left.files >= 0

    def is_counted(self) -> bool:
        """Whether a scan by the keeper, this server or another, has ended.

        Raises:
            OSError: the ledger cannot be read.
        """
        with self._ledger.locked() as books:
            known, ours = books.known, books.keeper == self._server
        keeper = self._keeper
        return known and (not ours or (keeper is not None and keeper.complete))

    # The background thread.

    def _run(self) -> None:
        busy = True
        while not self._stop.is_set():
            if not busy:
                self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                busy = self._tick()
            except OSError as error:
                busy = False
                self._failures.count("books", str(error))
                self._stop.wait(TICK_S)
                with suppress(OSError):
                    self._make_directories()
            except Exception as error:
                busy = False
                self._failures.count("internal", f"{type(error).__name__}: {error}")
                self._keeper = None  # begin anew from what is on the disk
                self._stop.wait(1.0)
        try:
            self._leave()
        except OSError as error:
            self._failures.count("books", str(error))
        finally:
            self._presence.close()
            self._ledger.close()

    def _tick(self) -> bool:
        """One round; True if there is more to do at once."""
        try:
            self._note()
        except OSError as error:  # on a full disk it is for the keeper to make room
            self._failures.count("books", str(error))
        if not self._join():
            return False
        if self._keeper is None:
            self._keeper = Keeper(
                self._root,
                self._directory,
                self._server,
                self._ledger,
                self._file_mode,
                self._dir_mode,
                self._protected,
            )
        more = self._keeper.work(SLICE_S)
        if self._keeper.scanning and not more:
            self._wake.wait(SLICE_S * (4 if self._keeper.complete else 1))
        return more or self._keeper.scanning

    def _join(self) -> bool:
        """See to our row in the ledger; True if we are the keeper."""
        now = time.monotonic()
        with self._ledger.locked() as books:
            row = books.rows.get(self._server)
            if row is None and len(books.rows) < MAX_ROWS:
                row = Row(host_name().encode("ascii"), self._limits)
                row.reserved_bytes = self.admission.open_bytes
                row.reserved_files = self.admission.open_files
                books.rows[self._server] = row
            if row is None:
                return False
            row.dead = False
            if now >= self._beat_due:
                self._beat, self._beat_due = self._beat + 1, now + _BEAT_S
                row.beat = self._beat
                self._take_over(books)
            if books.keeper != self._server:
                self._keeper = None
            elif self._keeper is not None and self._beat_due == now + _BEAT_S:
                self._keeper.judge(books)
            if self._journal is not None and row.booked == self._journal.end:
                # nothing is on its way to the books but what is being written
                row.reserved_bytes = self.admission.open_bytes
                row.reserved_files = self.admission.open_files
            return books.keeper == self._server

    def _take_over(self, books: Books) -> None:
        """Become the keeper if there is none that lives."""
        holder = books.rows.get(books.keeper)
        if books.keeper == self._server:
            return
        if holder is not None and not holder.dead:
            if not self._watch.is_dead(books.keeper, holder.beat):
                return
            holder.dead = True
        books.keeper = self._server
        others = [s for s, row in books.rows.items() if s != self._server and not row.dead]
        if books.boot != boot_id() and not others:
            books.known = False  # the machine may have lost what was written last

    def _note(self) -> None:
        """Write the queue to the journal."""
        now = time.monotonic()
        if now - self._recent_since > REPEAT_S:
            self._recent.clear()
            self._recent_since = now
            for key, until in list(self._protected.items()):  # others add to it meanwhile
                if until < now:
                    self._protected.pop(key, None)
        while self._events:
            op, key, cost, depth, access = self._events.popleft()
            if cost == _RELEASE:
                self._protected.pop(key, None)  # the keeper reads the journal before it evicts
                cost = 0
            if op == Op.USED:
                if key in self._recent or len(self._pending) > _MAX_PENDING:
                    continue
                self._recent.add(key)
            self._pending.append(Record(op, key, -(-cost // BLOCK), access, depth))
        if self._journal is None or not self._pending:
            self._pending.clear()
            return
        self._journal.append(self._pending)
        written = [record.blocks * BLOCK for record in self._pending if record.op == Op.STORED]
        self._pending = []
        self.admission.noted(sum(written), len(written))

    def _leave(self) -> None:
        self._note()
        if self._join() and self._keeper is not None:
            self._keeper.finish()
        with self._ledger.locked() as books:
            if books.keeper == self._server:
                books.keeper = bytes(16)
            row = books.rows.get(self._server)
            if row is not None and not row.reserved_bytes and not row.reserved_files:
                del books.rows[self._server]

    def _make_directories(self) -> None:
        for path in (self._directory, os.path.join(self._directory, SPARE_NAME)):
            with suppress(FileExistsError):
                os.mkdir(path, self._dir_mode)
                os.chmod(path, self._dir_mode)
