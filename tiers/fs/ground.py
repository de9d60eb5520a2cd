"""Where a root stands, so that one that was removed can be made again, there and nowhere else.

Whoever empties a cache may remove its directory as well. But what stands in its place may also be
what lies under a mount that went away, which is not ours to fill. So a root is made again only in
the very directory in which it was, and only if nothing was mounted on it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass

from kvstrata.tiers.fs.files import nofollow


@dataclass(frozen=True, slots=True)
class Ground:
    """A root and the directory above it.

    Attributes:
        root: the root's real path.
        above: device and inode of the directory above; None if a file system was mounted here.
        mode: the root's permission bits.
    """

    root: str
    above: tuple[int, int] | None
    mode: int

    @classmethod
    def of(cls, root: str) -> Ground:
        """That of a root which exists, by its real path.

        Raises:
            OSError: it cannot be looked at.
        """
        found, above = nofollow.lstat(root), nofollow.lstat(os.path.dirname(root))
        one_disk = found.st_dev == above.st_dev
        place = (above.st_dev, above.st_ino) if one_disk else None
        return cls(root, place, stat.S_IMODE(found.st_mode))

    def restore(self) -> None:
        """Make the root again if it is missing.

        Raises:
            FileNotFoundError: it is, and this is not the place where it was.
            OSError: it cannot be made.
        """
        if nofollow.lexists(self.root):
            return
        above = nofollow.lstat(os.path.dirname(self.root))
        if (above.st_dev, above.st_ino) != self.above:
            raise FileNotFoundError(errno.ENOENT, "its disk is not there", self.root)
        with suppress(FileExistsError):  # another server was faster
            nofollow.mkdir(self.root, self.mode)
