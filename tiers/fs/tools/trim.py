"""The budget from outside an engine: trim a root, and say when its namespaces were used last."""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.journal import Op, journals, unread
from kvstrata.tiers.fs.budget.keeper.rescan import Walk, books_size
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME
from kvstrata.tiers.fs.budget.limits import Limits, Usage
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.tools.audit import audit
from kvstrata.tiers.machine.disk import UNBOUNDED, disk_at
from kvstrata.tiers.process.failures import Failures
from kvstrata.tiers.process.medium import News

_POLL_S = 0.02
_STUCK_S = 15.0  # without any progress; another member's keeper looks four times a second
_USES = (Op.STORED, Op.USED, Op.PROMISED)


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What `trim` did.

    Attributes:
        evicted_files, evicted_bytes: what was deleted: here or, where members are running, by the
            one that keeps the books, less what they stored meanwhile.
        before, after: what was taken at first, as far as it was known, and in the end.
        fixed: what no trimming deletes: the books, foreign files, directories.
        refused: whether nothing was deleted since the limits cannot be reached.
        within: whether everything below the root is within the limits now.
        members: how many were living.
        failures: what went wrong, by cause.
    """

    evicted_files: int
    evicted_bytes: int
    before: Usage
    after: Usage
    fixed: Usage
    refused: bool
    within: bool
    members: int
    failures: dict[str, int]


class Accounts:
    """Adds up what the member tells."""

    is_behind = False

    def __init__(self) -> None:
        self.failures = Failures("fs")
        self.done = Counter(evicted_pages=0, evicted_bytes=0)
        self.last = ""

    def report(self, cause: str, detail: str) -> None:
        self.failures.count(cause, detail)
        self.last = detail

    def say(self, text: str) -> None:
        """The limits of others count too: `Trimmed.members` tells of them."""

    def tell(self, news: Sequence[News]) -> None:
        """No page is ours."""

    def complete(self, complete: bool) -> None:
        """Nor does anybody look for one."""

    def trust(self, trusted: bool) -> None:
        """Only a medium tells."""

    def upkeep(self, done: Mapping[str, int]) -> None:
        self.done.update(done)

    def figures(
        self, gauges: Mapping[str, float], samples: Mapping[str, Sequence[float]] = {}
    ) -> None:
        """`Member.state` says more."""


def trim(
    root: str, limits: Limits, progress: Callable[[Usage, int], None] | None = None
) -> Trimmed:
    """Delete the least recently used pages below `root` until the limits hold.

    Servers may be running there: for as long as this takes, the limits are theirs too. Where all
    pages together would not be enough, none is deleted. Without limits the books are brought up to
    date, and nothing is deleted.
    `progress` is called with what is taken and the files deleted here.

    Raises:
        OSError: `root` is no directory that can be written, or it knows no locks.
    """
    root = os.path.realpath(root)
    mode = stat.S_IMODE(os.stat(root).st_mode) | 0o700
    living = len(audit(root).living)
    # where members live they may have deleted something before we look again
    before, fixed = _survey(root)
    if limits.room(fixed).is_passed:
        return Trimmed(0, 0, before, before, fixed, True, False, living, {})
    accounts = Accounts()
    member = Member(root, None, limits, mode & 0o666, mode & 0o777, accounts)
    last, since = (-1, -1, -1), time.monotonic()
    try:
        while True:
            usage, within, counted = member.state()
            if progress is not None:
                progress(usage, accounts.done["evicted_pages"])
            state = (usage.nbytes, usage.files, accounts.done["evicted_pages"])
            if state != last:
                last, since = state, time.monotonic()
            stuck = time.monotonic() - since > _STUCK_S
            failures = accounts.failures.totals()
            if not counted and stuck and failures:
                raise OSError("the books cannot be kept: " + accounts.last)
            if counted and (within or stuck):
                files, nbytes = accounts.done["evicted_pages"], accounts.done["evicted_bytes"]
                if living and usage.nbytes < before.nbytes:
                    files = max(files, before.files - usage.files)
                    nbytes = max(nbytes, before.nbytes - usage.nbytes)
                done = before, usage, fixed, False, within, living, failures
                return Trimmed(files, nbytes, *done)
            time.sleep(_POLL_S)
    finally:
        member.close(60.0)


def _survey(root: str) -> tuple[Usage, Usage]:
    """What everything below the root takes, and what it would take without any page.

    What is being written is left out.
    """
    walk, nbytes, files = Walk(root, Names(), lambda name: True), 0, 0
    for found in walk.files():
        if found is not None:
            nbytes, files = nbytes + found[1], files + 1
    directory = os.path.join(root, BOOKS_NAME)
    books = books_size(directory, lambda name: True) if nofollow.lexists(directory) else (0, 0)
    free = disk_at(root).free
    fixed = walk.other_bytes + books[0], walk.other_files + books[1]
    return (
        Usage(fixed[0] + nbytes, fixed[1] + files, free),
        Usage(*fixed, min(free + nbytes, UNBOUNDED)),
    )


def last_uses(root: str) -> dict[str, float]:
    """When a page of each namespace was used last, in seconds since the epoch, by namespace.

    A store is a use, and so is a lookup that hit. What the snapshot does not cover counts as used
    when its journal was last written, which is at most a little too late. Namespaces of which the
    books know nothing are missing.
    """
    directory = os.path.join(os.path.realpath(root), BOOKS_NAME)
    catalog, names, read, _ = snapshot.load(directory)
    newest: dict[bytes, int] = {}  # by the prefix of the namespace's names
    for name, stamp in catalog.uses():
        if stamp > newest.get(name[:2], 0):
            newest[name[:2]] = stamp
    found = {
        namespace: stamp / 1e9
        for prefix, stamp in newest.items()
        if (namespace := names.namespace(prefix)) is not None
    }
    with suppress(OSError):
        listed = journals(directory)
        while pieces := list(unread(directory, listed, read)):
            for member, piece in pieces:
                read[member] = piece.end
                used = any(record is not None and record.op in _USES for record in piece.records)
                if used and piece.namespace is not None:
                    found[piece.namespace] = max(found.get(piece.namespace, 0.0), piece.mtime)
    return found
