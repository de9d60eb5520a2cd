"""The budget from outside an engine: trim a root, and say when its namespaces were used last."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvstrata.tiers.disk import UNBOUNDED, disk_at
from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.journal import HEADER_BYTES, Op, decode, parse_name, read_namespace
from kvstrata.tiers.fs.budget.keeper.rescan import books_size
from kvstrata.tiers.fs.budget.keeper.walk import BOOKS_NAME, Walked, walk
from kvstrata.tiers.fs.budget.limits import Limits, Usage, room
from kvstrata.tiers.fs.budget.member import Space, Upkeep
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.budget.tail import News
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.failures import Failures
from kvstrata.tiers.fs.tools.audit import audit

_POLL_S = 0.02
_STUCK_S = 15.0  # without any progress; another server's keeper looks every 50 ms
_USES = (Op.STORED, Op.USED, Op.PROMISED)


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What `trim` did.

    Attributes:
        evicted_files, evicted_bytes: what was deleted: here or, where servers are running, by the
            one that keeps the books, less what they stored meanwhile.
        before, after: what was taken at first, as far as it was known, and in the end.
        fixed_files, fixed_bytes: what no trimming deletes: the books, foreign files, directories;
            0 if there are no limits.
        refused: whether nothing was deleted since the limits cannot be reached.
        within: whether everything below the root is within the limits now.
        servers: how many were living.
        failures: what went wrong, by cause.
    """

    evicted_files: int
    evicted_bytes: int
    before: Usage
    after: Usage
    fixed_files: int
    fixed_bytes: int
    refused: bool
    within: bool
    servers: int
    failures: dict[str, int]


class _Accounts:
    """Adds up what the space tells."""

    def __init__(self) -> None:
        self.failures = Failures()
        self.evicted_files = self.evicted_bytes = 0
        self.last = ""
        self.is_behind = False

    def report(self, cause: str, detail: str) -> None:
        self.failures.count(cause, detail)
        self.last = detail

    def say(self, text: str) -> None:
        """The limits of running servers count too: `Trimmed.servers` tells of them."""

    def tell(self, news: Sequence[News]) -> None:
        """No page is ours."""

    def upkeep(self, done: Upkeep) -> None:
        self.evicted_files += done.evicted_files
        self.evicted_bytes += done.evicted_bytes


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
    accounts = _Accounts()
    found = audit(root)
    before, fixed = None, (0, 0)
    if limits:
        # where servers live they may have deleted something before we look again
        before, least = _survey(root)
        fixed = least.files, least.nbytes
        if room(limits, least).is_passed:
            servers = len(found.living)
            return Trimmed(0, 0, before, before, *fixed, True, False, servers, {})
    space = Space(root, None, limits, mode & 0o666, mode & 0o777, accounts)
    last, since = (-1, -1, -1), time.monotonic()
    try:
        while True:
            counted = space.is_counted()
            usage, within = space.usage()
            if counted and before is None:
                evicted = (accounts.evicted_bytes, accounts.evicted_files)
                before = Usage(
                    usage.nbytes + evicted[0], usage.files + evicted[1], usage.free_bytes
                )
            if progress is not None:
                progress(usage, accounts.evicted_files)
            state = (usage.nbytes, usage.files, accounts.evicted_files)
            if state != last:
                last, since = state, time.monotonic()
            stuck = time.monotonic() - since > _STUCK_S
            if not counted and stuck and accounts.failures.totals():
                raise OSError("the books cannot be kept: " + accounts.last)
            if counted and before is not None and (within or stuck):
                gone = before.files - usage.files, before.nbytes - usage.nbytes
                servers_did = bool(found.living) and gone[0] > 0
                return Trimmed(
                    max(accounts.evicted_files, gone[0] * servers_did),
                    max(accounts.evicted_bytes, gone[1] * servers_did),
                    before,
                    usage,
                    *fixed,
                    False,
                    within,
                    len(found.living),
                    accounts.failures.totals(),
                )
            time.sleep(_POLL_S)
    finally:
        space.close(60.0)


def _survey(root: str) -> tuple[Usage, Usage]:
    """What everything below the root takes, and what it would take without any page.

    What is being written is left out.

    Raises:
        OSError: the file system cannot be asked.
    """
    walked, pages = Walked(), [0, 0]

    def seen(name: bytes, cost: int, mtime: int) -> None:
        pages[0] += cost
        pages[1] += 1

    for _ in walk(root, Names(), walked, seen, lambda name: True):
        pass
    directory = os.path.join(root, BOOKS_NAME)
    books = books_size(directory, lambda name: True) if nofollow.lexists(directory) else (0, 0)
    free = disk_at(root).free
    fixed = walked.other_bytes + books[0], walked.other_files + books[1]
    return (
        Usage(fixed[0] + pages[0], fixed[1] + pages[1], free),
        Usage(*fixed, min(free + pages[0], UNBOUNDED)),
    )


def last_uses(root: str) -> dict[str, float]:
    """When a page of each namespace was used last, in seconds since the epoch, by namespace.

    A store is a use, and so is a lookup that hit. What the snapshot does not cover counts as used
    when its journal was last written, which is at most a little too late. Namespaces of which the
    books know nothing are missing.
    """
    directory = os.path.join(os.path.realpath(root), BOOKS_NAME)
    catalog, names, read = snapshot.load(directory)
    newest: dict[bytes, int] = {}  # by the prefix of the namespace's names
    for chunk, stamps, _, _ in catalog.chunks(2**14):
        for name, stamp in zip(chunk, stamps, strict=True):
            if stamp > newest.get(name[:2], 0):
                newest[name[:2]] = stamp
    found = {
        namespace: stamp / 1e9
        for prefix, stamp in newest.items()
        if (namespace := names.namespace(prefix)) is not None
    }
    with suppress(OSError):
        for journal in nofollow.listdir(directory):
            parsed = parse_name(journal)
            if parsed is None:
                continue
            server, number = parsed
            known, start = read.get(server, (0, 0))
            if number >= known:
                path = os.path.join(directory, journal)
                namespace, used = _last_use(path, start if number == known else 0)
                if namespace is not None:
                    found[namespace] = max(found.get(namespace, 0.0), used)
    return found


def _last_use(path: str, start: int) -> tuple[str | None, float]:
    """The namespace of a journal and when it was written, if after `start` it tells of a use."""
    with suppress(OSError), open(nofollow.open(path, os.O_RDONLY), "rb") as file:
        namespace = read_namespace(file.read(HEADER_BYTES))
        file.seek(max(start, HEADER_BYTES))
        if any(record is not None and record.op in _USES for record in decode(file.read())):
            return namespace, os.fstat(file.fileno()).st_mtime
    return None, 0.0
