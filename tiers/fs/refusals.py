"""Why a directory cannot be the root, in words that say what to do about it."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, LEDGER_NAME
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR, PAGES_DIR

_ANOTHER = "choose another directory"
_OWN = "give a directory of its own, such as '/var/lib/kvstrata', which the servers' user owns"
_DENIED = (errno.EACCES, errno.EPERM)
_NO_DIRECTORY = (errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
_FULL = {errno.ENOSPC: "is on a full disk", errno.EDQUOT: "is over the disk quota"}


def refusal(root: str, error: OSError) -> str:
    """What is wrong with `root`, where `error` was met, and after a semicolon the remedy."""
    return "; ".join(_reason_and_remedy(root, error))


def refusal_by_look(path: str) -> str:
    """As `refusal`, found out without changing anything; nothing where no reason is seen.

    A directory on a read-only file system passes: what is there can be loaded.
    """
    where = path
    while not os.path.lexists(where):
        where = os.path.dirname(where)
    if not os.path.isdir(where):
        return refusal(path, OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if os.access(where, os.W_OK | os.X_OK, effective_ids=True):
        return ""
    try:
        read_only = bool(os.statvfs(where).f_flag & os.ST_RDONLY)
    except OSError as error:
        return refusal(path, error)
    if read_only and where == path:
        return ""
    number = errno.EROFS if read_only else errno.EACCES
    return refusal(path, OSError(number, os.strerror(number)))


def books_refusal(root: str) -> str:
    """As `refusal`, where the books of another user are at `root`; else nothing."""
    books = os.path.join(root, BOOKS_NAME)
    for path in (books, os.path.join(books, LEDGER_NAME)):
        with suppress(FileNotFoundError):
            os.stat(path)
            if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
                return refusal(root, PermissionError(errno.EACCES, os.strerror(errno.EACCES), path))
    return ""


def is_whole_system(root: str) -> bool:
    """Whether `root` is `/`, of which no server can be the only owner."""
    return os.path.realpath(root) == "/"


def _reason_and_remedy(root: str, error: OSError) -> tuple[str, str]:
    number = error.errno or 0
    if is_whole_system(root):
        return "is the root of the whole file system", _OWN
    if number in _FULL:
        return _FULL[number], "free some space or choose another disk"
    if number in _NO_DIRECTORY and (in_the_way := _in_the_way(root)):
        return in_the_way
    found, above = _look(root)
    if found is None and number in (*_DENIED, errno.EROFS, errno.ENOENT):
        return _missing(root, above, error)
    if number == errno.EROFS:
        return "is on a read-only file system", _ANOTHER
    if found is not None and number in _DENIED:
        return _denied(root, found, error)
    return f"cannot be used ({error})", f"see to its disk or its mount, or {_ANOTHER}"


def _in_the_way(root: str) -> tuple[str, str] | None:
    """What lies at `root` or above it and is no directory."""
    path = root
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if os.path.isdir(path):
        return None
    if os.path.islink(path) and not os.path.exists(path):
        return (
            f"cannot be made: {path!r} is a symbolic link to {os.readlink(path)!r}, which is not "
            "there",
            f"make that, or {_ANOTHER}",
        )
    if path == root:
        return "is not a directory", "give a directory, or a path where one can be made"
    return f"cannot be made: {path!r} is not a directory", _ANOTHER


def _missing(root: str, above: str, error: OSError) -> tuple[str, str]:
    """It is not there, as far as this user can see, and `above` is the nearest that is."""
    if error.errno in _DENIED and not os.access(above, os.X_OK, effective_ids=True):
        return (
            f"cannot be reached: this user ({os.geteuid()}) may not pass {above!r}",
            f"give it the right to (x), or {_ANOTHER}",
        )
    if error.errno in _DENIED:
        owner = f"{os.geteuid()}:{os.getegid()}"
        return (
            f"does not exist, and this user ({os.geteuid()}) may not make it in {above!r}",
            f"make it as root (mkdir -p {root} && chown {owner} {root}), or {_ANOTHER}",
        )
    if error.errno == errno.EROFS:
        return (
            f"does not exist, and {above!r} is on a read-only file system",
            f"mount a volume there, or {_ANOTHER}",
        )
    return f"cannot be made in {above!r} ({error.strerror or error})", _ANOTHER


def _denied(root: str, found: os.stat_result, error: OSError) -> tuple[str, str]:
    """It is there, and this user may not write in it, or not use something in it."""
    if os.access(root, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        _, inner = _look(str(error.filename or root))
        if inner.startswith(f"{root}/"):
            return (
                f"holds {inner!r}, which this user ({os.geteuid()}) may not use: "
                f"it has {_owner(os.stat(inner))}",
                "servers of several users need a group and modes (docs/security.md); run all as "
                f"one user, or {_ANOTHER}",
            )
    elif _has_others(root):
        return f"is not writable by this user ({os.geteuid()}), and holds other things", _OWN
    return (
        f"is not writable by this user ({os.geteuid()}): it has {_owner(found)}",
        f"change its owner or mode (as root: chown {os.geteuid()} {root}), or {_ANOTHER}",
    )


def _owner(found: os.stat_result) -> str:
    return f"user {found.st_uid}, group {found.st_gid}, mode {stat.S_IMODE(found.st_mode):04o}"


def _has_others(root: str) -> bool:
    """Whether more than a cache's files are there, as far as that can be seen."""
    with suppress(OSError):
        return any(
            name not in (BOOKS_NAME, "lost+found")
            and not NAMESPACE_DIR.fullmatch(name)
            and not PAGES_DIR.fullmatch(name)
            for name in os.listdir(root)
        )
    return False


def _look(path: str) -> tuple[os.stat_result | None, str]:
    """(what is at `path`, None if this user sees nothing there; the nearest above it)."""
    with suppress(OSError):
        return os.stat(path), path
    above = os.path.dirname(path)
    while above != "/" and not os.path.exists(above):
        above = os.path.dirname(above)
    return None, above
