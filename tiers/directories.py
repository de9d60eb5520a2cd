"""Whether a directory could be used by a tier, found out without changing anything."""

from __future__ import annotations

import os
import stat

from kvstrata.tiers.base import TierConfigError


def check_directory(path: str) -> None:
    """Look whether `path`, an absolute one, is a directory to write in, or can be made one.

    A directory on a read-only file system passes: what is there can be loaded.

    Raises:
        TierConfigError: naming the path, what is wrong with it, and the remedy.
    """
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise TierConfigError(
                f"{path!r} is not a directory; give one, or the path of a new one"
            )
        if not _writable(path) and not os.statvfs(path).f_flag & os.ST_RDONLY:
            raise TierConfigError(
                f"{path!r} is not writable by {_user()}: it belongs to {_owner(path)}; change its "
                "owner or mode, or choose another directory"
            )
        return
    parent = os.path.dirname(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise TierConfigError(f"{path!r} cannot be made: {parent!r} is not a directory")
    if not _writable(parent):
        raise TierConfigError(
            f"{path!r} does not exist and cannot be made: {parent!r} is not writable by {_user()}; "
            f"make it first: sudo install -d -o {os.geteuid()} -g {os.getegid()} {path}"
        )


def _writable(path: str) -> bool:
    return os.access(path, os.W_OK | os.X_OK, effective_ids=True)


def _user() -> str:
    return f"this user (uid {os.geteuid()})"


def _owner(path: str) -> str:
    found = os.stat(path)
    return f"uid {found.st_uid}, gid {found.st_gid}, mode {stat.S_IMODE(found.st_mode):04o}"
