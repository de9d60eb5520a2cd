"""The budget from outside an engine: trim a root, and say when its namespaces were used last."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvstrata.tiers.fs import nofollow
from kvstrata.tiers.fs.failures import Failures
from kvstrata.tiers.fs.space import snapshot
from kvstrata.tiers.fs.space.follower import News
from kvstrata.tiers.fs.space.journal import HEADER_BYTES, parse_name, read_namespace
from kvstrata.tiers.fs.space.limits import Limits
from kvstrata.tiers.fs.space.space import Space, Upkeep
from kvstrata.tiers.fs.space.walk import BOOKS_NAME

_POLL_S = 0.02
_STUCK_S = 15.0  # without any progress; another server's keeper looks every 50 ms


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What `trim` did.

    Attributes:
        evicted_files, evicted_bytes: what was deleted here; a running server that keeps the
            books deletes itself.
        within: whether everything below the root is within the limits now.
        failures: what went wrong, by cause.
    """

    evicted_files: int
    evicted_bytes: int
    within: bool
    failures: dict[str, int]


class _Accounts:
    """Adds up what the space tells."""

    def __init__(self) -> None:
        self.failures = Failures()
        self.evicted_files = self.evicted_bytes = 0

    def report(self, cause: str, detail: str) -> None:
        self.failures.count(cause, detail)

    def tell(self, news: Sequence[News]) -> None:
        """No page is ours."""

    def upkeep(self, done: Upkeep) -> None:
        self.evicted_files += done.evicted_files
        self.evicted_bytes += done.evicted_bytes


def trim(root: str, limits: Limits, progress: Callable[[int, int], None] | None = None) -> Trimmed:
    """Delete the least recently used pages below `root` until the limits hold.

    Servers may be running there: for as long as this takes, the limits are theirs too.
    `progress` is called with the bytes in use and the files deleted.

    Raises:
        OSError: `root` is no directory that can be written, or it knows no locks.
    """
    root = os.path.realpath(root)
    mode = stat.S_IMODE(os.stat(root).st_mode) | 0o700
    accounts = _Accounts()
    space = Space(root, None, limits, mode & 0o666, mode & 0o777, accounts)
    last, since = (-1, -1), time.monotonic()
    try:
        while True:
            counted = space.is_counted()
            nbytes, within = space.usage()
            state = (nbytes, accounts.evicted_files)
            if progress is not None:
                progress(*state)
            if state != last:
                last, since = state, time.monotonic()
            if counted and (within or time.monotonic() - since > _STUCK_S):
                return Trimmed(
                    accounts.evicted_files,
                    accounts.evicted_bytes,
                    within,
                    accounts.failures.totals(),
                )
            time.sleep(_POLL_S)
    finally:
        space.close(60.0)


def last_uses(root: str) -> dict[str, float]:
    """When a page of each namespace was used last, in seconds since the epoch, by namespace.

    Namespaces of which the books know nothing are missing.
    """
    directory = os.path.join(os.path.realpath(root), BOOKS_NAME)
    catalog, names, _ = snapshot.load(directory)
    found: dict[str, float] = {}
    for chunk, stamps, _, _ in catalog.chunks(2**14):
        for name, stamp in zip(chunk, stamps, strict=True):
            namespace = names.namespace(name)
            if namespace is not None:
                found[namespace] = max(found.get(namespace, 0.0), stamp / 1e9)
    with suppress(OSError):
        for journal in filter(parse_name, nofollow.listdir(directory)):
            with suppress(OSError):
                fd = nofollow.open(os.path.join(directory, journal), os.O_RDONLY)
                with open(fd, "rb") as file:
                    namespace = read_namespace(file.read(HEADER_BYTES))
                    if namespace is not None:
                        written = os.fstat(fd).st_mtime
                        found[namespace] = max(found.get(namespace, 0.0), written)
    return found
