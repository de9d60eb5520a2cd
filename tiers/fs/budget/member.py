"""The books of a root and its disk budget, as one process that stores there sees them.

To the books each such process is a member of its own. What its I/O threads call appends to a
queue and returns; a thread of the member writes that to its journal, reads those of the others
and, while this member is the keeper, keeps the books and evicts. For room the I/O threads ask
`admission`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from contextlib import suppress

from kvstrata.tiers.fs.budget.admission import Admission
from kvstrata.tiers.fs.budget.journal import Journal, Op, Record, evicted_key
from kvstrata.tiers.fs.budget.keeper.keeper import Keeper
from kvstrata.tiers.fs.budget.keeper.replay import PROTECT_S
from kvstrata.tiers.fs.budget.keeper.rescan import boot_id
from kvstrata.tiers.fs.budget.lease import Lease, Watch
from kvstrata.tiers.fs.budget.ledger import MAX_ROWS, Books, Ledger, Row
from kvstrata.tiers.fs.budget.limits import BLOCK, BOOKS_BYTES, Limits, Usage
from kvstrata.tiers.fs.budget.tail import Tail
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.failures import error_cause
from kvstrata.tiers.fs.files.temporary import host_name
from kvstrata.tiers.fs.ground import Ground
from kvstrata.tiers.process.medium import Host, News

TICK_S = 0.05
IDLE_TICK_S = 0.25  # where nobody stores below the root, and nothing happened here for a second
_IDLE_AFTER_S = 1.0
SLICE_S = 0.005  # of a scan; then the engine has the interpreter for as long, or four times so
OF_AN_ENGINE = 2  # members: its readers and its writers
REPEAT_S = 1.0  # a page that is used again within this time is not noted again
_NEWS = 4000  # told at once; each takes the engine about 0.6 us
_BEAT_S = 1.0
_MAX_PENDING = 2**16  # records that could not be written yet; of others above that
_LOSABLE = (Op.USED, Op.PROMISED, Op.EVICTED)  # those without which the budget is right are lost


class Member:
    """One member's part in the books of a root."""

    def __init__(
        self,
        root: str,
        namespace: str | None,
        limits: Limits,
        file_mode: int,
        dir_mode: int,
        host: Host,
        keeps: bool = True,
        ground: Ground | None = None,
    ) -> None:
        """Begin to work in the background; while the books cannot be opened nothing is admitted.

        Args:
            root: the directory to which the limits apply.
            namespace: `<model>_<digest>` of the pages that this member stores, None if it
                stores none.
            limits: those of this member.
            file_mode, dir_mode: permission bits of the books.
            host: is told what happens: first the pages of the namespace that the books know.
            keeps: whether it becomes the keeper where there is none, and tells news.
            ground: where the root stands; None if it is not to be made again.
        """
        member = secrets.token_bytes(16)
        ledger = self._ledger = Ledger(root, file_mode, dir_mode, member)
        self._namespace = namespace
        self._limits = limits
        self._host = host
        self._keeps = keeps
        self._ground = ground
        self._events: deque[Record] = deque()
        self._pending: list[Record] = []
        self._recent: set[tuple[int, bytes]] = set()
        self._recent_since = 0.0
        self._protected: dict[bytes, float] = {}
        self._beat = 0
        self._beat_due = 0.0
        self._keeper: Keeper | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._active_until = 0.0
        self._is_idle = False
        self._lease: Lease | None = None
        self._watch = Watch(ledger.directory)
        self._tail = Tail(ledger.directory, member, namespace) if namespace and keeps else None
        self._journal = (
            Journal(ledger.directory, member, namespace, file_mode, limits.rotate_bytes)
            if namespace
            else None
        )
        self._known: bool | None = None  # whether the files were counted, as of the last look
        self._alone = False  # no other engine stores below the root, as of the last look
        self._complete = False  # what the listener was told
        self._entered = False
        self._shut_out = False  # and that was said
        self._said_others = False
        self._books_short = False  # the disk had no room for the books
        self._taken: tuple[Usage, Limits] | None = None  # as of the last beat, if not told
        self._settled: tuple[int, int] | None = None  # end of the journal if all was booked
        self.admission = Admission(ledger, self._wake.set)
        self._thread = threading.Thread(target=self._run, name="kvstrata-fs-books", daemon=True)
        self._thread.start()

    # Called by any thread: one append or two each, and a wake where all was quiet.

    def stored(self, key: bytes, cost: int, depth: int, access: int) -> None:
        """The page was written and renamed; `cost` is that of its grant."""
        self.admission.wrote()
        self._add(Record(Op.STORED, key, -(-cost // BLOCK), access, depth))

    def used(self, key: bytes, depth: int, access: int) -> None:
        """The page was loaded, or used in another tier; it needs to be spared no longer."""
        self._add(Record(Op.USED, key, 0, access, depth))

    def promised(self, key: bytes, access: int) -> None:
        """Somebody was told that the page is here: it counts as used and is spared for a while."""
        self._protected[key] = time.monotonic() + PROTECT_S
        self._add(Record(Op.PROMISED, key, 0, access))

    def gone(self, key: bytes) -> None:
        """The page's file is not there any more."""
        self._add(Record(Op.GONE, key))

    def quarantined(self) -> None:
        """A file was moved to the quarantine, which may have lost its oldest ones."""
        self._add(Record(Op.QUARANTINED, b""))

    def _add(self, record: Record) -> None:
        self._events.append(record)
        if self._is_idle:
            self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Note everything, leave the ledger and end the thread; True if that was in time."""
        self._stop.set()
        self._wake.set()
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def state(self) -> tuple[Usage, bool, bool]:
        """What the files below the root take; whether all limits hold, also for what is being
        written; and whether this member's count, and a scan by the keeper, here or not, has ended.

        Raises:
            OSError: the ledger cannot be read.
        """
        ours = self._ledger.member
        with self._ledger.locked() as books:
            keeper = self._keeper
            taken = books.taken(self._ledger.root)
            left = books.limits().room(books.usage(self._ledger.root))
            counted = books.known and {ours, books.keeper} <= books.rows.keys()
            scanned = books.keeper != ours or (keeper is not None and keeper.inventory.complete)
        return taken, not left.is_passed, counted and scanned

    # The background thread.

    def _run(self) -> None:
        busy = True
        while not self._stop.is_set():
            if not busy:
                self._rest()
            self._wake.clear()
            busy = False
            try:
                busy = self._tick()
            except OSError as error:
                self._report(error)
                self._stop.wait(TICK_S)
                with suppress(OSError):
                    self._make_directories()
            except Exception as error:
                self._host.report("internal", f"{type(error).__name__}: {error}")
                self._keeper = None  # begin anew from what is on the disk
                self._stop.wait(1.0)
        try:
            self._leave()
        except OSError as error:
            self._host.report("books", str(error))
        finally:
            if self._lease is not None:
                self._lease.close()
            self._ledger.close()

    def _rest(self) -> None:
        self._is_idle = time.monotonic() >= self._active_until  # from now on `_add` wakes us
        self._wake.wait(IDLE_TICK_S if self._is_idle and not self._events else TICK_S)
        self._is_idle = False

    def _stay_awake(self) -> None:
        self._active_until = time.monotonic() + _IDLE_AFTER_S

    def _tick(self) -> bool:
        """One round; True if there is more to do at once."""
        if self._lease is None:
            self._make_directories()
            self._lease = Lease(self._ledger.directory, self._ledger.member, self._ledger.file_mode)
        try:
            self._note()
        except OSError as error:  # on a full disk it is for the keeper to make room
            self._report(error)
        heard = self._hear()
        keeps = self._join()
        self._tell_figures()
        if not keeps:
            return heard
        if self._keeper is None:
            self._keeper = Keeper(self._ledger, self._protected, self._limits)
        more = self._keeper.work(0.0 if heard else SLICE_S)  # what we tell saves look-ups
        self._publish(self._keeper)
        if self._keeper.scanning and not more and not heard:
            self._wake.wait(SLICE_S * (4 if self._keeper.inventory.complete else 1))
        return more or heard or self._keeper.scanning

    def _report(self, error: OSError) -> None:
        """The books could not be kept."""
        self._books_short = error_cause(error) == "no-space"
        self._host.report("books", str(error))

    def _hear(self) -> bool:
        """Pass on what the other members say; True if there is more."""
        if self._tail is None:
            return False
        if self._host.is_behind:
            self._tell_complete(False)
            return False  # the journals keep what was not read
        try:
            news = self._tail.news(_NEWS)
        except OSError:
            self._tell_complete(False)
            raise
        if news:
            self._stay_awake()
            self._host.tell(news)
        whole = bool(self._known) and self._alone and self._tail.whole
        if self._tail.at_end or not whole:
            self._tell_complete(whole)
        if news:
            self._stop.wait(SLICE_S)  # so that the engine is not flooded
        return len(news) >= _NEWS

    def _tell_complete(self, complete: bool) -> None:
        if complete != self._complete:
            self._complete = complete
            self._host.complete(complete)

    def _look_at(self, books: Books) -> None:
        """See whether the files are counted, and by whom; what a count found is in the snapshot.

        What another engine stored a moment ago is on the disk before it is in the books.
        """
        if books.known and self._known is False and self._tail is not None:
            self._tail.begin_anew()
        self._known = books.known
        self._alone = sum(not row.dead for row in books.rows.values()) <= OF_AN_ENGINE
        if any(row.reserved_files or row.wanted or row.pressed for row in books.rows.values()):
            self._stay_awake()  # somebody stores

    def _tell_figures(self) -> None:
        """Tell the host what the files below the root take, against what they may."""
        if self._taken is None or self._host.is_behind:
            return
        (taken, limits), self._taken = self._taken, None
        eviction = self._keeper.eviction if self._keeper is not None else None
        ages = list(eviction.ages) if eviction is not None else []
        self._host.figures(
            {
                "disk_used_bytes": float(taken.nbytes),
                "disk_files": float(taken.files),
                "disk_free_bytes": float(taken.free_bytes),
                "capacity_bytes": float(limits.budget(taken)),
            },
            {"eviction_age_s": ages} if ages else {},
        )
        if eviction is not None:
            eviction.ages.clear()

    def _publish(self, keeper: Keeper) -> None:
        """Tell the host, and the other members, what the keeper here evicted."""
        ours: list[News] = []
        eviction, rescan = keeper.eviction, keeper.rescan
        while eviction.told:
            namespace, key = eviction.told.popleft()
            if namespace == self._namespace:
                ours.append((key, False))
            self._events.append(Record(Op.EVICTED, evicted_key(namespace, key)))
        if eviction.by_others is not None and not self._said_others:
            self._said_others = True
            self._host.say(
                f"the pages below {self._ledger.root!r} are evicted by the limits of another "
                f"server there, or of `kvstrata gc`: "
                f"{eviction.by_others.stricter_than(self._limits)}; the strictest count for all"
            )
        if self._host.is_behind:
            return  # a page that it takes for present costs it one failed load
        if ours:
            self._host.tell(ours)
        if eviction.files or eviction.nbytes or rescan.swept:
            self._host.upkeep(
                {
                    "evicted_pages": eviction.files,
                    "evicted_bytes": eviction.nbytes,
                    "swept_temporaries": rescan.swept,
                }
            )
            eviction.files = eviction.nbytes = rescan.swept = 0

    def _join(self) -> bool:
        """See to our row in the ledger; True if we are the keeper."""
        now = time.monotonic()
        with self._ledger.locked() as books:
            self._look_at(books)
            row = books.rows.get(self._ledger.member) or self._enter(books)
            if row is None:
                return False
            row.dead = False
            if self._books_short:
                self._books_short = False
                row.pressed = max(row.pressed, BOOKS_BYTES)
            tight = books.limits().room(books.usage(self._ledger.root)).is_passed
            self.admission.give_back(row, tight or self._stop.is_set())
            beat = now >= self._beat_due
            if beat:
                self._beat, self._beat_due = self._beat + 1, now + _BEAT_S
                row.beat = self._beat
                self._take_over(books)
                if books.known and self._keeps:
                    self._taken = books.taken(self._ledger.root), books.limits()
            keeper = self._keeper
            if books.keeper != self._ledger.member or (
                keeper and keeper.inventory.complete and not books.known
            ):
                self._keeper = None  # in the second case the ledger was lost: begin anew
            elif keeper is not None and beat:
                keeper.judge(books)
            end = self._journal_end()
            self._settled = None
            if row.booked == end:
                # nothing is on its way to the books but what is being written
                row.reserved_bytes, row.reserved_files = self.admission.open
                self._settled = None if row.reserved_files else end
        if beat and self._lease is not None:
            self._lease.renew()
        return books.keeper == self._ledger.member

    def _enter(self, books: Books) -> Row | None:
        """Make our row; None if there are too many members.

        Our last one is missing if the ledger was lost, or if we hung until we seemed dead.
        """
        is_full = len(books.rows) >= MAX_ROWS
        if is_full and not self._shut_out:
            self._host.report(
                "books",
                f"{self._ledger.root} has {MAX_ROWS} members, which is the most: this one stores "
                "nothing until another leaves",
            )
        self._shut_out = is_full
        if is_full:
            return None
        if self._lease is not None:
            self._lease.renew()
        end = self._journal_end()
        row = Row(host_name().encode("ascii"), self._limits, booked=end)
        row.reserved_bytes, row.reserved_files = self.admission.open
        if self._entered and (row.reserved_files or self._settled != end):
            books.known = False  # what we stored may be in no book
        self._entered = True
        books.rows[self._ledger.member] = row
        return row

    def _journal_end(self) -> tuple[int, int]:
        return self._journal.end if self._journal is not None else (0, 0)

    def _take_over(self, books: Books) -> None:
        """Become the keeper if there is none that lives."""
        holder = books.rows.get(books.keeper)
        if books.keeper == self._ledger.member or not self._keeps:
            return
        if holder is not None and not holder.dead:
            if not self._watch.is_dead(books.keeper, holder.beat):
                return
            holder.dead = True
        books.keeper = self._ledger.member
        self._keeper = None  # another may have kept the books while we seemed dead
        others = [s for s, row in books.rows.items() if s != self._ledger.member and not row.dead]
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
            record = self._events.popleft()
            if record.op in _LOSABLE and len(self._pending) > _MAX_PENDING:
                continue
            if record.op in (Op.USED, Op.PROMISED):
                if (use := (record.op, record.key)) in self._recent:
                    continue
                self._recent.add(use)
            self._pending.append(record)
        if self._journal is None or not self._pending:
            self._pending.clear()
            return
        self._stay_awake()
        self._journal.append(self._pending)
        written = [record.blocks * BLOCK for record in self._pending if record.op == Op.STORED]
        self._pending = []
        self.admission.noted(sum(written), len(written))

    def _leave(self) -> None:
        self._note()
        if self._join() and self._keeper is not None:
            self._keeper.finish()
        with self._ledger.locked() as books:
            if books.keeper == self._ledger.member:
                books.keeper = bytes(16)
            row = books.rows.get(self._ledger.member)
            if row is not None and not row.reserved_bytes and not row.reserved_files:
                del books.rows[self._ledger.member]

    def _make_directories(self) -> None:
        if self._ground is not None:
            self._ground.restore()
        for path in (self._ledger.directory, self._ledger.spares):
            with suppress(FileExistsError):
                nofollow.mkdir(path, self._ledger.dir_mode)
