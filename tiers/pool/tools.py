"""What the command line does to pools: who lives on one, and removal."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from kvstrata.tiers.fs.budget.lease import lease_path
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR, PAGES_DIR
from kvstrata.tiers.fs.tools.audit import audit
from kvstrata.tiers.pool.place import pool_path, wrong_owner

_LOCKS = "/proc/locks"


class PoolKept(Exception):
    """A pool that is not to be removed; the message says why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Living:
    """Who lives on a pool.

    Attributes:
        members: how many I/O processes; an engine has two.
        pids: of those that this process can see, which those in other containers are not.
    """

    members: int
    pids: tuple[int, ...]


def living(path: str) -> Living:
    """Who lives on the pool at `path`.

    Raises:
        OSError: its books cannot be read.
    """
    members = audit(path).living
    directory = os.path.join(path, BOOKS_NAME)
    leases = {_lock_name(lease_path(directory, member)) for member in members}
    return Living(len(members), tuple(sorted(_holders(leases))))


def remove_pool(name: str) -> None:
    """Delete this user's pool of that name, and nothing else.

    Raises:
        PoolKept: somebody lives on it, or it is no pool.
        OSError: there is none, or it cannot be deleted.
    """
    path = pool_path(name)
    if why := wrong_owner(os.lstat(path)):
        raise PoolKept(f"{path!r} {why}")
    if foreign := sorted(entry for entry in os.listdir(path) if not _is_ours(entry)):
        raise PoolKept(f"{path!r} holds {foreign[0]!r}, which no server put there: move it away")
    if (found := living(path)).members:
        pids = f" (processes {', '.join(map(str, found.pids))})" if found.pids else ""
        seen = "" if len(found.pids) == found.members else ", also of other containers"
        raise PoolKept(
            f"pool {name!r} is in use: {found.members} I/O processes of servers live on it{pids}"
            f"{seen}; stop the servers first"
        )
    shutil.rmtree(path)


def _is_ours(entry: str) -> bool:
    return entry == BOOKS_NAME or bool(NAMESPACE_DIR.fullmatch(entry) or PAGES_DIR.fullmatch(entry))


def _lock_name(path: str) -> str:
    """As /proc/locks names the file (proc(5)); nothing if it went away."""
    try:
        found = os.lstat(path)
    except OSError:
        return ""
    major, minor = os.major(found.st_dev), os.minor(found.st_dev)
    return f"{major:02x}:{minor:02x}:{found.st_ino}"


def _holders(names: set[str]) -> set[int]:
    """The processes that hold a lock on one of these files, where the kernel tells."""
    try:
        with open(_LOCKS) as file:
            rows = [line.split() for line in file]
    except OSError:
        return set()
    return {int(row[4]) for row in rows if row[1] == "FLOCK" and row[5] in names}
