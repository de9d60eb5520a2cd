"""Letting stores in: each has its bytes reserved in the ledger before it writes.

The ledger is locked for each reservation, and other processes want it too. So while there is
much room it is made for some files at once; what nobody wants is given back soon.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from kvstrata.tiers.fs.budget.ledger import Books, Ledger, Row
from kvstrata.tiers.fs.budget.limits import HIGH, spares_wanted
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.temporary import temporary_name

# A store waits this long for room, in seconds. After one that waited in vain, the next ones
# ask only once for as long: pages that wait hold memory of the engine.
WAIT_S = 2.0
_POLL_S = 0.001
_MOST_AHEAD = 64  # files; and at most this share of the room that is left, so that others have some
_SHARE_AHEAD = 16
_PRESS_S = 10.0  # between two evictions for a disk that takes no page all the same


class Grant(NamedTuple):
    """Leave to write one file.

    Attributes:
        cost: what was reserved, in bytes.
        spare: a file to overwrite and to rename, or None to create one.
    """

    cost: int
    spare: str | None


class Admission:
    """Reserves for one member. Any thread may call it.

    It blocks on the disk, and raises OSError where the ledger cannot be used.
    """

    def __init__(self, ledger: Ledger, wake: Callable[[], None]) -> None:
        """`wake` makes the keeper work if it is here."""
        self.open = (0, 0)  # bytes and files reserved, and neither cancelled nor in the journal
        self._ledger = ledger
        self._wake = wake
        self._spares: list[str] = []
        self._ahead: Counter[int] = Counter()  # files that may be written, by cost
        self._ahead_used = False
        self._hopeless_until = 0.0
        self._may_press_at = 0.0
        self._turn = threading.Lock()
        self._count_lock = threading.Lock()

    def admit(self, cost: int) -> Grant | None:
        """Reserve `cost` bytes for one file; None if in `WAIT_S` seconds there was no room."""
        with self._count_lock:
            if self._ahead[cost]:
                self._ahead[cost] -= 1
                self._ahead_used = True
                return Grant(cost, None)
        deadline = time.monotonic() + WAIT_S
        grant = self._attempt(cost)
        if grant is not None or time.monotonic() < self._hopeless_until:
            return grant
        # one thread asks again and again, the others queue behind it
        if not self._turn.acquire(timeout=WAIT_S):
            return None
        try:
            while (grant := self._attempt(cost)) is None:
                self._wake()
                now = time.monotonic()
                if now > deadline:
                    self._hopeless_until = now + WAIT_S
                    return None
                time.sleep(_POLL_S)
            return grant
        finally:
            self._turn.release()

    def cancel(self, grant: Grant, disk_full: bool) -> None:
        """Nothing was written for the grant; `disk_full`: since the disk had no room.

        Then it has less than it says, by a quota or for want of inodes, say, and room for one
        file is made by eviction. That is not done again before a page could be written, or so
        much time has passed: where it does not help, it must not empty the tier.
        """
        if grant.spare is not None:
            with suppress(OSError):
                nofollow.unlink(grant.spare)
        now, pressed = time.monotonic(), 0
        with self._count_lock:
            if disk_full and now >= self._may_press_at:
                self._may_press_at = now + _PRESS_S
                pressed = grant.cost
        ended = False
        try:
            with self._ledger.locked() as books:
                ended = True
                self._count(-grant.cost, -1)
                row = books.rows.get(self._ledger.member)
                if row is not None:
                    row.release(grant.cost, 1)
                    row.pressed += pressed
        finally:
            if not ended:  # the member's row follows as soon as the ledger can be used
                self._count(-grant.cost, -1)
        self._wake()

    def wrote(self) -> None:
        """A page was written: the disk takes some."""
        self._may_press_at = 0.0

    def noted(self, nbytes: int, files: int) -> None:
        """Files that were written for grants of so many bytes are in the journal now."""
        self._count(-nbytes, -files)

    def give_back(self, row: Row, at_once: bool = False) -> None:
        """Give up what was reserved ahead, if none of it was wanted since the last call.

        `row` is that of the member in the ledger, which is locked.
        """
        with self._count_lock:
            if at_once or not self._ahead_used:
                nbytes = sum(cost * files for cost, files in self._ahead.items())
                files = sum(self._ahead.values())
                self._ahead.clear()
                self.open = self.open[0] - nbytes, self.open[1] - files
                row.release(nbytes, files)
            self._ahead_used = False

    def _count(self, nbytes: int, files: int) -> None:
        with self._count_lock:
            self.open = self.open[0] + nbytes, self.open[1] + files

    def _attempt(self, cost: int) -> Grant | None:
        grant, ahead = None, 0
        try:
            with self._ledger.locked() as books:
                row = books.rows.get(self._ledger.member)
                # where nothing is counted, nothing need be known
                ready = books.known or not books.limits().counted
                if row is not None and not row.dead and ready:
                    grant, ahead = self._try(books, row, cost)
        except OSError:
            if grant is not None:  # it could not be written down
                self._count(-cost * (1 + ahead), -1 - ahead)
                if grant.spare is not None:
                    with suppress(OSError):
                        nofollow.unlink(grant.spare)
            raise
        if ahead:
            with self._count_lock:
                self._ahead[cost] += ahead
                self._ahead_used = True
        return grant

    def _try(self, books: Books, row: Row, cost: int) -> tuple[Grant | None, int]:
        """Leave for one file, and for how many more."""
        limits, usage = books.limits(), books.usage(self._ledger.root)
        spare, ahead = None, 0
        left = limits.room_to_write(usage, HIGH)
        if left.holds(cost):
            share = min(left.nbytes // cost, left.files) // _SHARE_AHEAD
            ahead = min(_MOST_AHEAD, share)
        else:
            spare = self._take_spare(books, cost)
            if books.spare_bytes < max(4 * cost, spares_wanted(usage) // 2):
                self._wake()
            if spare is None and not limits.room_to_write(usage).holds(cost):
                row.wanted = cost
                return None, 0
        row.wanted, row.page = 0, cost
        row.reserved_bytes += cost * (1 + ahead)
        row.reserved_files += 1 + ahead
        self._count(cost * (1 + ahead), 1 + ahead)
        return Grant(cost, spare), ahead

    def _take_spare(self, books: Books, cost: int) -> str | None:
        """Claim a spare of that cost from all other writers."""
        if books.spare_files <= 0:
            return None
        directory = self._ledger.spares
        target = os.path.join(self._ledger.directory, temporary_name())
        for listed in (False, True):
            if listed:
                with suppress(OSError):
                    self._spares = nofollow.listdir(directory)
            while self._spares:
                name = self._spares.pop()
                if spare_cost(name) != cost:
                    continue
                try:
                    nofollow.rename(os.path.join(directory, name), target)
                except FileNotFoundError:
                    continue
                books.add_spare(-cost, -1)
                return target
        return None


def spare_costs(directory: str) -> list[int]:
    """The costs of what is in the directory of spares, 0 for a foreign file; none if unreadable."""
    with suppress(OSError):
        return [spare_cost(name) or 0 for name in nofollow.listdir(directory)]
    return []


def spare_cost(name: str) -> int | None:
    """The cost in a spare's name; None for a file that is none."""
    cost, dash, _ = name.partition("-")
    return int(cost) if dash and cost.isascii() and cost.isdigit() and len(cost) < 14 else None
