"""How large a file system is, and how full, and of what kind."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

UNBOUNDED = 2**62  # bytes; more than any medium has
_ESCAPE = re.compile(rb"\\([0-7]{3})")  # a space, tab, newline or backslash in mountinfo


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


class Mount(NamedTuple):
    """Where a path lies: the type of the file system and its own options, as the kernel says them.

    "unknown" and none where it does not.
    """

    kind: str = "unknown"
    options: tuple[str, ...] = ()


def mount_of(path: str, mounts: Path = Path("/proc/self/mountinfo")) -> Mount:
    """The mount that `path` is on."""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return Mount()
    real = os.path.realpath(path)
    best, found = "", Mount()
    for line in lines:  # proc(5): "36 35 98:0 /root /mount/point options - type source ..."
        front, _, back = line.partition(b" - ")
        point = os.fsdecode(_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), front.split()[4]))
        covers = real == point or real.startswith(f"{point.rstrip('/')}/")
        if covers and len(point) >= len(best):  # of mounts at one point, the last is seen
            kind, *_, options = os.fsdecode(back).split(" ")
            best, found = point, Mount(kind, tuple(options.split(",")))
    return found


def file_system(path: str, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system at `path`, "unknown" where the kernel does not say."""
    return mount_of(path, mounts).kind
