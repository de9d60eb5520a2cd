"""Whether a member lives: it holds a lock on a file of its own for as long as it does.

The kernel lets go of the lock when the process dies, on this host at once and over NFS when
the lock server gives the client up. A member that hangs, or whose host vanished, is known by
its beat in the ledger, which stands still. Only elapsed time on the observer's own clock
counts, never a time that another host wrote down.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

from kvstrata.tiers.fs.files import nofollow

SILENT_S = 60.0  # a beat comes every second; disks that stall for half a minute are seen
_NAME = re.compile(r"([0-9a-f]{32})\.server")


def lease_path(directory: str, member: bytes) -> str:
    """The file that the member holds a lock on."""
    return os.path.join(directory, f"{member.hex()}.server")


class Lease:
    """This member's own lock."""

    def __init__(self, directory: str, member: bytes, mode: int) -> None:
        """Create the file and lock it.

        Raises:
            OSError: it cannot be created, or the file system knows no locks.
        """
        self._path = lease_path(directory, member)
        self._mode = mode
        self._fd = self._lock()

    def renew(self) -> None:
        """Be seen again if somebody deleted the file, for example since we seemed dead.

        Raises:
            OSError: as above.
        """
        with suppress(FileNotFoundError):
            if os.path.samestat(nofollow.lstat(self._path), os.fstat(self._fd)):
                return
        fresh = self._lock()
        os.close(self._fd)
        self._fd = fresh

    def close(self) -> None:
        """Be gone."""
        os.close(self._fd)
        with suppress(FileNotFoundError):
            nofollow.unlink(self._path)

    def _lock(self) -> int:
        fd = nofollow.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd


class Watch:
    """Tells which of the other members are dead."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._beats: dict[bytes, tuple[int, float]] = {}

    def is_dead(self, member: bytes, beat: int) -> bool:
        """Whether the member let go of its lock, or its beat stood still for `SILENT_S`."""
        now = time.monotonic()
        known, since = self._beats.get(member, (-1, now))
        if beat != known:
            self._beats[member] = (beat, now)
        elif now - since > SILENT_S:
            return True
        try:
            fd = nofollow.open(lease_path(self._directory, member), os.O_RDWR)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # it cannot be told: the beat will
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)


def dead_leases(directory: str, known: Collection[bytes]) -> Iterator[tuple[bytes, str]]:
    """Ids and files of members that were killed, be they among the `known` ones or not.

    One that leaves takes its file along. One that starts makes the file, locks it, and only then
    enters itself in the ledger, so an unknown one is left alone until its file is old.

    Raises:
        OSError: the directory cannot be read.
    """
    watch = Watch(directory)
    for name in sorted(nofollow.listdir(directory)):
        if (match := _NAME.fullmatch(name)) is None:
            continue
        member, path = bytes.fromhex(match[1]), os.path.join(directory, name)
        with suppress(FileNotFoundError):
            age_s = time.time() - nofollow.lstat(path).st_mtime
            if (member in known or age_s > SILENT_S) and watch.is_dead(member, 0):
                yield member, path
