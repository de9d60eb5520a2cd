"""Everything that is wrong below a root, and putting it right.

Servers may be at work there. A bad file is moved only while it is still the one that was read;
a temporary goes only if its writer is dead; a page is moved only to where nothing is; and the
books are left to the members, whose keeper tends them, unless none lives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME
from kvstrata.tiers.fs.budget.limits import Limits
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.quarantine import Quarantine, identity
from kvstrata.tiers.fs.files.temporary import remove_abandoned
from kvstrata.tiers.fs.tools.audit import Damage, Remedy, audit
from kvstrata.tiers.fs.tools.listing import check_config, namespaces
from kvstrata.tiers.fs.tools.scan import (
    FileReport,
    RootReport,
    check_place,
    check_root,
    known_layouts,
)
from kvstrata.tiers.fs.tools.trim import trim
from kvstrata.tiers.page.identity import is_key

# Perhaps the disk's fault, or this user's: the file may be sound for others.
_LEFT = {"missing", "unreadable", "io-error", "no-space", "read-only"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: "page", "place" (a sound page where it does not belong), "config", "directory",
            "temporary" or "books".
        reason: cause and detail.
        repair: "moved", "quarantined", "removed" or "rebuilt"; None while nothing was done.
        remains: it is what a member leaves that is killed, and no damage; the next member that
            starts there cleans it.
    """

    path: str
    kind: str
    reason: str
    repair: str | None = None
    remains: bool = False


@dataclass(frozen=True, slots=True)
class Examination:
    """Totals over the page files, what was found, and how many members were living."""

    report: RootReport
    findings: list[Finding]
    members: int


def examine(
    root: str, fix: bool, progress: Callable[[FileReport], None] | None = None
) -> Examination:
    """Check everything below `root`; with `fix`, put right what can be.

    `progress` is called with the report of each page file as it was read.

    Raises:
        OSError: `root` is not a readable directory.
    """
    root = os.path.realpath(root)
    report = check_root(root, progress)
    findings = [
        Finding(
            bad.path,
            "place" if bad.cause in ("key", "namespace") else bad.kind,
            f"{bad.cause}: {bad.detail}",
            _repair_file(root, bad) if fix else None,
        )
        for bad in report.bad
    ]
    for path in report.abandoned:
        repair = "removed" if fix and remove_abandoned(path) else None
        findings.append(Finding(path, "temporary", "abandoned: its writer is dead", repair, True))
    books, members = _examine_books(root, fix)
    findings = sorted([*findings, *books], key=lambda finding: finding.path)
    return Examination(report, findings, members)


def _repair_file(root: str, bad: FileReport) -> str | None:
    """What was done with a bad file: "moved", "quarantined", or None if it is as it was."""
    if bad.cause is None or bad.cause in _LEFT or bad.found_bad is None:
        return None
    if bad.cause in ("key", "namespace") and _move_to_its_place(root, bad):
        return "moved"
    directory = os.path.relpath(bad.path, root).split(os.sep)[0]
    paths = NamespacePaths(root, directory.removesuffix("_r0"))
    with suppress(OSError):
        if Quarantine(paths, _mode(paths)).take(bad.path, bad.cause, bad.found_bad) == "moved":
            return "quarantined"
    return None


def _move_to_its_place(root: str, bad: FileReport) -> bool:
    """Move a sound page to where its key belongs, if that is here and free; whether it was."""
    header = bad.header
    if header is None or not is_key(header.key):
        return False
    for paths in namespaces(root):
        target = paths.page(header.key)
        there = replace(bad, path=target, cause=None)
        fits = check_place(paths, there, known_layouts(paths)).cause is None
        if not fits or check_config(paths) is not None:
            continue
        with suppress(OSError):
            if nofollow.lexists(target) or identity(nofollow.lstat(bad.path)) != bad.found_bad:
                return False
            nofollow.make_directories(os.path.dirname(target), root, _mode(paths))
            # a member that stores this very page meanwhile is overwritten by its equal
            nofollow.rename(bad.path, target)
            return True
    return False


def _mode(paths: NamespacePaths) -> int:
    """Permission bits for new directories: those of the namespace."""
    for path in (paths.pages, paths.home):
        with suppress(FileNotFoundError):
            return stat.S_IMODE(nofollow.lstat(path).st_mode) & 0o777 | 0o700
    return 0o700


def _examine_books(root: str, fix: bool) -> tuple[list[Finding], int]:
    """What is wrong with the books, and the number of members that live."""
    path, findings = os.path.join(root, BOOKS_NAME), []
    try:
        found = audit(root)
    except OSError as error:
        return [Finding(path, "books", f"unreadable: {error.strerror or error}")], 0
    left = found.damage
    if fix and found.damage:
        try:
            _rebuild_books(root, found.damage)
            left = audit(root).damage
        except OSError as error:
            findings.append(Finding(path, "books", f"not rebuilt: {error.strerror or error}"))
    for damage in found.damage:
        repair = "rebuilt" if damage.remedy is Remedy.BOOK else "removed"
        mended = None if damage in left else repair
        findings.append(Finding(damage.path, "books", damage.reason, mended, damage.remains))
    return findings, len(found.living)


def _rebuild_books(root: str, damage: tuple[Damage, ...]) -> None:
    """Be the keeper for one scan, between removing what is in its way and what it leaves."""
    _remove(damage, Remedy.REMOVE)
    trim(root, Limits())
    _remove(audit(root).damage, Remedy.BOOK_AND_REMOVE)


def _remove(damage: tuple[Damage, ...], remedy: Remedy) -> None:
    for each in damage:
        if each.remedy is remedy:
            with suppress(OSError):
                nofollow.unlink(each.path)
