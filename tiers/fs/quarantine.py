"""Where bad files go, so that nobody believes them again and one can look at them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import suppress

from kvstrata.tiers.fs import nofollow
from kvstrata.tiers.fs.layout import NamespacePaths

MAX_FILES = 100


class Quarantine:
    """The quarantine of one namespace: at most `MAX_FILES` files, the oldest go first.

    A file is named `<time in ns>-<cause>-<its name>`.
    """

    def __init__(self, paths: NamespacePaths, dir_mode: int) -> None:
        self._paths = paths
        self._dir_mode = dir_mode
        self._lock = threading.Lock()

    def take(self, path: str, cause: str, inode: tuple[int, int] | None) -> bool:
        """Move `path` here; True if it is not at `path` any more.

        `inode` (device, inode) is what was found bad: another file that took its place
        meanwhile stays. None: whatever is there.
        """
        name = f"{time.time_ns()}-{cause}-{os.path.basename(path)}"
        target = os.path.join(self._paths.quarantine, name)
        try:
            found = nofollow.lstat(path)
            if inode is not None and (found.st_dev, found.st_ino) != inode:
                return True
            try:
                nofollow.rename(path, target)
            except FileNotFoundError:
                nofollow.make_directories(self._paths.quarantine, self._paths.root, self._dir_mode)
                nofollow.rename(path, target)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        with self._lock:
            self._trim()
        return True

    def _trim(self) -> None:
        with suppress(OSError), nofollow.directory(self._paths.quarantine) as fd:
            names = sorted(nofollow.listdir(self._paths.quarantine))
            for name in names[: max(0, len(names) - MAX_FILES)]:
                with suppress(OSError):
                    try:
                        os.unlink(name, dir_fd=fd)
                    except IsADirectoryError:
                        shutil.rmtree(name, ignore_errors=True, dir_fd=fd)
