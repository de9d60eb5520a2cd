"""Where bad files go, so that nobody believes them again and one can look at them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import suppress
from typing import Literal

from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths

MAX_FILES = 100


Identity = tuple[int, int, int]
# "gone": it is not there any more; "stuck": it is, and cannot be moved
Taken = Literal["moved", "gone", "stuck"]


def identity(found: os.stat_result) -> Identity:
    """Device, inode and change time (ns): that of a recycled file differs by the last."""
    return found.st_dev, found.st_ino, found.st_ctime_ns


def quarantine_path(paths: NamespacePaths, path: str, cause: str) -> str:
    """Where `path` would be put now for this cause: `<time in ns>-<cause>-<its name>`."""
    name = f"{time.time_ns()}-{cause}-{os.path.basename(path)}"
    return os.path.join(paths.quarantine, name)


class Quarantine:
    """The quarantine of one namespace: at most `MAX_FILES` files, the oldest go first."""

    def __init__(self, paths: NamespacePaths, dir_mode: int) -> None:
        self._paths = paths
        self._dir_mode = dir_mode
        self._lock = threading.Lock()

    def path(self, path: str, cause: str) -> str:
        """See `quarantine_path`."""
        return quarantine_path(self._paths, path, cause)

    def take(self, path: str, cause: str, found_bad: Identity | None) -> Taken:
        """Move `path` here.

        `found_bad` is what was found bad: a file that took its place, or was changed, meanwhile
        stays. None: whatever is there.
        """
        target = self.path(path, cause)
        try:
            if found_bad is not None and identity(nofollow.lstat(path)) != found_bad:
                return "gone"
            try:
                nofollow.rename(path, target)
            except FileNotFoundError:
                nofollow.make_directories(self._paths.quarantine, self._paths.root, self._dir_mode)
                nofollow.rename(path, target)
        except FileNotFoundError:
            return "gone"
        except OSError:
            return "stuck"
        with self._lock:
            self._trim()
        return "moved"

    def _trim(self) -> None:
        with suppress(OSError), nofollow.directory(self._paths.quarantine) as fd:
            names = sorted(nofollow.listdir(self._paths.quarantine))
            for name in names[: max(0, len(names) - MAX_FILES)]:
                with suppress(OSError):
                    try:
                        os.unlink(name, dir_fd=fd)
                    except IsADirectoryError:
                        shutil.rmtree(name, ignore_errors=True, dir_fd=fd)
