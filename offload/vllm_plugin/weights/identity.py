"""What the file system says of a file, by which a later change of its content shows."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple


class Identity(NamedTuple):
    """Two equal ones are the same file with the same content. Size in bytes, times in ns.

    A program can set `mtime_ns`, but not `ctime_ns`, which every change of the content moves.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def identity_of(path: str | int) -> Identity:
    """The identity of a regular file, by path (links are followed) or descriptor.

    Raises:
        OSError: it cannot be asked, or is no regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    return Identity(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )
