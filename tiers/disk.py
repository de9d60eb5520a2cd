"""How large a file system is, and how much of it is free."""

from __future__ import annotations

import os
from typing import NamedTuple

UNBOUNDED = 2**62  # bytes; more than any medium has


class Disk(NamedTuple):
    """A file system, in bytes.

    One that has no size of its own, such as a tmpfs mounted without a limit, reports no blocks
    at all: then `total` is 0 and `free` is `UNBOUNDED`, since what bounds it is elsewhere.
    """

    total: int
    free: int

    @property
    def bounded(self) -> bool:
        """Whether the file system has a size."""
        return self.total > 0


def disk_at(path: str | os.PathLike[str]) -> Disk:
    """The file system of `path`, as an ordinary user may fill it.

    Raises:
        OSError: it cannot be asked.
    """
    found = os.statvfs(path)
    if found.f_blocks == 0:
        return Disk(0, UNBOUNDED)
    return Disk(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)
