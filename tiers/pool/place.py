"""Where pools lie, and whether one can be there: a directory of this user's in shared memory."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing, suppress

from kvstrata.tiers.base import PageRegion, TierConfigError
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, LEDGER_NAME, Ledger
from kvstrata.tiers.fs.budget.limits import default_floor
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.refusals import refusal
from kvstrata.tiers.machine.disk import disk_at, file_system, mount_of
from kvstrata.tiers.machine.memory import SHM, available_memory, untaken_memory
from kvstrata.tiers.options import WrongValue, format_bytes

FILE_MODE, DIR_MODE = 0o600, 0o700
# Mount options of a tmpfs that gives out memory in huge pages (tmpfs(5)); "advise" needs a mapping.
_HUGE = frozenset(("huge=within_size", "huge=always"))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_name(key: str, value: object) -> str:
    """A name that is a plain file name everywhere.

    Raises:
        TierConfigError: it is not.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise WrongValue(
            key,
            value,
            'a plain file name, for example "node": at most 64 letters, digits, ".", "_" and "-", '
            "of which the first is a letter or a digit",
        )
    return value


def pool_path(name: str) -> str:
    """The directory of this user's pool of that name, without links on the way."""
    return f"{_prefix()}{name}"


def name_of(path: str) -> str | None:
    """The name of this user's pool whose path it is, free of links; None if it is another path."""
    name = path.removeprefix(_prefix())
    return name if name != path and _NAME.fullmatch(name) else None


def pool_names() -> list[str]:
    """The names of this user's pools.

    Raises:
        OSError: shared memory cannot be looked at.
    """
    prefix = os.path.basename(_prefix())
    found = (entry.removeprefix(prefix) for entry in os.listdir(SHM) if entry.startswith(prefix))
    return sorted(name for name in found if _NAME.fullmatch(name))


def make_pool(name: str) -> str:
    """Make the pool's directory where it is missing; its path.

    Raises:
        TierConfigError: shared memory is none, or what is there is not this user's alone.
    """
    check_shared_memory()
    path = pool_path(name)
    try:
        with suppress(FileExistsError):
            nofollow.mkdir(path, DIR_MODE)
    except OSError as error:
        raise TierConfigError(f"name: {name!r}: {path!r} {refusal(path, error)}") from error
    check_own(name)
    return path


def check_shared_memory() -> None:
    """Refuse a machine where pools cannot be.

    Raises:
        TierConfigError: naming what is missing.
    """
    if not os.path.isdir(SHM) or file_system(str(SHM)) not in ("tmpfs", "unknown"):
        wrong = "is no tmpfs" if os.path.isdir(SHM) else "is missing"
        raise TierConfigError(
            f"type: 'pool' keeps its pages in {SHM}, which {wrong}: mount a tmpfs there, or use "
            "the fs tier"
        )


def check_own(name: str) -> None:
    """Refuse what is in the place of the pool, if anything is, and not this user's alone.

    Raises:
        TierConfigError: naming what is wrong with it.
    """
    path = pool_path(name)
    try:
        why = wrong_pool(os.lstat(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise TierConfigError(f"name: {name!r}: {path!r} {refusal(path, error)}") from error
    if why:
        raise TierConfigError(f"name: {name!r}: {path!r} {why}")


def slow_memory() -> str:
    """Why pools here are slower than they could be, and the remedy; else nothing.

    The figure is that of docs/benchmarks.md.
    """
    if _HUGE & set(mount_of(str(SHM)).options):
        return ""
    return (
        f"{SHM} gives out memory in small pages; with huge ones (mount -o "
        f"remount,huge=within_size {SHM}) a pool loads up to twice as fast"
    )


def wrong_pool(found: os.stat_result) -> str:
    """Why what was found cannot be a pool of this user's, and the remedy; else nothing."""
    return wrong_owner(found) or _wrong_mode(found)


def wrong_owner(found: os.stat_result) -> str:
    """Why what was found is no directory of this user's, and the remedy; else nothing."""
    another = "remove it, or give another name"
    if stat.S_ISLNK(found.st_mode):
        return f"is a symbolic link, which may lead anywhere; {another}"
    if not stat.S_ISDIR(found.st_mode):
        return f"is not a directory; {another}"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, and not to this one ({os.geteuid()}); {another}"
    return ""


def _wrong_mode(found: os.stat_result) -> str:
    mode = stat.S_IMODE(found.st_mode) & 0o777
    return "" if mode == DIR_MODE else f"has mode {mode:04o}, which lets others in; chmod 700 it"


def check_fit(path: str, max_bytes: int, reserved: int) -> None:
    """Refuse a pool that memory could not hold beside the CPU tier.

    Args:
        path: the pool's directory, which need not exist; what it holds already counts as room.
        max_bytes: its budget.
        reserved: bytes of memory that the CPU tier is yet to take.

    Raises:
        TierConfigError: naming what is missing.
    """
    held, (free, where) = _held(path), _free()
    most = max(0, held + free - reserved)
    if max_bytes > most:
        raise TierConfigError(
            f"max_bytes: {format_bytes(max_bytes)} do not fit: the pool has {format_bytes(held)}, "
            f"{format_bytes(max(0, free))} of {where} can be had, and {format_bytes(reserved)} of "
            f'that are for the CPU tier; give at most "{most >> 20}MiB", lower cpu_bytes_to_use, '
            f"or give the machine more (containers: memory limit and --shm-size)"
        )


def most_bytes(path: str) -> int:
    """How large the pool at `path` may become where nobody said it."""
    return max(0, _held(path) + _free()[0])


def _free() -> tuple[int, str]:
    """Bytes that pools may yet take; and of what there are so few."""
    disk = disk_at(str(SHM))
    rooms = [(disk.free - default_floor(disk.total), str(SHM)), (available_memory(), "memory")]
    return min(rooms)


def _prefix() -> str:
    return os.path.join(os.path.realpath(SHM), f"kvstrata-pool-{os.geteuid()}-")


def _held(path: str) -> int:
    """Bytes that the pool has, by its books, or counted where they do not know."""
    if nofollow.lexists(os.path.join(path, BOOKS_NAME, LEDGER_NAME)):
        with (
            suppress(OSError),
            closing(Ledger(path, FILE_MODE, DIR_MODE)) as ledger,
            ledger.locked() as books,
        ):
            if books.known:
                return books.taken(path).nbytes
    return sum(_sizes(path))


def _sizes(path: str) -> Iterator[int]:
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(directory, name)).st_blocks * 512


def without_memory(region: PageRegion | None) -> int:
    """Bytes of the CPU tier that take no memory yet."""
    if region is None:
        return 0
    return untaken_memory(region.fd, region.offset + region.slots * region.slot_bytes)
